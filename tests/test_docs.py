"""The documentation holds: code blocks run, the API pages are complete, the site stands alone."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
from pathlib import Path

import pytest

from trimtab.cli import COMMANDS, Command, main

ROOT = Path(__file__).parent.parent
PAGES = sorted(p.relative_to(ROOT) for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "results")
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of one language in a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [code for name, code in BLOCK.findall(text) if name == language]


WITH_PYTHON = [page for page in (Path("README.md"), *PAGES) if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=str)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": f"blocks of {page}"}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page}, block {number}", "exec"), namespace)


def test_tables_are_those_of_the_measured_files() -> None:
    folder = ROOT / "docs" / "results"
    for name, text in runpy.run_path(str(folder / "make.py"))["pages"]().items():
        assert (folder / name).read_text(encoding="utf-8") == text, "write it anew: python docs/results/make.py"


def test_pages_name_nothing_on_this_machine() -> None:
    for page in (Path("README.md"), Path("CONTRIBUTING.md"), Path("CHANGELOG.md"), *PAGES):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert str(ROOT) not in text
        assert not re.search(r"/home/|/root/|/tmp/", text)


def test_every_public_module_is_in_the_api_pages() -> None:
    shown = {
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    public = {module_name(path) for path in (ROOT / "src" / "trimtab").rglob("*.py") if has_names(path)}
    private = {name for name in public if re.search(r"\._|\.cli\b", name)}
    assert shown == public - private - {"trimtab"}


def module_name(path: Path) -> str:
    """The dotted name of a module file."""
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


def has_names(path: Path) -> bool:
    """Whether the module defines what it exports, and does not only pass on names of its submodules."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    exported = {
        name
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        for name in ast.literal_eval(node.value)
    }
    return bool(defined & exported)


def test_no_page_asks_another_server_for_anything() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in config
    assert not re.search(r"https?://", config)
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert not re.search(r"<(script|link|img|iframe)\b|!\[[^]]*\]\(https?:", text)


def test_pages_of_the_site_are_in_its_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    assert sorted(re.findall(r"[\w/-]+\.md", navigation)) == sorted(
        os.fspath(page.relative_to("docs")) for page in PAGES
    )


def commands() -> list[str]:
    """Every command line of `trimtab` in the pages, continued lines joined, without a redirection."""
    found = []
    for page in (Path("README.md"), *PAGES):
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"^    (trimtab [^>\n]*)", text, re.MULTILINE)
    return sorted(set(found))


@pytest.mark.parametrize("line", [line for line in commands() if "--config" not in line])
def test_commands_of_the_pages_are_accepted(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    printed(shlex.split(line)[1:], capsys)


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `trimtab WORDS --print_config` prints, which it does only when it accepts the words."""
    with pytest.raises(SystemExit) as stopped:
        main([word for word in words if word != "--print_config"] + ["--print_config"])
    output = capsys.readouterr()
    assert stopped.value.code in (0, None), output.err
    return output.out


def test_a_printed_configuration_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = [line for line in commands() if "--print_config" in line]
    configuration = printed(shlex.split(line)[1:], capsys)
    Path("run.yaml").write_text(configuration)
    assert printed(["sae", "train", "--config", "run.yaml"], capsys) == configuration


def test_every_command_has_its_line() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, entry in COMMANDS.items():
        for path in [name] if isinstance(entry, Command) else [f"{name} {member}" for member in entry]:
            assert f"| `trimtab {path}` |" in page

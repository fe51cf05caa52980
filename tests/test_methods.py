"""The catalogue is complete, agrees with the packages that exist, and is what README and docs print."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab
from trimtab.core.errors import TrimtabError
from trimtab.methods import METHODS, Method, bibtex, catalogue, find, markdown_table
from trimtab.references import REFERENCES

ROOT = Path(__file__).parent.parent
SLUGS = {
    "aot-p-tuning",
    "bias-steering",
    "caif",
    "diffusion-halting",
    "feature-flow",
    "hierarchical-topk",
    "kron-sae",
    "lime",
    "ne-dreamer",
    "palbert",
    "rebased",
    "sae-boost",
    "star-diffusion",
    "steering-mechanics",
    "tr-align",
    "trb",
    "varan",
    "weight-interpolation",
    "weight-squeezing",
}
FAMILIES = {
    "align",
    "distill",
    "adapters",
    "merge",
    "sae",
    "interp",
    "decoding",
    "diffusion",
    "models",
    "worlds",
}


def test_the_nineteen_methods_are_there_once() -> None:
    assert len(METHODS) == 19
    assert {method.slug for method in METHODS} == SLUGS
    assert {method.family for method in METHODS} == FAMILIES
    assert len({method.entry_point for method in METHODS}) == 19


def test_entry_points_are_names_of_their_family() -> None:
    for method in METHODS:
        assert re.fullmatch(rf"trimtab\.{method.family}\.[A-Za-z_]+", method.entry_point)


def test_what_is_one_line() -> None:
    for method in METHODS:
        assert 20 <= len(method.what) <= 100
        assert "\n" not in method.what
        assert "|" not in method.what


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
def test_available_is_what_an_import_finds(method: Method) -> None:
    module, _, name = method.entry_point.rpartition(".")
    exists = importlib.util.find_spec(module) is not None
    found = exists and hasattr(importlib.import_module(module), name)
    assert method.available == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('__all__ = ["Thing"]\n', True),
        ('"""Doc."""\n\nx = 1\n__all__ = [\n    "Other",\n    "Thing",\n]\n', True),
        ('__all__ = ["Other"]\nThing = 1\n', False),
        ("Thing = 1\n", False),
        ('raise RuntimeError("read, not imported")\n__all__ = ["Thing"]\n', True),
    ],
)
def test_available_reads_all_without_importing(
    source: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"catalogue_probe_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    method = Method("thing", "Thing", "sae", f"{name}.Thing", "what it is for", "2505.22255")
    assert method.available is found
    assert name not in sys.modules


def test_an_entry_point_in_no_module_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "catalogue_probe_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for entry_point in ("catalogue_probe_absent.Thing", "catalogue_probe_folder.Thing"):
        assert not Method("thing", "Thing", "sae", entry_point, "what it is for", "2505.22255").available


def test_importing_the_catalogue_is_light() -> None:
    code = (
        "import sys, trimtab.methods as m; m.catalogue(); "
        "print(sorted({'torch', 'numpy', 'transformers', 'trl', 'peft'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"


def test_catalogue_is_json_with_every_column() -> None:
    rows = json.loads(json.dumps(catalogue()))
    assert [row["slug"] for row in rows] == [method.slug for method in METHODS]
    for row in rows:
        assert set(row) == {
            "slug",
            "name",
            "family",
            "entry_point",
            "arxiv",
            "references",
            "available",
            "what",
        }
        assert isinstance(row["available"], bool)
        assert row["references"][0] == row["arxiv"]


def test_every_paper_belongs_to_a_method_and_keys_are_unique() -> None:
    used = [reference for method in METHODS for reference in method.references]
    assert sorted(reference.arxiv for reference in used) == sorted(reference.arxiv for reference in REFERENCES)
    assert len({reference.key for reference in REFERENCES}) == len(REFERENCES)
    for reference in REFERENCES:
        assert re.fullmatch(r"\d{4}\.\d{5}", reference.arxiv)
        assert re.fullmatch(r"[a-z]+\d{4}[a-z]+", reference.key)
        assert 0 <= reference.year - 2000 - int(reference.arxiv[:2]) <= 1
        for author in reference.authors.split(" and "):
            assert re.fullmatch(r"[A-Z][\w ]+, [A-Z][\w ]+", author)


def test_bibtex_has_one_entry_for_each_paper() -> None:
    assert bibtex("palbert") == (
        "@inproceedings{balagansky2022palbert,\n"
        "  title         = {{PALBERT: Teaching ALBERT to Ponder}},\n"
        "  author        = {Balagansky, Nikita and Gavrilov, Daniil},\n"
        "  booktitle     = {NeurIPS},\n"
        "  year          = {2022},\n"
        "  eprint        = {2204.03276},\n"
        "  archiveprefix = {arXiv},\n"
        "}\n"
    )
    assert bibtex("feature-flow").count("@") == 2
    assert bibtex("trb").startswith("@misc{plyusov2026trust,")
    for method in METHODS:
        entries = bibtex(method.slug)
        assert entries.count("{") == entries.count("}")


def test_the_bibliography_is_the_catalogues() -> None:
    written = (ROOT / "docs" / "citations.bib").read_text(encoding="utf-8")
    printed = "\n".join(bibtex(method.slug) for method in METHODS)
    assert written == printed, "write it anew: python -m trimtab.methods --bibtex > docs/citations.bib"


def test_the_table_of_the_readme_is_the_catalogues() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    between = readme.split("<!-- --8<-- [start:methods] -->\n")[1].split("<!-- --8<-- [end:methods] -->")[0]
    assert between.strip() == markdown_table().strip(), "print it anew: python -m trimtab.methods --markdown"


def test_the_module_prints_both_forms() -> None:
    for flag, expected in (
        ("--markdown", markdown_table()),
        ("--bibtex", "\n".join(bibtex(m.slug) for m in METHODS)),
    ):
        command = [sys.executable, "-m", "trimtab.methods", flag]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == expected


def test_an_unknown_method_names_the_near_ones() -> None:
    with pytest.raises(TrimtabError, match="method='kron' is not known") as error:
        find("kron")
    assert "kron-sae" in str(error.value)
    with pytest.raises(TrimtabError, match="tr-align"):
        bibtex("tr_align")


def test_the_citation_file_names_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {trimtab.__version__}\n" in citation
    assert "\ntype: software\n" in citation
    assert "\nlicense: Apache-2.0\n" in citation

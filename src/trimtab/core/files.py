"""Files and directories that are complete or absent: written aside, flushed to the disk, renamed.

A file or directory `name` is written as `name.tmp-<pid>`. A directory that is replaced waits as
`name.old-<pid>` between the two renames that this takes, and goes back if the process was killed there.
One process at a time writes to a path: what others left under these names is cleared away.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.core.errors import TrimtabError

__all__ = ["remove", "write_directory", "write_file"]

_ASIDE = re.compile(r"\.(tmp|old)-\d+$")


@contextmanager
def write_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`, which becomes `path` when the block ends well.

    Its files are flushed to the disk first. An existing directory is replaced whole, by renaming; if the
    block raises, it is left as it was and the temporary one is removed. A symbolic link to a directory is
    followed: the directory is replaced, the link stays.

    Raises:
        TrimtabError: if `path` is a file, or a directory with files that the new one does not have (they
            would be lost: replacing is meant for a directory that was written in the same way).
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in _siblings(path, "tmp"):
        remove(leftover)
    for leftover in _siblings(path, "old"):
        # Killed after the second rename, the replaced one is done with; before it, it goes back.
        if path.exists():
            remove(leftover)
        else:
            leftover.rename(path)
    temporary = _beside(path, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        # safetensors makes its files private; here the umask decides, which the directory shows.
        mode = temporary.stat().st_mode & 0o666
        for directory, _, names in os.walk(temporary, topdown=False):
            for name in names:
                (Path(directory) / name).chmod(mode)
                _flush(Path(directory) / name)
            _flush(Path(directory))
        _put_in_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_file(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, where a reader or a killed process finds the old content or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in _siblings(path, "tmp"):
        if not _is_alive(int(leftover.name.rpartition("-")[2])):
            remove(leftover)
    temporary = _beside(path, "tmp")
    try:
        temporary.write_bytes(data)
        _flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def remove(path: Path) -> None:
    """Delete a file, link or directory; a warning if that fails, as the next writer tries again.

    A directory is first renamed to a temporary name, so that a half-deleted one is never read.
    """
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
            return
        if not _ASIDE.search(path.name):
            path = path.rename(_beside(path, "tmp"))
        shutil.rmtree(path)
    except OSError as error:
        warnings.warn(f"{path} could not be deleted: {error}", stacklevel=2)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; an existing directory steps aside first and is removed last."""
    if not path.exists():
        temporary.rename(path)
        _flush(path.parent)
        return
    if not path.is_dir():
        raise TrimtabError(f"path={str(path)!r} is a file; a directory is to be written there.")
    lost = sorted(_contents(path) - _contents(temporary))
    if lost:
        some = ", ".join(lost[:3]) + (" …" if len(lost) > 3 else "")
        raise TrimtabError(
            f"path={str(path)!r} holds {some}, which replacing it would delete; accepted: a new or empty "
            "directory, or an earlier version of what is written."
        )
    aside = _beside(path, "old")
    path.rename(aside)
    try:
        temporary.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    _flush(path.parent)
    remove(aside)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}-{os.getpid()}")


def _siblings(path: Path, kind: str) -> list[Path]:
    pattern = re.compile(rf"{re.escape(path.name)}\.{kind}-\d+")
    return [sibling for sibling in path.parent.iterdir() if pattern.fullmatch(sibling.name)]


def _is_alive(process: int) -> bool:
    """Whether a process of this number runs: it may still be writing."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _contents(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def _flush(path: Path) -> None:
    """Force a file's content, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

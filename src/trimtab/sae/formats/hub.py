"""Where a dictionary's files are: a directory on this machine, or a repository of the Hugging Face hub."""

from __future__ import annotations

import glob
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from trimtab.core.errors import TrimtabError, unknown
from trimtab.sae.formats._files import check_relative, inside
from trimtab.sae.formats.saelens import CFG, SPARSITY, WEIGHTS

__all__ = ["fetch"]


def fetch(
    model_id: str,
    *,
    subfolder: str = "",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The directory that holds the dictionary's files, downloaded if `model_id` is no directory here.

    Of a repository only the files of the one dictionary are downloaded.

    Args:
        model_id: a directory, or a repository as "owner/name".
        subfolder: where in it the dictionary is, as "resid.9".

    Raises:
        TrimtabError: if there is no such directory, repository, revision or dictionary; for a `subfolder` that leads
            out of it.
    """
    check_relative("subfolder", subfolder)
    root = Path(model_id)
    if not root.is_dir():
        if root.exists():
            raise TrimtabError(f"{model_id!r} is a file; accepted: the directory that holds {CFG}, or a hub repository")
        prefix = glob.escape(f"{subfolder.strip('/')}/") if subfolder else ""
        try:
            root = Path(
                snapshot_download(
                    model_id,
                    allow_patterns=[prefix + name for name in (CFG, WEIGHTS, SPARSITY)],
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
            raise TrimtabError(
                f"{model_id!r} (revision {revision or 'main'!r}) is neither a directory here nor a hub repository that "
                f"can be reached: {error}"
            ) from error
    directory = inside("subfolder", root, subfolder)
    if not (directory / CFG).exists():
        raise unknown(f"{model_id!r} has no {CFG} there: subfolder", subfolder, _dictionaries(root))
    return directory


def _dictionaries(root: Path) -> list[str]:
    found = [path.parent for pattern in (CFG, f"*/{CFG}", f"*/*/{CFG}") for path in root.glob(pattern)]
    return sorted(str(path.relative_to(root)).removeprefix(".") for path in found)

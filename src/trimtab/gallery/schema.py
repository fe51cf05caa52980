"""The form of `results.json`, which `trimtab gallery run` writes and the report reads.

    {"format_version": 1, "methods": [entry, …]}

    entry: {
      "method": slug                       "claim": sentence             "paper_figure": text
      "metric": text                       "higher_is_better": bool
      "arms": [arm, …]
      "verdict": "shown" | "not shown" | "inconclusive"
      "comparison": a sentence with the paired difference and its interval
      "seconds": of measuring, all arms and seeds                        "seeds": [int, …]
      "versions": {package: version}       "machine": {fact: value}      "date": "YYYY-MM-DD"
      "quick": bool
      "full_run": entry | null             the committed full run beside a quick one; its own is null
      "attachments": [path, …]             relative to the directory of results.json
      "attachment_error": text             only where they failed
    }

    arm: {
      "name": text    "role": "method" | "baseline" | "reference"
      "values": [number, …]                one for each of "seeds": [int, …]
      "mean", "ci_low", "ci_high": number | null
      "figures": {name: [number, …]}       other figures than the metric, one for each seed
      "error": text                        only where the arm failed; "values" are those of the seeds before
    }

Keys that are not named here are left alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from trimtab.core.errors import TrimtabError
from trimtab.core.results import ROLES
from trimtab.gallery.experiment import VERDICTS

__all__ = ["FORMAT_VERSION", "check", "check_entry", "load_results"]

FORMAT_VERSION = 1


def load_results(path: str | Path) -> dict[str, Any]:
    """The content of the `results.json` at `path`, checked. Raises TrimtabError, which names what is wrong."""
    path = Path(path)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrimtabError(f"path={str(path)!r} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"path={str(path)!r} is not valid JSON: {error}.") from error
    try:
        check(results)
    except TrimtabError as error:
        raise TrimtabError(f"{path}: {error}") from error
    return results


def check(results: Any) -> None:
    """Raise TrimtabError, which names the place, its value and what is accepted, unless `results` has the form."""
    if not isinstance(results, dict):
        raise TrimtabError(f"results are {_shown(results)}; accepted: an object.")
    version = results.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise TrimtabError(f"format_version={version} is of a newer Trimtab; this one reads up to {FORMAT_VERSION}.")
    _check_fields(results, _RESULTS, "")
    for number, entry in enumerate(results["methods"]):
        check_entry(entry, f"methods[{number}]")
    methods = [entry["method"] for entry in results["methods"]]
    if len(set(methods)) != len(methods):
        raise TrimtabError(f"methods are {methods}; accepted: each once.")


def check_entry(entry: Any, where: str) -> None:
    """The same for the entry of one method, which is found at `where`."""
    _check_fields(entry, _ENTRY, where)
    for number, arm in enumerate(entry["arms"]):
        _check_fields(arm, _ARM, f"{where}.arms[{number}]")
        if len(arm["values"]) != len(arm["seeds"]):
            raise TrimtabError(f"{where}.arms[{number}].values must have a number for each of its seeds.")
    if entry["full_run"] is not None:
        check_entry(entry["full_run"], f"{where}.full_run")
        if entry["full_run"]["full_run"] is not None:
            raise TrimtabError(f"{where}.full_run.full_run is {_shown(entry['full_run'])}; accepted: null.")


def _check_fields(value: Any, fields: dict[str, tuple[Callable[[Any], bool], str]], where: str) -> None:
    if not isinstance(value, dict):
        raise TrimtabError(f"{where} is {_shown(value)}; accepted: an object.")
    for key, (accepts, accepted) in fields.items():
        place = f"{where}.{key}".removeprefix(".")
        if key not in value:
            if key in _OPTIONAL:
                continue
            raise TrimtabError(f"{place} is missing; accepted: {accepted}.")
        if not accepts(value[key]):
            raise TrimtabError(f"{place} is {_shown(value[key])}; accepted: {accepted}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(accepts, value))


def _is_object_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(accepts, value.values()))


def _is_inner_path(value: Any) -> bool:
    """Whether `value` names a file below the directory of results.json: a report must not read others."""
    if not _is_text(value) or "\\" in value or "\0" in value:
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts


def _is_fact(value: Any) -> bool:
    return value is None or isinstance(value, str) or _is_number(value)


_TEXT = (_is_text, "a text that is not empty")
_BOOL = (lambda value: isinstance(value, bool), "true or false")
_NUMBER_OR_NULL = (lambda value: value is None or _is_number(value), "a finite number or null")
_SEEDS = (_is_list_of(lambda value: type(value) is int), "a list of whole numbers")
_OPTIONAL = ("error", "attachment_error", "figures")

_RESULTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format_version": (lambda value: value == FORMAT_VERSION, str(FORMAT_VERSION)),
    "methods": (_is_list_of(lambda value: isinstance(value, dict)), "a list of objects"),
}
_ENTRY: dict[str, tuple[Callable[[Any], bool], str]] = {
    "method": _TEXT,
    "claim": _TEXT,
    "paper_figure": _TEXT,
    "metric": _TEXT,
    "higher_is_better": _BOOL,
    "arms": (lambda value: isinstance(value, list) and bool(value), "a list of one or more arms"),
    "verdict": (lambda value: value in VERDICTS, " or ".join(VERDICTS)),
    "comparison": _TEXT,
    "seconds": (lambda value: _is_number(value) and value >= 0, "a number of 0 or more"),
    "seeds": _SEEDS,
    "versions": (_is_object_of(_is_text), "an object of texts"),
    "machine": (_is_object_of(_is_fact), "an object of texts, numbers and nulls"),
    "date": (
        lambda value: isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value) is not None,
        "a date like 2026-01-31",
    ),
    "quick": _BOOL,
    "full_run": (lambda value: value is None or isinstance(value, dict), "the entry of a full run, or null"),
    "attachments": (_is_list_of(_is_inner_path), "a list of relative paths without .."),
    "attachment_error": _TEXT,
}
_ARM: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": _TEXT,
    "role": (lambda value: value in ROLES, " or ".join(ROLES)),
    "values": (_is_list_of(_is_number), "a list of finite numbers"),
    "seeds": _SEEDS,
    "mean": _NUMBER_OR_NULL,
    "ci_low": _NUMBER_OR_NULL,
    "ci_high": _NUMBER_OR_NULL,
    "figures": (_is_object_of(_is_list_of(_is_number)), "an object of lists of finite numbers"),
    "error": _TEXT,
}

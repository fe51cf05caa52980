"""The one exception that Trimtab raises for bad input.

A message names the argument, the value that was given and what is accepted. The command line prints it
without a traceback and exits with status 2; in Python it is a `ValueError` like any other.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["TrimtabError", "unknown"]


class TrimtabError(ValueError):
    """Bad input: the message names the argument, its value and what is accepted."""


def unknown(argument: str, value: object, accepted: Iterable[object]) -> TrimtabError:
    """The error for a `value` that is none of `accepted`; near names come first, and all when they are few.

    Returned, not raised, so that the caller's `raise` shows where it happened.
    """
    names = [str(name) for name in accepted]
    near = difflib.get_close_matches(str(value), names, n=5, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    listed = ", ".join(names[:24]) + (f", … ({len(names)} in all)" if len(names) > 24 else "")
    return TrimtabError(f"{argument}={value!r} is not known.{hint} Accepted: {listed or 'nothing'}.")

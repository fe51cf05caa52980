"""`trimtab methods`: the catalogue."""

from __future__ import annotations

import json as json_format

from rich.console import Console
from rich.table import Table

from trimtab.methods import catalogue

__all__ = ["methods"]


def methods(*, json: bool = False) -> None:
    """List the nineteen methods and say which are there.

    Args:
        json: print JSON instead of a table
    """
    entries = catalogue()
    if json:
        print(json_format.dumps(entries, indent=2))
        return
    table = Table("method", "family", "entry point", "arXiv", "there", title=f"{len(entries)} methods")
    for entry in entries:
        there = "yes" if entry["available"] else "not yet"
        table.add_row(entry["slug"], entry["family"], entry["entry_point"], entry["arxiv"], there)
    Console().print(table)

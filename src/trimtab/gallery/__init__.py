"""Every method beside its baselines: one experiment for each method, and the report that shows what came out.

An experiment is a module in `gallery/experiments` with an `EXPERIMENT`; it is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from trimtab.core.errors import unknown

if TYPE_CHECKING:
    from trimtab.gallery.experiment import Experiment

__all__ = ["load", "slugs"]

# The method's slug and its module in `gallery/experiments`.
_MODULES: dict[str, str] = {
    "topk-sae": "topk_sae",
    "kron-sae": "kron_sae",
    "hierarchical-topk": "hierarchical_topk",
    "sae-boost": "sae_boost",
    "tr-align": "tr_align",
    "trb": "trb",
}


def slugs() -> list[str]:
    """The methods that have an experiment, in the order in which they are run."""
    return list(_MODULES)


def load(slug: str) -> Experiment:
    """The experiment of the method `slug`. Raises TrimtabError, with the near names, when there is none."""
    if slug not in _MODULES:
        raise unknown("method", slug, _MODULES)
    return importlib.import_module(f"trimtab.gallery.experiments.{_MODULES[slug]}").EXPERIMENT

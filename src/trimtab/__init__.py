"""Trimtab: small interventions that steer big pretrained models.

Nineteen published methods on the Hugging Face stack, one family of methods a subpackage. Importing `trimtab`
loads nothing heavy: a family, and the libraries that it needs, load when they are first used.

    core      what two families need: activations, distributions, checkpoints, results
    sae       sparse dictionaries: harvest, train, measure, exchange with SAELens and sparsify
    gallery   every method beside its baselines, measured, and the report that shows it
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"
__all__ = ["__version__", "core", "gallery", "sae"]

_SUBPACKAGES = frozenset({"core", "gallery", "sae"})


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

"""Preference training whose reference policy follows the trained one."""

from __future__ import annotations

import importlib

__all__ = [
    "TRDPOTrainer",
    "TRGRPOTrainer",
    "TRKTOTrainer",
    "TRRLOOTrainer",
    "TrustRegionMixin",
    "TrustRegionReference",
    "UpdateSchedule",
]

_MODULES = {"TrustRegionReference": "reference", "UpdateSchedule": "schedule"}


def __getattr__(name: str) -> object:
    # TRL takes seconds to import, which the formulas do without.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'trainer')}"), name)

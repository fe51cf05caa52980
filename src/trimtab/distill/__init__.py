"""Distillation on what the student itself writes, at first with the teacher's help.

`functional` holds the loss on tensors, `eos` what makes one vocabulary of two models', `rollouts` who writes the
prefixes, `processor` the two-model decoding inside transformers' `generate`, with the teacher of `decoder`. `trainer`
is TRL's trainer with all of it, `config` its settings, `loss` its loss of hidden states, `sft_warmup` a baseline.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "StopIds",
    "TRBConfig",
    "TRBTrainer",
    "TeacherGuided",
    "TrustRegion",
    "TrustRegionBlend",
    "generate_guided",
    "reverse_kl",
]

_MODULES = {
    "StopIds": "eos",
    "TRBConfig": "config",
    "TRBTrainer": "trainer",
    "TeacherGuided": "processor",
    "TrustRegion": "rollouts",
    "TrustRegionBlend": "processor",
    "generate_guided": "processor",
    "reverse_kl": "functional",
}


def __getattr__(name: str) -> Any:
    # Loaded when asked for: importing transformers, or TRL, takes seconds.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

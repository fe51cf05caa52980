"""The states of the global random generators that a training run draws from, as a tree."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch

from trimtab.core.errors import TrimtabError

__all__ = ["rng_state", "set_rng_state"]


def rng_state() -> dict[str, Any]:
    """The states of `random`, `numpy.random`'s global generator, torch on the CPU and on each CUDA device."""
    version, words, python_gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    if legacy["bit_generator"] != "MT19937":
        raise TrimtabError(f"numpy.random's generator is {legacy['bit_generator']}; MT19937 is accepted.")
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": python_gauss},
        "numpy": {
            "words": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            "position": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": list(cuda),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators into a state that `rng_state` returned.

    Warns if the number of CUDA devices is another one than then, as drawing on them then differs. Raises
    TrimtabError for a tree that `rng_state` did not make.
    """
    try:
        python, legacy = state["python"], state["numpy"]
        words = (python["version"], tuple(python["words"].tolist()), python["gauss"])
        keys = legacy["words"].numpy().astype(np.uint32)
        cpu, cuda = state["torch"], state["cuda"]
        random.setstate(words)
        np.random.set_state(("MT19937", keys, legacy["position"], legacy["has_gauss"], legacy["gauss"]))
        torch.set_rng_state(cpu)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise TrimtabError(f"state is not what rng_state returned: {type(error).__name__}: {error}.") from error
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(cuda) != here:
        warnings.warn(
            f"random states of {len(cuda)} CUDA devices were saved, {here} are here: draws will differ",
            stacklevel=2,
        )
    for device, device_state in enumerate(cuda[:here]):
        torch.cuda.set_rng_state(device_state, device)

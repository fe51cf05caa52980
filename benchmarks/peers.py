"""The peers' own environment, `.venv-peers`, made when it is missing or what it is made from has changed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["ROOT", "environment_variables", "peers_python"]

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".venv-peers"
REQUIREMENTS = ROOT / "benchmarks" / "peers-constraints.txt"
CONSTRAINTS = ROOT / "constraints.txt"


def peers_python() -> Path:
    """The interpreter of `.venv-peers`. Making it takes minutes; raises CalledProcessError if pip cannot."""
    python, marker = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "made-from"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + CONSTRAINTS.read_bytes()).hexdigest()
    if not (marker.exists() and marker.read_text() == wanted):
        print(f"== installing the peers of {REQUIREMENTS.name} into {ENVIRONMENT.name} (minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--upgrade", "pip>=25"], check=True)
        subprocess.run([*pip, "--requirement", str(REQUIREMENTS), "--constraint", str(CONSTRAINTS)], check=True)
        marker.write_text(wanted)
    return python


def environment_variables(threads: int) -> dict[str, str]:
    """This process's variables with `threads` threads for every library, no network, no tracker and no Triton."""
    fixed = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "SPARSIFY_DISABLE_TRITON": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return os.environ | fixed

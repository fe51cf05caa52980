"""Which learning rate does best for each arm of `sae_training`: a whole run at each of three. Not part of `make bench`.

`python -m benchmarks.sae_learning_rates [arms]` takes about half an hour and writes sae_learning_rates.json: for
each arm and rate the explained variance of held-out rows and the share of dead latents at the end of the run.
`sae_training` takes the best of each arm from it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.sae_arms import Setting
from benchmarks.sae_training import LEARNING_RATES, prepared_rows, train_in_turns

__all__ = ["main"]

TRIED = {
    "trimtab": (4e-4, 8e-4, 1.6e-3),
    "saelens": (8e-4, 2e-3, 5e-3),
    "sparsify": (2.5e-3, 5e-3, 1e-2),
    "sparsify-adam": (8e-4, 1.6e-3, 3.2e-3),
}


def main(arms: list[str]) -> None:
    """Run `arms`, or all, print each result, and put them into the file in place of those arms' earlier ones."""
    from trimtab.core.results import environment

    found: list[dict[str, Any]] = []
    if LEARNING_RATES.exists():
        found = json.loads(LEARNING_RATES.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as directory:
        rows = prepared_rows(Path(directory))
        for arm in arms or TRIED:
            found = [entry for entry in found if entry["arm"] != arm]
            for learning_rate in TRIED[arm]:
                outcome = train_in_turns({arm: Setting(arm=arm, rows=rows, learning_rate=learning_rate)})[arm]
                entry = {"arm": arm, "version": outcome.version, "learning_rate": learning_rate}
                entry |= {"explained_variance": outcome.explained_variance, "dead": outcome.dead}
                print(entry, flush=True)
                found.append(entry | environment())
            LEARNING_RATES.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

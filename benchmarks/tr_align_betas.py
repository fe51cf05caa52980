"""The betas that docs/tr-align.md calls tuned: fixed references on the gallery's tr-align problems, five betas a loss.

Problems, training and measure are those of `trimtab.gallery.experiments.tr_align`, on 60 seeds that it has not: what it
reports of a tuned beta is then no choice made on its own seeds. Policies of one seed see the same batches, so that
betas are compared in pairs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from benchmarks.measure import Row, cpu_seconds, print_table, write_rows
from trimtab.gallery.experiments.tr_align import BLOCK, TUNED, Setting, train
from trimtab.gallery.testbeds.preferences import Preferences

__all__ = ["BETAS", "SEEDS", "STEPS", "main", "measure"]

BETAS = {
    "DPO": (0.03, 0.05, 0.1, 0.2, 0.3),
    "IPO": (0.005, 0.01, 0.02, 0.05, 0.1),
    "KTO": (0.01, 0.03, 0.1, 0.3, 1.0),
}
SEEDS = range(5000, 5060)
STEPS = 600


def main() -> None:
    """Measure, print the table, and write the rows."""
    torch.set_num_threads(1)
    rows = measure(SEEDS, STEPS)
    print_table(f"Fixed references, reward gained after {STEPS} steps, {len(SEEDS)} seeds", rows)
    write_rows("tr_align_betas", rows)


def measure(seeds: Sequence[int], steps: int) -> list[Row]:
    """Of each loss and beta: the mean gain, and the mean and standard error of its difference to the tuned beta's."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    settings = [Setting(loss, beta, "fixed") for loss, betas in BETAS.items() for beta in betas]
    blocks = [seeds[start : start + BLOCK] for start in range(0, len(seeds), BLOCK)]
    gains = torch.cat([train(Preferences.draw(block), settings, steps).gain[-1] for block in blocks], -1)
    of = dict(zip(settings, gains.double(), strict=True))
    taken = {"cpu_seconds": cpu_seconds() - cpu, "wall_seconds": time.perf_counter() - wall}
    tuned = {loss: Setting(loss, beta, "fixed") for loss, beta in TUNED}
    rows = []
    for setting, gain in of.items():
        found = {"reward gained": gain.mean()}
        if setting != tuned[setting.loss]:
            difference = gain - of[tuned[setting.loss]]
            found["difference to the tuned beta"] = difference.mean()
            found["its standard error"] = difference.std() / len(seeds) ** 0.5
        for figure, value in found.items():
            name = f"{setting.loss}, beta {setting.beta:g}: {figure}"
            rows.append(Row(name=name, unit="1", ours=float(value), repeats=1, seeds=len(seeds), **taken))
    return rows


if __name__ == "__main__":
    main()

"""The learning rates of `sae_training`: each trainer once at every rate of a grid, the same run to its end.

The rate that gives the most explained variance on held-out rows is that trainer's entry in
`benchmarks.sae_training.LEARNING_RATES`. Ours and SAELens's optimiser is Adam, sparsify's the schedule-free sign
descent that is its default. Takes twenty minutes, and so is not part of `make bench`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.measure import Row, print_table, write_rows
from benchmarks.sae_arms import Setting
from benchmarks.sae_training import Outcome, prepared_rows, train_in_turns

__all__ = ["ADAM_RATES", "SIGN_RATES", "main", "rows_of"]

ADAM_RATES = (3.2e-3, 6.4e-3, 1.28e-2)
SIGN_RATES = (5e-3, 1e-2, 2e-2)


def main() -> None:
    """Train at every rate, print the table, and write the rows."""
    rates = {"trimtab": ADAM_RATES, "saelens": ADAM_RATES, "sparsify": SIGN_RATES}
    with tempfile.TemporaryDirectory() as directory:
        file = prepared_rows(Path(directory))
        outcomes: dict[tuple[str, float], Outcome] = {}
        for arm, grid in rates.items():
            for rate in grid:
                setting = Setting(arm=arm, rows=file, learning_rate=rate, steps_per_round=117, rounds=1)
                outcome = outcomes[arm, rate] = train_in_turns({arm: setting})[arm]
                print(f"{arm} at {rate:g}: explained variance {outcome.explained_variance:.4f}", flush=True)
    found = rows_of(outcomes)
    print_table("Explained variance of held-out rows by learning rate", found)
    write_rows("sae_rates", found)


def rows_of(outcomes: dict[tuple[str, float], Outcome]) -> list[Row]:
    """Ours beside SAELens at each rate of Adam, and ours at its best rate beside sparsify at each of its own."""
    best = max(ADAM_RATES, key=lambda rate: outcomes["trimtab", rate].explained_variance)
    adam = [
        _row(f"both with Adam at {rate:g}", outcomes["trimtab", rate], outcomes["saelens", rate]) for rate in ADAM_RATES
    ]
    sign = [
        _row(f"ours at {best:g}, sparsify at {rate:g}", outcomes["trimtab", best], outcomes["sparsify", rate])
        for rate in SIGN_RATES
    ]
    return adam + sign


def _row(name: str, ours: Outcome, peer: Outcome) -> Row:
    return Row(
        name=name,
        unit="1",
        ours=ours.explained_variance,
        peer=peer.explained_variance,
        peer_version=peer.version,
        repeats=1,
        cpu_seconds=sum(ours.rounds.cpu + peer.rounds.cpu),
        wall_seconds=sum(ours.rounds.wall + peer.rounds.wall),
    )


if __name__ == "__main__":
    main()

"""What starting costs: CPU seconds of `import trimtab` and of `trimtab --help`, interpreter included."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.measure import Row, Target, in_turns, print_table, write_rows

__all__ = ["main"]

REPEATS = 7


def main() -> None:
    """Measure, print the table, and write the rows."""
    commands = {
        "import trimtab": ([sys.executable, "-c", "import trimtab"], Target("ours", "<=", 0.3)),
        "trimtab --help": ([str(Path(sys.executable).with_name("trimtab")), "--help"], Target("ours", "<=", 1.5)),
        "python, for comparison": ([sys.executable, "-c", ""], None),
    }
    times = in_turns({name: partial(_run, command) for name, (command, _) in commands.items()}, REPEATS)
    rows = [
        Row(
            name=name,
            unit="CPU seconds",
            ours=times[name].cpu_median,
            target=target,
            repeats=REPEATS,
            cpu_seconds=sum(times[name].cpu),
            wall_seconds=sum(times[name].wall),
        )
        for name, (_, target) in commands.items()
    ]
    print_table("Starting", rows)
    write_rows("startup", rows)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

"""Training a TopK dictionary: Trimtab beside SAELens and sparsify, on cached activations of Gemma 3 270M.

Activations of layer 9 (d_model 640) on Shakespeare, attention sinks dropped, centred and scaled to a mean square of 1
once for all arms; 16,384 latents, k = 32, batches of 2,048, float32, two threads. Every arm sees the same rows in the
same order, with AuxK on and the same number of tokens until a latent counts as dead, a warm-up over a tenth of the run
and then a decay, at the rate in `LEARNING_RATES`.

The arms are processes that train in turns, a round of steps each (`sae_arms`). Rounds before AuxK has set in do not
count. Tokens a second are those of the median round; memory is the peak over what the process held when its imports
and the rows were there; explained variance is that of held-out rows after the last round. SAELens's sparse mode (with
decoder norms left out of the pre-activations, which it needs) is stopped once its time is known.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, Target, Times, print_table, write_rows
from benchmarks.peers import ROOT, environment_variables, peers_python
from benchmarks.sae_arms import Setting

__all__ = ["LEARNING_RATES", "Outcome", "figures", "main", "prepared_rows", "train_in_turns"]

PLACE = "resid.9"
SHARDS = 8
"""Of 32,768 tokens; the first are trained on, the last 16,384 rows are held out."""
HELD_OUT = 16_384
SPARSE_ROUNDS = 5
MEBIBYTE = 2**20

LEARNING_RATES = {"trimtab": 6.4e-3, "saelens": 6.4e-3, "sparsify": 1e-2}
"""The best of those that `sae_rates` tries for each."""


@dataclass
class Outcome:
    """What one arm said: seconds of every round, peak memory over the start in bytes, and how good it became."""

    setting: Setting
    rounds: Times = field(default_factory=lambda: Times([], []))
    peak: int = 0
    explained_variance: float = 0.0
    dead: float = 0.0
    version: str = ""

    def tokens_per_second(self, rounds: slice) -> float:
        """Of the median round among `rounds`."""
        seconds = Times(self.rounds.wall[rounds], self.rounds.cpu[rounds]).wall_median
        return self.setting.steps_per_round * self.setting.batch_size / seconds


def main() -> None:
    """Measure, print the table, and write the rows."""
    with tempfile.TemporaryDirectory() as directory:
        rows = prepared_rows(Path(directory))
        arms = {
            arm: Setting(arm=arm, rows=rows, learning_rate=LEARNING_RATES[arm])
            for arm in ("trimtab", "saelens", "sparsify")
        }
        arms["trimtab-screened"] = replace(arms["trimtab"], arm="trimtab-screened")
        arms["saelens-sparse"] = replace(arms["saelens"], arm="saelens-sparse", rounds=SPARSE_ROUNDS)
        outcomes = train_in_turns(arms)
    found = figures(outcomes)
    print_table("Training a dictionary, F = 16,384, k = 32, d = 640, batch 2,048, float32, two threads", found)
    write_rows("sae_training", found)


# -- the rows --------------------------------------------------------------------------------------


def prepared_rows(directory: Path) -> str:
    """A file with "train" and "held_out", centred and scaled by the former, made of the shards in Trimtab's cache.

    The first time, harvesting them takes minutes.
    """
    import torch
    from safetensors.torch import save_file

    from trimtab.gallery.testbeds.real_models import cache_dir
    from trimtab.sae.harvest import ShardCache

    source = _harvest()
    # Named by what it holds, so that a change of the harvest makes another one rather than an error.
    digest = hashlib.sha256(json.dumps(source.identity, sort_keys=True).encode()).hexdigest()[:12]
    shards = ShardCache(source, cache_dir() / "benchmarks" / f"gemma3-270m-{PLACE}-{digest}")
    rows = torch.cat([shards.shard(index)[PLACE].float() for index in range(SHARDS)])
    train, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    mean = train.mean(0)
    train -= mean
    scale = train.square().mean().sqrt()
    path = directory / "rows.safetensors"
    save_file({"train": train / scale, "held_out": (held_out - mean) / scale}, path)
    return str(path)


def _harvest() -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimtab.core.text import TextSource
    from trimtab.gallery.testbeds.real_models import gemma3_270m, shakespeare_text
    from trimtab.sae.harvest import Harvest

    folder = gemma3_270m()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Harvest(model, AutoTokenizer.from_pretrained(folder), TextSource(shakespeare_text()), [PLACE])


# -- the arms --------------------------------------------------------------------------------------


def train_in_turns(arms: Mapping[str, Setting]) -> dict[str, Outcome]:
    """Train every arm, a round of each at a time; an arm with fewer rounds ends earlier."""
    outcomes = {name: Outcome(setting) for name, setting in arms.items()}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(_process(setting)) for name, setting in arms.items()}
        for turn in range(max(setting.rounds for setting in arms.values())):
            for name, outcome in outcomes.items():
                if turn < outcome.setting.rounds:
                    _round(processes[name], outcome)
    return outcomes


def _round(process: subprocess.Popen[str], outcome: Outcome) -> None:
    assert process.stdin is not None
    print("round", file=process.stdin, flush=True)
    said = _said(process)
    outcome.rounds.wall.append(said["wall"])
    outcome.rounds.cpu.append(said["cpu"])
    outcome.peak = said["peak"]
    if len(outcome.rounds.wall) == outcome.setting.rounds:
        said = _said(process)
        outcome.explained_variance, outcome.dead, outcome.version = (
            said[key] for key in ("explained_variance", "dead", "version")
        )


def _said(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"an arm ended early, with exit status {process.wait()}: {process.args!r}")
    answer: dict[str, Any] = json.loads(line)
    return answer


@contextmanager
def _process(setting: Setting) -> Iterator[subprocess.Popen[str]]:
    """The arm's process; what it printed besides is shown if it fails."""
    python = sys.executable if setting.arm.startswith("trimtab") else peers_python()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            setting.command_line(python),
            cwd=ROOT,
            env=environment_variables(setting.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield process
        except BaseException:
            if process.poll():  # it failed by itself, rather than being one of those that did not
                log.seek(0)
                print(log.read()[-4000:], file=sys.stderr)
            process.kill()
            raise
        finally:
            process.communicate()


# -- the figures -----------------------------------------------------------------------------------


def figures(outcomes: Mapping[str, Outcome]) -> list[Row]:
    """All rows, from the outcomes of the five arms."""
    ours, screened = outcomes["trimtab"], outcomes["trimtab-screened"]
    saelens, sparse, sparsify = outcomes["saelens"], outcomes["saelens-sparse"], outcomes["sparsify"]
    return [
        _speed("tokens/s beside SAELens TopK", ours, saelens, Target("ratio", ">=", 4.5)),
        _speed("tokens/s beside SAELens TopK, sparse mode", ours, sparse, Target("ratio", ">=", 2.7)),
        _speed("tokens/s beside sparsify", ours, sparsify, Target("ratio", ">=", 1.4)),
        _speed("tokens/s, screened, beside sparsify", screened, sparsify, Target("ratio", ">=", 2.0)),
        _quality("explained variance beside SAELens", ours, saelens, Target("difference", ">=", -0.005)),
        _quality("explained variance beside sparsify", ours, sparsify, Target("difference", ">=", -0.005)),
        _quality("explained variance, screened, beside float32", screened, ours, Target("distance", "<=", 0.002)),
        _memory("peak memory beside SAELens", ours, saelens, Target("ratio", "<=", 0.6)),
        _memory("peak memory beside SAELens, sparse mode", ours, sparse, None),
        _memory("peak memory beside sparsify", ours, sparsify, None),
        _dead("dead latents at the end beside SAELens", ours, saelens),
        _dead("dead latents at the end beside sparsify", ours, sparsify),
    ]


def _speed(name: str, ours: Outcome, peer: Outcome, target: Target) -> Row:
    """Over the rounds that both trained and in which AuxK was at work in all of them."""
    first = -(-ours.setting.dead_after // ours.setting.steps_per_round)
    common = slice(first, min(ours.setting.rounds, peer.setting.rounds))
    return _row(name, "tokens/s", ours, peer, lambda outcome: outcome.tokens_per_second(common), target, common)


def _quality(name: str, ours: Outcome, peer: Outcome, target: Target) -> Row:
    return _row(name, "1", ours, peer, lambda outcome: outcome.explained_variance, target)


def _memory(name: str, ours: Outcome, peer: Outcome, target: Target | None) -> Row:
    return _row(name, "MiB", ours, peer, lambda outcome: outcome.peak / MEBIBYTE, target)


def _dead(name: str, ours: Outcome, peer: Outcome) -> Row:
    return _row(name, "1", ours, peer, lambda outcome: outcome.dead, None)


def _row(
    name: str,
    unit: str,
    ours: Outcome,
    peer: Outcome,
    figure: Callable[[Outcome], float],
    target: Target | None,
    rounds: slice | None = None,
) -> Row:
    """rounds: those whose times the figure is made of; None for a figure of one whole run."""
    counted = rounds or slice(None)
    return Row(
        name=name,
        unit=unit,
        ours=figure(ours),
        peer=figure(peer),
        peer_version=peer.version,
        target=target,
        repeats=len(peer.rounds.wall[rounds]) if rounds else 1,
        cpu_seconds=sum(ours.rounds.cpu[counted] + peer.rounds.cpu[counted]),
        wall_seconds=sum(ours.rounds.wall[counted] + peer.rounds.wall[counted]),
    )


if __name__ == "__main__":
    main()

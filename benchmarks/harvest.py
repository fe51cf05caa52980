"""Reading activations in the middle of a model: `Harvest` beside `AutoModel` with output_hidden_states=True.

Gemma 3 270M, output of layer 9 of 18, Shakespeare, 8 sequences of 256 tokens at a time, two threads. Ours packs text
into sequences, stops the model after the layer and finds attention sinks; it tokenises some megabytes at once, before
the first forward pass, which is not measured. The peer gets tokens ready-made.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from benchmarks.measure import Row, Target, Times, in_turns, print_table, write_rows
from trimtab.core.text import TextSource
from trimtab.gallery.testbeds.real_models import gemma3_270m, shakespeare_text
from trimtab.sae.harvest import Forward, Harvest, HarvestConfig

__all__ = ["main"]

LAYER = 9
PLACE = f"resid.{LAYER}"
CONFIG = HarvestConfig(context=256, sequences_per_forward=8)
REPEATS = 5


def main() -> None:
    """Measure, print the table, and write the rows."""
    torch.set_num_threads(2)
    folder = gemma3_270m()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    full, half = _forwards(folder, model), _forwards(folder, _in_bfloat16(folder))
    first, first_half = next(full), next(half)
    exact = _hidden_states(model, first.input_ids)
    torch.testing.assert_close(first.activations[PLACE], exact)
    times = in_turns(
        {
            "float32": lambda: next(full),
            "peer": lambda: _hidden_states(model, first.input_ids),
            "bf16": lambda: next(half),
        },
        REPEATS,
    )
    rows = [
        _row("harvest, float32", times["float32"], times["peer"], Target("ratio", ">=", 1.75)),
        _row("harvest, bf16", times["bf16"], times["peer"], Target("ratio", ">=", 4.0)),
        _error_row(first_half, exact, times["bf16"]),
    ]
    print_table("Harvest at layer 9 of 18 of Gemma 3 270M", rows)
    write_rows("harvest", rows)


def _in_bfloat16(folder: Path) -> torch.nn.Module:
    return AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()


def _forwards(folder: Path, model: Any) -> Iterator[Forward]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Harvest(model, tokenizer, TextSource(shakespeare_text()), [PLACE], CONFIG).forwards(repeat=True)


@torch.no_grad()
def _hidden_states(model: Any, ids: Tensor) -> Tensor:
    states: Tensor = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[LAYER + 1]
    return states


def _row(name: str, ours: Times, peer: Times, target: Target) -> Row:
    tokens = CONFIG.sequences_per_forward * CONFIG.context
    return Row(
        name=name,
        unit="tokens/s",
        ours=tokens / ours.wall_median,
        peer=tokens / peer.wall_median,
        peer_version=f"AutoModel in float32, transformers {transformers.__version__}",
        target=target,
        repeats=REPEATS,
        cpu_seconds=sum(ours.cpu) + sum(peer.cpu),
        wall_seconds=sum(ours.wall) + sum(peer.wall),
    )


def _error_row(forward: Forward, exact: Tensor, times: Times) -> Row:
    """|bf16 - float32| / |float32| over the tokens that are kept."""
    kept = exact[forward.keep]
    error = (forward.activations[PLACE][forward.keep].float() - kept).norm() / kept.norm()
    return Row(
        name="harvest, bf16: relative error of the activations",
        unit="1",
        ours=error.item(),
        repeats=1,
        cpu_seconds=sum(times.cpu),
        wall_seconds=sum(times.wall),
    )


if __name__ == "__main__":
    main()

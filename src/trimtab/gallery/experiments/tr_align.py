"""TR-DPO, TR-IPO and TR-KTO beside DPO, IPO and KTO: over-optimisation of preferences, evaluated exactly.

The problems of `trimtab.gallery.testbeds.preferences`: 150 pairs, Adam at 0.02, 1,500 steps of 32 pairs. A seed is one
problem; its policies all see the same batches, so that arms are compared in pairs. KTO has both sides of a pair as its
answers: with one prompt, the mismatched answers of its z are those of the other side.

The published claim is about a reference that moves against one that does not, with the same beta. So the baselines are
the fixed references at the same beta, one that holds the policy too tightly. What a fixed reference reaches with a
beta that is tuned, by a sweep over other seeds, or only smaller, stands beside as a reference: TR does not beat it.

Seeds are trained in blocks, for all arms at once, which is what makes a hundred of them cheap.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.align.functional import dpo_loss, ipo_loss, kto_kl, kto_loss, trust_region_lerp_
from trimtab.align.schedule import UpdateSchedule
from trimtab.core.files import write_file
from trimtab.core.results import Arm
from trimtab.gallery.experiment import Experiment, standard_verdict
from trimtab.gallery.testbeds.preferences import Preferences

STEPS, BATCH, RATE = 1500, 32, 0.02
EVERY = 10
"""Steps between two points of a curve."""
BLOCK = 20
"""Seeds that are trained together."""
METRIC = "reward gained after 600 steps"

REFERENCES: dict[str, UpdateSchedule | None] = {
    "hard 100": UpdateSchedule(alpha=1.0, tau=100),
    "mixed 0.6, 64": UpdateSchedule(alpha=0.6, tau=64),
    "soft 0.6": UpdateSchedule(alpha=0.6, tau=1),
    "fixed": None,
}
TIGHT = (("DPO", 1.0), ("IPO", 0.3), ("KTO", 1.0))
"""Where the claim is tested: the beta holds the policy too tightly."""
LOOSER = (("DPO", 0.3), ("DPO", 0.05))
TUNED = (("DPO", 0.1), ("IPO", 0.02), ("KTO", 0.03))
"""With a fixed reference, the best of four or five betas for each loss after 600 steps, on other seeds."""


@dataclass(frozen=True)
class Setting:
    """What one policy is trained with; `reference` is a key of REFERENCES."""

    loss: str
    beta: float
    reference: str

    @property
    def name(self) -> str:
        moves = "" if self.reference == "fixed" else "TR-"
        return f"{moves}{self.loss}, beta {self.beta:g}, {self.reference}"


SETTINGS = tuple(Setting(*each, reference) for each in TIGHT + LOOSER for reference in REFERENCES) + tuple(
    Setting(*each, "fixed") for each in TUNED
)


class Curves(NamedTuple):
    """Reward and distance after 0, EVERY, 2 EVERY … steps."""

    gain: Float[Tensor, "points settings seeds"]
    kl: Float[Tensor, "points settings seeds"]


def train(problems: Preferences, settings: Sequence[Setting], steps: int) -> Curves:
    """Train a policy for each setting and each problem, all in one tensor; fastest if equal losses stand together."""
    theta = problems.sft.expand(len(settings), -1, -1).clone().requires_grad_()
    reference = theta.detach().clone()
    optimizer = torch.optim.Adam([theta], lr=RATE, betas=(0.9, 0.99))
    points = [(problems.gain(reference), problems.kl_to_sft(reference))]
    for step, (chosen, rejected) in enumerate(zip(*problems.batches(steps, BATCH), strict=True), start=1):
        with torch.no_grad():
            of_reference = problems.log_probs(reference)
        ratios = problems.log_probs(theta) - of_reference
        d_w, d_l = (ratios.gather(-1, side.expand(len(settings), -1, -1)) for side in (chosen, rejected))
        losses = [_LOSSES[loss](d_w[rows], d_l[rows], beta) for (loss, beta), rows in _groups(settings)]
        optimizer.zero_grad()
        torch.cat(losses).mean(-1).sum().backward()  # the mean over a batch; each policy has a loss of its own
        optimizer.step()
        for row, setting in enumerate(settings):
            schedule = REFERENCES[setting.reference]
            if schedule is not None and (weight := schedule.policy_weight(step, steps)):
                trust_region_lerp_(reference[row], theta[row], weight)
        if step % EVERY == 0:
            with torch.no_grad():
                points.append((problems.gain(theta), problems.kl_to_sft(theta)))
    gain, kl = (torch.stack(part) for part in zip(*points, strict=True))
    return Curves(gain, kl)


def _groups(settings: Sequence[Setting]) -> Iterator[tuple[tuple[str, float], slice]]:
    """The rows of each loss and beta."""
    start = 0
    for key, group in itertools.groupby(settings, lambda setting: (setting.loss, setting.beta)):
        stop = start + len(list(group))
        yield key, slice(start, stop)
        start = stop


def _dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    return dpo_loss(chosen, rejected, beta=beta)


def _ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    return ipo_loss(chosen, rejected, beta=beta)


def _kto(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    desirable = kto_loss(chosen, torch.tensor(True), kto_kl(rejected)[..., None], beta=beta)
    return desirable + kto_loss(rejected, torch.tensor(False), kto_kl(chosen)[..., None], beta=beta)


_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"DPO": _dpo, "IPO": _ipo, "KTO": _kto}


_BLOCKS: dict[int, Curves] = {}


def _block(index: int) -> Curves:
    """The curves of the seeds from BLOCK * index on, of all SETTINGS; trained once a process."""
    if index not in _BLOCKS:
        _BLOCKS[index] = train(Preferences.draw(range(BLOCK * index, BLOCK * (index + 1))), SETTINGS, STEPS)
    return _BLOCKS[index]


def _measure(seed: int, *, setting: Setting) -> dict[str, float]:
    index, column = divmod(seed, BLOCK)
    gain, kl = (part[:, SETTINGS.index(setting), column] for part in _block(index))
    found = {f"gain after {step}": gain[step // EVERY] for step in (100, 300, STEPS)}
    found |= {f"KL to SFT after {step}": kl[step // EVERY] for step in (600, STEPS)}
    return {METRIC: gain[600 // EVERY].item()} | {name: round(value.item(), 4) for name, value in found.items()}


def _role(setting: Setting) -> str:
    if setting.reference != "fixed":
        return "method"
    return "baseline" if (setting.loss, setting.beta) in TIGHT else "reference"


def _rule(arms: Sequence[Arm]) -> str:
    """The standard rule on hard updates against the fixed reference of the same loss and beta: all three of TIGHT."""
    by_name = {arm.name: arm for arm in arms}
    pairs = [[by_name[Setting(*each, reference).name] for reference in ("hard 100", "fixed")] for each in TIGHT]
    found = {standard_verdict(pair, higher_is_better=True) for pair in pairs}
    if found == {"shown"} and len(pairs[0][0].seeds) < BLOCK:
        return "inconclusive"  # a few seeds agree by chance: the gains of one setting spread by 0.7 to 1 over seeds
    return next(verdict for verdict in ("not shown", "inconclusive", "shown") if verdict in found)


def reward_against_kl(curves: Curves) -> str:
    """The paths of `curves`, of SETTINGS, in the plane of KL(pi || SFT) and reward: means over seeds, as SVG text."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = {"fixed": "C0", "soft 0.6": "C2", "hard 100": "C3"}
    with matplotlib.rc_context({"svg.hashsalt": "trimtab", "svg.fonttype": "none"}):
        figure = Figure(figsize=(12, 4), layout="constrained")
        panels = figure.subplots(1, len(TIGHT), sharey=True)
        marks = [step // EVERY for step in (100, 300, 600, STEPS)]
        for axes, (loss, beta), tuned in zip(panels, TIGHT, TUNED, strict=True):
            paths = [(Setting(loss, beta, reference), colour, "-") for reference, colour in colours.items()]
            for setting, colour, line in [*paths, (Setting(*tuned, "fixed"), "0.45", "--")]:
                gain, kl = (part[:, SETTINGS.index(setting)].mean(-1).tolist() for part in curves)
                axes.plot(kl, gain, line, color=colour, label=setting.name, marker="o", markersize=4, markevery=marks)
            axes.set_title(loss)
            axes.set_xlabel("KL(policy || SFT), nats")
            axes.grid(alpha=0.3)
            axes.legend(loc="lower right")
        panels[0].set_ylabel(f"reward gained, mean of {curves.gain.shape[-1]} seeds")
        figure.suptitle("From SFT along training; dots at 100, 300, 600 and 1,500 steps")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _attach(directory: Path) -> list[Path]:
    """The figure of the seeds that this process has trained; of the first block, if it took all values from before."""
    blocks = [_BLOCKS[index] for index in sorted(_BLOCKS)] or [_block(0)]
    curves = Curves(*(torch.cat(parts, -1) for parts in zip(*blocks, strict=True)))
    path = directory / "reward-against-kl.svg"
    write_file(path, reward_against_kl(curves).encode())
    return [path]


EXPERIMENT = Experiment(
    method="tr-align",
    claim="With the same beta, one that holds the policy too tightly, updating the reference during training gives "
    "more reward than DPO, IPO and KTO with a fixed one.",
    paper_figure="wins minus losses against the base method on TL;DR, Pythia 6.9B: DPO +8.4, IPO +14.3, KTO +15.0 "
    "points (arXiv 2404.09656v2, abstract)",
    metric=METRIC,
    higher_is_better=True,
    arms={setting.name: (_role(setting), functools.partial(_measure, setting=setting)) for setting in SETTINGS},
    seeds=tuple(range(100)),
    quick_seeds=tuple(range(BLOCK)),
    rule=_rule,
    attachments=_attach,
)

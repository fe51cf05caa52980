"""TRB beside plain on-policy distillation and other rollouts, where a student drifts into junk.

The beds of `trimtab.gallery.testbeds.drift`. On both a step is one batch of answers that a rollout policy writes, the
reverse KL at their prefixes, averaged over tokens, and one step of the optimiser. What a seed draws is the same for all
policies, so that arms are compared in pairs.

    Answers    GRUs, AdamW at 5e-4, gradients clipped at 1, 8 answers a step, 80 steps: the metric
    Chains     tables, SGD at 50, 16 answers a step, 120 steps: figures beside it

The claim is about prefixes that a student writes itself, and the verdict is on that. The paper's other half, that a
budget should shrink, does not show: a fixed one is the best baseline on both beds, as the comparison says.

Seeds are trained in blocks, for all arms at once.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.files import write_file
from trimtab.core.results import Arm
from trimtab.distill.functional import reverse_kl
from trimtab.distill.rollouts import (
    SKD,
    RolloutPolicy,
    TeacherMixture,
    TeacherOnly,
    TemperatureWarmup,
    TrustRegion,
    Vanilla,
)
from trimtab.gallery.experiment import Experiment, standard_verdict
from trimtab.gallery.testbeds import drift
from trimtab.gallery.testbeds.drift import Bed

ARMS: dict[str, tuple[str, RolloutPolicy]] = {
    "TRB, eps 0.1": ("method", TrustRegion(0.1, 30)),
    "TRB, eps 0.02": ("method", TrustRegion(0.02, 30)),
    "plain OPD": ("baseline", Vanilla()),
    "temperature warm-up from 0.8": ("baseline", TemperatureWarmup(0.8, 30)),
    "SFT warm-up, 15 steps": ("baseline", TeacherOnly(15)),
    "eps 0.1, fixed": ("baseline", TrustRegion(0.1, schedule="constant")),
    "SKD, top 3, tau 0.6": ("baseline", SKD(3, 0.6)),
    "mixture, 0.2 teacher": ("baseline", TeacherMixture(0.2)),
}
"""While TeacherOnly's teacher writes, its loss is the cross-entropy of what was written."""


@dataclass(frozen=True)
class Setting:
    """How a bed is trained on, and at which steps it is looked at."""

    bed: Callable[[Sequence[int]], Bed]
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    steps: int
    marks: tuple[int, ...]
    clip: float = float("inf")


SETTINGS = {
    "answers": Setting(
        drift.Answers.draw, functools.partial(torch.optim.AdamW, lr=5e-4), 80, (0, 10, 20, 40, 80), clip=1.0
    ),
    "chains": Setting(drift.Chains.draw, functools.partial(torch.optim.SGD, lr=50.0), 120, (15, 120)),
}
FIRST = 10
"""Steps over which prefixes are looked at."""
BLOCK = 3
"""Seeds that are trained together."""
METRIC = "mean probability of the exact answer"


class Curves(NamedTuple):
    """`exact`: probability of the whole right answer after 0, 1 … steps; of the tokens written for each step, `junk`:
    their share of junk, `teacher_log_prob`: their mean log-probability by the teacher.
    """

    exact: Float[Tensor, "points seeds arms"]
    junk: Float[Tensor, "steps seeds arms"]
    teacher_log_prob: Float[Tensor, "steps seeds arms"]


def distil(bed: Bed, policies: Sequence[RolloutPolicy], setting: Setting) -> Curves:
    """Teach a copy of the student with each policy, for each seed of `bed`, all in one set of tensors."""
    student = bed.student.copies(len(policies))
    optimizer = setting.optimizer(student.parameters())
    noise = [torch.Generator().manual_seed(2**32 + seed) for seed in bed.seeds]
    right = bed.right.unsqueeze(1).expand(-1, len(policies), -1, -1)
    exact, junk, teacher_log_prob = [], [], []
    for step in range(setting.steps):
        with torch.no_grad():
            exact.append(student.exact(right))
        rollout = _write(bed, student, policies, step, noise)
        counted = bed.written(rollout.tokens)
        loss = _mean(_losses(rollout, policies, step), counted)
        optimizer.zero_grad()
        loss.sum().backward()  # each run has a loss and parameters of its own
        _clip(student.parameters(), setting.clip)
        optimizer.step()
        junk.append(_mean(bed.junk(rollout.tokens).float(), counted))
        teacher_log_prob.append(_mean(_at(rollout.teacher.log_softmax(-1), rollout.tokens), counted))
    with torch.no_grad():
        exact.append(student.exact(right))
    return Curves(torch.stack(exact), torch.stack(junk), torch.stack(teacher_log_prob))


class _Rollout(NamedTuple):
    tokens: Tensor
    """[seeds, arms, rows, length]"""
    student: Tensor
    """Logits, [seeds, arms, rows, length, vocab], with their gradient."""
    teacher: Tensor


def _write(
    bed: Bed, student: drift.Writer, policies: Sequence[RolloutPolicy], step: int, noise: Sequence[torch.Generator]
) -> _Rollout:
    """Both models in lockstep on prefixes that the policies write; what they say of them is what the loss needs."""
    arms = len(policies)
    state, teacher_state = student.begin(bed.rollouts), bed.teacher.begin(arms * bed.rollouts)
    tokens, of_student, of_teacher = [], [], []
    for _ in range(bed.right.shape[-1]):
        logits = student.logits(state)
        with torch.no_grad():
            teacher_logits = bed.teacher.logits(teacher_state).unflatten(1, (arms, -1))
            log_mu = _log_mu(policies, logits, teacher_logits, step)
            # With E exponential, -log E is Gumbel noise: the largest log mu - log E is a draw from mu.
            drawn = torch.stack([torch.empty_like(log_mu[0, 0]).exponential_(generator=g) for g in noise])
            token = (log_mu - drawn.log().unsqueeze(1)).argmax(-1)
            teacher_state = bed.teacher.advance(teacher_state, token.flatten(1))
        state = student.advance(state, token)
        tokens.append(token)
        of_student.append(logits)
        of_teacher.append(teacher_logits)
    return _Rollout(torch.stack(tokens, -1), torch.stack(of_student, -2), torch.stack(of_teacher, -2))


def _log_mu(policies: Sequence[RolloutPolicy], logits: Tensor, teacher_logits: Tensor, step: int) -> Tensor:
    """The behaviour of each policy in its arm, [seeds, arms, rows, vocab]."""
    log_q = teacher_logits.log_softmax(-1)
    log_mu = []
    for arm, policy in enumerate(policies):
        log_p = (logits[:, arm] / policy.temperature(step)).log_softmax(-1)
        found = policy.log_behaviour(log_p.flatten(0, 1), log_q[:, arm].flatten(0, 1), step)
        log_mu.append(found.log_mu.view_as(log_p))
    return torch.stack(log_mu, 1)


def _losses(rollout: _Rollout, policies: Sequence[RolloutPolicy], step: int) -> Tensor:
    """[seeds, arms, rows, length]: reverse KL, or cross-entropy where the teacher alone writes."""
    losses = reverse_kl(rollout.student, rollout.teacher)
    supervised = torch.tensor([isinstance(policy, TeacherOnly) and policy.needs_teacher(step) for policy in policies])
    if not supervised.any():
        return losses
    cross_entropy = -_at(rollout.student.log_softmax(-1), rollout.tokens)
    return torch.where(supervised[:, None, None], cross_entropy, losses)


def _at(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Over the counted tokens of each run."""
    return (values * counted).sum((-2, -1)) / counted.sum((-2, -1))


def _clip(parameters: Sequence[Tensor], most: float) -> None:
    """Clip the norm of each run's gradient at `most`; runs are the first two axes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([gradient.flatten(2).norm(dim=-1) for gradient in gradients]).norm(dim=0)
    for gradient in gradients:
        gradient *= (most / norm).clamp_max(1).view(*norm.shape, *(1,) * (gradient.ndim - 2))


_BLOCKS: dict[tuple[str, int], Curves] = {}


def _block(bed: str, index: int) -> Curves:
    """The curves on `bed` of the seeds from BLOCK * index on, of all ARMS; trained once a process."""
    if (bed, index) not in _BLOCKS:
        drawn = SETTINGS[bed].bed(range(BLOCK * index, BLOCK * (index + 1)))
        _BLOCKS[bed, index] = distil(drawn, [policy for _, policy in ARMS.values()], SETTINGS[bed])
    return _BLOCKS[bed, index]


def figures(curves: Curves, setting: Setting) -> dict[str, Float[Tensor, "seeds arms"]]:
    """What is read off curves: the mean of `exact` over all points, its marks, and means over the first steps."""
    found = {"mean": curves.exact.mean(0)}
    found |= {f"after {mark}": curves.exact[mark] for mark in setting.marks}
    found[f"junk, first {FIRST}"] = curves.junk[:FIRST].mean(0)
    found[f"teacher log-prob, first {FIRST}"] = curves.teacher_log_prob[:FIRST].mean(0)
    return found


def _measure(seed: int, *, arm: str) -> dict[str, float]:
    index, column = divmod(seed, BLOCK)
    row = list(ARMS).index(arm)
    found = {
        f"{bed}: {name}": values[column, row].item()
        for bed, setting in SETTINGS.items()
        for name, values in figures(_block(bed, index), setting).items()
    }
    return {METRIC: found.pop("answers: mean")} | {name: round(value, 4) for name, value in found.items()}


def _rule(arms: Sequence[Arm]) -> str:
    """The standard rule on three pairs: both budgets against plain distillation, and the larger against the smaller."""
    by_name = {arm.name: arm for arm in arms}
    large, small, plain = (by_name[name] for name in ("TRB, eps 0.1", "TRB, eps 0.02", "plain OPD"))
    pairs = ((large, plain), (small, plain), (large, small))
    # A pair's second takes the place of a baseline, whichever it is.
    found = {
        standard_verdict([first, replace(second, role="baseline")], higher_is_better=True) for first, second in pairs
    }
    return next(verdict for verdict in ("not shown", "inconclusive", "shown") if verdict in found)


def curves_svg(blocks: Mapping[str, Curves]) -> str:
    """Exact answers and junk over the steps, a row for each bed, of ARMS: means over seeds, as SVG text."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = ("C3", "C1", "black", "C4", "C5", "C0", "C2", "0.55")
    with matplotlib.rc_context({"svg.hashsalt": "trimtab", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 7.5), layout="constrained")
        panels = figure.subplots(len(blocks), 2, squeeze=False)
        for (bed, curves), row in zip(blocks.items(), panels, strict=True):
            for axes, values, what in zip(
                row, curves, ("probability of the exact answer", "share of junk"), strict=False
            ):
                for (name, (role, _)), colour, line in zip(ARMS.items(), colours, values.mean(1).T, strict=True):
                    axes.plot(line, color=colour, linewidth=2.2 if role == "method" else 1.2, label=name)
                axes.set_title(f"{bed}: {what}")
                axes.set_xlabel("step")
                axes.set_ylim(bottom=0)
                axes.grid(alpha=0.3)
        n_seeds = next(iter(blocks.values())).exact.shape[1]
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.suptitle(f"Who writes the prefixes: means of {n_seeds} seeds")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _attach(directory: Path) -> list[Path]:
    """The figure of the seeds that this process has trained; of the first block, if it took all values from before."""
    found = {}
    for bed in SETTINGS:
        blocks = [curves for (of_bed, _), curves in _BLOCKS.items() if of_bed == bed] or [_block(bed, 0)]
        found[bed] = Curves(*(torch.cat(parts, 1) for parts in zip(*blocks, strict=True)))
    path = directory / "rollouts.svg"
    write_file(path, curves_svg(found).encode())
    return [path]


EXPERIMENT = Experiment(
    method="trb",
    claim="Early prefixes that lean on the teacher, within a KL budget that shrinks to 0, make the student right more "
    "often over training than the prefixes of plain on-policy distillation, and a larger budget more so.",
    paper_figure="average pass@1, Qwen3 1.7B from 8B: 33.2 against 32.3 of plain distillation and 32.6 of a fixed "
    "budget; 0.6B from 4B: 44.4 against 44.0 and 43.8 (arXiv 2605.31159)",
    metric=METRIC,
    higher_is_better=True,
    arms={name: (role, functools.partial(_measure, arm=name)) for name, (role, _) in ARMS.items()},
    seeds=tuple(range(3 * BLOCK)),
    quick_seeds=tuple(range(BLOCK)),
    rule=_rule,
    attachments=_attach,
)

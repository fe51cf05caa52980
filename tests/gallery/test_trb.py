"""TRB's experiment: its writers against plain sums and torch's GRU, sampling, the training step, what arms measure."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.core.results import Arm
from trimtab.core.simplex import trust_region_blend
from trimtab.distill.rollouts import (
    SKD,
    RolloutPolicy,
    TeacherMixture,
    TeacherOnly,
    TemperatureWarmup,
    TrustRegion,
    Vanilla,
)
from trimtab.gallery.experiments import trb
from trimtab.gallery.experiments.trb import ARMS, FIRST, SETTINGS, Setting, distil
from trimtab.gallery.testbeds.drift import JUNK, SYMBOLS, Answers, Bed, Chains, Recurrent, Table, text

END = SYMBOLS + JUNK
small_chains = functools.partial(Chains.draw, length=5, vocab=4, rollouts=6)
small_answers = functools.partial(
    Answers.draw, prompts=3, length=4, student_d=6, teacher_d=8, student_steps=20, teacher_steps=40
)
SMALL: dict[str, Setting] = {
    "chains": replace(
        SETTINGS["chains"],
        bed=functools.partial(Chains.draw, length=20, vocab=6, rollouts=6),
        optimizer=functools.partial(torch.optim.SGD, lr=2.0),
        steps=6,
        marks=(0, 6),
    ),
    "answers": replace(SETTINGS["answers"], bed=small_answers, steps=6, marks=(0, 6)),
}
both_beds = pytest.mark.parametrize("setting", SMALL.values(), ids=SMALL)


def double(writer: Any) -> Any:
    """`writer` in float64."""
    return replace(writer, **{k: v.detach().double() for k, v in vars(writer).items() if v.is_floating_point()})


def in_double(bed: Any) -> Any:
    return replace(bed, student=double(bed.student), teacher=double(bed.teacher))


# -- the beds --------------------------------------------------------------------------------------


def test_a_table_gives_every_sequence_the_product_of_its_rows() -> None:
    bed = in_double(Chains.draw((3, 8), length=3, vocab=3))
    sequences = torch.tensor(list(itertools.product(range(3), repeat=3)))
    log_p = bed.student.follow(sequences.expand(2, -1, -1), copies=27)
    found = log_p.gather(-1, sequences.expand(2, -1, -1)[..., None])[..., 0].sum(-1).exp()
    for seed in range(2):
        right, rows = bed.right[seed, 0].tolist(), bed.student.table[seed].softmax(-1).tolist()
        expected = []
        for sequence in sequences.tolist():
            p, row = 1.0, 0
            for token in sequence:
                p *= rows[row][token]
                row = row + 1 if row < 3 and token == right[row] else 3
            expected.append(p)
        assert found[seed].tolist() == pytest.approx(expected, rel=1e-12)
        assert sum(expected) == pytest.approx(1, abs=1e-12)
        exact = bed.student.exact(bed.right)[seed].item()
        assert exact == pytest.approx(expected[sequences.tolist().index(right)], rel=1e-12)


def test_a_recurrent_writer_is_torchs_gru() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    writer = double(Recurrent.draw(generators, prompts=2, vocab=4, d=5))
    tokens = torch.randint(4, (2, 6, 7), generator=generators[0])  # three copies of two prompts
    log_p = writer.follow(tokens, copies=3)
    for run in range(2):
        gru = torch.nn.GRU(5, 5, batch_first=True, dtype=torch.float64)
        with torch.no_grad():
            for name, tensor in (("weight_ih", writer.W), ("weight_hh", writer.U)):
                getattr(gru, f"{name}_l0").copy_(tensor[run].T)
            for name, tensor in (("bias_ih", writer.b), ("bias_hh", writer.c)):
                getattr(gru, f"{name}_l0").copy_(tensor[run, 0])
            first = writer.prompts[run].repeat(3, 1)
            hidden, _ = gru(writer.embedding[run][tokens[run]], first[None].contiguous())
            states = torch.cat([first[:, None], hidden[:, :-1]], 1)
            expected = (states @ writer.V[run] + writer.v[run]).log_softmax(-1)
        assert torch.allclose(log_p[run], expected, atol=1e-12)


def test_exact_is_the_sum_over_all_texts_that_are_right() -> None:
    bed = in_double(small_answers((0,), prompts=2, length=1))  # 25^2 texts of a symbol and an end
    texts = torch.tensor(list(itertools.product(range(END + 1), repeat=2)))
    rows = texts.repeat_interleave(2, 0)[None]
    p = bed.student.follow(rows, copies=len(texts)).gather(-1, rows[..., None])[0, ..., 0].sum(-1).exp().view(-1, 2)
    assert p.sum(0).tolist() == pytest.approx([1, 1], abs=1e-12)
    right = [(texts == bed.right[0, prompt]).all(-1) for prompt in range(2)]
    expected = sum(p[mask, prompt].sum().item() for prompt, mask in enumerate(right)) / 2
    assert bed.student.exact(bed.right).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("draw", [small_chains, small_answers])
def test_a_bed_is_that_of_its_seed_and_copies_are_apart(draw: Callable[..., Bed]) -> None:
    both, alone = draw((4, 7)), draw((7,))
    assert torch.equal(both.right[1:], alone.right)
    assert not torch.equal(both.right[0], both.right[1])
    for name in ("student", "teacher"):
        for stacked, single in zip(getattr(both, name).parameters(), getattr(alone, name).parameters(), strict=True):
            assert torch.allclose(stacked[1:], single, atol=1e-5)
            assert not stacked.requires_grad
    copies = both.student.copies(3)
    for copied, single in zip(copies.parameters(), both.student.parameters(), strict=True):
        assert copied.requires_grad
        assert copied.shape == (2, 3, *single.shape[1:])
        assert torch.equal(copied[:, 2], single)
        with torch.no_grad():
            copied[:, 0] += 1
        assert torch.equal(copied[:, 2], single)
    rows = both.right[:, None].expand(-1, 3, -1, -1)
    exact = copies.exact(rows)
    assert torch.allclose(exact[:, 1:], both.student.exact(both.right)[:, None].expand(-1, 2))


def test_chains_are_as_sure_of_a_token_as_they_should_be() -> None:
    bed = Chains.draw(range(40))
    for writer, expected in ((bed.student, 0.88), (bed.teacher, 0.998)):
        assert isinstance(writer, Table)
        on_track = writer.table.softmax(-1)[:, :-1].gather(-1, bed.right[:, 0, :, None])
        assert on_track.mean().item() == pytest.approx(expected, abs=0.005)
        assert writer.table[:, -1].std().item() == pytest.approx(0.5, abs=0.05)
    assert bed.student.exact(bed.right).mean() < 0.02


def test_texts_slip_as_often_as_they_should() -> None:
    g = torch.Generator().manual_seed(0)
    right = torch.cat([torch.randint(SYMBOLS, (8, 20), generator=g), torch.full((8, 1), END)], -1)
    clean = text(right, g, 2, drift=0.0, noise=0.0)
    assert torch.equal(clean, right.repeat(2, 1))
    rows = text(right, g, 2000, drift=0.08, noise=0.04)
    junk = (rows >= SYMBOLS) & (rows != END)
    assert (junk.cummax(-1).values == junk).all()  # once begun it does not stop
    survived = 0.92 ** torch.arange(1, 22)
    assert torch.allclose((~junk).float().mean(0), survived, atol=0.02)
    others = rows[:, :20][~junk[:, :20]] != right.repeat(2000, 1)[:, :20][~junk[:, :20]]
    assert others.float().mean().item() == pytest.approx(0.04 * 11 / 12, abs=0.003)
    assert set(rows[junk].tolist()) == set(range(SYMBOLS, END))


def test_what_is_junk_and_where_an_answer_ends() -> None:
    chain = small_chains((0, 1), rollouts=2)
    right = chain.right.unsqueeze(1)
    tokens = right.expand(-1, 3, 2, -1).clone()  # three arms, two rows
    tokens[1, 2, 0, 1] = (right[1, 0, 0, 1] + 1) % 4
    junk = chain.junk(tokens)
    assert junk.sum() == 3
    assert junk[1, 2, 0].tolist() == [False, False, True, True, True]
    assert chain.written(tokens).all()
    bed = small_answers((0,), student_steps=0, teacher_steps=0)
    tokens = torch.tensor([[[0, SYMBOLS, END, 3, END], [END, END, 0, 0, 0], [1, END - 1, 2, 3, 4]]])
    assert bed.written(tokens).int().tolist() == [[[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]]
    assert bed.junk(tokens).int().tolist() == [[[0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]]


@pytest.mark.parametrize("draw", [Chains.draw, Answers.draw])
def test_a_bed_without_seeds_is_refused(draw: Callable[..., Bed]) -> None:
    with pytest.raises(TrimtabError, match="seeds is empty"):
        draw(())


# -- rollouts and training -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [Vanilla(), TrustRegion(0.1, 30), SKD(2, 0.6), TemperatureWarmup(0.6, 30), TeacherMixture(0.3)], ids=repr
)
def test_answers_are_drawn_from_the_policy(policy: RolloutPolicy) -> None:
    bed = Chains.draw((5,), length=3, vocab=3, rollouts=4000)
    tables = [replace(writer, table=share * writer.table) for writer, share in ((bed.student, 0.2), (bed.teacher, 0.3))]
    bed = replace(bed, student=tables[0], teacher=tables[1])
    noise = [torch.Generator().manual_seed(1)]
    rollout = trb._write(bed, bed.student.copies(2), [Vanilla(), policy], 0, noise)
    drawn = (rollout.tokens[0, 1] * torch.tensor([9, 3, 1])).sum(-1).bincount(minlength=27)

    log_p, log_q = (writer.table[0].double().log_softmax(-1) for writer in tables)
    tempered = (log_p / policy.temperature(0)).log_softmax(-1)
    mu = policy.log_behaviour(tempered, log_q, 0).log_mu.exp().tolist()
    right, expected = bed.right[0, 0].tolist(), []
    for sequence in itertools.product(range(3), repeat=3):
        p, row = 1.0, 0
        for token in sequence:
            p *= mu[row][token]
            row = row + 1 if row < 3 and token == right[row] else 3
        expected.append(4000 * p)
    counts = torch.tensor(expected)
    rare = counts < 15  # of these the test takes the sum
    observed, awaited = ([*of[~rare].tolist(), of[rare].sum().item()] for of in (drawn, counts))
    kept = len(observed) - (awaited[-1] == 0)
    assert kept > 8
    assert chisquare(observed[:kept], awaited[:kept], sum_check=False).pvalue > 1e-3


@both_beds
def test_logits_of_a_rollout_are_those_of_its_tokens(setting: Setting) -> None:
    bed = setting.bed((0, 1))
    policies = [Vanilla(), TrustRegion(0.1), SKD(3)]
    student = bed.student.copies(3)
    rollout = trb._write(bed, student, policies, 0, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    assert rollout.tokens.shape == (2, 3, bed.rollouts * bed.right.shape[1], bed.right.shape[2])
    assert torch.allclose(rollout.student.log_softmax(-1), student.follow(rollout.tokens, bed.rollouts), atol=1e-5)
    for arm in range(3):
        followed = bed.teacher.follow(rollout.tokens[:, arm], bed.rollouts)
        assert torch.allclose(rollout.teacher[:, arm].log_softmax(-1), followed, atol=1e-5)
    assert rollout.student.requires_grad
    assert not rollout.teacher.requires_grad


@pytest.mark.parametrize("arm", [0, 1, 2])
def test_a_step_on_a_chain_is_the_gradient_by_hand(arm: int) -> None:
    policies = [Vanilla(), TrustRegion(0.05, 30), TeacherOnly(1)]
    bed = in_double(small_chains((2, 3)))
    setting = replace(SMALL["chains"], steps=1)
    curves = distil(bed, policies, setting)
    noise = [torch.Generator().manual_seed(2**32 + seed) for seed in (2, 3)]
    tokens = trb._write(bed, bed.student.copies(3), policies, 0, noise).tokens
    for column in range(2):
        right = bed.right[column, 0].tolist()
        theta, q = bed.student.table[column].clone(), bed.teacher.table[column].log_softmax(-1)
        log_p = theta.log_softmax(-1)
        gradient, junk, seen = torch.zeros_like(theta), 0, 0.0
        for sequence in tokens[column, arm].tolist():
            row = 0
            for token in sequence:
                p = log_p[row].exp()
                if arm == 2:
                    slope = p - torch.eye(4, dtype=torch.float64)[token]
                else:
                    ratio = log_p[row] - q[row]
                    slope = p * (ratio - (p * ratio).sum())
                gradient[row] += slope / (6 * 5)
                junk += row == 5
                seen += q[row, token].item() / (6 * 5)
                row = row + 1 if row < 5 and token == right[row] else 5
        theta -= 2.0 * gradient
        after = math.exp(sum(theta.log_softmax(-1)[t, token].item() for t, token in enumerate(right)))
        assert curves.exact[1, column, arm].item() == pytest.approx(after, rel=1e-9)
        assert curves.junk[0, column, arm].item() == pytest.approx(junk / 30)
        assert curves.teacher_log_prob[0, column, arm].item() == pytest.approx(seen, rel=1e-9)


def test_a_trust_region_in_a_rollout_is_the_blend_of_the_core() -> None:
    log_p, log_q = torch.randn(2, 1, 2, 3, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    found = trb._log_mu([Vanilla(), TrustRegion(0.1, 10)], log_p, log_q, step=5)
    assert torch.equal(found[:, 0], log_p[:, 0].log_softmax(-1))
    assert torch.allclose(found[0, 1], trust_region_blend(log_p[0, 1], log_q[0, 1], 0.05)[0], atol=1e-6)


@both_beds
def test_without_a_budget_trb_is_plain_distillation_bit_for_bit(setting: Setting) -> None:
    bed = setting.bed((0, 1))
    plain = distil(bed, [Vanilla(), SKD(3)], setting)
    for nothing in (TrustRegion(0.0, 30), TrustRegion(0.1, 0), TeacherOnly(0), TemperatureWarmup(0.8, 0)):
        for one, other in zip(distil(bed, [nothing, SKD(3)], setting), plain, strict=True):
            assert torch.equal(one, other), nothing
    some = distil(bed, [TrustRegion(0.1, 30), SKD(3)], setting)
    assert not torch.equal(some.exact[1:, :, 0], plain.exact[1:, :, 0])
    assert torch.equal(some.exact[:, :, 1], plain.exact[:, :, 1])


@both_beds
def test_runs_repeat_and_arms_and_seeds_do_not_meet(setting: Setting) -> None:
    policies = [policy for _, policy in ARMS.values()]
    together = distil(setting.bed((0, 1)), policies, setting)
    again = distil(setting.bed((0, 1)), policies, setting)
    assert all(torch.equal(one, other) for one, other in zip(together, again, strict=True))
    assert together.exact.shape == (7, 2, len(ARMS))
    alone = distil(setting.bed((1,)), policies[:2], setting)
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one[:, 0], other[:, 1, :2], atol=1e-4)
    # A fixed budget may be the shrinking one in so few steps: both let the teacher write.
    assert len(set(together.exact[-1, 0].tolist())) >= len(ARMS) - 1


def test_gradients_are_clipped_run_by_run() -> None:
    parameters = [torch.zeros(2, 3, 4, 5, requires_grad=True), torch.zeros(2, 3, 7, requires_grad=True)]
    gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for p in parameters]
    for gradient in gradients:
        gradient[0, 1] *= 1e-2

    def norm(of: list[Tensor]) -> Tensor:
        return sum(g.square().flatten(2).sum(-1) for g in of).sqrt()

    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    trb._clip(parameters, 1.0)
    clipped = [p.grad for p in parameters if p.grad is not None]
    expected = torch.where(norm(gradients) > 1, 1.0, norm(gradients))
    assert (expected < 1).sum() == 1
    assert torch.allclose(norm(clipped), expected, atol=1e-6)
    assert torch.equal(clipped[0][0, 1], gradients[0][0, 1])


# -- what is measured ------------------------------------------------------------------------------


def test_on_chains_a_budget_gives_more_exact_answers_and_less_junk() -> None:
    setting = replace(SETTINGS["chains"], steps=20, marks=(5, 10, 20))
    curves = distil(setting.bed((0, 1)), [TrustRegion(0.1, 30), TrustRegion(0.02, 30), Vanilla()], setting)
    figures = trb.figures(curves, setting)
    for name in ("mean", "after 5", "after 10", "after 20"):
        large, small, plain = figures[name].T
        assert (large > small).all(), name
        assert (small > 1.2 * plain).all(), name
    large, small, plain = figures[f"junk, first {FIRST}"].T
    assert (5 * large < plain).all()
    assert (small < plain).all()


@pytest.mark.slow
def test_the_full_setting_shows_what_the_page_says() -> None:
    columns = {name: column for column, name in enumerate(ARMS)}
    setting = SETTINGS["answers"]
    figures = trb.figures(trb._block("answers", 0), setting)
    plain, small, large, fixed = (
        columns[name] for name in ("plain OPD", "TRB, eps 0.02", "TRB, eps 0.1", "eps 0.1, fixed")
    )
    for name in ("mean", *(f"after {mark}" for mark in setting.marks if mark)):
        found = figures[name]
        assert (found[:, large] > found[:, small]).all(), name
        assert (found[:, small] > found[:, plain]).all(), name
    junk = figures[f"junk, first {FIRST}"]
    assert (5 * junk[:, large] < junk[:, plain]).all()
    assert (figures["mean"][:, fixed] > figures["mean"][:, large]).all()


@pytest.mark.slow
def test_after_600_steps_plain_distillation_has_caught_up_and_a_fixed_budget_is_ahead() -> None:
    setting = replace(SETTINGS["answers"], steps=600)
    policies = [Vanilla(), TrustRegion(0.1, 30), TrustRegion(0.1, schedule="constant")]
    exact = distil(setting.bed(range(3)), policies, setting).exact.mean(1)
    assert exact[80, 1] > exact[80, 0] + 0.02
    assert exact[600, 1].item() == pytest.approx(exact[600, 0].item(), abs=0.005)
    assert exact[600, 2] > exact[600, 1] + 0.03


@pytest.mark.slow
def test_adam_hides_the_gain_on_chains() -> None:
    adam = functools.partial(torch.optim.Adam, lr=0.05)
    setting = replace(SETTINGS["chains"], optimizer=adam)
    exact = distil(setting.bed(range(6)), [Vanilla(), TrustRegion(0.05, 30)], setting).exact.mean(1)
    assert exact[15, 1] > exact[15, 0] + 0.05  # early it is there
    assert exact[120, 1] < exact[120, 0] - 0.02


@pytest.fixture
def small_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small beds in blocks of two seeds, forgotten afterwards."""
    monkeypatch.setattr(trb, "SETTINGS", {name: SMALL[name] for name in SETTINGS})
    monkeypatch.setattr(trb, "BLOCK", 2)
    monkeypatch.setattr(trb, "_BLOCKS", {})


def test_arms_read_their_seed_and_the_figure_shows_what_was_trained(small_settings: None, tmp_path: Path) -> None:
    measured = [trb.EXPERIMENT.arms["SKD, top 3, tau 0.6"][1](seed) for seed in (2, 3)]
    assert set(trb._BLOCKS) == {("answers", 1), ("chains", 1)}
    assert isinstance(measured[1], dict)
    column = list(ARMS).index("SKD, top 3, tau 0.6")
    for name in SMALL:
        curves = trb._BLOCKS[name, 1]
        mean = measured[1][trb.METRIC if name == "answers" else f"{name}: mean"]
        assert mean == pytest.approx(curves.exact[:, 1, column].mean().item(), abs=1e-4)
        assert measured[1][f"{name}: after 6"] == pytest.approx(curves.exact[6, 1, column].item(), abs=1e-4)
        junk = measured[1][f"{name}: junk, first {FIRST}"]
        assert junk == pytest.approx(curves.junk[:, 1, column].mean().item(), abs=1e-4)
    assert measured[0] != measured[1]
    assert trb.EXPERIMENT.attachments is not None
    (path,) = trb.EXPERIMENT.attachments(tmp_path)
    drawn = path.read_text(encoding="utf-8")
    assert all(name in drawn for name in ARMS)
    assert "means of 2 seeds" in drawn
    path.unlink()
    (path,) = trb.EXPERIMENT.attachments(tmp_path)
    assert path.read_text(encoding="utf-8") == drawn


def arms_of(large: float, small: float) -> list[Arm]:
    """Arms of three seeds; budgets differ from plain distillation, 0.2, by so much, give or take 0.01."""
    values = dict.fromkeys(ARMS, 0.2) | {"TRB, eps 0.1": 0.2 + large, "TRB, eps 0.02": 0.2 + small}
    wobble = {"TRB, eps 0.1": (0.01, -0.01, 0), "TRB, eps 0.02": (0, 0.01, -0.01)}
    return [
        Arm(name, role, [values[name] + w for w in wobble.get(name, (0, 0, 0))], [0, 1, 2])
        for name, (role, _) in ARMS.items()
    ]


@pytest.mark.parametrize(
    ("large", "small", "verdict"),
    [
        (0.2, 0.1, "shown"),
        (0.2, 0.01, "inconclusive"),  # the smaller budget may be none better than plain
        (0.1, 0.1, "inconclusive"),  # or the larger than the smaller
        (0.1, 0.2, "not shown"),
        (0.2, -0.1, "not shown"),
        (-0.1, -0.2, "not shown"),
    ],
)
def test_the_rule_wants_both_budgets_ahead_and_in_order(large: float, small: float, verdict: str) -> None:
    assert trb.EXPERIMENT.rule is not None
    assert trb.EXPERIMENT.rule(arms_of(large, small)) == verdict


def test_a_fixed_budget_is_a_baseline_however_well_it_does() -> None:
    roles = {name: role for name, (role, _) in trb.EXPERIMENT.arms.items()}
    assert {name for name, role in roles.items() if role == "method"} == {"TRB, eps 0.1", "TRB, eps 0.02"}
    assert next(iter(roles)) == "TRB, eps 0.1"
    assert set(roles.values()) == {"method", "baseline"}

"""Over-optimisation of preferences: the bed is exact, and a batch of problems trains as each would alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.core.results import Arm, paired_difference
from trimtab.gallery.experiments import tr_align
from trimtab.gallery.experiments.tr_align import BATCH, EVERY, RATE, REFERENCES, SETTINGS, TIGHT, TUNED, Setting, train
from trimtab.gallery.testbeds.preferences import Preferences


def small(*seeds: int) -> Preferences:
    return Preferences.draw(seeds, answers=13, d=5, pairs=11, dtype=torch.float64)


# -- the bed ---------------------------------------------------------------------------------------


def test_sft_has_gained_nothing_and_is_at_no_distance_from_itself() -> None:
    bed = small(0, 1, 2)
    assert bed.gain(bed.sft).abs().max() == 0
    assert bed.kl_to_sft(bed.sft).abs().max() == 0
    theta = bed.sft + torch.randn(3, 5, dtype=torch.float64)
    shifted = Preferences(bed.seeds, bed.features + 3.0, bed.sft, bed.reward + 7.0, bed.chosen, bed.rejected)
    assert torch.allclose(shifted.gain(theta), bed.gain(theta))  # neither a logit nor a reward for all answers counts
    assert torch.allclose(shifted.kl_to_sft(theta), bed.kl_to_sft(theta))


def test_gain_and_kl_are_the_sums_over_answers() -> None:
    bed = small(3, 8)
    theta = torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gain, kl = bed.gain(theta), bed.kl_to_sft(theta)
    assert gain.shape == kl.shape == (4, 2)
    for policy in range(4):
        for seed in range(2):
            weights = []
            for parameters in (theta[policy, seed], bed.sft[seed]):
                e = [math.exp(sum((row * parameters).tolist())) for row in bed.features[seed]]
                weights.append([value / sum(e) for value in e])
            pi, sft = weights
            r = bed.reward[seed].tolist()
            expected = sum((p - q) * reward for p, q, reward in zip(pi, sft, r, strict=True))
            assert gain[policy, seed].item() == pytest.approx(expected, rel=1e-12)
            distance = sum(p * math.log(p / q) for p, q in zip(pi, sft, strict=True))
            assert kl[policy, seed].item() == pytest.approx(distance, rel=1e-12)


def test_a_problem_is_that_of_its_seed_alone() -> None:
    both, alone = Preferences.draw((5, 7)), Preferences.draw((7,))
    for name in ("features", "sft", "reward", "chosen", "rejected"):
        assert torch.equal(getattr(both, name)[1:], getattr(alone, name))
    for together, apart in zip(both.batches(3, 8), alone.batches(3, 8), strict=True):
        assert torch.equal(together[:, 1:], apart)
    assert not torch.equal(both.features[0], both.features[1])
    assert both.features.shape == (2, 400, 60)
    assert both.chosen.shape == (2, 150)
    assert alone.features.std().item() == pytest.approx(2 / 60**0.5, rel=0.02)
    assert (both.features[0] @ both.sft[0]).std().item() == pytest.approx(2.4, rel=0.3)


def test_batches_are_pairs_of_the_problem() -> None:
    bed = small(0, 4)
    chosen, rejected = bed.batches(40, 6)
    assert chosen.shape == (40, 2, 6)
    for seed in range(2):
        pairs = set(zip(bed.chosen[seed].tolist(), bed.rejected[seed].tolist(), strict=True))
        drawn = set(zip(chosen[:, seed].flatten().tolist(), rejected[:, seed].flatten().tolist(), strict=True))
        assert drawn == pairs


def test_pairs_come_from_sft_and_are_preferred_by_reward() -> None:
    bed = Preferences.draw((1,), answers=4, d=3, pairs=40_000, dtype=torch.float64)
    p, r = bed.log_probs(bed.sft)[0].exp(), bed.reward[0]
    counts = torch.zeros(4, 4, dtype=torch.float64)
    ones = torch.ones(40_000, dtype=torch.float64)
    counts.index_put_((bed.chosen[0], bed.rejected[0]), ones, accumulate=True)
    drawn = 2 * p[:, None] * p / (1 - p.square().sum())  # two orders
    expected = drawn * torch.sigmoid(r[:, None] - r) * (1 - torch.eye(4))
    assert expected.sum().item() == pytest.approx(1)
    assert torch.allclose(counts / 40_000, expected, atol=4 * 0.5 / 200)
    wrong = Preferences.draw(range(20))
    share = (wrong.reward.gather(1, wrong.chosen) < wrong.reward.gather(1, wrong.rejected)).double().mean()
    assert share.item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, "seeds is empty"),
        ({"answers": 1}, "answers=1: 2 or more"),
        ({"d": 0}, "d=0: 1 or more"),
        ({"pairs": 0}, "pairs=0: 1 or more"),
    ],
)
def test_problems_without_pairs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        Preferences.draw(**{"seeds": (0,)} | options)


# -- training --------------------------------------------------------------------------------------


def alone(bed: Preferences, setting: Setting, steps: int) -> tuple[Tensor, Tensor]:
    """One policy on one problem, with gradients and Adam by hand: gain and KL after `steps`."""
    phi, theta = bed.features[0], bed.sft[0].clone()
    reference, first, second = theta.clone(), torch.zeros_like(theta), torch.zeros_like(theta)
    beta = setting.beta
    alpha, tau = {"fixed": (0, 1), "hard 100": (1, 100), "mixed 0.6, 64": (0.6, 64), "soft 0.6": (0.6, 1)}[
        setting.reference
    ]
    for step, (chosen, rejected) in enumerate(zip(*bed.batches(steps, BATCH), strict=True), start=1):
        w, l_ = chosen[0], rejected[0]
        pi = (phi @ theta).softmax(0)
        ratio = pi.log() - (phi @ reference).log_softmax(0)
        d_w, d_l = ratio[w], ratio[l_]
        score = phi - pi @ phi
        if setting.loss == "DPO":
            slope = -beta * torch.sigmoid(-beta * (d_w - d_l))
            gradient = slope[:, None] * (score[w] - score[l_])
        elif setting.loss == "IPO":
            slope = 2 * (d_w - d_l - 1 / (2 * beta))
            gradient = slope[:, None] * (score[w] - score[l_])
        else:
            s_w = torch.sigmoid(beta * (d_w - d_l.mean().clamp_min(0)))
            s_l = torch.sigmoid(beta * (d_w.mean().clamp_min(0) - d_l))
            gradient = beta * ((s_l * (1 - s_l))[:, None] * score[l_] - (s_w * (1 - s_w))[:, None] * score[w])
        g = gradient.mean(0)
        first, second = 0.9 * first + 0.1 * g, 0.99 * second + 0.01 * g * g
        theta = theta - RATE * (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        if step % tau == 0:
            reference = alpha * theta + (1 - alpha) * reference
    return bed.gain(theta[None]), bed.kl_to_sft(theta[None])


@pytest.mark.parametrize(("loss", "beta"), TIGHT)
def test_a_batch_of_problems_trains_as_each_alone(loss: str, beta: float) -> None:
    settings = [Setting(loss, beta, reference) for reference in REFERENCES]
    steps = 210  # two hard updates, three mixed ones
    curves = train(small(2, 6, 9), settings, steps)
    assert curves.gain.shape == curves.kl.shape == (steps // EVERY + 1, 4, 3)
    for column, seed in enumerate((2, 6, 9)):
        for row, setting in enumerate(settings):
            gain, kl = alone(small(seed), setting, steps)
            assert curves.gain[-1, row, column].item() == pytest.approx(gain.item(), abs=1e-9)
            assert curves.kl[-1, row, column].item() == pytest.approx(kl.item(), abs=1e-9)
    assert len({round(value, 6) for value in curves.kl[-1, :, 0].tolist()}) == 4


@pytest.mark.parametrize(("loss", "beta"), TIGHT)
def test_before_its_first_update_a_hard_reference_is_a_fixed_one(loss: str, beta: float) -> None:
    settings = [Setting(loss, beta, reference) for reference in ("hard 100", "fixed")]
    before, after = (train(small(0, 1), settings, steps) for steps in (100, 110))
    assert torch.equal(before.gain[:, 0], before.gain[:, 1])  # the update of step 100 comes after it
    assert torch.equal(before.kl[:, 0], before.kl[:, 1])
    assert torch.equal(after.gain[:-1], before.gain)
    assert (after.kl[-1, 0] != after.kl[-1, 1]).all()


def test_arms_of_different_losses_train_side_by_side_and_runs_repeat() -> None:
    bed = small(4, 5)
    together = train(bed, SETTINGS, 70)
    again = train(bed, SETTINGS, 70)
    assert all(torch.equal(one, other) for one, other in zip(together, again, strict=True))
    for row in (0, 6, 9, len(SETTINGS) - 1):
        apart = train(bed, [SETTINGS[row]], 70)
        assert torch.allclose(together.gain[:, row], apart.gain[:, 0], atol=1e-10)


def test_soft_updates_leave_beta_little_to_say() -> None:
    # The reference lags by 2/3 of a step: the gradient is that of the unanchored limit, whose scale Adam undoes.
    bed = Preferences.draw(range(3), dtype=torch.float64)
    settings = [Setting("DPO", beta, reference) for reference in ("soft 0.6", "fixed") for beta in (0.05, 1.0)]
    kl = train(bed, settings, 100).kl[-1]
    assert (kl[0] / kl[1] - 1).abs().max() < 0.05
    assert (kl[2] / kl[3] - 1).min() > 1


# -- the experiment --------------------------------------------------------------------------------


def test_with_a_beta_that_is_too_large_the_claim_shows_on_twenty_seeds() -> None:
    settings = [Setting(*each, reference) for each in TIGHT for reference in ("hard 100", "fixed")]
    gain = train(Preferences.draw(range(20)), settings, 600).gain[-1]
    for row, each in zip((0, 2, 4), TIGHT, strict=True):
        difference = gain[row] - gain[row + 1]
        assert difference.mean() > 2 * difference.std() / 20**0.5, each
        assert difference.mean() > 0.15, each


@pytest.fixture
def two_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs in blocks of two seeds, forgotten afterwards."""
    monkeypatch.setattr(tr_align, "BLOCK", 2)
    monkeypatch.setattr(tr_align, "STEPS", 610)
    monkeypatch.setattr(tr_align, "_BLOCKS", {})


def test_arms_read_their_seed_and_the_figure_shows_what_was_trained(two_seeds: None, tmp_path: Path) -> None:
    arms = tr_align.EXPERIMENT.arms
    name = "TR-KTO, beta 1, hard 100"
    measured = [arms[name][1](seed) for seed in (2, 3)]
    assert set(tr_align._BLOCKS) == {1}
    curves = train(Preferences.draw((3,)), [Setting("KTO", 1.0, "hard 100")], 610)
    assert isinstance(measured[1], dict)
    assert measured[1][tr_align.METRIC] == pytest.approx(curves.gain[600 // EVERY].item(), abs=1e-3)
    assert measured[1]["gain after 610"] == pytest.approx(curves.gain[-1].item(), abs=1e-3)
    assert measured[1]["KL to SFT after 610"] == pytest.approx(curves.kl[-1].item(), abs=1e-3)
    assert measured[0] != measured[1]
    assert tr_align.EXPERIMENT.attachments is not None
    (path,) = tr_align.EXPERIMENT.attachments(tmp_path)
    text = path.read_text(encoding="utf-8")
    for setting in [Setting(*each, reference) for each in TIGHT for reference in ("hard 100", "soft 0.6", "fixed")]:
        assert setting.name in text
    assert "mean of 2 seeds" in text
    path.unlink()
    (path,) = tr_align.EXPERIMENT.attachments(tmp_path)
    assert path.read_text(encoding="utf-8") == text


def test_baselines_have_the_beta_of_the_claim_and_tuned_ones_stand_beside() -> None:
    roles = {name: role for name, (role, _) in tr_align.EXPERIMENT.arms.items()}
    assert next(iter(roles)) == "TR-DPO, beta 1, hard 100"
    assert {name for name, role in roles.items() if role == "baseline"} == {
        "DPO, beta 1, fixed",
        "IPO, beta 0.3, fixed",
        "KTO, beta 1, fixed",
    }
    assert {Setting(*each, "fixed").name for each in TUNED} < {
        name for name, role in roles.items() if role == "reference"
    }
    assert all((role == "method") == name.startswith("TR-") for name, role in roles.items())


def arms_of(differences: dict[str, float], seeds: int = 20) -> list[Arm]:
    """Arms of TIGHT in which hard updates differ from a fixed reference by `differences`, give or take 0.1."""
    found = []
    for loss, beta in TIGHT:
        fixed = [float(seed % 7) for seed in range(seeds)]
        hard = [value + differences[loss] + 0.1 * (-1) ** seed for seed, value in enumerate(fixed)]
        for reference, values in (("hard 100", hard), ("fixed", fixed)):
            role = "baseline" if reference == "fixed" else "method"
            found.append(Arm(Setting(loss, beta, reference).name, role, values, range(seeds)))
    return found


@pytest.mark.parametrize(
    ("differences", "seeds", "verdict"),
    [
        ({"DPO": 0.5, "IPO": 0.8, "KTO": 0.2}, 20, "shown"),
        ({"DPO": 0.5, "IPO": 0.8, "KTO": 0.2}, 19, "inconclusive"),
        ({"DPO": 0.5, "IPO": 0.01, "KTO": 0.2}, 20, "inconclusive"),
        ({"DPO": 0.5, "IPO": 0.8, "KTO": -0.2}, 20, "not shown"),
        ({"DPO": 0.01, "IPO": 0.8, "KTO": -0.2}, 20, "not shown"),
    ],
)
def test_the_rule_wants_all_three_losses_and_enough_seeds(
    differences: dict[str, float], seeds: int, verdict: str
) -> None:
    arms = arms_of(differences, seeds)
    assert paired_difference(arms[0], arms[1]).mean == pytest.approx(differences["DPO"], abs=0.01)
    assert tr_align.EXPERIMENT.rule is not None
    assert tr_align.EXPERIMENT.rule(arms) == verdict

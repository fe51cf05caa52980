"""Scores of explanations: judges that know everything or nothing, and the questions against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.core.text import TextSource
from trimtab.sae.encodings import Latents
from trimtab.sae.firings import Context
from trimtab.sae.harvest import Harvest, HarvestConfig
from trimtab.sae.judging import (
    Example,
    TokenLookup,
    balanced_accuracy,
    lookup_judge,
    score_latents,
    token_lookup,
)
from trimtab.sae.kron import KronSAE, KronSAEConfig
from trimtab.sae.kron_latents import pre_latent_dictionary
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

WINDOW = 5
CONFIG = HarvestConfig(context=16, sequences_per_forward=40, sink_norm_ratio=None)


@pytest.fixture
def harvest(tiny_llama: Any, tiny_tokenizer: Any) -> Callable[..., Harvest]:
    def make(documents: int = 150, words: int = 60) -> Harvest:
        g = torch.Generator().manual_seed(5)
        text = [
            " ".join(f"w{i}" for i in torch.randint(0, words, (20,), generator=g).tolist()) for _ in range(documents)
        ]
        return Harvest(tiny_llama, tiny_tokenizer, TextSource(text), ["embed", "resid.1"], CONFIG)

    return make


def random_sae(n_latents: int = 24, k: int = 3) -> TopKSAE:
    sae = TopKSAE(TopKSAEConfig(d_in=32, n_latents=n_latents, k=k), seed=3)
    with torch.no_grad():
        sae.encoder.mul_(50)  # activations of the tiny model have a standard deviation of about 0.02
        sae.encoder_bias.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.3)
    return sae


class Coin(TopKSAE):
    """A dictionary whose only latent fires at random, whatever the token."""

    def encode_sparse(self, x: Tensor, k: int | None = None) -> Latents:
        g = torch.Generator().manual_seed(len(x))
        values = torch.rand(len(x), 1, generator=g)
        return Latents((values - 0.9).relu(), torch.zeros(len(x), 1, dtype=torch.int64))


def every_window(sae: TopKSAE, live: Harvest, latent: int) -> dict[tuple[int, ...], tuple[float, ...]]:
    """By its tokens, the activations of every window of five tokens; the last token of a sequence is in none."""
    found = {}
    for forward in live.forwards():
        dense = sae.encode(forward.activations["resid.1"])[..., latent] * forward.keep
        for ids, values in zip(forward.input_ids, dense.tolist(), strict=True):
            for start in (0, 5, 10):
                found[tuple(ids[start : start + WINDOW].tolist())] = tuple(values[start : start + WINDOW])
    return found


def knowing(truth: dict[tuple[int, ...], tuple[float, ...]]) -> Callable[[Any, list[Example]], list[bool]]:
    def judge(explanation: Any, examples: list[Example]) -> list[bool]:
        answers = []
        for ids, highlighted in examples:
            fires = [value > 0 for value in truth[tuple(ids)]]
            answers.append(any(fires) if highlighted is None else fires == highlighted)
        return answers

    return judge


def latent_itself(latent: int, firing: list[Context], silent: list[Context]) -> int:
    return latent


# -- judges whose score is known -------------------------------------------------------------------


def test_a_judge_that_knows_everything_gets_one_and_its_opposite_zero(harvest: Any) -> None:
    live, sae = harvest(), random_sae()
    for latent in (2, 10):
        judge = knowing(every_window(sae, live, latent))
        options = {"place": "resid.1", "latents": [latent], "window": WINDOW, "explainer": latent_itself}
        (score,) = score_latents(sae, live, judge=judge, **options)
        assert (score.latent, score.detection, score.fuzzing) == (latent, 1.0, 1.0)
        (score,) = score_latents(sae, live, judge=lambda e, x, j=judge: [not yes for yes in j(e, x)], **options)
        assert (score.detection, score.fuzzing) == (0.0, 0.0)


@pytest.mark.parametrize("answer", [0.0, 0.49, 0.5, True])
def test_a_judge_that_always_says_the_same_gets_one_half(harvest: Any, answer: float) -> None:
    scores = score_latents(
        random_sae(), harvest(), place="resid.1", judge=lambda explanation, x: [answer] * len(x), window=WINDOW
    )
    assert len(scores) > 10
    assert {(score.detection, score.fuzzing) for score in scores} == {(0.5, 0.5)}


def test_the_lookup_finds_a_latent_that_is_a_token(harvest: Any, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    token = tiny_llama.model.embed_tokens.weight[tiny_tokenizer.convert_tokens_to_ids("w5")].detach()
    sae = TopKSAE(TopKSAEConfig(d_in=32, n_latents=4, k=4))
    with torch.no_grad():
        sae.encoder.zero_()
        sae.encoder[2], sae.encoder_bias[2] = 1e4 * token, -1e4 * 0.9 * token @ token
    (score,) = score_latents(sae, harvest(300, words=20), place="embed", window=WINDOW)
    assert score.latent == 2
    assert score.windows == 64
    assert score.detection >= 0.99
    assert score.fuzzing >= 0.99


def test_the_lookup_knows_nothing_of_a_latent_that_is_chance(harvest: Any) -> None:
    coin = Coin(TopKSAEConfig(d_in=32, n_latents=1, k=1))
    (score,) = score_latents(coin, harvest(800), place="embed", window=WINDOW, examples=400, quantile=0.0)
    assert score.windows > 350
    assert score.detection == pytest.approx(0.5, abs=0.08)  # a standard deviation is about 0.018
    assert score.fuzzing == pytest.approx(0.5, abs=0.08)


def test_pre_latents_are_scored_by_the_same_function(harvest: Any) -> None:
    kron = KronSAE(KronSAEConfig(d_in=32, h=2, m=2, n=4, k=4))
    with torch.no_grad():
        kron.encoder.mul_(200)
        kron.encoder_bias.fill_(-0.8)
    scores = score_latents(pre_latent_dictionary(kron), harvest(), place="embed", window=WINDOW)
    assert len(scores) > 3
    assert all(0.5 < score.detection <= 1 for score in scores)  # embeddings: all is a matter of the token


# -- the questions -----------------------------------------------------------------------------------


def asked(live: Harvest, sae: TopKSAE, **options: Any) -> tuple[list[Any], list[list[Example]]]:
    """What the explainer is shown and the judge is asked about one latent."""
    seen: list[Any] = []
    questions: list[list[Example]] = []

    def explainer(latent: int, firing: list[Context], silent: list[Context]) -> None:
        seen.extend((firing, silent))

    def judge(explanation: Any, examples: list[Example]) -> list[bool]:
        questions.append(examples)
        return [False] * len(examples)

    options = {"place": "resid.1", "window": WINDOW, "explainer": explainer, "judge": judge, **options}
    score_latents(sae, live, **options)
    return seen, questions


@pytest.mark.parametrize(("shown", "examples", "quantile"), [(16, 64, 0.5), (2, 7, 0.5), (4, 64, 0.0), (400, 400, 0.9)])
def test_questions_are_held_out_windows_of_both_kinds(harvest: Any, shown: int, examples: int, quantile: float) -> None:
    live, sae = harvest(), random_sae()
    truth = every_window(sae, live, 2)
    (firing, silent), (detection, fuzzing) = asked(
        live, sae, latents=[2], shown=shown, examples=examples, quantile=quantile
    )
    peaks = sorted((max(values) for values in truth.values() if max(values) > 0), reverse=True)
    used = -int(-(1 - quantile) * len(peaks) // 1)  # rounded up
    lowest = peaks[used - 1] - 1e-6
    assert len(firing) == min(shown, used // 2)
    assert all(max(context.activations) >= lowest for context in firing)
    assert len(silent) == min(shown, (len(truth) - len(peaks)) // 2)
    assert all(max(context.activations) == 0 for context in silent)
    for context in (*firing, *silent):
        assert context.activations == pytest.approx(truth[tuple(context.token_ids)], rel=1e-5)
    shown_ids = {tuple(context.token_ids) for context in (*firing, *silent)}

    kinds = [max(truth[tuple(example.token_ids)]) for example in detection]
    assert all(example.highlighted is None for example in detection)
    assert sum(peak > 0 for peak in kinds) == min(examples, used - len(firing))
    assert len(kinds) == 2 * sum(peak > 0 for peak in kinds)
    assert all(peak == 0 or peak >= lowest for peak in kinds)

    right = wrong = random = 0
    for ids, highlighted in fuzzing:
        assert highlighted is not None
        assert any(highlighted)
        fires = [value > 0 for value in truth[tuple(ids)]]
        assert all(token > 3 for token, chosen in zip(ids, highlighted, strict=True) if chosen)  # no special token
        if not any(fires):
            random += 1
        elif fires == highlighted:
            right += 1
        else:
            wrong += 1
            assert not any(f and h for f, h in zip(fires, highlighted, strict=True))
            silent_tokens = sum(t > 3 for t in ids) - sum(fires)
            assert sum(highlighted) == min(sum(fires), silent_tokens)
    assert right == min(examples, (2 * (used - len(firing)) + 1) // 3)
    assert (wrong, random) == (right // 2, right - right // 2)
    for questions in (detection, fuzzing):
        assert len({tuple(example.token_ids) for example in questions}) == len(questions)
        assert not shown_ids & {tuple(example.token_ids) for example in questions}


def test_true_and_false_come_in_random_order(harvest: Any) -> None:
    live, sae = harvest(), random_sae()
    truth = every_window(sae, live, 10)
    _, (detection, _) = asked(live, sae, latents=[10])
    order = [max(truth[tuple(example.token_ids)]) > 0 for example in detection]
    assert 5 < sum(a != b for a, b in itertools.pairwise(order)) < len(order) - 5


def test_windows_that_fire_throughout_are_not_mislabelled(harvest: Any) -> None:
    live, sae = harvest(), random_sae()
    _, (_, fuzzing) = asked(live, sae, latents=[10], window=1)
    assert {len(example.token_ids) for example in fuzzing} == {1}
    assert all(example.highlighted == [True] for example in fuzzing)


def test_scores_depend_on_the_seed_and_not_on_the_company(harvest: Any) -> None:
    live, sae = harvest(), random_sae()
    options = {"place": "resid.1", "window": WINDOW}
    together = score_latents(sae, live, latents=[2, 10, 11], **options)
    assert together[1:2] == score_latents(sae, live, latents=[10], **options)
    other = score_latents(sae, live, latents=[2, 10, 11], seed=1, **options)
    assert [score.latent for score in other] == [2, 10, 11]
    assert other != together


def test_those_scored_are_evenly_spaced_and_progress_is_told(harvest: Any) -> None:
    live, sae = harvest(), random_sae()
    told: list[int] = []
    everything = score_latents(sae, live, place="resid.1", window=WINDOW, tokens=320, advance=told.append)
    assert sum(told) == 320
    few = score_latents(sae, live, place="resid.1", window=WINDOW, tokens=320, n_latents=3)
    assert len(few) == 3
    assert {score.latent for score in few} < {score.latent for score in everything}


def test_a_dictionary_that_never_fires_has_no_scores(harvest: Any) -> None:
    sae = random_sae()
    with torch.no_grad():
        sae.encoder_bias.fill_(-1e6)
    assert score_latents(sae, harvest(), place="resid.1", window=WINDOW) == []


# -- formulas ----------------------------------------------------------------------------------------


def test_balanced_accuracy_is_the_mean_of_both_rates() -> None:
    assert balanced_accuracy([True, True, False, False, False, False], [1.0, 0.2, 0.1, 0.9, 0.0, 0.49]) == 0.625
    assert balanced_accuracy([True, False], [0.5, 0.5]) == 0.5


def test_the_table_holds_means_and_prefers_the_longer_key() -> None:
    firing = [Context([1, 2, 3], [0.0, 4.0, 0.0]), Context([5, 2, 2], [0.0, 1.0, 1.0])]
    silent = [Context([7, 2, 3], [0.0, 0.0, 0.0])]
    lookup = token_lookup(0, firing, silent)
    # 2 alone: (4 + 1 + 1 + 0) / 4; after 1: 4; after 9, never seen: as 2 alone.
    assert lookup.predict([2, 1, 2, 9, 2]) == [1.5, 0.0, 4.0, 0.0, 1.5]
    assert lookup.predict([7, 2]) == [0.0, 0.0]


def test_the_threshold_is_judged_on_windows_that_are_left_out() -> None:
    # Token 8 fires once in three windows, and 2 always: only 2 is a rule.
    firing = [Context([2, 8], [6.0, 3.0]), Context([2, 4], [6.0, 0.0])]
    silent = [Context([8, 4], [0.0, 0.0]), Context([4, 8], [0.0, 0.0])]
    lookup = token_lookup(0, firing, silent)
    # Left out: firing windows predict 6, silent ones (3 + 0) / 2.
    assert lookup.threshold == pytest.approx((1.5 + 6) / 2)
    assert lookup_judge(lookup, [Example([2, 8], None), Example([8, 8], None)]) == [1.0, 0.0]
    assert lookup_judge(lookup, [Example([2, 8], [True, True]), Example([2, 8], [False, True])]) == [0.5, 0.0]


def test_a_latent_of_tokens_seen_once_is_no_rule() -> None:
    lookup = token_lookup(0, [Context([1], [2.0]), Context([2], [3.0])], [Context([4], [0.0])])
    assert lookup == TokenLookup(lookup.table, float("inf"))
    assert lookup_judge(lookup, [Example([1], None)]) == [0.0]


# -- bad input ---------------------------------------------------------------------------------------


def test_what_cannot_be_scored_is_named(harvest: Any) -> None:
    live, sae = harvest(20), random_sae()
    options: dict[str, Any] = {"place": "resid.1", "window": WINDOW}
    with pytest.raises(TrimtabError, match=r"place='resid\.2' is not known"):
        score_latents(sae, live, **{**options, "place": "resid.2"})
    for name in ("n_latents", "shown", "examples", "tokens"):
        with pytest.raises(TrimtabError, match=f"{name}=0 must be at least 1"):
            score_latents(sae, live, **options, **{name: 0})
    for window in (0, 17):
        with pytest.raises(TrimtabError, match=f"window={window} must lie between 1 and the harvest's context=16"):
            score_latents(sae, live, **{**options, "window": window})
    for quantile in (-0.1, 1.0, float("nan")):
        with pytest.raises(TrimtabError, match="quantile="):
            score_latents(sae, live, **options, quantile=quantile)
    for latent in (-1, 24):
        with pytest.raises(TrimtabError, match=f"latents hold {latent}; accepted: 0 … 23"):
            score_latents(sae, live, **options, latents=[3, latent])
    with torch.no_grad():
        sae.encoder_bias[5], sae.encoder_bias[6] = -1e6, 1e6
    for latent in (5, 6):
        with pytest.raises(TrimtabError, match=f"latent {latent} fires in .* windows: too few of one kind"):
            score_latents(sae, live, **options, latents=[latent])


def test_answers_that_are_no_probabilities_are_refused(harvest: Any) -> None:
    options: dict[str, Any] = {"place": "resid.1", "window": WINDOW, "latents": [10]}
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(TrimtabError, match="accepted are probabilities from 0 to 1"):
            score_latents(random_sae(), harvest(), judge=lambda e, x, bad=bad: [bad] * len(x), **options)
    with pytest.raises(TrimtabError, match="accepted is one for each"):
        score_latents(random_sae(), harvest(), judge=lambda e, x: [1.0], **options)
    with pytest.raises(TrimtabError, match="truth holds 2 times True among 2"):
        balanced_accuracy([True, True], [1.0, 0.0])

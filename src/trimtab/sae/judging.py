"""How well an explanation of a latent tells where it fires: detection and fuzzing scores, with a judge of one's choice.

Source: the scores of Paulo et al., arXiv 2410.13928, with the settings of KronSAE, arXiv 2505.22255v3, appendix A.

    score = (TPR + TNR) / 2     of yes-or-no questions: 1 for a perfect judge, 1/2 for one that knows nothing

    detection    does the latent fire anywhere in this window?
                 as many windows where it does not as where it does
    fuzzing      does the latent fire on the tokens that are highlighted?
                 half are windows where it does, rightly highlighted; a quarter such windows with as many other tokens
                 highlighted; a quarter windows where it is silent, with random tokens highlighted

Windows are consecutive pieces of a sequence, 31 tokens each, cut before anything is known of the latent, so that its
place in the window says nothing. Those where it fires are ranked by its peak there and only the upper half is used
("above the median"); those where it does not fire are drawn at random. An explainer is shown some of both kinds; the
judge is asked about others, in random order.

An explainer and a judge are callables. `token_lookup` and `lookup_judge` are a pair that needs no language model: the
explanation is a table of tokens. What it scores is how far a latent is a matter of its tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from trimtab.core.errors import TrimtabError
from trimtab.sae.firings import Context, Firings, collect_firings, evenly_spaced
from trimtab.sae.harvest import Harvest
from trimtab.sae.modeling import TopKSAE

__all__ = [
    "Example",
    "Explainer",
    "Judge",
    "LatentScore",
    "TokenLookup",
    "balanced_accuracy",
    "lookup_judge",
    "score_latents",
    "token_lookup",
]


class Example(NamedTuple):
    """What a judge is asked about: tokens, and which of them are highlighted; None asks about the whole window."""

    token_ids: list[int]
    highlighted: list[bool] | None


Explainer = Callable[[int, list[Context], list[Context]], Any]
"""From a latent, windows where it fires and windows where it does not, to an explanation of any kind."""

Judge = Callable[[Any, list[Example]], Sequence[float | bool]]
"""From an explanation and examples of one kind to the probability, for each, that the answer is yes; True counts as 1,
and yes is what has at least 1/2."""


@dataclass(frozen=True, kw_only=True)
class LatentScore:
    """The scores of one latent; windows: how many it was judged on where it fires, those of `detection`."""

    latent: int
    detection: float
    fuzzing: float
    windows: int


# -- the judge that needs no model ------------------------------------------------------------------


@dataclass(frozen=True)
class TokenLookup:
    """An explanation: the latent's mean activation by token, and by token and the one before it where both were seen.

    threshold: the predicted activation from which a window counts as firing.
    """

    table: dict[tuple[int, ...], tuple[float, int]]
    threshold: float

    def predict(self, token_ids: Sequence[int]) -> list[float]:
        """The activation to be expected on each token; 0 on those that were never seen."""
        return _predict(self.table, token_ids)


def token_lookup(latent: int, firing: list[Context], silent: list[Context]) -> TokenLookup:
    """The offline explainer: tabulates what the windows show.

    The threshold is the one that tells both kinds of windows apart best, each window's peak being predicted from all
    the other windows.
    """
    table: dict[tuple[int, ...], tuple[float, int]] = {}
    for context in (*firing, *silent):
        _add(table, context, 1)
    peaks = []
    for context in (*firing, *silent):
        _add(table, context, -1)
        peaks.append(max(_predict(table, context.token_ids)))
        _add(table, context, 1)
    return TokenLookup(table, _best_threshold(peaks[: len(firing)], peaks[len(firing) :]))


def lookup_judge(explanation: TokenLookup, examples: list[Example]) -> list[float]:
    """The offline judge: the peak that is predicted for a window, or the share of highlighted tokens it predicts."""
    answers = []
    for tokens, highlighted in examples:
        fires = [value >= explanation.threshold for value in explanation.predict(tokens)]
        chosen = [fires[t] for t in range(len(tokens)) if highlighted[t]] if highlighted else [any(fires)]
        answers.append(sum(chosen) / len(chosen))
    return answers


def _keys(token_ids: Sequence[int], t: int) -> tuple[tuple[int, ...], ...]:
    """What position `t` is looked up by, the most telling first."""
    return ((token_ids[t - 1], token_ids[t]), (token_ids[t],)) if t else ((token_ids[t],),)


def _add(table: dict[tuple[int, ...], tuple[float, int]], context: Context, times: int) -> None:
    for t, value in enumerate(context.activations):
        for key in _keys(context.token_ids, t):
            total, count = table.get(key, (0.0, 0))
            table[key] = (total + times * value, count + times)


def _predict(table: dict[tuple[int, ...], tuple[float, int]], token_ids: Sequence[int]) -> list[float]:
    found = []
    for t in range(len(token_ids)):
        seen = (table[key] for key in _keys(token_ids, t) if table.get(key, (0.0, 0))[1])
        total, count = next(seen, (0.0, 1))
        found.append(total / count)
    return found


def _best_threshold(positive: list[float], negative: list[float]) -> float:
    """The middle between two neighbouring predictions that gives the highest balanced accuracy; always above 0."""
    values = sorted({0.0, *positive, *negative})
    cuts = [(low + high) / 2 for low, high in itertools.pairwise(values)] or [math.inf]
    truth = [True] * len(positive) + [False] * len(negative)
    return max(cuts, key=lambda cut: balanced_accuracy(truth, [value >= cut for value in (*positive, *negative)]))


# -- scores -----------------------------------------------------------------------------------------


def balanced_accuracy(truth: Sequence[bool], answers: Sequence[float | bool]) -> float:
    """(TPR + TNR) / 2 of answers that say yes from 1/2 upwards.

    Raises TrimtabError for answers that are too many, too few or outside 0 … 1, and for a truth of one kind only.
    """
    if len(answers) != len(truth):
        raise TrimtabError(f"answers: {len(answers)} for {len(truth)} examples; accepted is one for each")
    outside = [answer for answer in answers if not 0 <= answer <= 1]
    if outside:
        raise TrimtabError(f"answers hold {outside[0]!r}; accepted are probabilities from 0 to 1, or booleans")
    positives = sum(truth)
    if not 0 < positives < len(truth):
        raise TrimtabError(f"truth holds {positives} times True among {len(truth)}; accepted are both kinds")
    right = [(answer >= 0.5) == bool(true) for true, answer in zip(truth, answers, strict=True)]
    hits = sum(r for r, true in zip(right, truth, strict=True) if true)
    return (hits / positives + (sum(right) - hits) / (len(truth) - positives)) / 2


def score_latents(
    sae: TopKSAE,
    harvest: Harvest,
    *,
    place: str,
    explainer: Explainer = token_lookup,
    judge: Judge = lookup_judge,
    latents: Sequence[int] | None = None,
    n_latents: int = 100,
    tokens: int = 131_072,
    window: int = 31,
    quantile: float = 0.5,
    shown: int = 16,
    examples: int = 64,
    seed: int = 0,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[LatentScore]:
    """Detection and fuzzing scores of `latents`, from about `tokens` tokens of the harvest's text.

    latents: by default up to `n_latents`, evenly spaced in the order of density among those with enough windows: three
        at least where they fire, for quantile=0.5, and two where they do not.
    window: tokens of a window. quantile: share of the windows where a latent fires, those of the lowest peaks, that is
        left out. shown: windows of each kind, at most, that the explainer sees; never more than half of what there is.
    examples: at most so many that are true and so many that are false, in each score.
    seed: of the choice and order of windows, which does not depend on what other latents are scored.
    advance: told the tokens that are done.
    Memory: as for `trimtab.sae.explain`. Raises TrimtabError for latents that fire in too few windows or in nearly all,
    and as `balanced_accuracy` does for what the judge answers.
    """
    for name, value in (("n_latents", n_latents), ("shown", shown), ("examples", examples)):
        if value < 1:
            raise TrimtabError(f"{name}={value} must be at least 1")
    if not 1 <= window <= harvest.config.context:
        raise TrimtabError(f"window={window} must lie between 1 and the harvest's context={harvest.config.context}")
    if not 0 <= quantile < 1:
        raise TrimtabError(f"quantile={quantile} must be at least 0 and below 1")
    for latent in latents or ():
        if not 0 <= latent < sae.config.n_latents:
            raise TrimtabError(f"latents hold {latent}; accepted: 0 … {sae.config.n_latents - 1}")
    firings = collect_firings(sae, harvest, place=place, tokens=tokens, advance=advance)
    windows = _Windows(firings, window)
    fires_in = windows.counts(sae.config.n_latents)
    enough = (np.ceil((1 - quantile) * fires_in) >= 2) & (len(windows.starts) - fires_in >= 2)
    if latents is None:
        among = torch.from_numpy(np.flatnonzero(enough))
        latents = evenly_spaced(firings.counts(sae.config.n_latents), among, n_latents)
    for latent in latents:
        if not enough[latent]:
            raise TrimtabError(
                f"latent {latent} fires in {fires_in[latent]} of {len(windows.starts)} windows: too few of one kind "
                "to explain it by some and judge it on others; more tokens may help"
            )
    scores = []
    for latent in latents:
        rng = np.random.default_rng([seed, latent])
        firing, silent = windows.of(latent, quantile, rng)
        seen = [min(shown, len(kind) // 2) for kind in (firing, silent)]
        explanation = explainer(
            latent, windows.contexts(latent, firing[: seen[0]]), windows.contexts(latent, silent[: seen[1]])
        )
        firing, silent = firing[seen[0] :], silent[seen[1] :]
        count = min(examples, len(firing), len(silent))
        detection = windows.detection(firing[:count], silent[:count])
        fuzzing = windows.fuzzing(latent, firing, silent, examples, rng)
        found = [_ask(judge, explanation, questions, rng) for questions in (detection, fuzzing)]
        scores.append(LatentScore(latent=latent, detection=found[0], fuzzing=found[1], windows=count))
    return scores


_Question = tuple[Example, bool]


def _ask(judge: Judge, explanation: Any, questions: list[_Question], rng: np.random.Generator) -> float:
    shuffled = [questions[i] for i in rng.permutation(len(questions))]
    answers = judge(explanation, [example for example, _ in shuffled])
    return balanced_accuracy([truth for _, truth in shuffled], answers)


class _Windows:
    """The windows of `width` tokens that a text is cut into, those without a token that counts left out."""

    def __init__(self, firings: Firings, width: int) -> None:
        sequences, context = firings.input_ids.shape
        self._firings, self._width, self._context, self._in_sequence = firings, width, context, context // width
        starts = np.arange(sequences)[:, None] * context + np.arange(self._in_sequence) * width
        counts = firings.keep[:, : self._in_sequence * width].reshape(-1, width).any(1)
        self.starts = starts.ravel()[counts]
        self._numbers = np.where(counts, np.cumsum(counts) - 1, -1)

    def _of_positions(self, positions: np.ndarray) -> np.ndarray:
        """The number of the window that each position lies in, -1 behind the last of a sequence."""
        sequence, offset = np.divmod(positions, self._context)
        within = offset // self._width
        inside = within < self._in_sequence
        return np.where(inside, self._numbers[sequence * self._in_sequence + within * inside], -1)

    def counts(self, n_latents: int) -> np.ndarray:
        """In how many windows each latent fires."""
        numbers = self._of_positions(self._firings.positions)
        latents = self._firings.latents[numbers >= 0].astype(np.int64)
        pairs = np.unique(latents * len(self.starts) + numbers[numbers >= 0])
        return np.bincount(pairs // max(len(self.starts), 1), minlength=n_latents)

    def of(self, latent: int, quantile: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """The windows where it fires, those of the lowest peaks left out, and where it does not; in random order."""
        found = self._firings.of(latent)
        numbers = self._of_positions(found.positions)
        peaks = np.zeros(len(self.starts), dtype=found.values.dtype)
        np.maximum.at(peaks, numbers[numbers >= 0], found.values[numbers >= 0])
        silent, firing = np.flatnonzero(peaks == 0), np.flatnonzero(peaks)
        highest = firing[np.argsort(-peaks[firing], kind="stable")][: math.ceil((1 - quantile) * len(firing))]
        return rng.permutation(highest).tolist(), rng.permutation(silent).tolist()

    def contexts(self, latent: int, windows: list[int]) -> list[Context]:
        """The windows' tokens and activations."""
        found = self._firings.of(latent)
        starts = self.starts[windows].tolist()
        return [self._firings.window(found, start, start + self._width) for start in starts]

    def _tokens(self, window: int) -> list[int]:
        return self._firings.input_ids.ravel()[self.starts[window] :][: self._width].tolist()

    def _kept(self, window: int) -> np.ndarray:
        return self._firings.keep.ravel()[self.starts[window] :][: self._width]

    def detection(self, firing: list[int], silent: list[int]) -> list[_Question]:
        """Whole windows, and whether the latent fires there."""
        kinds = ((firing, True), (silent, False))
        return [(Example(self._tokens(w), None), truth) for windows, truth in kinds for w in windows]

    def fuzzing(
        self, latent: int, firing: list[int], silent: list[int], examples: int, rng: np.random.Generator
    ) -> list[_Question]:
        """Windows with highlights, and whether those are the tokens on which the latent fires."""
        right = min(examples, (2 * len(firing) + 1) // 3, 2 * len(silent))
        wrong = right // 2
        asked = [*firing[: right + wrong], *silent[: right - wrong]]
        fires = [np.array(context.activations) > 0 for context in self.contexts(latent, asked)]
        questions = []
        for i, window in enumerate(asked):
            highlighted = fires[i]
            if i >= right:
                size = fires[i].sum() or fires[i - right - wrong].sum()  # a silent window's: that of a right one
                others = rng.permutation(np.flatnonzero(self._kept(window) & ~fires[i]))
                highlighted = np.isin(np.arange(self._width), others[:size])
            if highlighted.any():  # a window that fires throughout has no other tokens
                questions.append((Example(self._tokens(window), highlighted.tolist()), i < right))
        return questions

"""What the report shows of one dictionary, and how it travels inside the page.

2,000 latents with 8 contexts of 32 tokens take about 3 MB:

- token strings become a table of those that occur, tokens are indices into it (16 or 32 bit, base64);
- activations are bytes: 0 where a latent is silent, else `max(1, round(255 * activation / max_activation))`;
  a context's peak travels beside them as a number of four digits;
- densities become the bins of a histogram of `log10(density)`, dead latents counted apart;
- curves are thinned to 400 points.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from trimtab.core.errors import TrimtabError

__all__ = ["MAX_LATENTS", "DictionaryPage", "packed"]

MAX_LATENTS = 2_000

_CURVE_POINTS = 400


@dataclass(frozen=True)
class DictionaryPage:
    """What the report shows of one dictionary.

    `metrics` are named figures (see `_METRICS` for those that are explained), `curves` named lists of
    `[tokens, value]`, `densities` the firing frequency of all `n_latents` latents, `selection` the sentence
    that states which latents are browsable and why, `tokens` the string table that all token indices
    point into. Each of the at most `MAX_LATENTS` items of `latents` is a mapping::

        {"id": int, "density": float, "max_activation": float,
         "promoted": [[token, logit], ...], "suppressed": [[token, logit], ...],
         "contexts": [{"tokens": [token, ...], "activations": [float, ...]}, ...]}

    Raises `TrimtabError` for lengths that disagree, indices or densities out of range, and more latents than
    the page holds. Metrics and curves may hold NaN (shown as a dash, left out of the lines).
    """

    title: str
    model: str
    place: str
    n_latents: int
    k: int
    d_in: int
    metrics: Mapping[str, float | int]
    curves: Mapping[str, Sequence[Sequence[float | int]]]
    densities: Sequence[float | int]
    selection: str
    tokens: Sequence[str]
    latents: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        if len(self.densities) != self.n_latents:
            raise TrimtabError(f"densities holds {len(self.densities)} values; n_latents={self.n_latents}.")
        if not all(0 <= density <= 1 for density in self.densities):
            raise TrimtabError("densities holds a value outside 0..1; each is a share of tokens.")
        if len(self.latents) > MAX_LATENTS:
            raise TrimtabError(f"latents holds {len(self.latents)} items; at most {MAX_LATENTS} are accepted.")
        seen: set[int] = set()
        for latent in self.latents:
            identity = latent["id"]
            if not 0 <= identity < self.n_latents or identity in seen:
                raise TrimtabError(f"latent id={identity} is repeated or outside 0..{self.n_latents - 1}.")
            seen.add(identity)
            self._check(latent)

    def _check(self, latent: Mapping[str, Any]) -> None:
        where = f"latent {latent['id']}"
        if not 0 <= latent["density"] <= 1 or not math.isfinite(latent["max_activation"]):
            raise TrimtabError(f"{where}: density and max_activation must be finite, density in 0..1.")
        pairs = [*latent["promoted"], *latent["suppressed"]]
        if not all(math.isfinite(logit) for _, logit in pairs):
            raise TrimtabError(f"{where}: a promoted or suppressed logit is NaN or infinite.")
        indices = [index for index, _ in pairs]
        for context in latent["contexts"]:
            if len(context["tokens"]) != len(context["activations"]):
                raise TrimtabError(f"{where}: a context's tokens and activations differ in length.")
            if not all(map(math.isfinite, context["activations"])):
                raise TrimtabError(f"{where}: a context's activations hold NaN or infinity.")
            indices += context["tokens"]
        if indices and not 0 <= min(indices) <= max(indices) < len(self.tokens):
            raise TrimtabError(f"{where}: a token index is outside 0..{len(self.tokens) - 1}.")

    def to_json(self) -> str:
        """This page as JSON text; NaN and infinities in metrics and curves become null."""
        values = asdict(self)
        values["metrics"] = {name: _finite(value) for name, value in self.metrics.items()}
        values["curves"] = {name: [[x, _finite(y)] for x, y in points] for name, points in self.curves.items()}
        return json.dumps(values, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> DictionaryPage:
        """The page that `to_json` wrote (null becomes NaN). Raises `TrimtabError` for anything else."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise TrimtabError(f"a dictionary's page is not JSON: {error}") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise TrimtabError(f"a dictionary's page must be a JSON object with the keys {sorted(names)}.")
        try:
            values["metrics"] = {name: _float(value) for name, value in values["metrics"].items()}
            values["curves"] = {name: [[x, _float(y)] for x, y in points] for name, points in values["curves"].items()}
            return cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise TrimtabError(f"a dictionary's page is malformed: {error!r}") from error


def packed(page: DictionaryPage) -> dict[str, Any]:
    """The JSON values that the page's script reads (see the head of this module and `latents.js`)."""
    histogram, bin_of = _histogram(page.densities)
    contexts = [context for latent in page.latents for context in latent["contexts"]]
    pairs = [pair for latent in page.latents for pair in (*latent["promoted"], *latent["suppressed"])]
    in_contexts = [token for context in contexts for token in context["tokens"]]
    used, renumbered = np.unique(
        np.array([*in_contexts, *(token for token, _ in pairs)], np.int64), return_inverse=True
    )
    new_index = {int(old): new for new, old in enumerate(used)}
    wide = len(used) > 1 << 16
    return {
        "tokens": [page.tokens[index] for index in used],
        "wide": wide,
        "context_tokens": _base64(renumbered[: len(in_contexts)].astype("<u4" if wide else "<u2")),
        "context_activations": _base64(
            np.concatenate([np.zeros(0, np.uint8), *(_bytes(latent) for latent in page.latents)])
        ),
        "histogram": histogram,
        "curves": {name: _thinned(points) for name, points in page.curves.items()},
        "latents": [
            {
                "id": latent["id"],
                "density": _short(latent["density"]),
                "bin": bin_of(latent["density"]),
                "max": _short(latent["max_activation"]),
                "promoted": [[new_index[index], _short(logit)] for index, logit in latent["promoted"]],
                "suppressed": [[new_index[index], _short(logit)] for index, logit in latent["suppressed"]],
                "contexts": [
                    [len(context["tokens"]), _short(max(context["activations"], default=0.0))]
                    for context in latent["contexts"]
                ],
            }
            for latent in page.latents
        ],
    }


def _bytes(latent: Mapping[str, Any]) -> np.ndarray:
    """The contexts' activations as bytes; an activation above `max_activation` (the two may come from
    different samples) has the largest byte, a positive one at least 1 so that firing is never hidden."""
    values = np.array([value for context in latent["contexts"] for value in context["activations"]], float)
    scale = latent["max_activation"] if latent["max_activation"] > 0 else 1.0
    return np.where(values > 0, np.clip(np.rint(255 * values / scale), 1, 255), 0).astype(np.uint8)


def _histogram(
    densities: Sequence[float | int],
) -> tuple[dict[str, Any], Callable[[float | int], int]]:
    """Counts of `log10(density)`, four bins a decade (two if that is many), and density -> bin (-1: dead)."""
    logs = np.log10([density for density in densities if density > 0])
    low = min(-1, math.floor(logs.min())) if len(logs) else -1
    per_decade = 4 if low >= -8 else 2
    n_bins = -low * per_decade

    def bin_of(density: float | int) -> int:
        if density <= 0:
            return -1
        return min(n_bins - 1, max(0, math.floor((math.log10(density) - low) * per_decade)))

    counts = np.bincount([bin_of(density) for density in densities if density > 0], minlength=n_bins)
    return {
        "low": low,
        "per_decade": per_decade,
        "counts": counts.tolist(),
        "dead": sum(density <= 0 for density in densities),
    }, bin_of


def _thinned(points: Sequence[Sequence[float | int]]) -> list[list[float | int | None]]:
    n_kept = min(len(points), _CURVE_POINTS)
    kept = [points[round(i)] for i in np.linspace(0, len(points) - 1, n_kept)]
    return [[x, None if _finite(y) is None else _short(y)] for x, y in kept]


def _finite(value: float | int | None) -> float | int | None:
    return value if value is not None and math.isfinite(value) else None


def _float(value: float | int | None) -> float:
    return math.nan if value is None else float(value)


def _short(value: float | int) -> float:
    return float(f"{value:.4g}")


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")

"""How good a dictionary is, on held-out text and in the model that it came from.

With x the activation to be written, x_hat its reconstruction, over all tokens t and features i of the evaluation:

    explained_variance                         1 - sum_t |x_t - x_hat_t|^2 / sum_t |x_t - mean x|^2
    explained_variance_without_top_dimension   the same, both sums less the feature of largest variance
    explained_variance_legacy                  mean over t of 1 - |x_t - x_hat_t|^2 / |x_t - mean x|^2, means per pass
    l0                                         latents above 0 of a token, mean
    dead_fraction                              latents that never fire here
    ce_recovered                    (H_ablated - H_spliced) / (H_ablated - H_clean)

H is the model's loss (nats per token) as it is, with x_hat in the place of x, and with 0 there; special tokens and
attention sinks are left as they are in all three. One feature with massive activations can make up most of the
variance, and reconstructing it alone then looks like success: the second figure shows what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.core import activations as act
from trimtab.core.errors import TrimtabError, unknown
from trimtab.sae import kernels
from trimtab.sae.boosted import BoostedSAE
from trimtab.sae.harvest import Forward, Harvest
from trimtab.sae.modeling import TopKSAE

__all__ = ["Evaluation", "ReconstructionMeter", "area_under_curve", "ev_curve", "evaluate", "reconstruction", "splice"]

ROWS = 4096
"""Activations that `reconstruction` and `ev_curve` look at once."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` measured; the cross-entropies are None for a model without a language-modelling head.

    densities: [n_latents] float32, the fraction of tokens on which each latent fires.
    """

    tokens: int
    explained_variance: float
    explained_variance_without_top_dimension: float
    explained_variance_legacy: float
    l0: float
    dead_fraction: float
    ce_tokens: int
    ce_clean: float | None
    ce_spliced: float | None
    ce_ablated: float | None
    densities: Float[Tensor, " n_latents"]

    @property
    def ce_recovered(self) -> float | None:
        """1: as good as the untouched model; 0: as bad as ablation."""
        if self.ce_clean is None or self.ce_spliced is None or self.ce_ablated in (None, self.ce_clean):
            return None
        return (self.ce_ablated - self.ce_spliced) / (self.ce_ablated - self.ce_clean)

    def summary(self) -> dict[str, float | int]:
        """Every number that was measured, by name."""
        names = [name for name in self.__dataclass_fields__ if name != "densities"]
        values = {name: getattr(self, name) for name in [*names, "ce_recovered"]}
        return {name: value for name, value in values.items() if value is not None}


class ReconstructionMeter:
    """Explained variance, L0 and densities, summed in float64 over any number of batches."""

    def __init__(self, width: int, n_latents: int) -> None:
        self.tokens = 0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._squares = torch.zeros(width, dtype=torch.float64)
        self._errors = torch.zeros(width, dtype=torch.float64)
        self._legacy, self._legacy_tokens = 0.0, 0
        self._fired = torch.zeros(n_latents, dtype=torch.int64)

    def update(self, x: Float[Tensor, "tokens d"], reconstruction: Float[Tensor, "tokens d"], active: Tensor) -> None:
        """Count a batch; `active` holds the index of every latent above 0, once for each token on which it fires."""
        if not len(x):
            return
        x, error = x.cpu().double(), (x - reconstruction).cpu().double()
        self.tokens += len(x)
        self._sum += x.sum(0)
        self._squares += x.square().sum(0)
        self._errors += error.square().sum(0)
        distance = (x - x.mean(0)).square().sum(-1)
        apart = distance > 0  # the only token of a pass has no distance from the mean
        self._legacy += (1 - error.square().sum(-1)[apart] / distance[apart]).sum().item()
        self._legacy_tokens += int(apart.sum())
        self._fired += torch.bincount(active.cpu(), minlength=len(self._fired))

    def results(self) -> dict[str, Any]:
        """The figures, by their names in `Evaluation`."""
        if not self.tokens:
            raise TrimtabError("no token was evaluated: the text holds only special tokens and attention sinks")
        variance = self._squares - self._sum.square() / self.tokens
        if not variance.sum() > 1e-12 * self._squares.sum():
            raise TrimtabError("the activations do not vary from token to token: there is no variance to explain")
        rest = torch.arange(len(variance)) != variance.argmax()
        return {
            "tokens": self.tokens,
            "explained_variance": 1 - (self._errors.sum() / variance.sum()).item(),
            "explained_variance_without_top_dimension": 1 - (self._errors[rest].sum() / variance[rest].sum()).item(),
            "explained_variance_legacy": self._legacy / max(self._legacy_tokens, 1),
            "l0": self._fired.sum().item() / self.tokens,
            "dead_fraction": (self._fired == 0).double().mean().item(),
            "densities": (self._fired / self.tokens).float(),
        }


@torch.no_grad()
def reconstruction(sae: TopKSAE | BoostedSAE, rows: Float[Tensor, "rows d"], k: int | None = None) -> dict[str, Any]:
    """The figures of `ReconstructionMeter` for an autoencoder on activations at hand, from k latents a token."""
    meter = ReconstructionMeter(sae.config.output_width, sae.config.n_latents)
    for part in rows.split(ROWS):
        latents = sae.encode_sparse(part, k)
        meter.update(part, sae.decode_sparse(latents), latents.indices[latents.values > 0])
    return meter.results()


@torch.no_grad()
def ev_curve(sae: TopKSAE, rows: Float[Tensor, "rows d"], budgets: Sequence[int] | None = None) -> dict[int, float]:
    """Explained variance of an autoencoder from the j largest latents of each token, for every j of `budgets`.

    budgets: by default 1, 2, 4 … and k itself. All of them are read off one pass: what j latents reconstruct is what
    the budget before it does and a few rows more. Raises TrimtabError for budgets outside 1 … k.
    """
    k = sae.config.k
    wanted = sorted({*(2**i for i in range(k.bit_length()) if 2**i <= k), k} if budgets is None else set(budgets))
    if not wanted or not 1 <= wanted[0] <= wanted[-1] <= k:
        raise TrimtabError(f"budgets={budgets!r}; accepted: whole numbers of 1 to k={k}")
    meters = {j: ReconstructionMeter(sae.config.output_width, sae.config.n_latents) for j in wanted}
    for part in rows.split(ROWS):
        latents = sae.encode_sparse(part)
        values, order = latents.values.sort(dim=-1, descending=True)
        indices = latents.indices.gather(-1, order)
        found, done = sae.b_dec.expand(len(part), -1), 0
        for j, meter in meters.items():
            if done < values.shape[1]:
                found = found + kernels.mix_rows(values[:, done:j], indices[:, done:j], sae.decoder)
            done = j
            meter.update(part, found, indices[:, :j][values[:, :j] > 0])
    return {j: meter.results()["explained_variance"] for j, meter in meters.items()}


def area_under_curve(curve: Mapping[int, float]) -> float:
    """Mean height of explained variance over log2 of the budget, by trapezoids; the value itself for one budget."""
    budgets = sorted(curve)
    if len(budgets) == 1:
        return curve[budgets[0]]
    logs, heights = torch.tensor(budgets).double().log2(), torch.tensor([curve[j] for j in budgets]).double()
    return (torch.trapezoid(heights, logs) / (logs[-1] - logs[0])).item()


@torch.no_grad()
def evaluate(
    sae: TopKSAE | BoostedSAE,
    harvest: Harvest,
    *,
    place: str,
    target: str | None = None,
    k: int | None = None,
    tokens: int = 32_768,
    ce_tokens: int = 8_192,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Evaluation:
    """Measure `sae`, which reads `place` and writes `target` (None: `place`), on the text of `harvest`.

    k: from so many latents of a token, as `encode_sparse` takes it; None for as many as the dictionary has.
    tokens, ce_tokens: about how many tokens of text the two parts use; a text that is shorter is used whole.
    The text should be one that the dictionary was not trained on. Nothing can be spliced into a place that the model
    computes before `place`: then the cross-entropies are None. advance: told the tokens that are done.
    Raises TrimtabError for places that `harvest` does not read, and for a text without tokens to evaluate.
    """
    output = target or place
    for name in (place, output):
        if name not in harvest.places:
            raise unknown("place", name, harvest.places)
    if tokens < 1:
        raise TrimtabError(f"tokens={tokens} must be at least 1")
    spliceable = language_loss(harvest.model) is not None and not _before(output, place, harvest)
    sequences = -(-tokens // harvest.config.context)
    meter = ReconstructionMeter(sae.config.output_width, sae.config.n_latents)
    losses = torch.zeros(3, dtype=torch.float64)
    predicted = 0
    for forward in harvest.forwards(sequences=sequences):
        latents = sae.encode_sparse(forward.rows(place).to(sae.device), k)
        states = forward.rows(output).to(sae.device)
        meter.update(states, sae.decode_sparse(latents), latents.indices[latents.values > 0])
        for i in range(len(forward.input_ids)):
            if predicted < ce_tokens and spliceable:
                found, count = _losses(sae, harvest, forward, i, place, output, k)
                losses += found
                predicted += count
        advance(forward.input_ids.numel())
    clean, spliced, ablated = (losses / predicted).tolist() if predicted else (None, None, None)
    return Evaluation(
        **meter.results(),
        ce_tokens=predicted,
        ce_clean=clean,
        ce_spliced=spliced,
        ce_ablated=ablated,
    )


def _before(first: str, second: str, harvest: Harvest) -> bool:
    order = [str(place) for place in act.places(harvest.model, harvest.layers)]
    return order.index(first) < order.index(second)


def splice(
    model: nn.Module,
    sae: TopKSAE | BoostedSAE,
    *,
    place: str,
    target: str | None = None,
    k: int | None = None,
    keep: Tensor | None = None,
    layers: nn.ModuleList | str | None = None,
) -> AbstractContextManager[None]:
    """Within it, `model` runs on the reconstruction instead of the activation, where `keep` [batch, tokens] is True.

    k: latents of a token, as for `evaluate`.

    Raises TrimtabError, from within the model's forward pass, if `target` is computed before `place`.
    """
    read: list[Tensor] = []

    def remember(states: Tensor) -> Tensor:
        read.append(states)
        return states

    def replace(states: Tensor) -> Tensor:
        if target is not None and not read:
            raise TrimtabError(f"target={target!r} is computed before place={place!r}; accepted: places after it")
        source = read.pop() if target is not None else states
        found = sae.decode_sparse(sae.encode_sparse(source.to(sae.device).float(), k)).to(states)
        return found if keep is None else torch.where(keep[..., None].to(states.device), found, states)

    edits: dict[str | act.Place, Callable[[Tensor], Tensor]]
    edits = {place: replace} if target is None else {place: remember, target: replace}
    return act.edit(model, edits, layers=layers)


def _losses(
    sae: TopKSAE | BoostedSAE, harvest: Harvest, forward: Forward, i: int, place: str, output: str, k: int | None
) -> tuple[Tensor, int]:
    """Summed losses of sequence `i`, clean, spliced and ablated, and the number of predicted tokens."""
    model, loss = harvest.model, language_loss(harvest.model)
    assert loss is not None
    ids, keep = forward.input_ids[i : i + 1], forward.keep[i : i + 1]
    target = None if output == place else output

    def ablate(states: Tensor) -> Tensor:
        return torch.where(keep[..., None].to(states.device), torch.zeros_like(states), states)

    ways: Iterable[AbstractContextManager[None]] = (
        nullcontext(),
        splice(model, sae, place=place, target=target, k=k, keep=keep, layers=harvest.layers),
        act.edit(model, {output: ablate}, layers=harvest.layers),
    )
    sums, count = [], 0
    for way in ways:
        with way:
            total, count = loss(model, harvest.tokenizer, ids)
        sums.append(total)
    return torch.tensor(sums, dtype=torch.float64), count


LanguageLoss = Callable[[nn.Module, Any, Tensor], tuple[float, int]]


def language_loss(model: nn.Module) -> LanguageLoss | None:
    """The model's own objective, as (summed nats, predicted tokens) of a sequence; None without a language head."""
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    base = unwrap()
    name = type(base).__name__
    if name.endswith("ForMaskedLM"):
        return _masked_loss
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return _causal_loss
    return None


def _causal_loss(model: nn.Module, tokenizer: Any, ids: Tensor) -> tuple[float, int]:
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, ids[0, 1:], reduction="sum").item(), ids.shape[1] - 1


def _masked_loss(model: nn.Module, tokenizer: Any, ids: Tensor) -> tuple[float, int]:
    """Every seventh token is hidden and predicted, 15 % as in BERT's training but without chance."""
    special = torch.tensor(sorted(tokenizer.all_special_ids), device=ids.device)
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[:, 3::7] = True
    hidden &= ~torch.isin(ids, special)
    logits = model(input_ids=ids.masked_fill(hidden, tokenizer.mask_token_id)).logits[hidden].float()
    return F.cross_entropy(logits, ids[hidden], reduction="sum").item(), int(hidden.sum())

"""One dictionary in training: what changes from step to step, and the step itself.

Everything is in scaled units, in which activations have a mean square of 1 per feature about their mean; `finished`
folds the scales into the weights. Where the decoder's bias is not subtracted from the input, a constant mean is, and
is folded into the encoder's bias: a large mean would else carry every step of the encoder into all pre-activations,
and most latents would die.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trimtab.core.activations import tl_hook_name
from trimtab.core.errors import TrimtabError
from trimtab.sae.config import DictionaryConfig, TrainingConfig
from trimtab.sae.encodings import Latents, batch_top
from trimtab.sae.extended import extend_weights, restore
from trimtab.sae.functional import DENSE, Weights, loss_and_gradients
from trimtab.sae.jumprelu import BatchThreshold, JumpReLUSAE, JumpReLUSAEConfig
from trimtab.sae.kron import KronSAE, KronSAEConfig
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig
from trimtab.sae.thresholds import Thresholds

__all__ = ["Learner", "open_base"]

BASE_ROWS = 4096
"""Activations that a frozen base reconstructs at once."""

INITIAL_SHARE = 0.1
"""Of the target's norm in the first reconstructions. Gao et al. have 1; with less the encoder turns sooner, and short
runs explain more. Thresholds that train have 1: at a tenth they would have to grow with the encoder, and a short run is
over before they have."""


class Learner:
    """One dictionary in training: weights in scaled units, their gradients and optimiser, and who fires."""

    def __init__(
        self,
        config: DictionaryConfig,
        training: TrainingConfig,
        widths: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.config, self.training = config, training
        self.input_scale = self.output_scale = 1.0
        self.input_mean = torch.zeros(widths[0], device=device)
        self.sae = _fresh(config, training, widths).to(device)
        self.objective = config.training_objective
        self.threshold = BatchThreshold()
        self.thresholds = None if config.selection != "jumprelu" else Thresholds(config.n_latents, device=device)
        if self.thresholds is not None and training.precision != "float32":
            raise TrimtabError(f"precision={training.precision!r}; accepted for jumprelu: 'float32'")
        self.base = None if config.base is None else open_base(config).to(device)
        self.old = None if config.extend is None else open_base(config).to(device)
        self.fixed = 0 if self.old is None else self.old.config.n_latents  # so many latents, the first, stay
        self.k_aux = training.k_aux or 2 ** round(math.log2(max(widths[1] / 2, 1)))
        self.weights = self.sae.weights
        self.gradients = Weights(*(torch.zeros_like(weight) for weight in self.weights))
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.0, weight_decay=0.0, fused=True)
        self.silent_tokens = torch.zeros(config.n_latents, dtype=torch.int64, device=device)
        self.fired = torch.zeros_like(self.silent_tokens)
        self.losses: dict[str, float] = {}

    @classmethod
    def begin(
        cls, config: DictionaryConfig, training: TrainingConfig, rows: Mapping[str, Tensor], device: torch.device
    ) -> Learner:
        """A fresh dictionary whose scales and biases fit `rows`, and whose first reconstructions are small."""
        self = cls(config, training, (rows[config.place].shape[1], rows[config.output].shape[1]), device)
        source, target = self._pair({place: rows[place].to(device) for place in config.places})
        self.input_scale, self.output_scale = _scale(source, config.place), _scale(target, config.output)
        if config.start is not None:
            self._start_from(config.start, source)
            return self
        if self.old is not None:
            self._extend(self.old, source)
            return self
        source, target = source / self.input_scale, target / self.output_scale
        sae = self.sae
        with torch.no_grad():
            if self.base is None:
                sae.decoder_bias.copy_(target.mean(0))
            if not sae.config.apply_b_dec_to_input:
                self.input_mean.copy_(source.mean(0))
            found = (sae(source[:1024] - self.input_mean) - sae.decoder_bias).norm()
            if found > 0:
                shape = sae.config
                share = INITIAL_SHARE if self.thresholds is None else 1.0
                wanted = share * (target[:1024] - sae.decoder_bias).norm()
                sae.scale_latents((wanted / found).item())
                sae.config = shape  # a KronSAE's eps is of training, whatever the first scale
        self._first_thresholds(source)
        return self

    @classmethod
    def resume(
        cls, config: DictionaryConfig, training: TrainingConfig, state: dict[str, Any], device: torch.device
    ) -> Learner:
        """The dictionary that `state()` described."""
        weights = state["weights"]
        self = cls(config, training, (weights["encoder"].shape[1], weights["decoder"].shape[1]), device)
        self.sae.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.silent_tokens.copy_(state["silent_tokens"])
        self.fired.copy_(state["fired"])
        self.input_mean.copy_(state["input_mean"])
        self.input_scale, self.output_scale = state["scales"]
        self.threshold = BatchThreshold(*state["threshold"])
        if self.thresholds is not None:
            self.thresholds.load(state["thresholds"])
        self.losses = state["losses"]
        return self

    def state(self) -> dict[str, Any]:
        """All that `resume` needs."""
        return {
            "weights": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "silent_tokens": self.silent_tokens,
            "fired": self.fired,
            "input_mean": self.input_mean,
            "scales": [self.input_scale, self.output_scale],
            "threshold": [self.threshold.rate, self.threshold.sum, self.threshold.batches],
            "losses": self.losses,
            "thresholds": None if self.thresholds is None else self.thresholds.state(),
        }

    def finished(self, metadata: dict[str, Any]) -> TopKSAE:
        """A copy in the activations' own units, that carries `metadata`; with thresholds unless it is TopK's."""
        shape = dataclasses.replace(self.sae.config, metadata=metadata)
        if self.config.selection != "topk":
            fields = {name: value for name, value in shape.to_dict().items() if name != "k"}
            sae: TopKSAE = JumpReLUSAE(JumpReLUSAEConfig(**fields, encoder_input=self.config.encoder_input))
            threshold = torch.full((shape.n_latents,), self.threshold.value)
            if self.thresholds is not None:
                threshold = self.thresholds.value
            sae.load_state_dict(self.sae.state_dict() | {"threshold": threshold})
        else:
            sae = type(self.sae)(shape)
            sae.load_state_dict(self.sae.state_dict())
        with torch.no_grad():
            sae.encoder_bias.sub_((self.sae.encoder @ self.input_mean).to(sae.device))
        sae.fold_scales(self.input_scale, self.output_scale)
        if self.old is not None:
            restore(sae, self.old)  # what scaling to and fro has rounded
        return sae

    def step(self, batch: Mapping[str, Tensor], accelerator: Accelerator, learning_rate: float, step: int) -> None:
        """One optimiser step on `batch`; raises before anything changes if loss or gradient is not finite."""
        training = self.training
        source, target = self._pair(batch)
        source, target = source / self.input_scale, target / self.output_scale
        centred = source if self.sae.config.apply_b_dec_to_input else source - self.input_mean
        dead = (self.silent_tokens >= training.dead_after_tokens).nonzero()[:, 0]
        dead = dead[dead >= self.fixed]
        output = loss_and_gradients(
            centred,
            target,
            self.weights,
            self.gradients,
            k=self.config.k,
            variance=float(target.shape[1]),
            encoding=self.sae.config.encoding,
            objective=self.objective,
            sparsifier=self.config.selection,
            thresholds=self.thresholds,
            subtract_bias=self.sae.config.apply_b_dec_to_input,
            dead=dead,
            k_aux=self.k_aux,
            alpha=training.alpha,
            aux_tokens=max(1, round(training.aux_share * len(source))),
            precision=training.precision,
        )
        self._hold()
        active = self._active(output.latents)
        losses = torch.stack([output.loss, output.aux_loss])
        if accelerator.num_processes > 1:
            more = () if self.thresholds is None else (self.thresholds.d_loss, self.thresholds.d_l0)
            for gradient in (*self.gradients, *more):
                torch.distributed.all_reduce(gradient)
                gradient.div_(accelerator.num_processes)
            active = accelerator.reduce(active, "sum")
            losses = accelerator.reduce(losses, "mean")
        self._update(learning_rate, losses, step)
        tokens = len(source) * accelerator.num_processes
        if self.thresholds is not None:
            rate = learning_rate * math.sqrt(source.shape[1])
            self.thresholds.step(rate, active.sum().item() / tokens, self.config.k)
        if self.config.selection == "batch_topk":
            smallest = output.latents.values.where(output.latents.values > 0, torch.inf).min()
            if accelerator.num_processes > 1:
                torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
            self.threshold.update(smallest.item())
        self.silent_tokens.add_(tokens).masked_fill_(active > 0, 0)
        self.fired.add_(active)
        self.losses = {
            "loss": losses[0].item(),
            "aux_loss": losses[1].item(),
            "l0": active.sum().item() / tokens,
            "dead_fraction": len(dead) / self.config.n_latents,
        }

    @torch.no_grad()
    def _start_from(self, directory: str, source: Tensor) -> None:
        """Take the weights of a finished dense dictionary, in scaled units; `source` is what this one reads."""
        found = TopKSAE.from_pretrained(directory)
        self._check_shape(found, f"start={directory!r}", "n_latents")
        if self.training.unit_norm_decoder:
            norms = found.decoder.norm(dim=-1)
            found.encoder.mul_(norms[:, None])
            found.encoder_bias.mul_(norms)
            found.decoder.div_(norms.where(norms > 0, 1.0)[:, None])
            if isinstance(found, JumpReLUSAE):
                found.threshold.mul_(norms)
        self._scale_in(found, source)
        self.sae.load_state_dict({name: w for name, w in found.state_dict().items() if name != "threshold"})
        if self.thresholds is not None and isinstance(found, JumpReLUSAE) and (found.threshold > 0).all():
            self.thresholds.log.copy_(found.threshold.log())
        else:
            self._first_thresholds(source / self.input_scale)

    @torch.no_grad()
    def _first_thresholds(self, source: Tensor) -> None:
        """Thresholds, where they train, that let k latents a token through."""
        if self.thresholds is None:
            return
        x = source[:1024] - (self.sae.decoder_bias if self.sae.config.apply_b_dec_to_input else self.input_mean)
        latents, _ = batch_top(DENSE, x, self.sae.encoder, self.sae.encoder_bias, self.config.k, self.config.n_latents)
        kept = latents.values[latents.values > 0]
        if not len(kept):
            raise TrimtabError(f"no latent of start={self.config.start!r} fires on the first activations")
        self.thresholds.log.fill_(kept.min().log())

    @torch.no_grad()
    def _extend(self, old: TopKSAE, source: Tensor) -> None:
        """Begin with the latents of `old`, in scaled units, and new ones after them."""
        self._check_shape(old, f"extend={self.config.extend!r}")
        if not self.fixed < self.config.n_latents:
            raise TrimtabError(f"n_latents={self.config.n_latents} must be more than the {self.fixed} to extend")
        found = copy.deepcopy(old)
        self._scale_in(found, source)
        centred = source / self.input_scale - self.input_mean
        extend_weights(self.weights, found, centred, init=self.config.extend_init, seed=self.config.seed)

    def _check_shape(self, found: TopKSAE, what: str, *more: str) -> None:
        if isinstance(found, KronSAE):
            raise TrimtabError(f"{what} is a KronSAE; accepted: a dense dictionary")
        for name in ("d_in", "output_width", "transcoder", "apply_b_dec_to_input", *more):
            mine, other = getattr(self.sae.config, name), getattr(found.config, name)
            if mine != other:
                raise TrimtabError(f"{what} has {name}={other}, this dictionary {mine}")

    def _scale_in(self, found: TopKSAE, source: Tensor) -> None:
        """Turn `found` into one of scaled units; `source` is what this dictionary reads."""
        found.float().to(self.sae.device)
        found.fold_scales(1 / self.input_scale, 1 / self.output_scale)
        if not self.sae.config.apply_b_dec_to_input:
            self.input_mean.copy_((source / self.input_scale).mean(0))
            found.encoder_bias.add_(found.encoder @ self.input_mean)

    def _hold(self) -> None:
        """Take the gradient away from what stays; AdamW without moments and decay leaves it bit for bit."""
        if self.base is not None or self.old is not None:
            self.gradients.decoder_bias.zero_()
        for gradient in (self.gradients.encoder, self.gradients.encoder_bias, self.gradients.decoder):
            gradient[: self.fixed].zero_()
        if not self.config.train_decoder:
            self.gradients.decoder.zero_()

    @torch.no_grad()
    def _pair(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What is read and what is to be written, in float32 and in the activations' own units."""
        source = rows[self.config.place].float()
        if self.base is not None:
            error = source - torch.cat([self.base(part) for part in source.split(BASE_ROWS)])
            return (error if self.config.encoder_input == "error" else source), error
        return source, source if self.config.target is None else rows[self.config.target].float()

    def _active(self, latents: Latents) -> Tensor:
        """On how many tokens each latent was among the k that the dictionary uses."""
        values, indices = latents
        if values.shape[1] > self.config.k and self.config.selection == "topk":  # an objective that selects more
            values, chosen = values.topk(self.config.k, dim=-1, sorted=False)
            indices = indices.gather(-1, chosen)
        return torch.bincount(indices[values > 0], minlength=self.config.n_latents)

    @torch.no_grad()
    def _update(self, learning_rate: float, losses: Tensor, step: int) -> None:
        decoder, gradient = self.sae.decoder, self.gradients.decoder
        if self.training.unit_norm_decoder:
            gradient.sub_((gradient * decoder).sum(-1, keepdim=True) * decoder)
        limit = self.training.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.weights, limit, foreach=True)
        if not (torch.isfinite(losses).all() and torch.isfinite(norm)):
            raise TrimtabError(
                f"step {step} of dictionary {'-to-'.join(self.config.places)!r}: loss {losses[0].item()}, gradient "
                f"norm {norm.item()}; training stops, and the last checkpoint is that of an earlier, good step"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if self.training.unit_norm_decoder and self.config.train_decoder:
            moving = decoder[self.fixed :]
            moving.div_(moving.norm(dim=-1, keepdim=True))


def open_base(config: DictionaryConfig) -> TopKSAE:
    """The frozen dictionary that `config` adds to or extends. Raises TrimtabError where it is of another place."""
    directory = config.base or config.extend
    assert directory is not None
    what = f"{'extend' if config.base is None else 'base'}={directory!r}"
    base = TopKSAE.from_pretrained(directory).requires_grad_(False)
    match base.config.metadata:
        case {"trimtab": {"place": str(place)}} if place != config.place:
            raise TrimtabError(f"{what} reads place {place!r}, this dictionary {config.place!r}")
        case {"hook_name": str(hook)} if hook != _hook_of(config.place, hook):
            raise TrimtabError(f"{what} reads hook {hook!r}, this dictionary place {config.place!r}")
    if isinstance(base, JumpReLUSAE) and base.config.encoder_input == "error":
        raise TrimtabError(f"{what} reads the error of another dictionary; accepted: one that reads x")
    if base.config.transcoder:
        raise TrimtabError(f"{what} is a transcoder; accepted: an autoencoder")
    return base


def _hook_of(place: str, otherwise: str) -> str:
    """The place's name in TransformerLens; `otherwise` for a place that is none of a transformer's."""
    try:
        return tl_hook_name(place)
    except TrimtabError:
        return otherwise


def _fresh(config: DictionaryConfig, training: TrainingConfig, widths: tuple[int, int]) -> TopKSAE:
    """A dictionary of `config`'s architecture with initial weights."""
    transcoder = config.target is not None
    subtract = training.apply_b_dec_to_input if training.apply_b_dec_to_input is not None else config.kron is None
    common: dict[str, Any] = {
        "d_in": widths[0],
        "d_out": widths[1],
        "k": config.k,
        "transcoder": transcoder,
        "apply_b_dec_to_input": subtract and not transcoder and config.base is None,
    }
    if config.kron is None:
        return TopKSAE(TopKSAEConfig(n_latents=config.n_latents, **common), seed=config.seed)
    m, n = config.kron
    h = config.n_latents // (m * n)
    return KronSAE(KronSAEConfig(h=h, m=m, n=n, activation=config.kron_activation, **common), seed=config.seed)


def _scale(rows: Tensor, place: str) -> float:
    """Root mean square of a feature about its mean."""
    scale = (rows - rows.mean(0)).square().mean().sqrt().item()
    if not scale > 0:
        raise TrimtabError(f"activations at place {place!r} do not vary: there is nothing to learn")
    return scale

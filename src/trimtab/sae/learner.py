"""One dictionary in training: what changes from step to step, and the step itself.

Everything is in scaled units, in which activations have a mean square of 1 per feature about their mean; `finished`
folds the scales into the weights. Where the decoder's bias is not subtracted from the input, a constant mean is, and
is folded into the encoder's bias: a large mean would else carry every step of the encoder into all pre-activations,
and most latents would die.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae import initial, kernels
from trimtab.sae.config import DictionaryConfig, TrainingConfig
from trimtab.sae.extended import restore
from trimtab.sae.functional import StepOutput, Weights, loss_and_gradients
from trimtab.sae.jumprelu import BatchThreshold, JumpReLUSAE, JumpReLUSAEConfig
from trimtab.sae.modeling import TopKSAE
from trimtab.sae.parallel import ALONE, Processes
from trimtab.sae.selection import batch_top, largest, top
from trimtab.sae.thresholds import Thresholds

__all__ = ["Learner"]

BASE_ROWS = 4096
"""Activations that a frozen base reconstructs at once."""

INITIAL_SHARE = 0.1
"""Of the target's norm in the first reconstructions. Gao et al. have 1; with less the encoder turns sooner, and short
runs explain more. Thresholds that train have 1: at a tenth they would have to grow with the encoder, and a short run is
over before they have."""


class Learner:
    """One dictionary in training: weights in scaled units, their gradients and optimiser, and who fires.

    Where `processes` hold the dictionary together, `weights` and what goes with them are of this process's latents.
    """

    def __init__(
        self,
        config: DictionaryConfig,
        training: TrainingConfig,
        widths: tuple[int, int],
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.training, self.processes, self.device = config, training, processes, device
        self.input_scale = self.output_scale = 1.0
        self.input_mean = torch.zeros(widths[0], device=device)
        self.shape = initial.shape_of(config, training, widths)
        heads = config.n_latents // math.prod(config.kron or (1,))
        if heads % processes.shards:
            what = "latents" if config.kron is None else "heads"
            raise TrimtabError(
                f"tensor_parallel={processes.shards} does not divide {heads} {what} of place {config.place!r}"
            )
        self.encoding = self.shape.encoding.part(processes.shards)
        self.objective = config.training_objective
        self.threshold = BatchThreshold()
        n_latents = config.n_latents // processes.shards
        self.thresholds = None if config.selection != "jumprelu" else Thresholds(n_latents, device=device)
        if self.thresholds is not None and training.precision != "float32":
            raise TrimtabError(f"precision={training.precision!r}; accepted for jumprelu: 'float32'")
        self.base = None if config.base is None else initial.open_base(config).to(device)
        self.old = None if config.extend is None else initial.open_base(config).to(device)
        stay = 0 if self.old is None else self.old.config.n_latents  # so many latents, the first
        self.fixed = min(max(stay - processes.shard * n_latents, 0), n_latents)
        self.k_aux = training.k_aux or 2 ** round(math.log2(max(widths[1] / 2, 1)))
        rows = self.shape.rows // processes.shards
        shapes = ((rows, widths[0]), (rows,), (n_latents, widths[1]), (widths[1],))
        self.weights = Weights(*(torch.zeros(shape, device=device) for shape in shapes))
        self.gradients = Weights(*(torch.zeros_like(weight) for weight in self.weights))
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.0, weight_decay=0.0, fused=True)
        self.silent_tokens = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.fired = torch.zeros_like(self.silent_tokens)
        self.losses: dict[str, float] = {}

    @classmethod
    def begin(
        cls,
        config: DictionaryConfig,
        training: TrainingConfig,
        rows: Mapping[str, Tensor],
        device: torch.device,
        processes: Processes = ALONE,
    ) -> Learner:
        """A fresh dictionary whose scales and biases fit `rows`, and whose first reconstructions are small."""
        self = cls(config, training, (rows[config.place].shape[1], rows[config.output].shape[1]), device, processes)
        source, target = self._pair({place: rows[place].to(device) for place in config.places})
        perfect = self.base is not None and not target.any()  # there is nothing left to learn, which is no error
        self.input_scale = 1.0 if perfect and config.encoder_input == "error" else _scale(source, config.place)
        self.output_scale = 1.0 if perfect else _scale(target, config.output)
        scales = self.input_scale, self.output_scale
        source, target = source / self.input_scale, target / self.output_scale
        if not self.shape.apply_b_dec_to_input:
            self.input_mean.copy_(source.mean(0))
        if config.start is not None:
            sae = initial.started(config, self.shape, scales, self.input_mean, training.unit_norm_decoder)
        elif self.old is not None:
            sae = initial.extended(config, self.shape, self.old, scales, self.input_mean, source)
        else:
            sae = self._fresh(source[:1024], target)
        self._take(sae)
        self._begin_thresholds(sae, source[:1024])
        return self

    @classmethod
    def resume(
        cls,
        config: DictionaryConfig,
        training: TrainingConfig,
        state: dict[str, Any],
        device: torch.device,
        processes: Processes = ALONE,
    ) -> Learner:
        """The dictionary that `state()` described, for any number of processes."""
        weights = state["weights"]
        self = cls(config, training, (weights["encoder"].shape[1], weights["decoder"].shape[1]), device, processes)
        self._take(weights)
        moments = state["optimizer"]
        blocks = dict(enumerate(self._blocks().values()))
        local = {i: {k: self._cut(v, blocks[i]) for k, v in each.items()} for i, each in moments["state"].items()}
        self.optimizer.load_state_dict(moments | {"state": local})
        self.silent_tokens.copy_(processes.split(state["silent_tokens"]))
        self.fired.copy_(processes.split(state["fired"]))
        self.input_mean.copy_(state["input_mean"])
        self.input_scale, self.output_scale = state["scales"]
        self.threshold = BatchThreshold(*state["threshold"])
        if self.thresholds is not None:
            self.thresholds.load(state["thresholds"], lambda tensor: self._cut(tensor, 1))
        self.losses = state["losses"]
        return self

    def state(self) -> dict[str, Any]:
        """All that `resume` needs, of the whole dictionary, for the first process; collective.

        One tensor after the other is put together, so that no process holds more than one of them beside its own part.
        """
        moments = self.optimizer.state_dict()
        blocks = list(self._blocks().values())
        whole = {i: {k: self._joined(v, blocks[i]) for k, v in each.items()} for i, each in moments["state"].items()}
        return {
            "weights": dict(zip(self._blocks(), map(self._joined, self.weights, blocks), strict=True)),
            "optimizer": moments | {"state": whole},
            "silent_tokens": self._joined(self.silent_tokens, 1),
            "fired": self._joined(self.fired, 1),
            "input_mean": self.input_mean,
            "scales": [self.input_scale, self.output_scale],
            "threshold": [self.threshold.rate, self.threshold.sum, self.threshold.batches],
            "losses": self.losses,
            "thresholds": None if self.thresholds is None else self.thresholds.state(lambda t: self._joined(t, 1)),
        }

    def finished(self, metadata: dict[str, Any]) -> TopKSAE:
        """A copy in the activations' own units, that carries `metadata`; with thresholds unless it is TopK's."""
        shape = dataclasses.replace(self.shape, metadata=metadata)
        weights = self._whole_weights()
        if self.config.selection == "topk":
            sae = initial.fresh(shape)
        else:
            fields = {name: value for name, value in shape.to_dict().items() if name != "k"}
            sae = JumpReLUSAE(JumpReLUSAEConfig(**fields, encoder_input=self.config.encoder_input))
            weights["threshold"] = torch.full((shape.n_latents,), self.threshold.value)
            if self.thresholds is not None:
                weights["threshold"] = self.processes.whole(self.thresholds.value)
        sae.load_state_dict(weights)
        with torch.no_grad():
            sae.encoder_bias.sub_(weights["encoder"] @ self.input_mean.cpu())
        sae.fold_scales(self.input_scale, self.output_scale)
        if self.old is not None:
            restore(sae, self.old)  # what scaling to and fro has rounded
        return sae

    def step(self, batch: Mapping[str, Tensor], learning_rate: float, step: int) -> None:
        """One optimiser step on `batch`; raises before anything changes if loss or gradient is not finite."""
        training, processes = self.training, self.processes
        source, target = self._pair(batch)
        source, target = source / self.input_scale, target / self.output_scale
        dead = (self.silent_tokens >= training.dead_after_tokens).nonzero()[:, 0]
        dead = dead[dead >= self.fixed]
        output = loss_and_gradients(
            source if self.shape.apply_b_dec_to_input else source - self.input_mean,
            target,
            self.weights,
            self.gradients,
            k=self.config.k,
            variance=float(target.shape[1]),
            encoding=self.encoding,
            objective=self.objective,
            sparsifier=self.config.selection,
            thresholds=self.thresholds,
            subtract_bias=self.shape.apply_b_dec_to_input,
            dead=dead,
            k_aux=self.k_aux,
            alpha=training.alpha,
            aux_tokens=max(1, round(training.aux_share * len(source))),
            precision=training.precision,
            processes=processes,
        )
        self._hold()
        trained = () if self.thresholds is None else (self.thresholds.d_loss, self.thresholds.d_l0)
        for gradient in (*self.gradients, *trained):
            processes.mean_of_groups(gradient)
        losses = processes.mean_of_groups(torch.stack([output.loss, output.aux_loss]))
        active = processes.sum_of_groups(self._active(output))
        self._update(learning_rate, losses, step)
        tokens = len(source) * processes.groups
        fired, n_dead = processes.sum_of_shards(torch.stack([active.sum(), active.new_tensor(len(dead))])).tolist()
        if self.thresholds is not None:
            self.thresholds.step(learning_rate * math.sqrt(source.shape[1]), fired / tokens, self.config.k)
        if self.config.selection == "batch_topk":
            values = output.latents.values
            self.threshold.update(processes.smallest(values.where(values > 0, torch.inf).min()).item())
        self.silent_tokens.add_(tokens).masked_fill_(active > 0, 0)
        self.fired.add_(active)
        self.losses = {
            "loss": losses[0].item(),
            "aux_loss": losses[1].item(),
            "l0": fired / tokens,
            "dead_fraction": n_dead / self.config.n_latents,
        }

    # -- the whole and this process's part ---------------------------------------------------------

    def _blocks(self) -> dict[str, int | None]:
        """Of each weight, the blocks of rows of which a process has an equal share; None: it has all."""
        own = self.shape.encoding.blocks
        return {"encoder": own, "encoder_bias": own, "decoder": 1, "decoder_bias": None}

    def _cut(self, tensor: Tensor, blocks: int | None) -> Tensor:
        return tensor if blocks is None or not tensor.ndim else self.processes.split(tensor, blocks)

    def _joined(self, tensor: Tensor, blocks: int | None) -> Tensor:
        split = blocks is not None and tensor.ndim
        return self.processes.whole_for_the_first(tensor, blocks or 1) if split else tensor

    def _whole_weights(self) -> dict[str, Tensor]:
        """The weights of the whole dictionary, on the CPU of every process."""
        pairs = zip(self._blocks().items(), self.weights, strict=True)
        return {
            name: (weight if blocks is None else self.processes.whole(weight, blocks)).detach().cpu()
            for (name, blocks), weight in pairs
        }

    @torch.no_grad()
    def _take(self, found: TopKSAE | Mapping[str, Tensor]) -> None:
        """The weights of the whole dictionary, or this process's part of them."""
        whole = found.state_dict() if isinstance(found, TopKSAE) else found
        for (name, blocks), weight in zip(self._blocks().items(), self.weights, strict=True):
            weight.copy_(self._cut(whole[name], blocks))

    # -- the beginning -----------------------------------------------------------------------------

    @torch.no_grad()
    def _fresh(self, source: Tensor, target: Tensor) -> TopKSAE:
        """Initial weights at which reconstructions have a small share of the target's norm, both in scaled units."""
        sae = initial.fresh(self.shape, self.config.seed)
        if self.base is None:
            sae.decoder_bias.copy_(target.mean(0))
        self._take(sae)
        encoder, bias, decoder, decoder_bias = self.weights
        x, k = self._centred(source), self.config.k
        (values, indices), _ = top(self.encoding, x, encoder, bias, k, len(decoder), processes=self.processes)
        found = self.processes.sum_of_shards(kernels.mix_rows(values, indices, decoder)).norm()
        share = INITIAL_SHARE if self.thresholds is None else 1.0
        wanted = share * (target[: len(source)] - decoder_bias).norm()
        if found > 0:
            sae.scale_latents((wanted / found).item())  # of the weights: a KronSAE's eps stays that of its shape
        return sae

    @torch.no_grad()
    def _begin_thresholds(self, sae: TopKSAE, source: Tensor) -> None:
        """Where thresholds train: those of `sae`, or what lets k latents a token through; after `_take`."""
        if self.thresholds is None:
            return
        if isinstance(sae, JumpReLUSAE) and (sae.threshold > 0).all():
            self.thresholds.log.copy_(self.processes.split(sae.threshold.log()))
            return
        encoder, bias, decoder, _ = self.weights
        x, k = self._centred(source), self.config.k
        (values, _), _ = batch_top(self.encoding, x, encoder, bias, k, len(decoder), processes=self.processes)
        smallest = self.processes.smallest(values.where(values > 0, torch.inf).min())
        if not smallest < torch.inf:
            raise TrimtabError(f"no latent of start={self.config.start!r} fires on the first activations")
        self.thresholds.log.fill_(smallest.log())

    def _centred(self, source: Tensor) -> Tensor:
        """What the encoder's product is taken of."""
        return source - (self.weights.decoder_bias if self.shape.apply_b_dec_to_input else self.input_mean)

    # -- a step ------------------------------------------------------------------------------------

    def _hold(self) -> None:
        """Take the gradient away from what stays; AdamW without moments and decay leaves it bit for bit."""
        if self.base is not None or self.old is not None:
            self.gradients.decoder_bias.zero_()
        for gradient in self.gradients[:3]:
            gradient[: self.fixed].zero_()
        if self.config.freeze_decoder:
            self.gradients.decoder.zero_()

    @torch.no_grad()
    def _pair(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What is read and what is to be written, in float32 and in the activations' own units."""
        source = rows[self.config.place].float()
        if self.base is not None:
            error = source - torch.cat([self.base(part) for part in source.split(BASE_ROWS)])
            return (error if self.config.encoder_input == "error" else source), error
        return source, source if self.config.target is None else rows[self.config.target].float()

    def _active(self, output: StepOutput) -> Tensor:
        """On how many tokens each latent was among the k that the dictionary uses."""
        latents = output.latents
        if self.config.selection == "topk" and self.objective.selected(self.config.k) > self.config.k:
            latents, _ = largest(latents, lambda d_values: (d_values, latents.indices), self.config.k, self.processes)
        return torch.bincount(latents.indices[latents.values > 0], minlength=len(self.fired))

    @torch.no_grad()
    def _update(self, learning_rate: float, losses: Tensor, step: int) -> None:
        decoder, gradient = self.weights.decoder, self.gradients.decoder
        if self.training.unit_norm_decoder:
            gradient.sub_((gradient * decoder).sum(-1, keepdim=True) * decoder)
        own = torch.nn.utils.get_total_norm(self.gradients[:3])
        norm = (self.processes.sum_of_shards(own.square()) + self.gradients.decoder_bias.square().sum()).sqrt()
        if not (torch.isfinite(losses).all() and torch.isfinite(norm)):
            raise TrimtabError(
                f"step {step} of dictionary {'-to-'.join(self.config.places)!r}: loss {losses[0].item()}, gradient "
                f"norm {norm.item()}; training stops, and the last checkpoint is that of an earlier, good step"
            )
        if self.training.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.weights, self.training.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if self.training.unit_norm_decoder and not self.config.freeze_decoder:
            moving = decoder[self.fixed :]
            moving.div_(moving.norm(dim=-1, keepdim=True))


def _scale(rows: Tensor, place: str) -> float:
    """Root mean square of a feature about its mean."""
    scale = (rows - rows.mean(0)).square().mean().sqrt().item()
    if not scale > 0:
        raise TrimtabError(f"activations at place {place!r} do not vary: there is nothing to learn")
    return scale

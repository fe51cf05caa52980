"""BatchTopK in training and JumpReLU at inference: sparsity on average rather than for each token.

Sources: BatchTopK, Bussmann et al., arXiv 2412.06410; JumpReLU, Rajamanoharan et al., arXiv 2407.14435.

Symbols: a [tokens, n_latents] the pre-activations, k the latents that a token uses on average.

    training    f = relu(a) at the int(k tokens) largest entries of relu(a) over the whole batch, else 0
    threshold   theta <- theta + rate (smallest positive f that was kept - theta), without the pull of its start:
                after t batches it is divided by 1 - (1 - rate)^t
    inference   f = a where a > theta and a > 0, else 0: independent of what else is in the batch

A dictionary with theta = 0 is an ordinary ReLU one. `trimtab.sae.selection.batch_top` selects in training; thresholds
of each latent's own are trained by `trimtab.sae.thresholds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.core.errors import TrimtabError, unknown
from trimtab.sae.encodings import Latents, blocks, joined
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

__all__ = ["BatchThreshold", "EncoderInput", "JumpReLUSAE", "JumpReLUSAEConfig"]

EncoderInput = Literal["input", "error"]


@dataclass
class BatchThreshold:
    """The running threshold of a dictionary in training; `value` is what inference uses."""

    rate: float = 0.01
    sum: float = 0.0
    batches: int = 0

    def update(self, smallest: float) -> None:
        """Take in the smallest positive latent that a batch kept; infinity, of a batch without any, changes nothing."""
        if smallest < math.inf:
            self.sum += self.rate * (smallest - self.sum)
            self.batches += 1

    @property
    def value(self) -> float:
        return self.sum / (1 - (1 - self.rate) ** self.batches) if self.batches else 0.0


@dataclass(frozen=True, kw_only=True)
class JumpReLUSAEConfig(TopKSAEConfig):
    """The shape of a JumpReLU dictionary. It has no bound on a token's latents: k is n_latents, and is not given.

    encoder_input: what it is to be given: an activation, or the "error" that another dictionary leaves of one, which
    `trimtab.sae.boosted` computes.
    """

    k: int = field(init=False)
    encoder_input: EncoderInput = "input"

    def __post_init__(self) -> None:
        if self.encoder_input not in get_args(EncoderInput):
            raise unknown("encoder_input", self.encoder_input, get_args(EncoderInput))
        if self.encoder_input == "error" and self.transcoder:
            raise TrimtabError(
                "encoder_input='error' has no meaning with transcoder=True: an error is read and written"
            )
        object.__setattr__(self, "k", self.n_latents)
        super().__post_init__()


class JumpReLUSAE(TopKSAE):
    """A dictionary whose latents fire above a `threshold` [n_latents] of their own, and above 0."""

    config: JumpReLUSAEConfig

    def __init__(self, config: JumpReLUSAEConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.threshold = nn.Parameter(torch.zeros(config.n_latents, device=self.encoder.device))

    def encode_sparse(self, x: Float[Tensor, "*tokens d_in"], k: int | None = None) -> Latents:
        """What fires, or the k largest of it, with as many slots as the fullest token needs."""
        self._check_width(x)
        if k is not None and not 1 <= k <= self.config.n_latents:
            raise TrimtabError(f"k={k!r} must lie between 1 and n_latents={self.config.n_latents}")
        flat = x.reshape(-1, self.config.d_in).to(self.dtype)
        if self.config.apply_b_dec_to_input:
            flat = flat - self.decoder_bias
        parts = []
        for block in blocks(len(flat), self.config.n_latents):
            fires = self._fire(flat[block])
            slots = max(int((fires > 0).sum(-1).max()), 1)
            indices = fires.detach().topk(min(slots, k or slots), dim=-1, sorted=False).indices
            parts.append(Latents(fires.gather(-1, indices), indices))
        if not parts:
            parts = [Latents(flat.new_zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64, device=flat.device))]
        values, indices = joined(parts)
        shape = (*x.shape[:-1], values.shape[-1])
        return Latents(values.view(shape), indices.view(shape))

    def encode(self, x: Float[Tensor, "*tokens d_in"], k: int | None = None) -> Float[Tensor, "*tokens n_latents"]:
        """All latents of each token, differentiable but for the thresholds."""
        if k is not None:
            return super().encode(x, k)
        self._check_width(x)
        x = x.to(self.dtype)
        return self._fire(x - self.decoder_bias if self.config.apply_b_dec_to_input else x)

    def _fire(self, x: Tensor) -> Tensor:
        pre = x @ self.encoder.T + self.encoder_bias
        return pre.relu() * (pre > self.threshold)

    @torch.no_grad()
    def scale_latents(self, scale: float) -> None:
        """Make every latent `scale` times as large, exactly: its threshold grows with it."""
        super().scale_latents(scale)
        self.threshold.mul_(scale)

"""Thresholds that train: JumpReLU dictionaries through straight-through estimates of the jump's gradient.

Source: Rajamanoharan et al., "Jumping Ahead", arXiv 2407.14435, sections 3 and 4.

Symbols: a [tokens, n_latents] pre-activations; theta [n_latents], each latent's own, with log theta as the parameter so
that it stays positive; H the step from 0 to 1 at 0; K the rectangle, 1 within -1/2 … 1/2; eps the bandwidth.

    f     = a H(a - theta)
    L0    = mean over tokens of the sum over latents of H(a - theta)
    L     = L_main + lambda (L0 / k - 1)^2 + alpha L_aux                    k: the mean L0 that is wanted

    where a jump has no gradient, as the paper has it, and none of H with respect to a:

    df/dtheta = -(theta / eps) K((a - theta) / eps),       dH/dtheta = -(1 / eps) K((a - theta) / eps)

With G_t = dL_main/dx_hat of token t, as in `trimtab.sae.functional`, and N_l the tokens whose a_l lies within eps / 2
of theta_l:

    dL_main/dlog theta_l = -(theta_l^2 / eps) sum over t in N_l of <D_l, G_t>
    dL0/dlog theta_l     = -(theta_l / eps) |N_l| / tokens

Ours: the penalty on L0 is the squared distance from a target where the paper's is lambda L0, so that k means what it
does elsewhere; lambda = 4, so that a tenth too many costs 0.04 of the variance. eps is half of theta where the paper's
is a constant, since our encoder's scale is not given but found in training. Thresholds begin at that of BatchTopK on
the first activations. Their learning rate is sqrt(d_in) times that of the weights: the entries of an encoder row are
about 1 / sqrt(d_in) of its norm, and so both can change by the same factor in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.sae.encodings import Latents, Pullback, blocks, joined

__all__ = ["Thresholds", "jump_top"]

BANDWIDTH = 0.5
"""eps, as a share of theta; below 2, so that what lies within is positive."""

PENALTY = 4.0
"""lambda."""


class Thresholds:
    """log theta in training: the parameter, two gradients that a step overwrites, and AdamW's moments."""

    def __init__(
        self, n_latents: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.log = nn.Parameter(torch.zeros(n_latents, device=device, dtype=dtype))
        self.d_loss = torch.zeros_like(self.log.data)
        self.d_l0 = torch.zeros_like(self.log.data)
        self.optimizer = torch.optim.AdamW([self.log], lr=0.0, weight_decay=0.0, fused=True)

    @property
    def value(self) -> Float[Tensor, " n_latents"]:
        """theta."""
        return self.log.detach().exp()

    def gradient(self, l0: float, k: int) -> Float[Tensor, " n_latents"]:
        """dL/dlog theta where the batch, over all processes, had `l0` latents a token and `k` are wanted."""
        return self.d_loss + self.d_l0 * (2 * PENALTY * (l0 / k - 1) / k)

    @torch.no_grad()
    def step(self, learning_rate: float, l0: float, k: int) -> None:
        """One step of AdamW at `learning_rate`."""
        self.log.grad = self.gradient(l0, k)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def state(self, joined: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """All that `load` needs, of all latents: `joined` puts a vector of this process's together with the others'."""
        moments = self.optimizer.state_dict()
        whole = {i: {k: joined(v) for k, v in each.items()} for i, each in moments["state"].items()}
        return {"log": joined(self.log.detach()), "optimizer": moments | {"state": whole}}

    @torch.no_grad()
    def load(self, state: dict[str, Any], cut: Callable[[Tensor], Tensor]) -> None:
        """Go on from what `state` described: `cut` takes this process's part of a vector."""
        self.log.copy_(cut(state["log"]))
        moments = state["optimizer"]
        own = {i: {k: cut(v) for k, v in each.items()} for i, each in moments["state"].items()}
        self.optimizer.load_state_dict(moments | {"state": own})


def jump_top(
    x: Float[Tensor, "tokens d"],
    encoder: Float[Tensor, "n_latents d"],
    bias: Float[Tensor, " n_latents"],
    thresholds: Thresholds,
) -> tuple[Latents, Pullback]:
    """f, with slots for the latents that fire and, at value 0, those within the bandwidth below; and the way back.

    The pullback writes dL_main/dlog theta and dL0/dlog theta of this batch into `thresholds`.
    """
    theta = thresholds.value
    lowest = theta * (1 - BANDWIDTH / 2)
    parts = []
    for block in blocks(len(x), len(encoder)):
        pre = torch.addmm(bias, x[block], encoder.T)
        pre = pre.where(pre > lowest, 0.0)
        slots = max(int((pre > 0).sum(-1).max()), 1)
        parts.append(Latents(*pre.topk(slots, dim=-1, sorted=False)))
    a, indices = joined(parts)
    own = theta[indices]
    fires, within = a > own, (a - own).abs() < own * (BANDWIDTH / 2)

    def pullback(d_values: Tensor) -> tuple[Tensor, Tensor]:
        near = indices[within]
        thresholds.d_loss.zero_().index_add_(0, near, d_values[within] * own[within]).div_(-BANDWIDTH)
        thresholds.d_l0.copy_(torch.bincount(near, minlength=len(encoder)) / (-BANDWIDTH * len(x)))
        return d_values * fires, indices

    return Latents(a * fires, indices), pullback

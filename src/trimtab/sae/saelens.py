"""Trimtab's dictionaries for SAELens: importing this module registers their classes there.

    import trimtab.sae.saelens
    from sae_lens import SAE

    sae = SAE.load_from_disk("a KronSAE that Trimtab saved")

    KronTopKSAE                   architecture "kron_topk": a KronSAE, for inference (`trimtab.sae.kron`)
    HierarchicalTopKTrainingSAE   architecture "hierarchical_topk": SAELens's own TopK, trained on HierarchicalTopK's
                                  loss (`trimtab.sae.objectives`); saved for inference it is an ordinary "topk"

Needs the package sae-lens (the extra "interop").
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import SAEConfig, SAEMetadata, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor, nn

from trimtab.core.errors import TrimtabError
from trimtab.sae.kron import Activation, KronEncoding
from trimtab.sae.objectives import hierarchical_topk_loss

__all__ = [
    "HierarchicalTopKTrainingSAE",
    "HierarchicalTopKTrainingSAEConfig",
    "KronTopKSAE",
    "KronTopKSAEConfig",
]


@dataclass
class KronTopKSAEConfig(SAEConfig):
    """A KronSAE's shape, as in its cfg.json; d_sae must be h m n."""

    metadata: Any = field(default_factory=SAEMetadata)  # at first SAELens passes the dictionary of the file
    h: int = 1
    m: int = 1
    n: int = 1
    k: int = 1
    eps: float = 1e-5
    activation: Activation = "mand"
    mask_inactive: bool = True

    @classmethod
    def architecture(cls) -> str:
        return "kron_topk"


class KronTopKSAE(SAE[KronTopKSAEConfig]):
    """A KronSAE in SAELens: W_enc [d_in, h (m + n)] and b_enc in the order of the authors' listing."""

    b_enc: nn.Parameter

    def __init__(self, cfg: KronTopKSAEConfig, use_error_term: bool = False) -> None:
        self.encoding = KronEncoding(
            h=cfg.h, m=cfg.m, n=cfg.n, eps=cfg.eps, activation=cfg.activation, mask_inactive=cfg.mask_inactive
        )
        if self.encoding.n_latents != cfg.d_sae:
            raise TrimtabError(f"d_sae={cfg.d_sae} is not h m n = {self.encoding.n_latents}")
        super().__init__(cfg, use_error_term)

    def initialize_weights(self) -> None:
        options = {"dtype": self.dtype, "device": self.device}
        self.W_enc = nn.Parameter(torch.zeros(self.cfg.d_in, self.encoding.rows, **options))
        self.b_enc = nn.Parameter(torch.zeros(self.encoding.rows, **options))
        self.W_dec = nn.Parameter(torch.zeros(self.cfg.d_sae, self.cfg.d_in, **options))
        self.b_dec = nn.Parameter(torch.zeros(self.cfg.d_in, **options))

    def encode(self, x: Tensor) -> Tensor:
        """All latents [..., d_sae], of which k are kept; `hook_sae_acts_pre` sees the pre-latents [..., h (m + n)]."""
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        u, v = pre.unflatten(-1, (self.cfg.h, -1)).split([self.cfg.m, self.cfg.n], -1)
        z = self.encoding.values(u[..., :, None], v[..., None, :]).flatten(-3).to(pre.dtype)
        top = z.topk(self.cfg.k, dim=-1, sorted=False)
        return self.hook_sae_acts_post(torch.zeros_like(z).scatter(-1, top.indices, top.values.relu()))

    def decode(self, feature_acts: Tensor) -> Tensor:
        reconstruction = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(reconstruction), self.d_head)

    def get_activation_fn(self) -> Any:
        """None of its own: `encode` does the whole."""
        return nn.Identity()

    def fold_W_dec_norm(self) -> None:
        raise NotImplementedError("a KronSAE's encoder cannot take up one scale for each latent")


@dataclass
class HierarchicalTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """SAELens's TopK training with prefixes: `budgets` and `weights` as for `hierarchical_topk_loss`."""

    budgets: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None

    @classmethod
    def architecture(cls) -> str:
        return "hierarchical_topk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


class HierarchicalTopKTrainingSAE(TopKTrainingSAE):
    """SAELens's TopKTrainingSAE with the mean squared error replaced by HierarchicalTopK's loss.

    In SAELens's units (squared errors are summed over features), AuxK and everything else as there.
    """

    cfg: HierarchicalTopKTrainingSAEConfig

    def __init__(self, cfg: HierarchicalTopKTrainingSAEConfig, use_error_term: bool = False) -> None:
        if cfg.normalize_activations not in ("none", "expected_average_only_in"):
            raise TrimtabError(
                f"normalize_activations={cfg.normalize_activations!r}: prefixes are compared in the input's own units; "
                "accepted: 'none', 'expected_average_only_in'"
            )
        super().__init__(cfg, use_error_term)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)
        target = step_input.sae_in.flatten(0, -2)
        acts = output.feature_acts.to_dense() if output.feature_acts.is_sparse else output.feature_acts
        values, indices = acts.flatten(0, -2).topk(self.cfg.k, dim=-1)
        decoder = self.W_dec
        if self.cfg.rescale_acts_by_decoder_norm:
            decoder = decoder / decoder.norm(dim=-1, keepdim=True)
        loss, _ = hierarchical_topk_loss(
            values, indices, decoder, self.b_dec, target, self.cfg.budgets, self.cfg.weights, assume_sorted=True
        )
        others = {name: value for name, value in output.losses.items() if name != "mse_loss"}
        loss = loss * target.shape[-1]
        output.loss = torch.stack([loss, *others.values()]).sum()
        output.losses = {"mse_loss": output.losses["mse_loss"].detach(), "hierarchical_loss": loss, **others}
        return output


def _register() -> None:
    """Once, however often the module is loaded."""
    if "kron_topk" not in SAE_CLASS_REGISTRY:
        register_sae_class("kron_topk", KronTopKSAE, KronTopKSAEConfig)
    if "hierarchical_topk" not in SAE_TRAINING_CLASS_REGISTRY:
        register_sae_training_class("hierarchical_topk", HierarchicalTopKTrainingSAE, HierarchicalTopKTrainingSAEConfig)


_register()

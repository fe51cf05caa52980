"""A dictionary as SAEBench's evaluations want it: `SAEBenchSAE`, for its `selected_saes`.

Read from sae-bench 0.6.0 (custom_saes/base_sae.py, sae_bench_utils/general_utils.py and the evaluations), which asks
for numpy < 2 where Trimtab needs 2; nothing of it is imported here. What it expects:

    W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in] with rows of norm 1, b_dec [d_in]
    device, dtype, to(device=…, dtype=…), encode, decode, forward; cfg, a dataclass with `to_dict`

With n_l the norm of decoder row D_l, the rows are divided by it and the latents multiplied: f_l n_l and D_l / n_l. That
is the same reconstruction, and the choice of latents is that of the dictionary, made before.

A KronSAE has no encoder row for each latent. Its W_enc is a stand-in that SAEBench compares with W_dec and never
encodes with: the direction of P_i + Q_j, at norm 1, and b_enc the sum of both biases over the same norm.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.core.errors import TrimtabError
from trimtab.sae.jumprelu import JumpReLUSAE
from trimtab.sae.kron import KronSAE
from trimtab.sae.modeling import TopKSAE

__all__ = ["SAEBenchConfig", "SAEBenchSAE"]


@dataclass
class SAEBenchConfig:
    """What SAEBench reads of a dictionary, under its names; it writes to it as well."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = "topk"
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = "topk"
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -1
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary."""
        return asdict(self)


class SAEBenchSAE(nn.Module):
    """A copy of a dictionary in SAEBench's terms.

    model_name: as TransformerLens knows the model. hook_layer, hook_name: the block, from 0, and the hook point that
    the dictionary reads, by default the block's output; `trimtab.core.activations.tl_hook_name` translates a place.
    TransformerLens's activations must be those that the dictionary was trained on: SAEBench loads models without
    processing, as it should be.
    Latents keep their numbers. A decoder row of zeros becomes a unit row whose latent is always 0.
    Raises TrimtabError for a transcoder, a negative layer, and a hook point that is split into heads.
    """

    def __init__(self, sae: TopKSAE, *, model_name: str, hook_layer: int, hook_name: str | None = None) -> None:
        super().__init__()
        if sae.config.transcoder:
            raise TrimtabError("sae is a transcoder; accepted: a dictionary that writes what it reads")
        if hook_layer < 0:
            raise TrimtabError(f"hook_layer={hook_layer} must be 0 or above")
        hook_name = hook_name or f"blocks.{hook_layer}.hook_resid_post"
        if "hook_z" in hook_name:
            raise TrimtabError(f"hook_name={hook_name!r} is split into heads; accepted: a hook point of width d_in")
        self.sae = copy.deepcopy(sae).requires_grad_(False)
        norms = sae.decoder.detach().norm(dim=-1)
        first = torch.eye(1, sae.config.d_in, dtype=sae.dtype, device=sae.device)
        self.sae.decoder.copy_(torch.where(norms[:, None] > 0, sae.decoder.detach() / norms[:, None], first))
        self.norms = nn.Buffer(norms)
        architecture = (
            "kron_topk" if isinstance(sae, KronSAE) else "jumprelu" if isinstance(sae, JumpReLUSAE) else "topk"
        )
        self.cfg = SAEBenchConfig(
            model_name=model_name,
            d_in=sae.config.d_in,
            d_sae=sae.config.n_latents,
            hook_layer=hook_layer,
            hook_name=hook_name,
            context_size=sae.config.metadata.get("context_size"),
            architecture=architecture,
            apply_b_dec_to_input=sae.config.apply_b_dec_to_input,
            activation_fn_str="relu" if architecture == "jumprelu" else "topk",
            dtype=str(sae.dtype).removeprefix("torch."),
            device=str(sae.device),
        )

    @property
    def device(self) -> torch.device:
        return self.sae.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.dtype

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """Of a KronSAE the stand-in that the module's docstring tells of."""
        rows, _, norms = self._encoder()
        return (rows * norms[:, None]).T

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        _, bias, norms = self._encoder()
        return bias * norms

    def _encoder(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, biases, and what they are scaled by."""
        if not isinstance(self.sae, KronSAE):
            return self.sae.encoder, self.sae.encoder_bias, self.norms
        i, j = self.sae.config.encoding.rows_of(torch.arange(self.cfg.d_sae, device=self.device))
        rows, bias = (part[i] + part[j] for part in (self.sae.encoder, self.sae.encoder_bias))
        return rows, bias, 1 / rows.norm(dim=-1).clamp_min(torch.finfo(rows.dtype).tiny)

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return self.sae.decoder

    @property
    def b_dec(self) -> Float[Tensor, " d_in"]:
        return self.sae.decoder_bias

    def encode(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_sae"]:
        """All latents, in the units of the unit decoder rows."""
        return self.sae.encode(x) * self.norms

    def decode(self, feature_acts: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_in"]:
        """The reconstruction."""
        return self.sae.decode(feature_acts)

    def forward(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_in"]:
        """decode(encode(x))"""
        return self.decode(self.encode(x))

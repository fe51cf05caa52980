"""`TopKSAE`: a dense TopK dictionary, as a module that saves and loads in SAELens's directory format.

The formulas are those of `trimtab.sae.functional`; the file format is that of `trimtab.sae.formats`.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.core.errors import TrimtabError
from trimtab.sae import functional as fn
from trimtab.sae.encodings import Encoding, Latents
from trimtab.sae.kernels import Precision

__all__ = ["TopKSAE", "TopKSAEConfig"]

MAX_ENTRIES = 1 << 36
"""Largest weight that a configuration may ask for, in entries; beyond it the file is wrong or hostile."""


@dataclass(frozen=True, kw_only=True)
class TopKSAEConfig:
    """The shape of a dictionary and where it belongs.

    d_in: width of the activation that is read.
    n_latents: size of the dictionary (SAELens: d_sae).
    k: how many latents a token may use.
    d_out: width of the activation that is written; differs from `d_in` only for a transcoder.
    transcoder: the target is another place's activation; then b_dec is never subtracted from the input.
    apply_b_dec_to_input: subtract the decoder's bias from the input before encoding.
    metadata: JSON values that travel with the weights: model, place, context size, training settings.
    """

    d_in: int
    n_latents: int
    k: int
    d_out: int | None = None
    transcoder: bool = False
    apply_b_dec_to_input: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("d_in", "n_latents", "k", "d_out"):
            value = getattr(self, name)
            if value is None and name == "d_out":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TrimtabError(f"{name}={value!r} must be a positive integer")
        if self.k > self.n_latents:
            raise TrimtabError(f"k={self.k} must not exceed n_latents={self.n_latents}")
        if self.n_latents * max(self.d_in, self.output_width) > MAX_ENTRIES:
            raise TrimtabError(
                f"n_latents={self.n_latents} times width {max(self.d_in, self.output_width)} is beyond {MAX_ENTRIES}"
            )
        if self.d_out not in (None, self.d_in) and not self.transcoder:
            raise TrimtabError(f"d_out={self.d_out} differs from d_in={self.d_in}: that needs transcoder=True")
        if self.transcoder and self.apply_b_dec_to_input:
            raise TrimtabError("apply_b_dec_to_input=True has no meaning with transcoder=True: b_dec is of the output")

    @property
    def output_width(self) -> int:
        """d_out, or d_in where it was not given."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def encoding(self) -> Encoding:
        """What the latents are in terms of the encoder's pre-activations."""
        return fn.DENSE

    @property
    def rows(self) -> int:
        """Rows of the encoder."""
        return self.n_latents

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary."""
        return asdict(self)


class TopKSAE(nn.Module, ModelHubMixin, library_name="saelens", tags=["sparse-autoencoder", "trimtab"]):
    """A dense TopK sparse autoencoder or transcoder.

    Weights hold latents as rows: `encoder` [n_latents, d_in], `encoder_bias` [n_latents],
    `decoder` [n_latents, d_out], `decoder_bias` [d_out]; `W_enc`, `b_enc`, `W_dec`, `b_dec` are views of them in
    SAELens's shapes. A fresh one has random unit decoder rows, the encoder tied to them, and zero biases.

    Activations are taken and returned in their own units: whatever scaling training used is folded into the weights.
    """

    def __init__(self, config: TopKSAEConfig, *, seed: int = 0) -> None:
        super().__init__()
        self._hub_mixin_config = None  # the directory holds SAELens's cfg.json; the mixin's config.json stays out
        self.config = config
        self.precision: Precision = "float32"
        self.encoder = nn.Parameter(torch.empty(config.rows, config.d_in))
        self.encoder_bias = nn.Parameter(torch.empty(config.rows))
        self.decoder = nn.Parameter(torch.empty(config.n_latents, config.output_width))
        self.decoder_bias = nn.Parameter(torch.empty(config.output_width))
        if not self.encoder.is_meta:
            self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Random unit decoder rows, the encoder equal to them (random unit rows for a transcoder), zero biases."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(self.decoder.shape, generator=generator)
        self.decoder.copy_(rows / rows.norm(dim=-1, keepdim=True))
        if self.config.transcoder:
            rows = torch.randn(self.encoder.shape, generator=generator)
            self.encoder.copy_(rows / rows.norm(dim=-1, keepdim=True))
        else:
            self.encoder.copy_(self.decoder)
        self.encoder_bias.zero_()
        self.decoder_bias.zero_()

    def encode_sparse(self, x: Float[Tensor, "*tokens d_in"], k: int | None = None) -> Latents:
        """The largest latents of each token, as values [*tokens, k] and indices [*tokens, k]; unsorted.

        k: how many; None for the configuration's. With more than those that it was trained with, it warns.
        """
        self._check_width(x)
        k = self._budget(k)
        flat = x.reshape(-1, self.config.d_in).to(self.encoder.dtype)
        if self.config.apply_b_dec_to_input:
            flat = flat - self.decoder_bias
        values, indices = fn.sparse_encode(
            flat, self.encoder, self.encoder_bias, k, encoding=self.config.encoding, precision=self.precision
        )
        shape = (*x.shape[:-1], k)
        return Latents(values.view(shape), indices.view(shape))

    def decode_sparse(self, latents: Latents) -> Float[Tensor, "*tokens d_out"]:
        """The reconstruction from sparse latents."""
        return fn.sparse_decode(latents, self.decoder, self.decoder_bias)

    def encode(self, x: Float[Tensor, "*tokens d_in"], k: int | None = None) -> Float[Tensor, "*tokens n_latents"]:
        """All latents of each token, at most k of them positive. Costs tokens x n_latents of memory."""
        latents = self.encode_sparse(x, k)
        dense = latents.values.new_zeros(*x.shape[:-1], self.config.n_latents)
        return dense.scatter_add(-1, latents.indices, latents.values)  # slots of 0 may name any latent

    def decode(self, latents: Float[Tensor, "*tokens n_latents"]) -> Float[Tensor, "*tokens d_out"]:
        """The reconstruction from dense latents."""
        return latents @ self.decoder + self.decoder_bias

    def forward(self, x: Float[Tensor, "*tokens d_in"], k: int | None = None) -> Float[Tensor, "*tokens d_out"]:
        """x_hat, in the dtype of `x`, from the k largest latents."""
        return self.decode_sparse(self.encode_sparse(x, k)).to(x.dtype)

    def _budget(self, k: int | None) -> int:
        if k is None:
            return self.config.k
        if not 1 <= k <= self.config.n_latents:
            raise TrimtabError(f"k={k!r} must lie between 1 and n_latents={self.config.n_latents}")
        if k > self.config.k:
            warnings.warn(f"k={k} is more than the k={self.config.k} of training: untrained there", stacklevel=4)
        return k

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.config.d_in:
            raise TrimtabError(f"x has {x.shape[-1]} features; this dictionary reads d_in={self.config.d_in}")

    @property
    def weights(self) -> fn.Weights:
        """The four parameters, as the functions of `trimtab.sae.functional` take them."""
        return fn.Weights(self.encoder, self.encoder_bias, self.decoder, self.decoder_bias)

    @property
    def W_enc(self) -> Float[Tensor, "d_in n_latents"]:
        return self.encoder.T

    @property
    def b_enc(self) -> Float[Tensor, " n_latents"]:
        return self.encoder_bias

    @property
    def W_dec(self) -> Float[Tensor, "n_latents d_out"]:
        return self.decoder

    @property
    def b_dec(self) -> Float[Tensor, " d_out"]:
        return self.decoder_bias

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @torch.no_grad()
    def fold_scales(self, input_scale: float, output_scale: float) -> None:
        """Turn a dictionary of x / input_scale -> t / output_scale into one of x -> t, exactly.

        TopK commutes with a positive scale c: values grow by `output_scale`, the decoder stays.
        """
        for name, scale in (("input_scale", input_scale), ("output_scale", output_scale)):
            if not scale > 0:
                raise TrimtabError(f"{name}={scale!r} must be positive")
        if self.config.apply_b_dec_to_input and input_scale != output_scale:
            raise TrimtabError(
                f"input_scale={input_scale!r} and output_scale={output_scale!r} must be equal where b_dec is "
                "subtracted from the input"
            )
        self.encoder.div_(input_scale)
        self.scale_latents(output_scale)
        self.decoder_bias.mul_(output_scale)

    @torch.no_grad()
    def scale_latents(self, scale: float) -> None:
        """Make every latent `scale` times as large, exactly."""
        self.encoder.mul_(scale)
        self.encoder_bias.mul_(scale)

    def _save_pretrained(self, save_directory: Path) -> None:
        from trimtab.sae import formats  # formats are made of this class, so they load when they are asked for

        formats.write_saelens(self, save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str = "",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> TopKSAE:
        """The dictionary in a directory or hub repository, or in its `subfolder`, on the CPU and in its own dtype.

        What is read, and what is raised: `trimtab.sae.formats.read_saelens` and `fetch`. The mixin's own method is not
        used, since it looks for a config.json first, which this format does not have.
        """
        from trimtab.sae import formats

        directory = formats.fetch(
            str(pretrained_model_name_or_path),
            subfolder=subfolder,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return formats.read_saelens(directory)

    def generate_model_card(self) -> ModelCard:
        """The card that `save_pretrained` and `push_to_hub` write as README.md, where there is none yet."""
        from trimtab.sae import formats

        return formats.model_card(self)

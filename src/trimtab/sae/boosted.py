"""SAE Boost: a domain added to a frozen dictionary by small dictionaries of its reconstruction error.

Source: "Teach Old SAEs New Domain Tricks with Boosting", arXiv 2507.12990, section 3.

Symbols: x [tokens, d] the activation; the base, frozen; a residual dictionary (E_r, b_r, D_r, theta_r) for each domain.

    x_hat = base(x),    e = x - x_hat, in float32
    z_r   = JumpReLU_theta_r(E_r x + b_r)                the residual encoder reads x, not e
    e_hat = z_r D_r                                      no decoder bias: where nothing fires nothing changes
    L     = mean |e - e_hat|^2 / V + alpha L_aux         BatchTopK in training (`trimtab.sae.jumprelu`)
    x_boosted = x_hat + sum over domains of e_hat

Old latents keep their index and meaning, new ones follow: `feature_slices` says which. A base whose latents have
thresholds, JumpReLU or ReLU, and its residuals are one ordinary dictionary, `stitch()`; where the base subtracts b_dec
from its input, the stitched residual bias is b_r + E_r b_dec, since its encoder reads x. A TopK base cannot be
stitched: its selection is among all latents.

Train a residual with `DictionaryConfig(place, n_latents=1024, k=5, base="…")`; some general text among the domain's
(`Mixture`) keeps it from firing there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.core.errors import TrimtabError, unknown
from trimtab.sae.encodings import Latents
from trimtab.sae.jumprelu import JumpReLUSAE, JumpReLUSAEConfig
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

__all__ = ["BoostedSAE", "stitch"]


class BoostedSAE(nn.Module):
    """A frozen base dictionary and residual dictionaries by the name of their domain, each of which can be off.

    Raises TrimtabError for residuals of another width, or with a decoder bias.
    """

    def __init__(self, base: TopKSAE, residuals: Mapping[str, JumpReLUSAE]) -> None:
        super().__init__()
        for name, residual in residuals.items():
            if not name or "." in name or "/" in name:
                raise TrimtabError(f"residuals has the name {name!r}; accepted: a word without dots and slashes")
            found = (residual.config.d_in, residual.config.output_width)
            if found != (base.config.d_in, base.config.output_width):
                raise TrimtabError(
                    f"residual {name!r} reads and writes {found} features; the base has "
                    f"{(base.config.d_in, base.config.output_width)}"
                )
            if residual.decoder_bias.any() or residual.config.apply_b_dec_to_input:
                raise TrimtabError(f"residual {name!r} has a decoder bias: it would change every token")
        self.base = base.requires_grad_(False)
        self.residuals = nn.ModuleDict(residuals)
        self.enabled = dict.fromkeys(residuals, True)

    @property
    def feature_slices(self) -> dict[str, slice]:
        """Where the latents of "base" and of each domain are in `encode`, domains that are off included."""
        slices, start = {}, 0
        for name, sae in (("base", self.base), *self._residuals()):
            slices[name] = slice(start, start + sae.config.n_latents)
            start += sae.config.n_latents
        return slices

    def enable(self, domain: str) -> None:
        """Add the domain's features again. Raises TrimtabError, with the near names, for an unknown one."""
        self._switch(domain, True)

    def disable(self, domain: str) -> None:
        """Leave the domain out: the output is exactly as without it."""
        self._switch(domain, False)

    @contextmanager
    def without(self, domain: str) -> Iterator[None]:
        """Within it, the domain is off."""
        before = self.enabled.get(domain, True)
        self._switch(domain, False)
        try:
            yield
        finally:
            self._switch(domain, before)

    @property
    def config(self) -> TopKSAEConfig:
        """The shape of the whole; k is that of the base and no bound on the sum."""
        total = max(part.stop for part in self.feature_slices.values())
        base = self.base.config
        return TopKSAEConfig(d_in=base.d_in, n_latents=total, k=base.k, metadata=base.metadata)

    def encode_sparse(self, x: Float[Tensor, "*tokens d"], k: int | None = None) -> Latents:
        """What fires, the base's latents (its k largest) first, by the indices of `encode`."""
        parts = [self.base.encode_sparse(x, k)]
        for name, residual in self._residuals():
            values, indices = residual.encode_sparse(x)
            parts.append(Latents(values * self.enabled[name], indices + self.feature_slices[name].start))
        return Latents(torch.cat([p.values for p in parts], -1), torch.cat([p.indices for p in parts], -1))

    def decode_sparse(self, latents: Latents) -> Float[Tensor, "*tokens d"]:
        """x_boosted from sparse latents."""
        found = torch.zeros((), device=self.base.device)
        for name, sae in (("base", self.base), *self._residuals()):
            own = self.feature_slices[name]
            inside = (latents.indices >= own.start) & (latents.indices < own.stop)
            local = (latents.indices - own.start).clamp(0, sae.config.n_latents - 1)
            found = found + sae.decode_sparse(Latents(latents.values * inside, local))
        return found

    def encode(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens n_latents"]:
        """All latents, of the base and then of each domain; those of a domain that is off are 0."""
        parts = [self.base.encode(x)]
        for name, residual in self._residuals():
            latents = residual.encode(x)
            parts.append(latents if self.enabled[name] else torch.zeros_like(latents))
        return torch.cat(parts, -1)

    def decode(self, latents: Float[Tensor, "*tokens n_latents"]) -> Float[Tensor, "*tokens d"]:
        """x_boosted from all latents."""
        slices = self.feature_slices
        found = self.base.decode(latents[..., slices["base"]])
        for name, residual in self._residuals():
            found = found + latents[..., slices[name]] @ residual.decoder
        return found

    def forward(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        """x_boosted, in the dtype of `x`; where no residual latent fires it is the base's output, bit for bit."""
        found = self.base(x)
        for name, residual in self._residuals():
            if self.enabled[name]:
                found = (found.float() + residual(x.float())).to(x.dtype)
        return found

    def stitch(self) -> JumpReLUSAE:
        """One dictionary of all latents, in the order of `feature_slices`, with what is off left out.

        Raises TrimtabError unless the base is a JumpReLU or ReLU dictionary.
        """
        return stitch(self.base, [residual for name, residual in self._residuals() if self.enabled[name]])

    def save_pretrained(self, directory: Path | str) -> None:
        """Write the base into `directory`/base and each residual into `directory`/residuals/<domain>."""
        self.base.save_pretrained(Path(directory) / "base")
        for name, residual in self._residuals():
            residual.save_pretrained(Path(directory) / "residuals" / name)

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> BoostedSAE:
        """What `save_pretrained` wrote. Raises TrimtabError for a residual that is no JumpReLU dictionary."""
        root = Path(directory)
        found = {}
        for path in sorted((root / "residuals").iterdir()) if (root / "residuals").is_dir() else ():
            residual = TopKSAE.from_pretrained(path)
            if not isinstance(residual, JumpReLUSAE):
                raise TrimtabError(f"{path} holds a {type(residual).__name__}; accepted: a JumpReLUSAE")
            found[path.name] = residual
        return cls(TopKSAE.from_pretrained(root / "base"), found)

    def _residuals(self) -> list[tuple[str, JumpReLUSAE]]:
        return [(name, residual) for name, residual in self.residuals.items() if isinstance(residual, JumpReLUSAE)]

    def _switch(self, domain: str, on: bool) -> None:
        if domain not in self.enabled:
            raise unknown("domain", domain, self.enabled)
        self.enabled[domain] = on


def stitch(base: TopKSAE, residuals: list[JumpReLUSAE]) -> JumpReLUSAE:
    """`base` and `residuals` as one dictionary (see the module's docstring)."""
    if not isinstance(base, JumpReLUSAE):
        raise TrimtabError(
            f"the base is a {type(base).__name__}, whose selection is among all latents; accepted: a JumpReLUSAE"
        )
    parts = [base, *residuals]
    total = sum(part.config.n_latents for part in parts)
    shape = {k: v for k, v in base.config.to_dict().items() if k != "k"} | {"n_latents": total}
    stitched = JumpReLUSAE(JumpReLUSAEConfig(**shape)).to(base.device, base.dtype)
    shift = base.decoder_bias if base.config.apply_b_dec_to_input else torch.zeros_like(base.decoder_bias)
    with torch.no_grad():
        stitched.encoder.copy_(torch.cat([part.encoder for part in parts]))
        stitched.decoder.copy_(torch.cat([part.decoder for part in parts]))
        biases = [base.encoder_bias, *(r.encoder_bias + r.encoder @ shift.to(r.dtype) for r in residuals)]
        stitched.encoder_bias.copy_(torch.cat(biases))
        stitched.threshold.copy_(torch.cat([part.threshold for part in parts]))
        stitched.decoder_bias.copy_(base.decoder_bias)
    return stitched

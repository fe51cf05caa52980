"""SAE Boost: a domain added to a frozen dictionary by small dictionaries of its reconstruction error.

Source: "Teach Old SAEs New Domain Tricks with Boosting", arXiv 2507.12990, section 3.

Symbols: x [tokens, d] the activation; the base, frozen; a residual dictionary (E_r, b_r, D_r, theta_r) for each domain.

    x_hat = base(x),    e = x - x_hat, in float32
    z_r   = JumpReLU_theta_r(E_r x + b_r)                the residual encoder reads x (encoder_input "error": e)
    e_hat = z_r D_r                                      no decoder bias: where nothing fires nothing changes
    L     = mean |e - e_hat|^2 / V + alpha L_aux         BatchTopK in training (`trimtab.sae.jumprelu`)
    x_boosted = x_hat + sum over domains of e_hat

Old latents keep their index and meaning, new ones follow: `feature_slices` says which. A base whose latents have
thresholds, JumpReLU or ReLU, and its residuals are one ordinary dictionary, `stitch()`; where the base subtracts b_dec
from its input, the stitched residual bias is b_r + E_r b_dec, since its encoder reads x. A TopK base cannot be
stitched: its selection is among all latents. Nor can a residual that reads e, which is small wherever the base is good,
so that there it keeps still however narrow the domain it was trained on.

Train a residual with `DictionaryConfig(place, n_latents=1024, k=5, base="…")`; some general text among the domain's
(`Mixture`) keeps it from firing there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.core.errors import TrimtabError, unknown
from trimtab.core.files import write_directory
from trimtab.sae.encodings import Latents
from trimtab.sae.jumprelu import JumpReLUSAE, JumpReLUSAEConfig
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

__all__ = ["BoostedSAE", "stitch"]

INDEX = "boosted.json"
"""Beside the parts: their domains in order, and which are on."""


class BoostedSAE(nn.Module):
    """A frozen base dictionary and residual dictionaries by the name of their domain, each of which can be off.

    Every part computes in its own dtype; outputs are summed in float32 at least. Raises TrimtabError for residuals of
    another kind than JumpReLUSAE, of another width, or with a decoder bias.
    """

    def __init__(self, base: TopKSAE, residuals: Mapping[str, JumpReLUSAE]) -> None:
        super().__init__()
        for name, residual in residuals.items():
            _check_residual(name, residual, base)
        if isinstance(base, JumpReLUSAE) and base.config.encoder_input == "error":
            raise TrimtabError("the base reads the error of another dictionary; accepted: one that reads x")
        self.base = base.requires_grad_(False)
        self.parts = nn.ModuleList(residuals.values())
        self.enabled = dict.fromkeys(residuals, True)

    @property
    def residuals(self) -> dict[str, JumpReLUSAE]:
        """The residual dictionaries by domain, in the order of their latents."""
        return {
            name: part for name, part in zip(self.enabled, self.parts, strict=True) if isinstance(part, JumpReLUSAE)
        }

    @property
    def feature_slices(self) -> dict[str, slice]:
        """Where the latents of "base" and of each domain are in `encode`, domains that are off included."""
        slices, start = {}, 0
        for name, sae in {"base": self.base, **self.residuals}.items():
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
        base = self.base.config
        total = max(part.stop for part in self.feature_slices.values())
        return TopKSAEConfig(d_in=base.d_in, n_latents=total, k=base.k, metadata=base.metadata)

    def encode_sparse(self, x: Float[Tensor, "*tokens d"], k: int | None = None) -> Latents:
        """What fires, the base's latents (its k largest) first, by the indices of `encode`."""
        parts = [self.base.encode_sparse(x, k)]
        sources = self._sources(x)
        for name, residual in self.residuals.items():
            values, indices = residual.encode_sparse(sources[name])
            parts.append(Latents(values * self.enabled[name], indices + self.feature_slices[name].start))
        return Latents(torch.cat([p.values for p in parts], -1), torch.cat([p.indices for p in parts], -1))

    def decode_sparse(self, latents: Latents) -> Float[Tensor, "*tokens d"]:
        """x_boosted from sparse latents, in float32 at least."""
        found = torch.zeros((), device=self.base.device)
        for name, sae in {"base": self.base, **self.residuals}.items():
            own = self.feature_slices[name]
            inside = (latents.indices >= own.start) & (latents.indices < own.stop)
            local = (latents.indices - own.start).clamp(0, sae.config.n_latents - 1)
            part = sae.decode_sparse(Latents((latents.values * inside).to(sae.dtype), local))
            found = found + part.to(_wide(part.dtype))
        return found

    def encode(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens n_latents"]:
        """All latents, of the base and then of each domain; those of a domain that is off are 0."""
        parts = [self.base.encode(x)]
        sources = self._sources(x)
        for name, residual in self.residuals.items():
            latents = residual.encode(sources[name])
            parts.append(latents if self.enabled[name] else torch.zeros_like(latents))
        return torch.cat(parts, -1)

    def decode(self, latents: Float[Tensor, "*tokens n_latents"]) -> Float[Tensor, "*tokens d"]:
        """x_boosted from all latents, in float32 at least."""
        slices = self.feature_slices
        found = self.base.decode(latents[..., slices["base"]].to(self.base.dtype))
        found = found.to(_wide(found.dtype))
        for name, residual in self.residuals.items():
            found = found + latents[..., slices[name]].to(residual.dtype) @ residual.decoder
        return found

    def forward(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        """x_boosted, in the dtype of `x`; where no residual latent fires it is the base's output, bit for bit."""
        wide = x.to(self._wide_dtype(x))
        found = old = self.base(wide)
        for name, residual in self.residuals.items():
            if self.enabled[name]:
                found = found + residual(wide - old if residual.config.encoder_input == "error" else wide)
        return found.to(x.dtype)

    def _sources(self, x: Tensor) -> dict[str, Tensor]:
        """What each domain's residual reads: `x`, or the error of the base."""
        readers = {name: residual.config.encoder_input for name, residual in self.residuals.items()}
        wide = x.to(self._wide_dtype(x))
        error = wide - self.base(wide) if "error" in readers.values() else wide
        return {name: error if reader == "error" else x for name, reader in readers.items()}

    def _wide_dtype(self, x: Tensor) -> torch.dtype:
        """In which base and residuals are added: an error of bfloat16 numbers would be their rounding."""
        return _wide(torch.promote_types(x.dtype, self.base.dtype))

    @property
    def device(self) -> torch.device:
        return self.base.device

    def stitch(self) -> JumpReLUSAE:
        """One dictionary of all latents, in the order of `feature_slices`, with what is off left out.

        Its metadata says, under "trimtab" and "stitched", where each domain's latents are. Raises TrimtabError unless
        the base is a JumpReLU or ReLU dictionary, and its residuals read x.
        """
        return stitch(self.base, {name: part for name, part in self.residuals.items() if self.enabled[name]})

    def save_pretrained(self, directory: Path | str) -> None:
        """Write the base into `directory`/base, each residual into `directory`/residuals/<domain>, and an index.

        All or nothing. Raises TrimtabError where `directory` holds anything else, such as a domain that is no more.
        """
        with write_directory(directory) as new:
            self.base.save_pretrained(new / "base")
            for name, residual in self.residuals.items():
                residual.save_pretrained(new / "residuals" / name)
            (new / INDEX).write_text(json.dumps({"domains": self.enabled}, indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> BoostedSAE:
        """What `save_pretrained` wrote. Raises TrimtabError for an index that is none, and for a residual as above."""
        path = Path(directory) / INDEX
        try:
            enabled = dict(json.loads(path.read_text("utf-8"))["domains"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise TrimtabError(f"{path} is not the index of a boosted dictionary: {error!r}") from error
        for name, on in enabled.items():
            if not _is_name(name) or not isinstance(on, bool):
                raise TrimtabError(f"{path} names the domain {name!r}: {on!r}; accepted: a word, and true or false")
        base = TopKSAE.from_pretrained(path.parent / "base")
        found: dict[str, TopKSAE] = {n: TopKSAE.from_pretrained(path.parent / "residuals" / n) for n in enabled}
        boosted = cls(base, found)  # type: ignore[arg-type]  # which it checks
        boosted.enabled.update(enabled)
        return boosted

    def _switch(self, domain: str, on: bool) -> None:
        if domain not in self.enabled:
            raise unknown("domain", domain, self.enabled)
        self.enabled[domain] = on


def stitch(base: TopKSAE, residuals: Mapping[str, JumpReLUSAE]) -> JumpReLUSAE:
    """`base` and `residuals` as one, as the module's docstring says. Raises TrimtabError where that is not exact."""
    if not isinstance(base, JumpReLUSAE):
        raise TrimtabError(
            f"the base is a {type(base).__name__}, whose selection is among all latents; accepted: a JumpReLUSAE"
        )
    for name, residual in residuals.items():
        if residual.config.encoder_input == "error":
            raise TrimtabError(
                f"residual {name!r} has encoder_input='error': it reads what the base leaves over, and one encoder "
                "reads x; accepted: 'input'. save_pretrained keeps base and residuals together"
            )
        if residual.dtype != base.dtype:
            raise TrimtabError(
                f"residual {name!r} is {residual.dtype}, the base {base.dtype}: one dictionary would compute in one "
                "dtype, and other latents would fire; convert one of them first, such as with base.float()"
            )
    parts = {"base": base, **residuals}
    slices, total = {}, 0
    for name, part in parts.items():
        slices[name] = [total, total + part.config.n_latents]
        total += part.config.n_latents
    ours = base.config.metadata.get("trimtab")
    metadata = base.config.metadata | {"trimtab": (ours if isinstance(ours, dict) else {}) | {"stitched": slices}}
    shape = {k: v for k, v in base.config.to_dict().items() if k != "k"} | {"n_latents": total, "metadata": metadata}
    stitched = JumpReLUSAE(JumpReLUSAEConfig(**shape)).to(base.device, base.dtype)
    with torch.no_grad():
        shift = base.decoder_bias * base.config.apply_b_dec_to_input
        biases = [part.encoder_bias.clone() for part in parts.values()]
        biases[1:] = [b + r.encoder @ shift for b, r in zip(biases[1:], residuals.values(), strict=True)]
        stitched.encoder_bias.copy_(torch.cat(biases))
        for name in ("encoder", "decoder", "threshold"):
            getattr(stitched, name).copy_(torch.cat([getattr(part, name) for part in parts.values()]))
        stitched.decoder_bias.copy_(base.decoder_bias)
    return stitched


def _check_residual(name: str, residual: TopKSAE, base: TopKSAE) -> None:
    if not _is_name(name):
        raise TrimtabError(f"residuals has the name {name!r}; accepted: a word without dots and slashes, not 'base'")
    if not isinstance(residual, JumpReLUSAE):
        raise TrimtabError(f"residual {name!r} is a {type(residual).__name__}; accepted: a JumpReLUSAE")
    found, wanted = ((sae.config.d_in, sae.config.output_width) for sae in (residual, base))
    if found != wanted:
        raise TrimtabError(f"residual {name!r} reads and writes {found} features; the base has {wanted}")
    if residual.decoder_bias.any() or residual.config.apply_b_dec_to_input:
        raise TrimtabError(f"residual {name!r} has a decoder bias: it would change every token")
    other = other_origin(residual.config.metadata, base.config.metadata)
    if other:
        raise TrimtabError(f"residual {name!r} is of {other[0]}, the base of {other[1]}")


def other_origin(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, str] | None:
    """What two dictionaries' metadata name as their place or model where these differ; None where nothing says so.

    Models are compared by the checksums that Trimtab keeps, else by their names without owner, folder and what one of
    them has behind the other ("gpt2" and "gpt2-small").
    """
    both = first, second
    places = [_ours(metadata).get("place") or canonical_hook(metadata) for metadata in both]
    hooks = [canonical_hook(metadata) for metadata in both]
    if all(places) and places[0] != places[1] and (not all(hooks) or hooks[0] != hooks[1]):
        return f"place {places[0]!r}", f"place {places[1]!r}"
    names = [str(metadata.get("model_name") or "") for metadata in both]
    sums = [_ours(_ours(metadata), "activations").get("model_sha256") for metadata in both]
    short = [name.rstrip("/").rsplit("/")[-1].lower() for name in names]
    same = sums[0] == sums[1] if all(sums) else short[0].startswith(short[1]) or short[1].startswith(short[0])
    if all(names) and not same:
        return f"model {names[0]!r}", f"model {names[1]!r}"
    return None


def canonical_hook(metadata: Mapping[str, Any]) -> str | None:
    """The hook point that SAELens's metadata names; what enters a block is what left the one before."""
    match str(metadata.get("hook_name") or "").split("."):
        case ["blocks", layer, "hook_resid_pre"] if layer.isdecimal() and int(layer):
            return f"blocks.{int(layer) - 1}.hook_resid_post"
    return metadata.get("hook_name")


def weights_digest(sae: TopKSAE) -> str:
    """A checksum of a dictionary's weights."""
    digest = hashlib.sha256()
    for weight in sae.state_dict().values():
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _ours(metadata: Mapping[str, Any], key: str = "trimtab") -> Mapping[str, Any]:
    found = metadata.get(key)
    return found if isinstance(found, dict) else {}


def _is_name(name: str) -> bool:
    return bool(name) and name != "base" and not set(name) & set("./\\")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

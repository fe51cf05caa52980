"""SAELens's directory format, version 6: what `save_pretrained` writes and reads.

    cfg.json                   architecture "topk", d_in, d_sae, k, dtype, …, and free metadata
    sae_weights.safetensors    W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]
    sparsity.safetensors       optional: log10 of each latent's firing frequency

SAELens has no TopK transcoder. One is kept in the same layout under an architecture of our own, "topk_transcoder",
with d_out in cfg.json; SAELens refuses such a file by that name, and `export_saelens` refuses to make one.

A JumpReLU dictionary is SAELens's "jumprelu", with threshold [d_sae] beside the weights. A KronSAE has the architecture
"kron_topk" (a transcoder "kron_topk_transcoder"), with h, m, n, eps, activation and mask_inactive in cfg.json, W_enc
[d_in, h (m + n)] and b_enc [h (m + n)] in the order of the authors' listing. SAELens reads it once
`trimtab.sae.saelens` is imported. A JumpReLU dictionary that reads the error of another one is "jumprelu_error", which
SAELens refuses: it would give it activations.

With rescale_acts_by_decoder_norm, SAELens ranks a_i |D_i| and decodes f_i D_i / |D_i|, with D_i the rows of W_dec:

    a_i |D_i| = x' (|D_i| E_i) + |D_i| b_E,i        so  E_i <- |D_i| E_i,  b_E,i <- |D_i| b_E,i,  D_i <- D_i / |D_i|

is the same dictionary without the option, selection included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.errors import TrimtabError, unknown
from trimtab.sae.formats._files import option, positive, read_json, read_tensors, write_pair
from trimtab.sae.jumprelu import EncoderInput, JumpReLUSAE, JumpReLUSAEConfig
from trimtab.sae.kron import ACTIVATIONS, KronSAE, KronSAEConfig, head_major
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

__all__ = ["CFG", "SPARSITY", "WEIGHTS", "export_saelens", "read_saelens", "write_saelens"]

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"

LAYOUT_VERSION = "6.54.12"
"""The SAELens whose layout this is. A file without one, or below 6.0.0, it takes for an older layout."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
}

ARCHITECTURES = (
    "topk",
    "topk_transcoder",
    "kron_topk",
    "kron_topk_transcoder",
    "jumprelu",
    "jumprelu_transcoder",
    "jumprelu_error",
    "standard",
)

KRON_FIELDS = {"h": int, "m": int, "n": int, "eps": float, "activation": str, "mask_inactive": bool}

NORMALIZATIONS = {
    "expected_average_only_in": "its scale is not in the file",
    "constant_norm_rescale": "no weights can express it",
    "layer_norm": "no weights can express it",
    "covariance_whitening": "its matrices are not in the file",
}
"""SAELens's values besides "none", and why such a dictionary cannot be read."""


def write_saelens(sae: TopKSAE, directory: Path | str, *, sparsity: Float[Tensor, " n_latents"] | None = None) -> None:
    """Write `sae` into `directory`, which is made if need be; a transcoder as the module's docstring says.

    Each file is replaced whole or not at all; `trimtab.core.checkpoint.write_directory` makes it all or nothing.

    Args:
        sparsity: log10 of each latent's firing frequency; without it, an older file of them is removed.

    Raises:
        TrimtabError: for a `sparsity` of another length, metadata beyond JSON, or a dtype SAELens does not know.
    """
    directory = Path(directory)
    config = sae.config
    dtype = str(sae.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    architecture = {KronSAEConfig: "kron_topk", JumpReLUSAEConfig: "jumprelu"}.get(type(config), "topk")
    if isinstance(config, JumpReLUSAEConfig) and config.encoder_input == "error":
        architecture = "jumprelu_error"
    fields: dict[str, Any] = {
        "architecture": f"{architecture}_transcoder" if config.transcoder else architecture,
        "d_in": config.d_in,
        "d_sae": config.n_latents,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**config.metadata, "sae_lens_version": LAYOUT_VERSION},
    }
    if config.transcoder:
        fields["d_out"] = config.output_width
    if not isinstance(config, JumpReLUSAEConfig):
        fields |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(config, KronSAEConfig):
        fields |= {name: getattr(config, name) for name in KRON_FIELDS}
    tensors = {WEIGHTS: {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}}
    if isinstance(sae, JumpReLUSAE):
        tensors[WEIGHTS]["threshold"] = sae.threshold
    if sparsity is not None:
        if len(sparsity) != config.n_latents:
            raise TrimtabError(f"sparsity has {len(sparsity)} entries; accepted: one a latent, {config.n_latents}")
        tensors[SPARSITY] = {"sparsity": sparsity}
    write_pair(directory, tensors, CFG, fields)
    if sparsity is None:
        (directory / SPARSITY).unlink(missing_ok=True)


def export_saelens(sae: TopKSAE, directory: Path | str, *, sparsity: Float[Tensor, " n_latents"] | None = None) -> None:
    """`write_saelens` for a directory that SAELens is to read: raises TrimtabError for what it has no architecture for.

    That is a transcoder, and a dictionary that reads the error of another.
    """
    if isinstance(sae, JumpReLUSAE) and sae.config.encoder_input == "error":
        raise TrimtabError(
            "a dictionary with encoder_input='error' was to be exported to SAELens, which would give it activations; "
            "accepted: encoder_input='input'"
        )
    if sae.config.transcoder:
        raise TrimtabError(
            "a transcoder was to be exported to SAELens, which has no TopK transcoder; accepted: an autoencoder. "
            "save_pretrained keeps it in Trimtab's own layout, write_sparsify in sparsify's"
        )
    write_saelens(sae, directory, sparsity=sparsity)


def read_saelens(directory: Path | str) -> TopKSAE:
    """The dictionary in `directory`, on the CPU, in the dtype that its cfg.json names.

    Read are SAELens's "topk" (with rescale_acts_by_decoder_norm folded into the weights), "jumprelu" and "standard"
    (ReLU: thresholds of 0), and the architectures of our own that the module's docstring names.
    Keys of cfg.json that neither has are ignored, as SAELens does; all of its metadata is kept.

    Raises:
        TrimtabError: naming the file, the key, the value and what is accepted.
    """
    path = Path(directory) / CFG
    fields = read_json(path)
    config = _config(path, fields)
    dtype = option(path, fields, "dtype", str, "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise unknown(f"{path}: dtype", dtype, DTYPES)
    rows, n_latents, d_in, d_out = config.rows, config.n_latents, config.d_in, config.output_width
    shapes = {"W_enc": (d_in, rows), "b_enc": (rows,), "W_dec": (n_latents, d_out), "b_dec": (d_out,)}
    if isinstance(config, JumpReLUSAEConfig) and fields["architecture"] != "standard":
        shapes["threshold"] = (n_latents,)
    tensors = {name: t.to(DTYPES[dtype]) for name, t in read_tensors(Path(directory) / WEIGHTS, shapes, CFG).items()}
    weights = {
        "encoder": tensors["W_enc"].T.contiguous(),
        "encoder_bias": tensors["b_enc"],
        "decoder": tensors["W_dec"],
        "decoder_bias": tensors["b_dec"],
    }
    if isinstance(config, JumpReLUSAEConfig):
        weights["threshold"] = tensors.get("threshold", torch.zeros_like(tensors["b_enc"]))
    if isinstance(config, KronSAEConfig):
        for name in ("encoder", "encoder_bias"):
            weights[name] = head_major(weights[name], config.encoding, inverse=True).contiguous()
    topk = fields["architecture"].startswith("topk")  # SAELens has the option for no other
    if topk and option(path, fields, "rescale_acts_by_decoder_norm", bool, False):
        _fold_decoder_norms(weights)
    return assemble(config, weights)


def assemble(config: TopKSAEConfig, weights: dict[str, Tensor]) -> TopKSAE:
    """A dictionary that takes `weights` as they are, without ever having had others."""
    with torch.device("meta"):
        if isinstance(config, KronSAEConfig):
            sae: TopKSAE = KronSAE(config)
        else:
            sae = JumpReLUSAE(config) if isinstance(config, JumpReLUSAEConfig) else TopKSAE(config)
    sae.load_state_dict(weights, assign=True)
    return sae


def _config(path: Path, fields: dict[str, Any]) -> TopKSAEConfig:
    architecture = option(path, fields, "architecture", str)
    if architecture not in ARCHITECTURES:
        raise unknown(f"{path}: architecture", architecture[:200], ARCHITECTURES)
    normalization = option(path, fields, "normalize_activations", str, "none")
    if normalization != "none":
        reason = NORMALIZATIONS.get(normalization, "it is not known")
        raise TrimtabError(f"{path}: normalize_activations={normalization[:200]!r}: {reason}; accepted: 'none'")
    reshaping = option(path, fields, "reshape_activations", str, "none")
    if reshaping != "none":
        raise TrimtabError(f"{path}: reshape_activations={reshaping[:200]!r}; accepted: 'none'")
    transcoder = architecture.endswith("_transcoder")
    kron = architecture.startswith("kron")
    metadata = dict(option(path, fields, "metadata", dict, {}))
    metadata.pop("sae_lens_version", None)  # of the file, not of the dictionary: the next writer states its own
    thresholds = architecture == "standard" or architecture.startswith("jumprelu")
    sizes = {name: positive(path, fields, name) for name in ("d_in", "d_sae", *(() if thresholds else ("k",)))}
    common: dict[str, Any] = {
        "d_in": sizes["d_in"],
        "d_out": positive(path, fields, "d_out") if transcoder else None,
        "transcoder": transcoder,
        "apply_b_dec_to_input": option(path, fields, "apply_b_dec_to_input", bool, not (transcoder or kron)),
        "metadata": metadata,
    }
    try:
        if thresholds:
            reads: EncoderInput = "error" if architecture == "jumprelu_error" else "input"
            return JumpReLUSAEConfig(n_latents=sizes["d_sae"], encoder_input=reads, **common)
        common["k"] = sizes["k"]
        if not kron:
            return TopKSAEConfig(n_latents=sizes["d_sae"], **common)
        shape: dict[str, Any] = {name: option(path, fields, name, kind) for name, kind in KRON_FIELDS.items()}
        if shape["activation"] not in ACTIVATIONS:
            raise unknown("activation", shape["activation"][:200], ACTIVATIONS)
        config = KronSAEConfig(**shape, **common)
        if config.n_latents != sizes["d_sae"]:
            raise TrimtabError(f"d_sae={sizes['d_sae']} is not h m n = {config.n_latents}")
        return config
    except TrimtabError as error:
        raise TrimtabError(f"{path}: {error} (n_latents is d_sae here)") from error


def _fold_decoder_norms(weights: dict[str, Tensor]) -> None:
    """Make `weights`, in place, those of the same dictionary without rescale_acts_by_decoder_norm.

    A zero row stays zero: its latent never counted in the selection, and adds nothing.
    """
    dtype = weights["decoder"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    norms = weights["decoder"].to(wide).norm(dim=-1)
    weights["encoder"] = (weights["encoder"].to(wide) * norms[:, None]).to(dtype)
    weights["encoder_bias"] = (weights["encoder_bias"].to(wide) * norms).to(dtype)
    weights["decoder"] = (weights["decoder"].to(wide) / norms.where(norms > 0, 1.0)[:, None]).to(dtype)

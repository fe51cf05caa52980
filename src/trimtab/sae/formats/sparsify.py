"""The files of sparsify 1.3 (package eai-sparsify), for TopK autoencoders and transcoders.

    <directory>/<hookpoint>/cfg.json           activation, num_latents, expansion_factor, k, transcode, d_in, …
    <directory>/<hookpoint>/sae.safetensors    encoder.weight [F, d], encoder.bias [F], W_dec [F, d], b_dec [d]

A hookpoint is the dotted name of a module in the transformers model, as "layers.9". sparsify subtracts b_dec from the
input of an autoencoder always, of a transcoder never. An autoencoder of ours that does not subtract it is written with
encoder.bias + encoder.weight b_dec, which is the same function:  x E^T + b_E = (x - b_D) E^T + (b_E + E b_D).

sparsify's files have no place for metadata.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import torch

from trimtab.core.errors import TrimtabError, unknown
from trimtab.sae.formats._files import inside, option, positive, read_json, read_tensors, write_pair
from trimtab.sae.formats.saelens import assemble
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

__all__ = ["read_sparsify", "write_sparsify"]

CFG = "cfg.json"
WEIGHTS = "sae.safetensors"

OTHER_FUNCTIONS = ("skip_connection", "signed", "jumprelu")
"""Options of sparsify, past and present, that make the dictionary another function than TopK."""


def write_sparsify(sae: TopKSAE, directory: Path | str, hookpoint: str) -> None:
    """Write `sae` where `SparseCoder.load_from_disk(directory / hookpoint)` finds it.

    Raises:
        TrimtabError: for a transcoder between two widths and for other than dense TopK, which sparsify does not
            have, or a `hookpoint` that leads out of `directory`.
    """
    config = sae.config
    if type(sae) is not TopKSAE:
        raise TrimtabError(f"a {type(sae).__name__} was to be written for sparsify, which has dense TopK only")
    if config.output_width != config.d_in:
        raise TrimtabError(f"d_out={config.output_width}: sparsify's transcoders have d_out = d_in = {config.d_in}")
    bias = sae.b_enc
    if not (config.transcoder or config.apply_b_dec_to_input):
        bias = (sae.b_enc.double() + sae.encoder.double() @ sae.b_dec.double()).to(sae.dtype)
    unit = bool(((sae.W_dec.float().norm(dim=-1) - 1).abs() < 1e-3).all())
    fields: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": -(-config.n_latents // config.d_in),  # not used where num_latents is given
        "normalize_decoder": unit,
        "num_latents": config.n_latents,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": config.transcoder,
        "d_in": config.d_in,
    }
    tensors = {"encoder.weight": sae.encoder, "encoder.bias": bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    write_pair(inside("hookpoint", Path(directory), hookpoint), {WEIGHTS: tensors}, CFG, fields)


def read_sparsify(directory: Path | str, hookpoint: str) -> TopKSAE:
    """The dictionary that sparsify saved in `directory / hookpoint`, on the CPU, in the dtype of its encoder.

    Files of older versions have the same layout and are read as well. cfg.json and the hookpoint are kept in the
    metadata, under "sparsify".

    Raises:
        TrimtabError: naming the file, the key, the value and what is accepted; for GroupMax, skip connections and
            other functions than TopK; for a `hookpoint` that leads out of `directory`.
    """
    place = inside("hookpoint", Path(directory), hookpoint)
    path = place / CFG
    fields = read_json(path)
    activation = option(path, fields, "activation", str, "topk")
    if activation != "topk":
        raise unknown(f"{path}: activation", activation[:200], ["topk"])
    for name in OTHER_FUNCTIONS:
        if option(path, fields, name, bool, False):
            raise TrimtabError(f"{path}: {name}=true is not a TopK dictionary; accepted: false")
    d_in = positive(path, fields, "d_in")
    n_latents = option(path, fields, "num_latents", int, 0)
    if n_latents < 0:
        raise TrimtabError(f"{path}: num_latents={reprlib.repr(n_latents)}; accepted: 0 or more")
    transcode = option(path, fields, "transcode", bool, False)
    k = positive(path, fields, "k")
    try:
        config = TopKSAEConfig(
            d_in=d_in,
            n_latents=n_latents or d_in * positive(path, fields, "expansion_factor"),
            k=k,
            transcoder=transcode,
            apply_b_dec_to_input=not transcode,
            metadata={"sparsify": {**fields, "hookpoint": hookpoint}},
        )
    except TrimtabError as error:
        raise TrimtabError(f"{path}: {error}") from error
    shapes = {
        "encoder.weight": (config.n_latents, d_in),
        "encoder.bias": (config.n_latents,),
        "W_dec": (config.n_latents, d_in),
        "b_dec": (d_in,),
    }
    tensors = read_tensors(place / WEIGHTS, shapes, CFG)
    dtype: torch.dtype = tensors["encoder.weight"].dtype
    return assemble(
        config,
        {
            "encoder": tensors["encoder.weight"],
            "encoder_bias": tensors["encoder.bias"].to(dtype),
            "decoder": tensors["W_dec"].to(dtype),
            "decoder_bias": tensors["b_dec"].to(dtype),
        },
    )

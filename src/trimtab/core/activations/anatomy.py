"""Where the activations of a transformer are: its blocks, and what each of them adds to the residual stream.

A transformer keeps a residual stream. It enters block 0 as `embed`; block l reads it and adds to it:

    resid.l = resid.(l-1) + attn.l + mlp.l        with resid.(-1) = embed        (pre-norm blocks)

A post-norm block (BERT, RoBERTa, ALBERT, HuBERT base) normalises after each addition instead; there `attn.l`
and `mlp.l` are still the tensors that are added, before the LayerNorm, and `resid.l` is the block's output.

The blocks are found by structure: the one list of modules whose members have an attention child. All that is
said here about single architectures is in the tables `_ATTENTION_OUTPUTS` and `_MLP_OUTPUTS` and in the
functions `_added_module` and `_albert_blocks`, each with its reason. The tests hold the identity for Llama,
Qwen 2 and 3, Gemma 2 and 3, GLM-4, GPT-2, GPT-NeoX, OPT, HuBERT and WavLM; `embed` and `resid` need no more than
the list of blocks, but with another architecture check the identity before you trust its `attn` and `mlp`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.core.errors import TrimtabError, unknown

__all__ = ["Layers", "Place", "Site", "hf_module_name", "n_layers", "places", "sites", "tl_hook_name"]

Layers = nn.ModuleList | nn.Sequential | str | None

_KINDS = ("embed", "resid", "attn", "mlp")
_GRAMMAR = ("embed", "resid.<layer>", "attn.<layer>", "mlp.<layer>")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")

# Paths below a block to the module whose output is added to the residual stream; the first that exists is it.
_ATTENTION_OUTPUTS = (
    "post_attention_dropout",  # GPT-NeoX drops out what its attention returns before adding it
    "attention.output.dropout",  # BERT, RoBERTa: `attention.output` adds the residual and normalises
    "attention.output_dropout",  # ALBERT: `attention` does both itself
    "post_self_attn_layernorm",  # GLM-4 normalises what is added
    *_ATTENTION,
)
_MLP_OUTPUTS = (
    "post_mlp_dropout",  # GPT-NeoX, as above
    "post_feedforward_layernorm",  # Gemma 2 and 3 normalise what is added
    "post_mlp_layernorm",  # GLM-4, likewise
    "output.dropout",  # BERT, RoBERTa: `output` adds the residual and normalises
    "ffn_output",  # ALBERT: the block has no MLP module, this is its last matrix
    "fc2",  # OPT: likewise
    "feed_forward",
    "mlp",
    "ffn",
)


@dataclass(frozen=True)
class Place:
    """A named activation: "embed", or "resid", "attn" or "mlp" of a layer (counted from 0).

    `str` and `parse` are each other's inverse: "embed", "resid.9", "attn.9", "mlp.9".
    """

    kind: str
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise unknown("kind", self.kind, _KINDS)
        if (self.kind == "embed") != (self.layer is None) or (self.layer is not None and self.layer < 0):
            accepted = "None" if self.kind == "embed" else "a number from 0 up"
            raise TrimtabError(f"layer={self.layer!r} of kind={self.kind!r} is not a layer. Accepted: {accepted}.")

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"

    @classmethod
    def parse(cls, text: str | Place) -> Place:
        """The place that `text` names; a `Place` is returned as it is. Raises `TrimtabError`."""
        if isinstance(text, Place):
            return text
        kind, _, layer = text.partition(".")
        if text == "embed":
            return cls("embed")
        if kind in _KINDS[1:] and layer.isascii() and layer.isdecimal():
            return cls(kind, int(layer))
        raise unknown("place", text, _GRAMMAR)


@dataclass(frozen=True)
class Site:
    """The place in one model: the output of `module`, or its first input.

    A module that blocks share runs more than once in a forward pass: `call` is then the index of the run, and
    `owner` the module whose forward pass starts the count. Both are None where the module runs once.
    """

    place: Place
    path: str
    module: nn.Module
    block: nn.Module
    is_input: bool
    call: int | None
    owner: nn.Module | None


@dataclass(frozen=True)
class _Blocks:
    """Paths and modules in the order in which they run; a shared block stands in it once a run."""

    path: str
    owner: nn.Module
    blocks: tuple[tuple[str, nn.Module], ...]


def n_layers(model: nn.Module, layers: Layers = None) -> int:
    """Number of blocks that the residual stream passes (ALBERT: runs of its shared blocks)."""
    return len(_blocks(model, layers).blocks)


def places(model: nn.Module, layers: Layers = None) -> list[Place]:
    """All places of `model`, in the order in which they are computed (parallel blocks: attention first)."""
    found = _blocks(model, layers)
    named = [Place("embed")]
    named += [Place(kind, layer) for layer in range(len(found.blocks)) for kind in ("attn", "mlp", "resid")]
    existing = []
    for place in named:
        with suppress(TrimtabError):
            existing.append(_site(found, place).place)
    return existing


def sites(model: nn.Module, wanted: str | Place | Iterable[str | Place], layers: Layers = None) -> list[Site]:
    """Where each of the `wanted` places is, in the order given, each once. Raises `TrimtabError`."""
    asked = [wanted] if isinstance(wanted, (str, Place)) else list(wanted)
    if not asked:
        raise TrimtabError("places=[] is empty. Accepted: at least one place, such as 'resid.0'.")
    found = _blocks(model, layers)
    result = {}
    for name in asked:
        try:
            place = Place.parse(name)
        except TrimtabError:
            raise unknown("place", str(name), places(model, layers)) from None
        if place.layer is not None and place.layer >= len(found.blocks):
            raise unknown("place", str(name), places(model, layers))
        result[place] = _site(found, place)
    return list(result.values())


def hf_module_name(model: nn.Module, place: str | Place, *, layers: Layers = None) -> str:
    """Dotted path in `model` of the module whose output is the place, such as "model.layers.9".

    `model.get_submodule(path)` is that module. Raises `TrimtabError` for "embed", which is the input of the
    first block and in general no module's output.
    """
    (site,) = sites(model, place, layers)
    if site.is_input:
        raise TrimtabError(f"place='embed' is the input of module {site.path!r}, no module's output.")
    return site.path


def tl_hook_name(place: str | Place) -> str:
    """The place's name in TransformerLens, such as "blocks.9.hook_resid_post"."""
    place = Place.parse(place)
    point = {"embed": "resid_pre", "resid": "resid_post", "attn": "attn_out", "mlp": "mlp_out"}[place.kind]
    return f"blocks.{place.layer or 0}.hook_{point}"


def _site(found: _Blocks, place: Place) -> Site:
    """Where `place` is. Raises `TrimtabError` if its block has no such module."""
    layer = place.layer or 0
    path, block = found.blocks[layer]
    runs = [index for index, (_, module) in enumerate(found.blocks) if module is block]
    call, owner = (runs.index(layer), found.owner) if len(runs) > 1 else (None, None)
    if place.kind in ("embed", "resid"):
        return Site(place, path, block, block, place.kind == "embed", call, owner)
    below = _added_module(block, place)
    return Site(place, f"{path}.{below}", block.get_submodule(below), block, False, call, owner)


def _added_module(block: nn.Module, place: Place) -> str:
    """Path below `block` to the module whose output its attention or MLP adds to the residual stream."""
    kind = type(block).__name__
    if place.kind == "mlp":
        paths: tuple[str, ...] = _MLP_OUTPUTS
        if getattr(block, "chunk_size_feed_forward", 0):
            raise TrimtabError(
                f"place='{place}': {kind} runs its MLP in pieces. Accepted: config.chunk_size_feed_forward=0."
            )
    elif _has(block, "post_feedforward_layernorm"):
        # Gemma 2 and 3 normalise what attention adds. In Llama a module of this name normalises the MLP's
        # input: it counts only where there is one after the MLP too.
        paths = ("post_attention_layernorm", *_ATTENTION_OUTPUTS)
    elif _has(block, "feed_forward") and _has(block, "final_layer_norm"):
        # HuBERT and WavLM drop out what attention returns before adding it (their MLP does so inside).
        paths = ("dropout", *_ATTENTION_OUTPUTS)
    else:
        paths = _ATTENTION_OUTPUTS
    path = next((path for path in paths if _has(block, path)), None)
    if path is None:
        children = ", ".join(name for name, _ in block.named_children())
        raise TrimtabError(
            f"place='{place}': block {place.layer}, a {kind}, has none that is known among its children "
            f"({children}). Accepted: {', '.join(paths)}."
        )
    if getattr(block, "residual_multiplier", 1.0) != 1.0:
        # Granite scales what it adds outside of any module.
        raise TrimtabError(
            f"place='{place}': {kind} scales what it adds. Accepted: resid places, or residual_multiplier=1."
        )
    if "residual" in inspect.signature(block.get_submodule(path).forward).parameters:
        # Bloom and MPT hand the residual to the module and get the sum back: what was added is not to be had.
        raise TrimtabError(f"place='{place}': {path} of {kind} adds the residual inside. Accepted: resid places.")
    return path


def _has(module: nn.Module, path: str) -> bool:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return isinstance(found, nn.Module)


def _blocks(model: nn.Module, layers: Layers) -> _Blocks:
    """The blocks of `model`, given or found. Raises `TrimtabError` when there are none or several lists."""
    if layers is not None:
        return _given_blocks(model, layers)
    found = list(_search(model, model, "", set()))
    if len(found) > 1:
        found = _in_language_model(model, found)
    if len(found) == 1:
        return found[0]
    how = "Give the list of blocks: layers=model.path.to.module_list, or its dotted path as a string."
    if found:
        lists = ", ".join(repr(blocks.path) for blocks in found)
        raise TrimtabError(f"model={type(model).__name__} has several lists of blocks: {lists}. {how}")
    raise TrimtabError(
        f"model={type(model).__name__} has no blocks that Trimtab finds, that is, no ModuleList whose "
        f"members have a child named {', '.join(_ATTENTION[:-1])} or {_ATTENTION[-1]}. {how}"
    )


def _in_language_model(model: Any, found: list[_Blocks]) -> list[_Blocks]:
    """Without the blocks of a vision or speech tower: Transformers calls the language model the decoder.

    The two stacks of an encoder-decoder model have equal rights: the caller is to choose.
    """
    if not hasattr(model, "get_decoder") or getattr(model.config, "is_encoder_decoder", False):
        return found
    language_model = set(model.get_decoder().modules())
    return [blocks for blocks in found if blocks.owner in language_model]


def _search(module: nn.Module, owner: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[_Blocks]:
    """All lists of blocks at or below `module`. Does not look inside blocks: cheap in large models."""
    if module in seen:
        return
    seen.add(module)
    if hasattr(module, "albert_layer_groups"):
        yield _albert_blocks(module, path)
    elif isinstance(module, nn.ModuleList) and any(_has(block, name) for block in module for name in _ATTENTION):
        yield _Blocks(path, owner, _numbered(module, path))
    else:
        for name, child in module.named_children():
            yield from _search(child, module, f"{path}.{name}" if path else name, seen)


def _numbered(blocks: nn.ModuleList | nn.Sequential, path: str) -> tuple[tuple[str, nn.Module], ...]:
    return tuple((f"{path}.{index}", block) for index, block in enumerate(blocks))


def _albert_blocks(encoder: Any, path: str) -> _Blocks:
    """ALBERT runs each group of blocks several times; only its config says how often and in which order."""
    config = encoder.config
    runs_per_group = config.num_hidden_layers / config.num_hidden_groups
    groups = f"{path}.albert_layer_groups" if path else "albert_layer_groups"
    blocks: list[tuple[str, nn.Module]] = []
    for index in range(config.num_hidden_layers):
        group = int(index / runs_per_group)
        blocks += _numbered(encoder.albert_layer_groups[group].albert_layers, f"{groups}.{group}.albert_layers")
    return _Blocks(groups, encoder, tuple(blocks))


def _given_blocks(model: nn.Module, layers: nn.ModuleList | nn.Sequential | str) -> _Blocks:
    lists = {
        path: module
        for path, module in model.named_modules()
        if path and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    named = [path for path, module in lists.items() if path == layers or module is layers]
    if not named:
        given = layers if isinstance(layers, str) else f"{type(layers).__name__} of {len(layers)}, not in the model"
        raise unknown("layers", given, lists)
    owner = model.get_submodule(named[0].rpartition(".")[0])
    return _Blocks(named[0], owner, _numbered(lists[named[0]], named[0]))

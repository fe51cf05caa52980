"""Nested Python values as JSON beside named tensors: how `checkpoint` writes a tree.

None, bool, int, str, finite floats and lists stand for themselves, objects with one key for the rest:

    {"tensor": name}    {"float": "nan" | "inf" | "-inf"}    {"tuple": [...]}    {"dict": [[key, value], ...]}

A dict is a list of pairs because its keys may be ints, which JSON objects would turn into strings.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError

__all__ = ["decode", "encode"]

# A tree this deep contains itself.
MAX_DEPTH = 64

STORED_DTYPES = frozenset(
    {
        torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
        torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
        torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    }
)  # fmt: skip


def encode(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """The JSON form of `tree`, and its tensors by name: contiguous, on the CPU, none sharing memory.

    Raises TrimtabError, which names the place in the tree, for a value that is not stored.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(tree, (), tensors, set()), tensors


def decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The value of which `node` is the JSON form; TrimtabError if it is none."""
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, list):
        return [decode(child, tensors) for child in node]
    match node:
        case {"tensor": str(name)} if name in tensors:
            return tensors[name]
        case {"float": "nan" | "inf" | "-inf" as text}:
            return float(text)
        case {"tuple": list(children)}:
            return tuple(decode(child, tensors) for child in children)
        case {"dict": list(pairs)} if all(map(_is_pair, pairs)):
            return {key: decode(child, tensors) for key, child in pairs}
    raise TrimtabError(f"tree holds {str(node)[:80]}, which is no form of a value, or names a tensor that is missing")


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) in (str, int)


def _encode(value: Any, path: tuple[str | int, ...], tensors: dict[str, Tensor], storages: set[int]) -> Any:
    # Exact types: a subclass (numpy.float64 of float, an enum of str) would come back as another.
    if value is None or type(value) in (bool, int, str):
        return value
    if len(path) > MAX_DEPTH:
        raise TrimtabError(f"{_place(path[:4])}… is nested more than {MAX_DEPTH} deep: does it contain itself?")
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        return {"tensor": _store(value, path, tensors, storages)}
    if type(value) in (list, tuple):
        children = [_encode(child, (*path, index), tensors, storages) for index, child in enumerate(value)]
        return children if type(value) is list else {"tuple": children}
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise TrimtabError(f"{_place(path)} has the key {key!r}: str and int keys are accepted.")
        return {"dict": [[key, _encode(child, (*path, key), tensors, storages)] for key, child in value.items()]}
    hint = ""
    if isinstance(value, np.generic):
        hint = "; .item() makes a numpy scalar a Python one"
    elif isinstance(value, np.ndarray):
        hint = "; torch.from_numpy makes an array a tensor"
    raise TrimtabError(
        f"{_place(path)} is a {type(value).__module__}.{type(value).__qualname__}; accepted: tensors, "
        f"dict, list, tuple, None, bool, int, float, str{hint}."
    )


def _store(value: Tensor, path: tuple[str | int, ...], tensors: dict[str, Tensor], storages: set[int]) -> str:
    """Put `value` among `tensors` and return its name, which says where in the tree it is."""
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise TrimtabError(f"{_place(path)} is a {type(value).__qualname__}; plain tensors are accepted.")
    if value.layout != torch.strided or value.is_meta or value.is_quantized or value.dtype not in STORED_DTYPES:
        raise TrimtabError(
            f"{_place(path)} is a tensor of {value.dtype}, {value.layout}, on {value.device}; accepted: "
            "dense tensors with data, of the dtypes of safetensors."
        )
    plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # safetensors refuses tensors that share memory, so the second one of a storage is copied.
    storage = plain.untyped_storage().data_ptr()
    if storage in storages:
        plain = plain.clone()
    storages.add(storage)
    name = "/".join(map(str, path)) or "tensor"
    # The dict keys "0" and 0 give one name; safetensors keeps __metadata__ for itself.
    while name in tensors or name == "__metadata__":
        name += "'"
    tensors[name] = plain
    return name


def _place(path: tuple[str | int, ...]) -> str:
    return "tree" + "".join(f"[{key!r}]" for key in path)

"""Activations of a language model, shard by shard.

Text is packed into sequences (`trimtab.core.text`); a fixed number of sequences is one *shard*; a shard's
activations are those of its tokens, special tokens left out, several places in one forward pass that stops after the
last of them. Shards come from the model (`Harvest`), from disk (`ShardCache`) or from tensors (`TensorShards`);
`trimtab.sae.shuffle` mixes them.

Attention sinks: a few tokens (often the first) carry activations a hundred times larger than the rest, which would
make up most of the variance and teach a dictionary nothing. `sink_norm_ratio` leaves out a token whose norm at any of
the places exceeds that many times the median norm there.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from trimtab.core import activations as act
from trimtab.core.checkpoint import write_file
from trimtab.core.errors import TrimtabError, unknown
from trimtab.core.text import PackedSequence, TextPosition, TextSource, pack, position_from_json

__all__ = [
    "Harvest",
    "HarvestConfig",
    "ShardCache",
    "ShardSource",
    "TensorShards",
    "longest_context",
]


@runtime_checkable
class ShardSource(Protocol):
    """Numbered shards of activations, each {place: [rows, width]}, the rows of all places aligned."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that tell this source from any that yields other rows."""

    @property
    def places(self) -> tuple[str, ...]:
        """The names of the activations."""

    def shard(self, index: int) -> dict[str, Tensor]:
        """Shard `index` from 0. Deterministic: the same index gives the same rows."""

    def state(self, index: int) -> dict[str, Any]:
        """JSON values from which `restore` makes shard `index` and its followers cheap to reach."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave."""


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """How text becomes activations.

    Args:
        context: tokens of a packed sequence
        sequences_per_forward: how many go through the model at once
        shard_tokens: about how many tokens make one shard; memory holds up to six shards
        sink_norm_ratio: leave out tokens whose norm exceeds this many times the median norm; None keeps all
    """

    context: int = 256
    sequences_per_forward: int = 8
    shard_tokens: int = 32_768
    sink_norm_ratio: float | None = 10.0

    def __post_init__(self) -> None:
        for name in ("context", "sequences_per_forward", "shard_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise TrimtabError(f"{name}={value!r} must be an integer of at least 1")
        if self.sink_norm_ratio is not None and not self.sink_norm_ratio > 1:
            raise TrimtabError(f"sink_norm_ratio={self.sink_norm_ratio!r} must be above 1, or None to keep all tokens")

    @property
    def sequences_per_shard(self) -> int:
        """Sequences of one shard."""
        return -(-self.shard_tokens // self.context)


class Forward(NamedTuple):
    """One forward pass: `input_ids` and `keep` [sequences, context], activations {place: [sequences, context, width]}.

    `keep` is False at special tokens and at attention sinks. `following` is where the text goes on.
    """

    input_ids: Int[Tensor, "sequences context"]
    keep: Bool[Tensor, "sequences context"]
    activations: dict[str, Tensor]
    following: TextPosition

    def rows(self, place: str) -> Float[Tensor, "tokens width"]:
        """The activations of the tokens that are kept, in float32."""
        states = self.activations[place]
        return states[self.keep.to(states.device)].float()


class Harvest:
    """Shards of a model's activations at several places, from text.

    model: any transformers model that `trimtab.core.activations` understands, in any dtype, quantised or not.
    places: names such as "resid.9"; see `trimtab.core.activations.Place`.
    layers: for unknown architectures, the model's list of blocks or its dotted path.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        source: TextSource,
        places: Sequence[str],
        config: HarvestConfig | None = None,
        *,
        layers: nn.ModuleList | str | None = None,
    ) -> None:
        if not places:
            raise TrimtabError("places=[] names nothing to harvest; give at least one, such as 'resid.6'")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.source = source
        self.config = config or HarvestConfig()
        self.layers = layers
        known = {str(place) for place in act.places(model, layers)}
        self.places = tuple(dict.fromkeys(str(act.Place.parse(place)) for place in places))
        for place in self.places:
            if place not in known:
                raise unknown("place", place, sorted(known))
        longest = longest_context(model)
        if longest is not None and self.config.context > longest:
            raise TrimtabError(f"context={self.config.context} is beyond the model's {longest} positions")
        self._starts = {0: TextPosition()}
        self._stream: tuple[int, Iterator[PackedSequence] | None] = (0, None)  # the shard at which it stands

    @property
    def identity(self) -> dict[str, Any]:
        model_config = getattr(self.model, "config", None)
        return {
            "model": str(getattr(model_config, "_name_or_path", "") or type(self.model).__name__),
            "model_sha256": _model_digest(self.model, model_config),
            "model_dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "layers": self.layers if isinstance(self.layers, str) else None,
            "text": self.source.name,
            "text_sha256": self.source.digest,
            "places": list(self.places),
            "harvest": asdict(self.config),
            "prepend_bos": self.tokenizer("a").input_ids[:1] == [self.tokenizer.bos_token_id],
        }

    def shard(self, index: int) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {place: [] for place in self.places}
        stream = self._at(index)
        self._stream = (index, None)  # until the shard is whole
        following = self._starts[index]
        for forward in self._forwards(itertools.islice(stream, self.config.sequences_per_shard)):
            for place, states in forward.activations.items():
                rows[place].append(states[forward.keep.to(states.device)])
            following = forward.following
        self._starts[index + 1], self._stream = following, (index + 1, stream)
        return {place: torch.cat(parts) for place, parts in rows.items()}

    def forwards(
        self, start: TextPosition | None = None, *, repeat: bool = False, sequences: int | None = None
    ) -> Iterator[Forward]:
        """Forward passes over packed text from `start`, for at most `sequences` sequences.

        Raises TrimtabError where an activation of a token that is kept is NaN or infinite.
        """
        packed = pack(self.source, self.tokenizer, self.config.context, start=start, repeat=repeat)
        return self._forwards(itertools.islice(packed, sequences))

    def _forwards(self, packed: Iterator[PackedSequence]) -> Iterator[Forward]:
        device = next(self.model.parameters()).device
        for batch in iter(lambda: list(itertools.islice(packed, self.config.sequences_per_forward)), []):
            ids = torch.stack([s.input_ids for s in batch]).to(device)
            keep = torch.stack([s.keep for s in batch]).to(device)
            with torch.no_grad():
                states = act.read(self.model, self.places, {"input_ids": ids}, layers=self.layers)
            for place, tensor in states.items():
                if not torch.isfinite(tensor[keep.to(tensor.device)]).all():
                    raise TrimtabError(
                        f"activations at place {place!r} hold NaN or infinity, in the text before {batch[-1].following}"
                    )
            yield Forward(ids, keep & ~self._sinks(states, keep), states, batch[-1].following)

    def _sinks(self, states: Mapping[str, Tensor], keep: Tensor) -> Tensor:
        """Which tokens are attention sinks at one of the places, judged within one forward pass."""
        sinks = torch.zeros_like(keep)
        if self.config.sink_norm_ratio is None or not keep.any():
            return sinks
        for tensor in states.values():
            norms = tensor.float().norm(dim=-1)
            median = norms[keep.to(norms.device)].median()
            sinks |= (norms > self.config.sink_norm_ratio * median).to(sinks.device)
        return sinks

    def _at(self, index: int) -> Iterator[PackedSequence]:
        """The packed text from the beginning of shard `index` on.

        Where the last shard ended the text is read on; shards in between, those of other processes, are packed and
        passed over, without the model.
        """
        at, stream = self._stream
        nearest = max(i for i in self._starts if i <= index)
        if stream is None or not nearest <= at <= index:
            at, start = nearest, self._starts[nearest]
            stream = pack(self.source, self.tokenizer, self.config.context, start=start, repeat=True)
        self._stream = (at, None)
        for i in range(at, index):
            *_, last = itertools.islice(stream, self.config.sequences_per_shard)
            self._starts[i + 1] = last.following
        self._stream = (index, stream)
        return stream

    def state(self, index: int) -> dict[str, Any]:
        if index not in self._starts:
            self._at(index)
        position = self._starts[index]
        return {"shard": index, "start": [position.epoch, position.piece, position.token]}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._starts[int(state["shard"])] = position_from_json(state["start"])


def longest_context(model: nn.Module) -> int | None:
    """The positions that the model knows, where its configuration tells."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "max_position_embeddings", None)


def _model_digest(model: nn.Module, config: Any) -> str:
    """A checksum of the configuration and the first 64 entries of every weight: other weights, other digest."""
    described = config.to_dict() if config is not None else {"class": type(model).__name__}
    for name in ("transformers_version", "_name_or_path"):  # of the reader and of where it lies, not of the model
        described.pop(name, None)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        digest.update(name.encode())
        if not weight.is_meta:  # offloaded
            digest.update(weight.detach().flatten()[:64].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TensorShards:
    """Shards of activations that are already in memory: {place: [rows, width]}, passed over again and again."""

    def __init__(self, activations: Mapping[str, Tensor], *, shard_rows: int = 32_768) -> None:
        if shard_rows < 1:
            raise TrimtabError(f"shard_rows={shard_rows!r} must be at least 1")
        lengths = {place: len(tensor) for place, tensor in activations.items()}
        if not lengths or len(set(lengths.values())) > 1 or not min(lengths.values()):
            raise TrimtabError(f"activations of lengths {lengths}: accepted are one or more of equal length above 0")
        for place, tensor in activations.items():
            if not torch.isfinite(tensor).all():
                raise TrimtabError(f"activations at place {place!r} hold NaN or infinity")
        self._activations = dict(activations)
        self._shards = -(-next(iter(lengths.values())) // shard_rows)
        self._shard_rows = shard_rows

    @property
    def identity(self) -> dict[str, Any]:
        shapes = {place: list(tensor.shape) for place, tensor in self._activations.items()}
        return {"tensors": shapes, "sha256": self._digest, "shard_rows": self._shard_rows}

    @functools.cached_property
    def _digest(self) -> str:
        return _digest({place: tensor.cpu().contiguous() for place, tensor in self._activations.items()})

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(self._activations)

    def shard(self, index: int) -> dict[str, Tensor]:
        start = index % self._shards * self._shard_rows
        return {place: tensor[start : start + self._shard_rows] for place, tensor in self._activations.items()}

    def state(self, index: int) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


class ShardCache:
    """Shards kept on disk as safetensors: read where they are there, else taken from `source` and written.

    The directory belongs to one source: another identity is refused. An interrupted harvest goes on where it stopped,
    since each file appears whole or not at all, and a finished one is read by any number of trainings.
    dtype: what the files hold; None keeps the source's.
    """

    def __init__(self, source: ShardSource, directory: Path | str, *, dtype: torch.dtype | None = None) -> None:
        self._source = source
        self._directory = Path(directory)
        self._dtype = dtype
        index = self._directory / "cache.json"
        if index.exists():
            try:
                found = dict(json.loads(index.read_text("utf-8")))
            except (ValueError, TypeError) as error:
                raise TrimtabError(f"{str(index)!r} is not the description of a cache: {error}") from error
            _same_identity(found, self.identity, str(self._directory))
        else:
            self._write(index, json.dumps(self.identity, indent=2).encode())

    @property
    def identity(self) -> dict[str, Any]:
        return {**self._source.identity, "dtype": str(self._dtype) if self._dtype else None}

    @property
    def places(self) -> tuple[str, ...]:
        return self._source.places

    def shard(self, index: int) -> dict[str, Tensor]:
        path = self._directory / f"shard-{index:06d}.safetensors"
        if not path.exists():
            shard = self._source.shard(index)
            stored = {
                place: tensor.to(self._dtype or tensor.dtype).cpu().contiguous() for place, tensor in shard.items()
            }
            following = json.dumps(self._source.state(index + 1))
            self._write(path, serialize(stored, {"sha256": _digest(stored), "following": following}))
        try:
            with safe_open(path, framework="pt") as file:
                notes = file.metadata() or {}
                shard = {place: file.get_tensor(place) for place in self.places}
        except Exception as error:
            raise TrimtabError(
                f"cached shard {str(path)!r} cannot be read ({error}); delete it to harvest it anew"
            ) from error
        if notes.get("sha256") != _digest(shard):
            raise TrimtabError(
                f"cached shard {str(path)!r} was altered: its checksum differs; delete it to harvest it anew"
            )
        self._source.restore(json.loads(notes["following"]))
        return shard

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_file(path, data)
        except OSError as error:
            raise TrimtabError(f"{str(path)!r} cannot be written ({error}); what the cache holds is whole") from error

    def state(self, index: int) -> dict[str, Any]:
        return self._source.state(index)

    def restore(self, state: Mapping[str, Any]) -> None:
        self._source.restore(state)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for place in sorted(tensors):
        digest.update(f"{place} {tuple(tensors[place].shape)} {tensors[place].dtype}".encode())
        digest.update(tensors[place].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _same_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    wanted = json.loads(json.dumps(wanted))
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise TrimtabError(
                f"{where!r} holds activations of another harvest: {key} is {found.get(key)!r} there, "
                f"{wanted.get(key)!r} here"
            )

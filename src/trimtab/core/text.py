"""Text in, packed token sequences out: any source, in a fixed order, from any position.

A source is a local file or folder, a `datasets` name, or any Python collection of strings or examples. It is read as
*pieces*: a document is one piece, or several where a file is too long to be held whole. `pack` turns pieces into
sequences of exactly `context` tokens, each opened and closed by the special tokens that the tokenizer would add, with
a separator where a document begins. Every sequence carries the `TextPosition` that follows it, from which packing can
go on with the very same tokens: that is what makes a harvest resumable.
"""

from __future__ import annotations

import collections
import glob
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError, unknown

__all__ = ["PackedSequence", "Piece", "TextPosition", "TextSource", "pack", "special_ids"]

PIECE_CHARACTERS = 1 << 16
"""Length at which a text file is cut, at the end of a line, into pieces of one document."""

TOKENIZED_AT_ONCE = 64
"""Pieces that the tokenizer is given together."""


class Piece(NamedTuple):
    """Some text; `begins` says whether a document starts here."""

    text: str
    begins: bool


@dataclass(frozen=True)
class TextPosition:
    """Where packing goes on: pass over the source, piece, and token within the piece; all from 0."""

    epoch: int = 0
    piece: int = 0
    token: int = 0


class PackedSequence(NamedTuple):
    """`input_ids` [context] int64; `keep` [context] bool, False at special tokens; the position that follows."""

    input_ids: Tensor
    keep: Tensor
    following: TextPosition


class TextSource:
    """Text from files, `datasets`, or Python collections, read in the same order every time.

    source: one of, or a sequence of
        a path to a .txt or .md file (one document each) or to a folder (its .txt files, sorted by path);
        a path to a .jsonl, .json, .csv or .parquet file, or to a dataset saved on disk;
        a name on the hub, as `owner/name` or `owner/name:config`, streamed;
        an iterable of strings or of examples (mappings) that can be iterated more than once.
    column: the examples' field that holds the text or the conversation. Default: `text`, else `messages`.
    split: the split of a named dataset.
    chat_tokenizer: turns conversations (lists of role and content) into text by its chat template.
    """

    def __init__(
        self,
        source: str | Path | Iterable[Any],
        *,
        column: str | None = None,
        split: str = "train",
        chat_tokenizer: Any = None,
    ) -> None:
        self.column = column
        self.split = split
        self.chat_tokenizer = chat_tokenizer
        self.name, self._parts = _parts(source)

    @property
    def digest(self) -> str:
        """A checksum of column, split and samples of the text, which tells other text from this at little cost.

        Sampled are each file's size, beginning and end, and up to 64 examples of a collection.
        """
        digest = hashlib.sha256(json.dumps([self.column, self.split]).encode())
        for part in self._parts:
            for sample in _file_samples(part) if isinstance(part, str | Path) else map(self._text_of, _sampled(part)):
                digest.update(hashlib.sha256(sample if isinstance(sample, bytes) else sample.encode()).digest())
        return digest.hexdigest()

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        """The pieces from number `start` on. A dataset that can skip does so without reading what it skips."""
        first = self._parts[0]
        if len(self._parts) == 1 and start and hasattr(first, "skip"):
            if not hasattr(first, "__len__") or start < len(first):
                yield from self._read(first.skip(start))
        else:
            everything = itertools.chain.from_iterable(self._read(part) for part in self._parts)
            yield from itertools.islice(everything, start, None)

    def _read(self, part: Any) -> Iterator[Piece]:
        if isinstance(part, Path) and part.suffix in _PLAIN:
            yield from _read_file(part)
            return
        for example in _examples(part, self.split) if isinstance(part, str | Path) else part:
            yield Piece(self._text_of(example), begins=True)

    def _text_of(self, example: Any) -> str:
        if isinstance(example, str):
            return example
        if not isinstance(example, Mapping):
            raise TrimtabError(f"text source {self.name!r} yields {type(example).__name__}; accepted: str or mapping")
        column = self.column or next((c for c in ("text", "messages") if c in example), None)
        if column is None or column not in example:
            raise unknown("column", self.column, example)
        value = example[column]
        if isinstance(value, str):
            return value
        if isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
            return self._render(value)
        raise TrimtabError(f"column {column!r} holds {type(value).__name__}; accepted: str or a list of messages")

    def _render(self, messages: Sequence[Any]) -> str:
        tokenizer = self.chat_tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise TrimtabError(
                f"text source {self.name!r} holds conversations, and the tokenizer has no chat template: set "
                "tokenizer.chat_template or give a column of plain text"
            )
        import jinja2

        try:
            text: str = tokenizer.apply_chat_template(list(messages), tokenize=False)
        except jinja2.TemplateError as error:
            raise TrimtabError(
                f"text source {self.name!r} holds a conversation that the tokenizer's chat template refuses: {error}"
            ) from error
        return text.removeprefix(tokenizer.bos_token or "")


_PLAIN = frozenset({".txt", ".md"})
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def _parts(source: Any) -> tuple[str, list[Any]]:
    """The source's name for messages and its parts: paths, dataset names, or re-iterable collections."""
    if isinstance(source, str | Path):
        path = Path(source)
        _check_name(path)
        if path.is_dir() and not _is_saved_dataset(path):
            files = sorted(p for p in path.rglob("*.txt") if p.is_file())
            if not files:
                raise TrimtabError(f"text source {str(source)!r} is a folder without .txt files")
            return str(source), list(files)
        if path.exists():
            if path.is_file() and path.suffix not in _PLAIN | _TABLES.keys():
                raise unknown("text file's extension", path.suffix, sorted(_PLAIN | _TABLES.keys()))
            return str(source), [path]
        if isinstance(source, Path) or path.suffix in _PLAIN | _TABLES.keys() or str(source).count("/") > 1:
            raise TrimtabError(f"text source {str(source)!r} does not exist")
        return str(source), [source]
    if isinstance(source, Sequence) and source and all(isinstance(s, Path) for s in source):
        return ", ".join(map(str, source)), [part for s in source for part in _parts(s)[1]]
    if isinstance(source, Mapping):
        raise TrimtabError(
            f"text source {type(source).__name__} holds {', '.join(map(repr, itertools.islice(source, 8)))}: give one "
            "of its values"
        )
    if iter(source) is source:
        raise TrimtabError(
            f"text source {type(source).__name__} can be read only once; a harvest must be able to start again: "
            "give a list, a Dataset, or an object whose __iter__ begins anew"
        )
    return type(source).__name__, [source]


def _sampled(part: Any) -> Iterator[Any]:
    """Up to 64 examples of a collection, evenly spaced where it has a length, else its first."""
    if not hasattr(part, "__len__"):
        return itertools.islice(iter(part), 64)
    count = min(len(part), 64)
    return (part[i * (len(part) - 1) // max(count - 1, 1)] for i in range(count))


def _file_samples(part: str | Path) -> Iterator[bytes]:
    """The name of a named dataset; of a saved one its descriptions; of a file its size, first and last 64 KiB."""
    if isinstance(part, str):
        yield part.encode()
        return
    for path in sorted(part.rglob("*.json")) if part.is_dir() else [part]:
        with path.open("rb") as file:
            size = path.stat().st_size
            yield str(size).encode()
            yield file.read(1 << 16)
            file.seek(max(size - (1 << 16), 0))
            yield file.read(1 << 16)


def _check_name(path: Path) -> None:
    try:
        path.exists()
    except OSError as error:  # a name that is too long: most likely the text itself
        raise TrimtabError(
            f"text source {str(path)[:60]!r}… cannot be a path ({error.strerror}); text itself is given as a list of "
            "strings"
        ) from error


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def _examples(part: str | Path, split: str) -> Iterator[Any]:
    """The examples of a table, a saved dataset or a named one; whatever goes wrong on the way names the source."""
    try:
        yield from _open_dataset(part, split)
    except TrimtabError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # Arrow's and pandas's errors are ValueErrors
        if isinstance(error, UnicodeDecodeError) and isinstance(part, Path):
            collections.deque(_read_file(part), maxlen=0)  # raises, and knows where
        what = "cannot be read" if isinstance(part, Path) else "is neither a file, a folder, nor a dataset to be had"
        raise TrimtabError(f"text source {str(part)!r} {what}: {error}") from error


def _open_dataset(part: str | Path, split: str) -> Iterable[Any]:
    import datasets

    if isinstance(part, Path) and part.is_dir():
        loaded = datasets.load_from_disk(str(part))
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if split not in loaded:
            raise unknown("split", split, loaded)
        return loaded[split]
    if isinstance(part, Path):
        if not part.stat().st_size:
            return ()
        # The name is a pattern to `datasets`.
        file = glob.escape(str(part))
        # What pandas takes for missing, such as "None", is text here.
        options = {"keep_default_na": False} if part.suffix == ".csv" else {}
        return datasets.load_dataset(_TABLES[part.suffix], data_files=file, split="train", streaming=True, **options)
    name, _, config = part.partition(":")
    return datasets.load_dataset(name, config or None, split=split, streaming=True)


def _read_file(path: Path) -> Iterator[Piece]:
    """A UTF-8 file as the pieces of one document, none much longer than `PIECE_CHARACTERS`."""
    begins = True
    with path.open("rb") as file:
        offset = 0
        while block := file.read(PIECE_CHARACTERS):
            block += file.readline(PIECE_CHARACTERS)
            # A line of more than that is cut where it must, but never within a character or a line's end.
            while not block.endswith(b"\n") and _continues(file.peek(1)[:1]) and len(block) < 2 * PIECE_CHARACTERS + 4:
                block += file.read(1)
            try:
                text = block.decode("utf-8")
            except UnicodeDecodeError as error:
                raise TrimtabError(
                    f"text file {str(path)!r} is not UTF-8: byte {block[error.start]:#04x} at offset "
                    f"{offset + error.start} ({error.reason}); convert it, e.g. with iconv -t UTF-8"
                ) from error
            offset += len(block)
            yield Piece((text.removeprefix("\ufeff") if begins else text).replace("\r\n", "\n"), begins)
            begins = False


def _continues(byte: bytes) -> bool:
    """Whether a character of several bytes, or a line's end of two, may go on with `byte`."""
    return byte == b"\n" or (byte != b"" and byte[0] & 0xC0 == 0x80)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Every id that stands for structure rather than text: the named special tokens and the added special ones."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(tokenizer.all_special_ids) | added


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    with_special = tokenizer("a", add_special_tokens=True).input_ids
    bare = tokenizer("a", add_special_tokens=False).input_ids
    for start in range(len(with_special) - len(bare) + 1):
        if bare and with_special[start : start + len(bare)] == bare:
            return with_special[:start], with_special[start + len(bare) :]
    raise TrimtabError(
        f"tokenizer {type(tokenizer).__name__} reads 'a' as {bare}, and as {with_special} with special tokens: which "
        "of them frame a text cannot be told"
    )


def pack(
    source: TextSource,
    tokenizer: Any,
    context: int,
    *,
    start: TextPosition | None = None,
    repeat: bool = False,
) -> Iterator[PackedSequence]:
    """Full sequences of `context` tokens from `start` on; with `repeat`, for ever, pass after pass.

    Tokens that do not fill a last sequence are dropped, or with `repeat` completed by the next pass.
    Raises TrimtabError if the source (with `repeat`, two passes of it) holds less than one sequence, or `context`
    leaves no room for text.
    """
    prefix, suffix = _frame(tokenizer)
    room = context - len(prefix) - len(suffix)
    if room < 1:
        raise TrimtabError(f"context={context} leaves no room for text beside the special tokens; at least "
                           f"{len(prefix) + len(suffix) + 1} is needed")  # fmt: skip
    special = torch.tensor(sorted(special_ids(tokenizer)), dtype=torch.int64)
    position = start or TextPosition()
    content: list[int] = []
    seen, made = 0, 0
    for piece in _tokens(source, tokenizer, position, repeat):
        if not made and piece.position.epoch > position.epoch + 1:
            break
        seen += len(piece.ids)
        taken = 0
        while taken < len(piece.ids):
            part = piece.ids[taken : taken + room - len(content)]
            taken += len(part)
            content += part
            if len(content) == room:
                ids = torch.tensor([*prefix, *content, *suffix], dtype=torch.int64)
                following = TextPosition(piece.position.epoch, piece.position.piece, piece.position.token + taken)
                yield PackedSequence(ids, ~torch.isin(ids, special), following)
                content = []
                made += 1
    if not made and (repeat or position == TextPosition()):
        raise TrimtabError(
            f"text source {source.name!r} is {'empty' if not seen else 'too short'}: {seen} tokens"
            f"{' in two passes' if repeat and seen else ''}, and one sequence of context={context} needs {room}"
        )


class _PieceTokens(NamedTuple):
    ids: list[int]
    position: TextPosition


def _tokens(source: TextSource, tokenizer: Any, start: TextPosition, repeat: bool) -> Iterator[_PieceTokens]:
    """The token ids of each piece from `start` on, the separator first where a document begins."""
    separator = next(
        (i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id) if i is not None),
        None,
    )
    for epoch in itertools.count(start.epoch):
        first = start.piece if epoch == start.epoch else 0
        pieces = source.pieces(first)
        number, found = first, False
        while batch := list(itertools.islice(pieces, TOKENIZED_AT_ONCE)):
            encoded = tokenizer([p.text for p in batch], add_special_tokens=False, verbose=False).input_ids
            for piece, ids in zip(batch, encoded, strict=True):
                found = found or bool(ids)
                lead = [separator] if piece.begins and separator is not None and ids else []
                skip = start.token if (epoch, number) == (start.epoch, start.piece) else 0
                yield _PieceTokens((lead + ids)[skip:], TextPosition(epoch, number, skip))
                number += 1
        if not repeat or not (found or first):
            return


def position_from_json(value: Any) -> TextPosition:
    """A `TextPosition` from the list [epoch, piece, token]."""
    if not (isinstance(value, list) and len(value) == 3 and all(isinstance(v, int) and v >= 0 for v in value)):
        raise TrimtabError(f"text position {json.dumps(value)} must be three non-negative integers")
    return TextPosition(*value)

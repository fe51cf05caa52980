"""Text in, packed sequences out: against a packing by hand, from every kind of source, from every position."""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trimtab.core import text as text_module
from trimtab.core.errors import TrimtabError
from trimtab.core.text import PackedSequence, TextPosition, TextSource, pack, position_from_json, special_ids

WORDS = [f"w{i}" for i in range(20)]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def tokenizer(kind: str) -> Any:
    """`llama` opens with <bos>, `bert` frames with [CLS] and [SEP], `gpt2` has <eos> alone, `plain` nothing."""
    special = {
        "llama": {"bos_token": "<bos>", "eos_token": "<eos>"},
        "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
        "gpt2": {"eos_token": "<eos>"},
        "plain": {},
    }[kind]
    vocabulary = {word: i for i, word in enumerate([*special.values(), "?", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = {"llama": "<bos> $A", "bert": "[CLS] $A [SEP]"}.get(kind)
    if frame:
        marks = [(mark, vocabulary[mark]) for mark in frame.split() if mark in vocabulary]
        backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


TOKENIZERS = {kind: tokenizer(kind) for kind in ("llama", "bert", "gpt2", "plain")}
FRAMES = {"llama": (["<bos>"], []), "bert": (["[CLS]"], ["[SEP]"]), "gpt2": ([], []), "plain": ([], [])}
SEPARATORS = {"llama": ["<eos>"], "bert": ["[SEP]"], "gpt2": ["<eos>"], "plain": []}


def by_hand(documents: list[str], kind: str, context: int, passes: int = 1) -> list[list[int]]:
    """The sequences as one would write them down: all tokens in a row, cut, framed."""
    row: list[str] = []
    for document in documents * passes:
        row += [*SEPARATORS[kind], *document.split()] if document.split() else []
    before, after = FRAMES[kind]
    room = context - len(before) - len(after)
    cut = [row[i : i + room] for i in range(0, len(row) - room + 1, room)]
    return [TOKENIZERS[kind].convert_tokens_to_ids([*before, *piece, *after]) for piece in cut]


def ids(sequences: Iterator[PackedSequence] | list[PackedSequence]) -> list[list[int]]:
    return [sequence.input_ids.tolist() for sequence in sequences]


def texts(source: TextSource, start: int = 0) -> list[str]:
    return [piece.text for piece in source.pieces(start)]


# -- packing ---------------------------------------------------------------------------------------

DOCUMENTS = [" ".join(WORDS[i : i + n]) for i, n in enumerate([5, 1, 9, 0, 14, 3, 3])]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("context", [3, 7, 16])
def test_sequences_are_those_packed_by_hand(kind: str, context: int) -> None:
    expected = by_hand(DOCUMENTS, kind, context)
    assert ids(pack(TextSource(DOCUMENTS), TOKENIZERS[kind], context)) == expected
    repeated = by_hand(DOCUMENTS, kind, context, passes=4)
    count = len(repeated)
    assert count > 2 * len(expected)
    assert ids(islice(pack(TextSource(DOCUMENTS), TOKENIZERS[kind], context, repeat=True), count)) == repeated


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_keep_is_false_at_special_tokens_alone(kind: str) -> None:
    special = set(TOKENIZERS[kind].convert_tokens_to_ids([*FRAMES[kind][0], *FRAMES[kind][1], *SEPARATORS[kind]]))
    for sequence in pack(TextSource(DOCUMENTS), TOKENIZERS[kind], 7):
        assert sequence.keep.dtype == torch.bool
        assert sequence.keep.tolist() == [token not in special for token in sequence.input_ids.tolist()]


def test_added_special_tokens_are_special_even_where_the_text_writes_them() -> None:
    marked = tokenizer("llama")
    marked.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn = marked.convert_tokens_to_ids("<turn>")
    assert turn in special_ids(marked)
    (sequence,) = pack(TextSource(["w1 <turn> w2"]), marked, 5)
    assert sequence.input_ids.tolist()[3] == turn
    assert sequence.keep.tolist() == [False, False, True, False, True]


def test_more_documents_than_are_tokenised_at_once() -> None:
    documents = [WORDS[i % 20] for i in range(3 * text_module.TOKENIZED_AT_ONCE + 5)]
    assert ids(pack(TextSource(documents), TOKENIZERS["llama"], 9)) == by_hand(documents, "llama", 9)


# -- resuming --------------------------------------------------------------------------------------

documents_strategy = st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(documents=documents_strategy, kind=st.sampled_from(list(TOKENIZERS)), context=st.integers(3, 9))
def test_from_every_position_the_same_sequences_follow(documents: list[str], kind: str, context: int) -> None:
    documents = [*documents, " ".join(WORDS)]
    expected = by_hand(documents, kind, context)
    source = TextSource(documents)
    whole = list(pack(source, TOKENIZERS[kind], context))
    assert ids(whole) == expected
    for i, sequence in enumerate(whole):
        assert ids(pack(source, TOKENIZERS[kind], context, start=sequence.following)) == expected[i + 1 :]


@settings(deadline=None, max_examples=20)
@given(documents=documents_strategy, kind=st.sampled_from(list(TOKENIZERS)), context=st.integers(3, 9))
def test_from_every_position_over_passes_the_same_sequences_follow(
    documents: list[str], kind: str, context: int
) -> None:
    documents = [*documents, " ".join(WORDS)]
    expected = by_hand(documents, kind, context, passes=3)
    source = TextSource(documents)
    whole = list(islice(pack(source, TOKENIZERS[kind], context, repeat=True), len(expected)))
    assert ids(whole) == expected
    assert whole[-1].following.epoch >= 2
    for i, sequence in enumerate(whole):
        tail = pack(source, TOKENIZERS[kind], context, start=sequence.following, repeat=True)
        assert ids(islice(tail, len(expected) - i - 1)) == expected[i + 1 :]


@settings(deadline=None, max_examples=20)
@given(
    words=st.lists(st.sampled_from([*WORDS, "\n", "\n\n", "é\n", "語 "]), min_size=30, max_size=80),
    piece=st.integers(1, 40),
)
def test_a_long_file_in_pieces_resumes_from_every_position(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], piece: int
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "long.txt"
    path.write_text(" ".join(words), encoding="utf-8")
    llama = TOKENIZERS["llama"]
    with mock.patch.object(text_module, "PIECE_CHARACTERS", piece):
        source = TextSource(path)
        assert "".join(texts(source)) == " ".join(words)
        assert [p.begins for p in source.pieces()][:1] == [True]
        assert not any(p.begins for p in islice(source.pieces(), 1, None))
        whole = list(islice(pack(source, llama, 4, repeat=True), 25))
        for i, sequence in enumerate(whole):
            tail = pack(source, llama, 4, start=sequence.following, repeat=True)
            assert ids(islice(tail, 24 - i)) == ids(whole)[i + 1 :]


def test_pieces_end_with_lines_and_a_line_without_end_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\r\ncd\r\n" * 5)
    with mock.patch.object(text_module, "PIECE_CHARACTERS", 5):
        assert set(texts(TextSource(path))) == {"ab\ncd\n"}
        path.write_bytes(("é語" * 200).encode())
        pieces = texts(TextSource(path))
        assert "".join(pieces) == "é語" * 200
        assert max(map(len, pieces)) <= 14
        path.write_bytes(b"abcdefghi\r\njkl")
        assert texts(TextSource(path)) == ["abcdefghi\n", "jkl"]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfw1 w2")
    assert texts(TextSource(path)) == ["w1 w2"]


def test_position_travels_through_json() -> None:
    position = TextPosition(1, 2, 3)
    assert position_from_json(json.loads(json.dumps([position.epoch, position.piece, position.token]))) == position
    for wrong in ([1, 2], [1, 2, -1], {"epoch": 1}, [1, 2, "3"], None):
        with pytest.raises(TrimtabError, match="three non-negative integers"):
            position_from_json(wrong)


# -- sources ---------------------------------------------------------------------------------------

ROWS = [{"text": "w1 w2", "other": "w9"}, {"text": "w3", "other": "w8"}, {"text": "w4 w5 w6", "other": "w7"}]
WANTED = [row["text"] for row in ROWS]


def _txt(folder: Path) -> Path:
    (folder / "one.txt").write_text("\n".join(WANTED))
    return folder / "one.txt"


def _folder(folder: Path) -> Path:
    (folder / "sub").mkdir()
    for name, row in zip(("a.txt", "b.txt", "sub/c.txt"), WANTED, strict=True):
        (folder / name).write_text(row)
    (folder / "ignored.bin").write_bytes(b"\xff")
    return folder


def _jsonl(folder: Path) -> Path:
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder / "t.jsonl"


def _json(folder: Path) -> Path:
    (folder / "t.json").write_text(json.dumps(ROWS))
    return folder / "t.json"


def _csv(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_csv(folder / "t.csv")
    return folder / "t.csv"


def _parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "t.parquet")
    return folder / "t.parquet"


def _saved(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def _saved_splits(folder: Path) -> Path:
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    return folder / "splits"


SOURCES: dict[str, Callable[[Path], Any]] = {
    "folder": _folder,
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "saved": _saved,
    "saved-splits": _saved_splits,
    "list": lambda folder: WANTED,
    "examples": lambda folder: ROWS,
    "dataset": lambda folder: datasets.Dataset.from_list(ROWS),
    "streamed": lambda folder: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.usefixtures("no_network")
def test_every_kind_of_source_yields_its_documents_again_and_again(name: str, tmp_path: Path) -> None:
    source = TextSource(SOURCES[name](tmp_path))
    assert texts(source) == WANTED
    assert all(piece.begins for piece in source.pieces())
    assert [texts(source, start) for start in (1, 2, 3)] == [WANTED[1:], WANTED[2:], []]
    assert texts(source) == WANTED


def test_a_text_file_is_one_document_and_paths_may_be_text(tmp_path: Path) -> None:
    assert texts(TextSource(str(_txt(tmp_path)))) == ["\n".join(WANTED)]
    (tmp_path / "b.md").write_text("# w9")
    assert texts(TextSource([tmp_path / "b.md", tmp_path / "one.txt"])) == ["# w9", "\n".join(WANTED)]


def test_a_name_with_brackets_is_a_name_and_no_pattern(tmp_path: Path) -> None:
    odd = _jsonl(tmp_path).rename(tmp_path / "t[1]*.jsonl")
    assert texts(TextSource(odd)) == WANTED


@pytest.fixture
def pandas_leaves_files_open() -> Iterator[None]:
    """Where its reading is broken off; they are closed here, while the warning of it is silenced."""
    yield
    gc.collect()


def breaks_off(test: Callable[..., None]) -> Callable[..., None]:
    """For tests in which a CSV file may not be read to its end."""
    silent = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
    return pytest.mark.usefixtures("pandas_leaves_files_open")(silent(test))


@breaks_off
@pytest.mark.parametrize("name", ["jsonl", "csv", "parquet", "saved", "examples", "dataset"])
def test_another_column_can_be_named_and_a_missing_one_lists_what_is_there(name: str, tmp_path: Path) -> None:
    given_source = SOURCES[name](tmp_path)
    assert texts(TextSource(given_source, column="other")) == ["w9", "w8", "w7"]
    with pytest.raises(TrimtabError, match=r"column='texts'.*Did you mean text\?.*text, other"):
        texts(TextSource(given_source, column="texts"))


def test_without_a_usual_column_the_columns_are_listed() -> None:
    with pytest.raises(TrimtabError, match=r"column=None.*body, title"):
        texts(TextSource([{"body": "w1", "title": "w2"}]))


def test_the_split_of_a_saved_dataset_is_named(tmp_path: Path) -> None:
    saved = _saved_splits(tmp_path)
    assert texts(TextSource(saved, split="test")) == ["w1 w2"]
    with pytest.raises(TrimtabError, match=r"split='tets'.*Did you mean test\?"):
        texts(TextSource(saved, split="tets"))


# -- conversations ---------------------------------------------------------------------------------

CONVERSATION = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


def test_conversations_go_through_the_chat_template_with_one_bos_alone(tmp_path: Path) -> None:
    chat = tokenizer("llama")
    chat.chat_template = "{{ bos_token }}" + TEMPLATE
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CONVERSATION}) + "\n")
    for given_source in ([{"messages": CONVERSATION}], tmp_path / "chat.jsonl"):
        assert texts(TextSource(given_source, chat_tokenizer=chat)) == ["<user>w1<assistant>w2"]
    named = TextSource([{"dialogue": CONVERSATION}], column="dialogue", chat_tokenizer=chat)
    assert texts(named) == ["<user>w1<assistant>w2"]


def test_conversations_without_a_template_are_refused() -> None:
    for chat in (None, tokenizer("llama")):
        with pytest.raises(TrimtabError, match="no chat template"):
            texts(TextSource([{"messages": CONVERSATION}], chat_tokenizer=chat))


def test_a_template_that_refuses_a_conversation_is_bad_input() -> None:
    chat = tokenizer("llama")
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TrimtabError, match="chat template refuses: roles must alternate"):
        texts(TextSource([{"messages": CONVERSATION}], chat_tokenizer=chat))


# -- bad input -------------------------------------------------------------------------------------


def test_bytes_that_are_not_utf8_name_file_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"line one\n" * 10 + "caf\xe9 au lait".encode("latin-1"))
    with mock.patch.object(text_module, "PIECE_CHARACTERS", 16):
        reading = TextSource(path).pieces()
        assert next(reading).text == "line one\nline one\n"
        with pytest.raises(TrimtabError, match=r"latin\.txt' is not UTF-8: byte 0xe9 at offset 93"):
            list(reading)


def test_a_character_cut_off_by_the_end_of_the_file_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "cut.txt"
    path.write_bytes("w1 é".encode()[:-1])
    with pytest.raises(TrimtabError, match="byte 0xc3 at offset 3"):
        texts(TextSource(path))


@breaks_off
@pytest.mark.parametrize(
    ("name", "content"),
    [("t.jsonl", '{"text": "caf\xe9"}\n'), ("t.csv", "text\ncaf\xe9\n")],
)
def test_tables_that_are_not_utf8_name_file_and_offset(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(TrimtabError, match=rf"{name}' is not UTF-8: byte 0xe9 at offset {content.index(chr(0xE9))}"):
        texts(TextSource(tmp_path / name))


@breaks_off
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl", b'{"text": "w1"}\n{"text":\n'),
        ("t.json", b"[1, 2"),
        ("t.parquet", b"nonsense"),
        ("t.csv", b"text\nw1\nw1,w2\n"),
    ],
)
def test_damaged_tables_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrimtabError, match=rf"{name}' cannot be read"):
        texts(TextSource(tmp_path / name))


def test_words_that_pandas_takes_for_missing_are_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\nNone\nNA\nw1\n")
    assert texts(TextSource(tmp_path / "t.csv")) == ["None", "NA", "w1"]


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.csv", "t.parquet"])
@pytest.mark.parametrize("repeat", [False, True])
def test_empty_files_are_empty_text(name: str, repeat: bool, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(TrimtabError, match=rf"{name}' is empty: 0 tokens"):
        next(pack(TextSource(tmp_path / name), TOKENIZERS["llama"], 8, repeat=repeat))


@pytest.mark.parametrize("documents", [[], ["", " "]])
@pytest.mark.parametrize("start", [None, TextPosition()])
def test_no_text_is_refused_whether_the_start_is_given_or_not(documents: list[str], start: TextPosition | None) -> None:
    for repeat in (False, True):
        with pytest.raises(TrimtabError, match="'list' is empty"):
            next(pack(TextSource(documents), TOKENIZERS["llama"], 8, start=start, repeat=repeat))


def test_too_short_a_text_says_what_it_has_and_what_it_needs() -> None:
    source = TextSource(["w1 w2", "w3"])
    with pytest.raises(TrimtabError, match="too short: 5 tokens, and one sequence of context=9 needs 8"):
        next(pack(source, TOKENIZERS["llama"], 9))
    assert len(list(islice(pack(source, TOKENIZERS["llama"], 9, repeat=True), 3))) == 3
    with pytest.raises(TrimtabError, match=r"too short: 10 tokens in two passes, and .* context=12 needs 11"):
        next(pack(source, TOKENIZERS["llama"], 12, repeat=True))


def test_context_must_leave_room_for_text() -> None:
    with pytest.raises(TrimtabError, match=r"context=2 leaves no room.*at least 3"):
        next(pack(TextSource(DOCUMENTS), TOKENIZERS["bert"], 2))


def test_what_can_be_read_only_once_is_refused(tmp_path: Path) -> None:
    path = _txt(tmp_path)
    with path.open() as file:
        for once in ((word for word in WORDS), iter(WORDS), map(str, WORDS), file):
            with pytest.raises(TrimtabError, match="can be read only once"):
                TextSource(once)


def test_a_dictionary_of_splits_is_refused_rather_than_read_as_their_names() -> None:
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))
    with pytest.raises(TrimtabError, match="DatasetDict holds 'train': give one of its values"):
        TextSource(splits)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for missing in (tmp_path / "none", str(tmp_path / "none"), str(tmp_path / "none.txt"), "none.jsonl"):
        with pytest.raises(TrimtabError, match=r"none.*does not exist"):
            TextSource(missing)
    with pytest.raises(TrimtabError, match=r"folder without \.txt files"):
        TextSource(tmp_path)
    (tmp_path / "a.docx").touch()
    with pytest.raises(TrimtabError, match=r"extension='\.docx'.*\.txt"):
        TextSource(tmp_path / "a.docx")
    with pytest.raises(TrimtabError, match=r"cannot be a path.*list of strings"):
        TextSource("once upon a time " * 400)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "nobody/nothing:english"])
def test_a_named_dataset_that_cannot_be_had_is_bad_input(name: str) -> None:
    with pytest.raises(TrimtabError, match=f"'{name}' is neither a file, a folder, nor a dataset to be had"):
        texts(TextSource(name))


@pytest.mark.parametrize("items", [[3], [None], [["w1"]]])
def test_items_that_are_no_text_are_refused(items: list[Any]) -> None:
    with pytest.raises(TrimtabError, match="accepted: str or mapping"):
        texts(TextSource(items))


@pytest.mark.parametrize("value", [3, None, [], ["w1"], {"role": "user"}])
def test_columns_that_hold_no_text_are_refused(value: Any) -> None:
    with pytest.raises(TrimtabError, match=r"column 'text' holds .*; accepted: str or a list of messages"):
        texts(TextSource([{"text": value}]))


def test_a_tokenizer_whose_frame_cannot_be_told_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<bos>": 0, "w1": 1}, unk_token="w1"))
    backend.normalizer = normalizers.Replace("a", "")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    silent = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")
    with pytest.raises(TrimtabError, match="reads 'a' as"):
        next(pack(TextSource(["w1"]), silent, 4))


# -- identity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_the_digest_stays_with_the_text_and_changes_with_column_and_split(name: str, tmp_path: Path) -> None:
    given_source = SOURCES[name](tmp_path)
    digest = TextSource(given_source).digest
    assert TextSource(given_source).digest == digest
    assert TextSource(given_source, column="other").digest != digest
    assert TextSource(given_source, split="test").digest != digest


def test_the_digest_changes_with_the_text(tmp_path: Path) -> None:
    path = _txt(tmp_path)
    before = TextSource(path).digest
    path.write_text(path.read_text()[:-1] + "9")
    assert TextSource(path).digest != before
    lists = [["w1", "w2"], ["w1", "w3"], ["w1", "w2", "w2"], ["w1 w2"], []]
    assert len({TextSource(documents).digest for documents in lists}) == len(lists)

"""The examples that a command line names: preference pairs, labelled completions, prompts; plain or conversational.

What comes out are `datasets` with the columns that TRL's trainers read. Text stays text: the trainer tokenizes it, and
renders conversations (lists of role and content) in the tokenizer's chat template.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from trimtab.core.errors import TrimtabError, unknown
from trimtab.core.progress import console

__all__ = [
    "DataSettings",
    "digest",
    "labelled_completions",
    "load_examples",
    "preference_pairs",
    "prompts",
    "set_chat_template",
    "within_length",
]

TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PAIRS = "prompt, chosen, rejected (or chosen and rejected alone, with the prompt in front of both)"
LABELLED = "prompt, completion, label"
ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles in conversations of "from" and "value"."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The examples that are trained on.

    Args:
        data: .jsonl, .json, .csv or .parquet file, saved dataset, or name on the hub (owner/name:config)
        split: split of a named or saved dataset
        examples: so many of them, drawn by the seed; default: all
        chat_template: file with a Jinja template for conversations; default: the tokenizer's own
    """

    data: str
    split: str = "train"
    examples: int | None = None
    chat_template: Path | None = None


# -- reading ---------------------------------------------------------------------------------------


def load_examples(settings: DataSettings, *, seed: int) -> datasets.Dataset:
    """The examples, in their order, or `settings.examples` of them in a random one.

    Raises TrimtabError for what does not exist, cannot be read, or is empty.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if settings.examples is not None and settings.examples < 1:
        raise TrimtabError(f"examples={settings.examples} must be at least 1")
    try:
        examples = _open(settings.data, settings.split)
    except TrimtabError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # Arrow's and pandas's are ValueErrors
        what = "cannot be read" if Path(settings.data).exists() else "is neither a file nor a dataset to be had"
        raise TrimtabError(f"data={settings.data!r} {what}: {error.__cause__ or error}") from error
    if not len(examples):
        raise TrimtabError(f"data={settings.data!r} holds no example")
    if settings.examples is None:
        return examples
    if settings.examples > len(examples):
        raise TrimtabError(f"examples={settings.examples}, but data={settings.data!r} holds {len(examples):,}")
    return examples.shuffle(seed=seed).select(range(settings.examples))


def _open(data: str, split: str) -> datasets.Dataset:
    path = Path(data)
    if path.is_dir():
        if not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
            raise TrimtabError(f"data={data!r} is a folder; accepted: one that datasets' save_to_disk wrote, or a file")
        loaded = datasets.load_from_disk(data)
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if split not in loaded:
            raise unknown("split", split, loaded)
        return loaded[split]
    if path.is_file():
        if path.suffix not in TABLES:
            raise unknown("data's extension", path.suffix, TABLES)
        if not path.stat().st_size:
            raise TrimtabError(f"data={data!r} holds no example")
        return _table(path)
    if path.suffix in TABLES or data.count("/") > 1:
        raise TrimtabError(f"data={data!r} does not exist")
    name, _, config = data.partition(":")
    return datasets.load_dataset(name, config or None, split=split)


def _table(path: Path) -> datasets.Dataset:
    # What pandas takes for missing, such as "None", is text here. The name is a pattern to `datasets`.
    options = {"keep_default_na": False} if path.suffix == ".csv" else {}
    return datasets.load_dataset(TABLES[path.suffix], data_files=glob.escape(str(path)), split="train", **options)


def digest(examples: datasets.Dataset) -> str:
    """A checksum of the number of examples and of up to 64 of them, evenly spaced."""
    count = min(len(examples), 64)
    sampled = [examples[i * (len(examples) - 1) // max(count - 1, 1)] for i in range(count)]
    return hashlib.sha256(json.dumps([len(examples), sampled], default=str).encode()).hexdigest()


def set_chat_template(tokenizer: Any, template: Path | None) -> None:
    """Give the tokenizer the template of a file, if there is one."""
    if template is not None:
        tokenizer.chat_template = template.read_text(encoding="utf-8")


# -- what the trainers read ------------------------------------------------------------------------


def preference_pairs(examples: datasets.Dataset, tokenizer: Any) -> datasets.Dataset:
    """Columns prompt, chosen, rejected. Without prompt, it is what chosen and rejected begin with alike."""
    from trl import extract_prompt

    names = ["prompt", "chosen", "rejected"] if "prompt" in examples.column_names else ["chosen", "rejected"]
    _check(examples, names, tokenizer, accepted=PAIRS)
    pairs = examples.select_columns(names)
    return pairs if "prompt" in names else pairs.map(extract_prompt)


def labelled_completions(examples: datasets.Dataset, tokenizer: Any, *, seed: int) -> datasets.Dataset:
    """Columns prompt, completion, label (desirable or not), in a random order; pairs give one of each.

    The order is random because KTO takes its batches one after another, and estimates a divergence from the
    completions of a batch: neighbours should have different prompts and both labels.
    """
    from trl import unpair_preference_dataset

    if {"chosen", "rejected"} <= set(examples.column_names):
        return unpair_preference_dataset(preference_pairs(examples, tokenizer)).shuffle(seed=seed)
    accepted = f"{LABELLED}; or pairs: {PAIRS}"
    _check(examples, ["prompt", "completion"], tokenizer, accepted=accepted, also=["label"])
    labels = set(examples.unique("label"))
    if not labels <= {False, True}:  # 0 and 1 equal them
        raise TrimtabError(f"column 'label' holds {_some(labels)}; accepted: true (desirable) and false")
    if len(labels) < 2:
        raise TrimtabError(
            f"column 'label' is {labels.pop()} everywhere; accepted: both desirable and undesirable ones"
        )
    labelled = examples.select_columns(["prompt", "completion", "label"])
    return labelled.cast_column("label", datasets.Value("bool")).shuffle(seed=seed)


def prompts(
    examples: datasets.Dataset, tokenizer: Any, *, prompt_tokens: int | None = None, system_prompt: str | None = None
) -> datasets.Dataset:
    """Column prompt: that of the examples, what their conversations hold before the first answer, or openings of texts.

    prompt_tokens: length of the openings of the column text, needed for these; shorter texts are left out.
    system_prompt: put before every conversation that has none.
    """
    columns = examples.column_names
    if "prompt" in columns:
        _check(examples, ["prompt"], tokenizer, accepted="prompt")
        found = examples.select_columns(["prompt"])
    elif "messages" in columns or "conversations" in columns:
        column = "messages" if "messages" in columns else "conversations"
        found = examples.map(lambda example: {"prompt": _before_answer(example[column])}, remove_columns=columns)
        _check(found, ["prompt"], tokenizer, accepted="conversations")
    elif "text" in columns and prompt_tokens is not None:
        found = _openings(examples, tokenizer, prompt_tokens)
    else:
        accepted = "prompt; messages or conversations; or text together with prompt_tokens"
        raise TrimtabError(f"data has the columns {_some(columns)}; accepted: {accepted}")
    if prompt_tokens is not None and "text" not in columns:
        raise TrimtabError(f"prompt_tokens={prompt_tokens} is for a column text; the data has {_some(columns)}")
    if system_prompt is None:
        return found
    if isinstance(found[0]["prompt"], str):
        raise TrimtabError("system_prompt is for conversations; the prompts are plain text")
    system = {"role": "system", "content": system_prompt}

    def with_system(example: Mapping[str, Any]) -> dict[str, Any]:
        given = example["prompt"]
        return {"prompt": given if given[0]["role"] == "system" else [system, *given]}

    return found.map(with_system)


def within_length(examples: datasets.Dataset, tokenizer: Any, limit: int) -> datasets.Dataset:
    """The examples whose prompt has less than `limit` tokens; says how many are left out.

    Raises TrimtabError if all are.
    """

    def fits(example: Mapping[str, Any]) -> bool:
        return len(prompt_ids(tokenizer, example["prompt"])) < limit

    kept = examples.filter(fits)
    if not len(kept):
        raise TrimtabError(f"every prompt of the data has {limit} tokens or more; accepted: shorter ones")
    which = f"examples left out, whose prompt has {limit:,} tokens or more"
    _say_left_out(len(examples) - len(kept), len(examples), which)
    return kept


def _say_left_out(count: int, of: int, which: str) -> None:
    if count:
        console(stderr=True).print(f"trimtab: {count:,} of {of:,} {which}", highlight=False, soft_wrap=True)


def prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    """The tokens of a prompt, of a conversation up to where the answer begins."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
        ).input_ids
    except jinja2.TemplateError as error:
        raise TrimtabError(f"the chat template refuses a conversation of the data: {error}") from error


def _before_answer(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What comes before the first answer, as role and content."""
    found = []
    for message in messages:
        name = message.get("role") or message.get("from") or ""
        role = ROLES.get(name, name)
        if role == "assistant":
            break
        found.append({"role": role, "content": message.get("content") or message.get("value") or ""})
    return found


def _openings(examples: datasets.Dataset, tokenizer: Any, tokens: int) -> datasets.Dataset:
    if tokens < 1:
        raise TrimtabError(f"prompt_tokens={tokens} must be at least 1")
    _check(examples, ["text"], tokenizer, accepted="text")

    def opening(batch: Mapping[str, list[str]]) -> dict[str, list[str]]:
        encoded = tokenizer(batch["text"], add_special_tokens=False, verbose=False).input_ids
        return {"prompt": [tokenizer.decode(ids[:tokens]) for ids in encoded if len(ids) >= tokens]}

    found = examples.map(opening, batched=True, remove_columns=examples.column_names)
    if not len(found):
        raise TrimtabError(f"prompt_tokens={tokens}: every text of the data is shorter")
    _say_left_out(len(examples) - len(found), len(examples), f"texts left out, which have less than {tokens:,} tokens")
    return found


# -- checks ----------------------------------------------------------------------------------------


def _check(
    examples: datasets.Dataset, columns: list[str], tokenizer: Any, *, accepted: str, also: list[str] | None = None
) -> None:
    """The columns are there and whole, and those of `columns` hold all text or all conversations."""
    missing = [name for name in (*columns, *(also or ())) if name not in examples.column_names]
    if missing:
        raise TrimtabError(f"data has the columns {_some(examples.column_names)}; accepted: {accepted}")
    for name in (*columns, *(also or ())):
        nulls = examples.data.column(name).null_count
        if nulls:
            raise TrimtabError(f"column {name!r} is empty in {nulls:,} examples; accepted: a value in each")
    forms = {name: _form(name, examples[0][name]) for name in columns}
    if len(set(forms.values())) > 1:
        held = ", ".join(f"{form} in {name!r}" for name, form in forms.items())
        raise TrimtabError(f"data holds {held}; accepted: text in all of them or conversations in all of them")
    if "conversations" in forms.values() and not tokenizer.chat_template:
        raise TrimtabError(
            "the data holds conversations, and the tokenizer has no chat template; accepted: chat_template, a file "
            "with one, or columns of plain text"
        )


def _form(name: str, value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "content"} <= value[0].keys():
        return "conversations"
    raise TrimtabError(
        f"column {name!r} holds {type(value).__name__} ({str(value)[:60]}); accepted: text, or a list of messages "
        "with role and content"
    )


def _some(names: Iterable[object]) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[:12]) + (f", … ({len(listed)} in all)" if len(listed) > 12 else "")

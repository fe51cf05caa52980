"""Micro models: two small language models that ship with the package, and the recipes that made them.

    micro-llama   causal: Llama, 4 blocks, d_model 128, 984 thousand parameters, 256 positions
    micro-bert    masked: BERT, 4 blocks, d_model 128, 885 thousand parameters, 64 positions

What they have learnt of the stories: both know which kind of word stands where; micro-llama goes on in the
sentiment that a story began with, but mixes its people and topics; micro-bert does not yet see a story's sentiment
(between words of either it guesses), so that no experiment can rest on that.

Both share one byte-level BPE of 1,536 tokens (<pad>, <bos>, <eos>, <mask> among them) and the text they are
trained on: the package's English and made-up stories, half and half by tokens. A recipe is the dataclass below
and runs in minutes on one core; `prepare` follows it. On an equal processor and equal versions of the libraries
it makes the very same weights. Beside the weights lies `recipe.json`: the recipe, the checksums of text and
files, the losses of the first steps and on held-out text, and the least that a unigram model has there.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from trimtab.core.errors import TrimtabError, unknown
from trimtab.gallery.testbeds.text import ENGLISH, ENGLISH_HELD_OUT, stories

__all__ = ["MICRO_BERT", "MICRO_LLAMA", "MicroRecipe", "micro_model", "prepare"]

CHECKPOINTS = Path(__file__).with_name("checkpoints")
CARD = "recipe.json"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>")
STEPS_NOTED = 5


@dataclass(frozen=True)
class MicroRecipe:
    """All that a micro model is made from.

    kind: "causal" (the next token) or "masked" (as BERT). warmup: steps in which the learning rate rises to
    `learning_rate`, from where it falls to 0 as a cosine. context: tokens a sequence. n_stories: made-up
    stories beside the English text. mask_rate: the part of the tokens that training asks for, if masked.
    """

    name: str
    kind: Literal["causal", "masked"]
    learning_rate: float
    steps: int
    warmup: int = 100
    batch_size: int = 8
    context: int = 256
    weight_decay: float = 0.1
    d_model: int = 128
    d_mlp: int = 384
    n_layers: int = 4
    n_heads: int = 4
    vocab_size: int = 1536
    n_stories: int = 4000
    initializer_range: float = 0.02
    mask_rate: float = 0.0
    seed: int = 0


MICRO_LLAMA = MicroRecipe("micro-llama", "causal", learning_rate=4e-3, steps=1200)
# What gets so small a BERT off the unigram plateau within minutes, beside the positions of `_new_model`: short
# sequences, larger first weights, and more masks than BERT's own 15%.
MICRO_BERT = MicroRecipe(
    "micro-bert",
    "masked",
    learning_rate=1.5e-3,
    steps=1200,
    batch_size=32,
    context=64,
    initializer_range=0.06,
    mask_rate=0.3,
)
RECIPES = {recipe.name: recipe for recipe in (MICRO_LLAMA, MICRO_BERT)}


def micro_model(name: str) -> Path:
    """The folder of the committed checkpoint `name`, for any `from_pretrained`, once its checksums are right.

    Raises TrimtabError for an unknown name, and for a file that is missing or is not what the recipe made.
    """
    if name not in RECIPES:
        raise unknown("name", name, RECIPES)
    folder = CHECKPOINTS / name
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    for file, sha256 in card["sha256"].items():
        path = folder / file
        if not path.is_file() or _sha256(path) != sha256:
            raise TrimtabError(
                f"micro model {name!r}: {path} is missing or has other content than {CARD} says; "
                "put it back from the repository, or make the model anew with prepare()"
            )
    return folder


def prepare(out: str | Path, names: Sequence[str] | None = None, *, steps: int | None = None) -> list[Path]:
    """Make the micro models `names` (all of them) by their recipes, and return their folders in `out`.

    steps: train the first so many steps of the recipe only, to try it. Raises TrimtabError for an unknown name.
    """
    from trimtab.core.checkpoint import write_directory

    chosen = list(RECIPES) if names is None else list(names)
    for name in chosen:
        if name not in RECIPES:
            raise unknown("names", name, RECIPES)
    folders = [Path(out) / name for name in chosen]
    for name, folder in zip(chosen, folders, strict=True):
        with write_directory(folder) as aside, _one_thread():
            _follow(RECIPES[name], aside, steps)
    return folders


def _follow(recipe: MicroRecipe, folder: Path, steps: int | None) -> None:
    """Train the tokenizer and the model of `recipe` and write them with their card into `folder`."""
    start = time.perf_counter()
    documents = _documents(recipe)
    tokenizer = _train_tokenizer(recipe, documents)
    sequences = _sequences(documents, tokenizer, recipe.context)
    model = _new_model(recipe, tokenizer)
    losses = _train(model, tokenizer, sequences, recipe, recipe.steps if steps is None else steps)
    seconds = time.perf_counter() - start
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = {
        "recipe": asdict(recipe),
        "steps": len(losses),
        "losses_of_first_steps": losses[:STEPS_NOTED],
        "held_out": _held_out(model, tokenizer, recipe),
        "sha256_of_text": hashlib.sha256("".join(documents).encode()).hexdigest(),
        "seconds": round(seconds),
        "machine": f"{platform.machine()}, 1 thread",
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "sha256": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


# -- text and tokens -------------------------------------------------------------------------------


def _documents(recipe: MicroRecipe) -> list[str]:
    """The English text in passages of some thousand characters, and stories, in a random order."""
    passages = _passages(ENGLISH.read_text(encoding="utf-8"))
    documents = [*passages, *(story.text for story in stories(recipe.n_stories, seed=recipe.seed))]
    rng = random.Random(recipe.seed)
    return sorted(documents, key=lambda _: rng.random())  # the order that random() draws is promised to stay


def _passages(text: str, characters: int = 1000) -> list[str]:
    """`text` cut at empty lines into passages of at least `characters`."""
    passages = [""]
    for paragraph in re.split(r"\n\n+", text.strip()):
        if len(passages[-1]) >= characters:
            passages.append("")
        passages[-1] += "\n\n" * bool(passages[-1]) + paragraph
    return passages


def _train_tokenizer(recipe: MicroRecipe, documents: Iterable[str]) -> Any:
    """A byte-level BPE: every string has tokens, and decoding gives the string back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    pad, bos, eos, mask = SPECIAL_TOKENS
    masked = recipe.kind == "masked"
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}" if masked else f"{bos} $A",
        special_tokens=[(token, bpe.token_to_id(token)) for token in (bos, eos)],
    )
    roles = {"cls_token": bos, "sep_token": eos, "mask_token": mask} if masked else {"mask_token": mask}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
        **roles,
    )


def _sequences(documents: Sequence[str], tokenizer: Any, context: int) -> Any:
    """The documents packed: [n_sequences, context] int64."""
    import torch

    from trimtab.core.text import TextSource, pack

    return torch.stack([packed.input_ids for packed in pack(TextSource(documents), tokenizer, context)])


# -- the model and its training --------------------------------------------------------------------


def _new_model(recipe: MicroRecipe, tokenizer: Any) -> Any:
    import torch
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.d_model,
        "intermediate_size": recipe.d_mlp,
        "num_hidden_layers": recipe.n_layers,
        "num_attention_heads": recipe.n_heads,
        "max_position_embeddings": recipe.context,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": recipe.initializer_range,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    torch.manual_seed(recipe.seed)
    if recipe.kind == "causal":
        # Two heads share their keys and values, as in larger models of today.
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=recipe.n_heads // 2))
    config = BertConfig(**shape, type_vocab_size=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForMaskedLM(config)
    # Positions that start as sinusoids tell neighbours from the first step; as noise they take most of the steps.
    position = torch.arange(recipe.context).unsqueeze(1)
    angle = position * 10000.0 ** -(torch.arange(0, recipe.d_model, 2) / recipe.d_model)
    with torch.no_grad():
        positions = model.bert.embeddings.position_embeddings.weight
        positions.copy_(0.15 * torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1))
    return model


def _train(model: Any, tokenizer: Any, sequences: Any, recipe: MicroRecipe, steps: int) -> list[float]:
    """Train `model` for the first `steps` steps of `recipe`; the loss of each."""
    import tempfile

    from torch.optim import AdamW
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from transformers import get_cosine_schedule_with_warmup as cosine

    with tempfile.TemporaryDirectory() as unused:
        arguments = TrainingArguments(
            output_dir=unused,
            max_steps=steps,
            per_device_train_batch_size=recipe.batch_size,
            seed=recipe.seed,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        optimizer = AdamW(
            model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
        )
        trainer = Trainer(
            model,
            arguments,
            data_collator=_collator(tokenizer, recipe, recipe.mask_rate),
            train_dataset=[{"input_ids": sequence} for sequence in sequences],
            optimizers=(optimizer, cosine(optimizer, recipe.warmup, recipe.steps)),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _collator(tokenizer: Any, recipe: MicroRecipe, mask_rate: float) -> Any:
    from transformers import DataCollatorForLanguageModeling

    if recipe.kind == "causal":
        return DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=mask_rate, seed=recipe.seed)


# -- what it has learnt ----------------------------------------------------------------------------


def _held_out(model: Any, tokenizer: Any, recipe: MicroRecipe) -> dict[str, dict[str, float]]:
    """Nats a token on English and on stories that were not trained on: `loss` and `unigram`.

    A masked model is asked for 15% of the tokens. unigram: the entropy of these texts' own token frequencies,
    which no model without context can go below.
    """
    texts = {
        "english": _passages(ENGLISH_HELD_OUT.read_text(encoding="utf-8")),
        "stories": [story.text for story in stories(400, seed=recipe.seed + 1)],
    }
    result = {}
    for name, documents in texts.items():
        ids = _sequences(documents, tokenizer, recipe.context)
        frequency = ids.unique(return_counts=True)[1] / ids.numel()
        result[name] = {
            "loss": round(_loss(model, _collator(tokenizer, recipe, mask_rate=0.15), ids), 4),
            "unigram": round(-float((frequency * frequency.log()).sum()), 4),
        }
    return result


def _loss(model: Any, collator: Any, sequences: Any) -> float:
    import torch

    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in sequences.split(16):
            inputs = collator([{"input_ids": sequence} for sequence in batch])
            scored = int((inputs["labels"] != -100).sum())
            total += model(**inputs).loss.item() * scored
            tokens += scored
    return total / tokens


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are added in an order that the number of threads decides."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

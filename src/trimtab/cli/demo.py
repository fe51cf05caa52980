"""`trimtab demo`: the whole path on a real model — harvest, train, measure, save, reload, explain, show."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import trimtab
from trimtab.cli.models import load_model
from trimtab.core.files import write_file
from trimtab.core.progress import Progress
from trimtab.core.text import TextSource
from trimtab.gallery import load
from trimtab.gallery.dictionaries import dictionary_page, read_history, training_curves
from trimtab.gallery.report import render
from trimtab.gallery.run import run as run_experiments
from trimtab.gallery.testbeds.micro import micro_model
from trimtab.gallery.testbeds.real_models import RealModelUnavailable, gemma3_270m, shakespeare_text
from trimtab.gallery.testbeds.text import ENGLISH, ENGLISH_HELD_OUT
from trimtab.sae import DictionaryConfig, Harvest, HarvestConfig, TopKSAE, TrainingConfig, evaluate, train

__all__ = ["demo"]


@dataclass(frozen=True)
class _Setting:
    """What is read, and how much of it."""

    model: Path
    text: TextSource
    held_out: TextSource
    places: tuple[str, ...]
    n_latents: int
    tokens: int
    explained_tokens: int
    evaluated_tokens: int


def demo(*, out: Path = Path("demo"), tokens: int | None = None) -> None:
    """Read a language model through sparse dictionaries, beside the gallery's first experiment, into one page.

    Args:
        out: directory of everything that is written
        tokens: activations to train on; default: as many as ten minutes on two cores allow
    """
    say = Console(stderr=True).print
    setting = _setting(out)
    say(f"Trimtab {trimtab.__version__}: {setting.model.name} at {' and '.join(setting.places)}")
    model, tokenizer = load_model(str(setting.model))
    harvest = HarvestConfig(context=256, shard_tokens=16_384)
    training = TrainingConfig(
        tokens=tokens or setting.tokens, batch_size=1024, learning_rate=4e-3, checkpoint_every=100
    )
    dictionaries = [DictionaryConfig(place=p, n_latents=setting.n_latents, k=32) for p in setting.places]
    say(f"1/4 training {len(dictionaries)} dictionaries of {setting.n_latents:,} latents on {training.tokens:,} tokens")
    train(dictionaries, Harvest(model, tokenizer, setting.text, setting.places, harvest), training, out)

    say("2/4 reloading them, measuring them on text that they have not seen, and finding what their latents respond to")
    pages, table = [], Table("dictionary", "explained variance", "CE recovered", "L0", "dead")
    for place in setting.places:
        sae = TopKSAE.from_pretrained(out / place).to(model.device)
        held_out = Harvest(model, tokenizer, setting.held_out, [place], harvest)
        with Progress(f"measuring {place}", setting.evaluated_tokens, "tokens") as bar:
            evaluation = evaluate(
                sae, held_out, place=place, tokens=setting.evaluated_tokens, ce_tokens=2048, advance=bar.advance
            )
        write_file(out / place / "evaluation.json", json.dumps(evaluation.summary(), indent=2).encode())
        with Progress(f"explaining {place}", setting.explained_tokens, "tokens") as bar:
            page = dictionary_page(
                sae,
                held_out,
                place=place,
                evaluation=evaluation,
                curves=training_curves(read_history(out), place),
                tokens=setting.explained_tokens,
                advance=bar.advance,
            )
        write_file(out / place / "latents.json", page.to_json().encode())
        pages.append(page)
        table.add_row(
            str(out / place),
            f"{evaluation.explained_variance:.3f}",
            f"{evaluation.ce_recovered:.3f}",
            f"{evaluation.l0:.1f}",
            f"{evaluation.dead_fraction:.1%}",
        )
    say("3/4 the gallery's first experiment, with one seed")
    results = run_experiments([load("topk-sae")], out / "gallery", quick=True)
    say("4/4 writing the page")
    report = render(
        out / "report.html",
        title=f"{setting.model.name} through a sparse dictionary",
        results=results,
        dictionaries=pages,
    )
    Console().print(table)
    print(f"the page: {report.resolve()}")


def _setting(out: Path) -> _Setting:
    """Gemma 3 270M on Shakespeare; where its packages cannot be had, the micro model on the package's English."""
    try:
        model, text = gemma3_270m(), shakespeare_text()
    except RealModelUnavailable as error:
        print(f"!! {error}\n!! going on with the micro model that ships with Trimtab", file=sys.stderr)
        return _Setting(
            micro_model("micro-llama"),
            TextSource(ENGLISH),
            TextSource(ENGLISH_HELD_OUT),
            ("resid.1", "resid.2"),
            n_latents=2048,
            tokens=262_144,
            explained_tokens=32_768,
            evaluated_tokens=16_384,
        )
    train_text, held_out = _split(text, out)
    return _Setting(
        model,
        TextSource(train_text),
        TextSource(held_out),
        ("resid.6", "resid.9"),
        n_latents=4096,
        tokens=300_032,
        explained_tokens=65_536,
        evaluated_tokens=16_384,
    )


def _split(text: Path, out: Path) -> tuple[Path, Path]:
    """The first nine tenths of `text` to train on and the rest to measure on, as files under `out`."""
    content = text.read_text("utf-8")
    cut = content.index("\n", len(content) * 9 // 10)
    out.mkdir(parents=True, exist_ok=True)
    parts = (out / "train.txt", out / "held-out.txt")
    for path, part in zip(parts, (content[:cut], content[cut:]), strict=True):
        write_file(path, part.encode())
    return parts

"""`trimtab sae train|eval|explain|show`."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from trimtab.cli.models import Dtype, load_model
from trimtab.core.checkpoint import write_file
from trimtab.core.errors import TrimtabError, unknown
from trimtab.core.progress import Progress, console
from trimtab.core.text import TextSource
from trimtab.gallery.dictionaries import dictionary_page, place_of, read_history, training_curves
from trimtab.gallery.report import MAX_LATENTS, render
from trimtab.sae.boosted import BoostedSAE
from trimtab.sae.config import DictionaryConfig, ObjectiveName, TrainingConfig
from trimtab.sae.explanations import latents_of_text
from trimtab.sae.extended import ExtendInit
from trimtab.sae.harvest import Harvest, HarvestConfig, ShardCache, ShardSource
from trimtab.sae.jumprelu import EncoderInput, JumpReLUSAE
from trimtab.sae.kron import Activation
from trimtab.sae.metrics import area_under_curve, ev_curve
from trimtab.sae.metrics import evaluate as evaluate_sae
from trimtab.sae.mixture import Mixture
from trimtab.sae.modeling import TopKSAE
from trimtab.sae.plan import plan
from trimtab.sae.selection import Sparsifier
from trimtab.sae.trainer import train as train_dictionaries

__all__ = ["KindSettings", "ModelSettings", "TextSettings", "evaluate", "explain", "open_with_model", "show", "train"]


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The text that is read.

    Args:
        text: text file, folder, .jsonl/.csv/.parquet file, saved dataset, or name on the hub (owner/name:config)
        column: field of the examples that holds text or conversations
        split: split of a named dataset
    """

    text: str
    column: str | None = None
    split: str = "train"

    def source(self, tokenizer: Any) -> TextSource:
        """The text, conversations in the tokenizer's chat template."""
        return TextSource(self.text, column=self.column, split=self.split, chat_tokenizer=tokenizer)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The language model that a dictionary reads: what is None is as in the dictionary's training.

    Args:
        model: folder or hub name; default: the one that the dictionary was trained on
        dtype: of the language model; default: as in training
        layers: dotted path of the model's list of blocks, for unknown architectures; default: as in training
    """

    model: str | None = None
    dtype: Dtype | None = None
    layers: str | None = None


@dataclass(frozen=True, kw_only=True)
class KindSettings:
    """What all dictionaries of a run have in common.

    Args:
        target: activation to write, for transcoders; default: the one that is read
        kron_activation: of a KronSAE: mand, or one of the paper's ablations, relu_product and product
        kron_mask_inactive: of a KronSAE: silent latents are 0; false: sqrt(eps), as in the authors' listing
        objective: reconstruction from k latents; hierarchical, from every number up to k; multi_topk, from k and from
            4 k; matryoshka, from the first latents of the dictionary
        sparsifier: topk; batch_topk: k latents on average over a batch, and one threshold at inference; jumprelu:
            thresholds of each latent's own, trained towards a mean of k
        base: directory of a finished dictionary, of which what it leaves over is learned (SAE Boost)
        encoder_input: with base, what the new encoder reads: the input, or the error that the base leaves
        start: directory of a finished dictionary whose weights are the initial ones (fine-tuning)
        extend: directory of a finished dictionary whose latents stay and to which new ones are added, under one budget
        extend_init: with extend, how new latents begin: random, or as copies of the most_active old ones
        freeze_decoder: keep the random rows of the first decoder, as a control
    """

    target: str | None = None
    kron_activation: Activation = "mand"
    kron_mask_inactive: bool = True
    objective: ObjectiveName = "reconstruction"
    sparsifier: Sparsifier = "topk"
    base: str | None = None
    encoder_input: EncoderInput = "input"
    start: str | None = None
    extend: str | None = None
    extend_init: ExtendInit = "random"
    freeze_decoder: bool = False


def train(
    *,
    model: str,
    places: list[str],
    out: Path,
    n_latents: list[int] = [4096],  # noqa: B006 (never changed; jsonargparse shows it as the default)
    k: list[int] = [32],  # noqa: B006
    seeds: list[int] = [0],  # noqa: B006
    kron: list[int] = [],  # noqa: B006
    budgets: list[int] = [],  # noqa: B006
    budget_weights: list[float] = [],  # noqa: B006
    replay_text: str | None = None,
    replay_share: float = 0.1,
    dtype: Dtype = "float32",
    cache: Path | None = None,
    layers: str | None = None,
    allow_previous: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    kind: KindSettings,
    text: TextSettings,
    training: TrainingConfig,
    harvest: HarvestConfig,
) -> None:
    """Train dictionaries on a model's activations: one for every place, size, k and seed, in one pass of the model.

    Run again with the same options, it goes on from the last checkpoint under `out`.

    Args:
        model: folder or hub name of a transformers model
        places: activations to read, such as resid.6 attn.6 mlp.6 embed
        out: directory of the run
        n_latents: sizes of dictionaries
        k: latents that a token may use
        seeds: seeds of initial weights
        kron: m and n of KronSAEs, whose heads have m x n latents; default: dense encoders
        budgets: hierarchical: numbers of latents, default all of 1 to k; matryoshka: lengths of prefixes
        budget_weights: hierarchical: a weight for each of the budgets; default: equal ones
        replay_text: general text whose activations are mixed in: a file, folder or dataset as for text
        replay_share: its share of the activations
        dtype: of the language model
        cache: directory that keeps the activations for further runs
        layers: dotted path of the model's list of blocks, for unknown architectures
        allow_previous: if the last checkpoint is damaged, use the one before it
        trust_remote_code: run code that comes with the model
        dry_run: say what would run, how long, with how much memory and disk; then stop
    """
    if len(kron) not in (0, 2):
        raise TrimtabError(f"kron={kron}; accepted: two numbers, m and n")
    dictionaries = [
        DictionaryConfig(
            place=place,
            n_latents=size,
            k=active,
            kron=(kron[0], kron[1]) if kron else None,
            budgets=tuple(budgets) or None,
            budget_weights=tuple(budget_weights) or None,
            seed=seed,
            **asdict(kind),
        )
        for place, size, active, seed in itertools.product(places, n_latents, k, seeds)
    ]
    lm, tokenizer = load_model(model, dtype, trust_remote_code=trust_remote_code)
    needed = [place for dictionary in dictionaries for place in dictionary.places]
    live = Harvest(lm, tokenizer, text.source(tokenizer), needed, harvest, layers=layers)
    if dry_run:
        print(plan(dictionaries, live, training, cached=cache is not None))
        return
    shards: ShardSource = live if cache is None else ShardCache(live, cache)
    if replay_text is not None:
        general = TextSource(replay_text, chat_tokenizer=tokenizer)
        replay = Harvest(lm, tokenizer, general, needed, harvest, layers=layers)
        shards = Mixture(shards, replay, replay_share)
    finished = train_dictionaries(dictionaries, shards, training, out, allow_previous=allow_previous)
    table = Table(
        "dictionary", "loss", "L0", "dead", title=f"trained on {training.steps * training.batch_size:,} tokens"
    )
    for name, sae in finished.items():
        final = sae.config.metadata["trimtab"]["final"]
        table.add_row(str(out / name), f"{final['loss']:.4f}", f"{final['l0']:.1f}", f"{final['dead_fraction']:.1%}")
    console().print(table)


def evaluate(
    directory: Path,
    *,
    k: int | None = None,
    budgets: list[int] = [],  # noqa: B006
    tokens: int = 32_768,
    ce_tokens: int = 8_192,
    trust_remote_code: bool = False,
    text: TextSettings,
    model: ModelSettings,
) -> None:
    """Measure a dictionary on text, best on one that it was not trained on; writes DIRECTORY/evaluation.json.

    One that was trained with --base is measured together with its base.

    Args:
        directory: a dictionary, as `trimtab sae train` writes them
        k: measure it with so many latents of a token; default: as many as it has
        budgets: explained variance with so many latents too, for each of these, and the area under the curve
        tokens: tokens for explained variance, L0 and densities
        ce_tokens: tokens for the loss of the model with the reconstruction spliced in
        trust_remote_code: run code that comes with the model
    """
    sae, place, target = _open(directory)
    if budgets and (target is not None or isinstance(sae, JumpReLUSAE)):
        raise TrimtabError(f"budgets={budgets} are for TopK autoencoders; {str(directory)!r} is another dictionary")
    for name, wanted in (("budgets", budgets), ("k", [] if k is None else [k])):
        if wanted and not 1 <= min(wanted) <= max(wanted) <= sae.config.k:
            raise TrimtabError(f"{name}={wanted} must lie between 1 and the dictionary's k={sae.config.k}")
    lm, tokenizer, layers = _model(sae, model, trust_remote_code)
    live = Harvest(
        lm, tokenizer, text.source(tokenizer), [place, target or place], _trained_harvest(sae), layers=layers
    )
    measured = _with_base(sae, live.model)
    if k is not None and isinstance(measured, BoostedSAE):
        raise TrimtabError(f"k={k} has no meaning for a dictionary and its base together; accepted: leave it out")
    with Progress("evaluating", tokens, "tokens") as bar:
        evaluation = evaluate_sae(
            measured,
            live,
            place=place,
            target=target,
            k=k,
            tokens=tokens,
            ce_tokens=ce_tokens,
            advance=bar.advance,
        )
    found = evaluation.summary() | ({"k": k} if k is not None else {})
    if budgets:
        sequences = -(-tokens // live.config.context)
        curve = ev_curve(sae, torch.cat([f.rows(place) for f in live.forwards(sequences=sequences)]), budgets)
        found |= {f"explained_variance_at_{j}": value for j, value in curve.items()}
        found["area_under_curve"] = area_under_curve(curve)
    write_file(directory / "evaluation.json", json.dumps(found, indent=2).encode())
    table = Table("measure", "value", title=str(directory))
    for name, value in found.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)


def explain(
    directory: Path,
    *,
    tokens: int = 131_072,
    n_latents: int = 2_000,
    contexts: int = 8,
    trust_remote_code: bool = False,
    text: TextSettings,
    model: ModelSettings,
) -> None:
    """Find what latents respond to; writes DIRECTORY/latents.json and the page DIRECTORY/report.html.

    Args:
        directory: a dictionary, as `trimtab sae train` writes them
        tokens: tokens of text to look through
        n_latents: latents to explain, at most 2,000
        contexts: contexts for each latent
        trust_remote_code: run code that comes with the model
    """
    if not 1 <= n_latents <= MAX_LATENTS:
        raise TrimtabError(f"n_latents={n_latents} must lie between 1 and {MAX_LATENTS}")
    sae, place, live = open_with_model(directory, text, model, trust_remote_code)
    with Progress("explaining", tokens, "tokens") as bar:
        page = dictionary_page(
            sae,
            live,
            place=place,
            curves=training_curves(read_history(directory.parent), directory.name),
            tokens=tokens,
            n_latents=n_latents,
            contexts=contexts,
            advance=bar.advance,
        )
    write_file(directory / "latents.json", page.to_json().encode())
    report = render(directory / "report.html", title=page.title, results=None, dictionaries=[page])
    print(f"{len(page.latents)} latents: {report}")


def show(
    directory: Path,
    *,
    prompt: str,
    top: int = 5,
    trust_remote_code: bool = False,
    model: ModelSettings,
) -> None:
    """Show which latents fire on a text, token by token, and the tokens that each promotes.

    Args:
        directory: a dictionary, as `trimtab sae train` writes them
        prompt: the text
        top: latents of a token to show
        trust_remote_code: run code that comes with the model
    """
    if top < 1:
        raise TrimtabError(f"top={top} must be at least 1")
    sae, place, _ = _open_reader(directory)
    lm, tokenizer, layers = _model(sae, model, trust_remote_code)
    bound = "" if isinstance(sae, JumpReLUSAE) else f" of at most {sae.config.k}"
    table = Table("token", f"strongest {top}{bound} latents", title=f"{directory}, {place}")
    for row in latents_of_text(sae, lm, tokenizer, prompt, place=place, layers=layers):
        latents = "  ".join(f"{latent}: {value:.3g}" for latent, value in row.latents[:top])
        table.add_row(repr(tokenizer.decode([row.token_id])), latents or "(not read)")
    Console().print(table)


def _open(directory: Path) -> tuple[TopKSAE, str, str | None]:
    """The dictionary, the place that it reads, and the one that it writes if another."""
    sae = TopKSAE.from_pretrained(directory)
    return (sae, *place_of(sae))


def open_with_model(
    directory: Path, text: TextSettings, model: ModelSettings, trust_remote_code: bool
) -> tuple[TopKSAE, str, Harvest]:
    """A dictionary that reads the model itself, the place that it reads, and the model's activations on a text."""
    sae, place, target = _open_reader(directory)
    lm, tokenizer, layers = _model(sae, model, trust_remote_code)
    read = [place, target or place]
    return sae, place, Harvest(lm, tokenizer, text.source(tokenizer), read, _trained_harvest(sae), layers=layers)


def _open_reader(directory: Path) -> tuple[TopKSAE, str, str | None]:
    """`_open`, for a dictionary that reads the model itself."""
    sae, place, target = _open(directory)
    if isinstance(sae, JumpReLUSAE) and sae.config.encoder_input == "error":
        raise TrimtabError(
            f"{str(directory)!r} reads the error of another dictionary; accepted: one that reads the model"
        )
    return sae, place, target


def _with_base(sae: TopKSAE, model: Any) -> TopKSAE | BoostedSAE:
    """The dictionary, together with the one whose error it reconstructs if it is such a one."""
    match sae.config.metadata:
        case {"trimtab": {"dictionary": {"base": str(base)}}} if isinstance(sae, JumpReLUSAE):
            old = TopKSAE.from_pretrained(base).to(next(model.parameters()).device)
            return BoostedSAE(old, {"addition": sae})
    return sae


def _model(sae: TopKSAE, settings: ModelSettings, trust_remote_code: bool) -> tuple[Any, Any, str | None]:
    """The language model, its tokenizer and the path of its blocks; moves `sae` to the model's device."""
    trained = _trained_on(sae)
    name = settings.model or sae.config.metadata.get("model_name")
    if not name:
        raise TrimtabError("the dictionary's cfg.json does not name its model: give --model")
    dtype = settings.dtype or trained.get("model_dtype", "float32")
    if dtype not in get_args(Dtype):
        raise unknown("dtype of the dictionary's cfg.json", str(dtype), get_args(Dtype))
    layers = settings.layers or trained.get("layers")
    if not isinstance(layers, str | None):
        raise TrimtabError(f"the dictionary's cfg.json holds layers={layers!r}; accepted: a dotted path")
    lm, tokenizer = load_model(str(name), dtype, trust_remote_code=trust_remote_code)
    sae.to(next(lm.parameters()).device)
    return lm, tokenizer, layers


def _trained_harvest(sae: TopKSAE) -> HarvestConfig:
    settings = _trained_on(sae).get("harvest", {})
    try:
        return HarvestConfig(**settings)
    except TypeError as error:
        raise TrimtabError(f"the dictionary's cfg.json holds unknown harvest settings: {error}") from error


def _trained_on(sae: TopKSAE) -> dict[str, Any]:
    """The identity of the activations that the dictionary was trained on; empty where it is not known."""
    match sae.config.metadata:
        case {"trimtab": {"activations": dict(activations)}}:
            return activations
    return {}

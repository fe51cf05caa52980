"""`trimtab sae stitch|score`: finished dictionaries put into one, and their latents judged."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trimtab.cli.sae import ModelSettings, TextSettings, open_with_model
from trimtab.core.checkpoint import write_file
from trimtab.core.errors import TrimtabError
from trimtab.core.progress import Progress
from trimtab.sae.boosted import BoostedSAE, weights_digest
from trimtab.sae.judging import score_latents
from trimtab.sae.jumprelu import JumpReLUSAE
from trimtab.sae.modeling import TopKSAE

__all__ = ["score", "stitch"]


def stitch(base: Path, residuals: list[Path], *, out: Path) -> None:
    """Put a dictionary and those that were trained on what it leaves over into one, where that is exact.

    Args:
        base: the dictionary that was given as --base
        residuals: dictionaries that were trained with it
        out: directory of the one dictionary, in SAELens's format
    """
    old, parts = TopKSAE.from_pretrained(base), dict[str, JumpReLUSAE]()
    for directory in residuals:
        residual = TopKSAE.from_pretrained(directory)
        if not isinstance(residual, JumpReLUSAE):
            raise TrimtabError(f"{str(directory)!r} is a {type(residual).__name__}; accepted: one trained with --base")
        match residual.config.metadata:
            case {"trimtab": {"base_sha256": str(digest)}} if digest == weights_digest(old):
                parts[f"addition-{len(parts) + 1}"] = residual
            case _:
                raise TrimtabError(f"{str(directory)!r} was not trained with --base {str(base)!r}")
    boosted = BoostedSAE(old, parts)
    stitched = boosted.stitch()
    stitched.save_pretrained(out)
    table = Table("dictionary", "its latents", title=f"{out}, {stitched.config.n_latents:,} latents")
    for directory, part in zip([base, *residuals], boosted.feature_slices.values(), strict=True):
        table.add_row(str(directory), f"{part.start:,} to {part.stop - 1:,}")
    Console().print(table)


def score(
    directory: Path,
    *,
    latents: int = 100,
    tokens: int = 131_072,
    trust_remote_code: bool = False,
    text: TextSettings,
    model: ModelSettings,
) -> None:
    """Score how well latents are explained by their tokens (detection, fuzzing); writes DIRECTORY/scores.json.

    The explanation is a table of tokens, which needs no language model; one's own judge is plugged in from Python.

    Args:
        directory: a dictionary, as `trimtab sae train` writes them
        latents: how many, evenly spaced in the order of density
        tokens: tokens of text to look at
        trust_remote_code: run code that comes with the model
    """
    sae, place, live = open_with_model(directory, text, model, trust_remote_code)
    with Progress("scoring", tokens, "tokens") as bar:
        scores = score_latents(sae, live, place=place, n_latents=latents, tokens=tokens, advance=bar.advance)
    if not scores:
        raise TrimtabError(f"tokens={tokens}: no latent fires in enough windows to be judged; more tokens may help")
    rows = [vars(found) for found in scores]
    write_file(directory / "scores.json", json.dumps(rows, indent=2).encode())
    table = Table("score", "mean", "lowest", "highest", title=f"{directory}, {len(scores)} latents")
    for name in ("detection", "fuzzing"):
        values = [row[name] for row in rows]
        table.add_row(name, *(f"{figure:.3f}" for figure in (statistics.fmean(values), min(values), max(values))))
    Console().print(table)

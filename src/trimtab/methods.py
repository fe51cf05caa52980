"""The catalogue of the nineteen methods: what each is for, where it enters, which paper it comes from.

It is data, and importing it loads nothing heavy. Whether a method works is not written here but looked up:
a method is available when the module of its entry point exists and names it in `__all__`.

`python -m trimtab.methods --markdown` prints the table that stands in README.md, `--bibtex` what stands in
docs/citations.bib; the tests compare both with this module.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.errors import unknown
from trimtab.references import REFERENCES, Reference

__all__ = ["METHODS", "Method", "bibtex", "catalogue", "find", "markdown_table"]


@dataclass(frozen=True)
class Method:
    """One method of the library.

    `slug` is its name on the command line, `family` the subpackage that holds it, `entry_point` the public
    name that a user starts from, `what` one line on what it is for, `arxiv` the paper that it
    implements, `more_arxiv` further papers that it takes in.
    """

    slug: str
    name: str
    family: str
    entry_point: str
    what: str
    arxiv: str
    more_arxiv: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[Reference, ...]:
        """The papers, `arxiv` first."""
        by_arxiv = {reference.arxiv: reference for reference in REFERENCES}
        return tuple(by_arxiv[identifier] for identifier in (self.arxiv, *self.more_arxiv))

    @property
    def available(self) -> bool:
        """Whether the module of `entry_point` exists in this version and lists the name in `__all__`.

        The module is read, not imported, since importing a family costs seconds: its `__all__` is a literal.
        """
        module, _, name = self.entry_point.rpartition(".")
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            return False
        for statement in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                    return name in ast.literal_eval(value)
        return False


def find(slug: str) -> Method:
    """The method called `slug`. Raises TrimtabError, with the near names, when there is none."""
    for method in METHODS:
        if method.slug == slug:
            return method
    raise unknown("method", slug, [method.slug for method in METHODS])


def bibtex(slug: str) -> str:
    """The BibTeX entries of one method, one for each of its papers, ending in a newline."""
    return "\n".join(reference.bibtex() for reference in find(slug).references)


def catalogue() -> list[dict[str, Any]]:
    """The methods as JSON values, in the order of METHODS: what `trimtab methods --json` prints."""
    return [
        {
            "slug": method.slug,
            "name": method.name,
            "family": method.family,
            "entry_point": method.entry_point,
            "arxiv": method.arxiv,
            "references": [reference.arxiv for reference in method.references],
            "available": method.available,
            "what": method.what,
        }
        for method in METHODS
    ]


def markdown_table() -> str:
    """The methods as a Markdown table with a row each, ending in a newline."""
    rows = ["| method | what it is for | where it enters | works |", "|---|---|---|---|"]
    for method in METHODS:
        papers = ", ".join(f"[{r.arxiv}](https://arxiv.org/abs/{r.arxiv})" for r in method.references)
        works = "yes" if method.available else "not yet"
        rows.append(f"| {method.name} ({papers}) | {method.what} | `{method.entry_point}` | {works} |")
    return "\n".join(rows) + "\n"


METHODS: tuple[Method, ...] = (
    Method(
        "tr-align",
        "TR-DPO, TR-IPO, TR-KTO",
        "align",
        "trimtab.align.TrustRegionReference",
        "preference training whose reference policy follows the trained one",
        "2404.09656",
    ),
    Method(
        "trb",
        "TRB",
        "distill",
        "trimtab.distill.TRBTrainer",
        "on-policy distillation whose early rollouts lean on the teacher inside a KL ball",
        "2605.31159",
    ),
    Method(
        "weight-squeezing",
        "Weight Squeezing",
        "distill",
        "trimtab.distill.squeeze",
        "a small student whose weights are a learned linear map of its teacher's",
        "2010.06993",
    ),
    Method(
        "bias-steering",
        "Bias-only steering",
        "adapters",
        "trimtab.adapters.SteeringConfig",
        "an adapter of one trained vector a layer, for reinforcement learning on a frozen model",
        "2505.18706",
    ),
    Method(
        "aot-p-tuning",
        "AoT P-Tuning",
        "adapters",
        "trimtab.adapters.AoTConfig",
        "many tasks on one frozen model and in one batch, by a bias for each token id and layer",
        "2305.10835",
    ),
    Method(
        "weight-interpolation",
        "Weight interpolation",
        "merge",
        "trimtab.merge.WeightDial",
        "a dial for a text attribute, on the line between fine-tuned weights and beyond it",
        "2211.12092",
    ),
    Method(
        "kron-sae",
        "KronSAE",
        "sae",
        "trimtab.sae.KronSAE",
        "sparse dictionaries with a factorised encoder, for widths that a dense one cannot afford",
        "2505.22255",
    ),
    Method(
        "hierarchical-topk",
        "HierarchicalTopK",
        "sae",
        "trimtab.sae.hierarchical_topk_loss",
        "one sparse dictionary that serves every sparsity budget up to K",
        "2505.24473",
    ),
    Method(
        "sae-boost",
        "SAE Boost",
        "sae",
        "trimtab.sae.BoostedSAE",
        "a new domain for an existing dictionary, whose latents keep their index and meaning",
        "2507.12990",
    ),
    Method(
        "feature-flow",
        "Feature flow, SAE Match",
        "interp",
        "trimtab.interp.FlowGraph",
        "which dictionary features of neighbouring layers are the same concept; steering along them",
        "2502.03032",
        more_arxiv=("2410.07656",),
    ),
    Method(
        "steering-mechanics",
        "Steering mechanics",
        "interp",
        "trimtab.interp.path_patch",
        "reading what a trained steering vector does, layer by layer and component by component",
        "2509.06608",
    ),
    Method(
        "caif",
        "CAIF",
        "decoding",
        "trimtab.decoding.CAIFLogitsProcessor",
        "steering a frozen model's text by any text classifier while it decodes",
        "2205.07276",
    ),
    Method(
        "star-diffusion",
        "G-Star",
        "diffusion",
        "trimtab.diffusion.GuidedStarSampler",
        "masked-diffusion sampling that may take revealed tokens back, led by an error predictor",
        "2510.08369",
    ),
    Method(
        "diffusion-halting",
        "Diffusion halting",
        "diffusion",
        "trimtab.diffusion.EntropyHalting",
        "ending a diffusion language model's sampling when the text is complete",
        "2305.10818",
    ),
    Method(
        "lime",
        "LIMe",
        "models",
        "trimtab.models.LimeForCausalLM",
        "a decoder whose attention reads the keys and values of all earlier layers",
        "2502.09245",
    ),
    Method(
        "rebased",
        "ReBased",
        "models",
        "trimtab.models.RebasedForCausalLM",
        "linear attention with a learnable quadratic kernel, for decoding in constant memory",
        "2402.10644",
    ),
    Method(
        "palbert",
        "PALBERT",
        "models",
        "trimtab.models.PonderForSequenceClassification",
        "an encoder classifier that leaves at the layer where it is sure enough",
        "2204.03276",
    ),
    Method(
        "varan",
        "VARAN",
        "models",
        "trimtab.models.VaranForAudioClassification",
        "fine-tuning a speech encoder with layer weights inferred for each utterance",
        "2508.12061",
    ),
    Method(
        "ne-dreamer",
        "NE-Dreamer",
        "worlds",
        "trimtab.worlds.NEDreamer",
        "a world-model agent that predicts the next embedding instead of drawing the image",
        "2603.02765",
    ),
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m trimtab.methods", description="Print the catalogue.")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--markdown", action="store_true", help="the table of README.md")
    form.add_argument("--bibtex", action="store_true", help="docs/citations.bib")
    if parser.parse_args().markdown:
        print(markdown_table(), end="")
    else:
        print("\n".join(bibtex(method.slug) for method in METHODS), end="")

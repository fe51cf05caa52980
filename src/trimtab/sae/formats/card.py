"""The model card that goes with a saved dictionary: only what its configuration and metadata say.

Of the metadata it knows SAELens's `model_name` and `hook_name`, and under "trimtab" `place`, `target`, `metrics` (what
was measured) and `final` (the last figures of training), the last two as objects; everything else is listed as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from trimtab.sae.jumprelu import JumpReLUSAEConfig
from trimtab.sae.kron import KronSAEConfig
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

__all__ = ["model_card"]

MAX_CELL = 200

TRIMTAB_CODE = """

```python
from trimtab.sae.modeling import TopKSAE

sae = TopKSAE.from_pretrained("OWNER/NAME")
values, indices = sae.encode_sparse(activations)
reconstruction = sae(activations)
```"""

SAELENS_CODE = """

```python
from huggingface_hub import snapshot_download
from sae_lens import SAE

sae = SAE.load_from_disk(snapshot_download("OWNER/NAME"))
reconstruction = sae.decode(sae.encode(activations))
```"""


SOURCES = {
    "TopK": "A dense TopK {noun} (Gao et al., 2024, [arXiv 2406.04093](https://arxiv.org/abs/2406.04093))",
    "Kron": "A KronSAE {noun} ([arXiv 2505.22255](https://arxiv.org/abs/2505.22255))",
    "JumpReLU": "A JumpReLU {noun} ([arXiv 2407.14435](https://arxiv.org/abs/2407.14435))",
}

KRON_IMPORT = "import trimtab.sae.saelens  # makes the architecture known\nfrom sae_lens"


def model_card(sae: TopKSAE) -> ModelCard:
    """The README.md of `sae`: what it is, how it was made, what was measured, how to load it. No licence is chosen."""
    config = sae.config
    noun = "transcoder" if config.transcoder else "autoencoder"
    metadata = config.metadata
    own = _mapping(metadata.get("trimtab"))
    place = own.get("place", metadata.get("hook_name"))
    subject = [_cell(metadata["model_name"])] if "model_name" in metadata else []
    subject += [f"at {_cell(place)}"] if place is not None else []
    kind = {KronSAEConfig: "Kron", JumpReLUSAEConfig: "JumpReLU"}.get(type(config), "TopK")
    of_error = _of_error(config)
    title = f"# Sparse {kind} {noun}" + (f": {' '.join(subject)}" if subject else "")
    settings = {key: value for key, value in metadata.items() if key not in ("model_name", "hook_name", "trimtab")}
    settings |= {key: value for key, value in own.items() if key not in ("place", "target", "metrics", "final")}
    measured = {**_mapping(own.get("metrics")), **({"final": own["final"]} if "final" in own else {})}
    data = ModelCardData(
        library_name="trimtab" if config.transcoder or of_error else "saelens",
        tags=["saelens", "sparse-autoencoder", "trimtab"] if not config.transcoder else ["transcoder", "trimtab"],
    )
    parts = [
        title,
        f"{SOURCES[kind].format(noun=noun)}, written by Trimtab. It takes and returns activations in their own units.",
        "\n".join(f"- {name}: {_cell(value)}" for name, value in _facts(sae).items() if value is not None),
        "## Settings and origin",
        _table(settings) or "None are recorded in the file.",
        "## Measured",
        _table(measured) or "No measurement is recorded in the file.",
        "## Use",
        f"With Trimtab, on {'errors of that dictionary' if of_error else 'activations'} [..., d_in]:" + TRIMTAB_CODE,
        "SAELens has no TopK transcoder: the layout of this one is Trimtab's own."
        if config.transcoder
        else "SAELens has no dictionary of another one's error: the layout of this one is Trimtab's own. `BoostedSAE` "
        "computes that error."
        if of_error
        else "With SAELens:" + (SAELENS_CODE.replace("from sae_lens", KRON_IMPORT) if kind == "Kron" else SAELENS_CODE),
        "## Licence",
        "None is stated. Whoever publishes this adds `license` (and `base_model`) to the head of this file.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _facts(sae: TopKSAE) -> dict[str, Any]:
    """What the dictionary is, by names in our own words; None where it is not known."""
    config = sae.config
    own = _mapping(config.metadata.get("trimtab"))
    return {
        "model": config.metadata.get("model_name"),
        "activation that is read": own.get("place"),
        "activation that is written": own.get("target"),
        "what it adds to (its output is what this dictionary leaves over)": _mapping(own.get("dictionary")).get("base"),
        "what it reads": "the error that the dictionary above leaves" if _of_error(config) else None,
        "hook in TransformerLens": config.metadata.get("hook_name"),
        "width of the input": config.d_in,
        "width of the output": config.output_width if config.transcoder else None,
        "latents": config.n_latents,
        "heads x (base x extension)": f"{config.h} x ({config.m} x {config.n})"
        if isinstance(config, KronSAEConfig)
        else None,
        "latents a token may use (k)": None if isinstance(config, JumpReLUSAEConfig) else config.k,
        "`b_dec` is subtracted from the input": config.apply_b_dec_to_input,
        "dtype": str(sae.dtype).removeprefix("torch."),
    }


def _of_error(config: TopKSAEConfig) -> bool:
    return isinstance(config, JumpReLUSAEConfig) and config.encoder_input == "error"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in _leaves(values)]
    return "\n".join(["| | |", "|---|---|", *rows]) if rows else ""


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _cell(value: Any) -> str:
    """`value` on one line of a table. Text is shown as code: it may come from a file that nobody vouches for."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = "".join(c if c.isprintable() else " " for c in text[: MAX_CELL + 1])
    text = text[:MAX_CELL] + "…" if len(text) > MAX_CELL else text
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"

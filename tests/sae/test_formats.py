"""Files of SAELens's and sparsify's layout, without those libraries: exact values, failures, the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae import formats
from trimtab.sae.formats import _files
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

D_IN, N_LATENTS, K = 7, 19, 4
TRANSCODER = {"transcoder": True, "apply_b_dec_to_input": False}


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dictionary(dtype: torch.dtype = torch.float32, **changes: Any) -> TopKSAE:
    sae = TopKSAE(TopKSAEConfig(**{"d_in": D_IN, "n_latents": N_LATENTS, "k": K, **changes}))
    with torch.no_grad():
        for seed, parameter in enumerate(sae.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed))
    return sae.to(dtype)


def saelens_directory(directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Tensor]:
    """What SAELens would write; the tensors that are in it."""
    weights = {
        "W_enc": random(D_IN, N_LATENTS, seed=1, dtype=dtype),
        "b_enc": random(N_LATENTS, seed=2, dtype=dtype),
        "W_dec": random(N_LATENTS, D_IN, seed=3, dtype=dtype),
        "b_dec": random(D_IN, seed=4, dtype=dtype),
    }
    fields = {
        "d_in": D_IN,
        "d_sae": N_LATENTS,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cuda",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "m", "neuronpedia_id": None, "own": {"a": [1]}},
        "k": K,
        "rescale_acts_by_decoder_norm": False,
        "architecture": "topk",
        **changes,
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "sae_weights.safetensors")
    (directory / "cfg.json").write_text(json.dumps(fields))
    return weights


def saelens_forward(x: Tensor, w: dict[str, Tensor], k: int, subtract: bool, rescale: bool) -> tuple[Tensor, Tensor]:
    """SAELens's TopK, written from its definition: the latents in units of a unit decoder, and the reconstruction."""
    norms = w["W_dec"].norm(dim=-1) if rescale else torch.ones_like(w["b_enc"])
    a = ((x - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]) * norms
    top = a.topk(k)
    latents = torch.zeros_like(a).scatter(-1, top.indices, top.values.relu())
    return latents, (latents / norms) @ w["W_dec"] + w["b_dec"]


def change(directory: Path, **changes: Any) -> None:
    path = directory / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------- SAELens's layout


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_files_of_saelens_are_read_exactly(subtract: bool, rescale: bool, tmp_path: Path) -> None:
    w = saelens_directory(tmp_path, torch.float64, apply_b_dec_to_input=subtract, rescale_acts_by_decoder_norm=rescale)
    sae = formats.read_saelens(tmp_path)
    x = random(200, D_IN, seed=9, dtype=torch.float64)
    latents, reconstruction = saelens_forward(x, w, K, subtract, rescale)
    assert torch.equal(sae.encode(x) > 0, latents > 0)
    torch.testing.assert_close(sae.encode(x), latents)
    torch.testing.assert_close(sae(x), reconstruction)
    assert sae.config.apply_b_dec_to_input is subtract


def test_folding_norms_makes_unit_rows_and_leaves_a_zero_row_silent(tmp_path: Path) -> None:
    w = saelens_directory(tmp_path, rescale_acts_by_decoder_norm=True)
    w["W_dec"][3] = 0
    save_file(w, tmp_path / "sae_weights.safetensors")
    sae = formats.read_saelens(tmp_path)
    norms = sae.W_dec.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(N_LATENTS).index_fill(0, torch.tensor([3]), 0.0))
    assert sae.encode(random(100, D_IN))[:, 3].eq(0).all()
    assert sae(random(100, D_IN)).isfinite().all()


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_is_kept(dtype: torch.dtype, rescale: bool, tmp_path: Path) -> None:
    saelens_directory(tmp_path, dtype, rescale_acts_by_decoder_norm=rescale)
    assert {parameter.dtype for parameter in formats.read_saelens(tmp_path).parameters()} == {dtype}


def test_the_dtype_of_the_configuration_counts_as_in_saelens(tmp_path: Path) -> None:
    saelens_directory(tmp_path, torch.float16)
    change(tmp_path, dtype="torch.float32")
    assert formats.read_saelens(tmp_path).dtype == torch.float32


def test_what_the_configuration_leaves_out_is_as_in_saelens(tmp_path: Path) -> None:
    saelens_directory(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "topk", "d_in": D_IN, "d_sae": N_LATENTS, "k": K}))
    sae = formats.read_saelens(tmp_path)
    assert sae.config == TopKSAEConfig(d_in=D_IN, n_latents=N_LATENTS, k=K, apply_b_dec_to_input=True)


def test_metadata_survives_and_the_version_is_that_of_the_writer(tmp_path: Path) -> None:
    saelens_directory(tmp_path / "a", metadata={"sae_lens_version": "6.1.0", "hook_name": "h", "x": {"y": [1, None]}})
    sae = formats.read_saelens(tmp_path / "a")
    assert sae.config.metadata == {"hook_name": "h", "x": {"y": [1, None]}}
    formats.write_saelens(sae, tmp_path / "b")
    written = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]
    assert written == {"hook_name": "h", "x": {"y": [1, None]}, "sae_lens_version": "6.54.12"}


def test_the_configuration_that_is_written(tmp_path: Path) -> None:
    formats.write_saelens(dictionary(torch.bfloat16, apply_b_dec_to_input=False), tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text()) == {
        "architecture": "topk",
        "d_in": D_IN,
        "d_sae": N_LATENTS,
        "k": K,
        "dtype": "bfloat16",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "rescale_acts_by_decoder_norm": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12"},
    }


def test_files_are_as_private_as_their_directory(tmp_path: Path) -> None:
    formats.write_saelens(dictionary(), tmp_path)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["sae_weights.safetensors"] == tmp_path.stat().st_mode & 0o666


def test_sparsity_is_written_and_an_outdated_one_removed(tmp_path: Path) -> None:
    sparsity = random(N_LATENTS)
    formats.write_saelens(dictionary(), tmp_path, sparsity=sparsity)
    found = load_file(tmp_path / "sparsity.safetensors")
    assert list(found) == ["sparsity"]
    assert torch.equal(found["sparsity"], sparsity)
    formats.write_saelens(dictionary(), tmp_path)
    assert not (tmp_path / "sparsity.safetensors").exists()
    with pytest.raises(TrimtabError, match="sparsity has 5 entries; accepted: one a latent, 19"):
        formats.write_saelens(dictionary(), tmp_path, sparsity=random(5))


def test_a_transcoder_has_its_own_architecture_and_is_not_exported(tmp_path: Path) -> None:
    sae = dictionary(d_out=5, **TRANSCODER)
    formats.write_saelens(sae, tmp_path / "own")
    fields = json.loads((tmp_path / "own" / "cfg.json").read_text())
    assert (fields["architecture"], fields["d_out"]) == ("topk_transcoder", 5)
    x = random(30, D_IN)
    assert torch.equal(formats.read_saelens(tmp_path / "own")(x), sae(x))
    with pytest.raises(TrimtabError, match="SAELens, which has no TopK transcoder; accepted: an autoencoder"):
        formats.export_saelens(sae, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_export_of_an_autoencoder_is_what_saving_writes(tmp_path: Path) -> None:
    formats.export_saelens(dictionary(), tmp_path / "a", sparsity=random(N_LATENTS))
    formats.write_saelens(dictionary(), tmp_path / "b", sparsity=random(N_LATENTS))
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert contents[0] == contents[1]


# ---------------------------------------------------------------- writing that fails


@pytest.mark.parametrize("metadata", [{"loss": float("nan")}, {"where": Path("x")}])
def test_metadata_that_is_not_json_is_refused_before_anything_is_written(metadata: Any, tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="metadata must hold JSON values only"):
        formats.write_saelens(dictionary(metadata=metadata), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_dtype_that_saelens_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="dtype='float8_e4m3fn' is not known"):
        formats.write_saelens(dictionary().to(torch.float8_e4m3fn), tmp_path)


def test_a_full_disk_leaves_the_old_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats.write_saelens(dictionary(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        formats.write_saelens(dictionary(k=2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---------------------------------------------------------------- sparsify's layout


def test_sparsify_files_are_as_documented(tmp_path: Path) -> None:
    sae = dictionary()
    formats.write_sparsify(sae, tmp_path, "model.layers.9")
    fields = json.loads((tmp_path / "model.layers.9" / "cfg.json").read_text())
    assert fields == {
        "activation": "topk",
        "expansion_factor": 3,
        "normalize_decoder": False,
        "num_latents": N_LATENTS,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D_IN,
    }
    found = load_file(tmp_path / "model.layers.9" / "sae.safetensors")
    expected = {"encoder.weight": sae.encoder, "encoder.bias": sae.b_enc, "W_dec": sae.decoder, "b_dec": sae.b_dec}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_unit_decoder_rows_are_said_to_be(tmp_path: Path) -> None:
    formats.write_sparsify(TopKSAE(TopKSAEConfig(d_in=D_IN, n_latents=N_LATENTS, k=K)), tmp_path, "h.3")
    assert json.loads((tmp_path / "h.3" / "cfg.json").read_text())["normalize_decoder"] is True


@pytest.mark.parametrize("kind", [{}, {"apply_b_dec_to_input": False}, TRANSCODER])
def test_sparsify_round_trip(kind: dict[str, Any], tmp_path: Path) -> None:
    sae, x = dictionary(torch.float64, **kind), random(100, D_IN, seed=8, dtype=torch.float64)
    formats.write_sparsify(sae, tmp_path, "layers.9")
    back = formats.read_sparsify(tmp_path, "layers.9")
    torch.testing.assert_close(back(x), sae(x))
    torch.testing.assert_close(back.encode(x), sae.encode(x))
    assert back.config.transcoder is sae.config.transcoder
    assert back.config.metadata["sparsify"]["hookpoint"] == "layers.9"


def test_zero_latents_mean_the_expansion_factor_and_old_files_are_read(tmp_path: Path) -> None:
    sae = dictionary(n_latents=3 * D_IN)
    formats.write_sparsify(sae, tmp_path, "layers.9")
    old = {"expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K, "d_in": D_IN, "signed": False}
    (tmp_path / "layers.9" / "cfg.json").write_text(json.dumps({**old, "multi_topk": True}))
    back = formats.read_sparsify(tmp_path, "layers.9")
    assert back.config.n_latents == 3 * D_IN
    assert torch.equal(back(random(20, D_IN)), sae(random(20, D_IN)))


def test_a_transcoder_between_two_widths_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="d_out=5: sparsify's transcoders have d_out = d_in = 7"):
        formats.write_sparsify(dictionary(d_out=5, **TRANSCODER), tmp_path, "layers.9")


# ---------------------------------------------------------------- the card


def test_the_card_says_what_is_known_and_no_more() -> None:
    metadata = {
        "model_name": "google/gemma",
        "hook_name": "blocks.9.hook_resid_post",
        "context_size": 256,
        "trimtab": {
            "place": "resid.9",
            "training": {"learning_rate": 3e-4, "tokens": 300000},
            "metrics": {"explained_variance": 0.75123456, "splice": {"recovered": 0.9}},
            "target": None,
            "final": {"l0": 31.5},
        },
    }
    card = formats.model_card(dictionary(metadata=metadata))
    assert card.data.library_name == "saelens"
    assert card.data.license is None
    assert card.data.base_model is None
    assert card.text.strip().startswith("# Sparse TopK autoencoder: `google/gemma` at `resid.9`")
    for line in (
        "- hook in TransformerLens: `blocks.9.hook_resid_post`",
        "- latents: 19",
        "- latents a token may use (k): 4",
        "- `b_dec` is subtracted from the input: yes",
        "| `context_size` | 256 |",
        "| `training.learning_rate` | 0.0003 |",
        "| `explained_variance` | 0.751235 |",
        "| `splice.recovered` | 0.9 |",
        "| `final.l0` | 31.5 |",
    ):
        assert line in card.text
    assert "activation that is written" not in card.text
    bare = formats.model_card(dictionary()).text
    assert "No measurement is recorded in the file." in bare
    assert "None are recorded in the file." in bare
    assert "None is stated." in bare


def test_the_card_of_a_transcoder_offers_no_saelens() -> None:
    card = formats.model_card(dictionary(d_out=5, **TRANSCODER, metadata={"trimtab": {"target": "mlp.9"}}))
    assert card.data.library_name == "trimtab"
    assert "import SAE" not in card.text
    assert "SAELens has no TopK transcoder" in card.text
    assert "- activation that is written: `mlp.9`" in card.text
    assert "- width of the output: 5" in card.text


def test_hostile_metadata_stays_text_in_the_card(tmp_path: Path) -> None:
    hostile = "x`|\n---\nlicense: mit\n# <script>alert(1)</script>\ud800" + "y" * 10_000
    metadata = {"model_name": hostile, hostile: hostile, "trimtab": {"metrics": [hostile], "place": {"a": hostile}}}
    sae = dictionary(metadata=metadata)
    sae.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    head, body = text.split("---\n", 2)[1:]
    assert "license" not in head
    assert all("<script>" not in part for part in body.split("`")[::2])
    assert not any(line.startswith("license: mit") for line in body.splitlines())
    assert len(text) < 10_000


def test_the_code_in_the_card_runs(tmp_path: Path) -> None:
    sae = dictionary()
    sae.save_pretrained(tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python")[1].split("```")[0]
    names: dict[str, Any] = {"activations": random(5, D_IN)}
    exec(code.replace("OWNER/NAME", str(tmp_path)), names)
    assert torch.equal(names["reconstruction"], sae(names["activations"]))
    assert names["values"].shape == (5, K)

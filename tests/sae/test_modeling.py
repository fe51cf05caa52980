"""The module: its two ways of computing, folded scales, devices and dtypes, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from trimtab.core.checkpoint import write_directory
from trimtab.core.errors import TrimtabError
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
KINDS = [
    {"apply_b_dec_to_input": True},
    {"apply_b_dec_to_input": False},
    {"apply_b_dec_to_input": False, "transcoder": True, "d_out": 5},
]


def dictionary(dtype: torch.dtype = torch.float32, **changes: Any) -> TopKSAE:
    sae = TopKSAE(TopKSAEConfig(**{"d_in": 7, "n_latents": 19, "k": 4, **changes}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae.to(dtype)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", [(), (1,), (5, 3)])
def test_shapes(kind: dict[str, Any], leading: tuple[int, ...]) -> None:
    sae, x = dictionary(**kind), activations(*leading, 7)
    latents = sae.encode_sparse(x)
    assert latents.values.shape == latents.indices.shape == (*leading, 4)
    assert sae.encode(x).shape == (*leading, 19)
    assert sae(x).shape == (*leading, sae.config.output_width)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sparse_way_the_dense_way_and_the_formula_agree(kind: dict[str, Any]) -> None:
    sae, x = dictionary(torch.float64, **kind), activations(11, 7, dtype=torch.float64)
    shifted = x - sae.b_dec if sae.config.apply_b_dec_to_input else x
    a = shifted @ sae.W_enc + sae.b_enc
    kept = a >= a.sort(descending=True).values[:, 3:4]
    expected = (a * kept).relu()
    torch.testing.assert_close(sae.encode(x), expected)
    torch.testing.assert_close(sae(x), expected @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(sae.decode(sae.encode(x)), sae(x))
    torch.testing.assert_close(sae.decode_sparse(sae.encode_sparse(x)), sae(x))


def test_a_fresh_one_has_unit_decoder_rows_and_depends_on_the_seed() -> None:
    config = TopKSAEConfig(d_in=7, n_latents=19, k=4)
    first, again, other = TopKSAE(config, seed=1), TopKSAE(config, seed=1), TopKSAE(config, seed=2)
    torch.testing.assert_close(first.decoder.norm(dim=-1), torch.ones(19))
    assert torch.equal(first.encoder, first.decoder)
    assert torch.equal(first.decoder, again.decoder)
    assert not torch.equal(first.decoder, other.decoder)
    transcoder = TopKSAE(TopKSAEConfig(d_in=7, d_out=7, n_latents=19, k=4, transcoder=True, apply_b_dec_to_input=False))
    assert not torch.equal(transcoder.encoder, transcoder.decoder)


def test_views_have_the_shapes_of_saelens_and_share_memory() -> None:
    sae = dictionary(d_out=5, transcoder=True, apply_b_dec_to_input=False)
    shapes = [tuple(t.shape) for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    assert shapes == [(7, 19), (19,), (19, 5), (5,)]
    assert sae.W_enc.data_ptr() == sae.encoder.data_ptr()


@pytest.mark.parametrize("subtract", [True, False])
def test_one_folded_scale_of_an_autoencoder_is_exact(subtract: bool) -> None:
    sae = dictionary(torch.float64, apply_b_dec_to_input=subtract)
    x, scale = activations(31, 7, dtype=torch.float64), 3.7
    before, latents = scale * sae(x / scale), sae.encode(x / scale)
    sae.fold_scales(scale, scale)
    torch.testing.assert_close(sae(x), before)
    torch.testing.assert_close(sae.encode(x), scale * latents)


def test_two_folded_scales_of_a_transcoder_are_exact() -> None:
    sae = dictionary(torch.float64, d_out=5, transcoder=True, apply_b_dec_to_input=False)
    x = activations(31, 7, dtype=torch.float64)
    before = 0.3 * sae(x / 4.1)
    sae.fold_scales(4.1, 0.3)
    torch.testing.assert_close(sae(x), before)


@pytest.mark.parametrize(("input_scale", "output_scale"), [(0.0, 1.0), (1.0, -2.0), (float("nan"), 1.0)])
def test_a_scale_that_is_not_positive_is_refused(input_scale: float, output_scale: float) -> None:
    with pytest.raises(TrimtabError, match=r"_scale=.* must be positive"):
        dictionary().fold_scales(input_scale, output_scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_moves_with_the_module_and_the_input_keeps_its_own(dtype: torch.dtype) -> None:
    sae, x = dictionary(dtype), activations(6, 7)
    assert sae.dtype == dtype
    assert sae.device == torch.device("cpu")
    assert sae.encode(x).dtype == dtype
    assert sae(x).dtype == torch.float32
    half = dtype in (torch.float16, torch.bfloat16)
    reference = dictionary(torch.float64)
    with torch.no_grad():
        for parameter, own in zip(reference.parameters(), sae.parameters(), strict=True):
            parameter.copy_(own)
    kept = reference.encode(x)
    torch.testing.assert_close(sae.encode(x).double().sum(), kept.sum(), rtol=0.02 if half else 1e-5, atol=0.0)


def test_the_module_moves_to_another_device() -> None:
    sae = dictionary().to("meta")
    assert sae.device.type == "meta"
    assert sae.W_enc.is_meta


def test_gradients_reach_all_four_parameters() -> None:
    sae = dictionary()
    sae(activations(9, 7)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in sae.parameters())


def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(TrimtabError, match=r"x has 8 features; .* d_in=7"):
        dictionary()(activations(3, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 20}, "k=20 must not exceed n_latents=19"),
        ({"k": 0}, "k=0 must be a positive integer"),
        ({"k": True}, "k=True must be a positive integer"),
        ({"d_in": -7}, "d_in=-7 must be a positive integer"),
        ({"n_latents": 1 << 40}, "n_latents=1099511627776 times width 7 is beyond"),
        ({"d_out": 5}, "d_out=5 differs from d_in=7: that needs transcoder=True"),
        ({"transcoder": True}, "apply_b_dec_to_input=True has no meaning with transcoder=True"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        TopKSAEConfig(**{"d_in": 7, "n_latents": 19, "k": 4, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_saving_and_loading_is_bit_equal(kind: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    metadata = {"model_name": "m", "hook_name": "blocks.9.hook_resid_post", "trimtab": {"place": "resid.9", "n": [1]}}
    sae = dictionary(dtype, **kind, metadata=metadata)
    sae.save_pretrained(tmp_path)
    loaded = TopKSAE.from_pretrained(tmp_path)
    assert loaded.config == sae.config
    assert loaded.dtype == dtype
    for name, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert all(p.requires_grad and p.is_contiguous() for p in loaded.parameters())
    assert torch.equal(loaded(activations(5, 7)), sae(activations(5, 7)))


def test_saving_writes_the_directory_of_saelens_and_a_card(tmp_path: Path) -> None:
    dictionary().save_pretrained(tmp_path / "new")
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"cfg.json", "sae_weights.safetensors", "README.md"}


def test_a_card_that_was_edited_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    dictionary().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_saving_over_an_older_one_through_an_atomic_directory(tmp_path: Path) -> None:
    for k in (4, 5):
        with write_directory(tmp_path / "resid.9") as directory:
            dictionary(k=k).save_pretrained(directory)
    assert TopKSAE.from_pretrained(tmp_path, subfolder="resid.9").config.k == 5
    assert [path.name for path in tmp_path.iterdir()] == ["resid.9"]


def test_loading_and_saving_in_place(tmp_path: Path) -> None:
    sae = dictionary()
    sae.save_pretrained(tmp_path)
    loaded = TopKSAE.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(loaded.encoder, sae.encoder)
    assert torch.equal(TopKSAE.from_pretrained(tmp_path).encoder, sae.encoder)


def test_a_subfolder_is_found_and_a_wrong_one_lists_the_right_ones(tmp_path: Path) -> None:
    for name in ("resid.6", "resid.9"):
        dictionary(k=int(name[-1])).save_pretrained(tmp_path / name)
    assert TopKSAE.from_pretrained(tmp_path, subfolder="resid.9").config.k == 9
    assert TopKSAE.from_pretrained(str(tmp_path / "resid.6")).config.k == 6
    with pytest.raises(TrimtabError, match=r"subfolder='resid.8' is not known.*Accepted: resid.6, resid.9"):
        TopKSAE.from_pretrained(tmp_path, subfolder="resid.8")
    with pytest.raises(TrimtabError, match=r"subfolder='' is not known.*Accepted: resid.6, resid.9"):
        TopKSAE.from_pretrained(tmp_path)


def test_a_stray_config_json_changes_nothing(tmp_path: Path) -> None:
    sae = dictionary()
    sae.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b'\xff{"config": 1, "seed": 5}')
    assert torch.equal(TopKSAE.from_pretrained(tmp_path).encoder, sae.encoder)


def test_loading_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture) -> None:
    dictionary().save_pretrained(tmp_path)
    TopKSAE.from_pretrained(tmp_path)
    assert caplog.records == []
    assert capsys.readouterr() == ("", "")


def test_pushing_uploads_the_three_files(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[dict[str, Any]] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
            contents = {str(path.relative_to(folder_path)): path.read_bytes() for path in folder_path.rglob("*")}
            uploads.append({"repo_id": repo_id, "contents": contents})
            return "commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert dictionary(metadata={"model_name": "gemma"}).push_to_hub("someone/dictionary") == "commit"
    [upload] = uploads
    assert upload["repo_id"] == "someone/dictionary"
    assert set(upload["contents"]) == {"cfg.json", "sae_weights.safetensors", "README.md"}
    assert json.loads(upload["contents"]["cfg.json"])["metadata"]["model_name"] == "gemma"
    assert ModelCard(upload["contents"]["README.md"].decode()).data.library_name == "saelens"


def test_the_weight_file_holds_the_four_tensors_of_saelens(tmp_path: Path) -> None:
    sae = dictionary()
    sae.save_pretrained(tmp_path)
    with safe_open(tmp_path / "sae_weights.safetensors", framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert all(torch.equal(value, getattr(sae, name)) for name, value in found.items())

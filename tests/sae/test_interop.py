"""Files exchanged with the real SAELens and sparsify, both ways: outputs within 1e-5, and the same latents."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae import formats
from trimtab.sae.jumprelu import JumpReLUSAE
from trimtab.sae.kron import KronSAE, KronSAEConfig
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

# What the two libraries import is deprecated by its makers, which they say at import.
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

D_IN, N_LATENTS, K = 24, 96, 6
METADATA = {
    "model_name": "google/gemma-3-270m",
    "hook_name": "blocks.9.hook_resid_post",
    "context_size": 256,
    "trimtab": {"place": "resid.9", "metrics": {"explained_variance": 0.5}},
}


@pytest.fixture(scope="module")
def sae_lens() -> ModuleType:
    import sae_lens

    return sae_lens


@pytest.fixture(scope="module")
def sparsify() -> ModuleType:
    import sparsify

    return sparsify


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def dictionary(**changes: Any) -> TopKSAE:
    sae = TopKSAE(TopKSAEConfig(**{"d_in": D_IN, "n_latents": N_LATENTS, "k": K, "metadata": METADATA, **changes}))
    randomise(sae)
    return sae


def activations() -> Tensor:
    return torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def l0(latents: Tensor) -> Tensor:
    return (latents > 0).sum(-1)


# ---------------------------------------------------------------- SAELens


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saelens_reads_ours(subtract: bool, dtype: torch.dtype, sae_lens: ModuleType, tmp_path: Path) -> None:
    sae = dictionary(apply_b_dec_to_input=subtract).to(dtype)
    sae.save_pretrained(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    x = activations().to(dtype)
    assert type(theirs) is sae_lens.TopKSAE
    assert theirs.dtype == dtype
    close(theirs.encode(x), sae.encode(x))
    close(theirs(x), sae(x))
    assert torch.equal(l0(theirs.encode(x)), l0(sae.encode(x)))
    assert l0(theirs.encode(x)).max() == K


def test_saelens_keeps_our_metadata_and_we_keep_it_back(sae_lens: ModuleType, tmp_path: Path) -> None:
    sae = dictionary()
    sae.save_pretrained(tmp_path / "ours")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert theirs.cfg.metadata.model_name == "google/gemma-3-270m"
    assert theirs.cfg.metadata.hook_name == "blocks.9.hook_resid_post"
    assert theirs.cfg.metadata.trimtab == METADATA["trimtab"]
    theirs.save_model(tmp_path / "theirs")
    back = TopKSAE.from_pretrained(tmp_path / "theirs")
    assert METADATA.items() <= back.config.metadata.items()
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), sae.parameters(), strict=True))


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_we_read_what_saelens_saves(
    subtract: bool, rescale: bool, training: bool, sae_lens: ModuleType, tmp_path: Path
) -> None:
    config = (sae_lens.TopKTrainingSAEConfig if training else sae_lens.saes.topk_sae.TopKSAEConfig)(
        d_in=D_IN,
        d_sae=N_LATENTS,
        k=K,
        apply_b_dec_to_input=subtract,
        rescale_acts_by_decoder_norm=rescale,
        metadata=sae_lens.saes.sae.SAEMetadata(model_name="m", hook_name="h", extra={"a": [1]}),
    )
    theirs = (sae_lens.TopKTrainingSAE if training else sae_lens.TopKSAE)(config)
    randomise(theirs)
    (theirs.save_inference_model if training else theirs.save_model)(tmp_path)
    sae = TopKSAE.from_pretrained(tmp_path)
    x = activations()
    close(sae(x), theirs(x))
    close(sae.encode(x), theirs.encode(x))
    assert torch.equal(l0(sae.encode(x)), l0(theirs.encode(x)))
    assert l0(sae.encode(x)).max() == K
    assert {"model_name": "m", "hook_name": "h", "extra": {"a": [1]}}.items() <= sae.config.metadata.items()


@pytest.mark.parametrize("rescale", [True, False])
def test_theirs_through_ours_and_back(rescale: bool, sae_lens: ModuleType, tmp_path: Path) -> None:
    config = sae_lens.saes.topk_sae.TopKSAEConfig(d_in=D_IN, d_sae=N_LATENTS, k=K, rescale_acts_by_decoder_norm=rescale)
    theirs = sae_lens.TopKSAE(config)
    randomise(theirs)
    theirs.save_model(tmp_path / "theirs")
    TopKSAE.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    back = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    close(back(activations()), theirs(activations()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_of_saelens(dtype: str, sae_lens: ModuleType, tmp_path: Path) -> None:
    theirs = sae_lens.TopKSAE(sae_lens.saes.topk_sae.TopKSAEConfig(d_in=D_IN, d_sae=N_LATENTS, k=K, dtype=dtype))
    randomise(theirs)
    theirs.save_model(tmp_path)
    sae = TopKSAE.from_pretrained(tmp_path)
    assert sae.dtype == getattr(torch, dtype)
    assert torch.equal(sae.W_enc, theirs.W_enc)
    assert torch.equal(sae.W_dec, theirs.W_dec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations='expected_average_only_in'"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations='constant_norm_rescale'"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations='covariance_whitening'"),
    ],
)
def test_what_weights_cannot_express_is_refused(
    changes: dict[str, str], message: str, sae_lens: ModuleType, tmp_path: Path
) -> None:
    config = sae_lens.saes.topk_sae.TopKSAEConfig(d_in=D_IN, d_sae=N_LATENTS, k=K, **changes)
    sae_lens.TopKSAE(config).save_model(tmp_path)
    with pytest.raises(TrimtabError, match=message):
        TopKSAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["Standard", "JumpReLU"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_relu_and_jumprelu_dictionaries_of_saelens_are_read_and_written(
    sae_lens: ModuleType, tmp_path: Path, name: str, apply_b_dec_to_input: bool
) -> None:
    config = getattr(sae_lens, f"{name}SAEConfig")(
        d_in=D_IN, d_sae=N_LATENTS, apply_b_dec_to_input=apply_b_dec_to_input
    )
    theirs = getattr(sae_lens, f"{name}SAE")(config)
    randomise(theirs)
    theirs.save_model(tmp_path / "theirs")
    ours, x = TopKSAE.from_pretrained(tmp_path / "theirs"), activations()
    assert isinstance(ours, JumpReLUSAE)
    close(ours.encode(x), theirs.encode(x))
    close(ours(x), theirs(x))
    ours.save_pretrained(tmp_path / "ours")
    back = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert type(back) is sae_lens.JumpReLUSAE
    close(back(x), theirs(x))


def test_other_architectures_of_saelens_are_refused(sae_lens: ModuleType, tmp_path: Path) -> None:
    theirs = sae_lens.GatedSAE(sae_lens.GatedSAEConfig(d_in=D_IN, d_sae=N_LATENTS))
    theirs.save_model(tmp_path)
    with pytest.raises(TrimtabError, match=r"architecture='gated' is not known.*Accepted: topk"):
        TopKSAE.from_pretrained(tmp_path)


def test_saelens_does_not_take_a_transcoder_for_something_else(sae_lens: ModuleType, tmp_path: Path) -> None:
    dictionary(transcoder=True, apply_b_dec_to_input=False).save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="topk_transcoder"):
        sae_lens.SAE.load_from_disk(tmp_path)


def test_the_code_for_saelens_in_the_card_runs(sae_lens: ModuleType, tmp_path: Path) -> None:
    sae = dictionary()
    sae.save_pretrained(tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python")[2].split("```")[0]
    names: dict[str, Any] = {"activations": activations()}
    exec(code.replace('snapshot_download("OWNER/NAME")', repr(str(tmp_path))), names)
    close(names["reconstruction"], sae(activations()))


def test_the_attributes_that_saebench_asks_for() -> None:
    sae = TopKSAE(TopKSAEConfig(d_in=D_IN, n_latents=N_LATENTS, k=K))
    assert sae.W_enc.shape == (D_IN, N_LATENTS)
    assert sae.W_dec.shape == (N_LATENTS, D_IN)
    assert (sae.b_enc.shape, sae.b_dec.shape) == ((N_LATENTS,), (D_IN,))
    assert (sae.device, sae.dtype) == (torch.device("cpu"), torch.float32)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(N_LATENTS), rtol=0, atol=1e-5)
    assert sae.decode(sae.encode(activations())).shape == (300, D_IN)


# ---------------------------------------------------------------- sparsify


def sparsify_outputs(coder: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Its latents as a dense tensor, and its reconstruction."""
    encoded = coder.encode(x)
    latents = torch.zeros(len(x), coder.num_latents).scatter(-1, encoded.top_indices, encoded.top_acts)
    return latents, coder.decode(encoded.top_acts, encoded.top_indices)


@pytest.mark.parametrize(
    "kind",
    [{}, {"apply_b_dec_to_input": False}, {"apply_b_dec_to_input": False, "transcoder": True}],
)
def test_sparsify_reads_ours(kind: dict[str, Any], sparsify: ModuleType, tmp_path: Path) -> None:
    sae, x = dictionary(**kind), activations()
    formats.write_sparsify(sae, tmp_path, "model.layers.9")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "model.layers.9")
    latents, reconstruction = sparsify_outputs(theirs, x)
    close(latents, sae.encode(x))
    close(reconstruction, sae(x))
    close(theirs(x).sae_out, sae(x))
    assert torch.equal(l0(latents), l0(sae.encode(x)))
    assert theirs.cfg.transcode is sae.config.transcoder


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("sizes", [{"expansion_factor": 4}, {"num_latents": 50}])
@pytest.mark.parametrize("multi_topk", [False, True])
def test_we_read_what_sparsify_saves(
    transcode: bool, sizes: dict[str, int], multi_topk: bool, sparsify: ModuleType, tmp_path: Path
) -> None:
    config = sparsify.SparseCoderConfig(k=K, transcode=transcode, multi_topk=multi_topk, **sizes)
    theirs = sparsify.SparseCoder(D_IN, config)
    randomise(theirs)
    theirs.save_to_disk(tmp_path / "layers.9")
    sae, x = formats.read_sparsify(tmp_path, "layers.9"), activations()
    latents, reconstruction = sparsify_outputs(theirs, x)
    close(sae.encode(x), latents)
    close(sae(x), reconstruction)
    assert torch.equal(l0(sae.encode(x)), l0(latents))
    assert l0(latents).max() == K
    assert sae.config.transcoder is transcode


def test_sparsify_loads_a_run_of_several(sparsify: ModuleType, tmp_path: Path) -> None:
    for name in ("layers.6", "layers.9"):
        formats.write_sparsify(dictionary(), tmp_path, name)
    assert list(sparsify.SparseCoder.load_many(str(tmp_path), local=True)) == ["layers.6", "layers.9"]


@pytest.mark.parametrize("changes", [{"activation": "groupmax"}, {"skip_connection": True}])
def test_other_functions_of_sparsify_are_refused(changes: dict[str, Any], sparsify: ModuleType, tmp_path: Path) -> None:
    sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(k=K, **changes)).save_to_disk(tmp_path / "layers.9")
    with pytest.raises(TrimtabError, match=f"{next(iter(changes))}="):
        formats.read_sparsify(tmp_path, "layers.9")


def test_from_sparsify_to_saelens(sparsify: ModuleType, sae_lens: ModuleType, tmp_path: Path) -> None:
    theirs = sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(k=K, expansion_factor=4))
    randomise(theirs)
    theirs.save_to_disk(tmp_path / "layers.9")
    formats.export_saelens(formats.read_sparsify(tmp_path, "layers.9"), tmp_path / "saelens")
    other = sae_lens.SAE.load_from_disk(tmp_path / "saelens")
    close(other(activations()), sparsify_outputs(theirs, activations())[1])


# -- what `trimtab.sae.saelens` registers -----------------------------------------------------------


@pytest.fixture
def registered(sae_lens: ModuleType) -> ModuleType:
    from trimtab.sae import saelens

    return saelens


def kron(**changes: Any) -> KronSAE:
    sae = KronSAE(KronSAEConfig(**{"d_in": D_IN, "h": 8, "m": 3, "n": 4, "k": K, "metadata": METADATA, **changes}))
    randomise(sae)
    return sae


@pytest.mark.parametrize("changes", [{}, {"activation": "product"}, {"mask_inactive": False}, {"eps": 0.25}])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_saelens_reads_a_kron_sae(
    sae_lens: ModuleType, registered: ModuleType, tmp_path: Path, changes: dict[str, Any], apply_b_dec_to_input: bool
) -> None:
    ours = kron(apply_b_dec_to_input=apply_b_dec_to_input, **changes)
    ours.save_pretrained(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert isinstance(theirs, registered.KronTopKSAE)
    x = activations()
    close(theirs.encode(x), ours.encode(x))
    close(theirs(x), ours(x))
    assert theirs.cfg.metadata.hook_name == METADATA["hook_name"]
    assert torch.equal(theirs.W_enc, ours.W_enc)


def test_we_read_the_kron_sae_that_saelens_saves(sae_lens: ModuleType, registered: ModuleType, tmp_path: Path) -> None:
    ours = kron()
    ours.save_pretrained(tmp_path / "ours")
    sae_lens.SAE.load_from_disk(tmp_path / "ours").save_model(tmp_path / "theirs")
    back = TopKSAE.from_pretrained(tmp_path / "theirs")
    assert isinstance(back, KronSAE)
    assert back.config.encoding == ours.config.encoding
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters(), strict=True))


def test_saelens_loads_a_kron_sae_from_the_hub(
    sae_lens: ModuleType, registered: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the download: the repository is a folder here."""
    from sae_lens.loading import pretrained_sae_loaders

    ours = kron()
    ours.save_pretrained(tmp_path / "layer-1")

    def download(repo_id: str, filename: str, **_: object) -> str:
        assert repo_id == "someone/kron"
        if not (tmp_path / filename).exists():
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    theirs = sae_lens.SAE.from_pretrained("someone/kron", "layer-1")
    assert isinstance(theirs, registered.KronTopKSAE)
    close(theirs(activations()), ours(activations()))


def test_a_kron_sae_folds_an_activation_scale_and_no_decoder_norms(
    sae_lens: ModuleType, registered: ModuleType, tmp_path: Path
) -> None:
    kron().save_pretrained(tmp_path)
    sae = sae_lens.SAE.load_from_disk(tmp_path)
    x = activations()
    before = sae.encode(3.0 * x)
    sae.fold_activation_norm_scaling_factor(3.0)
    close(sae.encode(x), before)
    with pytest.raises(NotImplementedError, match="one scale for each latent"):
        sae.fold_W_dec_norm()


def test_a_kron_sae_of_another_size_is_refused_by_saelens_too(registered: ModuleType) -> None:
    with pytest.raises(TrimtabError, match="d_sae=25 is not h m n = 24"):
        registered.KronTopKSAE(registered.KronTopKSAEConfig(d_in=4, d_sae=25, h=2, m=3, n=4, k=2))


@pytest.mark.parametrize("rescale", [True, False])
def test_saelens_trains_on_every_prefix_and_saves_an_ordinary_topk(
    sae_lens: ModuleType, registered: ModuleType, tmp_path: Path, rescale: bool
) -> None:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, D_IN, generator=generator)

    def batches() -> Any:
        while True:
            weights = torch.rand(64, 40, generator=generator)
            yield (weights * (weights > 0.9)) @ directions

    def trained(architecture: Any, config: Any) -> Any:
        torch.manual_seed(0)
        sae = architecture(config(d_in=D_IN, d_sae=64, k=8, rescale_acts_by_decoder_norm=rescale))
        settings = SAETrainerConfig(
            total_training_samples=64 * 200,
            train_batch_size_samples=64,
            lr=3e-3,
            lr_end=1e-6,
            lr_scheduler_name="constant",
            lr_warm_up_steps=10,
            dead_feature_window=50,
        )
        SAETrainer(settings, sae, batches()).fit()
        return sae

    def error_of(sae: TopKSAE, k: int) -> float:
        x = next(batches())
        return ((sae(x, k) - x).square().sum() / (x - x.mean(0)).square().sum()).item()

    hierarchical = trained(registered.HierarchicalTopKTrainingSAE, registered.HierarchicalTopKTrainingSAEConfig)
    plain = trained(sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig)
    errors = []
    for name, sae in (("hierarchical", hierarchical), ("plain", plain)):
        sae.save_inference_model(tmp_path / name)
        assert type(sae_lens.SAE.load_from_disk(tmp_path / name)) is sae_lens.TopKSAE
        errors.append(error_of(TopKSAE.from_pretrained(tmp_path / name), 2))
    assert errors[0] < errors[1]  # two latents alone say more where prefixes were trained


def test_the_hierarchical_loss_in_saelens_is_its_own_where_only_k_is_trained(registered: ModuleType) -> None:
    from sae_lens.saes.sae import TrainStepInput

    config = registered.HierarchicalTopKTrainingSAEConfig(d_in=D_IN, d_sae=64, k=8, budgets=(8,))
    sae = registered.HierarchicalTopKTrainingSAE(config)
    randomise(sae)
    step = TrainStepInput(
        sae_in=activations(), coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )
    output = sae.training_forward_pass(step)
    torch.testing.assert_close(output.losses["hierarchical_loss"], output.losses["mse_loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(output.loss, output.losses["hierarchical_loss"])

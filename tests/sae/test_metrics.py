"""Measures against float64 by hand; splicing against hooks of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, LlamaModel, PreTrainedTokenizerFast

from trimtab.core.activations import recording
from trimtab.core.errors import TrimtabError
from trimtab.core.text import TextSource
from trimtab.sae import metrics
from trimtab.sae.harvest import Harvest, HarvestConfig
from trimtab.sae.metrics import (
    Evaluation,
    ReconstructionMeter,
    area_under_curve,
    ev_curve,
    evaluate,
    language_loss,
    reconstruction,
    splice,
)
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

CONFIG = HarvestConfig(context=12, sequences_per_forward=2, sink_norm_ratio=None)


def documents(count: int = 12) -> list[str]:
    generator = torch.Generator().manual_seed(5)
    return [" ".join(f"w{i}" for i in torch.randint(0, 60, (9,), generator=generator).tolist()) for _ in range(count)]


def random_sae(d_in: int = 32, d_out: int | None = None, *, n_latents: int = 40, k: int = 4, seed: int = 1) -> TopKSAE:
    transcoder = d_out is not None
    config = TopKSAEConfig(
        d_in=d_in, d_out=d_out, n_latents=n_latents, k=k, transcoder=transcoder, apply_b_dec_to_input=not transcoder
    )
    sae = TopKSAE(config, seed=seed)
    with torch.no_grad():
        sae.encoder_bias.normal_(generator=torch.Generator().manual_seed(seed)).mul_(0.1)
        sae.decoder_bias.normal_(generator=torch.Generator().manual_seed(seed + 1)).mul_(0.1)
    return sae


def identity_sae(d: int = 32) -> TopKSAE:
    """Two latents for each feature, one for either sign: exact."""
    sae = TopKSAE(TopKSAEConfig(d_in=d, n_latents=2 * d, k=d))
    with torch.no_grad():
        for weight in (sae.encoder, sae.decoder):
            weight.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
    return sae


def zero_sae(d: int = 32) -> TopKSAE:
    sae = TopKSAE(TopKSAEConfig(d_in=d, n_latents=8, k=2))
    with torch.no_grad():
        sae.decoder.zero_()
    return sae


# -- reconstruction --------------------------------------------------------------------------------


def measured(x: Tensor, reconstruction: Tensor, active: Tensor, n_latents: int, cuts: list[int]) -> dict[str, Any]:
    """What the meter says when it is fed piece by piece; `active` [tokens, k] holds indices."""
    meter = ReconstructionMeter(x.shape[1], n_latents)
    for part, other, indices in zip(*(t.tensor_split(cuts) for t in (x, reconstruction, active)), strict=True):
        meter.update(part, other, indices.flatten())
    return meter.results()


@pytest.mark.parametrize("cuts", [[], [17], [3, 3, 40]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_meter_equals_float64_by_hand(cuts: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(50, 7, generator=generator) * torch.arange(1, 8) + 100).to(dtype)
    reconstruction = (x + torch.randn(50, 7, generator=generator)).to(dtype)
    active = torch.randint(0, 9, (50, 3), generator=generator)
    found = measured(x, reconstruction, active, 11, cuts)

    wide = x.double()
    errors = (x - reconstruction).double().square()
    spread = (wide - wide.mean(0)).square()
    top = spread.sum(0).argmax()
    rest = [i for i in range(7) if i != top]
    legacy = []
    for part, error in zip(wide.tensor_split(cuts), errors.tensor_split(cuts), strict=True):
        legacy += (1 - error.sum(1) / (part - part.mean(0)).square().sum(1)).tolist()
    assert found["tokens"] == 50
    assert found["explained_variance"] == pytest.approx((1 - errors.sum() / spread.sum()).item(), rel=1e-9)
    without = 1 - errors[:, rest].sum() / spread[:, rest].sum()
    assert found["explained_variance_without_top_dimension"] == pytest.approx(without.item(), rel=1e-9)
    assert found["explained_variance_legacy"] == pytest.approx(sum(legacy) / 50, rel=1e-9)
    counts = torch.bincount(active.flatten(), minlength=11)
    assert found["l0"] == 3.0
    assert found["dead_fraction"] == pytest.approx((counts == 0).sum().item() / 11)
    torch.testing.assert_close(found["densities"], counts / 50)


def test_a_massive_dimension_alone_looks_like_success_in_the_headline_only() -> None:
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 1000
    reconstruction = x.mean(0).expand_as(x).clone()
    reconstruction[:, 5] = x[:, 5]
    found = measured(x, reconstruction, torch.zeros(400, 1, dtype=torch.int64), 2, [])
    assert found["explained_variance"] > 0.9999
    assert found["explained_variance_without_top_dimension"] == pytest.approx(0.0, abs=1e-6)


def test_a_perfect_reconstruction_and_the_mean() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) + 5
    one_latent = torch.zeros(30, 1, dtype=torch.int64)
    perfect = measured(x, x.clone(), one_latent, 3, [10])
    mean = measured(x, x.mean(0).expand_as(x), one_latent, 3, [])
    for name in ("explained_variance", "explained_variance_without_top_dimension", "explained_variance_legacy"):
        assert perfect[name] == 1.0
        assert mean[name] == pytest.approx(0.0, abs=1e-6)


def test_the_curve_over_budgets_is_that_of_each_budget_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "ROWS", 50)
    sae, rows = random_sae(k=7), torch.randn(130, 32, generator=torch.Generator().manual_seed(4))
    curve = ev_curve(sae, rows)
    assert list(curve) == [1, 2, 4, 7]
    for j, value in {**curve, **ev_curve(sae, rows, [3])}.items():
        assert value == pytest.approx(reconstruction(sae, rows, j)["explained_variance"], abs=1e-6)
    for budgets in ([], [0, 1], [8]):
        with pytest.raises(TrimtabError, match=r"accepted: whole numbers of 1 to k=7"):
            ev_curve(sae, rows, budgets)


def test_the_area_under_a_curve_is_its_mean_over_the_logarithm() -> None:
    assert area_under_curve({1: 0.2, 2: 0.4, 8: 0.8}) == pytest.approx((0.3 + 0.6 * 2) / 3)
    assert area_under_curve({4: 0.7}) == 0.7


def test_nothing_measured_is_an_error() -> None:
    meter = ReconstructionMeter(4, 3)
    meter.update(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(TrimtabError, match="no token was evaluated"):
        meter.results()


# -- evaluation ------------------------------------------------------------------------------------


@pytest.fixture
def harvest(tiny_llama: Any, tiny_tokenizer: Any) -> Callable[..., Harvest]:
    def make(*places: str, text: list[str] | None = None, config: HarvestConfig = CONFIG) -> Harvest:
        source = TextSource(documents() if text is None else text)
        return Harvest(tiny_llama, tiny_tokenizer, source, places or ("resid.1",), config)

    return make


def all_ids(live: Harvest, sequences: int | None = None) -> Tensor:
    return torch.cat([forward.input_ids for forward in live.forwards(sequences=sequences)])


def causal_loss(
    model: Any, ids: Tensor, module: Any = None, replace: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Mean nats of the next token, `module`'s output replaced by a hook of the test's own."""
    handles = [] if module is None else [module.register_forward_hook(lambda module, inputs, output: replace(output))]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    for handle in handles:
        handle.remove()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def test_evaluation_equals_the_model_run_by_hand(harvest: Any, tiny_llama: Any) -> None:
    live, sae = harvest(), random_sae()
    told: list[int] = []
    found = evaluate(sae, live, place="resid.1", advance=told.append)

    ids = all_ids(live)
    keep = ids > 3
    with torch.no_grad():
        x = tiny_llama(input_ids=ids, output_hidden_states=True).hidden_states[2][keep]
        latents = sae.encode(x)
        errors = (x - sae.decode(latents)).double().square().sum()
    assert sum(told) == ids.numel()
    assert found.tokens == keep.sum()
    spread = (x.double() - x.double().mean(0)).square().sum()
    assert found.explained_variance == pytest.approx((1 - errors / spread).item(), rel=1e-5)
    assert found.l0 == pytest.approx((latents > 0).sum().item() / len(x))
    torch.testing.assert_close(found.densities, (latents > 0).float().mean(0))
    assert found.dead_fraction == pytest.approx((latents == 0).all(0).float().mean().item())

    def spliced(states: Tensor) -> Tensor:
        return torch.where(keep[..., None], sae(states), states)

    block = tiny_llama.model.layers[1]
    assert found.ce_tokens == ids[:, 1:].numel()
    assert found.ce_clean == pytest.approx(causal_loss(tiny_llama, ids), rel=1e-5)
    assert found.ce_spliced == pytest.approx(causal_loss(tiny_llama, ids, block, spliced), rel=1e-5)
    ablated = causal_loss(tiny_llama, ids, block, lambda states: states * ~keep[..., None])
    assert found.ce_ablated == pytest.approx(ablated, rel=1e-5)
    recovered = (found.ce_ablated - found.ce_spliced) / (found.ce_ablated - found.ce_clean)
    assert found.ce_recovered == pytest.approx(recovered)
    assert found.summary()["ce_recovered"] == found.ce_recovered
    assert "densities" not in found.summary()


def test_an_exact_dictionary_costs_the_model_nothing(harvest: Any) -> None:
    found = evaluate(identity_sae(), harvest(), place="resid.1")
    assert found.explained_variance == pytest.approx(1.0, abs=1e-9)
    assert found.l0 == pytest.approx(32, abs=0.1)
    assert found.ce_spliced == pytest.approx(found.ce_clean, rel=1e-6)
    assert found.ce_recovered == pytest.approx(1.0, abs=1e-4)


def test_a_dictionary_of_nothing_is_ablation(harvest: Any) -> None:
    found = evaluate(zero_sae(), harvest(), place="resid.1")
    assert found.ce_spliced == pytest.approx(found.ce_ablated)
    assert found.ce_recovered == pytest.approx(0.0, abs=1e-4)


def test_tokens_limit_what_is_read_and_a_short_text_is_used_whole(harvest: Any) -> None:
    live = harvest()
    told: list[int] = []
    found = evaluate(random_sae(), live, place="resid.1", tokens=30, ce_tokens=12, advance=told.append)
    assert sum(told) == 36
    assert found.tokens == (all_ids(live, 3) > 3).sum()
    assert found.ce_tokens == 22
    assert found.ce_clean == pytest.approx(causal_loss(live.model, all_ids(live, 2)), rel=1e-5)
    none = evaluate(random_sae(), live, place="resid.1", ce_tokens=0)
    assert none.ce_tokens == 0
    assert (none.ce_clean, none.ce_recovered) == (None, None)
    assert none.tokens == (all_ids(live) > 3).sum()


def test_special_tokens_and_sinks_are_left_as_they_are(harvest: Any, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    sink = tiny_tokenizer.convert_tokens_to_ids("w7")
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[sink] *= 300.0
    text = ["w7 w1 w2 w3 w4", "w5 w6 w7 w8"] * 8
    live = harvest("embed", text=text, config=HarvestConfig(context=12, sequences_per_forward=2))
    forward = next(live.forwards())
    assert torch.equal(~forward.keep, torch.isin(forward.input_ids, torch.tensor([0, 1, 2, 3, sink])))
    clean, sae = forward.activations["embed"], random_sae()
    with (
        torch.no_grad(),
        splice(tiny_llama, sae, place="embed", keep=forward.keep),
        recording(tiny_llama, ["embed"]) as seen,
    ):
        tiny_llama(input_ids=forward.input_ids)
    (spliced,) = seen["embed"]
    assert torch.equal(spliced[~forward.keep], clean[~forward.keep])
    torch.testing.assert_close(spliced[forward.keep], sae(clean[forward.keep]))
    with torch.no_grad(), splice(tiny_llama, sae, place="embed"), recording(tiny_llama, ["embed"]) as seen:
        tiny_llama(input_ids=forward.input_ids)
    torch.testing.assert_close(seen["embed"][0], sae(clean))


def test_a_transcoder_writes_what_it_read_elsewhere(harvest: Any, tiny_llama: Any) -> None:
    live, sae = harvest("resid.0", "mlp.1"), random_sae(32, 32)
    found = evaluate(sae, live, place="resid.0", target="mlp.1")
    ids = all_ids(live)
    keep = ids > 3
    with torch.no_grad():
        source = tiny_llama(input_ids=ids, output_hidden_states=True).hidden_states[1]

    def spliced(states: Tensor) -> Tensor:
        return torch.where(keep[..., None], sae(source), states)

    mlp = tiny_llama.model.layers[1].mlp
    assert found.ce_spliced == pytest.approx(causal_loss(tiny_llama, ids, mlp, spliced), rel=1e-5)
    ablated = causal_loss(tiny_llama, ids, mlp, lambda states: states * ~keep[..., None])
    assert found.ce_ablated == pytest.approx(ablated, rel=1e-5)
    outputs: list[Tensor] = []
    causal_loss(tiny_llama, ids, mlp, lambda states: outputs.append(states) or states)
    target = outputs[0][keep].double()
    errors = (target - sae(source[keep])).detach().square().sum()
    assert found.explained_variance == pytest.approx((1 - errors / (target - target.mean(0)).square().sum()).item())


def test_a_place_that_is_computed_before_cannot_be_spliced(harvest: Any, tiny_llama: Any) -> None:
    live, sae = harvest("resid.1", "mlp.0"), random_sae(32, 32)
    found = evaluate(sae, live, place="resid.1", target="mlp.0")
    assert found.ce_spliced is None
    assert found.tokens > 0
    with (
        pytest.raises(TrimtabError, match=r"target='mlp\.0' is computed before place='resid\.1'"),
        splice(tiny_llama, sae, place="resid.1", target="mlp.0"),
    ):
        tiny_llama(input_ids=torch.tensor([[1, 5]]))


def test_half_precision_stays_within_the_model(harvest: Any, tiny_llama: Any) -> None:
    tiny_llama.to(torch.bfloat16)
    found = evaluate(identity_sae(), harvest(), place="resid.1")
    assert found.ce_spliced == pytest.approx(found.ce_clean, rel=1e-6)


# -- models with another head or none ---------------------------------------------------------------


def masked_model_and_tokenizer() -> tuple[Any, Any]:
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    words = [*special.values(), "?", *(f"w{i}" for i in range(60))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).eval()
    return model, PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_a_masked_model_predicts_the_tokens_that_are_hidden() -> None:
    model, tokenizer = masked_model_and_tokenizer()
    live = Harvest(model, tokenizer, TextSource(documents()), ["resid.0"], CONFIG)
    found = evaluate(identity_sae(), live, place="resid.0")
    ids = all_ids(live)
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[:, 3::7] = True
    hidden &= ids > 3
    with torch.no_grad():
        logits = model(input_ids=torch.where(hidden, 3, ids)).logits[hidden]
    assert found.ce_tokens == hidden.sum()
    assert found.ce_clean == pytest.approx(F.cross_entropy(logits.double(), ids[hidden]).item(), rel=1e-5)
    assert found.ce_spliced == pytest.approx(found.ce_clean, rel=1e-5)


def test_a_model_without_a_language_head_has_no_cross_entropy(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    bare = LlamaModel(tiny_llama.config).eval()
    assert language_loss(bare) is None
    live = Harvest(bare, tiny_tokenizer, TextSource(documents()), ["resid.1"], CONFIG)
    found = evaluate(random_sae(), live, place="resid.1")
    assert (found.ce_clean, found.ce_spliced, found.ce_ablated, found.ce_recovered) == (None, None, None, None)
    assert found.ce_tokens == 0
    assert not {"ce_clean", "ce_recovered"} & found.summary().keys()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it by its old name
def test_a_wrapped_model_has_the_loss_of_what_it_wraps(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    plain = Harvest(tiny_llama, tiny_tokenizer, TextSource(documents()), ["resid.1"], CONFIG)
    expected = evaluate(random_sae(), plain, place="resid.1", ce_tokens=24)
    wrapped = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"], r=2))
    live = Harvest(wrapped, tiny_tokenizer, TextSource(documents()), ["resid.1"], CONFIG)
    found = evaluate(random_sae(), live, place="resid.1", ce_tokens=24)
    assert found.ce_spliced == pytest.approx(expected.ce_spliced, rel=1e-6)
    assert found.explained_variance == pytest.approx(expected.explained_variance, rel=1e-6)


# -- bad input -------------------------------------------------------------------------------------


def test_what_cannot_be_evaluated_is_named(harvest: Any) -> None:
    live = harvest("resid.1", "mlp.2")
    with pytest.raises(TrimtabError, match=r"place='resid\.2' is not known\. Did you mean resid\.1"):
        evaluate(random_sae(), live, place="resid.2")
    with pytest.raises(TrimtabError, match=r"place='mlp\.1' is not known\. Did you mean mlp\.2"):
        evaluate(random_sae(32, 32), live, place="resid.1", target="mlp.1")
    with pytest.raises(TrimtabError, match="tokens=0 must be at least 1"):
        evaluate(random_sae(), live, place="resid.1", tokens=0)
    with pytest.raises(TrimtabError, match="x has 32 features; this dictionary reads d_in=31"):
        evaluate(random_sae(31), live, place="resid.1")


@pytest.mark.parametrize(
    ("text", "message"), [([], "is empty"), (["w1"], "too short"), (["<bos> <eos>"] * 20, "no token was evaluated")]
)
def test_text_without_tokens_to_evaluate_is_refused(harvest: Any, text: list[str], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        evaluate(random_sae(), harvest(text=text), place="resid.1")


def test_a_summary_leaves_out_what_was_not_measured() -> None:
    evaluation = Evaluation(
        tokens=3,
        explained_variance=0.5,
        explained_variance_without_top_dimension=0.4,
        explained_variance_legacy=0.3,
        l0=2.0,
        dead_fraction=0.0,
        ce_tokens=0,
        ce_clean=None,
        ce_spliced=None,
        ce_ablated=None,
        densities=torch.zeros(4),
    )
    assert evaluation.summary() == {
        "tokens": 3,
        "explained_variance": 0.5,
        "explained_variance_without_top_dimension": 0.4,
        "explained_variance_legacy": 0.3,
        "l0": 2.0,
        "dead_fraction": 0.0,
        "ce_tokens": 0,
    }

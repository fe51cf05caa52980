"""Activations against identities of the residual stream and against Transformers' own `output_hidden_states`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trimtab.core.activations import (
    Place,
    edit,
    hf_module_name,
    n_layers,
    places,
    read,
    recording,
    tl_hook_name,
)
from trimtab.core.activations.hooks import _TAPS
from trimtab.core.errors import TrimtabError

COMMON = {"num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 99}
DECODER = COMMON | {"num_hidden_layers": 3, "max_position_embeddings": 64, "pad_token_id": 0}
GROUPED = DECODER | {"num_key_value_heads": 2, "head_dim": 8, "eos_token_id": None, "bos_token_id": 1}
NEOX = DECODER | {"eos_token_id": None, "bos_token_id": 1}
OPT = {k: v for k, v in NEOX.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": 32}
SPEECH = COMMON | {
    "num_hidden_layers": 3,
    "conv_dim": (16, 16),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3_config() -> hf.Gemma3TextConfig:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return hf.Gemma3TextConfig(**GROUPED, sliding_window=4, layer_types=kinds)


def vision_language_config() -> hf.Gemma3Config:
    return hf.Gemma3Config(text_config=gemma3_config().to_dict(), vision_config=VISION, mm_tokens_per_image=4)


CAUSAL: dict[str, tuple[type, Callable[[], Any]]] = {
    "llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**GROUPED)),
    "qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**GROUPED)),
    "qwen3": (hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**GROUPED)),
    "gemma2": (hf.Gemma2ForCausalLM, lambda: hf.Gemma2Config(**GROUPED, sliding_window=4)),
    "gemma3": (hf.Gemma3ForCausalLM, gemma3_config),
    "glm4": (hf.Glm4ForCausalLM, lambda: hf.Glm4Config(**GROUPED)),
    "gpt2": (hf.GPT2LMHeadModel, lambda: hf.GPT2Config(**NEOX)),
    "gpt_neox": (hf.GPTNeoXForCausalLM, lambda: hf.GPTNeoXConfig(**NEOX)),
    "gpt_neox-serial": (
        hf.GPTNeoXForCausalLM,
        lambda: hf.GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    ),
    "opt": (hf.OPTForCausalLM, lambda: hf.OPTConfig(**OPT)),
}
PRE_NORM = CAUSAL | {
    "llama-bare": (hf.LlamaModel, lambda: hf.LlamaConfig(**GROUPED)),
    "gemma3-vision": (hf.Gemma3ForConditionalGeneration, vision_language_config),
    "hubert-stable": (hf.HubertModel, lambda: hf.HubertConfig(**SPEECH, do_stable_layer_norm=True)),
    "wavlm-stable": (hf.WavLMModel, lambda: hf.WavLMConfig(**SPEECH, do_stable_layer_norm=True)),
}
POST_NORM = {
    "bert": (hf.BertForMaskedLM, lambda: hf.BertConfig(**DECODER)),
    "bert-bare": (hf.BertModel, lambda: hf.BertConfig(**DECODER)),
    "roberta": (hf.RobertaForMaskedLM, lambda: hf.RobertaConfig(**DECODER)),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        lambda: hf.DistilBertConfig(dim=32, hidden_dim=48, n_heads=4, n_layers=3, vocab_size=99),
    ),
    "albert": (hf.AlbertForMaskedLM, lambda: hf.AlbertConfig(**DECODER, embedding_size=16)),
    "albert-groups": (
        hf.AlbertModel,
        lambda: hf.AlbertConfig(**DECODER, embedding_size=16, num_hidden_groups=2, inner_group_num=2),
    ),
    "opt-post": (hf.OPTForCausalLM, lambda: hf.OPTConfig(**OPT, do_layer_norm_before=False)),
    "hubert": (hf.HubertForCTC, lambda: hf.HubertConfig(**SPEECH)),
    "wavlm": (hf.WavLMModel, lambda: hf.WavLMConfig(**SPEECH)),
}
ALL = PRE_NORM | POST_NORM
# Gemma 2 caps its attention logits, WavLM computes its attention itself: Transformers has no SDPA for them.
EAGER_ONLY = ("gemma2", "wavlm", "wavlm-stable")

# The two LayerNorms of a post-norm block: after the attention's addition, after the MLP's.
NORMS = {
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
    "bert-bare": ("attention.output.LayerNorm", "output.LayerNorm"),
    "roberta": ("attention.output.LayerNorm", "output.LayerNorm"),
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
    "albert": ("attention.LayerNorm", "full_layer_layer_norm"),
    "albert-groups": ("attention.LayerNorm", "full_layer_layer_norm"),
    "opt-post": ("self_attn_layer_norm", "final_layer_norm"),
    "hubert": ("layer_norm", "final_layer_norm"),
    "wavlm": ("layer_norm", "final_layer_norm"),
}


def fresh(name: str, attention: str | None = None) -> Any:
    """A tiny random model in float64; weights are larger than at initialisation, so that every part matters."""
    model_class, config = ALL[name]
    torch.manual_seed(0)
    attention = attention or ("eager" if name in EAGER_ONLY else "sdpa")
    model = model_class._from_config(config(), attn_implementation=attention).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


tiny = functools.cache(fresh)


def inputs_for(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name.startswith(("hubert", "wavlm")):
        return {"input_values": torch.randn(2, 90, generator=generator, dtype=torch.float64)}
    return {"input_ids": torch.randint(1, 99, (2, 7), generator=generator)}


def everything(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return read(model, places(model), inputs)


def stream(states: dict[str, Tensor], layer: int) -> Tensor:
    return states["embed"] if layer < 0 else states[f"resid.{layer}"]


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def noise(like: Tensor, seed: int = 2) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    yield
    assert not _TAPS


# ------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "eager") for name in PRE_NORM] + [(name, "sdpa") for name in PRE_NORM if name not in EAGER_ONLY],
)
def test_a_pre_norm_block_adds_its_attention_and_its_mlp(name: str, attention: str) -> None:
    model = tiny(name, attention)
    states = everything(model, inputs_for(name))
    assert list(states) == [str(place) for place in places(model)]
    for layer in range(3):
        added = states[f"attn.{layer}"] + states[f"mlp.{layer}"]
        assert states[f"mlp.{layer}"].shape == states["embed"].shape
        torch.testing.assert_close(stream(states, layer - 1) + added, stream(states, layer), rtol=0, atol=1e-11)
        assert states[f"attn.{layer}"].std() > 1e-3
        assert states[f"mlp.{layer}"].std() > 1e-3


@pytest.mark.parametrize("name", POST_NORM)
def test_a_post_norm_block_normalises_after_each_addition(name: str) -> None:
    model = tiny(name)
    states = everything(model, inputs_for(name))
    for layer in range(n_layers(model)):
        block = model.get_submodule(hf_module_name(model, f"resid.{layer}"))
        first, second = (block.get_submodule(path) for path in NORMS[name])
        with torch.no_grad():
            middle = first(stream(states, layer - 1) + states[f"attn.{layer}"])
            expected = second(middle + states[f"mlp.{layer}"])
        torch.testing.assert_close(states[f"resid.{layer}"], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_the_stream_is_what_transformers_calls_hidden_states(name: str) -> None:
    model, inputs = tiny(name), inputs_for(name)
    with torch.no_grad():
        reference = model(**inputs, output_hidden_states=True).hidden_states
    states = everything(model, inputs)
    assert len(reference) == n_layers(model) + 1
    # The last one is after the final norm in a pre-norm model.
    for layer in range(-1, n_layers(model) - 1):
        assert torch.equal(stream(states, layer), reference[layer + 1])


def test_the_last_resid_becomes_the_logits_through_the_final_norm_and_the_head() -> None:
    model, inputs = tiny("llama"), inputs_for("llama")
    states = everything(model, inputs)
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(states["resid.2"]))
    assert torch.equal(logits, output_of(model, inputs))


@pytest.mark.parametrize("name", ALL)
def test_edits_that_change_nothing_and_recordings_leave_the_output_bit_equal(name: str) -> None:
    model, inputs = tiny(name), inputs_for(name)
    plain = output_of(model, inputs)
    with edit(model, {place: lambda x: x for place in places(model)}):
        assert torch.equal(output_of(model, inputs), plain)
    with edit(model, {place: lambda x: x.clone() for place in places(model)}):
        assert torch.equal(output_of(model, inputs), plain)
    with recording(model, places(model)) as records:
        assert torch.equal(output_of(model, inputs), plain)
    states = everything(model, inputs)
    assert all(len(entries) == 1 and torch.equal(entries[0], states[name]) for name, entries in records.items())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["embed", "attn", "mlp", "resid"])
def test_an_edit_changes_its_place_and_what_comes_after_and_nothing_before(name: str, kind: str) -> None:
    model, inputs = tiny(name), inputs_for(name)
    place = kind if kind == "embed" else f"{kind}.1"
    clean, clean_output = everything(model, inputs), output_of(model, inputs)
    shift = noise(clean[place])
    with edit(model, {place: lambda x: x + shift}):
        edited, edited_output = everything(model, inputs), output_of(model, inputs)
    order = list(clean)
    before, after = order[: order.index(place)], order[order.index(place) + 1 :]
    if name == "gpt_neox" and kind == "attn":
        after.remove("mlp.1")  # parallel: the MLP reads the block's input
        before.append("mlp.1")
    assert all(torch.equal(clean[name], edited[name]) for name in before)
    assert torch.equal(edited[place], clean[place] + shift)
    assert not any(torch.allclose(clean[name], edited[name]) for name in after)
    assert not torch.allclose(clean_output, edited_output)
    assert torch.equal(output_of(model, inputs), clean_output)


@pytest.mark.parametrize("name", [*CAUSAL, "gemma3-vision", "hubert-stable"])
@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_what_an_edit_puts_in_is_what_the_block_adds(name: str, kind: str) -> None:
    model, inputs = tiny(name), inputs_for(name)
    value = noise(everything(model, inputs)["attn.1"])
    with edit(model, {f"{kind}.1": lambda _: value}):
        states = everything(model, inputs)
    added = states["attn.1"] + states["mlp.1"]
    assert torch.equal(states[f"{kind}.1"], value)
    torch.testing.assert_close(states["resid.0"] + added, states["resid.1"], rtol=0, atol=1e-11)


# ------------------------------------------------------------------------------------ names and shapes


@pytest.mark.parametrize(
    ("name", "resid", "attn", "mlp"),
    [
        ("llama", "model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp"),
        ("llama-bare", "layers.1", "layers.1.self_attn", "layers.1.mlp"),
        (
            "gemma3-vision",
            "model.language_model.layers.1",
            "model.language_model.layers.1.post_attention_layernorm",
            "model.language_model.layers.1.post_feedforward_layernorm",
        ),
        ("gpt2", "transformer.h.1", "transformer.h.1.attn", "transformer.h.1.mlp"),
        ("opt", "model.decoder.layers.1", "model.decoder.layers.1.self_attn", "model.decoder.layers.1.fc2"),
        (
            "albert-groups",
            "encoder.albert_layer_groups.0.albert_layers.1",
            "encoder.albert_layer_groups.0.albert_layers.1.attention.output_dropout",
            "encoder.albert_layer_groups.0.albert_layers.1.ffn_output",
        ),
        ("hubert-stable", "encoder.layers.1", "encoder.layers.1.dropout", "encoder.layers.1.feed_forward"),
    ],
)
def test_module_names_are_those_of_the_model(name: str, resid: str, attn: str, mlp: str) -> None:
    model = tiny(name)
    assert [hf_module_name(model, f"{kind}.1") for kind in ("resid", "attn", "mlp")] == [resid, attn, mlp]


def test_embed_is_the_output_of_no_module() -> None:
    with pytest.raises(TrimtabError, match=r"embed.*input of module 'model\.layers\.0'"):
        hf_module_name(tiny("llama"), "embed")


def test_names_in_transformer_lens() -> None:
    assert tl_hook_name("embed") == "blocks.0.hook_resid_pre"
    assert tl_hook_name("resid.9") == "blocks.9.hook_resid_post"
    assert tl_hook_name(Place("attn", 3)) == "blocks.3.hook_attn_out"
    assert tl_hook_name("mlp.0") == "blocks.0.hook_mlp_out"


def test_places_parse_and_print() -> None:
    for place in places(tiny("albert-groups")):
        assert Place.parse(str(place)) == place
    assert Place.parse(Place("resid", 2)) == Place("resid", 2)
    assert str(Place("resid", 11)) == "resid.11"


def test_layers_are_counted_as_they_run() -> None:
    assert n_layers(tiny("gpt2")) == 3
    assert n_layers(tiny("albert")) == 3
    assert n_layers(tiny("albert-groups")) == 6
    assert [str(place) for place in places(tiny("gpt2"))[:5]] == ["embed", "attn.0", "mlp.0", "resid.0", "attn.1"]


def test_a_place_may_be_given_alone_and_the_order_is_the_callers() -> None:
    model, inputs = tiny("llama"), inputs_for("llama")
    assert list(read(model, "resid.1", inputs)) == ["resid.1"]
    assert list(read(model, Place("attn", 0), inputs)) == ["attn.0"]
    asked = ["resid.2", "embed", Place("mlp", 0), "resid.2"]
    assert list(read(model, asked, inputs)) == ["resid.2", "embed", "mlp.0"]


# -------------------------------------------------------------------------------------------- stopping


def forbid(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("this part of the model must not run")

    monkeypatch.setattr(module, "forward", forward)


@pytest.mark.parametrize("name", CAUSAL)
def test_nothing_runs_after_the_last_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = fresh(name), inputs_for(name)
    whole = everything(model, inputs)
    blocks = [model.get_submodule(hf_module_name(model, f"resid.{layer}")) for layer in range(3)]
    forbid(model.get_output_embeddings(), monkeypatch)
    forbid(blocks[2], monkeypatch)
    some = read(model, ["embed", "attn.1", "resid.1", "resid.0"], inputs)
    assert all(torch.equal(some[name], whole[name]) for name in some)
    with pytest.raises(AssertionError, match="must not run"):
        read(model, "resid.1", inputs, stop=False)
    with pytest.raises(AssertionError, match="must not run"):
        read(model, "resid.2", inputs)


def test_attention_alone_stops_before_the_mlp_and_embed_before_the_first_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = fresh("llama"), inputs_for("llama")
    whole = everything(model, inputs)
    forbid(model.model.layers[1].mlp, monkeypatch)
    assert torch.equal(read(model, "attn.1", inputs)["attn.1"], whole["attn.1"])
    forbid(model.model.layers[0], monkeypatch)
    assert torch.equal(read(model, "embed", inputs)["embed"], whole["embed"])


def test_a_shared_block_runs_as_often_as_needed_and_the_count_starts_anew() -> None:
    model, inputs = fresh("albert"), inputs_for("albert")
    whole, runs = everything(model, inputs), []
    shared = model.get_submodule(hf_module_name(model, "resid.0"))
    shared.register_forward_hook(lambda *_: runs.append(1))
    assert torch.equal(read(model, "mlp.1", inputs)["mlp.1"], whole["mlp.1"])
    assert len(runs) == 1  # the second run ended inside
    with recording(model, "resid.2") as records:
        read(model, "attn.1", inputs)
        output_of(model, inputs)
        output_of(model, inputs)
    assert len(records["resid.2"]) == 2
    assert all(torch.equal(entry, whole["resid.2"]) for entry in records["resid.2"])


def test_stop_leaves_all_modes_as_they_were() -> None:
    model, inputs = fresh("gemma3").float(), inputs_for("gemma3")
    with torch.inference_mode():
        state = read(model, "resid.1", inputs)["resid.1"]
        assert torch.is_inference_mode_enabled()
    assert state.is_inference()
    assert not torch.is_inference_mode_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = read(model, ["embed", "attn.1"], inputs)
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    assert (states["embed"].dtype, states["attn.1"].dtype) == (torch.float32, torch.bfloat16)
    # Transformers' collector of hidden states is reset as well, and Trimtab's reads are not affected by it.
    read(model, "resid.1", {**inputs, "output_hidden_states": True})
    assert model(**inputs, output_hidden_states=False).hidden_states is None
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 4


def test_a_read_inside_an_edit_stops_only_itself() -> None:
    model, inputs = tiny("qwen3"), inputs_for("qwen3")
    clean = everything(model, inputs)

    def back_to_embed(x: Tensor) -> Tensor:
        return read(model, "embed", inputs)["embed"]

    with edit(model, {"resid.1": back_to_embed}), torch.no_grad():
        states = read(model, ["resid.1", "resid.2"], inputs)
    assert torch.equal(states["resid.1"], clean["embed"])
    assert not torch.allclose(states["resid.2"], clean["resid.2"])


# -------------------------------------------------------------------------------- caches and generation


@pytest.mark.parametrize("name", CAUSAL)
def test_with_a_cache_the_steps_add_up_to_the_whole(name: str) -> None:
    model, ids = tiny(name), inputs_for(name)["input_ids"]
    shift = noise(torch.empty(32, dtype=torch.float64))
    with torch.no_grad(), edit(model, {"resid.0": lambda x: x + shift, "mlp.1": lambda x: 2 * x}):
        whole = everything(model, {"input_ids": ids})
        cache = None
        with recording(model, places(model)) as records:
            for step in ids.split([3, 1, 1, 2], dim=1):
                cache = model(input_ids=step, past_key_values=cache, use_cache=True).past_key_values
    for name, entries in records.items():
        assert [entry.shape[1] for entry in entries] == [3, 1, 1, 2]
        torch.testing.assert_close(torch.cat(entries, dim=1), whole[name], rtol=0, atol=1e-11)


def greedy(model: Any, ids: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("name", CAUSAL)
def test_generate_records_and_edits_every_step(name: str) -> None:
    model, ids = tiny(name), inputs_for(name)["input_ids"]
    shift = 3 * noise(torch.empty(32, dtype=torch.float64))
    mask = torch.ones_like(ids)
    with recording(model, ["resid.1", "attn.2"]) as records, edit(model, {"resid.1": lambda x: x + shift}):
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        assert torch.equal(generated, greedy(model, ids, 5))
        states = everything(model, {"input_ids": generated[:, :-1]})
    assert not torch.equal(generated, greedy(model, ids, 5))
    for place in ("resid.1", "attn.2"):
        steps = records[place][:5]
        assert [step.shape for step in steps] == [(2, 7, 32)] + [(2, 1, 32)] * 4
        torch.testing.assert_close(torch.cat(steps, dim=1), states[place], rtol=0, atol=1e-11)


def test_a_half_filled_cache_is_refused_and_a_full_one_is_kept() -> None:
    model, inputs = tiny("llama"), inputs_for("llama")
    cache = hf.DynamicCache(config=model.config)
    with pytest.raises(TrimtabError, match=r"past_key_values.*stop=False"):
        read(model, "resid.0", {**inputs, "past_key_values": cache})
    read(model, "resid.0", {**inputs, "past_key_values": cache, "use_cache": True}, stop=False)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [7, 7, 7]


def test_stopping_makes_no_cache_even_if_asked_to() -> None:
    model, inputs = tiny("llama"), inputs_for("llama")
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["past_key_values"]), with_kwargs=True
    )
    read(model, "resid.0", {**inputs, "use_cache": True})
    handle.remove()
    assert seen == [None]


# --------------------------------------------------------------------------------- wrapped and quantised


# Transformers 5.23 renames gradient checkpointing; PEFT, and tests that 5.17 is to pass, use the old names.
renamed = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@renamed
@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ["q_proj", "down_proj"]), ("bert", ["query", "dense"]), ("opt", ["fc2"])]
)
def test_peft_models_are_read_edited_and_generate(name: str, targets: list[str]) -> None:
    base = fresh(name)
    plain = everything(base, inputs_for(name))
    model = get_peft_model(base, LoraConfig(target_modules=targets, r=2, init_lora_weights=False)).eval().double()
    states = everything(model, inputs_for(name))
    assert list(states) == list(plain)
    assert torch.equal(states["embed"], plain["embed"])
    assert not torch.allclose(states["resid.0"], plain["resid.0"])
    module = model.get_submodule(hf_module_name(model, "resid.1"))
    assert module is base.get_submodule(hf_module_name(base, "resid.1"))
    merged = everything(model.merge_and_unload(), inputs_for(name))
    for place, state in states.items():
        torch.testing.assert_close(state, merged[place], rtol=0, atol=1e-11)


@renamed
def test_a_peft_model_is_stopped_without_a_cache_and_generates_under_edits() -> None:
    model = get_peft_model(fresh("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).double()
    ids = inputs_for("llama")["input_ids"]
    caches = []
    handle = model.base_model.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(kwargs["past_key_values"]), with_kwargs=True
    )
    read(model, "resid.0", {"input_ids": ids})
    handle.remove()
    with recording(model, "resid.1") as records, edit(model, {"attn.1": lambda x: -x}):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert caches == [None]
    assert [entry.shape[1] for entry in records["resid.1"]] == [7, 1, 1]


def quantised(name: str) -> tuple[Any, dict[str, Tensor]]:
    """The model with int8 matrices in its blocks, in float32, and inputs for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated; only here is its int8 Linear on a CPU
        model = torch.ao.quantization.quantize_dynamic(fresh(name).float(), {nn.Linear}, dtype=torch.qint8)
    block = model.get_submodule(hf_module_name(model, "resid.0"))
    assert any(isinstance(module, torch.ao.nn.quantized.dynamic.Linear) for module in block.modules())
    inputs = inputs_for(name)
    return model, {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "opt", "bert", "albert", "hubert-stable"])
def test_quantised_models_are_read_and_edited(name: str) -> None:
    model, inputs = quantised(name)
    states = everything(model, inputs)
    with torch.no_grad():
        reference = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(states["resid.0"], reference[1])
    with edit(model, {"resid.1": lambda x: states["embed"]}):
        edited = everything(model, inputs)
    assert torch.equal(edited["resid.1"], states["embed"])
    assert torch.equal(edited["resid.0"], states["resid.0"])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "opt", "hubert-stable"])
def test_quantised_blocks_add_their_attention_and_their_mlp(name: str) -> None:
    states = everything(*quantised(name))
    added = states["attn.1"] + states["mlp.1"]
    torch.testing.assert_close(states["resid.0"] + added, states["resid.1"], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- contexts and order


def test_edits_apply_in_the_order_entered_and_readers_see_the_result() -> None:
    model, inputs = tiny("llama"), inputs_for("llama")
    clean = everything(model, inputs)["resid.1"]
    with (
        recording(model, "resid.1") as outer,
        edit(model, {"resid.1": lambda x: 2 * x}),
        recording(model, "resid.1") as middle,
        edit(model, {"resid.1": lambda x: x + 1}),
        edit(model, {Place("resid", 1): lambda x: x.abs()}),
    ):
        inner = everything(model, inputs)["resid.1"]
    expected = (2 * clean + 1).abs()
    assert torch.equal(inner, expected)
    assert torch.equal(outer["resid.1"][0], expected)
    assert torch.equal(middle["resid.1"][0], expected)


def test_contexts_may_end_in_any_order() -> None:
    model, inputs = fresh("llama"), inputs_for("llama")
    clean = everything(model, inputs)["resid.1"]
    first, second = ExitStack(), ExitStack()
    first.enter_context(edit(model, {"resid.1": lambda x: 2 * x}))
    second.enter_context(edit(model, {"resid.1": lambda x: x + 1}))
    first.close()
    assert torch.equal(everything(model, inputs)["resid.1"], clean + 1)
    second.close()
    assert torch.equal(everything(model, inputs)["resid.1"], clean)
    assert n_hooks(model) == 0


@pytest.mark.parametrize("captured_before", [False, True])
def test_output_hidden_states_are_edited_whenever_transformers_began_to_capture(captured_before: bool) -> None:
    model, inputs = fresh("gpt2"), inputs_for("gpt2")
    clean = everything(model, inputs)
    if captured_before:
        model(**inputs, output_hidden_states=True)
    with edit(model, {"resid.1": lambda x: 2 * x, "embed": lambda x: x.roll(1, 0)}):
        edited = everything(model, inputs)
        reference = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(reference[0], clean["embed"].roll(1, 0))
    assert torch.equal(reference[2], edited["resid.1"])


class InterruptionError(Exception):
    pass


def interrupt(x: Tensor) -> Tensor:
    raise InterruptionError


def test_no_hook_is_left_after_any_exception() -> None:
    model, inputs = fresh("albert"), inputs_for("albert")
    everything(model, inputs)
    assert n_hooks(model) == 0
    with pytest.raises(InterruptionError), edit(model, {"resid.0": interrupt}), recording(model, places(model)):
        output_of(model, inputs)
    assert n_hooks(model) == 0
    with pytest.raises(InterruptionError), edit(model, {"attn.2": interrupt}):
        read(model, places(model), inputs)
    assert n_hooks(model) == 0
    with pytest.raises(IndexError):
        read(model, "resid.1", {"input_ids": torch.full((1, 3), 1000)})
    assert n_hooks(model) == 0
    with pytest.raises(TrimtabError), edit(model, {"resid.0": lambda x: x, "resid.9": lambda x: x}):
        pass
    assert n_hooks(model) == 0
    with pytest.raises(KeyboardInterrupt), recording(model, "resid.0"):
        raise KeyboardInterrupt
    assert n_hooks(model) == 0


class InPlaceBlock(nn.Module):
    """Adds to its tensors in place, as some blocks in Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(8, 8)
        self.mlp = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        update = self.attn(hidden_states)
        update += hidden_states
        hidden_states = self.mlp(update)
        hidden_states += update
        return hidden_states, None


class Custom(nn.Module):
    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.stack = blocks
        self.head = nn.Linear(8, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.stack:
            inputs = block(hidden_states=inputs)[0]
            inputs *= 1.5  # in place on what a block gave
        return self.head(inputs)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_was_read_is_safe_from_later_in_place_operations(mode: Callable[[], Any]) -> None:
    model = Custom(nn.ModuleList([InPlaceBlock(), InPlaceBlock()]))
    names = [str(place) for place in places(model)]
    inputs = {"inputs": torch.randn(2, 3, 8)}
    with mode():
        alone = {name: read(model, name, inputs)[name].clone() for name in names}
        together = read(model, names, inputs, stop=False)
        with recording(model, names) as records:
            model(**inputs)
        assert torch.equal(alone["embed"], inputs["inputs"])
    for name in names:
        assert torch.equal(together[name], alone[name])
        assert torch.equal(records[name][0], alone[name])
    torch.testing.assert_close(alone["embed"] + alone["attn.0"] + alone["mlp.0"], alone["resid.0"])


# --------------------------------------------------------------------------------------------- gradients


# Not Llama and Gemma: their norms compute in float32, too coarse for finite differences.
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "bert", "albert", "hubert-stable"])
def test_gradients_flow_through_edits(name: str) -> None:
    model, inputs = tiny(name), inputs_for(name)
    vectors = [torch.zeros(32, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    names = ["embed", "attn.1", "mlp.1", "resid.1"]

    def loss(*shifts: Tensor) -> Tensor:
        steer = {place: lambda x, shift=shift: x * (1 + shift) for place, shift in zip(names, shifts, strict=True)}
        with edit(model, steer):
            return model(**inputs)[0].square().mean()

    assert torch.autograd.gradcheck(loss, vectors, fast_mode=True)
    gradients = torch.autograd.grad(loss(*vectors), vectors)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "bert", "albert", "hubert-stable"])
def test_gradients_with_respect_to_what_was_recorded(name: str) -> None:
    model, inputs = tiny(name), inputs_for(name)
    asked = ["embed", "attn.1", "mlp.1", "resid.1"]
    zeros = {place: torch.zeros_like(state).requires_grad_() for place, state in everything(model, inputs).items()}
    with edit(model, {place: lambda x, place=place: x + zeros[place] for place in asked}):
        expected = torch.autograd.grad(model(**inputs)[0].square().mean(), [zeros[place] for place in asked])
    with recording(model, asked) as records:
        loss = model(**inputs)[0].square().mean()
    found = torch.autograd.grad(loss, [records[place][0] for place in asked])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_gradients_of_a_stopped_read_reach_the_parameters() -> None:
    model, inputs = fresh("llama"), inputs_for("llama")
    read(model, "resid.1", inputs)["resid.1"].square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**inputs, output_hidden_states=True).hidden_states[2].square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def checkpointed(name: str, use_reentrant: bool) -> Any:
    model = fresh(name).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.skipif(
    GradientCheckpointingLayer.__call__ is not nn.Module.__call__,
    reason="this Transformers checkpoints a block's __call__, hooks included, which is refused (tested below)",
)
@renamed
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_blocks_under_gradient_checkpointing_give_the_same_gradients(name: str, use_reentrant: bool) -> None:
    steer = {"resid.1": lambda x: x.sin(), "embed": lambda x: 2 * x}
    gradients = []
    for model in (checkpointed(name, use_reentrant), fresh(name).train()):
        for module in [module for module in model.modules() if isinstance(module, nn.Dropout)]:
            module.p = 0.0
        with edit(model, steer), recording(model, ["resid.0", "resid.1"]) as records:
            loss = model(**inputs_for(name), use_cache=False)[0].square().mean()
        (loss + records["resid.0"][0].mean()).backward()
        assert [len(entries) for entries in records.values()] == [1, 1]
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-9, atol=1e-12)


@renamed
def test_the_inside_of_a_checkpointed_block_is_refused_in_training() -> None:
    model, inputs = checkpointed("llama", use_reentrant=False), inputs_for("llama")
    for place in ("attn.1", "mlp.0"):
        with pytest.raises(TrimtabError, match=rf"{place}.*gradient checkpointing off"):
            read(model, place, inputs)
        with pytest.raises(TrimtabError, match=rf"{place}.*checkpointing"), edit(model, {place: lambda x: x}):
            model(**inputs, use_cache=False)
    read(model.eval(), ["attn.1", "mlp.0"], inputs)


@renamed
def test_blocks_whose_call_is_checkpointed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpointed("llama", use_reentrant=False)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # as in transformers 5.17
        return nn.Module.__call__(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0]), "__call__", call)
    with pytest.raises(TrimtabError, match=r"resid\.1.*checkpointing"):
        read(model, "resid.1", inputs_for("llama"))


# ------------------------------------------------------------------------------------------------ errors


def test_an_unknown_place_lists_near_names() -> None:
    model, inputs = tiny("llama"), inputs_for("llama")
    with pytest.raises(TrimtabError, match=r"place='resd\.1' is not known\. Did you mean resid\.1"):
        read(model, "resd.1", inputs)
    with pytest.raises(TrimtabError, match=r"place='resid\.3'.*Did you mean resid\.[012].*Accepted: embed, attn\.0"):
        read(model, ["embed", "resid.3"], inputs)
    with pytest.raises(TrimtabError, match=r"place='mlp\.77'"), edit(model, {Place("mlp", 77): lambda x: x}):
        pass
    with pytest.raises(TrimtabError, match=r"places=\[\] is empty"):
        read(model, [], inputs)


@pytest.mark.parametrize("text", ["", "resid", "resid.", "resid.-1", "resid.1.0", "resid.²", "embed.0", "Resid.1"])
def test_a_place_that_is_none_does_not_parse(text: str) -> None:
    with pytest.raises(TrimtabError, match=r"resid\.<layer>"):
        Place.parse(text)


def test_places_are_checked_when_made() -> None:
    with pytest.raises(TrimtabError, match=r"kind='residual' is not known\. Did you mean resid"):
        Place("residual", 0)
    with pytest.raises(TrimtabError, match="layer=-1"):
        Place("resid", -1)
    with pytest.raises(TrimtabError, match="layer=None"):
        Place("attn")
    with pytest.raises(TrimtabError, match="layer=0 of kind='embed'"):
        Place("embed", 0)


def test_a_model_without_blocks_says_how_to_give_them() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = nn.Linear(8, 8)

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
            return self.mixer(hidden_states), None

    model, inputs = Custom(nn.Sequential(Block(), Block())), {"inputs": torch.randn(2, 8)}
    with pytest.raises(TrimtabError, match=r"model=Custom has no blocks.*layers=model\.path\.to"):
        places(model)
    for layers in (model.stack, "stack"):
        assert n_layers(model, layers) == 2
        assert [str(place) for place in places(model, layers)] == ["embed", "resid.0", "resid.1"]
        assert hf_module_name(model, "resid.1", layers=layers) == "stack.1"
        state = read(model, "resid.0", inputs, layers=layers)["resid.0"]
        assert torch.equal(state, model.stack[0](inputs["inputs"])[0])
        with edit(model, {"resid.1": torch.zeros_like}, layers=layers):
            assert torch.equal(model(**inputs), model.head.bias.expand(2, 5))
    with pytest.raises(TrimtabError, match=r"attn\.1.*block 1, a Block.*\(mixer\).*Accepted:.*self_attn"):
        read(model, "attn.1", inputs, layers="stack")
    with pytest.raises(TrimtabError, match=r"layers='stak' is not known\. Did you mean stack"):
        places(model, "stak")
    with pytest.raises(TrimtabError, match=r"layers='ModuleList of 1, not in the model'.*stack"):
        places(model, nn.ModuleList([Block()]))


def test_two_stacks_leave_the_choice_to_the_caller() -> None:
    config = hf.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=99, pad_token_id=0,
    )  # fmt: skip
    model = hf.BartModel._from_config(config).eval()
    with pytest.raises(TrimtabError, match=r"several lists of blocks: 'encoder\.layers', 'decoder\.layers'\. Give"):
        places(model)
    assert n_layers(model, "encoder.layers") == 2
    assert n_layers(model, model.decoder.layers) == 3
    inputs = {"input_ids": torch.randint(1, 99, (2, 5))}
    with torch.no_grad():
        reference = model(**inputs, output_hidden_states=True)
    state = read(model, "resid.1", inputs, layers="decoder.layers")["resid.1"]
    assert torch.equal(state, reference.decoder_hidden_states[2])


def test_sums_that_a_module_does_not_show_are_refused() -> None:
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}
    model = hf.BloomForCausalLM._from_config(hf.BloomConfig(**sizes))
    assert [str(place) for place in places(model)] == ["embed", "resid.0", "resid.1"]
    with pytest.raises(TrimtabError, match=r"attn\.0.*self_attention of BloomBlock adds the residual inside"):
        read(model, "attn.0", inputs_for("bloom"))
    granite = hf.GraniteForCausalLM._from_config(hf.GraniteConfig(**GROUPED, residual_multiplier=0.5))
    with pytest.raises(TrimtabError, match=r"mlp\.0.*scales what it adds"):
        read(granite, "mlp.0", inputs_for("granite"))
    chunked = hf.BertModel._from_config(hf.BertConfig(**DECODER, chunk_size_feed_forward=2))
    with pytest.raises(TrimtabError, match=r"mlp\.0.*chunk_size_feed_forward=0"):
        read(chunked, ["resid.0", "mlp.0"], inputs_for("bert"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[:, :1], r"returned shape=\(2, 1, 32\)\. Accepted: \(2, 7, 32\)"),
        (lambda x: x.float(), r"returned dtype=torch\.float32\. Accepted: torch\.float64"),
        (lambda x: x.to("meta"), r"returned device=meta\. Accepted: cpu"),
        (lambda x: None, "returned NoneType. Accepted: a tensor"),
    ],
)
@pytest.mark.parametrize("place", ["embed", "attn.1", "mlp.1", "resid.1"])
def test_an_edit_that_returns_something_else_is_named(place: str, function: Any, message: str) -> None:
    model, inputs = tiny("opt"), inputs_for("opt")
    with edit(model, {place: function}), pytest.raises(TrimtabError, match=rf"edits\['{place}'\] {message}"):
        output_of(model, inputs)


def test_a_place_that_did_not_run_is_an_error() -> None:
    model = fresh("hubert").train()
    model.config.layerdrop = 1.0
    model.config.mask_time_prob = 0.0
    with pytest.raises(TrimtabError, match=r"places=\['attn\.1', 'resid\.2'\] did not run.*LayerDrop"):
        read(model, ["attn.1", "resid.2"], inputs_for("hubert"))


def test_a_block_that_takes_or_gives_no_tensor_is_an_error() -> None:
    class Block(nn.Module):
        def forward(self, hidden_states: Tensor, x: Tensor | None = None) -> dict[int, Tensor]:
            return {0: hidden_states}

    class Other(Custom):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.stack[0](hidden_states=None, x=inputs)

    stack, inputs = nn.ModuleList([Block()]), {"inputs": torch.randn(2, 8)}
    with pytest.raises(TrimtabError, match=r"place='resid\.0': stack\.0 gives dict\. Accepted: a tensor"):
        read(Custom(stack), "resid.0", inputs, layers="stack")
    with pytest.raises(TrimtabError, match=r"place='embed': stack\.0 takes NoneType\. Accepted: a tensor"):
        read(Other(stack), "embed", inputs, layers="stack")

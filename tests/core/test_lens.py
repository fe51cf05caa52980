"""Logit lens against the models' own logits and against the formulas by hand, on tiny random models."""

from __future__ import annotations

import math
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from trimtab.core import lens
from trimtab.core.activations import edit, n_layers, read
from trimtab.core.errors import TrimtabError
from trimtab.core.lens import direction_lens, direction_tokens, logit_lens, top_tokens

D_MODEL, VOCAB = 24, 61
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 6}
OPT = {
    **{key: value for key, value in BASE.items() if key != "intermediate_size"},
    "ffn_dim": 40,
    "word_embed_proj_dim": D_MODEL,
}

CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama_tied": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, final_logit_softcapping=2.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GROUPED, final_logit_softcapping=2.0),
    "gemma3_uncapped": lambda: transformers.Gemma3TextConfig(**GROUPED),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=D_MODEL, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "neox": lambda: transformers.GPTNeoXConfig(**BASE),
    "opt": lambda: transformers.OPTConfig(**OPT),
    "opt_post_norm": lambda: transformers.OPTConfig(**OPT, do_layer_norm_before=False),
    "opt_projected": lambda: transformers.OPTConfig(**{**OPT, "word_embed_proj_dim": 16}, do_layer_norm_before=False),
    "granite": lambda: transformers.GraniteConfig(
        **{key: value for key, value in GROUPED.items() if key != "head_dim"}, logits_scaling=3.0
    ),
    "bert": lambda: transformers.BertConfig(**BASE),
    "albert": lambda: transformers.AlbertConfig(**BASE, embedding_size=16),
}
MASKED = ("bert", "albert")


def tiny(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    auto = transformers.AutoModelForMaskedLM if name in MASKED else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        # Norms and biases at their initial 1 and 0 would hide mistakes.
        nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.4)
    return model


def last_block_and_logits(model: nn.Module) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    place = f"resid.{n_layers(model) - 1}"
    with torch.no_grad():
        return read(model, [place], {"input_ids": ids})[place], model(input_ids=ids).logits


def tokenizer(size: int = VOCAB) -> transformers.PreTrainedTokenizerFast:
    words = models.WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))


@pytest.mark.parametrize("name", CONFIGS)
def test_lens_of_the_last_block_is_the_models_logits(name: str) -> None:
    model = tiny(name)
    states, logits = last_block_and_logits(model)
    assert torch.equal(logit_lens(model, states), logits)
    assert float(logits.std()) > 0.1


def test_lens_of_a_state_by_hand() -> None:
    model = tiny("llama")
    states = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(2))
    normalised = states / (states.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    by_hand = (normalised * model.model.norm.weight) @ model.lm_head.weight.T
    torch.testing.assert_close(logit_lens(model, states), by_hand.detach(), atol=1e-5, rtol=1e-5)


def test_soft_capping_bounds_the_lens_of_a_state_but_not_of_a_direction() -> None:
    model = tiny("gemma3")
    states = 50 * torch.randn(4, D_MODEL, generator=torch.Generator().manual_seed(2))
    uncapped = tiny("gemma3_uncapped")
    torch.testing.assert_close(
        logit_lens(model, states), 2 * torch.tanh(logit_lens(uncapped, states) / 2), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(direction_lens(model, states), direction_lens(uncapped, states))
    assert float(direction_lens(model, states).abs().max()) > 2


def test_shapes_and_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gemma2")
    states = torch.randn(2, 3, 5, D_MODEL, generator=torch.Generator().manual_seed(3))
    whole = logit_lens(model, states)
    directions = direction_lens(model, states[0, 0])
    tokens = direction_tokens(model, tokenizer(), states[0, 0], 3)
    assert whole.shape == (2, 3, 5, VOCAB)
    monkeypatch.setattr(lens, "_LOGITS_PER_PIECE", 4 * VOCAB)
    torch.testing.assert_close(logit_lens(model, states), whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logit_lens(model, states[1, 2, 4]), whole[1, 2, 4], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(direction_lens(model, states[0, 0]), directions, atol=1e-6, rtol=1e-5)
    in_pieces = direction_tokens(model, tokenizer(), states[0, 0], 3)
    assert [[text for text, _ in row] for row in in_pieces] == [[text for text, _ in row] for row in tokens]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_nothing_is_left_on_the_model(name: str) -> None:
    model = tiny(name)
    states, logits = last_block_and_logits(model)
    logit_lens(model, states)
    direction_lens(model, states[0])
    with pytest.raises(TrimtabError):
        logit_lens(model, states[..., :-1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(last_block_and_logits(model)[1], logits)
    assert not logit_lens(model, states.requires_grad_()).requires_grad


def test_an_edit_of_the_same_place_does_not_touch_the_states() -> None:
    model = tiny("llama")
    states, logits = last_block_and_logits(model)
    with edit(model, {"resid.2": lambda x: x + 1, "resid.0": lambda x: 2 * x}):
        assert torch.equal(logit_lens(model, states), logits)


# PEFT 0.21 asks Transformers 5.23 for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapted_model() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(tiny("llama"), config).eval()
    states, logits = last_block_and_logits(model)
    assert torch.equal(logit_lens(model, states), logits)
    assert torch.equal(direction_lens(model, states[0]), direction_lens(tiny("llama"), states[0]))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert"])
def test_half_precision_model_takes_any_states(name: str) -> None:
    model = tiny(name).bfloat16()
    states, logits = last_block_and_logits(model)
    assert torch.equal(logit_lens(model, states), logits)
    assert torch.equal(logit_lens(model, states.float()), logits)
    read_out = direction_lens(model, states[0].float())
    assert read_out.dtype == torch.bfloat16
    exact = direction_lens(model.float(), states[0].float())
    torch.testing.assert_close(read_out.float(), exact, atol=0.1, rtol=0.05)


# --- directions


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("llama", lambda model: model.model.norm.weight),
        ("llama_tied", lambda model: model.model.norm.weight),
        ("qwen2", lambda model: model.model.norm.weight),
        ("gemma2", lambda model: 1 + model.model.norm.weight),
        ("gemma3", lambda model: 1 + model.model.norm.weight),
        ("gpt2", lambda model: model.transformer.ln_f.weight),
        ("neox", lambda model: model.gpt_neox.final_layer_norm.weight),
        ("opt", lambda model: model.model.decoder.final_layer_norm.weight),
        ("opt_post_norm", lambda model: torch.ones(D_MODEL)),
        ("bert", lambda model: torch.ones(D_MODEL)),
    ],
)
def test_lens_of_a_direction_by_hand(name: str, scale: Callable[[nn.Module], Tensor]) -> None:
    model = tiny(name)
    directions = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(4))
    by_hand = (directions * scale(model)) @ model.get_output_embeddings().weight.T
    torch.testing.assert_close(direction_lens(model, directions), by_hand.detach(), atol=1e-5, rtol=1e-5)


def test_lens_of_a_direction_is_linear() -> None:
    model = tiny("gpt2")
    a, b = torch.randn(2, 3, D_MODEL, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        direction_lens(model, 2 * a - b), 2 * direction_lens(model, a) - direction_lens(model, b)
    )
    assert torch.equal(direction_lens(model, torch.zeros(1, D_MODEL)), torch.zeros(1, VOCAB))


def test_a_direction_is_the_change_of_a_states_lens_but_for_the_states_size() -> None:
    """d Norm(h) along v is gamma v / |h| for v orthogonal to h; here by central differences."""
    model = tiny("llama")
    state, direction = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(6))
    direction -= state * (direction @ state) / (state @ state)
    step = 0.02
    change = (logit_lens(model, state + step * direction) - logit_lens(model, state - step * direction)) / 2
    expected = step * direction_lens(model, direction[None])[0] / state.square().mean().sqrt()
    torch.testing.assert_close(change, expected, atol=1e-4, rtol=1e-3)


# --- tokens


def test_top_tokens() -> None:
    logits = torch.tensor([[0.0, 3.0, -1.0, 2.0], [5.0, 1.0, 9.0, 0.0]])
    assert top_tokens(logits, tokenizer(4), 2) == [[("w1", 3.0), ("w3", 2.0)], [("w2", 9.0), ("w0", 5.0)]]
    assert top_tokens(logits, tokenizer(3), 1) == [[("w1", 3.0)], [("w2", 9.0)]]
    assert top_tokens(logits[:, :3], tokenizer(4), 1) == [[("w1", 3.0)], [("w2", 9.0)]]
    assert top_tokens(logits[:0], tokenizer(4), 2) == []


def test_direction_tokens_find_an_unembedding_row() -> None:
    model = tiny("llama")
    weight = model.lm_head.weight.detach()
    directions = weight[[7, 40]] / model.model.norm.weight.detach()
    rows = direction_tokens(model, tokenizer(), directions, 4)
    assert rows == top_tokens(direction_lens(model, directions), tokenizer(), 4)
    largest = (weight[[7, 40]] @ weight.T).argmax(-1)
    assert [row[0][0] for row in rows] == [f"w{index}" for index in largest.tolist()]


# --- bad input


def test_models_without_a_way_to_tokens_are_named() -> None:
    states = torch.zeros(2, D_MODEL)
    without_head = transformers.AutoModel.from_config(CONFIGS["bert"]())
    t5 = transformers.T5Config(vocab_size=VOCAB, d_model=D_MODEL, d_kv=6, d_ff=40, num_layers=2, num_heads=4)
    encoder_decoder = transformers.AutoModelForSeq2SeqLM.from_config(t5)
    for function in (logit_lens, direction_lens):
        with pytest.raises(TrimtabError, match="model=BertModel has no unembedding"):
            function(without_head, states)
        with pytest.raises(TrimtabError, match="encoder-decoder"):
            function(encoder_decoder, states)
        with pytest.raises(TrimtabError, match="model=Linear has no unembedding"):
            function(nn.Linear(3, 3), states)


def test_bad_states_and_directions_are_named() -> None:
    model = tiny("llama")
    with pytest.raises(TrimtabError, match="states has width 23: the model's is 24"):
        logit_lens(model, torch.zeros(2, 23))
    with pytest.raises(TrimtabError, match=r"states has shape \[0, 24\]"):
        logit_lens(model, torch.zeros(0, 24))
    with pytest.raises(TrimtabError, match="directions has width 23"):
        direction_lens(model, torch.zeros(2, 23))
    with pytest.raises(TrimtabError, match="directions has width 24: the unembedding takes 16"):
        direction_lens(tiny("opt_projected"), torch.zeros(2, 24))


def test_heads_and_norms_that_are_no_matrix_and_no_scale_are_named() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(D_MODEL) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight / 2

    model = tiny("llama")
    model.model.norm = Halved()
    with pytest.raises(TrimtabError, match="final Halved that scales neither"):
        direction_lens(model, torch.zeros(1, D_MODEL))
    model = tiny("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, D_MODEL, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TrimtabError, match=r"unembedding of dtype torch\.int8"):
        direction_lens(model, torch.zeros(1, D_MODEL))


@pytest.mark.parametrize("n", [0, -1, 5])
def test_a_number_of_tokens_that_cannot_be_is_named(n: int) -> None:
    with pytest.raises(TrimtabError, match=f"n={n} must lie between 1 and 4"):
        top_tokens(torch.zeros(2, 4), tokenizer(), n)


def test_nan_logits_are_named() -> None:
    with pytest.raises(TrimtabError, match="NaN in row 1"):
        top_tokens(torch.tensor([[0.0, 1.0], [0.0, math.nan]]), tokenizer(), 1)

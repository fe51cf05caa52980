"""Perplexity against loops by hand, distinct-n and attribute rates against counts by hand."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from trimtab.core.errors import TrimtabError
from trimtab.core.text_metrics import attribute_rate, distinct_n, perplexity, token_nats

SENTENCE = "the a sun moon sea rises sets falls slowly and over under"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *SENTENCE.split(" ")]
TEXTS = [
    "the sun rises",
    "the moon sets slowly and the sea falls under the sun and over the moon",
    "a sea",
    "sun",
    "and the sun sets over the sea slowly slowly slowly",
]


def tiny_tokenizer(bos: str | None = "<s>", padding_side: str = "right") -> transformers.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, unk_token="<unk>", padding_side=padding_side
    )


def tiny_model(kind: str = "llama") -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    gpt2 = transformers.GPT2Config(
        vocab_size=len(WORDS) + 3, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    config = gpt2 if kind == "gpt2" else transformers.LlamaConfig(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    return model.eval()


def by_hand(model: nn.Module, sequence: list[int]) -> list[float]:
    """Nats of each token but the first, from one unpadded prefix at a time."""
    nats = []
    with torch.no_grad():
        for end in range(1, len(sequence)):
            probabilities = model(input_ids=torch.tensor([sequence[:end]])).logits[0, -1].double().softmax(-1)
            nats.append(-math.log(float(probabilities[sequence[end]])))
    return nats


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_nats_and_perplexity_are_those_of_a_loop(kind: str, bos: str | None, padding_side: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer(bos, padding_side)
    start = [] if bos is None else [1]
    expected = [by_hand(model, [*start, *(WORDS.index(word) for word in text.split())]) for text in TEXTS]
    counted = token_nats(model, tokenizer, TEXTS, batch_size=3, context=32)
    assert [tokens for _, tokens in counted] == [len(nats) for nats in expected]
    assert [nats for nats, _ in counted] == pytest.approx([sum(nats) for nats in expected], rel=1e-5)
    every = [value for nats in expected for value in nats]
    # Weighted by tokens: neither the mean over texts nor the mean over batches.
    assert perplexity(model, tokenizer, TEXTS, batch_size=3, context=32) == pytest.approx(
        math.exp(sum(every) / len(every)), rel=1e-5
    )


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_do_not_show(batch_size: int) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    expected = perplexity(model, tokenizer, TEXTS, batch_size=4, context=32)
    assert perplexity(model, tokenizer, TEXTS, batch_size=batch_size, context=32) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, tokenizer, TEXTS[::-1], context=32) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, tokenizer, [*TEXTS, ""], context=32) == pytest.approx(expected, rel=1e-5)


def test_windows_with_bos_score_each_token_once_after_their_own_bos() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = [WORDS.index(word) for word in TEXTS[1].split()]
    expected = [nats for start in range(0, len(ids), 4) for nats in by_hand(model, [1, *ids[start : start + 4]])]
    assert len(expected) == len(ids)
    ((nats, tokens),) = token_nats(model, tokenizer, TEXTS[1:2], context=5)
    assert tokens == len(ids)
    assert nats == pytest.approx(sum(expected), rel=1e-5)


def test_windows_without_bos_score_each_token_but_the_first_once() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(None)
    ids = [WORDS.index(word) for word in TEXTS[1].split()]
    expected = [nats for start in range(0, len(ids) - 1, 4) for nats in by_hand(model, ids[start : start + 5])]
    assert len(expected) == len(ids) - 1
    ((nats, tokens),) = token_nats(model, tokenizer, TEXTS[1:2], context=5)
    assert tokens == len(ids) - 1
    assert nats == pytest.approx(sum(expected), rel=1e-5)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity() -> None:
    model = tiny_model()
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tiny_tokenizer(), TEXTS, context=32) == pytest.approx(len(WORDS) + 3, rel=1e-6)


def test_a_text_with_nothing_to_score_counts_no_tokens() -> None:
    model = tiny_model()
    assert token_nats(model, tiny_tokenizer(None), ["sun", ""], context=32) == [(0.0, 0), (0.0, 0)]
    assert token_nats(model, tiny_tokenizer(), [""], context=32) == [(0.0, 0)]


def test_modes_of_the_model_are_kept_and_dropout_is_off() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    values = {perplexity(model, tiny_tokenizer(), TEXTS, context=32) for _ in range(3)}
    assert len(values) == 1
    assert [module.training for module in model.modules()] == before


def test_half_precision_model_is_scored_in_float32() -> None:
    model = tiny_model().bfloat16()
    value = perplexity(model, tiny_tokenizer(), TEXTS, context=32)
    assert value == pytest.approx(perplexity(model.float(), tiny_tokenizer(), TEXTS, context=32), rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "texts is empty"),
        ({"texts": "one string"}, "'one string' is one string"),
        ({"texts": ["", ""]}, "2 texts and no token to score"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"context": 1}, "context=1 must lie between 2 and the model's 32 positions"),
        ({"context": 33}, "context=33 must lie between 2 and the model's 32 positions"),
    ],
)
def test_bad_input_to_perplexity_is_named(options: dict, message: str) -> None:
    arguments = {"texts": TEXTS, "context": 32, **options}
    with pytest.raises(TrimtabError, match=message):
        perplexity(tiny_model(), tiny_tokenizer(), **arguments)


def test_models_without_perplexity_are_named() -> None:
    bert = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    t5 = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    for model in (
        transformers.AutoModelForMaskedLM.from_config(bert),
        transformers.AutoModelForSeq2SeqLM.from_config(t5),
        nn.Linear(2, 2),
    ):
        with pytest.raises(TrimtabError, match="no causal language model"):
            perplexity(model, tiny_tokenizer(), TEXTS)


def test_nan_logits_are_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[WORDS.index("moon")] = math.nan
    with pytest.raises(TrimtabError, match=r"NaN logits for texts\[1\]"):
        perplexity(model, tiny_tokenizer(), TEXTS, context=32)


# --- distinct-n


def test_distinct_n_by_hand() -> None:
    texts = ["a b a b", "a b c"]
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 2) == 3 / 5  # ab ba ab | ab bc: no pair "b a" across the texts
    assert distinct_n(texts, 2, denominator="tokens") == 3 / 7
    assert distinct_n(texts, 4) == 1.0
    assert distinct_n(texts, 5) == 0.0
    assert distinct_n([[1, 2, 1, 2], (1, 2, 3)], 2) == 3 / 5
    assert distinct_n(["same same same same same"], 2) == 1 / 4
    assert distinct_n(["", " "], 1, denominator="tokens") == 0.0


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {"n": 1}, "texts is empty"),
        ("a b", {"n": 1}, "is one string"),
        (["a b"], {"n": 0}, "n=0"),
        (["a b"], {"n": -2}, "n=-2"),
        (["a b"], {"n": 1, "denominator": "token"}, "denominator='token' is not known. Did you mean tokens"),
    ],
)
def test_bad_input_to_distinct_n_is_named(texts: list[str], options: dict, message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        distinct_n(texts, **options)


# --- attribute rate


def test_attribute_rate_takes_probabilities_booleans_and_tensors() -> None:
    texts = ["good", "bad", "good good", "so so"]
    assert attribute_rate(texts, lambda batch: [text.count("good") / 2 for text in batch]) == 0.5
    assert attribute_rate(texts, lambda batch: [text.count("good") / 2 for text in batch], threshold=0.6) == 0.25
    assert attribute_rate(texts, lambda batch: ["good" in text for text in batch]) == 0.5
    assert attribute_rate(texts, lambda batch: torch.tensor([0.4, 0.5, 0.6, 1.0])) == 0.75
    assert attribute_rate(tuple(texts), lambda batch: [-1.0, 0.0, 1.0, 2.0], threshold=0) == 0.75


def test_bad_input_to_attribute_rate_is_named() -> None:
    with pytest.raises(TrimtabError, match="texts is empty"):
        attribute_rate([], lambda batch: [])
    with pytest.raises(TrimtabError, match="is one string"):
        attribute_rate("text", lambda batch: [1.0] * 4)
    with pytest.raises(TrimtabError, match="1 scores for 2 texts"):
        attribute_rate(["a", "b"], lambda batch: [1.0])
    with pytest.raises(TrimtabError, match=r"NaN for texts\[1\]"):
        attribute_rate(["a", "b"], lambda batch: [1.0, math.nan])
    with pytest.raises(TrimtabError, match="threshold=nan"):
        attribute_rate(["a"], lambda batch: [1.0], threshold=math.nan)

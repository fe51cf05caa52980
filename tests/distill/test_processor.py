"""Two-model decoding: against a loop without caches, records, exactness where nothing is to do, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from trimtab.core.errors import TrimtabError
from trimtab.core.simplex import entropy, kl, trust_region_blend
from trimtab.distill.eos import StopIds, canonicalise
from trimtab.distill.functional import topk_statistics
from trimtab.distill.processor import RECORDS, TeacherGuided, TrustRegionBlend, generate_guided
from trimtab.distill.rollouts import (
    SKD,
    Behaviour,
    RolloutPolicy,
    TeacherMixture,
    TeacherOnly,
    TemperatureWarmup,
    TrustRegion,
    Vanilla,
)

VOCAB = 12
STOPS = StopIds((2,), (5,))
LENGTHS = (3, 7, 5, 7, 1, 6, 2, 7)
NEW = 20


def llama(seed: int, vocab: int = VOCAB) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def gemma3(seed: int) -> Any:
    """Every other block sees 4 tokens, fewer than the prompts have."""
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.25,
        query_pre_attn_scalar=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Gemma3ForCausalLM(config).eval()


MODELS = {"llama": llama, "gemma3": gemma3}


def prompts(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """Left-padded."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(6, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


def config(new: int = NEW, **more: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, disable_compile=True, **more)


@torch.no_grad()
def uncached(
    student: Any,
    teacher: Any,
    policy: RolloutPolicy,
    inputs: dict[str, Tensor],
    *,
    temperature: float = 1.0,
    step: int = 0,
    stop_ids: StopIds = STOPS,
    vocab_size: int | None = None,
) -> tuple[Tensor, dict[str, Tensor], Iterator[tuple[Tensor, Tensor, Tensor]]]:
    """Section 2.6 of the method, by the book: both models over the whole text for every token, all rows alike."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    going = torch.ones(len(ids), dtype=torch.bool)
    columns: dict[str, list[Tensor]] = {name: [] for name in RECORDS}
    distributions = []
    for _ in range(NEW):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = [
            m(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits for m in (student, teacher)
        ]
        ours, theirs = canonicalise(*(x[:, -1].float() / temperature for x in logits), stop_ids, vocab_size)
        log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
        behaviour = policy.log_behaviour(log_p, log_q, step)
        probs = torch.nn.functional.pad(behaviour.log_mu.exp(), (0, logits[0].shape[-1] - log_p.shape[-1]))
        token = torch.multinomial(probs, 1).squeeze(1) * going
        of_token = log_q.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        weight = behaviour.blend_weight
        values = (
            torch.full_like(of_token, torch.nan) if weight is None else weight,
            kl(behaviour.log_mu, log_p),
            entropy(log_p),
            entropy(log_q),
            of_token,
        )
        for name, value in zip(RECORDS, values, strict=True):
            columns[name].append(value.masked_fill(~going, torch.nan))
        distributions.append((log_p, log_q, going))
        ids = torch.cat([ids, token.unsqueeze(-1)], -1)
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], -1)
        going = going & (token != stop_ids.written)
        if not going.any():
            break
    return ids, {name: torch.stack(column, -1) for name, column in columns.items()}, iter(distributions)


# -- with caches as without ------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("teacher_kind", MODELS)
@pytest.mark.parametrize("student_kind", MODELS)
def test_tokens_and_records_are_those_of_a_loop_without_caches(
    student_kind: str, teacher_kind: str, cache: str
) -> None:
    student, teacher = MODELS[student_kind](1), MODELS[teacher_kind](2)
    inputs = prompts()
    processor = TrustRegionBlend(teacher, 0.3, stop_ids=STOPS, cache_implementation=cache, record_top_k=4)
    torch.manual_seed(3)
    ids = generate_guided(student, inputs, processor, config(cache_implementation=cache))
    torch.manual_seed(3)
    expected, records, distributions = uncached(student, teacher, TrustRegion(0.3, schedule="constant"), inputs)
    assert ids.equal(expected)
    # What this test stands on: rows that end, at different times, and one that does not.
    ends = (ids[:, max(LENGTHS) :] == STOPS.written).int()
    assert len({int(row.argmax()) for row in ends if row.any()}) >= 2
    assert not (ids[:, max(LENGTHS) :] == 5).any()

    assert processor.records().keys() == records.keys()
    for name, mine in processor.records().items():
        torch.testing.assert_close(
            mine, records[name], rtol=2e-4, atol=2e-5, equal_nan=True, msg=lambda m, n=name: n + m
        )
    assert 0 < (records["blend_weight"] == 1).sum() < records["blend_weight"].isfinite().sum()
    assert (records["divergence"].nan_to_num() <= 0.3 + 1e-5).all()

    top_ids, top_log_probs = processor.statistics()
    for t, (log_p, log_q, going) in enumerate(distributions):
        wanted_ids, wanted = topk_statistics(log_p, log_q, 4)
        assert top_ids[going, t].equal(wanted_ids[going])
        torch.testing.assert_close(top_log_probs[going, t], wanted[going], rtol=1e-4, atol=1e-4)
        assert top_log_probs[~going, t].eq(0).all()


@pytest.mark.parametrize(
    "policy",
    [SKD(3), TeacherMixture(0.4), TeacherOnly(1), TrustRegion(0.1, 10)],
    ids=lambda policy: type(policy).__name__,
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_guided_policy_decodes_as_without_caches(policy: RolloutPolicy, temperature: float) -> None:
    student, teacher, inputs = llama(1), gemma3(2), prompts()
    stop_ids = StopIds((2, 9), (5, 2))
    processor = TeacherGuided(teacher, policy, temperature=temperature, stop_ids=stop_ids)
    torch.manual_seed(4)
    ids = generate_guided(student, inputs, processor, config())
    torch.manual_seed(4)
    expected, records, _ = uncached(student, teacher, policy, inputs, temperature=temperature, stop_ids=stop_ids)
    assert ids.equal(expected)
    for name, mine in processor.records().items():
        torch.testing.assert_close(mine, records[name], rtol=2e-4, atol=2e-5, equal_nan=True)
    assert ("blend_weight" in processor.metrics()) == isinstance(policy, TrustRegion)


def test_without_padding_and_without_a_mask() -> None:
    student, teacher, inputs = llama(1), llama(2), prompts((4, 4, 4))
    processor = TrustRegionBlend(teacher, 0.3, stop_ids=STOPS)
    torch.manual_seed(3)
    ids = generate_guided(student, {"input_ids": inputs["input_ids"]}, processor, config())
    torch.manual_seed(3)
    assert ids.equal(uncached(student, teacher, TrustRegion(0.3, schedule="constant"), inputs)[0])


def test_heads_padded_to_different_sizes_are_cut_to_the_tokenizer() -> None:
    student, teacher, inputs = llama(1, VOCAB + 3), llama(2, VOCAB + 1), prompts()
    processor = TrustRegionBlend(teacher, 0.3, stop_ids=STOPS, vocab_size=VOCAB)
    torch.manual_seed(3)
    ids = generate_guided(student, inputs, processor, config())
    torch.manual_seed(3)
    policy = TrustRegion(0.3, schedule="constant")
    assert ids.equal(uncached(student, teacher, policy, inputs, vocab_size=VOCAB)[0])
    assert ids.max() < VOCAB
    with pytest.raises(TrimtabError, match="over 15 and 13 ids"):
        generate_guided(student, inputs, TrustRegionBlend(teacher, 0.3), config())


def test_several_samples_of_a_prompt_share_its_mask() -> None:
    student, teacher, inputs = llama(1), llama(2), prompts((3, 6))
    processor = TrustRegionBlend(teacher, 0.3, stop_ids=STOPS)
    torch.manual_seed(3)
    ids = generate_guided(student, inputs, processor, config(do_sample=True, num_return_sequences=3))
    torch.manual_seed(3)
    repeated = {name: x.repeat_interleave(3, dim=0) for name, x in inputs.items()}
    assert ids.equal(uncached(student, teacher, TrustRegion(0.3, schedule="constant"), repeated)[0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks
def test_a_teacher_with_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    student, teacher, inputs = llama(1), llama(2), prompts()
    adapted = get_peft_model(teacher, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    torch.manual_seed(3)
    ids = generate_guided(student, inputs, TrustRegionBlend(adapted, 0.3, stop_ids=STOPS), config())
    torch.manual_seed(3)
    assert ids.equal(uncached(student, adapted, TrustRegion(0.3, schedule="constant"), inputs)[0])


def test_rows_that_have_stopped_are_not_solved() -> None:
    class Counting(TrustRegion):
        def log_behaviour(self, log_p: Tensor, log_q: Tensor, step: int) -> Behaviour:
            solved.append(len(log_p))
            return super().log_behaviour(log_p, log_q, step)

    solved: list[int] = []
    processor = TeacherGuided(llama(2), Counting(0.3), stop_ids=STOPS)
    torch.manual_seed(3)
    ids = generate_guided(llama(1), prompts(), processor, config())
    new = ids[:, max(LENGTHS) :]
    going = (new == STOPS.written).int().cumsum(-1) - (new == STOPS.written).int() == 0
    assert solved == going.sum(0).tolist()
    assert solved[-1] < solved[0]


@pytest.mark.parametrize("ends", [None, 9, [9, 10, 7]], ids=str)
def test_without_stop_ids_rows_end_where_generate_ends_them(ends: int | list[int] | None) -> None:
    student = llama(1)
    processor = TrustRegionBlend(llama(2), 0.3)
    torch.manual_seed(3)
    new = generate_guided(student, prompts(), processor, config(eos_token_id=ends))[:, max(LENGTHS) :]
    stops = torch.isin(new, torch.tensor([2] if ends is None else ends)).int()
    written = stops.cumsum(-1) - stops == 0
    assert not written.all()
    for name, values in processor.records().items():
        assert values.isfinite().equal(written), name


def test_padding_outside_the_teachers_vocabulary_is_not_shown_to_it() -> None:
    """In front of prompts and behind what has stopped."""
    student, teacher, inputs = llama(1, VOCAB + 3), llama(2), prompts()
    processor = TrustRegionBlend(teacher, 0.3, stop_ids=STOPS, vocab_size=VOCAB)
    torch.manual_seed(3)
    ids = generate_guided(student, inputs, processor, config())
    outside = VOCAB + 1
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, outside)
    other = TrustRegionBlend(teacher, 0.3, stop_ids=STOPS, vocab_size=VOCAB)
    torch.manual_seed(3)
    padding = GenerationConfig(max_new_tokens=NEW, pad_token_id=outside, disable_compile=True)
    found = generate_guided(student, inputs, other, padding)
    assert (found[:, -1] == outside).any()
    assert found.masked_fill(found == outside, 0).equal(ids)
    torch.testing.assert_close(other.records(), processor.records(), equal_nan=True)


def test_texts_that_are_changed_in_place_are_noticed() -> None:
    processor = TrustRegionBlend(llama(2), 0.3)
    buffer, scores = torch.full((2, 5), 7), torch.randn(2, VOCAB)
    processor(buffer[:, :4], scores)
    buffer[0, 1] = 8
    with pytest.raises(TrimtabError, match="with other tokens in some row than before"):
        processor(buffer, scores)


def test_after_all_have_stopped_nothing_is_solved_or_recorded() -> None:
    processor = TrustRegionBlend(llama(2), 0.3, stop_ids=STOPS)
    ids, scores = prompts((4, 4))["input_ids"], torch.randn(2, VOCAB)
    processor(ids, scores)
    ids = torch.cat([ids, torch.full((2, 1), STOPS.written)], -1)
    assert processor(ids, scores) is scores
    assert processor.records()["divergence"].shape == (2, 1)


def test_in_plain_generate_with_nothing_but_a_list_of_processors() -> None:
    student, teacher, inputs = llama(1), llama(2), prompts()
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "eos_token_id": 2, "pad_token_id": 0}
    bare = TrustRegionBlend(teacher, 0.3, stop_ids=STOPS, attention_mask=inputs["attention_mask"])
    torch.manual_seed(3)
    ids = student.generate(**inputs, **sampling, logits_processor=[bare])
    guided = TrustRegionBlend(teacher, 0.3, stop_ids=STOPS)
    torch.manual_seed(3)
    assert ids.equal(generate_guided(student, inputs, guided, config()))
    assert bare.records()["teacher_log_prob"][:, -1].isnan().all()
    bare.finish(ids)
    torch.testing.assert_close(bare.records(), guided.records(), equal_nan=True)


def test_scores_that_generate_returns_are_log_mu() -> None:
    student, teacher, inputs = llama(1), llama(2), prompts((4, 4))
    processor = TrustRegionBlend(teacher, 0.3, stop_ids=STOPS)
    torch.manual_seed(3)
    output = generate_guided(student, inputs, processor, config(2, return_dict_in_generate=True, output_scores=True))
    torch.manual_seed(3)
    assert output.sequences.equal(
        generate_guided(student, inputs, TrustRegionBlend(teacher, 0.3, stop_ids=STOPS), config(2))
    )
    with torch.no_grad():
        ours, theirs = canonicalise(*(m(**inputs).logits[:, -1] for m in (student, teacher)), STOPS)
    log_mu, beta, _ = trust_region_blend(ours, theirs, 0.3)
    torch.testing.assert_close(output.scores[0], log_mu, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(processor.records()["blend_weight"][:, 0], beta, rtol=1e-4, atol=1e-4)
    assert processor.records()["teacher_log_prob"][:, 0].isfinite().all()


def test_a_teacher_of_half_precision_is_blended_in_float32() -> None:
    student, teacher, inputs = llama(1), llama(2).bfloat16(), prompts()
    scores = torch.randn(len(LENGTHS), VOCAB)
    log_mu = TrustRegionBlend(teacher, 0.1, attention_mask=inputs["attention_mask"])(inputs["input_ids"], scores)
    assert log_mu.dtype == torch.float32
    torch.testing.assert_close(log_mu.logsumexp(-1), torch.zeros(len(LENGTHS)), rtol=0, atol=1e-5)
    assert student.dtype == torch.float32


# -- distributions ---------------------------------------------------------------------------------


def test_what_is_sampled_is_distributed_as_mu() -> None:
    student, teacher = llama(1), llama(2)
    inputs = prompts((4,))
    draws = 20_000
    processor = TrustRegionBlend(teacher, 0.2, stop_ids=STOPS)
    torch.manual_seed(0)
    ids = generate_guided(student, inputs, processor, config(1, do_sample=True, num_return_sequences=draws))
    counts = ids[:, -1].bincount(minlength=VOCAB)
    with torch.no_grad():
        logits = [model(**inputs).logits[:, -1] for model in (student, teacher)]
    ours, theirs = canonicalise(*logits, STOPS)
    mu, p, q = (
        TrustRegion(0.2).log_behaviour(ours.log_softmax(-1), theirs.log_softmax(-1), 0).log_mu[0].exp(),
        ours.softmax(-1)[0],
        theirs.softmax(-1)[0],
    )
    assert counts[5] == 0

    def chi_square(probabilities: Tensor) -> float:
        expected = draws * probabilities
        large = expected >= 5  # the rest in one cell
        counted = torch.cat([counts[large], counts[~large].sum().unsqueeze(0)])
        expected = torch.cat([expected[large], expected[~large].sum().unsqueeze(0)])
        return float(((counted - expected) ** 2 / expected.clamp_min(1e-9)).sum())

    bound = 31.3  # 0.1 % of a chi-square with 11 degrees of freedom
    assert chi_square(mu) < bound
    assert chi_square(p) > 10 * bound
    assert chi_square(q) > 10 * bound


def test_divergences_of_tokens_add_up_to_that_of_texts() -> None:
    vocab, steps, epsilon = 4, 3, 0.05
    student, teacher = llama(1, vocab).double(), llama(2, vocab).double()
    prompt = torch.tensor([[1, 3]])
    # All texts of `steps` tokens, as prefixes of every length.
    log_mu_text, log_p_text, expected = torch.zeros(1).double(), torch.zeros(1).double(), 0.0
    prefixes = prompt
    for _ in range(steps):
        with torch.no_grad():
            scores = student(prefixes).logits[:, -1]
        blend = TrustRegionBlend(teacher, epsilon, attention_mask=torch.ones_like(prefixes))
        log_mu = blend(prefixes, scores)
        expected += float(log_mu_text.exp() @ blend.records()["divergence"][:, 0])
        log_mu_text = (log_mu_text.unsqueeze(-1) + log_mu).flatten()
        log_p_text = (log_p_text.unsqueeze(-1) + scores.log_softmax(-1)).flatten()
        tokens = torch.arange(vocab).repeat(len(prefixes)).unsqueeze(-1)
        prefixes = torch.cat([prefixes.repeat_interleave(vocab, 0), tokens], -1)
    assert len(log_mu_text) == vocab**steps
    of_texts = float(kl(log_mu_text, log_p_text))
    assert of_texts == pytest.approx(expected, rel=1e-9)
    assert 0.5 * steps * epsilon < of_texts <= steps * epsilon * (1 + 1e-9)


# -- nothing to do ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "step"), [(Vanilla(), 0), (TrustRegion(0.0), 0), (TrustRegion(0.02, 0), 0), (TrustRegion(0.02, 5), 5)]
)
def test_without_a_budget_the_rollouts_are_plain_generates_bit_for_bit(policy: RolloutPolicy, step: int) -> None:
    student, inputs = llama(1), prompts()
    processor = TeacherGuided(None, policy, step=step, stop_ids=StopIds((2,), (2,)))  # no teacher to call
    scores = torch.randn(3, VOCAB)
    assert processor(inputs["input_ids"][:3], scores) is scores
    torch.manual_seed(3)
    ids = generate_guided(student, inputs, processor, config())
    torch.manual_seed(3)
    plain = student.generate(**inputs, generation_config=config(do_sample=True, top_k=0))
    assert ids.equal(plain)
    assert processor.records() == {}
    assert processor.metrics() == {}


def test_a_student_alone_is_tempered_and_does_not_write_the_teachers_stops() -> None:
    student, inputs = llama(1), prompts()
    processor = TeacherGuided(None, TemperatureWarmup(0.5, 10), step=5, temperature=2.0, stop_ids=STOPS)
    torch.manual_seed(3)
    ids = generate_guided(student, inputs, processor, config())
    torch.manual_seed(3)
    sampling = config(do_sample=True, top_k=0, temperature=1.5, suppress_tokens=[5])
    assert ids.equal(student.generate(**inputs, generation_config=sampling))
    cut = TeacherGuided(None, Vanilla(), vocab_size=VOCAB - 2)(inputs["input_ids"], torch.zeros(len(LENGTHS), VOCAB))
    assert cut[:, -2:].eq(-torch.inf).all()
    assert cut[:, :-2].eq(0).all()


def test_the_same_model_twice_is_that_model() -> None:
    student, inputs = llama(1), prompts()
    processor = TrustRegionBlend(student, 0.02)
    torch.manual_seed(3)
    ids = generate_guided(student, inputs, processor, config())
    torch.manual_seed(3)
    assert ids.equal(student.generate(**inputs, generation_config=config(do_sample=True, top_k=0)))
    metrics = processor.metrics()
    assert metrics["share_teacher"] == 1.0  # a teacher within reach is followed wholly
    assert metrics["share_student"] == 0.0
    assert metrics["divergence"] < 1e-6
    assert metrics["student_entropy"] == pytest.approx(metrics["teacher_entropy"], abs=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_teacher_is_asked_for_its_last_logits_alone(kind: str) -> None:
    teacher, shapes = MODELS[kind](2), []
    teacher.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    generate_guided(llama(1), prompts(), TrustRegionBlend(teacher, 0.3), config(3, min_new_tokens=3))
    assert shapes == [(len(LENGTHS), 1, VOCAB)] * 3


def test_scores_that_came_in_are_not_changed() -> None:
    teacher, inputs = llama(2), prompts()
    scores = torch.randn(len(LENGTHS), VOCAB)
    before = scores.clone()
    TrustRegionBlend(teacher, 0.1, stop_ids=STOPS, attention_mask=inputs["attention_mask"])(inputs["input_ids"], scores)
    assert scores.equal(before)


@pytest.mark.parametrize("policy", [TrustRegion(0.3), SKD(3), TeacherMixture(0.4), TeacherOnly(1)], ids=str)
def test_tokens_that_the_student_masks_stay_masked(policy: RolloutPolicy) -> None:
    student, teacher, inputs = llama(1), llama(2), prompts()
    processor = TeacherGuided(teacher, policy, stop_ids=STOPS)
    torch.manual_seed(3)
    ids = generate_guided(student, inputs, processor, config(min_new_tokens=NEW, suppress_tokens=[7, 8]))
    assert ids.shape[1] == max(LENGTHS) + NEW
    assert not torch.isin(ids[:, max(LENGTHS) :], torch.tensor([2, 5, 7, 8])).any()
    records = processor.records()
    assert all(records[name].isfinite().all() for name in ("divergence", "student_entropy", "teacher_log_prob"))


# -- refusals --------------------------------------------------------------------------------------


def test_beam_search_and_assisted_generation_are_refused_while_they_run() -> None:
    student, teacher, inputs = llama(1), llama(2), prompts((5,))
    bare = {"max_new_tokens": 12, "pad_token_id": 0}
    with pytest.raises(TrimtabError, match="Beam search and assisted generation cannot be guided"):
        student.generate(
            **inputs, **bare, num_beams=3, do_sample=False, logits_processor=[TrustRegionBlend(teacher, 0.1)]
        )
    with pytest.raises(TrimtabError, match="Beam search and assisted generation cannot be guided"):
        student.generate(**inputs, **bare, assistant_model=llama(3), logits_processor=[TrustRegionBlend(teacher, 0.1)])


def test_a_processor_serves_one_call() -> None:
    student, teacher, inputs = llama(1), llama(2), prompts()
    processor = TrustRegionBlend(teacher, 0.1)
    generate_guided(student, inputs, processor, config(2))
    with pytest.raises(TrimtabError, match="each generate call needs a new processor"):
        generate_guided(student, inputs, processor, config(2))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", 0.7),
        ("top_k", 20),
        ("top_p", 0.9),
        ("min_p", 0.1),
        ("repetition_penalty", 1.2),
        ("num_beams", 2),
        ("do_sample", False),
        ("typical_p", 0.5),
        ("no_repeat_ngram_size", 2),
    ],
)
def test_settings_that_would_change_mu_are_refused(setting: str, value: float) -> None:
    with pytest.raises(TrimtabError, match=f"{setting}={value}"):
        generate_guided(llama(1), prompts(), TrustRegionBlend(llama(2), 0.1), config(**{setting: value}))


def test_the_students_own_sampling_settings_are_not_in_force() -> None:
    student, teacher, inputs = llama(1), llama(2), prompts()
    torch.manual_seed(3)
    ids = generate_guided(student, inputs, TrustRegionBlend(teacher, 0.1), config())
    student.generation_config.update(do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=3.0)
    torch.manual_seed(3)
    assert ids.equal(generate_guided(student, inputs, TrustRegionBlend(teacher, 0.1), config()))
    student.generation_config.min_p = 0.5
    with pytest.raises(TrimtabError, match=r"min_p=0.5, given or the student's own"):
        generate_guided(student, inputs, TrustRegionBlend(teacher, 0.1), config())


def test_other_ways_to_decode_are_refused() -> None:
    processor = TrustRegionBlend(llama(2), 0.1, stop_ids=STOPS)
    with pytest.raises(TrimtabError, match="asks for assisted_generation"):
        generate_guided(llama(1), prompts((4,)), processor, config(prompt_lookup_num_tokens=3))
    for named in ([3], [2, 3]):
        with pytest.raises(TrimtabError, match=r"eos_token_id=\[.*3\] must be \[2\], the student's stop ids"):
            generate_guided(llama(1), prompts(), processor, config(eos_token_id=named))


def test_padding_without_a_mask_is_refused_as_are_masks_that_do_not_fit() -> None:
    teacher, inputs, scores = llama(2), prompts(), torch.zeros(len(LENGTHS), VOCAB)
    mask = inputs["attention_mask"]
    with pytest.raises(TrimtabError, match="begins with the teacher's padding, token id 0"):
        TrustRegionBlend(teacher, 0.1)(inputs["input_ids"], scores)
    with pytest.raises(TrimtabError, match=r"attention_mask has shape \[8, 6\], input_ids \[8, 7\]"):
        TrustRegionBlend(teacher, 0.1, attention_mask=mask[:, 1:])(inputs["input_ids"], scores)
    with pytest.raises(TrimtabError, match=r"attention_mask has shape \[3, 7\]"):
        TrustRegionBlend(teacher, 0.1, attention_mask=mask[:3])(inputs["input_ids"], scores)
    with pytest.raises(TrimtabError, match="padded on the left"):
        TrustRegionBlend(teacher, 0.1, attention_mask=mask.flip(-1))(inputs["input_ids"], scores)


@pytest.mark.parametrize("policy", [TrustRegion(0.1), SKD(3), TeacherMixture(), TeacherOnly(1)], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_bad_logits_are_refused(policy: RolloutPolicy, bad: float) -> None:
    inputs = prompts((4, 4))
    scores = torch.randn(2, VOCAB)
    scores[1] = bad
    with pytest.raises(TrimtabError, match=r"NaN|no finite value"):
        TeacherGuided(llama(2), policy)(inputs["input_ids"], scores)
    teacher = llama(2)
    teacher.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(TrimtabError, match="NaN"):
        TeacherGuided(teacher, policy)(inputs["input_ids"], torch.randn(2, VOCAB))


def test_bad_settings_are_refused_by_name() -> None:
    teacher = llama(2)
    with pytest.raises(TrimtabError, match="training mode"):
        TrustRegionBlend(llama(2).train(), 0.1)
    with pytest.raises(TrimtabError, match="Linear must be a causal LM"):
        TrustRegionBlend(torch.nn.Linear(2, 2).eval(), 0.1)
    with pytest.raises(TrimtabError, match="temperature=0"):
        TrustRegionBlend(teacher, 0.1, temperature=0)
    with pytest.raises(TrimtabError, match="cache_implementation='hybrid' is not known"):
        TrustRegionBlend(teacher, 0.1, cache_implementation="hybrid")
    with pytest.raises(TrimtabError, match="vocab_size=0"):
        TrustRegionBlend(teacher, 0.1, vocab_size=0)
    with pytest.raises(TrimtabError, match="step=-1"):
        TeacherGuided(teacher, Vanilla(), step=-1)
    with pytest.raises(TrimtabError, match="max_length=None must be known"):
        TrustRegionBlend(teacher, 0.1, cache_implementation="static")(torch.tensor([[1]]), torch.zeros(1, VOCAB))
    with pytest.raises(TrimtabError, match="There are no statistics: record_top_k=0"):
        TrustRegionBlend(teacher, 0.1).statistics()

"""Two models write one text: a teacher inside `generate` of a student, as a `LogitsProcessor`.

Source: trust-region behaviour blending, arXiv 2605.31159: both models decode in lockstep on the same prefix, each
with its own cache, and the next token is sampled from what a `RolloutPolicy` makes of their distributions.

    blend = TrustRegionBlend(teacher, 0.02)
    generate_guided(student, inputs, blend, GenerationConfig(max_new_tokens=64))

Of each step, with l_S and l_T the two models' logits and tau the temperature: both are divided by tau, brought to one
vocabulary with one stop id (`trimtab.distill.eos`), normalised to log p and log q, and the scores become log mu. They
are final: nothing may follow, so `generate` samples at temperature 1 and without top-k or top-p, while what goes
before (suppressed tokens, least lengths) acts on the student; `generate_guided` sees to that. A policy that needs no
teacher never calls it, and leaves the scores as they are but for a temperature other than 1 and ids that the student
must not write.

Rows that have stopped are not solved; the teacher goes on in them with tokens that nobody reads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import GenerationMode

from trimtab.core.errors import TrimtabError
from trimtab.core.simplex import entropy, tempered
from trimtab.distill.decoder import TeacherDecoder
from trimtab.distill.eos import StopIds, canonicalise, suppressed_ids
from trimtab.distill.rollouts import RolloutPolicy, TrustRegion

__all__ = ["RECORDS", "TeacherGuided", "TrustRegionBlend", "generate_guided", "plain_sampling"]

RECORDS = ("blend_weight", "divergence", "student_entropy", "teacher_entropy", "teacher_log_prob")
"""What is kept of each token that was written: the trust region's beta, KL(mu || p), H(p), H(q), log q of the token."""

# Numbers that are worked on at a time. Here a part with its temporaries stays in a CPU's cache, and only bounds the
# memory of an accelerator.
_PART_CPU = 2**20
_PART_ACCELERATOR = 2**26

# Settings of generation that would change what mu is after the fact, and the values at which they do nothing.
_NEUTRAL = {
    "do_sample": True,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
_ABSENT = (
    "min_p",
    "top_h",
    "guidance_scale",
    "sequence_bias",
    "watermarking_config",
    "exponential_decay_length_penalty",
)


class _Pending(NamedTuple):
    """A step whose token is not known yet."""

    record: Float[Tensor, "quantities batch"]
    rows: Int[Tensor, " rows"] | None
    log_q: Float[Tensor, "batch vocab"]


class TeacherGuided(LogitsProcessor):
    """Scores of one `generate` call become those of a rollout policy; a new object for each call.

    - `teacher`: a causal LM in evaluation mode, on a device of its own if need be.
    - `policy`, `step`: who writes, at which optimiser step.
    - `temperature`: of both models; the policy's own temperature multiplies the student's when it writes alone.
    - `stop_ids`: both models', made one, at which `generate` must end rows, as it does if the student's
      `eos_token_id` names them; None leaves the logits, and only `generate_guided` then knows where rows end.
    - `vocab_size`: where heads are padded to different sizes, the size of the common tokenizer.
    - `attention_mask` [prompts, length]: needed with left-padded prompts; several samples of a prompt share its row.
    - `cache_implementation`: the teacher's cache, "dynamic" or "static"; the latter needs `max_length`, the longest
      that a text may become, prompt included (`generate_guided` fills it in).
    - `record_top_k`: keep the teacher's statistics at so many of the student's likeliest ids of each token.

    Raises `TrimtabError` for a teacher in training mode or without a cache, for settings outside their range, and
    while generating when texts do not grow by one token per call in the same rows (assisted generation, and beams as
    soon as two change places, which `generate_guided` refuses at once), when prompts look padded and no mask was
    given, when vocabularies do not fit, and for rows of logits with NaN or nothing finite.
    """

    def __init__(
        self,
        teacher: Any,
        policy: RolloutPolicy,
        *,
        step: int = 0,
        temperature: float | int = 1.0,
        stop_ids: StopIds | None = None,
        vocab_size: int | None = None,
        attention_mask: Tensor | None = None,
        cache_implementation: str = "dynamic",
        max_length: int | None = None,
        record_top_k: int = 0,
    ) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise TrimtabError(f"temperature={temperature} must be positive and finite.")
        if step < 0 or record_top_k < 0:
            raise TrimtabError(f"step={step} and record_top_k={record_top_k} must be 0 or more.")
        if vocab_size is not None and vocab_size < 1:
            raise TrimtabError(f"vocab_size={vocab_size} must be at least 1.")
        self.teacher = teacher
        self.policy = policy
        self.step = step
        self.temperature = temperature
        self.stop_ids = stop_ids
        self.vocab_size = vocab_size
        self.attention_mask = attention_mask
        self.max_length = max_length
        self.record_top_k = record_top_k
        self.guided = policy.needs_teacher(step)
        self._decoder = TeacherDecoder(teacher, cache_implementation) if self.guided else None
        self._ids = torch.empty(0, 0, dtype=torch.long)
        self._ends: tuple[int, ...] = () if stop_ids is None else stop_ids.student
        self._finished = torch.empty(0, dtype=torch.bool)
        self._pending: _Pending | None = None
        self._records: list[Tensor] = []
        self._top_ids: list[Tensor] = []
        self._top_log_probs: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._decoder is None:
            return self._alone(scores)
        alike = self._follow(input_ids)
        logits = self._decoder.next_logits(input_ids, self._finished, self.attention_mask, self.max_length)
        # The one look at the device before the solve, once both models' work is on its way.
        rows = self._going(alike, scores.device)
        if rows is not None and len(rows) == 0:
            return scores  # where `generate` learns a step late that all have stopped, it drops this one
        return self._blend(scores, logits.to(scores.device), rows)

    def finish(self, sequences: Tensor) -> None:
        """Take in the last token, which no call has seen: `sequences` is what `generate` returned."""
        if self._pending is not None:
            self._settle(sequences[:, self._ids.shape[1]])

    def records(self) -> dict[str, Tensor]:
        """`RECORDS` of every token, [batch, tokens], nan where a row had stopped; empty without a teacher.

        The last token's `teacher_log_prob` is nan until `finish`.
        """
        if not self._records:
            return {}
        stacked = torch.stack(self._records, -1)
        return dict(zip(RECORDS, stacked, strict=True))

    def metrics(self) -> dict[str, float]:
        """Means of `records` over tokens, and the shares of tokens that were wholly the student's or the teacher's.

        `blend_weight`, `share_student` (beta = 0) and `share_teacher` (beta = 1) are left out for a policy that has no
        blend weight. Empty without a teacher.
        """
        records = self.records()
        means = {name: float(values.nanmean()) for name, values in records.items()}
        if records and not math.isnan(means["blend_weight"]):
            weight = records["blend_weight"][~records["blend_weight"].isnan()]
            means["share_student"] = float((weight == 0).float().mean())
            means["share_teacher"] = float((weight == 1).float().mean())
        return {name: mean for name, mean in means.items() if not math.isnan(mean)}

    def statistics(self) -> tuple[Tensor, Tensor]:
        """With `record_top_k`: the student's likeliest ids and the teacher's log q there, both [batch, tokens, k].

        As `trimtab.distill.functional.topk_statistics` gives them at this temperature, of the models' common
        vocabulary, and of scores that other processors may have masked; 0 where a row had stopped. Raises
        `TrimtabError` if nothing was recorded.
        """
        if not self._top_ids:
            raise TrimtabError(f"There are no statistics: record_top_k={self.record_top_k}, guided={self.guided}.")
        return torch.stack(self._top_ids, 1), torch.stack(self._top_log_probs, 1)

    # -- one step ----------------------------------------------------------------------------------

    def _alone(self, scores: Tensor) -> Tensor:
        scores = tempered(scores, self.temperature * self.policy.temperature(self.step))
        suppressed = suppressed_ids(self.stop_ids, scores.shape[-1], self.vocab_size)
        if not suppressed:
            return scores
        return scores.index_fill(-1, torch.tensor(suppressed, device=scores.device), -torch.inf)

    def _follow(self, input_ids: Tensor) -> Tensor | None:
        """Take in the newest token; whether the rest is what was there before, on the device."""
        before, self._ids = self._ids, input_ids.clone()
        if before.numel() == 0:
            self._finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
            return None
        if input_ids.shape != (len(before), before.shape[1] + 1):
            raise _not_one_token(f"from {list(before.shape)} to {list(input_ids.shape)}")
        if self._ends:
            ends = torch.tensor(self._ends, device=input_ids.device)
            self._finished = self._finished | torch.isin(input_ids[:, -1], ends)
        return (input_ids[:, :-1] == before).all()

    def _going(self, alike: Tensor | None, device: torch.device) -> Tensor | None:
        """The rows that have not stopped; None for all."""
        if alike is None:
            return None
        same, *finished = torch.cat([alike.unsqueeze(0), self._finished]).tolist()
        if not same:
            raise _not_one_token("with other tokens in some row than before")
        self._settle(self._ids[:, -1])
        going = [row for row, stopped in enumerate(finished) if not stopped]
        return None if len(going) == len(finished) else torch.tensor(going, dtype=torch.long, device=device)

    def _blend(
        self, scores: Float[Tensor, "batch vocab"], logits: Float[Tensor, "batch _"], rows: Tensor | None
    ) -> Float[Tensor, "batch vocab"]:
        (batch, head), device = scores.shape, scores.device
        size = head if self.vocab_size is None else self.vocab_size
        k = min(self.record_top_k, size)
        dtype = torch.promote_types(torch.promote_types(scores.dtype, logits.dtype), torch.float32)
        log_mu = torch.full((batch, head), -torch.inf, dtype=dtype, device=device)
        if rows is not None:
            log_mu[:, self._ends[0]] = 0.0  # `generate` samples in rows that have stopped too, for nobody
        log_q = torch.empty(batch, size, dtype=dtype, device=device)
        record = torch.full((len(RECORDS), batch), torch.nan, dtype=dtype, device=device)
        top_ids, top_log_probs = (
            torch.zeros(batch, k, dtype=torch.long, device=device),
            torch.zeros(batch, k, dtype=dtype, device=device),
        )
        for part in _parts(rows, scores):
            ours, theirs = canonicalise(
                tempered(scores[part], self.temperature),
                tempered(logits[part], self.temperature),
                self.stop_ids,
                self.vocab_size,
            )
            log_p_part, log_q_part = ours.log_softmax(-1), theirs.log_softmax(-1)
            behaviour = self.policy.log_behaviour(log_p_part, log_q_part, self.step)
            if bool(behaviour.divergence.isnan().any()):
                raise TrimtabError("Logits of the student or the teacher have NaN, or nothing finite, in some row.")
            log_mu[part, :size] = behaviour.log_mu
            log_q[part] = log_q_part
            if behaviour.blend_weight is not None:
                record[0, part] = behaviour.blend_weight
            record[1:4, part] = torch.stack([behaviour.divergence, entropy(log_p_part), entropy(log_q_part)])
            if k:
                ids = log_p_part.topk(k, dim=-1).indices
                top_ids[part], top_log_probs[part] = ids, log_q_part.gather(-1, ids)
        self._records.append(record)
        self._pending = _Pending(record, rows, log_q)
        if k:
            self._top_ids.append(top_ids)
            self._top_log_probs.append(top_log_probs)
        return log_mu

    def _settle(self, tokens: Tensor) -> None:
        """Give the last step's record the teacher's log-probability of what was then sampled."""
        if self._pending is None:
            return
        record, rows, log_q = self._pending
        index = torch.arange(len(tokens), device=log_q.device) if rows is None else rows
        record[-1, index] = log_q[index, tokens.to(log_q.device)[index]]
        self._pending = None


class TrustRegionBlend(TeacherGuided):
    """`TeacherGuided` with a trust region of `epsilon` nats per token, without any schedule."""

    def __init__(
        self,
        teacher: Any,
        epsilon: float | int,
        *,
        temperature: float | int = 1.0,
        stop_ids: StopIds | None = None,
        vocab_size: int | None = None,
        attention_mask: Tensor | None = None,
        cache_implementation: str = "dynamic",
        max_length: int | None = None,
        record_top_k: int = 0,
    ) -> None:
        super().__init__(
            teacher,
            TrustRegion(epsilon, schedule="constant"),
            temperature=temperature,
            stop_ids=stop_ids,
            vocab_size=vocab_size,
            attention_mask=attention_mask,
            cache_implementation=cache_implementation,
            max_length=max_length,
            record_top_k=record_top_k,
        )


def generate_guided(
    student: Any,
    inputs: Mapping[str, Tensor],
    processor: TeacherGuided,
    generation_config: GenerationConfig | None = None,
) -> Any:
    """`student.generate` under `processor`, which is filled in from `inputs` and finished; returns what it returns.

    `inputs` are the tokenizer's, padded on the left. `generation_config` says lengths, caches and stop ids; how to
    sample is the policy's business, so that the student's own temperature, top-k and the like are not in force, and
    naming any here raises `TrimtabError`, as do beams and whatever else is not plain sampling. Texts end at the
    student's of the processor's `stop_ids`, which `eos_token_id`, if given, must name all and no others; without them
    at `eos_token_id`, by default the student's own.
    """
    config = plain_sampling(student, generation_config)
    named = student.generation_config.eos_token_id if config.eos_token_id is None else config.eos_token_id
    ends = [] if named is None else named if isinstance(named, list) else [named]
    if processor.stop_ids is not None:
        ours = processor.stop_ids.student
        if config.eos_token_id is not None and {*ends} != {*ours}:
            raise TrimtabError(f"eos_token_id={named} must be {list(ours)}, the student's stop ids.")
        ends = list(ours)
    config.eos_token_id = ends or None
    processor._ends = tuple(ends)
    if processor.attention_mask is None:
        processor.attention_mask = inputs.get("attention_mask")
    if processor.max_length is None and config.max_new_tokens is not None:
        processor.max_length = inputs["input_ids"].shape[1] + config.max_new_tokens
    output = student.generate(**inputs, generation_config=config, logits_processor=[processor])
    processor.finish(output if isinstance(output, Tensor) else output.sequences)
    return output


def plain_sampling(student: Any, given: GenerationConfig | None) -> GenerationConfig:
    """A copy of the configuration with nothing in it, nor left to the student's own, that would change mu afterwards.

    Raises `TrimtabError` where it asks for such.
    """
    config = GenerationConfig() if given is None else copy.deepcopy(given)
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            raise TrimtabError(
                f"{name}={value}: where the teacher writes along, texts are plain samples ({name}={neutral}), since "
                "the divergence from the student is that of the distributions before any such change."
            )
        setattr(config, name, neutral)
    for name in _ABSENT:
        # No value of these does nothing, and None takes the student's.
        value = getattr(config, name, None) or getattr(student.generation_config, name, None)
        if value is not None:
            raise TrimtabError(f"{name}={value}, given or the student's own: a rollout is plain sampling, without it.")
    mode = config.get_generation_mode()
    if mode != GenerationMode.SAMPLE:
        raise TrimtabError(f"generation_config asks for {mode.value}: a rollout is plain sampling.")
    return config


# -- pieces ----------------------------------------------------------------------------------------


def _not_one_token(how: str) -> TrimtabError:
    return TrimtabError(
        f"The texts went on {how}, where each must grow by one token per call. Beam search and assisted generation "
        "cannot be guided, and each generate call needs a new processor."
    )


def _parts(rows: Tensor | None, scores: Tensor) -> Sequence[slice | Tensor]:
    """Rows, all or these, so few at a time that what is made of them stays in a processor's cache."""
    size = max(1, (_PART_CPU if scores.device.type == "cpu" else _PART_ACCELERATOR) // scores.shape[-1])
    if rows is None:
        return [slice(start, start + size) for start in range(0, len(scores), size)]
    return rows.split(size)

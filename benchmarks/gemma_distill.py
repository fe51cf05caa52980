"""On-policy distillation of Gemma 3 270M into its own first nine layers: who writes the prefixes.

    teacher      Gemma 3 270M, 18 layers
    student      its embeddings (frozen), first nine layers, final norm and head. Cut so, it writes no words; a warm
                 start minimises KL(teacher || student) on film reviews, once for all arms, and goes to the cache
    prompts      "Film review: " and the first two words of a review; answers of up to 24 tokens at temperature 1
    loss         KL(student || teacher) of each prefix, over the vocabulary
    arms         the student writes (vanilla, TRL's trainer); TRB with eps = 0.1 and 0.02 nats a token over the first
                 quarter of the steps; the former at every step (fixed); SKD; vanilla after as many steps of
                 cross-entropy on the teacher's answers (SFT warm-up)

Measured before training, after the first quarter and half of the steps, and at the end, on openings and reviews that
neither the warm start nor an arm has seen:

    reverse KL       KL(student || teacher) in nats a token, on prefixes that the student itself writes
    forward KL       KL(teacher || student) in nats a token, on real reviews
    cross-entropy    the student's on those, in nats a token, at the end
    log q            the teacher's log-probability of the tokens of the rollouts, mean over the first quarter's
    seconds          training without the measuring; and of a step of the first quarter, where TRB takes two models

One seed; an arm takes some eight minutes on two cores, and so does the warm start, once. Not part of `make bench`.
Arms that have their rows are skipped: `python -m benchmarks.gemma_distill [--arms ARM ...] [--steps N]`.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.continuations import answer_log_probs, divergences, given, log_probs, sample
from benchmarks.real_arms import Arm, Figure, parse_arguments, run_arms
from trimtab.core.files import write_directory
from trimtab.core.simplex import kl
from trimtab.gallery.testbeds.real_models import cache_dir, gemma3_270m
from trimtab.gallery.testbeds.reviews import PREFIX, preference_split, rated_reviews

__all__ = ["Setting", "WarmStart", "first_layers", "main"]


@dataclass(frozen=True)
class WarmStart:
    """What makes the student: layers that are kept, and steps of forward KL on reviews, linearly cooled."""

    layers: int = 9
    steps: int = 40
    texts_per_step: int = 12
    learning_rate: float = 5e-4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all arms share. prompts: held-out ones; texts: held-out reviews; rollouts: a step's."""

    steps: int = 40
    rollouts: int = 8
    new_tokens: int = 24
    learning_rate: float = 1e-4
    prompts: int = 32
    texts: int = 48
    seed: int = 0
    warm_start: WarmStart = WarmStart()

    @property
    def quarter(self) -> int:
        return max(1, self.steps // 4)


def main() -> None:
    """Run what was asked for."""
    setting = Setting()
    arguments = parse_arguments("gemma_distill", [arm.name for arm in arms(setting)], setting.steps)
    if arguments.steps is None:
        return run_arms("gemma_distill", arms(setting), arguments.arms)
    few = WarmStart(steps=arguments.steps)
    trial = Setting(steps=arguments.steps, prompts=4, texts=8, warm_start=few)
    return run_arms("gemma_distill", arms(trial), arguments.arms, directory=None)


def arms(setting: Setting) -> list[Arm]:
    """In the order in which they are run; each stands beside vanilla."""

    def policy(name: str, *values: Any, **options: Any) -> Callable[[], Any]:
        def made() -> Any:
            from trimtab.distill import rollouts

            return getattr(rollouts, name)(*values, **options)

        return made

    def arm(name: str, made: Callable[[], Any] | None, *, sft: bool = False) -> Arm:
        return Arm(name, functools.partial(_train, setting, made, sft), None if name == "vanilla" else "vanilla")

    quarter = setting.quarter
    return [
        Arm("before training", functools.partial(_untrained, setting)),
        arm("vanilla", None),
        arm("TRB 0.1", policy("TrustRegion", 0.1, quarter)),
        arm("TRB 0.02", policy("TrustRegion", 0.02, quarter)),
        arm("fixed 0.1", policy("TrustRegion", 0.1, quarter, "constant")),
        arm("SKD", policy("SKD")),
        arm("SFT warm-up", policy("Vanilla"), sft=True),
    ]


# -- the student -----------------------------------------------------------------------------------


def first_layers(model: Any, layers: int) -> Any:
    """A new model of the first `layers` layers of `model`, a causal language model of Gemma 3; no weight is shared."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    config.layer_types = config.layer_types[:layers]
    student = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    student.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if name in student.state_dict()}
    )
    student.generation_config = copy.deepcopy(model.generation_config)
    return student


@functools.cache
def teacher() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gemma3_270m(), dtype=torch.float32).eval().requires_grad_(False)


@functools.cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gemma3_270m())


def student(start: WarmStart) -> Any:
    """The warm-started student, from the cache or made into it; its embeddings, and so its head, are frozen."""
    from transformers import AutoModelForCausalLM

    name = "-".join(f"{key}{value}" for key, value in asdict(start).items())
    folder = cache_dir() / "benchmarks" / f"gemma-student-{name}"
    if not folder.exists():
        made = _warm_started(start)
        with write_directory(folder) as new:
            made.save_pretrained(new)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found.get_input_embeddings().requires_grad_(False)
    return found


def _warm_started(start: WarmStart) -> Any:
    """Cut, and trained on reviews by the mean of KL(teacher || student) a token, at a rate that falls linearly to 0."""
    made = first_layers(teacher(), start.layers)
    made.get_input_embeddings().requires_grad_(False)
    texts = [review.text for review in split().others]

    def loss(step: int) -> Tensor:
        first = step * start.texts_per_step
        rows = reviews([texts[index % len(texts)] for index in range(first, first + start.texts_per_step)])
        with torch.no_grad():
            log_q = log_probs(teacher(), rows)[rows.answer_mask]
        return kl(log_q, log_probs(made, rows)[rows.answer_mask]).mean()

    optimiser = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], start.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / start.steps)
    for step in range(start.steps):
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        print(f"warm start, step {step + 1}/{start.steps}: {value.item():.3f} nats a token", flush=True)
    return made.eval()


# -- data ------------------------------------------------------------------------------------------


@functools.cache
def split() -> Any:
    return preference_split(rated_reviews())


def openings(texts: Sequence[str]) -> list[str]:
    """Prompts, each once, in the order of `texts`."""
    return list(dict.fromkeys(PREFIX + " ".join(text.split(" ")[:2]) for text in texts))


def reviews(texts: Sequence[str], longest: int = 32) -> Any:
    """Reviews as answers to "Film review: ", which end with a stop; cut after `longest` tokens."""
    words = tokenizer()
    prompt = words(PREFIX.rstrip()).input_ids
    answers = [[*words(" " + text, add_special_tokens=False).input_ids, words.eos_token_id] for text in texts]
    return given([prompt] * len(answers), [answer[:longest] for answer in answers])


def held_out(setting: Setting) -> tuple[list[str], list[str]]:
    """Prompts and reviews of openings that neither the warm start nor an arm has seen."""
    pairs = split().held_out
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)][: setting.texts]
    return openings([pair.chosen for pair in pairs])[: setting.prompts], texts


# -- arms ------------------------------------------------------------------------------------------


def trainer(setting: Setting, made: Callable[[], Any] | None, out: str) -> Any:
    """TRL's trainer where the student writes, ours with the rollout policy that `made` makes; same prompts and order.

    Its `recorded` are the rollouts of the first quarter: the ids of the prompts, and of the answers.
    """
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    host: Any = DistillationTrainer
    config: Any = DistillationConfig
    if made is not None:
        from trimtab.distill.config import TRBConfig
        from trimtab.distill.trainer import TRBTrainer

        host, config = TRBTrainer, TRBConfig
    recorded: tuple[list[Any], list[Any]] = [], []

    class Recording(host):
        def _generate_single_turn(self, prompt_ids: Any, *others: Any, **options: Any) -> Any:
            answers = super()._generate_single_turn(prompt_ids, *others, **options)
            if self.state.global_step < setting.quarter:
                for kept, new in zip(recorded, (prompt_ids, answers), strict=True):
                    kept.extend(new)
            return answers

    seen = set(held_out(setting)[0])
    prompts = [prompt for prompt in openings([review.text for review in split().others]) if prompt not in seen]
    settings = config(
        out,
        max_steps=setting.steps,
        per_device_train_batch_size=setting.rollouts,
        max_completion_length=setting.new_tokens,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=float(setting.steps // 12),
        seed=setting.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        logging_steps=4.0,
    )
    made_host = Recording(
        model=student(setting.warm_start),
        teacher_model=teacher(),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer(),
        **({} if made is None else {"rollout_policy": made()}),
    )
    made_host.recorded = recorded
    return made_host


class Measuring(TrainerCallback):
    """Measures the student after chosen steps, and takes the time of every step without that."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.figures: dict[str, Figure] = {}
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        times = {self.setting.quarter: "a quarter", self.setting.steps // 2: "half", self.setting.steps: "the end"}
        if state.global_step in times:
            self.figures |= _measure(self.setting, model, times[state.global_step])


def _untrained(setting: Setting) -> dict[str, Figure]:
    return _measure(setting, student(setting.warm_start), "the end")


def _train(setting: Setting, made: Callable[[], Any] | None, sft: bool) -> dict[str, Figure]:
    measuring = Measuring(setting)
    with tempfile.TemporaryDirectory() as out:
        host = trainer(setting, made, out)
        before = time.perf_counter()
        if sft:
            _sft_warmup(setting, host)
        before = time.perf_counter() - before
        host.add_callback(measuring)
        host.train()
    rollouts = given(*host.recorded)
    likelihood = answer_log_probs(teacher(), rollouts).sum() / rollouts.answer_mask.sum()
    quarter = measuring.seconds[: setting.quarter]
    return measuring.figures | {
        "log q of rollouts, first quarter": (float(likelihood), "nats a token"),
        "seconds": (before + sum(measuring.seconds), "s"),
        "seconds a step, first quarter": (sum(quarter) / len(quarter), "s"),
    }


def _measure(setting: Setting, model: Any, when: str) -> dict[str, Figure]:
    """Divergences from the teacher at a time of training; the global generator is left as it was."""
    prompts, texts = held_out(setting)
    words = tokenizer()
    training = model.training
    model.eval()
    own = sample(
        model, words(prompts).input_ids, [words.eos_token_id], new_tokens=setting.new_tokens, seed=setting.seed
    )
    real = reviews(texts)
    reverse, _ = divergences(model, teacher(), own)
    forward, _ = divergences(teacher(), model, real)
    entropy = -answer_log_probs(model, real)
    model.train(training)

    def a_token(sums: Tensor, rows: Any) -> Figure:
        return float(sums.sum() / rows.answer_mask.sum()), "nats a token"

    figures = {
        f"reverse KL, {when}": a_token(reverse, own),
        f"forward KL, {when}": a_token(forward, real),
    }
    return figures | ({"cross-entropy, the end": a_token(entropy, real)} if when == "the end" else {})


def _sft_warmup(setting: Setting, host: Any) -> None:
    """As many updates on one teacher's answer to each prompt as the first quarter has steps, at the arms' own rate."""
    from trimtab.distill.sft_warmup import sft_warmup

    sft_warmup(
        host,
        updates=setting.quarter,
        prompt_steps=setting.quarter,
        answers_per_prompt=1,
        settings={"learning_rate": setting.learning_rate, "lr_scheduler_type": "constant", "warmup_steps": 0.0},
    )
    for kept in host.recorded:
        kept.clear()  # the teacher's answers are no rollouts of the student's


if __name__ == "__main__":
    main()

"""Preference training of Gemma 3 270M with LoRA: a reference that moves beside one that is fixed, on film reviews.

    pairs        two reviews of one opening, liked and disliked (`trimtab.gallery.testbeds.reviews`); TRL's DPO
    too large    beta = 1: the loss is flat once a pair's log-ratios are some nats apart, long before much is learnt
    arms         at that beta: fixed; a copy every quarter of the run (hard); averages at every step (soft), of the
                 effective weights or factor by factor; fixed at smaller betas, which is what tuning beta gives; and
                 fixed and hard once more with the pairs as conversations

Measured after training, on openings that no pair of the training had:

    positive     mean P(liked) of sampled continuations, by a judge that has seen none of the pairs: logistic
                 regression on MiniLM's embeddings of the other reviews. A review is judged to the end of its line, its
                 opening included
    KL           KL(policy || initial) of a whole continuation in nats, every step's expectation exact
    accuracy     share of held-out pairs whose log-ratio to the initial model is larger for the chosen review
    margin       the mean of those differences, in nats
    perplexity   of lukewarm reviews that are in no pair

One seed; an arm takes some eight minutes on two cores. Not part of `make bench`. Arms that have their rows are skipped:
`python -m benchmarks.gemma_align [--arms ARM ...] [--steps N]`.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.continuations import answer_log_probs, divergences, given, sample, texts
from benchmarks.real_arms import Arm, Figure, parse_arguments, run_arms
from trimtab.core.text_metrics import perplexity
from trimtab.gallery.testbeds.real_models import gemma3_270m, minilm
from trimtab.gallery.testbeds.reviews import CHAT_TEMPLATE, ReviewSplit, preference_split, rated_reviews

__all__ = ["Judge", "Setting", "main"]

LARGE_BETA = 1.0
LAG = 0.07
"""A soft reference of this weight lags by (1 - 0.07) / 0.07 = 13 steps; a hard one, of tau = 18, by 9 on average."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all arms share. pairs: held-out ones; samples: continuations of their openings; texts: lukewarm reviews."""

    steps: int = 72
    pairs_per_step: int = 4
    learning_rate: float = 2e-4
    rank: int = 8
    pairs: int = 64
    samples: int = 96
    new_tokens: int = 24
    texts: int = 64
    judge_texts: int = 4_000
    seed: int = 0


def main() -> None:
    """Run what was asked for."""
    setting = Setting()
    arguments = parse_arguments("gemma_align", [arm.name for arm in arms(setting)], setting.steps)
    if arguments.steps is None:
        return run_arms("gemma_align", arms(setting), arguments.arms)
    trial = Setting(steps=arguments.steps, pairs=8, samples=8, texts=8, judge_texts=200)
    return run_arms("gemma_align", arms(trial), arguments.arms, directory=None)


def arms(setting: Setting) -> list[Arm]:
    """In the order in which they are run; a trust region stands beside the fixed reference of its beta."""
    large = f"beta {LARGE_BETA:g}"
    quarter = max(1, setting.steps // 4)

    def reference(kind: str, *values: float, **options: Any) -> Callable[[], Any]:
        def made() -> Any:
            from trimtab.align import TrustRegionReference

            return getattr(TrustRegionReference, kind)(*values, **options)

        return made

    def arm(
        name: str, beta: float, made: Callable[[], Any] | None = None, *, peer: str | None, chat: bool = False
    ) -> Arm:
        return Arm(name, functools.partial(_train, setting, beta, made, chat), peer)

    return [
        Arm("before training", functools.partial(_untrained, setting)),
        arm(f"fixed, {large}", LARGE_BETA, peer="before training"),
        arm(f"hard, {large}", LARGE_BETA, reference("hard", quarter), peer=f"fixed, {large}"),
        arm(f"soft 0.6, {large}", LARGE_BETA, reference("soft", 0.6, lora="exact"), peer=f"fixed, {large}"),
        arm(f"soft {LAG}, {large}", LARGE_BETA, reference("soft", LAG, lora="exact"), peer=f"fixed, {large}"),
        arm(f"soft {LAG} by factors, {large}", LARGE_BETA, reference("soft", LAG), peer=f"fixed, {large}"),
        arm("fixed, beta 0.3", 0.3, peer=f"fixed, {large}"),
        arm("fixed, beta 0.1", 0.1, peer=f"fixed, {large}"),
        arm("fixed, beta 0.03", 0.03, peer=f"fixed, {large}"),
        arm(f"conversation, fixed, {large}", LARGE_BETA, peer=None, chat=True),
        arm(
            f"conversation, hard, {large}",
            LARGE_BETA,
            reference("hard", quarter),
            peer=f"conversation, fixed, {large}",
            chat=True,
        ),
    ]


# -- training --------------------------------------------------------------------------------------


@functools.cache
def split() -> ReviewSplit:
    return preference_split(rated_reviews())


def tokenizer(chat: bool) -> Any:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(gemma3_270m())
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def trainer(setting: Setting, beta: float, made: Callable[[], Any] | None, chat: bool, out: str) -> Any:
    """TRL's trainer for a fixed reference, ours for one that `made` makes; both on the same pairs in the same order."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    rows = {
        part: Dataset.from_list([pair.as_messages() if chat else pair.as_text() for pair in pairs])
        for part, pairs in (("train", split().train), ("held_out", split().held_out))
    }
    settings = DPOConfig(
        out,
        beta=beta,
        max_steps=setting.steps,
        per_device_train_batch_size=setting.pairs_per_step,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=setting.steps // 10,
        max_length=96,
        seed=setting.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
    )
    hosts: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(gemma3_270m(), dtype=torch.float32),
        "args": settings,
        "train_dataset": rows["train"],
        "eval_dataset": rows["held_out"],
        "processing_class": tokenizer(chat),
        "peft_config": LoraConfig(r=setting.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    if made is None:
        return DPOTrainer(**hosts)
    from trimtab.align import TRDPOTrainer

    return TRDPOTrainer(**hosts, reference=made())


def _train(setting: Setting, beta: float, made: Callable[[], Any] | None, chat: bool) -> dict[str, Figure]:
    with tempfile.TemporaryDirectory() as out:
        host = trainer(setting, beta, made, chat, out)
        host.train()
    return _measure(setting, host, chat) | {"seconds a step": (_seconds_a_step(host), "s")}


def _untrained(setting: Setting) -> dict[str, Figure]:
    with tempfile.TemporaryDirectory() as out:
        figures = _measure(setting, trainer(setting, LARGE_BETA, None, False, out), False)
    return figures | {"the judge's accuracy": (_judge(setting).accuracy, "1")}


def _seconds_a_step(host: Any) -> float:
    (summary,) = [entry for entry in host.state.log_history if "train_runtime" in entry]
    return float(summary["train_runtime"]) / host.state.global_step


# -- measures --------------------------------------------------------------------------------------


def _measure(setting: Setting, host: Any, chat: bool) -> dict[str, Figure]:
    model, words = host.accelerator.unwrap_model(host.model).eval(), tokenizer(chat)
    stops = [words.eos_token_id, words.convert_tokens_to_ids("<end_of_turn>")]
    pairs = list(host.eval_dataset)
    margin = torch.cat(list(margins(model, pairs[: setting.pairs])))
    # Each opening once, so that "The film" is not half of them, and all of them as often, or once more.
    prompts = sorted({tuple(pair["prompt_ids"]) for pair in pairs})
    prompts = [prompts[index % len(prompts)] for index in range(setting.samples)]
    written = sample(model, prompts, stops, new_tokens=setting.new_tokens, seed=setting.seed)
    along, _ = divergences(model, model, written, second_context=model.disable_adapter)
    judge = _judge(setting)
    whole = [_opening(words, prompt, chat) + text for prompt, text in zip(prompts, texts(written, words), strict=True)]
    liked = judge(whole)
    lukewarm = [review.text for review in split().others if abs(review.sentiment) < 1][: setting.texts]
    return {
        "positive": (float(liked.mean()), "1"),
        "judged positive": (float((liked >= 0.5).float().mean()), "1"),
        "KL to the initial model": (float(along.mean()), "nats a continuation"),
        "accuracy": (float((margin > 0).float().mean()), "1"),
        "margin": (float(margin.mean()), "nats"),
        "perplexity of reviews": (perplexity(model, words, lukewarm), "1"),
        "tokens a continuation": (float(written.answer_mask.sum(-1).float().mean()), "1"),
    }


def margins(model: Any, pairs: Sequence[dict[str, Any]], rows: int = 8) -> Any:
    """log-ratio of the chosen answer minus that of the rejected one, to the model without its adapter; [rows] each."""
    for start in range(0, len(pairs), rows):
        part = pairs[start : start + rows]
        ratios = []
        for answer in ("chosen_ids", "rejected_ids"):
            answers = given([pair["prompt_ids"] for pair in part], [pair[answer] for pair in part])
            policy = answer_log_probs(model, answers)
            with model.disable_adapter():
                ratios.append(policy - answer_log_probs(model, answers))
        yield ratios[0] - ratios[1]


def _opening(words: Any, prompt: Sequence[int], chat: bool) -> str:
    """The review's own first words, which in a conversation are the answer's, not the prompt's."""
    return "" if chat else words.decode(prompt, skip_special_tokens=True).removeprefix("Film review: ")


@dataclass(frozen=True)
class Judge:
    """P(liked) = sigmoid(w . embedding + b); accuracy on the reviews of the held-out pairs, which it has not seen."""

    weight: Tensor
    bias: Tensor
    accuracy: float = float("nan")

    def __call__(self, reviews: list[str]) -> Tensor:
        return torch.sigmoid(embeddings(reviews) @ self.weight + self.bias)


@functools.cache
def _judge(setting: Setting) -> Judge:
    clear = [review for review in split().others if abs(review.sentiment) >= 0.5][: setting.judge_texts]
    judge = fitted(embeddings([review.text for review in clear]), torch.tensor([r.sentiment > 0 for r in clear]))
    liked, disliked = (judge([getattr(pair, kind) for pair in split().held_out]) for kind in ("chosen", "rejected"))
    right = torch.cat([liked >= 0.5, disliked < 0.5])
    return Judge(judge.weight, judge.bias, float(right.float().mean()))


def fitted(rows: Tensor, liked: Tensor, *, ridge: float = 3e-4) -> Judge:
    """Logistic regression: mean log-loss plus ridge |w|^2 / 2, by L-BFGS."""
    weight = torch.zeros(rows.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(rows @ weight + bias, liked.float())
        loss = loss + ridge * weight.square().sum() / 2
        loss.backward()
        return loss

    optimiser.step(closure)
    return Judge(weight.detach(), bias.detach())


@functools.cache
def _encoder() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(minilm(), dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(minilm())


def embeddings(reviews: list[str]) -> Tensor:
    """MiniLM's mean over tokens, of length 1: [texts, 384]."""
    encoder, words = _encoder()
    found = []
    for start in range(0, len(reviews), 64):
        batch = words(reviews[start : start + 64], padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            states = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


if __name__ == "__main__":
    main()

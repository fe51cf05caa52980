"""Trust-region trainers in TRL's loop: where they equal TRL's, what the first losses are, resuming, logs, refusals."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.utils import use_adapter

from trimtab.align import (
    TRDPOTrainer,
    TRGRPOTrainer,
    TRKTOTrainer,
    TRRLOOTrainer,
    TrustRegionMixin,
    TrustRegionReference,
    UpdateSchedule,
)
from trimtab.align.functional import dpo_loss, ipo_loss, kto_loss
from trimtab.align.ipo import IPOFormTrainer
from trimtab.align.measures import reward_kl_curve
from trimtab.align.reference import FILE
from trimtab.core.errors import TrimtabError
from trimtab.gallery.testbeds.micro import micro_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:alpha=.*averaging LoRA:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

FOLDER = micro_model("micro-llama")
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
PAIRS = Dataset.from_list(
    [
        {"prompt": "The day was", "chosen": " bright and fine.", "rejected": " dull."},
        {"prompt": "A man", "chosen": " smiled.", "rejected": " wept at it all."},
        {"prompt": "In the town", "chosen": " they sang.", "rejected": " it rained for weeks."},
        {"prompt": "She said", "chosen": " it was good and dear.", "rejected": " no."},
    ]
    * 4
)
RATED = Dataset.from_list(
    [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for row in PAIRS for side in
     ("chosen", "rejected")]
)  # fmt: skip
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant> {% endif %}"
ADAPTER = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])


def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER)


def settings(kind: type, out: Path, **options: Any) -> Any:
    common = {
        "output_dir": str(out),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "beta": 0.3,
    }
    return kind(**common | options)


def dpo(out: Path, reference: TrustRegionReference | None = None, **options: Any) -> Any:
    trainer, more = (DPOTrainer, {}) if reference is None else (TRDPOTrainer, {"reference": reference})
    given = {name: options.pop(name) for name in ("peft_config", "train_dataset") if name in options}
    return trainer(
        model(),
        args=settings(DPOConfig, out, **options),
        processing_class=TOKENIZER,
        **{"train_dataset": PAIRS} | given | more,
    )


def kto(out: Path, reference: TrustRegionReference | None = None, **options: Any) -> Any:
    trainer, more = (KTOTrainer, {}) if reference is None else (TRKTOTrainer, {"reference": reference})
    return trainer(
        model(),
        args=settings(KTOConfig, out, **options),
        train_dataset=RATED,
        processing_class=TOKENIZER,
        **more,
    )


def losses(trainer: Any) -> list[float]:
    return [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]


def weights(trainer: Any) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in trainer.model.named_parameters() if ".ref." not in n}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    assert first
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def never() -> TrustRegionReference:
    with pytest.warns(UserWarning, match="never moves"):
        return TrustRegionReference(UpdateSchedule(alpha=0, tau=1))


# -- where the method is its base ------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("which", ["alpha=0", "tau beyond the run", "adapter"])
def test_a_reference_that_never_moves_is_the_base_method_bit_for_bit(loss: str, which: str, tmp_path: Path) -> None:
    options = {"loss_type": loss} | ({"peft_config": ADAPTER} if which == "adapter" else {})
    base = dpo(tmp_path / "base", **options)
    base.train()
    reference = TrustRegionReference.hard(5) if which == "tau beyond the run" else never()
    ours = dpo(tmp_path / "ours", reference, **options)
    if which == "tau beyond the run":
        with pytest.warns(UserWarning, match="first update would come after step 5, and the run has 4"):
            ours.train()
    else:
        ours.train()
    assert losses(base) == losses(ours)
    assert_equal(weights(base), weights(ours))
    assert reference.n_updates == 0


def test_kto_without_moves_is_the_base_method_bit_for_bit(tmp_path: Path) -> None:
    base, ours = kto(tmp_path / "base"), kto(tmp_path / "ours", never())
    base.train(), ours.train()
    assert losses(base) == losses(ours)
    assert_equal(weights(base), weights(ours))


def test_the_default_is_trls_own_schedule(tmp_path: Path) -> None:
    options = {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2}
    theirs = dpo(tmp_path / "theirs", sync_ref_model=True, **options)
    ours = TRDPOTrainer(
        model(), args=settings(DPOConfig, tmp_path / "ours", **options), train_dataset=PAIRS, processing_class=TOKENIZER
    )
    theirs.train(), ours.train()
    assert ours.reference.schedule == UpdateSchedule(alpha=0.6, tau=2)
    assert ours.reference.n_updates == 2
    for (name, mine), (_, other) in zip(
        ours.ref_model.named_parameters(), theirs.ref_model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine, other, msg=name)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)


# -- the other limit: the reference is the policy -----------------------------------------------------


@pytest.mark.parametrize(("loss", "value"), [("sigmoid", math.log(2)), ("ipo", (1 / 0.6) ** 2)])
@pytest.mark.parametrize("peft", [False, True])
def test_a_copy_after_every_step_makes_every_loss_the_first(
    loss: str, value: float, peft: bool, tmp_path: Path
) -> None:
    options = {"peft_config": ADAPTER} if peft else {}
    trainer = dpo(tmp_path, TrustRegionReference.hard(1), loss_type=loss, **options)
    trainer.train()
    assert losses(trainer) == pytest.approx([value] * 4, rel=1e-6)


def test_the_reference_has_no_dropout(tmp_path: Path) -> None:
    """TRL switches the policy's off before the adapter "ref" is made, and online trainers leave it on."""
    adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    trainer = dpo(tmp_path, TrustRegionReference.hard(1), peft_config=adapter)
    trainer.train()
    assert losses(trainer) == pytest.approx([math.log(2)] * 4, rel=1e-6)
    dropouts = [m["ref"] for n, m in trainer.model.named_modules() if n.endswith("lora_dropout")]
    assert dropouts
    assert all(isinstance(each, torch.nn.Identity) for each in dropouts)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_online_trainer_whose_reference_never_moves_is_trls(dropout: float, tmp_path: Path) -> None:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    def kls(trainer: Any, **options: Any) -> list[float]:
        made = trainer(
            model(),
            reward_funcs=reward,
            args=settings(GRPOConfig, tmp_path, max_steps=3, num_generations=2, max_completion_length=4),
            train_dataset=PAIRS.select_columns(["prompt"]),
            processing_class=copy.deepcopy(TOKENIZER),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=dropout),
            **options,
        )
        made.train()
        return [log["kl"] for log in made.state.log_history if "kl" in log]

    assert kls(TRGRPOTrainer, reference=never()) == kls(GRPOTrainer)
    if not dropout:
        assert kls(TRGRPOTrainer, reference=TrustRegionReference.hard(1)) == pytest.approx([0.0] * 3, abs=1e-7)


def test_logs_are_of_the_reference_that_the_loss_had(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, TrustRegionReference.hard(2, measure=True), logging_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["reference/updates"] for log in logs] == [1, 2]
    assert all(log["reference/kl_current"] > 0 and log["reference/distance"] > 0 for log in logs)


@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_of_another_name_is_refused(beside: bool, tmp_path: Path) -> None:
    """TRL fails on it, or, with an idle "default" beside, would begin the reference as the copy of that one."""
    named = get_peft_model(model(), ADAPTER, adapter_name="mine")
    if beside:
        named.add_adapter("default", ADAPTER)
    args = settings(DPOConfig, tmp_path)
    with pytest.raises(TrimtabError, match=r"active adapters are \['mine'\].*named 'default'"):
        TRDPOTrainer(named, args=args, train_dataset=PAIRS, processing_class=TOKENIZER)


def test_a_reference_can_be_used_again(tmp_path: Path) -> None:
    reference = TrustRegionReference.hard(1)
    dpo(tmp_path, reference, peft_config=ADAPTER, max_steps=2).train()
    second = dpo(tmp_path, reference)
    second.train()
    assert losses(second) == pytest.approx([math.log(2)] * 4, rel=1e-6)
    assert reference.n_updates == 4
    second.train()
    assert reference.n_updates == 4


def test_so_with_kto(tmp_path: Path) -> None:
    trainer = kto(tmp_path, TrustRegionReference.hard(1))
    trainer.train()
    assert losses(trainer) == pytest.approx([0.5] * 4, rel=1e-6)


def test_there_the_gradient_is_that_of_an_unanchored_push(tmp_path: Path) -> None:
    """-(beta / 2) grad (log pi(y_w) - log pi(y_l)), at the first step of any reference."""
    trainer = dpo(tmp_path, TrustRegionReference.hard(1))
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    parameters = list(trainer.model.parameters())
    found = torch.autograd.grad(loss, parameters)
    log_probs = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs = log_probs[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    chosen, rejected = (log_probs * batch["completion_mask"][:, 1:]).sum(-1).chunk(2)
    expected = torch.autograd.grad(-0.3 / 2 * (chosen - rejected).mean(), parameters)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


# -- what a batch looks like does not matter ---------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_order_and_padding_do_not_matter(loss: str, tmp_path: Path) -> None:
    trainer = dpo(tmp_path, TrustRegionReference.hard(3), loss_type=loss)
    trainer.train()  # away from the reference
    batch = dict(next(iter(trainer.get_train_dataloader())).items())
    expected = trainer.compute_loss(trainer.model, batch).detach()
    assert float(expected) != pytest.approx(math.log(2) if loss == "sigmoid" else (1 / 0.6) ** 2, rel=1e-3)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {name: tensor[torch.cat([order, order + 4])] for name, tensor in batch.items()}
    padding = {"input_ids": TOKENIZER.pad_token_id, "attention_mask": 0, "completion_mask": 0}
    padded = {name: torch.nn.functional.pad(tensor, (0, 5), value=padding[name]) for name, tensor in batch.items()}
    for other in (shuffled, padded):
        found = trainer.compute_loss(trainer.model, other).detach()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_losses_are_the_formulas_on_sums_over_completions(loss: str, tmp_path: Path) -> None:
    trainer = dpo(tmp_path, TrustRegionReference.hard(3), loss_type=loss)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    mask = batch["completion_mask"][:, 1:]

    @torch.no_grad()
    def log_probs(which: Any) -> Tensor:
        logits = which(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return (logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * mask).sum(-1)

    chosen, rejected = (log_probs(trainer.model) - log_probs(trainer.ref_model)).chunk(2)
    lengths = mask.sum(-1).chunk(2)
    expected = {
        "sigmoid": dpo_loss(chosen, rejected, beta=0.3),
        "ipo": ipo_loss(chosen, rejected, beta=0.3, chosen_length=lengths[0], rejected_length=lengths[1]),
    }[loss]
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize(("ipo", "sigmoid"), [(1.0, 0.0), (2.0, 0.5)])
def test_ipo_of_sums_is_the_papers(ipo: float, sigmoid: float, peft: bool, moves: bool, tmp_path: Path) -> None:
    options = {"peft_config": ADAPTER} if peft else {}
    kinds = {"loss_type": ["sigmoid", "ipo"], "loss_weights": [sigmoid, ipo]} if sigmoid else {"loss_type": "ipo"}
    kind = functools.partial(TRDPOTrainer, reference=TrustRegionReference.hard(3)) if moves else IPOFormTrainer
    args = settings(DPOConfig, tmp_path, **kinds)
    trainer = kind(model(), args=args, processing_class=TOKENIZER, train_dataset=PAIRS, ipo_form="sums", **options)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(ipo * (1 / 0.6) ** 2 + sigmoid * math.log(2), rel=1e-5)
    batch = next(iter(trainer.get_train_dataloader()))
    mask = batch["completion_mask"][:, 1:]

    def log_probs(which: Any) -> Tensor:
        logits = which(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return (logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * mask).sum(-1)

    policy = log_probs(trainer.model)
    with torch.no_grad():
        if not peft:
            reference = log_probs(trainer.ref_model)
        elif moves:
            with use_adapter(trainer.model, "ref"):
                reference = log_probs(trainer.model)
        else:
            with trainer.model.disable_adapter():
                reference = log_probs(trainer.model)
    chosen, rejected = (policy - reference).chunk(2)
    expected = (ipo * ipo_loss(chosen, rejected, beta=0.3) + sigmoid * dpo_loss(chosen, rejected, beta=0.3)).mean()
    found = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float(found.detach()) != pytest.approx(losses(trainer)[0], rel=1e-2)
    trained = [tensor for tensor in trainer.model.parameters() if tensor.requires_grad]
    gradients = zip(*(torch.autograd.grad(loss, trained) for loss in (found, expected)), strict=True)
    for mine, theirs in gradients:
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_so_is_ktos(tmp_path: Path) -> None:
    trainer = kto(tmp_path, TrustRegionReference.hard(3))
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    mean = trainer.compute_loss(trainer.model, batch)
    z = torch.tensor(trainer._metrics["train"]["kl"][-1])

    @torch.no_grad()
    def log_probs(which: Any) -> Tensor:
        logits = which(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        picked = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        return (picked * batch["completion_mask"][:, 1:]).sum(-1)

    d = log_probs(trainer.model) - log_probs(trainer.ref_model)
    expected = kto_loss(d, torch.as_tensor(batch["label"]), z, beta=0.3).mean()
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    assert float(expected) != pytest.approx(0.5, rel=1e-3)


# -- in the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", ["sigmoid", "hinge", "ipo", "nca_pair", "apo_zero", "sigmoid_norm", ["sigmoid", "sft"]]
)
def test_every_loss_that_looks_at_the_reference_runs(loss: Any, tmp_path: Path) -> None:
    trainer = dpo(tmp_path, TrustRegionReference.hard(1), loss_type=loss, max_steps=2)
    trainer.train()
    assert trainer.reference.n_updates == 2
    assert all(math.isfinite(value) for value in losses(trainer))


def test_optimiser_steps_count_and_the_loss_of_a_step_has_the_old_reference(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, TrustRegionReference.hard(2), per_device_train_batch_size=2, gradient_accumulation_steps=2)
    moved: list[tuple[int, float]] = []
    before = copy.deepcopy(trainer.ref_model)
    update = trainer.reference.update

    def watch(step: int, total: int, margin: float) -> bool:
        did = update(step, total, margin)
        moved.append((step, float(sum((a - b).abs().sum() for a, b in zip(
            trainer.ref_model.parameters(), before.parameters(), strict=True)))))  # fmt: skip
        return did

    trainer.reference.update = watch
    trainer.train()
    assert [step for step, _ in moved] == [1, 2, 3, 4]
    assert moved[0][1] == 0
    assert moved[1][1] > 0
    assert moved[2][1] == moved[1][1]
    assert_equal(dict(trainer.ref_model.named_parameters()), weights(trainer))
    assert losses(trainer)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(trainer)[1] != pytest.approx(math.log(2), rel=1e-6)
    assert losses(trainer)[2] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("peft", [False, True])
def test_the_reference_is_not_trained(peft: bool, tmp_path: Path) -> None:
    trainer = dpo(tmp_path, TrustRegionReference.hard(3), **({"peft_config": ADAPTER} if peft else {}))
    trainer.train()
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    held = trainer.reference._held().values()
    assert held
    assert not trained & {id(tensor) for tensor in held}
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in held)


def test_a_margin_holds_updates_back(tmp_path: Path) -> None:
    schedule = UpdateSchedule(alpha=1, tau=1, margin_threshold=1e9)
    trainer = dpo(tmp_path, TrustRegionReference(schedule))
    trainer.train()
    assert trainer.reference.n_updates == 0
    trainer = dpo(tmp_path, TrustRegionReference(UpdateSchedule(alpha=1, tau=1, margin_threshold=1e-6)))
    trainer.train()
    assert 1 <= trainer.reference.n_updates < 4  # at the first step the margin is 0


def test_the_margin_is_that_of_all_micro_batches_of_a_step(tmp_path: Path) -> None:
    options = {"train_sampling_strategy": "sequential", "max_steps": 3, "logging_steps": 2}
    whole = dpo(tmp_path, TrustRegionReference.hard(3), **options)
    parts = dpo(
        tmp_path,
        TrustRegionReference.hard(3),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **options,
    )
    found: dict[str, list[float]] = {"whole": [], "parts": []}
    for name, trainer in (("whole", whole), ("parts", parts)):
        update = trainer.reference.update

        def watch(step: int, total: int, margin: float, name: str = name, update: Any = update) -> bool:
            found[name].append(margin)
            return update(step, total, margin)

        trainer.reference.update = watch
        trainer.train()
    assert found["whole"][2] > 0.01
    assert found["parts"] == pytest.approx(found["whole"], rel=1e-3, abs=1e-6)


def test_an_unknown_margin_holds_updates_back(tmp_path: Path) -> None:
    schedule = UpdateSchedule(alpha=1, tau=1, margin_threshold=-1e9)
    trainer = TRKTOTrainer(
        model(),
        args=settings(KTOConfig, tmp_path, max_steps=2),
        train_dataset=RATED.filter(lambda row: row["label"]),
        processing_class=TOKENIZER,
        reference=TrustRegionReference(schedule),
    )
    trainer.train()
    assert trainer.reference.n_updates == 0


def test_conversations_by_a_chat_template(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = TEMPLATE
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
            "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
        }
        for row in PAIRS
    ]
    trainer = TRDPOTrainer(
        model(),
        args=settings(DPOConfig, tmp_path, max_steps=2),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        reference=TrustRegionReference.hard(1),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert "<user> " in tokenizer.decode(batch["input_ids"][0])
    trainer.train()
    assert losses(trainer) == pytest.approx([math.log(2)] * 2, rel=1e-6)


def online(kind: Any, config: Any, out: Path, reference: TrustRegionReference, **options: Any) -> Any:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    settled = {"max_steps": 2, "num_generations": 2, "max_completion_length": 4, "learning_rate": 1e-2}
    return kind(
        model(),
        reward_funcs=reward,
        args=settings(config, out, **settled),
        processing_class=copy.deepcopy(TOKENIZER),
        reference=reference,
        **{"train_dataset": PAIRS.select_columns(["prompt"])} | options,
    )


@pytest.mark.parametrize(
    ("trainer", "base", "config"), [(TRGRPOTrainer, GRPOTrainer, GRPOConfig), (TRRLOOTrainer, RLOOTrainer, RLOOConfig)]
)
@pytest.mark.parametrize("peft", [False, True])
def test_online_trainers_follow(trainer: Any, base: Any, config: Any, peft: bool, tmp_path: Path) -> None:
    options = {"peft_config": ADAPTER} if peft else {}
    made = online(trainer, config, tmp_path, TrustRegionReference.hard(2), **options)
    made.train()
    assert isinstance(made, base)
    assert made.reference.n_updates == 1
    assert made.reference.distance() == 0
    assert made.state.log_history[1]["kl"] > 0


@pytest.mark.parametrize(("trainer", "config"), [(TRGRPOTrainer, GRPOConfig), (TRRLOOTrainer, RLOOConfig)])
@pytest.mark.parametrize("peft", [False, True])
def test_online_trainers_measure_the_way_from_the_initial_reference(
    trainer: Any, config: Any, peft: bool, tmp_path: Path
) -> None:
    options = {"peft_config": ADAPTER} if peft else {}
    made = online(trainer, config, tmp_path, TrustRegionReference.hard(1, measure=True), **options)
    made.train()
    first, last = made.state.log_history[:2]
    assert first["reference/kl_current"] == pytest.approx(first["reference/kl_initial"], rel=1e-4)
    assert last["reference/kl_current"] != pytest.approx(last["reference/kl_initial"], rel=1e-2)
    batch = made._last_batch
    ids, count = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1), batch["completion_ids"].shape[1]
    attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)

    @torch.no_grad()
    def log_probs(which: Any) -> Tensor:
        logits = which.eval()(ids, attention_mask=attended).logits[:, -count - 1 : -1]
        return logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None]).squeeze(-1)

    ratio = log_probs(made.model) - log_probs(model())
    per_token = ratio if trainer is TRRLOOTrainer else (-ratio).exp() - 1 + ratio
    expected = per_token[batch["completion_mask"].bool()].mean()
    assert last["reference/kl_initial"] == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    assert last["reference/distance"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile's own, of what TRL has it trace
@pytest.mark.parametrize("peft", [False, True])
def test_a_compiled_model_is_followed(peft: bool, tmp_path: Path) -> None:
    found = []
    for name, options in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "eager"})):
        trainer = TRDPOTrainer(
            model(),
            args=settings(DPOConfig, tmp_path / name, max_steps=2, loss_type="ipo", **options),
            train_dataset=PAIRS,
            processing_class=TOKENIZER,
            reference=TrustRegionReference.soft(0.4, lora="exact", measure=True),
            ipo_form="sums",
            **({"peft_config": ADAPTER} if peft else {}),
        )
        trainer.train()
        held = {name: tensor.clone() for name, tensor in trainer.reference._held().items()}
        found.append((losses(trainer), held, trainer.state.log_history[1]["reference/kl_initial"]))
    (plain, reference, kl), (compiled, other, kl_of_other) = found
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert kl_of_other == pytest.approx(kl, rel=1e-3)
    assert reference.keys() == other.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hard", "soft", "adapter", "exact"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    def make(**options: Any) -> Any:
        reference = TrustRegionReference.soft(0.4, lora="exact" if kind == "exact" else "factors")
        if kind in ("hard", "adapter"):
            reference = TrustRegionReference.hard(3)
        peft = {"peft_config": ADAPTER} if kind in ("adapter", "exact") else {}
        return dpo(tmp_path, reference, max_steps=4, **options, **peft)

    whole = make(save_strategy="steps", save_steps=2)
    whole.train()
    held = {name: tensor.clone() for name, tensor in whole.reference._held().items()}
    again = make()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(whole), weights(again))
    assert_equal(held, again.reference._held())
    assert again.reference.n_updates == whole.reference.n_updates > 0
    assert losses(whole)[2:] == losses(again)[2:]


def test_what_is_saved_is_the_policy_alone(tmp_path: Path) -> None:
    trainer = dpo(tmp_path / "run", TrustRegionReference.hard(1), peft_config=ADAPTER, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert "ref" in trainer.model.peft_config
    assert not (tmp_path / "out" / "ref").exists()
    assert not any(".ref." in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(model(), tmp_path / "out")
    ids = torch.arange(5).view(1, 5)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)


def test_a_checkpoint_of_the_model_alone_has_no_reference(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    dpo(tmp_path, TrustRegionReference.hard(1), max_steps=1, **options).train()
    assert (tmp_path / "checkpoint-1").exists()
    assert not (tmp_path / "checkpoint-1" / FILE).exists()


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path: Path) -> None:
    dpo(tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(TrimtabError, match=f"{FILE} is missing"):
        dpo(tmp_path, TrustRegionReference.hard(1)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# -- logs ------------------------------------------------------------------------------------------


def test_cheap_logs(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, TrustRegionReference.hard(2))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["reference/updates"] for log in logs] == [0, 1, 1, 2]
    assert [log["reference/steps_since_update"] for log in logs] == [1, 0, 1, 0]
    assert [log["reference/policy_weight"] for log in logs] == [0, 1, 1, 1]
    for log in logs:
        assert log["reference/log_ratio"] == pytest.approx((log["rewards/chosen"] + log["rewards/rejected"]) / 2 / 0.3)


@pytest.mark.parametrize("peft", [False, True])
def test_measured_logs_agree_with_a_count_by_hand(peft: bool, tmp_path: Path) -> None:
    reference = TrustRegionReference.hard(3, measure=True)
    trainer = dpo(tmp_path, reference, **({"peft_config": ADAPTER} if peft else {}))
    trainer.train()
    log = [log for log in trainer.state.log_history if "loss" in log][-1]
    batch = trainer._last_batch

    @torch.no_grad()
    def log_probs(which: Any) -> Tensor:
        return which.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)

    policy, initial = log_probs(trainer.model), log_probs(model())
    mask = batch["completion_mask"][:, 1:].bool()
    per_token = (policy.exp() * (policy - initial)).sum(-1)[mask]
    assert log["reference/kl_initial"] == pytest.approx(float(per_token.mean()), rel=1e-3)
    picked = ((policy - initial).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * mask).sum(-1)
    chosen, rejected = picked.chunk(2)
    assert log["reference/margin_initial"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-3)
    assert log["reference/accuracy_initial"] == pytest.approx(float((chosen > rejected).float().mean()))
    orders = []
    for each in (policy, initial):
        of_ids = each.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        chosen, rejected = (of_ids * mask).sum(-1).chunk(2)
        orders.append(chosen > rejected)
    assert log["reference/flips_initial"] == float((orders[0] != orders[1]).float().mean())
    assert 0 < log["reference/kl_current"] < log["reference/kl_initial"]
    assert log["reference/margin_current"] < log["reference/margin_initial"]
    assert log["reference/distance"] > 0
    curve = reward_kl_curve(trainer.state.log_history)
    assert [step for step, _, _ in curve] == [1, 2, 3, 4]
    assert curve[3][1:] == (log["reference/kl_initial"], log["reference/margin_initial"])


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    plain, measured = (dpo(tmp_path, TrustRegionReference.hard(2, measure=m)) for m in (False, True))
    plain.train(), measured.train()
    assert losses(plain) == losses(measured)
    assert_equal(weights(plain), weights(measured))


def test_kto_is_measured_without_pairs(tmp_path: Path) -> None:
    trainer = kto(tmp_path, TrustRegionReference.hard(2, measure=True), max_steps=2)
    trainer.train()
    log = trainer.state.log_history[1]
    assert log["reference/kl_initial"] > 0
    assert "reference/margin_initial" not in log


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipo_form": "sum"}, "ipo_form='sum' is not known"),
        ({"loss_type": "sigmoid"}, r"ipo_form='sums' has no meaning for loss_type=\['sigmoid'\]"),
        ({"use_weighting": True}, "use_weighting=True does not go with"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl' does not go with"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5 does not go with"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True does not go with"),
    ],
)
def test_sums_are_of_ipo_alone(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    form = options.get("ipo_form", "sums")
    given = {"loss_type": "ipo"} | {name: value for name, value in options.items() if name != "ipo_form"}
    with pytest.raises(TrimtabError, match=message):
        IPOFormTrainer(
            model(),
            args=settings(DPOConfig, tmp_path, **given),
            train_dataset=PAIRS,
            processing_class=TOKENIZER,
            ipo_form=form,
        )


def test_precomputed_log_probabilities_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="precompute_ref_log_probs=True computes the reference's"):
        dpo(tmp_path, TrustRegionReference.hard(1), precompute_ref_log_probs=True)


@pytest.mark.parametrize("peft", [False, True])
def test_trls_own_update_is_switched_off_with_a_warning(peft: bool, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="sync_ref_model=True is TRL's update.*wins"):
        trainer = dpo(
            tmp_path, TrustRegionReference.hard(3), sync_ref_model=True, ref_model_sync_steps=1,
            **({"peft_config": ADAPTER} if peft else {}),
        )  # fmt: skip
    trainer.train()
    assert trainer.reference.n_updates == 1
    assert not any(type(each).__name__ == "SyncRefModelCallback" for each in trainer.callback_handler.callbacks)


def test_adapters_that_trl_would_copy_wrongly_are_refused(tmp_path: Path) -> None:
    def begin(adapted: Any) -> None:
        args = settings(DPOConfig, tmp_path)
        TRDPOTrainer(adapted, args=args, train_dataset=PAIRS, processing_class=TOKENIZER)

    with pytest.raises(TrimtabError, match="init_lora_weights='pissa' takes the adapter out of the base"):
        begin(get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")))
    twice = get_peft_model(model(), ADAPTER)
    twice.add_adapter("ref", ADAPTER)
    with pytest.raises(TrimtabError, match="delete_adapter"):
        begin(twice)


def test_an_online_trainer_has_no_margin_to_wait_for(tmp_path: Path) -> None:
    args = settings(GRPOConfig, tmp_path, num_generations=2)
    reference = TrustRegionReference(UpdateSchedule(alpha=1, tau=1, margin_threshold=1.0))
    with pytest.raises(TrimtabError, match="margin_threshold is for preference trainers"):
        TRGRPOTrainer(
            model(),
            reward_funcs=len,
            args=args,
            train_dataset=PAIRS,
            processing_class=copy.deepcopy(TOKENIZER),
            reference=reference,
        )


def test_grpo_without_settings_has_no_divergence() -> None:
    with pytest.raises(TrimtabError, match="no KL term"):
        TRGRPOTrainer(model(), reward_funcs=len, train_dataset=PAIRS, processing_class=TOKENIZER)


def test_other_trainers_may_take_what_they_pass_on_by_kwargs(tmp_path: Path) -> None:
    class Other(DPOTrainer):
        def __init__(self, model: Any, **kwargs: Any) -> None:
            super().__init__(model, **kwargs)

    class Mixed(TrustRegionMixin, Other):
        pass

    args = settings(DPOConfig, tmp_path, sync_ref_model=True, max_steps=1)
    with pytest.warns(UserWarning, match="wins"):
        made = Mixed(
            model(), args=args, train_dataset=PAIRS, processing_class=TOKENIZER, reference=TrustRegionReference.hard(1)
        )
    assert args.sync_ref_model  # the user's own settings stay
    made.train()
    assert made.reference.n_updates == 1
    with pytest.raises(TrimtabError, match="precompute_ref_log_probs"):
        Mixed(model(), args=settings(DPOConfig, tmp_path, precompute_ref_log_probs=True), train_dataset=PAIRS)


@pytest.mark.parametrize(("trainer", "config"), [(TRGRPOTrainer, GRPOConfig), (TRRLOOTrainer, RLOOConfig)])
def test_online_objectives_without_a_divergence_are_refused(trainer: Any, config: Any, tmp_path: Path) -> None:
    args = settings(config, tmp_path, beta=0.0, num_generations=2)
    with pytest.raises(TrimtabError, match="no KL term"):
        trainer(model(), reward_funcs=len, args=args, train_dataset=PAIRS, processing_class=TOKENIZER)


def test_losses_without_a_reference_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="never looks at the reference"):
        dpo(tmp_path, TrustRegionReference.hard(1), loss_type="sft")


def test_a_trainer_without_a_reference_is_refused(tmp_path: Path) -> None:
    class Mixed(TrustRegionMixin, SFTTrainer):
        pass

    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TrimtabError, match="no reference model"):
        Mixed(
            model(),
            args=args,
            train_dataset=Dataset.from_list([{"text": "a b c"}]),
            processing_class=TOKENIZER,
            reference=TrustRegionReference.hard(1),
        )


def test_batches_that_are_not_known_are_not_measured(tmp_path: Path) -> None:
    class Other(SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.ref_model = model()

    class Mixed(TrustRegionMixin, Other):
        pass

    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TrimtabError, match="measure=True does not know the batches of Mixed"):
        Mixed(
            model(),
            args=args,
            train_dataset=Dataset.from_list([{"text": "a b c"}]),
            processing_class=TOKENIZER,
            reference=TrustRegionReference.hard(1, measure=True),
        )


def test_images_are_not_measured(tmp_path: Path) -> None:
    rows = PAIRS.select_columns(["prompt"]).add_column("image", [None] * len(PAIRS))
    with pytest.raises(TrimtabError, match="measure=True reads text alone"):
        online(TRGRPOTrainer, GRPOConfig, tmp_path, TrustRegionReference.hard(1, measure=True), train_dataset=rows)

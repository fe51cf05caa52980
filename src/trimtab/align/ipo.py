"""IPO in the form of its paper: of log-ratios summed over a completion's tokens.

Source: "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv 2310.12036. With h the
difference of the two completions' log-ratios (`trimtab.align.functional`):

    sums     (h - 1 / (2 beta))^2                  h of sums over tokens: the paper's
    means    the same, each log-ratio divided by its completion's tokens: as IPO's authors advise, and TRL has it

A sum is larger than a mean by the length, so that one beta is not the same leash in both.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from trl import DPOTrainer

from trimtab.align.functional import ipo_loss
from trimtab.core.errors import TrimtabError, unknown

__all__ = ["IPOFormMixin", "IPOFormTrainer"]

_FORMS = ("means", "sums")


class IPOFormMixin:
    """A `DPOTrainer` of TRL's with `ipo_form`: "means", TRL's own, or "sums". It is for the loss "ipo".

    Raises `TrimtabError` for another form, and for "sums" where the loss is not IPO's, or an option of TRL's changes
    its log-ratios or its weights.
    """

    def __init__(self, *args: Any, ipo_form: str = "means", **kwargs: Any) -> None:
        if ipo_form not in _FORMS:
            raise unknown("ipo_form", ipo_form, _FORMS)
        super().__init__(*args, **kwargs)
        self.ipo_form = ipo_form
        self._sums_weight = 0.0
        if ipo_form == "sums":
            _refuse_others(self)
            # TRL adds its own form with weight 0, beside losses that it may be mixed with.
            of_ipo = [kind == "ipo" for kind in self.loss_types]  # type: ignore[attr-defined]
            weights: list[float] = self.loss_weights  # type: ignore[has-type]
            self._sums_weight = sum(weight for weight, is_ipo in zip(weights, of_ipo, strict=True) if is_ipo)
            self.loss_weights = [0.0 if is_ipo else weight for weight, is_ipo in zip(weights, of_ipo, strict=True)]

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if self.ipo_form == "means":
            return super()._compute_loss(model, inputs, return_outputs)  # type: ignore[misc]
        by_policy: list[Tensor] = []
        by_reference: list[Tensor] = []
        # TRL asks the policy first and the reference last; of an adapter both are answers of one model.
        reference = self.model if self.ref_model is None else self.ref_model  # type: ignore[attr-defined]
        hooks = [
            asked.register_forward_hook(functools.partial(_keep, answers))
            for asked, answers in ((model, by_policy), (reference, by_reference))
        ]
        try:
            made = super()._compute_loss(model, inputs, return_outputs)  # type: ignore[misc]
        finally:
            for hook in hooks:
                hook.remove()
        positions = inputs["completion_mask"].shape[1] - 1
        policy, fixed = (log_probs[:, -positions:].sum(-1) for log_probs in (by_policy[0], by_reference[-1]))
        chosen, rejected = (policy - fixed).chunk(2)
        loss = self._sums_weight * ipo_loss(chosen, rejected, beta=self.beta).mean()  # type: ignore[attr-defined]
        return (made[0] + loss, *made[1:]) if return_outputs else made + loss


class IPOFormTrainer(IPOFormMixin, DPOTrainer):
    """TRL's `DPOTrainer`, whose reference stays, with either form of IPO."""


def _keep(answers: list[Tensor], module: Any, given: Any, output: Any) -> None:
    if getattr(output, "log_probs", None) is not None:  # else it is asked for something else
        answers.append(output.log_probs)


def _refuse_others(trainer: Any) -> None:
    if "ipo" not in trainer.loss_types:
        raise TrimtabError(f"ipo_form='sums' has no meaning for loss_type={trainer.loss_types}; accepted: with 'ipo'")
    for name, value, plain in (
        ("use_weighting", trainer.use_weighting, False),
        ("f_divergence_type", trainer.f_divergence_type, "reverse_kl"),
        ("ld_alpha", trainer.ld_alpha, None),
        ("precompute_ref_log_probs", trainer.precompute_ref_logps, False),
    ):
        if value != plain:
            raise TrimtabError(f"{name}={value!r} does not go with ipo_form='sums'; accepted: {plain!r}")

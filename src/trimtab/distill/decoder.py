"""A teacher that reads along while a student writes: its cache, positions and mask, one forward pass per token.

It is `generate`'s bookkeeping for a model that is not the one that generates: logits of the last position only, a
cache of its own (with sliding windows where its layers have them), positions counted from where the padding ends.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from trimtab.core.errors import TrimtabError, unknown

__all__ = ["TeacherDecoder"]


class TeacherDecoder:
    """The teacher, its cache, and where it is in the texts.

    `cache_implementation` is "dynamic" or "static". Raises `TrimtabError` for another one, a teacher in training mode,
    and one that is no causal LM with a key-value cache.
    """

    def __init__(self, teacher: Any, cache_implementation: str) -> None:
        if cache_implementation not in ("dynamic", "static"):
            raise unknown("cache_implementation", cache_implementation, ("dynamic", "static"))
        # A PeftModel passes on what its own signature does not name.
        wrapped = teacher.get_base_model() if hasattr(teacher, "get_base_model") else teacher
        accepted = inspect.signature(wrapped.forward).parameters
        if teacher.training:
            raise TrimtabError("The teacher is in training mode: call teacher.eval().")
        if "past_key_values" not in accepted or teacher.config.is_encoder_decoder:
            raise TrimtabError(f"teacher={type(teacher).__name__} must be a causal LM with a key-value cache.")
        self.teacher = teacher
        self.cache_implementation = cache_implementation
        self.takes_positions = "position_ids" in accepted
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.cache: Any = None
        self.mask: Tensor | None = None
        self.positions = torch.empty(0, 0, dtype=torch.long)

    @torch.no_grad()
    def next_logits(
        self, input_ids: Tensor, finished: Tensor, attention_mask: Tensor | None, max_length: int | None
    ) -> Tensor:
        """The teacher's logits after each text, [batch, vocab]; all of it is read at first, then the last token.

        - `input_ids` [batch, length]: the whole texts, one token longer than at the last call.
        - `finished` [batch]: rows whose last token is padding, in which the teacher reads on for nobody.
        - `attention_mask` [prompts, length]: looked at in the first call; rows are repeated for several samples each.
        - `max_length`: how long texts may become, for a static cache.

        Raises `TrimtabError` for masks that do not fit or do not pad on the left, for prompts that look padded when
        none is given, and for a static cache without `max_length`.
        """
        device = self.teacher.device
        if self.cache is None:
            tokens = input_ids.to(device)
            self._begin(tokens, attention_mask, max_length)
            if self.mask is not None:  # what pads the student may lie outside the teacher's vocabulary
                tokens = tokens.masked_fill(self.mask == 0, 0)
        else:
            # Likewise what `generate` writes behind the end.
            tokens = input_ids[:, -1:].masked_fill(finished.unsqueeze(-1), 0).to(device)
            self.positions = self.positions[:, -1:] + 1
            if self.mask is not None:
                self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], -1)
        positions = {"position_ids": self.positions} if self.takes_positions else {}
        output = self.teacher(
            input_ids=tokens,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **positions,
            **self.last_only,
        )
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def _begin(self, tokens: Tensor, attention_mask: Tensor | None, max_length: int | None) -> None:
        batch, length = tokens.shape
        config = self.teacher.config.get_text_config(decoder=True)
        if self.cache_implementation == "dynamic":
            self.cache = DynamicCache(config=config)
        elif max_length is None or max_length < length:
            raise TrimtabError(f"max_length={max_length} must be known, and at least {length}, with a static cache.")
        else:
            self.cache = StaticCache(config=config, max_cache_len=max_length)
        pad = self.teacher.generation_config.pad_token_id
        if attention_mask is None:
            if pad is not None and bool((tokens[:, 0] == pad).any()):
                raise TrimtabError(
                    f"Some prompt begins with the teacher's padding, token id {pad}: give attention_mask (all ones if "
                    "it is no padding)."
                )
        elif attention_mask.shape[1] != length or batch % len(attention_mask):
            raise TrimtabError(
                f"attention_mask has shape {list(attention_mask.shape)}, input_ids {list(tokens.shape)}: the lengths "
                "must be equal, and the rows too but for several samples of each prompt."
            )
        elif not bool(attention_mask.all()):
            mask = attention_mask.to(tokens.device, torch.long)
            self.mask = mask.repeat_interleave(batch // len(mask), dim=0)
            if not bool(self.mask[:, -1].all()):
                raise TrimtabError("attention_mask ends with 0 in some row: prompts are padded on the left.")
        if self.mask is None:
            self.positions = torch.arange(length, device=tokens.device).expand(batch, length)
        else:
            self.positions = (self.mask.cumsum(-1) - 1).clamp_min(0)

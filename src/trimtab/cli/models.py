"""The language model that a command line names."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from trimtab.core.errors import TrimtabError

__all__ = ["Dtype", "load_model"]

Dtype = Literal["float32", "bfloat16", "float16"]


def load_model(name: str, dtype: Dtype = "float32", *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub name, on a GPU if there is one, in evaluation mode.

    The class is the one that the checkpoint was saved as: with its language head if it has one.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        architecture = (config.architectures or [""])[0]
        if architecture.endswith("ForMaskedLM"):
            loader = transformers.AutoModelForMaskedLM
        elif architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            loader = transformers.AutoModelForCausalLM
        else:
            loader = transformers.AutoModel
        model = loader.from_pretrained(name, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise TrimtabError(f"model={name!r} cannot be loaded: {error}") from error
    return model.to(_device()).eval(), tokenizer


def _device() -> torch.device:
    """This process's GPU where there is one: that of LOCAL_RANK, as torchrun and accelerate set it."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

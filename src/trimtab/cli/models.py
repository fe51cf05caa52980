"""The language model that a command line names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from trimtab.core.errors import TrimtabError

__all__ = ["Dtype", "causal_model_without_weights", "load_model", "load_model_on_cpu", "load_tokenizer"]

Dtype = Literal["float32", "bfloat16", "float16"]


def load_model(name: str, dtype: Dtype = "float32", *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub name, on a GPU if there is one, in evaluation mode."""
    model = load_model_on_cpu(name, dtype, trust_remote_code=trust_remote_code)
    return model.to(_device()).eval(), load_tokenizer(name, trust_remote_code=trust_remote_code)


def load_model_on_cpu(name: str, dtype: Dtype = "float32", *, trust_remote_code: bool = False) -> Any:
    """The model of a folder or hub name; whoever trains it puts it where it belongs.

    The class is the one that the checkpoint was saved as: with its language head if it has one.
    """
    transformers.utils.logging.disable_progress_bar()
    with _refused(name):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        architecture = (config.architectures or [""])[0]
        if architecture.endswith("ForMaskedLM"):
            loader = transformers.AutoModelForMaskedLM
        elif architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            loader = transformers.AutoModelForCausalLM
        else:
            loader = transformers.AutoModel
        return loader.from_pretrained(name, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub name."""
    with _refused(name):
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def causal_model_without_weights(name: str, dtype: Dtype = "float32", *, trust_remote_code: bool = False) -> Any:
    """A causal language model on the meta device: its shapes, at no cost. Raises TrimtabError for another model."""
    with _refused(name):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        architecture = (config.architectures or [""])[0]
        if not architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            raise ValueError(f"it is a {architecture or type(config).__name__}, no causal language model")
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """What goes wrong inside is an error about the model `name`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise TrimtabError(f"model={name!r} cannot be loaded: {error}") from error


def _device() -> torch.device:
    """This process's GPU where there is one: that of LOCAL_RANK, as torchrun and accelerate set it."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

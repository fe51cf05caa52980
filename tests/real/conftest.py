"""The real models, loaded once a session; tests that change weights must load their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def gemma_model(gemma: Path) -> Any:
    """Gemma 3 270M in float32, evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def gemma_tokenizer(gemma: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gemma)


@pytest.fixture(scope="session")
def minilm_model(minilm: Path) -> Any:
    """MiniLM-L6 in float32, evaluation mode."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def minilm_tokenizer(minilm: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm)

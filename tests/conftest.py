"""What all tests share: no network, one way to add sums, skips that cannot be overlooked, and small models.

With TRIMTAB_NOTHING_MAY_SKIP=1 (continuous integration) a skipped test turns the run red.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Before any library of Hugging Face reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# Threads that wait should not spin: on a busy machine that takes the time of those that work.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"
# Where Triton can be imported, sparsify takes its kernels on a CPU as well, and fails.
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

import pytest
import torch

# Ours run in Triton's interpreter without a GPU, which Triton is told before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from trimtab.gallery.testbeds import real_models
from trimtab.gallery.testbeds.micro import micro_model

NOTHING_MAY_SKIP = os.environ.get("TRIMTAB_NOTHING_MAY_SKIP") == "1"


# -- skips -----------------------------------------------------------------------------------------


def _skipped(config: pytest.Config) -> list[tuple[str, str]]:
    """Each skipped test (or module, when it skips as a whole) and why."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return []
    skipped = []
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        skipped.append((report.nodeid, reason.removeprefix("Skipped: ")))
    return skipped


def pytest_sessionfinish(session: pytest.Session) -> None:
    if NOTHING_MAY_SKIP and session.exitstatus == pytest.ExitCode.OK and _skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    skipped = _skipped(config)
    if not skipped:
        return
    verdict = "and nothing may skip here: RED" if NOTHING_MAY_SKIP else "so this run has NOT shown that they pass"
    terminalreporter.section(f"{len(skipped)} SKIPPED, {verdict}", sep="!", red=True, bold=True)
    for nodeid, reason in skipped:
        terminalreporter.write_line(f"SKIPPED {nodeid}\n    {reason}", red=True)


# -- determinism -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    """Bit equality is promised at an equal number of threads; a test may set another and must set it back."""
    torch.set_num_threads(2)


# -- models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A tokenizer of 64 words made on the spot, with <pad>, <bos>, <eos>, <unk>; it opens texts with <bos>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


@pytest.fixture
def tiny_llama(tiny_tokenizer: Any) -> Any:
    """A new random causal LM for `tiny_tokenizer`: Llama, 3 blocks, d_model 32, evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def micro_llama() -> Path:
    """The folder of the committed micro-llama."""
    return micro_model("micro-llama")


@pytest.fixture(scope="session")
def micro_bert() -> Path:
    """The folder of the committed micro-bert."""
    return micro_model("micro-bert")


@pytest.fixture(scope="session")
def gemma() -> Path:
    """The folder of Gemma 3 270M, made now if the set-up has not; without its packages the test skips."""
    try:
        return real_models.gemma3_270m()
    except real_models.RealModelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of MiniLM-L6, made now if the set-up has not; without its package the test skips."""
    try:
        return real_models.minilm()
    except real_models.RealModelUnavailable as error:
        pytest.skip(str(error))

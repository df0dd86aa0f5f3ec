"""Fixtures that are shared by several test files: tiny checkpoints, each named for its trait, and the engine."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from . import checkpoints as make

if TYPE_CHECKING:
    from mdl.validate.client import Engine


def pytest_configure() -> None:
    """A suite that a shell runs in the background ignores Ctrl-C, and so would every program that a test starts."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """One vLLM process for the whole session: its imports take longer than all the tiny models together."""
    pytest.importorskip("vllm", reason="needs vLLM: pip install 'mdl[cpu]' or 'mdl[vllm]'", exc_type=ImportError)
    from mdl.validate.client import Engine

    with Engine(timeout=300) as shared:
        yield shared


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """nanoGPT, whose head is the same memory as its embedding."""
    return make.nanogpt(tmp_path / "tied.pt")


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    """nanoGPT from before it tied its head."""
    return make.nanogpt(tmp_path / "untied.pt", tied=False)


@pytest.fixture
def no_bias(tmp_path: Path) -> Path:
    """nanoGPT with bias=False: GPT-2 has the biases all the same."""
    return make.nanogpt(tmp_path / "no_bias.pt", bias=False)


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """nanoGPT stored in bfloat16, a type that numpy does not know."""
    return make.nanogpt(tmp_path / "half.pt", dtype=torch.bfloat16)


@pytest.fixture
def compiled_prefix(tmp_path: Path) -> Path:
    """nanoGPT saved out of torch.compile."""
    state = make.nanogpt_state()
    return make.trained(tmp_path / "compiled.pt", state, make.nanogpt_args(state), prefix="_orig_mod.")


@pytest.fixture
def old_without_bias_key(tmp_path: Path) -> Path:
    """nanoGPT from January 2023: model_args has no bias, and the causal masks were saved with the weights."""
    state = make.nanogpt_state()
    args = make.nanogpt_args(state)
    del args["bias"]
    for i in range(2):
        state[f"transformer.h.{i}.attn.bias"] = torch.tril(torch.ones(12, 12)).view(1, 1, 12, 12)
    return make.trained(tmp_path / "old.pt", state, args)


@pytest.fixture
def extra_tensor(tmp_path: Path) -> Path:
    """nanoGPT with a tensor that nanoGPT does not have."""
    return make.nanogpt(
        tmp_path / "extra.pt", {**make.nanogpt_state(), "transformer.h.0.adapter.weight": torch.ones(3)}
    )


@pytest.fixture
def missing_tensor(tmp_path: Path) -> Path:
    """nanoGPT without one of its matrices."""
    state = make.nanogpt_state()
    del state["transformer.h.1.mlp.c_proj.weight"]
    return make.nanogpt(tmp_path / "missing.pt", state)


@pytest.fixture
def truncated_file(tied: Path) -> Path:
    """A download that stopped early."""
    tied.write_bytes(tied.read_bytes()[:-2000])
    return tied


@pytest.fixture
def llama2c(tmp_path: Path) -> Path:
    """llama2.c with grouped key heads and a tied head."""
    return make.llama2c(tmp_path / "llama2c.pt")


@pytest.fixture
def two_ranks(tmp_path: Path) -> Path:
    """Llama 2 as released: bfloat16, two ranks, the embedding cut by columns, frequencies beside the weights."""
    state = make.llama_state(dtype=torch.bfloat16)
    return make.meta(tmp_path / "two_ranks", state, make.params(state), ranks=2, freqs=4)


@pytest.fixture
def tied_ranks(tmp_path: Path) -> Path:
    """Two ranks whose head equals the embedding, although one is cut by rows and the other by columns."""
    state = make.llama_state(tied=True)
    return make.meta(tmp_path / "tied_ranks", state, make.params(state), ranks=2)


@pytest.fixture
def stored_twice(tmp_path: Path) -> Path:
    """Llama 3.2 of one rank: the head equals the embedding, and is stored all the same."""
    state = make.llama_state(tied=True)
    return make.meta(tmp_path / "stored_twice", state, make.params(state, vocab_size=40, rope_theta=500000.0))

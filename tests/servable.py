"""Tiny checkpoints that vLLM can run: head size 32, and weights that hide nothing.

With small weights attention is nearly uniform, and a wrong rotary layout hardly shows in the logits. So matrices have
unit gain here, and norms and biases are far from the values they start training with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert

from . import checkpoints as make
from .checkpoints import State


def unit_gain(state: State) -> State:
    """The same names and shapes; a head that shares the embedding's memory still does."""
    made: State = {}
    seen: dict[int, torch.Tensor] = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen:
            seen[tensor.data_ptr()] = _scaled(name, tensor)
        made[name] = seen[tensor.data_ptr()]
    return made


def _scaled(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() > 1:
        return tensor if "wpe" in name else tensor / tensor.shape[1] ** 0.5
    return 0.3 * tensor + (1.0 if name.endswith("weight") else 0.0)


def nanogpt_state(**sizes: Any) -> State:
    """nanoGPT: width 64, two heads of 32."""
    return unit_gain(make.nanogpt_state(**{"hidden": 64, "vocab": 96, "context": 128, **sizes}))


def llama_state(**sizes: Any) -> State:
    """llama2.c and Meta: width 128, four heads of 32, two key heads."""
    return unit_gain(make.llama_state(**{"hidden": 128, "ffn": 160, "vocab": 96, **sizes}))


def llama2c(path: Path, **sizes: Any) -> Path:
    """A llama2.c checkpoint with a context of 64."""
    return make.llama2c(path, llama_state(**sizes))


def nanogpt(path: Path, **sizes: Any) -> Path:
    """A nanoGPT checkpoint with a context of 128."""
    return make.nanogpt(path, nanogpt_state(**sizes))


def meta(folder: Path, *, ranks: int = 1, by_columns: bool = True, dtype: torch.dtype, **params: Any) -> Path:
    """A Meta release; ``params`` go into params.json."""
    state = llama_state(dtype=dtype)
    return make.meta(folder, state, make.params(state, **params), ranks=ranks, by_columns=by_columns)


def layout(checkpoint: Path, out: Path, **options: Any) -> Path:
    """Convert, without a tokenizer."""
    chosen = Options(**options)
    convert(prepare(checkpoint, chosen), out, tokenizer="none")
    return out

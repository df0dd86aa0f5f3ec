"""Tiny BLOOMs as Megatron-DeepSpeed saves them: one file per layer and rank, the arguments of the run beside them.

Names are those of Megatron-DeepSpeed at 8387ae1. Heads of 32 channels, weights that hide nothing.
"""

from __future__ import annotations

import argparse
import enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .gpts import Draw
from .megatron import importable

State = dict[str, Tensor]


class PositionEmbeddingType(enum.Enum):
    """Stands for the enum of megatron/enums.py, of which arguments hold a member."""

    rotary = 1
    absolute = 2
    alibi = 3


LAYERS, VOCAB, CONTEXT, SIZE = 2, 96, 128, 32
HEADS: dict[str, int] = {"bloom": 4, "six heads": 6, "exact": 4, "post norm": 4}
"""Rows of checkpoints; a number of heads that is no power of two has slopes of its own."""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "exact": {"bias_gelu_fusion": False},
    "post norm": {"apply_residual_connection_post_layernorm": True},
}


def arguments(row: str, **more: Any) -> dict[str, Any]:
    """What a run is started with, as far as mdl looks at it, and a little of the rest."""
    hidden = HEADS[row] * SIZE
    common = {
        "num_layers": LAYERS,
        "hidden_size": hidden,
        "num_attention_heads": HEADS[row],
        "ffn_hidden_size": 4 * hidden,
    }
    common |= {
        "seq_length": CONTEXT,
        "max_position_embeddings": None,
        "padded_vocab_size": VOCAB,
        "embed_layernorm": True,
    }
    common |= {"layernorm_epsilon": 1e-5, "bias_gelu_fusion": True, "openai_gelu": False, "glu_activation": None}
    common |= {"apply_residual_connection_post_layernorm": False, "params_dtype": torch.bfloat16, "num_experts": [1]}
    common |= {"position_embedding_type": PositionEmbeddingType.alibi}
    return common | ARGUMENTS.get(row, {}) | more


def state(row: str, seed: int = 9) -> dict[int, State]:
    """The whole model, by the number of the pipeline's module."""
    draw, hidden = Draw(seed), HEADS[row] * SIZE

    def norm(name: str) -> State:
        at = f"{name}." if name else ""
        return {f"{at}weight": 1 + 0.3 * draw(hidden), f"{at}bias": 0.3 * draw(hidden)}

    made: dict[int, State] = {1: {"word_embeddings.weight": draw(VOCAB, hidden) / 8} | norm("word_embeddings.norm")}
    for i in range(LAYERS):
        block = norm("input_layernorm") | draw.linear("self_attention.query_key_value", 3 * hidden, hidden)
        block |= draw.linear("self_attention.dense", hidden, hidden) | norm("post_attention_layernorm")
        made[i + 3] = block | draw.linear("mlp.dense_h_to_4h", 4 * hidden, hidden)
        made[i + 3] |= draw.linear("mlp.dense_4h_to_h", hidden, 4 * hidden)
    return made | {LAYERS + 4: norm("")}


def part(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """What one tensor-parallel rank holds."""
    *_, module, kind = ("", *name.split("."))
    if module in ("query_key_value", "dense_h_to_4h") or name == "word_embeddings.weight":
        return tensor.chunk(ranks)[rank].clone()
    if module in ("dense", "dense_4h_to_h") and kind == "weight":
        return tensor.chunk(ranks, dim=1)[rank].clone()
    return tensor


def layers(root: Path, row: str, ranks: int = 1, **more: Any) -> Path:
    """The folder of a run, with one step of it."""
    step = root / "global_step7"
    step.mkdir(parents=True)
    for number, tensors in state(row).items():
        for rank in range(ranks):
            held = {name: part(name, tensor, rank, ranks) for name, tensor in tensors.items()}
            torch.save(held, step / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
    said = argparse.Namespace(**arguments(row, **more))
    with importable(PositionEmbeddingType, "megatron.enums"):
        for rank in range(ranks):
            rest = {"module": None, "optimizer": None, "args": said, "checkpoint_version": 3.0, "iteration": 7}
            torch.save(rest, step / f"mp_rank_{rank:02d}_model_states.pt")
    (root / "latest").write_text("global_step7")
    return root

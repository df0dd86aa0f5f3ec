"""Tiny checkpoints of Megatron-LM before megatron-core: nested tables, older names, three orders of q, k and v.

The models are those of :mod:`.megatron`. Names and tables are those of megatron/model/language_model.py, releases 1.0
to 2.5 and core_v0.9.0's megatron/legacy; the orders are what fix_query_key_value_ordering in megatron/checkpointing.py
sorts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdl.archs.eager.megatron_legacy import legacy_name

from . import megatron
from .megatron import HEADS, LAYERS, SIZE, State

_THEN = {"encoder": "transformer", "attention": "attention"}
_NOW = {"encoder": "encoder", "attention": "self_attention"}
_LAYERNORMS = {"input_norm": "input_layernorm", "second_norm": "post_attention_layernorm"}
_NORMS = {"input_norm": "input_norm", "second_norm": "post_attention_norm", "final_norm": "final_norm"}


@dataclass(frozen=True)
class Release:
    """What a release calls things, and its order of q, k and v (checkpoint_version)."""

    version: float
    words: dict[str, str] = field(default_factory=dict[str, str])


RELEASES = {
    "v1.0": Release(0, _THEN | _LAYERNORMS),
    "of 2020": Release(1.0, _THEN | _LAYERNORMS),
    "v2.0": Release(3.0, _THEN | _LAYERNORMS),
    "v2.5": Release(3.0, _NOW | _LAYERNORMS),
    "core_v0.8": Release(3.0, _NOW | _NORMS),
}


def nested(tensors: State, release: str, ranks: int = 1, rank: int = 0, *, gated: bool = False) -> dict[str, Any]:
    """One rank's state dict as a release saves it: tables in tables, a flat one for the layers."""
    made = RELEASES[release]
    words = {"final_norm": "final_layernorm", **made.words}
    tables: dict[str, Any] = {}
    for name, tensor in tensors.items():
        own = megatron.part(name, tensor, rank, ranks, gated=gated)
        if made.version < 2 and ".linear_qkv." in name:  # a rank has a part of each head's three
            heads = tensor.unflatten(0, (HEADS, 3, SIZE)).chunk(ranks)[rank]
            turned = heads.transpose(0, 1) if made.version == 0 else heads.transpose(1, 2)
            own = turned.reshape(own.shape)
        head, layers, rest = legacy_name(name, words).partition(f".{words['encoder']}.")
        path = [head, words["encoder"], rest] if layers else head.split(".")
        at = tables
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = own
    return tables


def grid(root: Path, row: str, release: str = "v2.5", ranks: int = 1, stages: int = 1, **more: Any) -> Path:
    """The folder of a run, cut into ranks and pipeline stages."""
    sizes = {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages}
    whole, count = megatron.state(row), LAYERS // stages
    said = megatron.arguments(row)
    args = argparse.Namespace(**(said | sizes | more))
    for p in range(stages):
        held = megatron.stage(whole, p * count, count)
        for t in range(ranks):
            tied = held.get("output_layer.weight") is whole["embedding.word_embeddings.weight"]
            copy = held.pop("output_layer.weight") if tied else None
            model = nested(held, release, ranks, t, gated=said["swiglu"])
            if copy is not None:
                model["word_embeddings_for_head"] = {"weight": copy.chunk(ranks)[t].clone()}
                held["output_layer.weight"] = copy
            content: dict[str, Any] = {"args": args, "checkpoint_version": RELEASES[release].version, "model": model}
            if not RELEASES[release].version:
                del content["checkpoint_version"]
            folder = f"mp_rank_{t:02d}" + f"_{p:03d}" * (stages > 1)
            megatron.save(root / "iter_0000005" / folder / "model_optim_rng.pt", content)
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    return root


def flat(table: dict[str, Any], above: str = "") -> State:
    """The tensors of nested tables by their paths."""
    found: State = {}
    for name, value in table.items():
        found |= flat(value, f"{above}{name}/") if isinstance(value, dict) else {f"{above}{name}": value}
    return found

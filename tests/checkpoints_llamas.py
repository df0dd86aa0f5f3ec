"""Writes tiny checkpoints in the layouts of lingua and torchtitan, which are Meta's with other names and wrappers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp

from . import servable
from .checkpoints import State
from .checkpoints_mistral import filled

MODEL: dict[str, Any] = {
    "dim": 128, "n_layers": 2, "head_dim": None, "n_heads": 4, "n_kv_heads": 2, "ffn_dim_multiplier": None,
    "multiple_of": 32, "norm_eps": 1e-5, "rope_theta": 10000.0, "init_base_std": None, "init_std_factor": "disabled",
    "max_seqlen": 256, "seed": 42, "vocab_size": 96, "weight_tying": False, "sliding_window": None,
}  # fmt: skip
"""The model section of params.json, every field of LMTransformerArgs."""


def lingua(folder: Path, state: State, **model: Any) -> Path:
    """A step's folder: ``model`` and ``optim`` by torch.distributed.checkpoint, the whole configuration beside them."""
    moments = {"state": {"norm.weight": {"exp_avg": torch.zeros(128)}}, "param_groups": [{"lr": 3e-3}]}
    distributed(folder, {"model": state, "optim": moments})
    lingua_config(folder, **model)
    (folder / "train_state_00000.json").write_text(json.dumps({"step": 10, "acc_step": 0}))
    return folder


def lingua_config(folder: Path, **model: Any) -> None:
    """params.json, as lingua dumps its TrainArgs."""
    said = {"name": "debug", "steps": 10, "data": {"seq_len": 256, "tokenizer": {"name": "bytes"}}}
    (folder / "params.json").write_text(json.dumps({**said, "model": {**MODEL, **model}}))


def lingua_consolidated(folder: Path, state: State, **model: Any) -> Path:
    """What its consolidate_checkpoints makes of such a folder."""
    folder.mkdir()
    torch.save({"model": state, "optim": {"state": {}}}, folder / "consolidated.pth")
    lingua_config(folder, **model)
    return folder


def lingua_tied() -> State:
    """With weight_tying: the head is the embedding's module, so its weight is saved twice."""
    state = servable.llama_state(tied=True)
    return {name.replace("output.", "output.tied_module."): tensor for name, tensor in state.items()}


def titan_names(tied: bool = False) -> State:
    """The names since April 2026, in torchtitan's order."""
    made = {name.replace("attention.w", "attention.qkv_linear.w") if "wo" not in name else name: tensor
            for name, tensor in servable.llama_state(tied=tied).items()}  # fmt: skip
    return {name.replace("output", "lm_head"): tensor for name, tensor in made.items()}


def titan_qwen3(tied: bool = False) -> State:
    """Qwen3 under the names since April 2026: two layers, four heads of 64 and two key heads, width 128."""
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (96, 128)}
    for i in range(2):
        at = f"layers.{i}"
        rows = {"wq": 256, "wk": 128, "wv": 128}
        shapes |= {f"{at}.attention.qkv_linear.{w}.weight": (n, 128) for w, n in rows.items()}
        shapes |= {f"{at}.attention.wo.weight": (128, 256)}
        shapes |= {f"{at}.attention.{norm}.weight": (64,) for norm in ("q_norm", "k_norm")}
        shapes |= {f"{at}.feed_forward.{w}.weight": (160, 128) for w in ("w1", "w3")}
        shapes |= {f"{at}.feed_forward.w2.weight": (128, 160)}
        shapes |= {f"{at}.{norm}.weight": (128,) for norm in ("attention_norm", "ffn_norm")}
    made = filled({**shapes, "norm.weight": (128,), "lm_head.weight": (96, 128)})
    return made | ({"lm_head.weight": made["tok_embeddings.weight"]} if tied else {})


def titan_fused(state: State, size: int = 32) -> State:
    """Those of a job of spring 2026 with fused projections: [q q k v] for each of the two key heads."""
    made = dict(state)
    for i in range(2):
        at = f"layers.{i}.attention.qkv_linear"
        q, k, v = (made.pop(f"{at}.{w}.weight").unflatten(0, (2, -1, size)) for w in ("wq", "wk", "wv"))
        made[f"{at}.wqkv.weight"] = torch.cat([q, k, v], dim=1).flatten(0, 2)
    return made


def titan(path: Path, state: State) -> Path:
    """A step-N folder as torchtitan's checkpointer fills it: the model's tensors at the top, the rest below."""
    trainer = {"step": 10, "ntokens_seen": 81920}
    moments = {"state.norm.weight.exp_avg": torch.zeros(128), "param_groups.norm.weight.lr": 8e-4}
    tree: dict[str, Any] = {**state, "optimizer": moments, "lr_scheduler": {"last_epoch": 10}, "train_state": trainer}
    return distributed(path, tree)


def distributed(folder: Path, tree: dict[str, Any]) -> Path:
    """What torch.distributed.checkpoint saves of a tree, by one process without a group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.save(tree, storage_writer=torch_dcp.FileSystemWriter(folder), no_dist=True)
    return folder

"""Tiny GPT-NeoX checkpoints: one file per layer and rank, and the settings in configs/.

Names are those of gpt-neox at ea7aefd, and before 2024. Heads of 32 channels, weights that hide nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .gpts import Draw

State = dict[str, Tensor]
LAYERS, HEADS, HIDDEN, VOCAB, CONTEXT, FFN = 2, 4, 128, 96, 128, 256
ROWS: dict[str, dict[str, Any]] = {
    "parallel": {"gpt-j-residual": True, "rotary-pct": 0.25, "no-weight-tying": True},
    "fused": {"gpt-j-residual": True, "rotary-pct": 0.25, "no-weight-tying": True, "bias-gelu-fusion": True},
    "serial": {"rotary-emb-base": 20000, "no-weight-tying": True},
    "tied": {"gpt_j_residual": True, "rotary_pct": 0.5, "layernorm_epsilon": 1e-4},
}
"""Settings by which runs differ; GPT-NeoX takes keys with hyphens and with underscores."""


def settings(row: str, **more: Any) -> dict[str, Any]:
    """What the .yml files of a run hold."""
    common = {"num-layers": LAYERS, "hidden-size": HIDDEN, "num-attention-heads": HEADS, "pos-emb": "rotary"}
    common |= {"max-position-embeddings": CONTEXT, "norm": "layernorm", "attention-config": [[["flash"], LAYERS]]}
    return common | ROWS[row] | more


def state(row: str, *, new: bool = True, seed: int = 9) -> dict[int, State]:
    """The whole model, by the number of the pipeline's module."""
    draw = Draw(seed)
    up, down = ("linear1", "linear2") if new else ("dense_h_to_4h", "dense_4h_to_h")

    def norm(name: str) -> State:
        return {f"{name}.weight": 1 + 0.3 * draw(HIDDEN), f"{name}.bias": 0.3 * draw(HIDDEN)}

    made: dict[int, State] = {0: {"word_embeddings.weight": draw(VOCAB, HIDDEN) / 8}}
    for i in range(LAYERS):
        block = norm("input_layernorm") | draw.linear("attention.query_key_value", 3 * HIDDEN, HIDDEN)
        if not new:
            block["attention.rotary_emb.inv_freq"] = torch.rand(int(settings(row).get("rotary-pct", 1.0) * 32) // 2)
        block |= draw.linear("attention.dense", HIDDEN, HIDDEN) | norm("post_attention_layernorm")
        block |= draw.linear(f"mlp.{up}", FFN, HIDDEN) | draw.linear(f"mlp.{down}", HIDDEN, FFN)
        made[i + 2] = block
    made[LAYERS + 3] = norm("norm")
    if row != "tied":
        made[LAYERS + 4] = draw.linear("final_linear", VOCAB, HIDDEN, bias=False)
    return made


def part(name: str, tensor: Tensor, rank: int, ranks: int, *, parallel: bool) -> Tensor:
    """What one tensor-parallel rank holds. Biases behind a sum over ranks: parts that sum up, or copies."""
    *_, module, kind = name.split(".")
    if module in ("word_embeddings", "final_linear", "query_key_value", "linear1", "dense_h_to_4h"):
        return tensor.chunk(ranks)[rank].clone()
    if module in ("dense", "linear2", "dense_4h_to_h"):
        if kind == "weight":
            return tensor.chunk(ranks, dim=1)[rank].clone()
        return tensor * (rank + 1) / sum(range(1, ranks + 1)) if parallel else tensor
    return tensor


def layers(root: Path, row: str, ranks: int = 1, *, new: bool = True, **more: Any) -> Path:
    """The folder of a run: one step of it, its settings in two files, and DeepSpeed's other files."""
    step = root / "global_step7"
    (step / "configs").mkdir(parents=True)
    said = settings(row, **more)
    parallel = bool(said.get("gpt-j-residual", said.get("gpt_j_residual")))
    for number, tensors in state(row, new=new).items():
        for rank in range(ranks):
            held = {name: part(name, t, rank, ranks, parallel=parallel) for name, t in tensors.items()}
            torch.save(held, step / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
    for rank in range(ranks):
        rest = {"module": None, "optimizer": None, "args": {"num_layers": LAYERS}, "dp_world_size": 1}
        torch.save(rest, step / f"mp_rank_{rank:02d}_model_states.pt")
    names = sorted(said)
    for file, keys in {"model.yml": names[::2], "run.yml": names[1::2]}.items():
        text = json.dumps({key: said[key] for key in keys}, indent=2)
        (step / "configs" / file).write_text(text.replace("{", "{ # as GPT-NeoX's own files begin", 1))
    (root / "latest").write_text("global_step7")
    return root


def sequential(root: Path, row: str) -> Path:
    """The same without a pipeline: one file, the names with the modules' numbers."""
    layers(root, row)
    step = root / "global_step7"
    for file in step.glob("layer_*"):
        file.unlink()
    whole = {f"sequential.{n}.{name}": t for n, held in state(row).items() for name, t in held.items()}
    torch.save({"module": whole, "optimizer": None, "args": {}}, step / "mp_rank_00_model_states.pt")
    return step

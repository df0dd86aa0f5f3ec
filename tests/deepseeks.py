"""A tiny DeepSeek-V3 as DeepSeek's inference/convert.py leaves it: model{r}-mp{N}.safetensors, and a config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .checkpoints import State

VOCAB, HIDDEN, HEADS, EXPERTS, LAYERS, DENSE = 96, 128, 2, 8, 3, 1
Q_RANK, KV_RANK, NOPE, ROPE, V_DIM, FFN, INNER, SHARED = 48, 512, 128, 64, 128, 80, 32, 2
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": HIDDEN,
    "inter_dim": FFN,
    "moe_inter_dim": INNER,
    "n_layers": LAYERS,
    "n_dense_layers": DENSE,
    "n_heads": HEADS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": SHARED,
    "n_activated_experts": 3,
    "n_expert_groups": 4,
    "n_limited_groups": 2,
    "route_scale": 2.5,
    "score_func": "sigmoid",
    "q_lora_rank": Q_RANK,
    "kv_lora_rank": KV_RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": V_DIM,
    "original_seq_len": 64,
    "max_seq_len": 256,
    "rope_factor": 4.0,
}
_CUT = {"embed": 0, "head": 0, "wq": 0, "wq_b": 0, "wkv_b": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}


def state(*, q_rank: int = Q_RANK, ffn: int = FFN, inner: int = INNER, seed: int = 9) -> State:
    """The state dict in the order of the modules of DeepSeek's model.py; matrices of unit gain, norms far from one."""
    rng = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) / shape[-1] ** 0.5

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.3 * torch.randn(size, generator=rng)

    def mlp(at: str, inner: int) -> State:
        shapes = {"w1": (inner, HIDDEN), "w2": (HIDDEN, inner), "w3": (inner, HIDDEN)}
        return {f"{at}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}

    made: State = {"embed.weight": matrix(VOCAB, HIDDEN)}
    for i in range(LAYERS):
        at = f"layers.{i}."
        queries = HEADS * (NOPE + ROPE)
        if q_rank:
            made |= {at + "attn.wq_a.weight": matrix(q_rank, HIDDEN), at + "attn.q_norm.weight": norm(q_rank)}
        made[at + ("attn.wq_b.weight" if q_rank else "attn.wq.weight")] = matrix(queries, q_rank or HIDDEN)
        made |= {at + "attn.wkv_a.weight": matrix(KV_RANK + ROPE, HIDDEN), at + "attn.kv_norm.weight": norm(KV_RANK)}
        made[at + "attn.wkv_b.weight"] = matrix(HEADS * (NOPE + V_DIM), KV_RANK)
        made[at + "attn.wo.weight"] = matrix(HIDDEN, HEADS * V_DIM)
        if i < DENSE:
            made |= mlp(at + "ffn", ffn)
        else:
            made |= {at + "ffn.gate.weight": matrix(EXPERTS, HIDDEN)}
            made |= {at + "ffn.gate.bias": 0.2 * torch.randn(EXPERTS, generator=rng)}
            for e in range(EXPERTS):
                made |= mlp(f"{at}ffn.experts.{e}", inner)
            made |= mlp(at + "ffn.shared_experts", SHARED * inner)
        made |= {at + "attn_norm.weight": norm(HIDDEN), at + "ffn_norm.weight": norm(HIDDEN)}
    return made | {"norm.weight": norm(HIDDEN), "head.weight": matrix(VOCAB, HIDDEN)}


def quantised(tensors: State, block: int = 128) -> State:
    """The state dict in float8 where DeepSeek's release is: a factor beside each block of the matrices in layers, so
    that its largest value is 448. The rest in bfloat16, but for the bias of the gate."""
    made: State = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or name.split(".")[-2] not in (*_CUT, "wq_a", "wkv_a") or not name.startswith("layers"):
            made[name] = tensor if name.endswith("gate.bias") else tensor.bfloat16()
            continue
        rows, columns = (-(-size // block) for size in tensor.shape)
        scale = torch.empty(rows, columns)
        packed = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for i in range(rows):
            for j in range(columns):
                place = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                scale[i, j] = tensor[place].abs().max() / 448
                packed[place] = (tensor[place] / scale[i, j]).to(torch.float8_e4m3fn)
        made |= {name: packed, name.removesuffix("weight") + "scale": scale}
    return made


def dequantised(tensors: State, block: int = 128) -> State:
    """What DeepSeek's fp8_cast_bf16.py makes of it, block by block: the product in float32, then in bfloat16."""
    made = {name: tensor.clone() for name, tensor in tensors.items() if not name.endswith(".scale")}
    for name, scale in tensors.items():
        if name.endswith(".scale"):
            whole = made[name.removesuffix("scale") + "weight"].float()
            for i, row in enumerate(scale):
                for j, factor in enumerate(row):
                    whole[i * block : (i + 1) * block, j * block : (j + 1) * block] *= factor
            made[name.removesuffix("scale") + "weight"] = whole.bfloat16()
    return made


def parts(tensors: State, ranks: int) -> list[State]:
    """What each rank holds: a share of most matrices, its own experts, all of the rest."""
    made: list[State] = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        words = name.split(".")
        if "experts" in words:
            made[int(words[-3]) * ranks // EXPERTS][name] = tensor
            continue
        axis = _CUT.get(words[-2]) if "gate" not in words else None
        for rank, held in enumerate(made):
            held[name] = tensor if axis is None else tensor.chunk(ranks, axis)[rank].contiguous()
    return made


def saved(folder: Path, tensors: State, ranks: int = 1, **config: Any) -> Path:
    """A folder of rank files, with the config that the program is started with; None takes a key out of it."""
    folder.mkdir(parents=True)
    for rank, held in enumerate(parts(tensors, ranks)):
        save_file(held, folder / f"model{rank}-mp{ranks}.safetensors")
    said = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(said))
    return folder

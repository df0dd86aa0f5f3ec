"""Tiny mixtures of llm-foundry as Composer saves them: state.model, and the config below state.integrations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .checkpoints import State
from .gpts import saved

LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, EXPERTS, CHOSEN, VOCAB, CONTEXT = 2, 128, 4, 2, 48, 6, 2, 96, 128
ROWS: dict[str, dict[str, Any]] = {
    "dbrx": {"norm_type": "low_precision_layernorm", "fuse_norm_attn_norm": True},
    "dbrx, names apart": {"norm_type": "layernorm", "attn_config": {"clip_qkv": None}},
    "mixtral": {"norm_type": "rmsnorm", "norm_eps": 1e-5, "attn_config": {"clip_qkv": None}},
    "mixtral, tied": {
        "norm_type": "low_precision_rmsnorm",
        "norm_eps": 1e-6,
        "attn_config": {"clip_qkv": None},
        "tie_word_embeddings": True,
        "fuse_norm_attn_norm": True,
    },
}


def config(row: str, **changed: Any) -> dict[str, Any]:
    """What llm-foundry was told, with its defaults; ``changed`` holds tables for attn_config and ffn_config."""
    said: dict[str, Any] = {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": CONTEXT}
    said |= {"vocab_size": VOCAB, "no_bias": True, "tie_word_embeddings": False, "logit_scale": None}
    attention = {"kv_n_heads": KV_HEADS, "clip_qkv": 1.5, "rope": True, "rope_theta": 500000, "alibi": False}
    attention |= {"qk_ln": False, "softmax_scale": None, "sliding_window_size": -1}
    attention |= {"rope_impl": "dail", "rope_dail_config": {"type": "original"}}
    experts = {"ffn_type": "mb_dmoe", "ffn_hidden_size": FFN, "moe_num_experts": EXPERTS, "moe_top_k": CHOSEN}
    experts |= {"ffn_act_fn": {"name": "silu"}, "moe_normalize_expert_weights": 1, "mlp_type": "glu"}
    made = said | {"attn_config": attention, "ffn_config": experts}
    for more in (ROWS[row], changed):
        inner = {key: made[key] | more[key] for key in ("attn_config", "ffn_config") if key in more}
        made = made | more | inner
    return made


def state(row: str, seed: int = 8) -> State:
    """The state dict of an MPTForCausalLM; matrices of unit gain, norms far from one."""
    rng = torch.Generator().manual_seed(seed)
    said = config(row)
    around = "norm_attn_norm." if said.get("fuse_norm_attn_norm") else ""

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) / shape[-1] ** 0.5

    def norm() -> torch.Tensor:
        return 1 + 0.3 * torch.randn(HIDDEN, generator=rng)

    made: State = {"transformer.wte.weight": matrix(VOCAB, HIDDEN)}
    for i in range(LAYERS):
        at = f"transformer.blocks.{i}."
        made[f"{at}{around}norm_1.weight"] = norm()
        made[f"{at}{around}attn.Wqkv.weight"] = matrix(HIDDEN + 2 * KV_HEADS * HIDDEN // HEADS, HIDDEN)
        made[f"{at}{around}attn.out_proj.weight"] = matrix(HIDDEN, HIDDEN)
        made[f"{at}{around}norm_2.weight"] = norm()
        made[f"{at}ffn.router.layer.weight"] = 2 * matrix(EXPERTS, HIDDEN)
        made |= {f"{at}ffn.experts.mlp.{w}": matrix(EXPERTS * FFN, HIDDEN) for w in ("w1", "w2", "v1")}
    made["transformer.norm_f.weight"] = norm()
    return made | ({} if said["tie_word_embeddings"] else {"lm_head.weight": matrix(VOCAB, HIDDEN)})


def folder(root: Path, row: str, tensors: State | None = None, **changed: Any) -> Path:
    """The bare state dict, and the config beside it."""
    saved(root / "model.pt", tensors or state(row))
    (root / "config.json").write_text(json.dumps(config(row, **changed)))
    return root


def composer(path: Path, row: str, tensors: State | None = None, **changed: Any) -> Path:
    """What Composer's trainer saves; give it with ``--weights state/model``."""
    weights = {f"model.{name}": tensor for name, tensor in (tensors or state(row)).items()}
    model = {"config": {"file_extension": ".json", "content": config(row, **changed)}}
    integrations = {"huggingface": {"model": model, "tokenizer": {}}}
    return saved(path, {"state": {"model": weights, "integrations": integrations}, "rng": []})

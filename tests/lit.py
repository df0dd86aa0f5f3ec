"""Tiny litgpt checkpoints, as litgpt's own programs save them: lit_model.pth and every field in model_config.yaml.

:func:`checkpoint` writes one without litgpt; tests/archs/test_litgpt.py holds it to what litgpt's classes write.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from .checkpoints import State

_DEFAULTS: dict[str, Any] = {
    "hf_config": {},
    "block_size": 128,
    "n_layer": 2,
    "n_embd": 128,
    "vocab_size": 90,
    "padding_multiple": 32,
    "padded_vocab_size": 96,
    "norm_class_name": "LayerNorm",
    "norm_eps": 1e-5,
    "norm_qk": False,
    "norm_qk_type": "default",
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "parallel_residual": True,
    "shared_attention_norm": False,
    "n_head": 4,
    "head_size": 32,
    "n_query_groups": 4,
    "attn_bias": False,
    "attention_scores_scalar": None,
    "sliding_window_size": None,
    "sliding_window_indices": None,
    "attention_logit_softcapping": None,
    "rope_base": 10000,
    "rotary_percentage": 0.25,
    "rope_condense_ratio": 1,
    "rope_adjustments": None,
    "rope_interleave": False,
    "intermediate_size": 160,
    "moe_intermediate_size": None,
    "bias": True,
    "mlp_class_name": "GptNeoxMLP",
    "gelu_approximate": "none",
    "n_expert": 0,
    "n_shared_expert": None,
    "n_expert_groups": None,
    "n_topk_groups": None,
    "n_topk_scores_per_group": None,
    "n_expert_per_token": 0,
    "first_k_dense_replace": None,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "scale_embeddings": False,
    "lm_head_bias": False,
    "final_logit_softcapping": None,
    "norm_1": True,
    "norm_2": True,
    "latent_attention": None,
    "rope_local_base_freq": None,
    "rope_indices": None,
}
_LLAMA: dict[str, Any] = {
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "parallel_residual": False,
    "bias": False,
    "rotary_percentage": 1.0,
    "n_query_groups": 2,
}
_GEMMA = {**_LLAMA, "mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh", "scale_embeddings": True, "head_size": 64}
_GEMMA2: dict[str, Any] = {
    **_GEMMA,
    "post_attention_norm": True,
    "post_mlp_norm": True,
    "attention_scores_scalar": 48,
    "sliding_window_size": 24,
    "sliding_window_indices": [1, 0],
}
_SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 64}

ROWS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama_mha": {**_LLAMA, "n_query_groups": 4},
    "llama_31": {**_LLAMA, "rope_adjustments": _SCALED},
    "llama_condensed": {**_LLAMA, "rope_condense_ratio": 4},
    "llama_wide_heads": {**_LLAMA, "head_size": 64},
    "qwen2": {**_LLAMA, "attn_bias": True},
    "qwen3": {**_LLAMA, "norm_qk": True, "head_size": 64},
    "mistral": {**_LLAMA, "sliding_window_size": 24, "sliding_window_indices": [1, 1]},
    "mixtral": {**_LLAMA, "mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
    "qwen3_moe": {
        **_LLAMA,
        "norm_qk": True,
        "head_size": 64,
        "mlp_class_name": "LLaMAMoE",
        "n_expert": 6,
        "n_expert_per_token": 2,
        "moe_intermediate_size": 48,
    },
    "stablelm": {**_LLAMA, "norm_class_name": "LayerNorm", "rotary_percentage": 0.25},
    "stablelm_bias": {**_LLAMA, "norm_class_name": "LayerNorm", "rotary_percentage": 0.5, "attn_bias": True},
    "falcon_7b": {
        "bias": False,
        "rotary_percentage": 1.0,
        "n_query_groups": 1,
        "shared_attention_norm": True,
        "intermediate_size": 512,
    },
    "falcon_40b": {"bias": False, "rotary_percentage": 1.0, "n_query_groups": 2, "intermediate_size": 512},
    "neox": {},
    "neox_serial": {"parallel_residual": False, "rotary_percentage": 0.5},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA2, "attention_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "phi": {
        "shared_attention_norm": True,
        "lm_head_bias": True,
        "gelu_approximate": "tanh",
        "rotary_percentage": 0.5,
    },
    "olmo2": {
        **_LLAMA,
        "norm_qk": True,
        "norm_qk_type": "olmo2",
        "norm_1": False,
        "norm_2": False,
        "post_attention_norm": True,
        "post_mlp_norm": True,
    },
    "gemma3": {
        **_GEMMA2,
        "norm_qk": True,
        "rope_base": 1000000,
        "rope_local_base_freq": 10000.0,
        "rope_indices": [1, 0],
        "rope_adjustments": {"factor": 8.0},
    },
}
"""Row of the decision table → the fields that make it; what they leave out is litgpt's default."""


def fields(row: str, **more: Any) -> dict[str, Any]:
    """All fields of one row's Config. The name says Gemma where litgpt looks for that."""
    name = "Tiny-Gemma" if row.startswith("gemma") else "tiny"
    return {"name": name, **_DEFAULTS, **ROWS[row], **more}


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What litgpt's GPT holds, in the order of its state dict, by this file's own reading of it."""
    hidden, size, heads, groups = c["n_embd"], c["head_size"], c["n_head"], c["n_query_groups"]
    made: dict[str, tuple[int, ...]] = {"lm_head.weight": (c["padded_vocab_size"], hidden)}
    if c["lm_head_bias"]:
        made["lm_head.bias"] = (c["padded_vocab_size"],)
    made["transformer.wte.weight"] = (c["padded_vocab_size"], hidden)
    rows = (heads + 2 * groups) * size
    for i in range(c["n_layer"]):
        block: dict[str, tuple[int, ...]] = {}
        whole = c["norm_qk_type"] == "olmo2"
        second = c["norm_2"] and not c["shared_attention_norm"]
        block |= _norm(c, "norm_1", hidden) if c["norm_1"] else {}
        block |= _linear("attn.qkv", rows, hidden, bias=c["bias"] or c["attn_bias"])
        block |= _linear("attn.proj", hidden, heads * size, bias=c["bias"])
        if c["norm_qk"]:
            block |= _norm(c, "attn.norm_q", size * (heads if whole else 1))
            block |= _norm(c, "attn.norm_k", size * (groups if whole else 1))
        block |= _norm(c, "post_attention_norm", hidden) if c["post_attention_norm"] else {}
        block |= _norm(c, "norm_2", hidden) if second else {}
        block |= _mlp(c)
        block |= _norm(c, "post_mlp_norm", hidden) if c["post_mlp_norm"] else {}
        made |= {f"transformer.h.{i}.{name}": shape for name, shape in block.items()}
    return made | _norm(c, "transformer.ln_f", hidden)


def _norm(c: dict[str, Any], name: str, size: int) -> dict[str, tuple[int, ...]]:
    both = ("weight", "bias") if c["norm_class_name"] == "LayerNorm" else ("weight",)
    return {f"{name}.{part}": (size,) for part in both}


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def _mlp(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, made = c["n_embd"], c["moe_intermediate_size"] or c["intermediate_size"], {}
    ups = ("fc",) if c["mlp_class_name"] == "GptNeoxMLP" else ("fc_1", "fc_2")
    places = ["mlp"]
    if c["mlp_class_name"] == "LLaMAMoE":
        made = _linear("mlp.gate", c["n_expert"], hidden, bias=False)
        places = [f"mlp.experts.{e}" for e in range(c["n_expert"])]
    for place in places:
        for up in ups:
            made |= _linear(f"{place}.{up}", ffn, hidden, bias=c["bias"])
        made |= _linear(f"{place}.proj", hidden, ffn, bias=c["bias"])
    return made


def state(c: dict[str, Any], *, seed: int = 3) -> State:
    """Matrices of unit gain, norms and biases far from where training starts; Gemma's head is its embedding."""
    rng, made = torch.Generator().manual_seed(seed), State()
    around = 0.0 if "Gemma" in c["name"] else 1.0  # its norms multiply by one plus their weight
    for name, shape in shapes(c).items():
        noise = torch.randn(shape, generator=rng)
        if len(shape) > 1:
            made[name] = noise / shape[1] ** 0.5
        else:
            made[name] = (0.0 if name.endswith("bias") else around) + 0.3 * noise
    if "Gemma" in c["name"]:
        made["lm_head.weight"] = made["transformer.wte.weight"].clone()  # litgpt never ties, it stores both
    return made


def grouped(made: State, c: dict[str, Any]) -> State:
    """The same weights as releases before 0.5.5 name and order them: attn.attn, [q … q k v] for each key head."""
    heads, groups, size = c["n_head"], c["n_query_groups"], c["head_size"]
    old: State = {}
    for name, tensor in made.items():
        if ".attn.qkv." in name:
            q, k, v = tensor.split([n * size for n in (heads, groups, groups)])
            runs = [part for run in zip(q.chunk(groups), k.chunk(groups), v.chunk(groups), strict=True) for part in run]
            tensor = torch.cat(runs)
        old[name.replace(".attn.qkv.", ".attn.attn.")] = tensor
    return old


def save(folder: Path, made: Mapping[str, Any], c: dict[str, Any] | None) -> Path:
    """lit_model.pth and model_config.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(made, folder / "lit_model.pth")
    if c is not None:
        (folder / "model_config.yaml").write_text(yaml.dump(c), encoding="utf-8")
    return folder


def checkpoint(folder: Path, row: str, *, old: bool = False, **more: Any) -> Path:
    """A whole checkpoint of one row; ``old`` in the layout before 0.5.5."""
    c = fields(row, **more)
    made = state(c)
    return save(folder, grouped(made, c) if old else made, c)

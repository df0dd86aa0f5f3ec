"""Writes tiny checkpoints in gemma_pytorch's layout: a state dict with its rotary tables under model_state_dict."""

from __future__ import annotations

from pathlib import Path

import torch

from .checkpoints import State

GIVEN: dict[int, dict[str, str]] = {
    1: {"num_attention_heads": "4", "max_position_embeddings": "256"},
    2: {
        "num_attention_heads": "4",
        "max_position_embeddings": "256",
        "sliding_window_size": "24",
        "query_pre_attn_scalar": "48",
        "attn_logit_softcapping": "5",
        "final_logit_softcapping": "3",
    },
    3: {
        "max_position_embeddings": "256",
        "sliding_window_size": "24",
        "query_pre_attn_scalar": "48",
        "rope_scaling_factor": "8",
    },
}
"""What the user says of a model with sizes of its own."""


def shapes(generation: int, layers: int = 3) -> dict[str, tuple[int, ...]]:
    """The parameters and buffers of GemmaForCausalLM, in the order of its state dict: 4 heads of 32, 2 key heads."""
    tables = ("local_freqs_cis", "global_freqs_cis") if generation == 3 else ("freqs_cis",)
    made: dict[str, tuple[int, ...]] = dict.fromkeys(tables, (512, 16))
    made["embedder.weight"] = (96, 96)
    for i in range(layers):
        at = f"model.layers.{i}"
        made |= {f"{at}.self_attn.qkv_proj.weight": (256, 96), f"{at}.self_attn.o_proj.weight": (96, 128)}
        if generation == 3:
            made |= {f"{at}.self_attn.query_norm.weight": (32,), f"{at}.self_attn.key_norm.weight": (32,)}
        made |= {f"{at}.mlp.{x}_proj.weight": (160, 96) for x in ("gate", "up")}
        made |= {f"{at}.mlp.down_proj.weight": (96, 160)}
        norms = ("input", "post_attention", *(("pre_feedforward", "post_feedforward") if generation > 1 else ()))
        made |= {f"{at}.{x}_layernorm.weight": (96,) for x in norms}
    return made | {"model.norm.weight": (96,)}


def state(generation: int, layers: int = 3) -> State:
    """Matrices of unit gain, norms around 0, rotary tables as complex numbers."""
    rng, made = torch.Generator().manual_seed(7), State()
    for name, shape in shapes(generation, layers).items():
        noise = torch.randn(shape, generator=rng)
        made[name] = noise / shape[1] ** 0.5 if len(shape) > 1 else 0.3 * noise
        if name.endswith("freqs_cis"):
            made[name] = torch.polar(torch.ones(shape), noise)
    return made


def checkpoint(path: Path, generation: int, tensors: State | None = None) -> Path:
    """A file as the releases have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": state(generation) if tensors is None else tensors}, path)
    return path


def without_tables(tensors: State) -> State:
    """The parameters alone."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("freqs_cis")}

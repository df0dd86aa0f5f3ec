"""Tiny Hugging Face checkpoints that transformers itself writes, with weights under which every mistake shows."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
_WINDOW = {"sliding_window": 48}
CLASSES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": SIZES,
    "MistralForCausalLM": {**SIZES, **_WINDOW},
    "Qwen2ForCausalLM": SIZES,
    "Qwen3ForCausalLM": SIZES,
    "Gemma2ForCausalLM": {**SIZES, **_WINDOW, "num_hidden_layers": 4, "query_pre_attn_scalar": 32},
    "MixtralForCausalLM": {**SIZES, "num_local_experts": 4},
    "Qwen3MoeForCausalLM": {**SIZES, "num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2},
    "GPT2LMHeadModel": {"vocab_size": 300, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "BloomForCausalLM": {"vocab_size": 300, "hidden_size": 192, "n_layer": 3, "n_head": 6, "seq_length": 512},
    "DbrxForCausalLM": {
        "vocab_size": 300,
        "d_model": 128,
        "n_layers": 3,
        "n_heads": 4,
        "max_seq_len": 512,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 500000.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "GPTNeoXForCausalLM": {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")},
}
"""Class → the fields of its config that are not the class's own defaults; all of them are verified."""


def model(name: str, *, seed: int = 0, **fields: Any) -> Any:
    """A transformers model with matrices of unit gain and norms and biases far from where training starts."""
    import torch
    import transformers

    cls = getattr(transformers, name)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    made = cls(cls.config_class(**copy.deepcopy({**CLASSES.get(name, {}), **ids, **fields}))).eval()
    rng = torch.Generator().manual_seed(seed)
    around = 0.0 if name.startswith("Gemma") else 1.0  # Gemma's norms multiply by one plus their weight
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if parameter.dim() > 1:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            else:
                parameter.copy_((0.0 if path.endswith("bias") else around) + 0.3 * noise)
    return made


def checkpoint(folder: Path, name: str, *, max_shard_size: str = "5GB", **fields: Any) -> Path:
    """What ``save_pretrained`` writes."""
    model(name, **fields).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def pickled(folder: Path, name: str, *, drop: str = "", **fields: Any) -> Path:
    """The same as releases before safetensors: one pytorch_model.bin, optionally without the prefix ``drop``."""
    import torch
    from safetensors.torch import load_file

    checkpoint(folder, name, **fields)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({key.removeprefix(drop): tensor for key, tensor in state.items()}, folder / "pytorch_model.bin")
    return folder


def edit(folder: Path, **fields: Any) -> Path:
    """Change fields of config.json; ``None`` as a value stays null, ``...`` takes the field out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder

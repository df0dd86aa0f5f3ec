"""A tiny OLMoE in the layout of allenai/OLMo's unsharded checkpoints: model.pt and config.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from .checkpoints import State

LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, EXPERTS, CHOSEN, VOCAB = 2, 128, 4, 1, 48, 6, 2, 96
CONFIG: dict[str, Any] = {
    "d_model": HIDDEN,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "n_layers": LAYERS,
    "mlp_ratio": 1,
    "weight_tying": False,
    "alibi": False,
    "rope": True,
    "attention_layer_norm": True,
    "include_bias": False,
    "block_type": "moe",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "activation_type": "swiglu",
    "max_sequence_length": 128,
    "vocab_size": 90,
    "embedding_size": VOCAB,
    "moe_top_k": CHOSEN,
    "moe_num_experts": EXPERTS,
    "moe_dropless": True,
    "moe_mlp_impl": "sparse",
}


def state(*, ffn: int = FFN, tied: bool = False, seed: int = 8) -> State:
    """The state dict in the order of OLMoEBlock's modules; matrices of unit gain, norms far from one."""
    rng = torch.Generator().manual_seed(seed)
    kv = KV_HEADS * HIDDEN // HEADS

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) / shape[-1] ** 0.5

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.3 * torch.randn(size, generator=rng)

    made: State = {"transformer.wte.weight": matrix(VOCAB, HIDDEN)}
    for i in range(LAYERS):
        at = f"transformer.blocks.{i}."
        made |= {at + "k_norm.weight": norm(kv), at + "q_norm.weight": norm(HIDDEN)}
        made |= {at + "attn_out.weight": matrix(HIDDEN, HIDDEN)}
        made |= {at + "ffn.router.layer.weight": 2 * matrix(EXPERTS, HIDDEN)}
        made |= {f"{at}ffn.experts.mlp.{w}": matrix(EXPERTS * ffn, HIDDEN) for w in ("w1", "w2", "v1")}
        made |= {at + "attn_norm.weight": norm(HIDDEN), at + "ff_norm.weight": norm(HIDDEN)}
        made |= {at + "att_proj.weight": matrix(HIDDEN + 2 * kv, HIDDEN)}
    made["transformer.ln_f.weight"] = norm(HIDDEN)
    return made | ({} if tied else {"transformer.ff_out.weight": matrix(VOCAB, HIDDEN)})


def saved(folder: Path, tensors: State, **config: Any) -> Path:
    """An unsharded checkpoint; None takes a key out of config.yaml."""
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "model.pt")
    said = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (folder / "config.yaml").write_text(yaml.safe_dump({"run_name": "tiny", "model": said}))
    return folder

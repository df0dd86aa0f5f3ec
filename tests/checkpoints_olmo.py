"""Writes tiny checkpoints in the layouts of OLMo-core and OLMo: matrices of unit gain, norms far from 1."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml

from .checkpoints import State

CORE: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "olmo2_tied": {"tied": True},
    "olmo3": {"windows": [24, 24, 24, -1], "layers": 6},
    "olmo3_first": {"windows": [24, -1], "first": True, "layers": 4},
    "olmo3_yarn": {"windows": [24, 24, 24, -1], "layers": 5, "scaling": "yarn"},
    "llama": {"block": "default", "qk_norm": ""},
    "llama_31": {"block": "default", "qk_norm": "", "scaling": "llama3"},
    "llama_linear": {"block": "default", "qk_norm": "", "scaling": "linear"},
    "qwen3": {"block": "default", "qk_norm": "head", "head_dim": 64},
}
"""Case → what its model has otherwise than an OLMo 2 of two layers, four heads of 32 and two key heads."""
_SCALINGS = {
    "yarn": {
        "_CLASS_": "YaRNRoPEScalingConfig",
        "factor": 8.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "old_context_len": 512,
    },
    "llama3": {
        "_CLASS_": "StepwiseRoPEScalingConfig",
        "attention_rescale_factor": 1.0,
        "factor": 8.0,
        "low_freq_proportion": 0.0,
        "high_freq_proportion": 0.25,
        "old_context_len": 64,
    },
    "linear": {"_CLASS_": "PIRoPEScalingConfig", "attention_rescale_factor": 1.0, "factor": 4.0},
}


def core_config(case: str, **more: Any) -> dict[str, Any]:
    """The model section as ``TransformerConfig.as_config_dict()`` gives it, with ``_CLASS_`` where mdl reads it."""
    c = {**CORE[case], **more}
    layers = c.get("layers", 2)
    norm = {"name": "rms", "eps": 1e-6, "bias": False, "dtype": "float32"}
    qk = c.get("qk_norm", "whole")
    attention: dict[str, Any] = {"name": "default", "n_heads": 4, "n_kv_heads": 2, "bias": False, "dtype": "float32"}
    attention |= {"_CLASS_": "olmo_core.nn.attention.AttentionConfig", "type": "attention"}
    attention["rope"] = {"name": "default", "theta": 500000, "full_precision": True, "no_global_rope": False}
    attention |= {"qk_norm": norm, "use_head_qk_norm": qk == "head"} if qk else {}
    attention |= {"head_dim": c["head_dim"]} if "head_dim" in c else {}
    first = c.get("first", False)
    if "windows" in c:
        attention["sliding_window"] = {
            "pattern": c["windows"],
            "force_full_attention_on_first_layer": first,
            "force_full_attention_on_last_layer": True,
        }
    block = {
        "sequence_mixer": attention,
        "layer_norm": norm,
        "feed_forward": {"hidden_size": 160, "name": "default", "bias": False, "activation": "silu"},
        "name": c.get("block", "reordered_norm"),
    }
    model: dict[str, Any] = {"d_model": 128, "vocab_size": 96, "n_layers": layers, "name": "default", "block": block}
    model["lm_head"] = {"name": "default", "layer_norm": norm, "bias": False}
    model["tie_word_embeddings"] = c.get("tied", False)
    if "scaling" in c:
        scaled = json.loads(json.dumps(block))
        scaling = dict(_SCALINGS[c["scaling"]])
        scaling["_CLASS_"] = f"olmo_core.nn.rope.{scaling['_CLASS_']}"
        scaled["sequence_mixer"]["rope"]["scaling"] = scaling
        if "windows" in c:
            model["block_overrides"] = {str(i): scaled for i in range(layers) if i == layers - 1 or (i + 1) % 4 == 0}
        else:
            model["block"] = scaled
    return model


def core_shapes(case: str) -> dict[str, tuple[int, ...]]:
    """What OLMo-core's Transformer holds, in the order of its state dict."""
    c = CORE[case]
    size, qk = c.get("head_dim", 32), c.get("qk_norm", "whole")
    made: dict[str, tuple[int, ...]] = {"embeddings.weight": (96, 128)}
    for i in range(c.get("layers", 2)):
        at = f"blocks.{i}"
        rows = {"q": 4 * size, "k": 2 * size, "v": 2 * size}
        made |= {f"{at}.attention.w_{x}.weight": (n, 128) for x, n in rows.items()}
        made[f"{at}.attention.w_out.weight"] = (128, 4 * size)
        if qk:
            made |= {f"{at}.attention.{x}_norm.weight": (rows[x] if qk == "whole" else size,) for x in "qk"}
        made[f"{at}.attention_norm.weight"] = (128,)
        made |= {f"{at}.feed_forward.w1.weight": (160, 128), f"{at}.feed_forward.w2.weight": (128, 160)}
        made |= {f"{at}.feed_forward.w3.weight": (160, 128), f"{at}.feed_forward_norm.weight": (128,)}
    return made | {"lm_head.norm.weight": (128,), "lm_head.w_out.weight": (96, 128)}


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 11) -> State:
    """Seeded values of these shapes."""
    rng, made = torch.Generator().manual_seed(seed), State()
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=rng)
        made[name] = noise / shape[1] ** 0.5 if len(shape) > 1 else 1 + 0.3 * noise
    return made


def core_state(case: str) -> State:
    """The state dict of a case; a tied head is the embedding."""
    made = filled(core_shapes(case))
    if CORE[case].get("tied"):
        made["lm_head.w_out.weight"] = made["embeddings.weight"]
    return made


def experiment(case: str) -> dict[str, Any]:
    """config.json of a whole experiment."""
    dataset = {"sequence_length": 256, "tokenizer": {"vocab_size": 90, "eos_token_id": 0, "pad_token_id": 1}}
    return {"run_name": "tiny", "model": core_config(case), "dataset": dataset, "init_seed": 12536}


def core(step: Path, case: str, tensors: State | None = None) -> Path:
    """A whole folder stepN: config.json, and model_and_optim by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp

    step.mkdir(parents=True)
    (step / "config.json").write_text(json.dumps(experiment(case)))
    (step / ".metadata.json").write_text(json.dumps({"version": "3.0.0"}))
    (step / "train").mkdir()
    torch.save({"global_step": 10}, step / "train/rank0.pt")
    model = core_state(case) if tensors is None else tensors
    moments = {f"state.{name}.exp_avg": torch.zeros_like(t) for name, t in list(model.items())[:2]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is all there is
        dcp.save({"model": model, "optim": moments}, checkpoint_id=step / "model_and_optim")
    return step


OLD: dict[str, dict[str, Any]] = {
    "olmo1": {"layer_norm_type": "default", "layer_norm_with_affine": False},
    "olmo1_clipped": {
        "layer_norm_type": "low_precision",
        "layer_norm_with_affine": False,
        "clip_qkv": 1.5,
        "n_kv_heads": 4,
        "weight_tying": False,
    },
    "olmo2": {
        "layer_norm_type": "rms",
        "norm_after": True,
        "attention_layer_norm": True,
        "layer_norm_eps": 1e-6,
        "rope_theta": 500000,
        "weight_tying": False,
    },
    "rms": {"layer_norm_type": "rms", "weight_tying": False},
}
"""Case of OLMo's own code base → the fields of its ModelConfig beside those of :func:`old_config`."""


def old_config(case: str) -> dict[str, Any]:
    """The model section of config.yaml."""
    sizes = {"d_model": 128, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 320}
    sizes |= {"vocab_size": 90, "embedding_size": 96, "max_sequence_length": 256}
    plain = {"include_bias": False, "bias_for_layer_norm": False, "rope": True, "activation_type": "swiglu"}
    drops = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0)
    return {**sizes, **plain, **drops, "block_type": "sequential", "weight_tying": True, **OLD[case]}


def old_shapes(case: str) -> dict[str, tuple[int, ...]]:
    """What its OLMo holds, in the order of its state dict."""
    c = old_config(case)
    kv, affine = 32 * c["n_kv_heads"], c.get("layer_norm_with_affine", True)
    made: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (96, 128)}
    if affine:
        made["transformer.ln_f.weight"] = (128,)
    for i in range(2):
        at = f"transformer.blocks.{i}"
        if c.get("attention_layer_norm"):
            made |= {f"{at}.k_norm.weight": (kv,), f"{at}.q_norm.weight": (128,)}
        made |= {f"{at}.attn_out.weight": (128, 128), f"{at}.ff_out.weight": (128, 160)}
        made |= {f"{at}.att_proj.weight": (128 + 2 * kv, 128), f"{at}.ff_proj.weight": (320, 128)}
        if affine:
            made |= {f"{at}.attn_norm.weight": (128,), f"{at}.ff_norm.weight": (128,)}
    return made | ({} if c["weight_tying"] else {"transformer.ff_out.weight": (96, 128)})


def old_state(case: str) -> State:
    """The state dict of a case."""
    return filled(old_shapes(case), seed=13)


def old(folder: Path, case: str, **changed: Any) -> Path:
    """A whole unsharded folder: model.pt, and config.yaml of the run; None leaves a field out."""
    folder.mkdir(parents=True)
    torch.save(old_state(case), folder / "model.pt")
    torch.save({"state": {}}, folder / "optim.pt")
    torch.save({"epoch": 0, "global_step": 10}, folder / "train.pt")
    model = {key: value for key, value in {**old_config(case), **changed}.items() if value is not None}
    tokenizer = {"identifier": "tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"}
    text = yaml.safe_dump({"run_name": "tiny", "seed": 6198, "model": model, "tokenizer": tokenizer})
    (folder / "config.yaml").write_text(text)
    return folder

"""Writes tiny checkpoints in the layouts of mistral-inference: dense, experts one by one, experts stacked.

Matrices have unit gain and norms are far from 1, so that nothing hides in the logits. The target's tensors are computed
here too, by formulas of this file's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .checkpoints import LLAMA_NAMES, State

SIZES: dict[str, Any] = {
    "dim": 96,
    "n_layers": 2,
    "head_dim": 32,
    "hidden_dim": 80,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 64,
}
"""params.json of a model whose head_dim is not dim / n_heads, as Nemo's is not."""
MOE = {"num_experts": 4, "num_experts_per_tok": 2}


def shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of mistral-inference's Transformer, by its params.json."""
    dim, ffn, head = params["dim"], params["hidden_dim"], params["head_dim"]
    made: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (params["vocab_size"], dim)}
    for i in range(params["n_layers"]):
        at = f"layers.{i}"
        made[f"{at}.attention.wq.weight"] = (params["n_heads"] * head, dim)
        made[f"{at}.attention.wk.weight"] = made[f"{at}.attention.wv.weight"] = (params["n_kv_heads"] * head, dim)
        made[f"{at}.attention.wo.weight"] = (dim, params["n_heads"] * head)
        made[f"{at}.attention_norm.weight"] = made[f"{at}.ffn_norm.weight"] = (dim,)
        experts = [f".experts.{e}" for e in range(params["moe"]["num_experts"])] if "moe" in params else [""]
        if "moe" in params:
            made[f"{at}.feed_forward.gate.weight"] = (len(experts), dim)
        for expert in experts:
            made |= {f"{at}.feed_forward{expert}.{w}.weight": (ffn, dim) for w in ("w1", "w3")}
            made[f"{at}.feed_forward{expert}.w2.weight"] = (dim, ffn)
    return {**made, "norm.weight": (dim,), "output.weight": (params["vocab_size"], dim)}


def filled(wanted: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 5) -> State:
    """Seeded values of these shapes: matrices of unit gain, norms around 1."""
    rng = torch.Generator().manual_seed(seed)
    made: State = {}
    for name, shape in wanted.items():
        z = torch.randn(*shape, generator=rng)
        made[name] = (z / shape[1] ** 0.5 if len(shape) > 1 else 1 + 0.3 * z).to(dtype)
    return made


def state(dtype: torch.dtype = torch.float32, **params: Any) -> State:
    """The state dict of a model with :data:`SIZES` and what ``params`` say otherwise."""
    return filled(shapes({**SIZES, **params}), dtype)


def write(folder: Path, tensors: State, params: Mapping[str, Any], *, safetensors: bool = False) -> Path:
    """A release: one file of weights, and params.json beside it."""
    folder.mkdir(parents=True)
    if safetensors:
        save_file(tensors, folder / "consolidated.safetensors")
    else:
        torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(dict(params)))
    return folder


def release(folder: Path, *, safetensors: bool = False, dtype: torch.dtype = torch.float32, **params: Any) -> Path:
    """A whole release, with a theta and a context unless ``params`` say otherwise; None leaves a key out."""
    said = {**SIZES, "rope_theta": 10000.0, "max_seq_len": 256, **params}
    said = {key: value for key, value in said.items() if value is not None}
    return write(folder, state(dtype, **said), said, safetensors=safetensors)


def stacked(folder: Path, *, files: int = 2, **params: Any) -> Path:
    """Mixtral's first release: tensors dealt to several files, experts below one another, w2's parts transposed."""
    single = state(moe=MOE)
    tensors = {name: tensor for name, tensor in single.items() if ".feed_forward." not in name}
    for i in range(SIZES["n_layers"]):
        at, to = f"layers.{i}.feed_forward", f"layers.{i}.block_sparse_moe"
        tensors[f"{to}.gate.weight"] = single[f"{at}.gate.weight"]
        for w in ("w1", "w2", "w3"):
            parts = [single[f"{at}.experts.{e}.{w}.weight"] for e in range(MOE["num_experts"])]
            tensors[f"{to}.{w}"] = torch.cat([p.T if w == "w2" else p for p in parts]).contiguous()
    folder.mkdir(parents=True)
    names = list(tensors)
    for k in range(files):
        torch.save({name: tensors[name] for name in names[k::files]}, folder / f"consolidated.{k:02d}.pt")
    said = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    said |= {"intermediate_size": 80, "num_local_experts": 4, "rms_norm_eps": 1e-5, "vocab_size": 64, **params}
    (folder / "params.json").write_text(json.dumps(said))
    return folder


def target_of(tensors: State, heads: int = 4, kv_heads: int = 2) -> State:
    """What MistralForCausalLM's or MixtralForCausalLM's file must hold."""
    plain = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    made = {f"{to}.weight": tensors[f"{name}.weight"] for name, to in plain.items()}
    for name, tensor in tensors.items():
        if not name.startswith("layers."):
            continue
        _, i, part = name.removesuffix(".weight").split(".", 2)
        count = {"attention.wq": heads, "attention.wk": kv_heads}.get(part)
        to = LLAMA_NAMES.get(part) or part.replace("feed_forward", "block_sparse_moe")
        made[f"model.layers.{i}.{to}.weight"] = tensor if count is None else halves(tensor, count)
    return made


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """In each head the even rows first, then the odd ones."""
    return torch.cat([rows[odd::2] for rows in weight.chunk(heads) for odd in (0, 1)])

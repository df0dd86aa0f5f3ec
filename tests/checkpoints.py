"""Writes tiny raw checkpoints in the layouts of nanoGPT, llama2.c and Meta Llama: keys, order, types, wrappers.

``*_state`` gives the whole state dict; the rest saves it as the family's own training or release code does. What the
target must hold is computed here too, by formulas of this file's own (``gpt2_of``, ``llama_of``).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


class _Random:
    """Seeded values; each call gives others."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._rng = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._rng).to(self._dtype)


def nanogpt_state(
    *,
    layers: int = 2,
    hidden: int = 16,
    vocab: int = 24,
    context: int = 12,
    bias: bool = True,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> State:
    """nanoGPT's state dict; a tied head is the same memory as the embedding."""
    z = _Random(seed, dtype)
    state: State = {"transformer.wte.weight": z(vocab, hidden), "transformer.wpe.weight": z(context, hidden)}
    parts = {
        "ln_1": (hidden,),
        "attn.c_attn": (3 * hidden, hidden),
        "attn.c_proj": (hidden, hidden),
        "ln_2": (hidden,),
        "mlp.c_fc": (4 * hidden, hidden),
        "mlp.c_proj": (hidden, 4 * hidden),
    }
    for i in range(layers):
        for part, shape in parts.items():
            state[f"transformer.h.{i}.{part}.weight"] = z(*shape)
            if bias:
                state[f"transformer.h.{i}.{part}.bias"] = z(shape[0])
    state["transformer.ln_f.weight"] = z(hidden)
    if bias:
        state["transformer.ln_f.bias"] = z(hidden)
    state["lm_head.weight"] = state["transformer.wte.weight"] if tied else z(vocab, hidden)
    return state


def nanogpt_args(state: Mapping[str, Tensor], heads: int = 2) -> dict[str, Any]:
    """model_args as nanoGPT's train.py fills them."""
    vocab, hidden = state["transformer.wte.weight"].shape
    return {
        "n_layer": sum(name.endswith("ln_1.weight") for name in state),
        "n_head": heads,
        "n_embd": hidden,
        "block_size": state["transformer.wpe.weight"].shape[0],
        "bias": "transformer.ln_f.bias" in state,
        "vocab_size": vocab,
        "dropout": 0.0,
    }


def trained(path: Path, state: Mapping[str, Tensor], args: Mapping[str, Any], prefix: str = "") -> Path:
    """A file as nanoGPT's and llama2.c's train.py save it; ``prefix`` is what torch.compile puts before names."""
    first = next(iter(state.values()))
    moments = {"step": torch.tensor(10.0), "exp_avg": torch.zeros_like(first), "exp_avg_sq": torch.ones_like(first)}
    document = {
        "model": OrderedDict((prefix + name, tensor) for name, tensor in state.items()),
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95), "params": [0]}]},
        "model_args": dict(args),
        "iter_num": 10,
        "best_val_loss": torch.tensor(3.25),
        "config": {"out_dir": "out", "dtype": "float32", "compile": bool(prefix), "learning_rate": 6e-4},
    }
    torch.save(document, path)
    return path


def nanogpt(path: Path, state: State | None = None, *, heads: int = 2, **sizes: Any) -> Path:
    """A whole nanoGPT checkpoint at ``path``."""
    state = nanogpt_state(**sizes) if state is None else state
    return trained(path, state, nanogpt_args(state, heads))


def llama_state(
    *,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 48,
    vocab: int = 40,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> State:
    """The state dict that llama2.c and Meta share; a tied head is the same memory as the embedding."""
    z = _Random(seed, dtype)
    kv = kv_heads * (hidden // heads)
    state: State = {"tok_embeddings.weight": z(vocab, hidden)}
    for i in range(layers):
        for part, shape in {
            "attention.wq": (hidden, hidden),
            "attention.wk": (kv, hidden),
            "attention.wv": (kv, hidden),
            "attention.wo": (hidden, hidden),
            "feed_forward.w1": (ffn, hidden),
            "feed_forward.w2": (hidden, ffn),
            "feed_forward.w3": (ffn, hidden),
            "attention_norm": (hidden,),
            "ffn_norm": (hidden,),
        }.items():
            state[f"layers.{i}.{part}.weight"] = z(*shape)
    state["norm.weight"] = z(hidden)
    state["output.weight"] = state["tok_embeddings.weight"] if tied else z(vocab, hidden)
    return state


def llama2c_args(state: Mapping[str, Tensor], heads: int = 4, kv_heads: int | None = 2) -> dict[str, Any]:
    """model_args as llama2.c's train.py fills them."""
    vocab, hidden = state["tok_embeddings.weight"].shape
    return {
        "dim": hidden,
        "n_layers": sum(name.endswith("attention_norm.weight") for name in state),
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "vocab_size": vocab,
        "multiple_of": 16,
        "max_seq_len": 64,
        "dropout": 0.0,
    }


def llama2c(path: Path, state: State | None = None, **args: Any) -> Path:
    """A whole llama2.c checkpoint at ``path``."""
    state = llama_state(tied=True) if state is None else state
    return trained(path, state, llama2c_args(state, **args))


def cut(name: str, tensor: Tensor, ranks: int, *, by_columns: bool) -> list[Tensor]:
    """The parts of one tensor that Meta's model-parallel ranks hold, cloned: files hold no views."""
    if "norm" in name:
        parts = [tensor] * ranks
    elif name.endswith(("wo.weight", "w2.weight")) or (by_columns and name.startswith("tok_embeddings")):
        parts = list(tensor.chunk(ranks, dim=1))
    else:
        parts = list(tensor.chunk(ranks, dim=0))
    return [part.clone() for part in parts]


def meta(
    folder: Path,
    state: State,
    params: Mapping[str, Any],
    *,
    ranks: int = 1,
    by_columns: bool = True,
    freqs: int = 0,
) -> Path:
    """A Meta release: consolidated.NN.pth and params.json; ``freqs`` > 0 adds that many rotary frequencies."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: cut(name, tensor, ranks, by_columns=by_columns) for name, tensor in state.items()}
    for rank in range(ranks):
        held = {name: tensors[rank] for name, tensors in parts.items()}
        if freqs:
            held["rope.freqs"] = (10000.0 ** -torch.linspace(0, 1, freqs)).to(next(iter(held.values())).dtype)
        torch.save(held, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(dict(params)), encoding="utf-8")
    return folder


def params(state: Mapping[str, Tensor], *, heads: int = 4, kv_heads: int | None = 2, **more: Any) -> dict[str, Any]:
    """params.json as Meta writes it; Llama 2's vocab_size is -1."""
    args = llama2c_args(state, heads, kv_heads)
    held = {key: args[key] for key in ("dim", "n_layers", "n_heads")}
    grouped = {} if kv_heads is None else {"n_kv_heads": kv_heads}
    return {**held, "vocab_size": -1, "multiple_of": 16, "norm_eps": 1e-5, **grouped, **more}


def gpt2_of(state: Mapping[str, Tensor]) -> State:
    """What GPT2LMHeadModel's file must hold: matrices of blocks transposed, biases always, a head only if its own."""
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    made = {name: tensor.T if name.endswith(turned) else tensor for name, tensor in state.items()}
    if torch.equal(made["lm_head.weight"], made["transformer.wte.weight"]):
        del made["lm_head.weight"]
    for name, tensor in list(made.items()):
        if name.endswith(".weight") and (".h." in name or "ln_f" in name):
            made.setdefault(name.replace(".weight", ".bias"), torch.zeros(tensor.shape[-1], dtype=tensor.dtype))
    return made


LLAMA_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def llama_of(state: Mapping[str, Tensor], heads: int, kv_heads: int) -> State:
    """What LlamaForCausalLM's file must hold: in each head of q and k, even rows first, then odd ones."""
    made = {
        "model.embed_tokens.weight": state["tok_embeddings.weight"],
        "model.norm.weight": state["norm.weight"],
    }
    if not torch.equal(state["output.weight"], state["tok_embeddings.weight"]):
        made["lm_head.weight"] = state["output.weight"]
    for name, tensor in state.items():
        if name.startswith("layers."):
            _, i, part = name.removesuffix(".weight").split(".", 2)
            count = {"attention.wq": heads, "attention.wk": kv_heads}.get(part)
            made[f"model.layers.{i}.{LLAMA_NAMES[part]}.weight"] = tensor if count is None else _halves(tensor, count)
    return made


def _halves(weight: Tensor, heads: int) -> Tensor:
    size = weight.shape[0] // heads
    return weight[[h * size + 2 * j + odd for h in range(heads) for odd in (0, 1) for j in range(size // 2)]]


def saved(layout: Path) -> State:
    """Every tensor of a layout's safetensors files, read by safetensors' own code."""
    from safetensors.torch import load_file

    tensors: State = {}
    for file in sorted(layout.glob("*.safetensors")):
        found = load_file(file)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def same(made: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Assert equal names, types, shapes and bits."""
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        got = made[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        assert bits(got) == bits(tensor), name


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor in C order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

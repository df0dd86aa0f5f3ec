"""Tiny minGPT (both layouts), build-nanogpt and LLMs-from-scratch checkpoints, and what they compute.

Sizes that vLLM can run (heads of 32 channels) and weights that hide nothing: matrices of unit gain, norms and biases
far from the values they start training with. :func:`forward` is a second implementation of what all of them compute,
from plain matrices, head by head, in float64; it shares no code with mdl's eager modules.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
LAYERS, HEADS, HIDDEN, VOCAB, CONTEXT = 2, 2, 64, 96, 48


class Draw:
    """Seeded weights by the role of the tensor; each call gives others."""

    def __init__(self, seed: int) -> None:
        self._rng = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._rng)

    def linear(self, name: str, out: int, width: int, *, bias: bool = True) -> State:
        """A matrix [out, width] of unit gain, and its bias."""
        made = {f"{name}.weight": self(out, width) / width**0.5}
        return made | {f"{name}.bias": 0.3 * self(out)} if bias else made

    def norm(self, name: str, gain: str = "weight", shift: str = "bias") -> State:
        """Gain and shift of a norm over HIDDEN channels."""
        return {f"{name}.{gain}": 1 + 0.3 * self(HIDDEN), f"{name}.{shift}": 0.3 * self(HIDDEN)}


def tril() -> Tensor:
    """The mask buffer of minGPT, [1, 1, T, T]."""
    return torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT)


def mingpt(seed: int = 3, *, tied: bool = False, masks: bool = True) -> State:
    """minGPT's state dict at 37baab7, in its order; without masks and tied, build-nanogpt's."""
    draw = Draw(seed)
    state = {"transformer.wte.weight": draw(VOCAB, HIDDEN) / 8, "transformer.wpe.weight": draw(CONTEXT, HIDDEN)}
    for i in range(LAYERS):
        h = f"transformer.h.{i}."
        state |= draw.norm(h + "ln_1")
        state |= {h + "attn.bias": tril()} if masks else {}
        state |= draw.linear(h + "attn.c_attn", 3 * HIDDEN, HIDDEN) | draw.linear(h + "attn.c_proj", HIDDEN, HIDDEN)
        state |= draw.norm(h + "ln_2")
        state |= draw.linear(h + "mlp.c_fc", 4 * HIDDEN, HIDDEN) | draw.linear(h + "mlp.c_proj", HIDDEN, 4 * HIDDEN)
    state |= draw.norm("transformer.ln_f")
    head = state["transformer.wte.weight"] if tied else draw(VOCAB, HIDDEN) / 8
    return state | {"lm_head.weight": head}


def mingpt_old(seed: int = 4) -> State:
    """minGPT's state dict at 3ed14b2, in its order."""
    draw = Draw(seed)
    state = {"pos_emb": draw(1, CONTEXT, HIDDEN), "tok_emb.weight": draw(VOCAB, HIDDEN) / 8}
    for i in range(LAYERS):
        b = f"blocks.{i}."
        state |= draw.norm(b + "ln1") | draw.norm(b + "ln2") | {b + "attn.mask": tril()}
        for part in ("key", "query", "value", "proj"):
            state |= draw.linear(f"{b}attn.{part}", HIDDEN, HIDDEN)
        state |= draw.linear(b + "mlp.0", 4 * HIDDEN, HIDDEN) | draw.linear(b + "mlp.2", HIDDEN, 4 * HIDDEN)
    return state | draw.norm("ln_f") | draw.linear("head", VOCAB, HIDDEN, bias=False)


def llms_from_scratch(seed: int = 5, *, qkv_bias: bool = False) -> State:
    """GPTModel's state dict in the order of the package llms-from-scratch 1.0.19."""
    draw = Draw(seed)
    state = {"tok_emb.weight": draw(VOCAB, HIDDEN) / 8, "pos_emb.weight": draw(CONTEXT, HIDDEN)}
    for i in range(LAYERS):
        b = f"trf_blocks.{i}."
        state |= {b + "att.mask": torch.triu(torch.ones(CONTEXT, CONTEXT), diagonal=1)}
        for part in ("W_query", "W_key", "W_value"):
            state |= draw.linear(f"{b}att.{part}", HIDDEN, HIDDEN, bias=qkv_bias)
        state |= draw.linear(b + "att.out_proj", HIDDEN, HIDDEN)
        state |= draw.linear(b + "ff.layers.0", 4 * HIDDEN, HIDDEN) | draw.linear(b + "ff.layers.2", HIDDEN, 4 * HIDDEN)
        state |= draw.norm(b + "norm1", "scale", "shift") | draw.norm(b + "norm2", "scale", "shift")
    return state | draw.norm("final_norm", "scale", "shift") | draw.linear("out_head", VOCAB, HIDDEN, bias=False)


def lecture(seed: int = 6, *, head_bias: bool = False) -> State:
    """The state dict of ng-video-lecture's gpt.py at 5220142, in its order; its own head has a bias."""
    draw = Draw(seed)
    state = {
        "token_embedding_table.weight": draw(VOCAB, HIDDEN) / 8,
        "position_embedding_table.weight": draw(CONTEXT, HIDDEN),
    }
    for i in range(LAYERS):
        b = f"blocks.{i}."
        for h in range(HEADS):
            state |= {f"{b}sa.heads.{h}.tril": torch.tril(torch.ones(CONTEXT, CONTEXT))}
            for part in ("key", "query", "value"):
                state |= draw.linear(f"{b}sa.heads.{h}.{part}", HIDDEN // HEADS, HIDDEN, bias=False)
        state |= draw.linear(b + "sa.proj", HIDDEN, HIDDEN)
        state |= draw.linear(b + "ffwd.net.0", 4 * HIDDEN, HIDDEN) | draw.linear(b + "ffwd.net.2", HIDDEN, 4 * HIDDEN)
        state |= draw.norm(b + "ln1") | draw.norm(b + "ln2")
    return state | draw.norm("ln_f") | draw.linear("lm_head", VOCAB, HIDDEN, bias=head_bias)


@dataclasses.dataclass
class GPTConfig:
    """The object that build-nanogpt pickles beside its weights."""

    block_size: int = CONTEXT
    vocab_size: int = VOCAB
    n_layer: int = LAYERS
    n_head: int = HEADS
    n_embd: int = HIDDEN


def build_nanogpt(path: Path, state: State | None = None) -> Path:
    """A file as build-nanogpt's train_gpt2.py saves it."""
    state = mingpt(tied=True, masks=False) if state is None else state
    torch.save({"model": state, "config": GPTConfig(), "step": 10, "val_loss": 3.25}, path)
    return path


def saved(path: Path, state: Any) -> Path:
    """``torch.save(state, path)``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


IDS = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(0))


def forward(state: State, *, heads: int = HEADS, act: str = "tanh") -> Tensor:
    """Logits [T, V] for :data:`IDS`, in float64: ``state`` is GPT-2's, with matrices as [in, out]."""
    w = {name: tensor.double() for name, tensor in state.items()}
    x = w["transformer.wte.weight"][IDS] + w["transformer.wpe.weight"][: len(IDS)]
    for i in range(LAYERS):
        h = f"transformer.h.{i}."
        qkv = _linear(w, h + "attn.c_attn", _norm(w, h + "ln_1", x))
        mixed = [_head(*(qkv[:, j * HIDDEN + n : j * HIDDEN + n + HIDDEN // heads] for j in range(3)))
                 for n in range(0, HIDDEN, HIDDEN // heads)]  # fmt: skip
        x = x + _linear(w, h + "attn.c_proj", torch.cat(mixed, dim=1))
        up = _linear(w, h + "mlp.c_fc", _norm(w, h + "ln_2", x))
        x = x + _linear(w, h + "mlp.c_proj", _activation(up, act))
    return _norm(w, "transformer.ln_f", x) @ w.get("lm_head.weight", w["transformer.wte.weight"]).T


def _linear(w: State, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def _norm(w: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = []
    for t in range(len(q)):
        weights = (k[: t + 1] @ q[t] / math.sqrt(q.shape[1])).exp()
        rows.append(weights @ v[: t + 1] / weights.sum())
    return torch.stack(rows)


def _activation(x: Tensor, act: str) -> Tensor:
    if act == "relu":
        return x * (x > 0)
    if act == "exact":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


OLD_NAMES = {
    "ln1": "ln_1", "attn.proj": "attn.c_proj", "ln2": "ln_2", "mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj",
    "tok_emb": "transformer.wte", "ln_f": "transformer.ln_f", "head": "lm_head",
}  # fmt: skip
BOOK_NAMES = {
    "norm1": "ln_1", "att.out_proj": "attn.c_proj", "norm2": "ln_2",
    "ff.layers.0": "mlp.c_fc", "ff.layers.2": "mlp.c_proj", "tok_emb": "transformer.wte",
    "pos_emb": "transformer.wpe", "final_norm": "transformer.ln_f", "out_head": "lm_head",
}  # fmt: skip

LECTURE_NAMES = {
    "ln1": "ln_1", "sa.proj": "attn.c_proj", "ln2": "ln_2", "ffwd.net.0": "mlp.c_fc", "ffwd.net.2": "mlp.c_proj",
    "token_embedding_table": "transformer.wte", "position_embedding_table": "transformer.wpe",
    "ln_f": "transformer.ln_f", "lm_head": "lm_head",
}  # fmt: skip


def gpt2_of_mingpt(state: State) -> State:
    """What GPT2LMHeadModel's file holds for minGPT and build-nanogpt."""
    made = {name: _turned(name, tensor) for name, tensor in state.items() if not name.endswith(".attn.bias")}
    if made["lm_head.weight"] is made["transformer.wte.weight"]:
        del made["lm_head.weight"]
    return made


def gpt2_of_old(state: State) -> State:
    """What GPT2LMHeadModel's file holds for early minGPT: q, k and v side by side."""
    made = _renamed(state, "blocks.", OLD_NAMES, ("query", "key", "value"), "attn.")
    return made | {"transformer.wpe.weight": state["pos_emb"][0]}


def gpt2_of_book(state: State) -> State:
    """The same for the book's GPTModel; q, k and v without biases get zeros."""
    plain = {name.replace(".scale", ".weight").replace(".shift", ".bias"): t for name, t in state.items()}
    made = _renamed(plain, "trf_blocks.", BOOK_NAMES, ("W_query", "W_key", "W_value"), "att.")
    zeros = {f"transformer.h.{i}.attn.c_attn.bias": torch.zeros(3 * HIDDEN) for i in range(LAYERS)}
    return zeros | made


def gpt2_of_lecture(state: State) -> State:
    """The same for the lecture's gpt.py: heads one after another, queries first; biases of zeros."""
    plain = {name: tensor for name, tensor in state.items() if ".heads." not in name}
    made = _renamed(plain, "blocks.", LECTURE_NAMES, (), "")
    for i in range(LAYERS):
        heads = [state[f"blocks.{i}.sa.heads.{h}.{part}.weight"] for part in ("query", "key", "value")
                 for h in range(HEADS)]  # fmt: skip
        made[f"transformer.h.{i}.attn.c_attn.weight"] = torch.cat(heads).T
        made[f"transformer.h.{i}.attn.c_attn.bias"] = torch.zeros(3 * HIDDEN)
    return made


def _renamed(state: State, block: str, names: dict[str, str], qkv: tuple[str, ...], attention: str) -> State:
    made: State = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        inner = module.split(".", 2)[2] if name.startswith(block) else module
        if inner in names:
            h = f"transformer.h.{module.split('.')[1]}." if name.startswith(block) else ""
            made[f"{h}{names[inner]}.{kind}"] = _turned(f"{h}{names[inner]}.{kind}", tensor)
    for i in range(LAYERS):
        for kind, axis in (("weight", 1), ("bias", 0)):
            parts = [state[name].t() for part in qkv if (name := f"{block}{i}.{attention}{part}.{kind}") in state]
            if parts:
                made[f"transformer.h.{i}.attn.c_attn.{kind}"] = torch.cat(parts, dim=axis)
    return made


def _turned(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor

"""Checkpoints of decoders that nobody else has, and a person who answers what a draft leaves open."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


class Weights:
    """Random weights of unit gain; norms around 1."""

    def __init__(self, seed: int = 3) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, around: float | None = None) -> Tensor:
        value = torch.randn(*shape, generator=self.generator)
        if around is not None:
            return around + 0.3 * value
        return value / shape[-1] ** 0.5 if len(shape) > 1 else 0.3 * value


def lantern(layers: int = 2, width: int = 64, vocab: int = 96, context: int = 128) -> State:
    """Like GPT-2: q, k and v in one matrix with biases, learned positions, LayerNorm, an MLP without a gate."""
    w = Weights()
    state: State = {"tok_emb.weight": w(vocab, width) * 8, "pos_emb.weight": w(context, width)}
    for i in range(layers):
        at = f"layers.{i}"
        for norm in ("ln1", "ln2"):
            state |= {f"{at}.{norm}.weight": w(width, around=1.0), f"{at}.{norm}.bias": w(width)}
        shapes = {"attn.qkv": (3 * width, width), "attn.out": (width, width)}
        shapes |= {"ffn.fc1": (4 * width, width), "ffn.fc2": (width, 4 * width)}
        for name, shape in shapes.items():
            state |= {f"{at}.{name}.weight": w(*shape), f"{at}.{name}.bias": w(shape[0])}
        state[f"{at}.attn.mask"] = torch.tril(torch.ones(context, context)).view(1, 1, context, context)
    return state | {
        "final_norm.weight": w(width, around=1.0),
        "final_norm.bias": w(width),
        "head.weight": w(vocab, width),
    }


def heddle(layers: int = 2, width: int = 128, vocab: int = 96, ffn: int = 160, keys: int = 64) -> State:
    """Like Llama, under names of its own."""
    w = Weights()
    state: State = {"tokens.weight": w(vocab, width) * 8}
    for i in range(layers):
        at = f"stack.{i}"
        state |= {f"{at}.n1.g": w(width, around=1.0), f"{at}.n2.g": w(width, around=1.0)}
        state |= {f"{at}.att.query.weight": w(width, width), f"{at}.att.key.weight": w(keys, width)}
        state |= {f"{at}.att.value.weight": w(keys, width), f"{at}.att.project.weight": w(width, width)}
        state |= {f"{at}.ff.w_gate.weight": w(ffn, width), f"{at}.ff.w_up.weight": w(ffn, width)}
        state[f"{at}.ff.w_down.weight"] = w(width, ffn)
    return state | {"fnorm.g": w(width, around=1.0), "readout.weight": w(vocab, width)}


def quarry(layers: int = 3, width: int = 128, vocab: int = 96, experts: int = 4, inner: int = 64) -> State:
    """A mixture with a shared expert and a dense first layer."""
    w = Weights()
    state: State = {"embed.weight": w(vocab, width) * 8}
    for i in range(layers):
        at = f"blocks.{i}"
        state |= {f"{at}.norm1.scale": w(width, around=1.0), f"{at}.norm2.scale": w(width, around=1.0)}
        state |= {f"{at}.attn.wq.weight": w(width, width), f"{at}.attn.wk.weight": w(64, width)}
        state |= {f"{at}.attn.wv.weight": w(64, width), f"{at}.attn.wo.weight": w(width, width)}
        if i == 0:
            inners = {f"{at}.mlp": 160}
        else:
            state[f"{at}.moe.router.weight"] = w(experts, width)
            inners = {f"{at}.moe.experts.{e}": inner for e in range(experts)} | {f"{at}.moe.shared": 96}
        for name, size in inners.items():
            state |= {f"{name}.gate.weight": w(size, width), f"{name}.up.weight": w(size, width)}
            state[f"{name}.down.weight"] = w(width, size)
    return state | {"norm.scale": w(width, around=1.0), "lm_head.weight": w(vocab, width)}


QUARRY = '''
"""The model of quarry(), as its author wrote it."""

import torch
import torch.nn.functional as F


def normed(x, gain):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain


def turned(x):
    T, d = x.shape[-2:]
    angles = torch.arange(T, dtype=x.dtype)[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Quarry(torch.nn.Module):
    def __init__(self, state):
        super().__init__()
        self.w = torch.nn.ParameterDict({k.replace(".", "/"): v for k, v in state.items()})
        self.layers = sum(k.endswith("norm1.scale") for k in state)

    def p(self, name):
        return self.w[name.replace(".", "/")]

    def mlp(self, x, at):
        up = F.silu(x @ self.p(at + ".gate.weight").T) * (x @ self.p(at + ".up.weight").T)
        return up @ self.p(at + ".down.weight").T

    def mixture(self, x, at):
        scores = torch.sigmoid(x @ self.p(at + ".router.weight").T)
        best, which = scores.topk(2, -1)
        best = best / best.sum(-1, keepdim=True)
        outs = torch.stack([self.mlp(x, f"{at}.experts.{e}") for e in range(scores.shape[-1])], -2)
        chosen = outs.gather(-2, which[..., None].expand(*which.shape, x.shape[-1]))
        return (best[..., None] * chosen).sum(-2) + self.mlp(x, at + ".shared")

    def forward(self, ids):
        B, T = ids.shape
        x = self.p("embed.weight")[ids]
        for i in range(self.layers):
            at = f"blocks.{i}"
            y = normed(x, self.p(at + ".norm1.scale"))
            q, k, v = (y @ self.p(f"{at}.attn.w{n}.weight").T for n in "qkv")
            q, k, v = (t.view(B, T, -1, 32).transpose(1, 2) for t in (q, k, v))
            q, k = turned(q), turned(k)
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
            x = x + y @ self.p(at + ".attn.wo.weight").T
            y = normed(x, self.p(at + ".norm2.scale"))
            x = x + (self.mlp(y, at + ".mlp") if i == 0 else self.mixture(y, at + ".moe"))
        return normed(x, self.p("norm.scale")) @ self.p("lm_head.weight").T


def build(checkpoint):
    return Quarry(torch.load(checkpoint, weights_only=True)["weights"])
'''

ANSWERS = {
    "norm_eps": "1e-6",
    "activation": '"silu"',
    "norm_kind": '"rms"',
    "norm_place": '"pre"',
    "positions": '"rope"',
    "rope_theta": "10000.0",
    "rotary_style": '"half"',
    "rotary_pairs": "False",
    "parallel": "False",
    "scoring": '"sigmoid"',
    "normalised": "True",
    "routed_scaling": "1.0",
    "heads": "2",
    "qkv_by_head": "False",
    "context": "128",
}
"""What the authors of these models would say."""


def saved(path: Path, state: State, **beside: Any) -> Path:
    """A file as a training script writes it."""
    torch.save({"weights": state, "hp": beside}, path)
    return path


def answer(package: Path, answers: Mapping[str, str], *, rules: Mapping[str, str] | None = None) -> None:
    """Work off a draft as a person would: a default in place of every question, the TODOs taken away, and a line of the
    mapping for a tensor that the draft did not know (its name → the lines that take the TODO's place)."""
    arch = package / package.name / "arch.py"
    lines = arch.read_text().splitlines()
    for k, line in enumerate(lines):
        found = re.search(r'm\.set\("(\w+)"(, kind=\w+)?.*# TODO', line)
        if found:
            begin = line.partition("m.set")[0]
            lines[k] = f'{begin}m.set("{found[1]}"{found[2] or ""}, default=({answers[found[1]]}, "model.py"))'
        elif line.startswith("# TODO:"):
            lines[k] = ""
        elif "# TODO:" in line:
            lines[k] = line.partition("  # TODO:")[0]
    arch.write_text("\n".join(lines) + "\n")
    mapping = package / package.name / f"{package.name}.yaml"
    text = mapping.read_text()
    for name, rule in (rules or {}).items():
        text, count = re.subn(rf"# TODO: {re.escape(name)} .*", rule, text)
        assert count == 1, name
    mapping.write_text(text)

"""A researcher's own mixture: the first block is dense; in the others each token goes to two experts of six, which are
chosen by a sigmoid and a bias that counts for the choice alone, and all go to a shared one.

``build`` is what `mdl verify --reference model.py:build` calls: a checkpoint in, the model with its weights out.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain


def rotate(x, base):
    """Turn channels j and j + size/2 of every head of x [B, heads, T, size] by t * base^(-2j/size)."""
    steps, size = x.shape[-2:]
    speeds = base ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    angles = torch.arange(steps, dtype=x.dtype)[:, None] * speeds
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


class Attention(nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.hp, keys = hp, hp["kv_heads"] * hp["head_dim"]
        self.wq = nn.Linear(hp["width"], hp["n_heads"] * hp["head_dim"], bias=False)
        self.wk, self.wv = nn.Linear(hp["width"], keys, bias=False), nn.Linear(hp["width"], keys, bias=False)
        self.wo = nn.Linear(hp["n_heads"] * hp["head_dim"], hp["width"], bias=False)

    def forward(self, x):
        q, k, v = (w(x).unflatten(-1, (-1, self.hp["head_dim"])).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, self.hp["theta"]), rotate(k, self.hp["theta"])
        k, v = (t.repeat_interleave(self.hp["n_heads"] // self.hp["kv_heads"], 1) for t in (k, v))
        return self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Mixture(nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.chosen = hp["top_k"]
        self.router = nn.Linear(hp["width"], hp["n_experts"], bias=False)
        self.balance = nn.Parameter(
            torch.zeros(hp["n_experts"]), requires_grad=False
        )  # moved by the load, not by a loss
        self.experts = nn.ModuleList(Mlp(hp["width"], hp["expert_inner"]) for _ in range(hp["n_experts"]))
        self.shared = Mlp(hp["width"], hp["shared_inner"])

    def forward(self, x):
        scores = torch.sigmoid(self.router(x))
        which = (scores + self.balance).topk(self.chosen, -1).indices
        shares = scores.gather(-1, which)
        shares = 2.5 * shares / shares.sum(-1, keepdim=True)
        every = torch.stack([expert(x) for expert in self.experts], -2)
        taken = every.gather(-2, which[..., None].expand(*which.shape, x.shape[-1]))
        return (shares[..., None] * taken).sum(-2) + self.shared(x)


class Block(nn.Module):
    def __init__(self, hp, dense):
        super().__init__()
        self.norm1, self.attn, self.norm2 = Norm(hp["width"]), Attention(hp), Norm(hp["width"])
        self.kind = "mlp" if dense else "moe"
        self.add_module(self.kind, Mlp(hp["width"], hp["inner"]) if dense else Mixture(hp))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.get_submodule(self.kind)(self.norm2(x))


class Flock(nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.tokens = nn.Embedding(hp["vocab"], hp["width"])
        self.blocks = nn.ModuleList(Block(hp, dense=i == 0) for i in range(hp["depth"]))
        self.norm = Norm(hp["width"])
        self.head = nn.Linear(hp["width"], hp["vocab"], bias=False)

    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(checkpoint: Path):
    saved = torch.load(checkpoint)
    model = Flock(saved["hp"])
    model.load_state_dict(saved["weights"])
    return model

"""A researcher's own decoder: q, k and v in one matrix, gate and up in another, rotary on neighbouring pairs.

``build`` is what `mdl verify --reference model.py:build` calls: a checkpoint in, the model with its weights out.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.gain


def rotate(x, theta):
    """Turn channels 2j and 2j+1 of every head of x [B, T, heads, size] by t * theta^(-2j/size)."""
    steps, size = x.shape[1], x.shape[3]
    speeds = theta ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    angles = (torch.arange(steps, dtype=x.dtype)[:, None] * speeds)[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1).flatten(-2)


class Mixer(nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.hp, self.shares = hp, [hp["heads"] * hp["size"], hp["groups"] * hp["size"], hp["groups"] * hp["size"]]
        self.wqkv = nn.Linear(hp["width"], sum(self.shares), bias=False)
        self.out = nn.Linear(self.shares[0], hp["width"], bias=False)

    def forward(self, x):
        batch, steps, _ = x.shape
        q, k, v = (t.view(batch, steps, -1, self.hp["size"]) for t in self.wqkv(x).split(self.shares, -1))
        q, k = rotate(q, self.hp["theta"]), rotate(k, self.hp["theta"])
        k, v = (t.repeat_interleave(self.hp["heads"] // self.hp["groups"], 2) for t in (k, v))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.gate_up = nn.Linear(hp["width"], 2 * hp["inner"], bias=False)
        self.down = nn.Linear(hp["inner"], hp["width"], bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.norm1, self.mixer = Norm(hp["width"], hp["eps"]), Mixer(hp)
        self.norm2, self.ff = Norm(hp["width"], hp["eps"]), FeedForward(hp)

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.ff(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.embed = nn.Embedding(hp["vocab"], hp["width"])
        self.blocks = nn.ModuleList(Block(hp) for _ in range(hp["depth"]))
        self.norm = Norm(hp["width"], hp["eps"])
        self.head = nn.Linear(hp["width"], hp["vocab"], bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(checkpoint: Path):
    saved = torch.load(checkpoint)
    model = Decoder(saved["hp"])
    model.load_state_dict(saved["weights"])
    return model

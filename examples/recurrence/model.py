"""A researcher's own decoder without positions: two blocks of three carry a leaky average along, the third looks back.

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


class Drift(nn.Module):
    """level += leak * (value - level), channel by channel: a leak near 1 forgets at once, one near 0 never."""

    def __init__(self, hp):
        super().__init__()
        channels, self.taps = hp["channels"], nn.Parameter(torch.zeros(hp["channels"], hp["taps"]))
        self.into = nn.Linear(hp["width"], 3 * channels, bias=False)  # values, leaks, and the gates on the way out
        self.tilt = nn.Parameter(torch.zeros(channels))
        self.norm = Norm(channels, hp["eps"])
        self.out = nn.Linear(channels, hp["width"], bias=False)

    def forward(self, x):
        value, leak, gate = self.into(x).chunk(3, -1)
        before = F.pad(value, (0, 0, self.taps.shape[1] - 1, 0))
        value = sum(before[:, k : k + x.shape[1]] * self.taps[:, k] for k in range(self.taps.shape[1]))
        leak = torch.sigmoid(leak + self.tilt)
        level, levels = torch.zeros_like(value[:, 0]), []
        for t in range(x.shape[1]):
            level = level + leak[:, t] * (value[:, t] - level)
            levels.append(level)
        return self.out(self.norm(torch.stack(levels, 1)) * F.silu(gate))


class Glance(nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.heads = hp["heads"]
        self.wqkv = nn.Linear(hp["width"], 3 * hp["width"], bias=False)
        self.out = nn.Linear(hp["width"], hp["width"], bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.wqkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.up = nn.Linear(hp["width"], hp["inner"], bias=False)
        self.down = nn.Linear(hp["inner"], hp["width"], bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, hp, looks):
        super().__init__()
        self.norm1, self.norm2 = Norm(hp["width"], hp["eps"]), Norm(hp["width"], hp["eps"])
        self.kind, self.ff = "glance" if looks else "drift", FeedForward(hp)
        self.add_module(self.kind, Glance(hp) if looks else Drift(hp))

    def forward(self, x):
        x = x + self.get_submodule(self.kind)(self.norm1(x))
        return x + self.ff(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self, hp):
        super().__init__()
        self.embed = nn.Embedding(hp["vocab"], hp["width"])
        self.blocks = nn.ModuleList(Block(hp, looks=(i + 1) % hp["every"] == 0) for i in range(hp["depth"]))
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

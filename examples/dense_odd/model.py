"""A researcher's own decoder, like no other: LayerNorms before and behind each half, half of each head rotated in
neighbouring pairs and normed after that, a valve on each head's output, a squared ReLU, logits that can't exceed 30.

``build`` is what `mdl verify --reference model.py:build` calls: a checkpoint in, the model with its weights out.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def rotate(x, part, base):
    """Turn channels 2j and 2j+1 of the first ``part`` of every head of x [B, T, heads, size] by t * base^(-2j/part)."""
    speeds = base ** (-torch.arange(0, part, 2, dtype=x.dtype) / part)
    angles = (torch.arange(x.shape[1], dtype=x.dtype)[:, None] * speeds)[:, None]
    a, b = x[..., 0:part:2], x[..., 1:part:2]
    turned = torch.stack((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1).flatten(-2)
    return torch.cat((turned, x[..., part:]), -1)


class Gain(nn.Module):
    """The norm of one head of queries or keys."""

    def __init__(self, size):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, size = cfg, cfg["head_size"]
        self.shares = [cfg["n_head"] * size, cfg["kv_groups"] * size, cfg["kv_groups"] * size]
        self.qkv = nn.Linear(cfg["width"], sum(self.shares), bias=False)
        self.q_norm, self.k_norm = Gain(size), Gain(size)
        self.valve = nn.Linear(cfg["width"], cfg["n_head"], bias=False)
        self.proj = nn.Linear(self.shares[0], cfg["width"], bias=False)

    def forward(self, x):
        cfg = self.cfg
        q, k, v = (t.unflatten(-1, (-1, cfg["head_size"])) for t in self.qkv(x).split(self.shares, -1))
        q, k = (norm(rotate(t, cfg["rotated"], cfg["base"])) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        k, v = (t.repeat_interleave(cfg["n_head"] // cfg["kv_groups"], 2) for t in (k, v))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)
        return self.proj((y * torch.sigmoid(self.valve(x))[..., None]).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.up = nn.Linear(cfg["width"], cfg["inner"])
        self.down = nn.Linear(cfg["inner"], cfg["width"])

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.behind1 = nn.LayerNorm(cfg["width"]), nn.LayerNorm(cfg["width"])
        self.norm2, self.behind2 = nn.LayerNorm(cfg["width"]), nn.LayerNorm(cfg["width"])
        self.attn, self.ff = Attention(cfg), FeedForward(cfg)

    def forward(self, x):
        x = x + self.behind1(self.attn(self.norm1(x)))
        return x + self.behind2(self.ff(self.norm2(x)))


class Kiln(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embed = nn.Embedding(cfg["vocab"], cfg["width"])
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg["depth"]))
        self.norm = nn.LayerNorm(cfg["width"])
        self.head = nn.Linear(cfg["width"], cfg["vocab"], bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return 30 * torch.tanh(self.head(self.norm(x)) / 30)


def build(checkpoint: Path):
    saved = torch.load(checkpoint)
    model = Kiln(saved["cfg"])
    model.load_state_dict(saved["model"])
    return model

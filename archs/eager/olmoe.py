"""OLMoE's forward pass on the names of allenai/OLMo and megablocks.

RMSNorm before each half of a block, q and k normed as whole vectors, rotary halves, and for each token the experts of
greatest probability, weighed by it as it stands. Sources: allenai/OLMo, olmo/model.py (OLMoEBlock), and megablocks,
layers/router.py and layers/glu.py (SparseGLU).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..base import Value
from .llama_meta import RMSNorm, attend
from .mixture import mixed, of_stacks
from .parts import Embedding, Linear, TiedHead, take
from .rotary import Rotary, rotary_table, rotate_halves

_INTEGERS = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "experts", "experts_per_token")


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device; its forward maps token ids [B, T] to logits [B, T, V].

    Raises MdlError (INPUT) when a dim is missing or of another type.
    """
    sizes = {name: take(dims, name, int) for name in _INTEGERS}
    eps, theta, tied = take(dims, "norm_eps", float), take(dims, "rope_theta", float), take(dims, "tied", bool)
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Model(sizes, eps, theta, tied=tied).eval()


class Model(nn.Module):
    """The whole model lies below ``transformer``, its head too."""

    def __init__(self, sizes: Mapping[str, int], eps: float, theta: float, *, tied: bool) -> None:
        super().__init__()
        self.rotary = Rotary(sizes["head_dim"], theta, None)
        self.transformer = nn.Module()
        self.transformer.wte = Embedding(sizes["vocab"], sizes["hidden"])
        self.transformer.blocks = nn.ModuleList(Block(sizes, eps) for _ in range(sizes["layers"]))
        self.transformer.ln_f = RMSNorm(sizes["hidden"], eps)
        self.transformer.ff_out = TiedHead() if tied else Linear(sizes["hidden"], sizes["vocab"], bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]."""
        parts = self.transformer
        cos, sin = rotary_table(self.rotary, ids.shape[1])
        x = parts.get_submodule("wte")(ids)
        for block in parts.get_submodule("blocks").children():
            x = block(x, cos, sin)
        x, head = parts.get_submodule("ln_f")(x), parts.get_submodule("ff_out")
        return head(x, parts.get_parameter("wte.weight")) if isinstance(head, TiedHead) else head(x)


class Block(nn.Module):
    """Attention and experts, each on the normalised stream, each added to it."""

    def __init__(self, sizes: Mapping[str, int], eps: float) -> None:
        super().__init__()
        hidden, kv = sizes["hidden"], sizes["kv_heads"] * sizes["head_dim"]
        self.head_dim, self.parts = sizes["head_dim"], [hidden, kv, kv]
        self.k_norm = RMSNorm(kv, eps)
        self.q_norm = RMSNorm(hidden, eps)
        self.attn_out = Linear(hidden, hidden, bias=False)
        self.ffn = Mixture(sizes, normalised=False)
        self.attn_norm = RMSNorm(hidden, eps)
        self.ff_norm = RMSNorm(hidden, eps)
        self.att_proj = Linear(hidden, sum(self.parts), bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [B, T, C] and the rotary table [T, D/2] to hidden states."""
        q, k, v = self.att_proj(self.attn_norm(x)).split(self.parts, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (self.q_norm(q), self.k_norm(k), v))
        x = x + self.attn_out(attend(rotate_halves(q, cos, sin), rotate_halves(k, cos, sin), v))
        return x + self.ffn(self.ff_norm(x))


class Mixture(nn.Module):
    """megablocks' dropless mixture: softmax over all experts, then the greatest of them.

    Their weights stay as they are, or, if ``normalised``, are divided by their sum.
    """

    def __init__(self, sizes: Mapping[str, int], *, normalised: bool) -> None:
        super().__init__()
        self.normalised = normalised
        self.count, self.chosen = sizes["experts"], sizes["experts_per_token"]
        self.router, self.experts = nn.Module(), nn.Module()
        self.router.layer = Linear(sizes["hidden"], self.count, bias=False)
        self.experts.mlp = Stack(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        tokens = x.flatten(0, -2)
        scores = self.router.get_submodule("layer")(tokens).softmax(dim=-1)
        weights, experts = scores.topk(self.chosen, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        stack = self.experts.get_submodule("mlp")
        return mixed(tokens, weights, experts, self.count, lambda index, x: stack(x, index)).view_as(x)


class Stack(nn.Module):
    """The experts' matrices below one another, [E·F, C] each: w1 the gate, v1 the value; w2 applies from the right."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.count = sizes["experts"]
        shape = sizes["experts"] * sizes["ffn"], sizes["hidden"]
        self.w1, self.w2, self.v1 = (nn.Parameter(torch.empty(shape)) for _ in range(3))

    def forward(self, x: Tensor, index: int) -> Tensor:
        """What one expert makes of tokens [N, C]: the same shape."""
        return of_stacks(x, index, self.count, self.w1, self.v1, self.w2)

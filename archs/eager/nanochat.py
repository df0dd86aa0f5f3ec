"""nanochat's forward pass on nanochat's own tensor names, for every form of its GPT.

No norm has a weight. The embedding is normed; then, where the checkpoint has the parameters for it, each token is
smeared with the one before it, every layer mixes the stream with its beginning, and some add embeddings of the tokens
to their values. What the middle layer put out is taken back before the last norm.
Source of the formulas: karpathy/nanochat, nanochat/gpt.py and flash_attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base import Value
from .parts import Embedding, Linear, check_heads, length_of, softcap, taken
from .rotary import Rotary, rotary_table, rotate_halves

_KINDS: dict[type, tuple[str, ...]] = {
    int: (
        *("layers", "hidden", "rows", "vocab", "ffn", "context", "heads", "kv_heads", "head_dim"),
        *("gate_channels", "smear_channels", "short_window", "backout_layer"),
    ),
    float: ("rope_theta", "qk_gain", "norm_eps", "softcap", "value_scale"),
    bool: ("lambdas", "value_embeds", "smear"),
    str: ("window_pattern",),
}
_Table = tuple[Tensor, Tensor]


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V], without those of padded rows. Raises MdlError (INPUT) when a
    dim is missing, has the wrong type, or describes a model that nanochat can't be.
    """
    sizes = taken(dims, _KINDS)
    check_heads(sizes)
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return GPT(SimpleNamespace(**sizes)).eval()


def norm(x: Tensor, s: SimpleNamespace) -> Tensor:
    """RMSNorm over the last axis, without a weight."""
    return functional.rms_norm(x, (x.shape[-1],), eps=s.norm_eps)


class GPT(nn.Module):
    """The whole model; ``s`` holds the dims."""

    def __init__(self, s: SimpleNamespace) -> None:
        super().__init__()
        self.s = s
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = Embedding(s.rows, s.hidden)
        self.transformer["h"] = nn.ModuleList(Block(s, i) for i in range(s.layers))
        self.lm_head = Linear(s.hidden, s.rows, bias=False)
        if s.lambdas:
            self.resid_lambdas = nn.Parameter(torch.empty(s.layers))
            self.x0_lambdas = nn.Parameter(torch.empty(s.layers))
        if s.smear:
            self.smear_gate = Linear(s.smear_channels, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.empty(1))
            self.backout_lambda = nn.Parameter(torch.empty(1))
        self.value_embeds = nn.ModuleDict()
        for i in range(s.layers):
            if _has_values(s, i):
                self.value_embeds[str(i)] = Embedding(s.rows, s.kv_heads * s.head_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        s = self.s
        table = rotary_table(Rotary(s.head_dim, s.rope_theta), length_of(ids, s.context))
        x = x0 = self._smeared(norm(self.transformer["wte"](ids), s))
        backout = torch.zeros_like(x)
        for i, block in enumerate(self.transformer["h"].children()):
            if s.lambdas:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            x = block(x, self.value_embeds[str(i)](ids) if _has_values(s, i) else None, table)
            if i == s.backout_layer:
                backout = x
        if s.smear:
            x = x - self.backout_lambda * backout
        return softcap(self.lm_head(norm(x, s))[..., : s.vocab], s.softcap)

    def _smeared(self, x: Tensor) -> Tensor:
        """Each position but the first with a share of the one before it, as its own first channels say."""
        if not self.s.smear:
            return x
        share = self.smear_lambda * torch.sigmoid(self.smear_gate(x[..., : self.s.smear_channels]))
        before = functional.pad(x, (0, 0, 1, 0))[:, :-1]  # nothing is before the first
        return x + share * before


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream, each added to it."""

    def __init__(self, s: SimpleNamespace, layer: int) -> None:
        super().__init__()
        self.s = s
        self.attn = CausalSelfAttention(s, layer)
        self.mlp = MLP(s)

    def forward(self, x: Tensor, values: Tensor | None, table: _Table) -> Tensor:
        """Hidden states [B, T, C] to the same shape; ``values`` are the tokens' value embeddings [B, T, K·D]."""
        x = x + self.attn(norm(x, self.s), values, table)
        return x + self.mlp(norm(x, self.s))


class CausalSelfAttention(nn.Module):
    """Grouped attention on q and k that are rotated, then normed, then made sharper; in short layers with a window."""

    def __init__(self, s: SimpleNamespace, layer: int) -> None:
        super().__init__()
        self.s = s
        self.c_q = Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.c_k = Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.c_v = Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.c_proj = Linear(s.hidden, s.hidden, bias=False)
        self.ve_gate = Linear(s.gate_channels, s.kv_heads, bias=False) if _has_values(s, layer) else None
        letter = s.window_pattern.upper()[layer % len(s.window_pattern)]
        self.short = letter == "S" and layer != s.layers - 1  # the last layer sees all positions whatever its letter

    def forward(self, x: Tensor, values: Tensor | None, table: _Table) -> Tensor:
        """Normed hidden states [B, T, C] to the same shape."""
        s = self.s
        q, k, v = (part(x).unflatten(-1, (-1, s.head_dim)) for part in (self.c_q, self.c_k, self.c_v))
        if self.ve_gate is not None and values is not None:
            gate = s.value_scale * torch.sigmoid(self.ve_gate(x[..., : s.gate_channels]))
            v = v + gate[..., None] * values.unflatten(-1, (-1, s.head_dim))
        q, k = (norm(_turned_back(part, table), s) * s.qk_gain for part in (q, k))
        return self.c_proj(self._attended(q, k, v))

    def _attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, H, D], k and v [B, T, K, D] to [B, T, H·D]."""
        s, time = self.s, torch.arange(q.shape[1], device=q.device)
        q = q.unflatten(2, (s.kv_heads, -1))  # a key head's queries lie side by side
        scores = torch.einsum("btkgd,bukd->bkgtu", q, k) / math.sqrt(s.head_dim)
        back = time[:, None] - time[None, :]
        seen = (back >= 0) & (back <= s.short_window) if self.short else back >= 0
        scores = scores.masked_fill(~seen, -math.inf).to(torch.promote_types(q.dtype, torch.float32))
        mixed = torch.einsum("bkgtu,bukd->btkgd", scores.softmax(-1).to(v.dtype), v)
        return mixed.flatten(2)


class MLP(nn.Module):
    """Up, the square of ReLU, down."""

    def __init__(self, s: SimpleNamespace) -> None:
        super().__init__()
        self.c_fc = Linear(s.hidden, s.ffn, bias=False)
        self.c_proj = Linear(s.ffn, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        return self.c_proj(functional.relu(self.c_fc(x)).square())


def _has_values(s: SimpleNamespace, layer: int) -> bool:
    """Whether a layer has a value embedding: every second one, counted from the last."""
    return s.value_embeds and layer % 2 == (s.layers - 1) % 2


def _turned_back(x: Tensor, table: _Table) -> Tensor:
    """Turn channels (j, j + D/2) of x [B, T, heads, D] by minus the table's angles [T, D/2]."""
    cos, sin = table
    return rotate_halves(x, cos, -sin)

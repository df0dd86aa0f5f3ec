"""The forward pass of a decoder-only language model of metaseq's or fairseq's, on its own tensor names.

Learned positions that begin at row 2, norms before each half of a block or (OPT 350M) behind it, a head that shares the
embedding. Sources of the formulas: facebookresearch/metaseq, models/transformer_decoder.py and
modules/transformer_decoder_layer.py; facebookresearch/fairseq, models/transformer/transformer_decoder.py.

The trainers mask the padding id 1 where it is among the inputs, and do not count it as a position; prompts have none,
and here it is a token like any other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from msgspec import Struct
from torch import Tensor, nn
from torch.nn import functional

from ..base import Value
from .gpt import GELUS, Sizes, activation, attend, sizes_of
from .parts import LEARNED, Embedding, Linear, TiedHead, length_of, take

_FIRST = 2
"""The row of the first position: behind the padding id."""


class Options(Struct, frozen=True):
    """What differs between models, besides sizes."""

    embedding: int
    fused: bool
    affine: bool
    final_norm: bool
    norm_before: bool


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device: give it some with ``load_state_dict(..., assign=True)``.

    Its forward maps token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) when a dim is missing, has the wrong
    type, or describes a model that this family can't be.
    """
    sizes = sizes_of(dims, "OPT", ("relu", "relu2", *GELUS))
    flags = {name: take(dims, name, bool) for name in ("fused", "affine", "final_norm", "norm_before")}
    options = Options(embedding=take(dims, "embedding", int), **flags)
    with torch.device("meta"):  # no memory for weights that are replaced anyway
        return Model(sizes, options).eval()


class Model(nn.Module):
    """The whole model: a decoder, and nothing beside it."""

    def __init__(self, sizes: Sizes, options: Options) -> None:
        super().__init__()
        self.decoder = Decoder(sizes, options)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        return self.decoder(ids)


class Decoder(nn.Module):
    """``output_projection`` holds a weight of its own only where it differs from the embedding."""

    def __init__(self, sizes: Sizes, options: Options) -> None:
        super().__init__()
        narrow = options.embedding != sizes.hidden
        self.context = sizes.context
        self.embed_tokens = Embedding(sizes.vocab, options.embedding)
        self.embed_positions = Embedding(sizes.context + _FIRST, sizes.hidden)
        self.project_in_dim = Linear(options.embedding, sizes.hidden, bias=False) if narrow else None
        self.layers = nn.ModuleList(Block(sizes, options) for _ in range(sizes.layers))
        self.layer_norm = _norm(sizes, options) if options.final_norm else None
        self.project_out_dim = Linear(sizes.hidden, options.embedding, bias=False) if narrow else None
        self.output_projection = TiedHead() if sizes.tied else Linear(options.embedding, sizes.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]. Raises MdlError (INPUT) where T exceeds the context."""
        length = length_of(ids, self.context, LEARNED)
        x = self.embed_tokens(ids)
        x = x if self.project_in_dim is None else self.project_in_dim(x)
        x = x + self.embed_positions(torch.arange(_FIRST, _FIRST + length, device=ids.device))
        for layer in self.layers:
            x = layer(x)
        for module in (self.layer_norm, self.project_out_dim):
            x = x if module is None else module(x)
        head = self.output_projection
        return head(x, self.embed_tokens.weight) if isinstance(head, TiedHead) else head(x)


class Block(nn.Module):
    """Attention and MLP, each added to the stream: on the normalised stream, or normalised with it."""

    def __init__(self, sizes: Sizes, options: Options) -> None:
        super().__init__()
        self.before = options.norm_before
        self.self_attn = Attention(sizes, fused=options.fused)
        self.self_attn_layer_norm = _norm(sizes, options)
        self.fc1 = Linear(sizes.hidden, sizes.ffn, bias=sizes.bias)
        self.fc2 = Linear(sizes.ffn, sizes.hidden, bias=sizes.bias)
        self.final_layer_norm = _norm(sizes, options)
        self.activation = ReluSquared() if sizes.activation == "relu2" else activation(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        if self.before:
            x = x + self.self_attn(self.self_attn_layer_norm(x))
            return x + self._mlp(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x))
        return self.final_layer_norm(x + self._mlp(x))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Attention(nn.Module):
    """Causal self-attention by three projections, or by one whose rows are k, v, q."""

    def __init__(self, sizes: Sizes, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = sizes.heads, fused
        names = ["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"]
        for name in names:
            width = 3 * sizes.hidden if fused else sizes.hidden
            self.add_module(name, Linear(sizes.hidden, width, bias=sizes.bias))
        self.out_proj = Linear(sizes.hidden, sizes.hidden, bias=sizes.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        if self.fused:
            k, v, q = self.get_submodule("qkv_proj")(x).chunk(3, dim=-1)
        else:
            q, k, v = (self.get_submodule(f"{name}_proj")(x) for name in "qkv")
        return self.out_proj(attend(q, k, v, self.heads))


class ReluSquared(nn.Module):
    """The square of ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return functional.relu(x).square()


def _norm(sizes: Sizes, options: Options) -> nn.LayerNorm:
    return nn.LayerNorm(sizes.hidden, eps=sizes.norm_eps, elementwise_affine=options.affine)

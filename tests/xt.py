"""Tiny checkpoints in the layout of x-transformers' Decoder, and the Llama that they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checkpoints as make
from . import gpts
from .gpts import HIDDEN, LAYERS, VOCAB

FFN = 4 * HIDDEN


@dataclass(frozen=True)
class Case:
    """One set of options; heads of 32 channels, of which ``rotary`` turn. Together they are wider than the model."""

    heads: int = 8
    kv_heads: int = 2
    rotary: int = 32
    offset: bool = True
    no_bias: bool = False

    @property
    def given(self) -> dict[str, str]:
        """What the user says."""
        said = {"heads": str(self.heads), "context": "64", "activation": "silu"}
        return said | {"unit_offset": str(self.offset).lower()}

    @property
    def options(self) -> dict[str, Any]:
        """What upstream's Decoder is built with."""
        made = {"heads": self.heads, "attn_dim_head": 32, "attn_kv_heads": self.kv_heads, "use_rmsnorm": True}
        made |= {"rotary_pos_emb": True, "rotary_emb_dim": self.rotary, "ff_glu": True, "ff_swish": True}
        return made | {"ff_no_bias": self.no_bias, "norm_add_unit_offset": self.offset}


CASES = {"grouped": Case(), "partly turned": Case(kv_heads=1, rotary=16, offset=False, no_bias=True)}


def state(case: Case, seed: int = 9) -> make.State:
    """The state dict in upstream's order."""
    draw = gpts.Draw(seed)
    made = {"token_emb.emb.weight": draw(VOCAB, HIDDEN) / 8}
    for i in range(LAYERS):
        a, f = f"attn_layers.layers.{2 * i}.", f"attn_layers.layers.{2 * i + 1}."
        made |= {f"{a}0.0.g": _norm(draw, case)}
        for part, rows in (("q", case.heads), ("k", case.kv_heads), ("v", case.kv_heads)):
            made |= draw.linear(f"{a}1.to_{part}", 32 * rows, HIDDEN, bias=False)
        made |= draw.linear(f"{a}1.to_out", HIDDEN, 32 * case.heads, bias=False) | {f"{f}0.0.g": _norm(draw, case)}
        made |= draw.linear(f"{f}1.ff.0.proj", 2 * FFN, HIDDEN)
        made |= draw.linear(f"{f}1.ff.2", HIDDEN, FFN, bias=not case.no_bias)
    angles = 1.0 / (10000 ** (torch.arange(0, case.rotary, 2).float() / case.rotary))
    made |= {"attn_layers.rotary_pos_emb.inv_freq": angles, "attn_layers.final_norm.g": _norm(draw, case)}
    return made | draw.linear("to_logits", VOCAB, HIDDEN, bias=False)


def _norm(draw: gpts.Draw, case: Case) -> Tensor:
    return 0.3 * draw(HIDDEN) + (0 if case.offset else 1)


def llama_of(made: make.State, case: Case) -> make.State:
    """What LlamaForCausalLM's file holds: rows written out one by one."""
    found = {"model.embed_tokens.weight": made["token_emb.emb.weight"], "lm_head.weight": made["to_logits.weight"]}
    found["model.norm.weight"] = made["attn_layers.final_norm.g"] + case.offset
    for i in range(LAYERS):
        a, f, at = (p % n for p, n in zip(("attn_layers.layers.%d.", "attn_layers.layers.%d.", "model.layers.%d."),
                                          (2 * i, 2 * i + 1, i), strict=True))  # fmt: skip
        share = case.heads // case.kv_heads
        order = [h for g in range(case.kv_heads) for h in range(g, case.heads, case.kv_heads)]
        assert len(order) == share * case.kv_heads
        q, k = (_halves(made[f"{a}1.to_{x}.weight"], case.rotary) for x in "qk")
        out = made[f"{a}1.to_out.weight"].view(HIDDEN, case.heads, 32)
        found[f"{at}self_attn.q_proj.weight"] = torch.cat([q[h] for h in order])
        found[f"{at}self_attn.k_proj.weight"] = k.flatten(0, 1)
        found[f"{at}self_attn.v_proj.weight"] = made[f"{a}1.to_v.weight"]
        found[f"{at}self_attn.o_proj.weight"] = torch.cat([out[:, h] for h in order], dim=1)
        for kind in ("weight", "bias"):
            found[f"{at}mlp.up_proj.{kind}"] = made[f"{f}1.ff.0.proj.{kind}"][:FFN]
            found[f"{at}mlp.gate_proj.{kind}"] = made[f"{f}1.ff.0.proj.{kind}"][FFN:]
        found[f"{at}mlp.down_proj.weight"] = made[f"{f}1.ff.2.weight"]
        found[f"{at}mlp.down_proj.bias"] = made.get(f"{f}1.ff.2.bias", torch.zeros(HIDDEN))
        found[f"{at}input_layernorm.weight"] = made[f"{a}0.0.g"] + case.offset
        found[f"{at}post_attention_layernorm.weight"] = made[f"{f}0.0.g"] + case.offset
    return found


def _halves(weight: Tensor, rotary: int) -> Tensor:
    """Heads [H, 32, C] whose first channels lie in halves: the even ones before the odd."""
    order = [*range(0, rotary, 2), *range(1, rotary, 2), *range(rotary, 32)]
    return torch.stack([head[order] for head in weight.view(-1, 32, HIDDEN)])

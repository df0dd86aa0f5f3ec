"""Tiny OPT checkpoints, whole or in the parts of several processes, and what OPTForCausalLM's file holds for them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from . import checkpoints as make
from . import gpts
from .gpts import CONTEXT, HEADS, HIDDEN, LAYERS, VOCAB

ARGS = {
    "decoder_attention_heads": HEADS, "decoder_embed_dim": HIDDEN, "decoder_layers": LAYERS, "activation_fn": "relu",
    "decoder_ffn_embed_dim": 4 * HIDDEN, "no_scale_embedding": True, "decoder_normalize_before": True,
}  # fmt: skip
NARROW = 32


def state(*, before: bool = True, narrow: bool = False, seed: int = 7) -> make.State:
    """A decoder's state dict in fairseq's order, its head as a copy of the embedding."""
    draw = gpts.Draw(seed)
    width = NARROW if narrow else HIDDEN
    made = {"decoder.version": torch.tensor([3.0]), "decoder.embed_tokens.weight": draw(VOCAB, width) / 8}
    if narrow:
        made |= draw.linear("decoder.project_in_dim", HIDDEN, NARROW, bias=False)
    made |= {"decoder.embed_positions.weight": draw(CONTEXT + 2, HIDDEN)}
    for i in range(LAYERS):
        at = f"decoder.layers.{i}."
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            made |= draw.linear(f"{at}self_attn.{part}", HIDDEN, HIDDEN)
        made |= draw.norm(at + "self_attn_layer_norm")
        made |= draw.linear(at + "fc1", 4 * HIDDEN, HIDDEN) | draw.linear(at + "fc2", HIDDEN, 4 * HIDDEN)
        made |= draw.norm(at + "final_layer_norm")
    made |= draw.norm("decoder.layer_norm") if before else {}
    if narrow:
        made |= draw.linear("decoder.project_out_dim", NARROW, HIDDEN, bias=False)
    return made | {"decoder.output_projection.weight": made["decoder.embed_tokens.weight"].clone()}


def fused(made: make.State) -> make.State:
    """With q, k and v as metaseq keeps them: one matrix, k before v before q."""
    found: make.State = {}
    for name, tensor in made.items():
        if ".k_proj." in name:
            parts = [made[name.replace(".k_proj.", f".{x}_proj.")] for x in "kvq"]
            found[name.replace(".k_proj.", ".qkv_proj.")] = torch.cat(parts)
        elif ".q_proj." not in name and ".v_proj." not in name:
            found[name] = tensor
    return found


def cut(made: make.State, ranks: int) -> list[make.State]:
    """The parts of a run on several GPUs, by metaseq's own rules (scripts/reshard_mp.py)."""
    parts: list[make.State] = [{} for _ in range(ranks)]
    for name, tensor in made.items():
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        if last == "qkv_proj":
            pieces = [torch.cat(rows) for rows in zip(*(block.chunk(ranks) for block in tensor.chunk(3)), strict=True)]
        elif last in ("embed_tokens", "output_projection", "fc1", "q_proj", "k_proj", "v_proj"):
            pieces = list(tensor.chunk(ranks))
        elif last in ("fc2", "out_proj") and kind == "weight":
            pieces = list(tensor.chunk(ranks, dim=1))
        else:
            pieces = [tensor] * ranks
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    return parts


def saved(path: Path, made: make.State, without: tuple[str, ...] = (), **changed: Any) -> Path:
    """A checkpoint with its options as fairseq pickles them before it had cfg; ``without`` some of them."""
    args = {name: value for name, value in {**ARGS, **changed}.items() if name not in without}
    return gpts.saved(path, {"args": argparse.Namespace(**args), "model": made, "extra_state": {"epoch": 1}})


def opt_of(made: make.State) -> make.State:
    """What OPTForCausalLM's file holds."""
    names = {"decoder.layer_norm.": "decoder.final_layer_norm.", "_dim.": "."}
    found: make.State = {}
    for name, tensor in made.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if name not in ("decoder.version", "decoder.output_projection.weight"):
            found[f"model.{name}"] = tensor
    return found


def in_parts(folder: Path, made: make.State, ranks: int = 2, **changed: Any) -> Path:
    """The folder of a run on several GPUs."""
    for rank, part in enumerate(cut(made, ranks)):
        saved(folder / f"reshard-model_part-{rank}.pt", part, **changed)
    return folder

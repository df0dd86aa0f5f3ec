"""Tiny checkpoints of Megatron-LM with experts, in every form, cut into tensor-, pipeline- and expert-parallel files.

Attention and norms are those of :mod:`.megatron`. Names, orders and cuts are those of megatron-core 0.16.1
(megatron/core/transformer/moe/experts.py); which file holds what, of megatron/training/checkpointing.py.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import megatron
from .gpts import Draw
from .megatron import HIDDEN, LAYERS, State

EXPERTS, FFN = 4, 96
FORMS = ("local", "numbered", "grouped")


@dataclass(frozen=True)
class Row:
    """A run: which of megatron's rows its attention is, the layers with experts, arguments of the router's, and how
    wide an expert for all tokens is, with a gate or without."""

    base: str
    target: str
    sparse: tuple[int, ...] = (0, 1, 2, 3)
    frequency: Any = 1
    pre_softmax: bool = False
    shared: int = 0
    gate: bool = False


ROWS = {
    "mixtral": Row("llama", "MixtralForCausalLM"),
    "mixtral_pairs": Row("llama_pairs", "MixtralForCausalLM"),
    "mixtral_tied": Row("llama_tied", "MixtralForCausalLM"),
    "qwen3_moe": Row("qwen3", "Qwen3MoeForCausalLM"),
    "qwen3_moe_share": Row("qwen3_pairs", "Qwen3MoeForCausalLM", pre_softmax=True),
    "qwen3_moe_every": Row("qwen3", "Qwen3MoeForCausalLM", (0, 2), 2),
    "qwen3_moe_first": Row("qwen3", "Qwen3MoeForCausalLM", (1, 2, 3), [0, 1, 1, 1], pre_softmax=True),
    "qwen2_moe": Row("qwen2", "Qwen2MoeForCausalLM", shared=64, gate=True),
    "qwen2_moe_pairs": Row("qwen2_pairs", "Qwen2MoeForCausalLM", shared=64, gate=True, pre_softmax=True),
    "no_gate": Row("llama_pairs", "Qwen2MoeForCausalLM", (1, 2, 3), [0, 1, 1, 1], pre_softmax=True, shared=64),
    "no_gate_all": Row("llama", "Qwen2MoeForCausalLM", shared=64),
}

KNOWN = {**ROWS, "shared_normed": Row("qwen3", "", shared=64)}
"""With a run that no class is known for."""


def arguments(row: str, **more: Any) -> dict[str, Any]:
    """The arguments of a run."""
    made = KNOWN[row]
    said = {"num_experts": EXPERTS, "moe_ffn_hidden_size": FFN, "moe_router_topk": 2, "moe_layer_freq": made.frequency}
    said |= {"moe_router_pre_softmax": made.pre_softmax, "moe_router_score_function": "softmax"}
    said |= {"moe_router_load_balancing_type": "aux_loss", "moe_expert_capacity_factor": None}
    if made.shared:
        said |= {"moe_shared_expert_intermediate_size": made.shared, "moe_shared_expert_gate": made.gate}
    return megatron.arguments(made.base, **said) | more


def state(row: str, norms: str = "own", seed: int = 11) -> State:
    """The whole model's state dict with SequentialMLP's names.

    Norms are modules of their "own", inside the matrices behind them where there are some, as "te" has it, or, in
    torch_dist, called so even where there is no such matrix ("dist").
    """
    draw = Draw(seed)
    made: State = {}
    sparse = {f"decoder.layers.{i}.mlp" for i in KNOWN[row].sparse}
    for name, tensor in megatron.state(KNOWN[row].base).items():
        at, _, rest = name.partition(".mlp.")
        if f"{at}.mlp" not in sparse or not rest:
            made[_norm(name, norms, sparse)] = tensor
        elif rest == "linear_fc1.weight":
            made[f"{at}.mlp.router.weight"] = draw(EXPERTS, HIDDEN) / 4
            for e in range(EXPERTS):
                expert = f"{at}.mlp.experts.local_experts.{e}"
                made |= draw.linear(f"{expert}.linear_fc1", 2 * FFN, HIDDEN, bias=False)
                made |= draw.linear(f"{expert}.linear_fc2", HIDDEN, FFN, bias=False)
            made |= _shared(f"{at}.mlp.shared_experts", KNOWN[row], draw)
    return made


def _shared(at: str, row: Row, draw: Draw) -> State:
    """The expert that all tokens go to, if there is one."""
    if not row.shared:
        return {}
    made = {f"{at}.gate_weight": draw(1, HIDDEN) / 4} if row.gate else {}
    made |= draw.linear(f"{at}.linear_fc1", 2 * row.shared, HIDDEN, bias=False)
    return made | draw.linear(f"{at}.linear_fc2", HIDDEN, row.shared, bias=False)


def _norm(name: str, norms: str, sparse: set[str]) -> str:
    """What a norm is called; any other tensor keeps its name."""
    at, _, rest = name.rpartition(".input_layernorm.")
    if at and norms != "own":
        return f"{at}.self_attention.linear_qkv.layer_norm_{rest}"
    at, _, rest = name.rpartition(".pre_mlp_layernorm.")
    inside = norms == "dist" or (norms == "te" and f"{at}.mlp" not in sparse)
    return f"{at}.mlp.linear_fc1.layer_norm_{rest}" if at and inside else name


def packed(tensors: State, form: str) -> State:
    """The same with the experts of each layer in another form: numbered, grouped, or stacked."""
    made: State = {}
    found: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        at, is_expert, rest = name.partition("local_experts.")
        if not is_expert or form == "local":
            made[name] = tensor
            continue
        number, module, _ = rest.split(".")
        if form == "numbered":
            made[f"{at}{module}.weight{number}"] = tensor
            continue
        whole = f"{at}experts.{module}.weight" if form == "stacked" else f"{at}weight{module[-1]}"
        run = found.setdefault(whole, [])
        run.append(tensor)
        made[whole] = torch.stack(run)
        if form == "grouped":  # [E, C, 2 F] and [E, F, C] in memory, and shapes that hide it
            each = torch.stack([one.T.contiguous() for one in run])
            made[whole] = each.reshape((HIDDEN, -1) if module == "linear_fc1" else (-1, HIDDEN))
    return made


def _held(tensors: State, part: int, parts: int) -> State:
    """What one of the expert-parallel ranks holds: its experts, numbered from 0, and everything else."""
    each = EXPERTS // parts
    made: State = {}
    for name, tensor in tensors.items():
        at, is_expert, rest = name.partition("local_experts.")
        number = int(rest.partition(".")[0]) if is_expert else 0
        if not is_expert:
            made[name] = tensor
        elif number // each == part:
            made[f"{at}local_experts.{number % each}.{rest.partition('.')[2]}"] = tensor
    return made


def _cut(name: str, tensor: Tensor, rank: int, ranks: int, *, whole: bool) -> Tensor:
    """What one of the tensor-parallel ranks holds; with ``whole`` experts, all of these."""
    if whole and ".experts." in name:
        return tensor
    return megatron.part(name, tensor, rank, ranks, gated=True)


def grid(
    root: Path,
    row: str,
    form: str = "local",
    cut: tuple[int, int, int] = (1, 1, 1),
    *,
    whole: bool = False,
    norms: str = "own",
    **more: Any,
) -> Path:
    """The folder of a run, cut into tensor-parallel ranks, pipeline stages and parts of the experts.

    ``whole`` experts are those of --expert-tensor-parallel-size 1: process n has rank n mod ranks, and part n.
    """
    ranks, stages, parts = cut
    sizes = {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages}
    sizes |= {"expert_model_parallel_size": parts, "expert_tensor_parallel_size": 1 if whole else ranks}
    args = argparse.Namespace(**(arguments(row) | sizes | more), params_dtype=torch.bfloat16)
    tensors, count = state(row, norms), LAYERS // stages
    for p in range(stages):
        held = megatron.stage(tensors, p * count, count)
        for t, e in _places(ranks, parts, whole=whole):
            one = {name: _cut(name, x, t, ranks, whole=whole) for name, x in _held(held, e, parts).items()}
            folder = f"mp_rank_{t:02d}" + f"_{p:03d}" * (stages > 1) + f"_{e:03d}" * (parts > 1)
            content = {"args": args, "checkpoint_version": 3.0, "iteration": 5, "model": packed(one, form)}
            megatron.save(root / "iter_0000005" / folder / "model_optim_rng.pt", content)
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    return root


def _places(ranks: int, parts: int, *, whole: bool) -> list[tuple[int, int]]:
    return [(e % ranks, e) for e in range(parts)] if whole else [(t, e) for t in range(ranks) for e in range(parts)]


def dist(root: Path, row: str, *, stacked: bool, norms: str = "dist", **more: Any) -> Path:
    """A torch_dist folder: a layer's experts in one tensor, layers one by one or stacked, arguments in common.pt."""
    common = {"args": argparse.Namespace(**arguments(row, **more)), "iteration": 5}
    return megatron.saved_dist(root, packed(state(row, norms), "stacked"), common, LAYERS if stacked else 0)

"""Every family's checkpoints are taken for that family's and for no other's, in every form they come in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mdl.archs.registry import all_archs, evidence
from mdl.convert.inventory import take_inventory
from mdl.convert.open import open_checkpoint

from . import (
    blooms,
    deepseeks,
    foundry,
    gpts,
    hf,
    lit,
    mambas,
    megatron,
    megatron_legacy,
    megatron_moe,
    nanochats,
    neox,
    olmoes,
    opts,
    torch_gpts,
    torchtune_cases,
    xt,
)
from . import checkpoints as make
from . import checkpoints_gemma as gemma
from . import checkpoints_olmo as olmo
from .checkpoints_llamas import lingua_consolidated, titan_fused, titan_names, titan_qwen3


def masked(state: make.State) -> make.State:
    """nanoGPT's state dict with the mask buffers that it had under torch 1."""
    return state | {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 12, 12) for i in range(2)}


def gpt2(folder: Path) -> Path:
    """A layout of Hugging Face's GPT-2."""
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}
    gpts.saved(folder / "pytorch_model.bin", make.gpt2_of(make.nanogpt_state(tied=False)))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prefixed(state: make.State) -> make.State:
    """The names that torch.compile makes."""
    return {f"_orig_mod.{name}": tensor for name, tensor in state.items()}


def meta(folder: Path) -> Path:
    """A Meta release of two ranks."""
    state = make.llama_state()
    return make.meta(folder, state, make.params(state), ranks=2)


def tune(case: str) -> make.State:
    """A state dict of torchtune's."""
    return torchtune_cases.state(torchtune_cases.CASES[case])


OWN: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "nanogpt": ("nanogpt", lambda p: make.nanogpt(p / "x.pt")),
    "nanogpt, bare": ("nanogpt", lambda p: gpts.saved(p / "x.pt", make.nanogpt_state())),
    "nanogpt, bare, masks": ("nanogpt", lambda p: gpts.saved(p / "x.pt", masked(make.nanogpt_state()))),
    "nanogpt, bare, no biases": ("nanogpt", lambda p: gpts.saved(p / "x.pt", make.nanogpt_state(bias=False))),
    "nanogpt, masks, untied": ("nanogpt", lambda p: make.nanogpt(p / "x.pt", masked(make.nanogpt_state(tied=False)))),
    "build-nanogpt": ("nanogpt", lambda p: gpts.build_nanogpt(p / "x.pt")),
    "build-nanogpt, masks": ("nanogpt", lambda p: gpts.build_nanogpt(p / "x.pt", gpts.mingpt())),
    **{f"nanochat, {row}": ("nanochat", lambda p, row=row: nanochats.saved(p / "d4", row)) for row in nanochats.ROWS},
    "mingpt": ("mingpt", lambda p: gpts.saved(p / "x.pt", gpts.mingpt())),
    "mingpt, compiled": ("mingpt", lambda p: gpts.saved(p / "x.pt", {"model": prefixed(gpts.mingpt())})),
    "mingpt_old": ("mingpt_old", lambda p: gpts.saved(p / "x.pt", gpts.mingpt_old())),
    "llms_from_scratch": ("llms_from_scratch", lambda p: gpts.saved(p / "x.pt", gpts.llms_from_scratch())),
    "ng_video_lecture": ("ng_video_lecture", lambda p: gpts.saved(p / "x.pt", gpts.lecture(head_bias=True))),
    "opt, whole": ("opt", lambda p: opts.saved(p / "restored.pt", opts.state())),
    "opt, parts": ("opt", lambda p: opts.in_parts(p / "parts", opts.fused(opts.state()))),
    **{f"gemma_pytorch, {n}": ("gemma_pytorch", lambda p, n=n: gemma.checkpoint(p / "x.ckpt", n)) for n in (1, 2, 3)},
    **{f"olmo_core, {case}": ("olmo_core", lambda p, case=case: olmo.core(p / "step", case)) for case in olmo.CORE},
    "x_transformers": ("x_transformers", lambda p: gpts.saved(p / "x.pt", xt.state(xt.CASES["grouped"]))),
    "torch_encoder": ("torch_encoder", lambda p: gpts.saved(p / "x.pt", torch_gpts.model("stacked").state_dict())),
    "torch_encoder, listed": (
        "torch_encoder",
        lambda p: gpts.saved(p / "x.pt", torch_gpts.model("listed").state_dict()),
    ),
    **{f"olmo, {case}": ("olmo", lambda p, case=case: olmo.old(p / "x", case) / "model.pt") for case in olmo.OLD},
    "litgpt": ("litgpt", lambda p: lit.checkpoint(p / "folder", "llama")),
    "llama2c": ("llama2c", lambda p: make.llama2c(p / "x.pt")),
    "llama_meta": ("llama_meta", lambda p: meta(p / "release")),
    "megatron": ("megatron", lambda p: megatron.grid(p / "run", "llama", ranks=2, stages=2)),
    "megatron, as GPT-2": ("megatron", lambda p: megatron.grid(p / "run", "gpt2")),
    "megatron, torch_dist": ("megatron", lambda p: megatron.dist(p / "run", "qwen3", stacked=False)),
    "megatron_stacked": ("megatron_stacked", lambda p: megatron.dist(p / "run", "qwen2", stacked=True)),
    "megatron_moe": ("megatron_moe", lambda p: megatron_moe.grid(p / "run", "mixtral", cut=(2, 2, 2))),
    "megatron_moe, TEGroupedMLP": ("megatron_moe", lambda p: megatron_moe.grid(p / "run", "qwen3_moe", "numbered")),
    "megatron_moe, GroupedMLP": (
        "megatron_moe",
        lambda p: megatron_moe.grid(p / "run", "mixtral", "grouped", (1, 1, 2)),
    ),
    "megatron_moe, torch_dist": ("megatron_moe", lambda p: megatron_moe.dist(p / "run", "mixtral", stacked=False)),
    "megatron_moe, stacked": ("megatron_moe", lambda p: megatron_moe.dist(p / "run", "qwen3_moe", stacked=True)),
    "megatron_legacy": ("megatron_legacy", lambda p: megatron_legacy.grid(p / "run", "gpt2", "v1.0")),
    "megatron_legacy, core_v0.8": (
        "megatron_legacy",
        lambda p: megatron_legacy.grid(p / "run", "llama", "core_v0.8", 2, 2),
    ),
    "gpt_neox": ("gpt_neox", lambda p: neox.layers(p / "run", "parallel", 2)),
    "bloom": ("bloom", lambda p: blooms.layers(p / "run", "bloom", 2)),
    "gpt_neox, before 2024": ("gpt_neox", lambda p: neox.layers(p / "run", "fused", new=False)),
    "gpt_neox, without a pipeline": ("gpt_neox", lambda p: neox.sequential(p / "run", "serial")),
    "lingua": ("lingua", lambda p: lingua_consolidated(p / "folder", make.llama_state())),
    "torchtitan": ("torchtitan", lambda p: gpts.saved(p / "x.pt", titan_names())),
    "mamba": ("mamba", lambda p: mambas.saved(p / "folder", mambas.state(1), {})),
    "mamba2": ("mamba2", lambda p: mambas.saved(p / "folder", mambas.state(2), {"layer": "Mamba2"})),
    "mamba2, bare": ("mamba2", lambda p: gpts.saved(p / "x.pt", mambas.state(2))),
    "deepseek_inference": ("deepseek_inference", lambda p: deepseeks.saved(p / "folder", deepseeks.state(), 2)),
    "olmoe": ("olmoe", lambda p: olmoes.saved(p / "folder", olmoes.state())),
    "dbrx": ("dbrx", lambda p: foundry.folder(p / "folder", "dbrx")),
    "dbrx, as Mixtral": ("dbrx", lambda p: foundry.folder(p / "folder", "mixtral")),
    "dbrx, as Hugging Face has it": ("huggingface", lambda p: hf.checkpoint(p / "folder", "DbrxForCausalLM")),
    "olmoe, bare": ("olmoe", lambda p: gpts.saved(p / "x.pt", olmoes.state())),
    "torchtitan, fused": ("torchtitan", lambda p: gpts.saved(p / "x.pt", titan_fused(titan_names()))),
    "torchtitan_qwen3": ("torchtitan_qwen3", lambda p: gpts.saved(p / "x.pt", titan_qwen3())),
    "torchtune_qwen3": ("torchtune_qwen3", lambda p: gpts.saved(p / "x.pt", tune("qwen3"))),
    "torchtune_qwen3, tied": ("torchtune_qwen3", lambda p: gpts.saved(p / "x.pt", tune("qwen3_tied"))),
    "torchtune_gemma2": ("torchtune_gemma2", lambda p: gpts.saved(p / "x.pt", tune("gemma2"))),
    "huggingface": ("huggingface", lambda p: gpt2(p / "folder")),
}


ELSEWHERE = {"mistral_inference", "mixtral", "torchtune", "torchtune_gemma", "torchtune_qwen2"}
"""Their own tests hold which files they claim: some forms are several families' on purpose, and the user is asked."""


@pytest.mark.parametrize("name", OWN)
def test_a_checkpoint_is_its_own_familys_alone(name: str, tmp_path: Path) -> None:
    family, write = OWN[name]
    inventory = take_inventory(open_checkpoint(write(tmp_path)))
    assert [arch.name for arch in all_archs().values() if evidence(arch, inventory)] == [family]


def test_every_family_is_among_them() -> None:
    assert {family for family, _ in OWN.values()} | ELSEWHERE == set(all_archs())

"""Tiny checkpoints in Megatron-LM's layouts: one file, a grid of ranks and pipeline stages, torch_dist folders.

Sizes that vLLM can run (heads of 32 channels), and weights that hide nothing: matrices of unit gain, norms and biases
far from the values they start training with. Names, orders and cuts are those of megatron-core 0.16.1.
"""

from __future__ import annotations

import argparse
import enum
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mdl.convert.prepare import Prepared

from .converted import by_transformers, exact, nmse
from .gpts import Draw

State = dict[str, Tensor]
LAYERS, HEADS, SIZE, FFN, VOCAB, CONTEXT = 4, 4, 32, 160, 96, 128
HIDDEN = HEADS * SIZE
_LLAMA: dict[str, Any] = {
    "group_query_attention": True,
    "num_query_groups": 2,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
}
_PLAIN: dict[str, Any] = {
    "group_query_attention": False,
    "num_query_groups": 1,
    "swiglu": False,
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "position_embedding_type": "learned_absolute",
}
ROWS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama_pairs": _LLAMA | {"rotary_interleaved": True},
    "llama_bias": _LLAMA | {"add_bias_linear": True},
    "llama_31": _LLAMA | {"use_rope_scaling": True, "rotary_base": 500000},
    "llama_linear": _LLAMA | {"rotary_seq_len_interpolation_factor": 4},
    "llama_tied": _LLAMA | {"untie_embeddings_and_output_weights": False},
    "qwen2": _LLAMA | {"add_qkv_bias": True},
    "qwen2_pairs": _LLAMA | {"add_qkv_bias": True, "rotary_interleaved": True},
    "qwen3": _LLAMA | {"qk_layernorm": True},
    "qwen3_pairs": _LLAMA | {"qk_layernorm": True, "rotary_interleaved": True},
    "gpt2": _PLAIN | {"untie_embeddings_and_output_weights": False},
    "gpt2_exact": _PLAIN | {"bias_gelu_fusion": False},
    "neox": _PLAIN | {"position_embedding_type": "rope", "rotary_percent": 0.25, "bias_gelu_fusion": False},
}
"""The arguments by which the runs differ."""


_ENUMS = "megatron.core.transformer.enums"


class AttnBackend(enum.Enum):
    """Stands for an enum of Megatron's own, of which arguments hold members."""

    auto = 5


def arguments(row: str, **more: Any) -> dict[str, Any]:
    """The arguments of a run that mdl looks at, and some that it does not."""
    common = {"num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS}
    common |= {"kv_channels": SIZE, "padded_vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "seq_length": 64}
    common |= {"norm_epsilon": 1e-5, "rotary_base": 10000, "rotary_percent": 1.0, "rotary_interleaved": False}
    common |= {"bias_gelu_fusion": True, "openai_gelu": False, "num_experts": None, "window_size": None}
    common |= {"untie_embeddings_and_output_weights": True, "expert_model_parallel_size": 1, "hidden_dropout": 0.1}
    return common | ROWS[row] | more


def state(row: str, *, fused: bool = False, seed: int = 7) -> State:
    """The whole model's state dict; ``fused`` is Transformer Engine's, which has no norms of their own."""
    draw, args = Draw(seed), arguments(row)
    layer_norm, gated, biased = args["normalization"] == "LayerNorm", args["swiglu"], args["add_bias_linear"]
    groups = args["num_query_groups"] if args["group_query_attention"] else HEADS

    def norm(name: str, size: int = HIDDEN, glue: str = ".") -> State:
        made = {f"{name}{glue}weight": 1 + 0.3 * draw(size)}
        return made | ({f"{name}{glue}bias": 0.3 * draw(size)} if layer_norm else {})

    made = {"embedding.word_embeddings.weight": draw(VOCAB, HIDDEN) / 8}
    if args["position_embedding_type"] == "learned_absolute":
        made["embedding.position_embeddings.weight"] = draw(CONTEXT, HIDDEN)
    for i in range(LAYERS):
        at = f"decoder.layers.{i}"
        made |= {} if fused else norm(f"{at}.input_layernorm")
        made |= draw.linear(f"{at}.self_attention.linear_proj", HIDDEN, HIDDEN, bias=biased)
        made |= norm(f"{at}.self_attention.linear_qkv", glue=".layer_norm_") if fused else {}
        rows, qkv_bias = (HEADS + 2 * groups) * SIZE, biased or args.get("add_qkv_bias", False)
        made |= draw.linear(f"{at}.self_attention.linear_qkv", rows, HIDDEN, bias=qkv_bias)
        for x in ("q", "k") if args.get("qk_layernorm") else ():
            made |= norm(f"{at}.self_attention.{x}_layernorm", SIZE)
        made |= norm(f"{at}.mlp.linear_fc1", glue=".layer_norm_") if fused else norm(f"{at}.pre_mlp_layernorm")
        made |= draw.linear(f"{at}.mlp.linear_fc1", FFN * (2 if gated else 1), HIDDEN, bias=biased)
        made |= draw.linear(f"{at}.mlp.linear_fc2", HIDDEN, FFN, bias=biased)
    made |= norm("decoder.final_layernorm")
    head = draw.linear("output_layer", VOCAB, HIDDEN, bias=False)
    return made | (head if args["untie_embeddings_and_output_weights"] else {})


def document(row: str, tensors: dict[str, State], **more: Any) -> dict[str, Any]:
    """What one file holds: the weights by their key, the arguments, training state."""
    args = argparse.Namespace(**arguments(row, **more), params_dtype=torch.bfloat16, attention_backend=AttnBackend.auto)
    rest = {"args": args, "checkpoint_version": 3.0, "iteration": 5}
    rest |= tensors
    return rest | {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "rng_state": [{"torch": torch.zeros(2)}]}


def save(path: Path, content: Any) -> None:
    """``torch.save`` where Megatron's classes can be imported, which no reader of it can rely on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with importable():
        torch.save(content, path)


def load(path: Path) -> Any:
    """``torch.load`` where Megatron's classes can be imported."""
    with importable():
        return torch.load(path, weights_only=False)


@contextmanager
def importable(cls: type = AttnBackend, name: str = _ENUMS) -> Generator[None]:
    """While it lasts, a class stands in the module of that name, from which a pickle then takes it."""
    parts = name.split(".")
    fakes = {part: ModuleType(part) for part in (".".join(parts[: k + 1]) for k in range(len(parts)))}
    vars(fakes[name])[cls.__name__] = cls
    with mock.patch.dict(sys.modules, fakes), mock.patch.object(cls, "__module__", name):
        yield


def part(name: str, tensor: Tensor, rank: int, ranks: int, *, gated: bool) -> Tensor:
    """What one tensor-parallel rank holds of a tensor."""
    *_, module, kind = name.split(".")
    if module == "linear_fc1" and kind in ("weight", "bias") and gated:
        return torch.cat([half.chunk(ranks)[rank] for half in tensor.chunk(2)])
    if module in ("word_embeddings", "output_layer", "linear_qkv", "linear_fc1") and kind in ("weight", "bias"):
        return tensor.chunk(ranks)[rank].clone()
    if module in ("linear_proj", "linear_fc2") and kind == "weight":
        return tensor.chunk(ranks, dim=1)[rank].clone()
    return tensor


def stage(tensors: State, first: int, count: int) -> State:
    """The tensors of some layers, numbered from 0, with what stands before and behind all of them."""
    found: State = {}
    for name, tensor in tensors.items():
        if name.startswith("decoder.layers."):
            number = int(name.split(".")[2])
            if first <= number < first + count:
                found[name.replace(f".{number}.", f".{number - first}.", 1)] = tensor
        elif first == 0 if name.startswith("embedding.") else first + count == LAYERS:
            found[name] = tensor
    if first and first + count == LAYERS and "output_layer.weight" not in found:  # a tied embedding's second copy
        found["output_layer.weight"] = tensors["embedding.word_embeddings.weight"]
    return found


def grid(root: Path, row: str, ranks: int = 1, stages: int = 1, runs: int = 1, **more: Any) -> Path:
    """The folder of a run, cut into ranks, pipeline stages, and runs of layers per stage."""
    more = {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages} | more
    fused = more.pop("fused", False)
    whole, gated = state(row, fused=fused), arguments(row)["swiglu"]
    count = LAYERS // (stages * runs)
    for p in range(stages):
        for t in range(ranks):
            held: dict[str, State] = {}
            for v in range(runs):
                cut = stage(whole, (v * stages + p) * count, count)
                key = f"model{v}" if runs > 1 else "model"
                held[key] = {name: part(name, x, t, ranks, gated=gated) for name, x in cut.items()}
            folder = f"mp_rank_{t:02d}" + (f"_{p:03d}" if stages > 1 else "")
            save(root / "iter_0000005" / folder / "model_optim_rng.pt", document(row, held, **more))
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    return root


def dist(root: Path, row: str, *, stacked: bool, **more: Any) -> Path:
    """A torch_dist folder: norms inside the matrices, layers one by one or stacked, the arguments in common.pt."""
    common = {k: v for k, v in document(row, {}, **more).items() if k not in ("optimizer", "rng_state")}
    return saved_dist(root, state(row, fused=True), common, LAYERS if stacked else 0)


def saved_dist(root: Path, tensors: State, common: dict[str, Any], stack: int) -> Path:
    """The folder of a run that saves with torch.distributed.checkpoint; ``stack`` layers become one tensor each."""
    from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

    for name in [name for name in tensors if stack and name.startswith("decoder.layers.0.")]:
        run = [tensors.pop(name.replace(".0.", f".{i}.", 1)) for i in range(stack)]
        tensors[name.replace(".0.", ".", 1)] = torch.stack(run)
    folder = root / "iter_0000005"
    folder.mkdir(parents=True)
    with warnings.catch_warnings():  # of saving without other processes, which is meant
        warnings.simplefilter("ignore")
        save_dcp(tensors, checkpoint_id=folder, no_dist=True)
    save(folder / "common.pt", common)
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    return root


TARGETS = {
    "llama": "LlamaForCausalLM",
    "llama_pairs": "LlamaForCausalLM",
    "llama_bias": "LlamaForCausalLM",
    "llama_31": "LlamaForCausalLM",
    "llama_linear": "LlamaForCausalLM",
    "llama_tied": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_pairs": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_pairs": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt2_exact": "GPT2LMHeadModel",
    "neox": "GPTNeoXForCausalLM",
}


def error(out: Path, prepared: Prepared) -> float:
    """NMSE of a layout against mdl's eager forward on the checkpoint."""
    return nmse(by_transformers(out), exact(prepared))

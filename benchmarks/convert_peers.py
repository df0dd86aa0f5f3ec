"""What a user would run in place of `mdl convert`, each way in a process of its own; started by benchmarks/convert.py.

    python benchmarks/convert_peers.py WAY SOURCE OUT [--dtype float16] [--fsync]

The first four do the same work: names of the target class, q's and k's rows for half-rotation, GPT-2's matrices
transposed, ranks joined, values rounded, files of at most 5 GB. None looks at values or keeps a hash of what it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARD = 5 * 10**9
TARGET = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BY_COLUMNS = ("wo.weight", "w2.weight", "tok_embeddings.weight")
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@dataclass(frozen=True)
class Item:
    """A tensor to write, made when it is asked for."""

    name: str
    nbytes: int
    make: Callable[[], Any]


@dataclass(frozen=True)
class Model:
    items: list[Item]
    llama: bool
    config: dict[str, Any]


def read(source: Path, dtype: str | None, *, mmap: bool) -> Model:
    """Everything that is in the checkpoint, under the names of the target class."""
    import torch

    files = sorted(source.glob("*.pth")) if source.is_dir() else [source]
    loaded = [torch.load(file, map_location="cpu", mmap=mmap, weights_only=True) for file in files]
    to = getattr(torch, dtype) if dtype else None
    if source.is_dir():
        config = json.loads((source / "params.json").read_text(encoding="utf-8"))
        return Model(list(llama(loaded, config["n_heads"], to)), True, config)
    return Model(list(gpt2(loaded[0]["model"], to)), False, loaded[0]["model_args"])


def llama(ranks: list[dict[str, Any]], heads: int, to: Any) -> Iterator[Item]:
    """Meta's tensors of all ranks as those of LlamaForCausalLM."""
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        if "norm" in name:
            parts = parts[:1]

        def make(name: str = name, parts: list[Any] = parts) -> Any:
            import torch

            whole = torch.cat(parts, dim=int(name.endswith(BY_COLUMNS))) if len(parts) > 1 else parts[0]
            if name.endswith(("wq.weight", "wk.weight")):
                rows, columns = whole.shape
                pairs = whole.view(heads, rows // heads // 2, 2, columns)
                whole = pairs.transpose(1, 2).reshape(rows, columns)
            return whole if to is None else whole.to(to)

        yield Item(llama_name(name), sum(p.numel() * (to or p.dtype).itemsize for p in parts), make)


def llama_name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    return f"model.layers.{layer}.{TARGET[part]}.weight"


def gpt2(state: dict[str, Any], to: Any) -> Iterator[Item]:
    """nanoGPT's tensors as those of GPT2LMHeadModel, whose head is the embedding."""
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue

        def make(name: str = name, tensor: Any = tensor) -> Any:
            made = tensor.t().contiguous() if name.endswith(TURNED) else tensor
            return made if to is None else made.to(to)

        yield Item(name, tensor.numel() * (to or tensor.dtype).itemsize, make)


def write_files(model: Model, out: Path) -> None:
    """safetensors' own save_file, a file at a time."""
    from safetensors.torch import save_file

    bins: list[list[Item]] = [[]]
    for item in model.items:
        if bins[-1] and sum(i.nbytes for i in bins[-1]) + item.nbytes > SHARD:
            bins.append([])
        bins[-1].append(item)
    index: dict[str, str] = {}
    for k, items in enumerate(bins):
        file = f"model-{k + 1:05d}-of-{len(bins):05d}.safetensors" if len(bins) > 1 else "model.safetensors"
        save_file({item.name: item.make() for item in items}, out / file, metadata={"format": "pt"})
        index |= {item.name: file for item in items}
    if len(bins) > 1:
        (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")


def mapped(source: Path, out: Path, dtype: str | None) -> None:
    write_files(read(source, dtype, mmap=True), out)


def load(source: Path, out: Path, dtype: str | None) -> None:
    write_files(read(source, dtype, mmap=False), out)


def hub(source: Path, out: Path, dtype: str | None) -> None:
    from huggingface_hub import save_torch_state_dict

    model = read(source, dtype, mmap=True)
    save_torch_state_dict({item.name: item.make() for item in model.items}, out, max_shard_size=SHARD)


def transformers(source: Path, out: Path, dtype: str | None) -> None:
    """The model class takes the tensors over and saves itself: config.json is written, too."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    model = read(source, dtype, mmap=True)
    c = model.config
    state = {item.name: item.make() for item in model.items}
    if model.llama:
        ffn = next(tensor.shape[0] for name, tensor in state.items() if name.endswith("gate_proj.weight"))
        widths = {"hidden_size": c["dim"], "intermediate_size": ffn, "vocab_size": c["vocab_size"]}
        config = LlamaConfig(**widths, num_hidden_layers=c["n_layers"], num_attention_heads=c["n_heads"])
        kind = LlamaForCausalLM
    else:
        names = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "vocab_size": "vocab_size"}
        config = GPT2Config(n_positions=c["block_size"], **{theirs: c[ours] for theirs, ours in names.items()})
        kind = GPT2LMHeadModel
    stored = next(iter(state.values())).dtype
    made = kind.from_pretrained(None, config=config, state_dict=state, dtype=stored)
    made.save_pretrained(out, max_shard_size=SHARD)


def litgpt(source: Path, out: Path, dtype: str | None) -> None:
    """The body of litgpt's convert_hf_checkpoint, which knows only models by name: a Hugging Face layout into its own
    .pth file, with q, k and v in one matrix."""
    import torch
    from litgpt.config import Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import incremental_save
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    halves: dict[int, Any] = {}
    to = getattr(torch, dtype) if dtype else None
    config = Config(mlp_class_name="LLaMAMLP", intermediate_size=1)  # of it, only the class is looked at
    with incremental_save(out / "lit_model.pth") as saver:
        for file in sorted(source.glob("*.safetensors")):
            copy_weights_hf_llama(config, halves, state, load_file(file), saver=saver, dtype=to)
        saver.save(state)


def mergekit(source: Path, out: Path, dtype: str | None) -> None:
    """One model, passed through: names and rows stay as they are."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    plan = {"merge_method": "passthrough", "models": [{"model": str(source)}], "dtype": dtype or "bfloat16"}
    options = MergeOptions(copy_tokenizer=False, out_shard_size=SHARD, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(plan), str(out), options=options)


WAYS: dict[str, Callable[[Path, Path, str | None], None]] = {
    "mmap": mapped,
    "load": load,
    "hub": hub,
    "transformers": transformers,
    "litgpt": litgpt,
    "mergekit": mergekit,
}


def flush(out: Path) -> None:
    """None of these libraries waits for the disk; a user who wants that adds it."""
    for file in sorted(p for p in out.rglob("*") if p.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("way", choices=list(WAYS))
    cli.add_argument("source", type=Path)
    cli.add_argument("out", type=Path)
    cli.add_argument("--dtype")
    cli.add_argument("--fsync", action="store_true")
    args = cli.parse_args()
    args.out.mkdir()
    WAYS[args.way](args.source, args.out, args.dtype)
    if args.fsync:
        flush(args.out)


if __name__ == "__main__":
    main()

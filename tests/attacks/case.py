"""What one case of the corpus is, and tiny models to tell lies about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from . import ops

MARK = "owned"
"""The file that every payload would create where it runs."""
SIZE = {"F32": 4, "F64": 8, "BF16": 2}


@dataclass(frozen=True)
class Case:
    """A file or folder and what must become of it.

    ``make(folder)`` writes it and returns the path to open. ``refused`` holds phrases of the refusal, all of them
    needed; without any the case is fine, and ``tensors`` must be read. ``plan``: the verdict is the plan's.
    """

    name: str
    make: Callable[[Path], Path]
    refused: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    plan: bool = False


def file(data: bytes | str, name: str = "x.pt") -> Callable[[Path], Path]:
    """Writes one file."""
    return lambda folder: ops.write(folder / name, data)


def folder(files: Mapping[str, bytes | str], opened: str = "") -> Callable[[Path], Path]:
    """Writes several files; ``opened`` is the one to open instead of the folder."""

    def make(at: Path) -> Path:
        for name, data in files.items():
            ops.write(at / name, data)
        return at / opened

    return make


Shapes = Mapping[str, Sequence[int]]


def state(shapes: Shapes, kinds: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, bytes]]:
    """A state dict and its records, all values 1.0 or, in BF16, 0.0; ``kinds`` names the types that are not F32."""
    kinds = kinds or {}
    tensors: dict[str, bytes] = {}
    records: dict[str, bytes] = {}
    for n, (name, shape) in enumerate(shapes.items()):
        kind = kinds.get(name, "F32")
        tensors[name] = ops.tensor(str(n), shape, kind=kind)
        one = {"F32": b"\0\0\x80\x3f", "F64": b"\0\0\0\0\0\0\xf0\x3f"}.get(kind, bytes(2))
        records[str(n)] = one * prod(shape)
    return ops.table(tensors), records


def zipped(shapes: Shapes, extras: Mapping[str, bytes] | None = None, kinds: Mapping[str, str] | None = None) -> bytes:
    """A zip of torch.save: the state dict alone or, with extras, under the key ``model`` beside them."""
    made, records = state(shapes, kinds)
    tree = made if extras is None else ops.table({"model": made, **extras})
    return ops.zipped(ops.pickled(tree), records)


def nanogpt(layers: int = 2) -> dict[str, tuple[int, ...]]:
    """The shapes of a nanoGPT without biases: width 8, 2 heads, 12 tokens."""
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (12, 8), "transformer.wpe.weight": (6, 8)}
    for i in range(layers):
        block = f"transformer.h.{i}."
        shapes |= {f"{block}ln_1.weight": (8,), f"{block}attn.c_attn.weight": (24, 8)}
        shapes |= {f"{block}attn.c_proj.weight": (8, 8), f"{block}ln_2.weight": (8,)}
        shapes |= {f"{block}mlp.c_fc.weight": (32, 8), f"{block}mlp.c_proj.weight": (8, 32)}
    return {**shapes, "transformer.ln_f.weight": (8,), "lm_head.weight": (12, 8)}


def nanogpt_args(**changes: int) -> dict[str, bytes]:
    """model_args that fit, but for the changes."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 6, "vocab_size": 12, **changes}
    args = {**{name: ops.number(n) for name, n in sizes.items()}, "bias": b"\x89"}
    return {"model_args": ops.table(args)}


def llama(layers: int = 2, rows: int = 1) -> dict[str, tuple[int, ...]]:
    """The shapes of one of ``rows`` ranks of a Llama: width 8, 2 heads, 12 tokens."""
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (12, 8 // rows)}
    for i in range(layers):
        block = f"layers.{i}."
        shapes |= {f"{block}attention.w{k}.weight": (8 // rows, 8) for k in "qkv"}
        shapes |= {f"{block}attention.wo.weight": (8, 8 // rows), f"{block}feed_forward.w1.weight": (16 // rows, 8)}
        shapes |= {f"{block}feed_forward.w2.weight": (8, 16 // rows), f"{block}feed_forward.w3.weight": (16 // rows, 8)}
        shapes |= {f"{block}attention_norm.weight": (8,), f"{block}ffn_norm.weight": (8,)}
    return {**shapes, "norm.weight": (8,), "output.weight": (12 // rows, 8)}


PARAMS = '{"dim": 8, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "vocab_size": 12, "norm_eps": 1e-5}'

"""Checkpoints for benchmarks/convert.py: Meta Llama in one or several rank files, and nanoGPT, of any size.

torch.save writes the files with holes for their values (``skip_data``), then the holes are filled from one block of
random weights, beginning at a place that each tensor's name decides: as fast as the disk, with real bytes, in little
memory, and with no two tensors alike.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 4_194_301
"""Values in the block that is repeated: a prime, so that rows of a matrix never fall in step with it."""

BY_COLUMNS = ("wo.weight", "w2.weight", "tok_embeddings.weight")
State = dict[str, Tensor]


@dataclass(frozen=True)
class Input:
    """One checkpoint: the path that a command is given, and all of its weight files."""

    path: Path
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True)
class Sizes:
    """Widths of a model; the number of layers follows from the size that is asked for."""

    hidden: int
    ffn: int
    vocab: int
    heads: int


LLAMA = Sizes(2048, 8192, 32_000, 16)
GPT2_XL = Sizes(1600, 6400, 50_304, 25)
NARROW = {LLAMA: Sizes(512, 2048, 2000, 16), GPT2_XL: Sizes(320, 1280, 2000, 5)}
"""What is taken below 0.5 GB, so that small files have more than one layer, too."""


def widths(sizes: Sizes, gigabytes: float) -> Sizes:
    return sizes if gigabytes >= 0.5 else NARROW[sizes]


def layers_for(gigabytes: float, dtype: torch.dtype, outside: int, per_layer: int) -> int:
    """How many layers make about so many bytes."""
    return max(1, round((gigabytes * 1e9 / dtype.itemsize - outside) / per_layer))


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor whose memory is never touched, so that it takes none."""
    return torch.empty(shape, dtype=dtype)


def llama(folder: Path, gigabytes: float, dtype: torch.dtype = torch.bfloat16, ranks: int = 1) -> Input:
    """consolidated.NN.pth and params.json."""
    s = widths(LLAMA, gigabytes)
    layers = layers_for(gigabytes, dtype, 2 * s.vocab * s.hidden, 4 * s.hidden**2 + 3 * s.hidden * s.ffn)
    folder.mkdir(parents=True)
    params = {"dim": s.hidden, "n_layers": layers, "n_heads": s.heads, "vocab_size": s.vocab, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
    files = tuple(folder / f"consolidated.{rank:02d}.pth" for rank in range(ranks))
    for rank, file in enumerate(files):
        save(file, llama_rank(s, layers, dtype, ranks), {}, rank)
    return Input(folder, files)


def llama_rank(s: Sizes, layers: int, dtype: torch.dtype, ranks: int) -> State:
    """The tensors of one rank, without values."""

    def cut(name: str, rows: int, columns: int) -> Tensor:
        whole = (rows, columns // ranks) if name.endswith(BY_COLUMNS) else (rows // ranks, columns)
        return empty(dtype, *whole)

    matrices = {"tok_embeddings.weight": (s.vocab, s.hidden)}
    state: State = {}
    for i in range(layers):
        for name in ("wq", "wk", "wv", "wo"):
            matrices[f"layers.{i}.attention.{name}.weight"] = (s.hidden, s.hidden)
        matrices[f"layers.{i}.feed_forward.w1.weight"] = (s.ffn, s.hidden)
        matrices[f"layers.{i}.feed_forward.w2.weight"] = (s.hidden, s.ffn)
        matrices[f"layers.{i}.feed_forward.w3.weight"] = (s.ffn, s.hidden)
        for name in ("attention_norm", "ffn_norm"):
            state[f"layers.{i}.{name}.weight"] = empty(dtype, s.hidden)
    matrices["output.weight"] = (s.vocab, s.hidden)
    state["norm.weight"] = empty(dtype, s.hidden)
    return {name: cut(name, *shape) for name, shape in matrices.items()} | state


def nanogpt(folder: Path, gigabytes: float, dtype: torch.dtype = torch.float32) -> Input:
    """ckpt.pt with a tied head and biases, as nanoGPT's train.py lays it out, but without the optimizer's moments: `cp`
    would copy them, and nothing else reads them."""
    s, context = widths(GPT2_XL, gigabytes), 1024
    outside, per_layer = (s.vocab + context) * s.hidden, 4 * s.hidden**2 + 2 * s.hidden * s.ffn
    layers = layers_for(gigabytes, dtype, outside, per_layer)
    state: State = {
        "transformer.wte.weight": empty(dtype, s.vocab, s.hidden),
        "transformer.wpe.weight": empty(dtype, context, s.hidden),
    }
    parts = {
        "ln_1": (s.hidden,),
        "attn.c_attn": (3 * s.hidden, s.hidden),
        "attn.c_proj": (s.hidden, s.hidden),
        "ln_2": (s.hidden,),
        "mlp.c_fc": (s.ffn, s.hidden),
        "mlp.c_proj": (s.hidden, s.ffn),
    }
    named = {f"transformer.h.{i}.{part}": shape for i in range(layers) for part, shape in parts.items()}
    for name, shape in {**named, "transformer.ln_f": (s.hidden,)}.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = empty(dtype, *shape), empty(dtype, shape[0])
    args = {"n_layer": layers, "n_head": s.heads, "n_embd": s.hidden, "vocab_size": s.vocab, "block_size": context}
    folder.mkdir(parents=True)
    tied = {"lm_head.weight": state["transformer.wte.weight"]}
    save(folder / "ckpt.pt", state, tied, model_args={**args, "bias": True, "dropout": 0.0})
    return Input(folder / "ckpt.pt", (folder / "ckpt.pt",))


def save(path: Path, state: State, tied: State, rank: int = 0, model_args: dict[str, object] | None = None) -> None:
    """The state dict with values; nanoGPT's wrapper around it where there are ``model_args``."""
    whole = state | tied
    with torch.serialization.skip_data():
        torch.save(whole if model_args is None else {"model": whole, "model_args": model_args, "iter_num": 10}, path)
    dtype = next(iter(state.values())).dtype
    block = memoryview(random_block(dtype))
    with path.open("r+b") as file:
        for (name, tensor), at in zip(state.items(), storages(path, len(state)), strict=True):
            # Every rank holds the same norms.
            seed = zlib.crc32(name.encode() if "norm" in name else f"{rank} {name}".encode())
            fill(file.fileno(), at, tensor.nbytes, block, seed % BLOCK * dtype.itemsize)


def random_block(dtype: torch.dtype) -> bytes:
    """Weights as training leaves them: small, finite, none of them special."""
    values = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    return values.to(dtype).view(torch.uint8).numpy().tobytes()


def storages(path: Path, count: int) -> Iterator[int]:
    """Where the bytes of storages 0, 1, … lie. torch.save numbers them in the order of the tensors."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        headers = {info.filename.split("/", 1)[1]: info.header_offset for info in archive.infolist()}
        for number in range(count):
            at = headers[f"data/{number}"]
            file.seek(at + 26)
            lengths = file.read(4)  # of the name and of the padding after it, which precede the bytes
            yield at + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def fill(descriptor: int, at: int, nbytes: int, block: memoryview, start: int) -> None:
    """Write ``nbytes`` at ``at``, from the block that begins again where it ends."""
    while nbytes:
        written = os.pwrite(descriptor, block[start : start + nbytes], at)
        at, nbytes, start = at + written, nbytes - written, (start + written) % len(block)

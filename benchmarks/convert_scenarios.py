"""What benchmarks/convert.py measures, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from convert_inputs import Input, llama, nanogpt

UNTIED = ("--set", "tied=false")
USUAL = ("cp", "mdl", "mdl-one", "mmap", "load", "hub", "transformers")
FEW = ("cp", "mdl", "mdl-one", "mmap", "load")


@dataclass(frozen=True)
class Scenario:
    """One comparison. ``sizes`` are gigabytes; ``base`` is the way that the others are divided by;
    ``rewrites`` says that most tensors are computed anew, not only renamed.
    """

    name: str
    title: str
    make: Callable[[Path, float], Input]
    sizes: tuple[float, ...] = (6.0,)
    ways: tuple[str, ...] = USUAL
    base: str = "cp"
    dtype: str | None = None
    mdl_args: tuple[str, ...] = UNTIED
    rewrites: bool = False
    only_when_named: bool = False


def two_ranks(folder: Path, gigabytes: float) -> Input:
    return llama(folder, gigabytes, ranks=2)


def single(folder: Path, gigabytes: float) -> Input:
    return llama(folder, gigabytes, torch.float32)


FLUSH = (*UNTIED, "--allow-flush")
LLAMA = "Meta Llama, bfloat16"
SCENARIOS = {
    s.name: s
    for s in (
        Scenario("llama", LLAMA, llama, ways=(*USUAL, "litgpt", "mergekit")),
        Scenario(
            "llama-fsync",
            f"{LLAMA}, until the disk has it",
            llama,
            ways=("cp-fsync", "mdl-fsync", "mdl-one-fsync", "mmap-fsync"),
            base="cp-fsync",
        ),
        Scenario("llama-small", LLAMA, llama, (2.0,), (*USUAL, "litgpt", "mergekit")),
        Scenario("ranks", f"{LLAMA}, two rank files joined", two_ranks, ways=FEW, rewrites=True),
        Scenario("nanogpt", "nanoGPT, float32, matrices transposed", nanogpt, ways=FEW, mdl_args=(), rewrites=True),
        Scenario("bf16-fp16", f"{LLAMA} to float16", llama, ways=FEW, dtype="float16", mdl_args=FLUSH, rewrites=True),
        Scenario("fp32-bf16", "Meta Llama, float32 to bfloat16", single, ways=FEW, dtype="bfloat16", rewrites=True),
        Scenario("sizes", f"{LLAMA}, by size", llama, (2.0, 6.0, 12.0, 20.0), ("cp", "mdl", "mmap", "load")),
        Scenario(
            "large", LLAMA, llama, (30.0,), ("cp-fsync", "mdl-fsync", "mdl-one-fsync"), "cp-fsync", only_when_named=True
        ),
    )
}

"""Small checkpoints of every family that vLLM can run: who would write them, and what the user has to say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mdl.convert.export import export
from mdl.convert.inventory import take_inventory
from mdl.convert.open import open_checkpoint
from mdl.convert.prepare import Options, prepare
from mdl.convert.stored import Files

from . import checkpoints_mistral as mistral
from . import gpts, hf, lit, servable, torchtune_cases
from .containers import CONTAINERS, taken_apart


@dataclass(frozen=True)
class Case:
    """One checkpoint. ``held`` says whose code the family's reference was held to, besides vLLM."""

    family: str
    title: str
    write: Callable[[Path], Path]
    held: str
    given: Mapping[str, str] = field(default_factory=dict[str, str])
    arch: str | None = None

    def options(self, **more: str) -> Options:
        """What the user says."""
        return Options(arch=self.arch, given={**self.given, **more})


def _saved(state: Callable[[], object]) -> Callable[[Path], Path]:
    return lambda folder: gpts.saved(folder / "model.pt", state())


def _small_gpts() -> Iterator[Case]:
    heads, nanogpt, book = {"heads": "2"}, "nanoGPT 3adf61e", "llms-from-scratch 1.0.19"
    lecture = "ng-video-lecture 5220142"
    yield Case("nanogpt", "biases, tied", lambda p: servable.nanogpt(p / "ckpt.pt"), nanogpt)
    yield Case("nanogpt", "no biases", lambda p: servable.nanogpt(p / "ckpt.pt", bias=False), nanogpt)
    yield Case("nanogpt", "head of its own", lambda p: servable.nanogpt(p / "ckpt.pt", tied=False), nanogpt)
    yield Case("nanogpt", "build-nanogpt", lambda p: gpts.build_nanogpt(p / "model_19072.pt"), "build-nanogpt")
    yield Case("mingpt", "new", _saved(gpts.mingpt), "minGPT 37baab7", heads)
    yield Case("mingpt_old", "of 2020", _saved(gpts.mingpt_old), "minGPT of 2020", heads)
    yield Case("llms_from_scratch", "q, k, v without biases", _saved(gpts.llms_from_scratch), book, heads)
    yield Case("llms_from_scratch", "with", _saved(lambda: gpts.llms_from_scratch(qkv_bias=True)), book, heads)
    yield Case(
        "ng_video_lecture", "head without a bias", _saved(gpts.lecture), lecture, {"attention_scale": "head_size"}
    )


def _llamas() -> Iterator[Case]:
    meta, single = "Meta llama 689c7f2, llama3 a0940f9", torch.float32
    yield Case("llama2c", "grouped, tied", lambda p: servable.llama2c(p / "ckpt.pt", tied=True), "llama2.c 350e04f")
    yield Case("llama2c", "head of its own", lambda p: servable.llama2c(p / "ckpt.pt"), "llama2.c 350e04f")
    given = {"tied": "false"}
    for ranks, columns in ((1, True), (2, True), (2, False)):
        how = f"{ranks} rank{'s' * (ranks > 1)}" + (", embedding by columns" if columns and ranks > 1 else "")

        def write(p: Path, ranks: int = ranks, columns: bool = columns) -> Path:
            return servable.meta(p / "release", ranks=ranks, by_columns=columns, dtype=single)

        yield Case("llama_meta", how, write, meta, given)
    scaled = {"rope_theta": 500000.0, "use_scaled_rope": True}
    yield Case("llama_meta", "scaled rope", lambda p: servable.meta(p / "release", dtype=single, **scaled), meta, given)


def _mistrals() -> Iterator[Case]:
    held = "mistral-inference 1.6.0"
    yield Case("mistral_inference", "7B", lambda p: mistral.release(p / "release"), held)
    yield Case("mistral_inference", "window", lambda p: mistral.release(p / "release", sliding_window=16), held)
    moe = mistral.MOE
    yield Case("mixtral", "experts one by one", lambda p: mistral.release(p / "release", moe=moe), held)
    said = {"rope_theta": "1000000", "context": "256", "experts_per_token": "2"}
    yield Case("mixtral", "experts stacked", lambda p: mistral.stacked(p / "release"), "Mixtral one by one", said)


def _torchtune() -> Iterator[Case]:
    for name, case in torchtune_cases.CASES.items():
        given = {"heads": "4", "context": "128", **case.given}
        write = _saved(lambda case=case: torchtune_cases.state(case))
        yield Case(case.arch, name, write, "torchtune 0.6.1", given, case.arch if case.tied else None)


def _all() -> Iterator[Case]:
    for name in hf.CLASSES:
        yield Case("huggingface", name, lambda p, name=name: hf.checkpoint(p / "folder", name), "transformers 5.19")
    yield from _small_gpts()
    yield from _llamas()
    for row in lit.ROWS:
        yield Case("litgpt", row, lambda p, row=row: lit.checkpoint(p / "folder", row), "litgpt 0.5.13")
    yield from _mistrals()
    yield from _torchtune()


WRITTEN = "as written"
"""The container that a case's own checkpoint comes in."""
BARE = (
    "safetensors",
    "safetensors, three files",
    "pytorch_model.bin",
    "pytorch_model.bin, three files",
    "accelerate",
    "DeepSpeed universal",
)
"""Containers that hold tensors alone."""

CASES: dict[str, Case] = {f"{case.family}, {case.title}": case for case in _all()}


def placed(case: Case, container: str, folder: Path) -> tuple[Path, Options]:
    """The checkpoint in its container, and what the user has to say: what the container has no place for."""
    (folder / "in").mkdir(parents=True)
    source = case.write(folder / "in")
    if container == WRITTEN:
        return source, case.options()
    content = taken_apart(source)
    (folder / "held").mkdir()
    path = CONTAINERS[container](content, folder / "held")
    if not content.settings or container not in BARE:
        return path, case.options()
    known = prepare(source, case.options()).dims.entries
    given = {name: str(dim.value).lower() for name, dim in known.items() if dim.source in ("file", "default")}
    return path, replace(case.options(**given), arch=case.family)


def comes_back(source: Path, layout: Path) -> bool:
    """Whether `mdl export` gives every weight back: names, order, types and bits. Raises MdlError."""
    ranks = take_inventory(open_checkpoint(source)).ranks
    done = export(layout, layout.parent / ("back" if ranks > 1 else "back.pt"))
    dropped = {
        lost.what.partition(" was dropped: ")[0]: lost.what for lost in done.lost if " was dropped: " in lost.what
    }
    if not all("buffer" in what or "recomputed" in what for what in dropped.values()):
        return False
    return [item for item in values(source) if item[0] not in dropped] == values(Path(done.out))


def values(path: Path) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """Type, shape and bytes of every tensor in each rank."""
    inventory = take_inventory(open_checkpoint(path))
    with Files() as files:
        return [
            (name, [(info.dtype, info.shape, files.tensor(info).read().tobytes()) for info in infos])
            for name, infos in inventory.tensors.items()
        ]

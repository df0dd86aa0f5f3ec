"""Small checkpoints of every family that vLLM can run: who would write them, and what the user has to say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from mdl.convert.export import export
from mdl.convert.inventory import take_inventory
from mdl.convert.open import open_checkpoint
from mdl.convert.prepare import Options, prepare
from mdl.convert.stored import Files

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
    servable,
    torch_gpts,
    torchtune_cases,
    xt,
)
from . import checkpoints_gemma as gemma
from . import checkpoints_llamas as llamas
from . import checkpoints_mistral as mistral
from . import checkpoints_olmo as olmo
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


def _fused(folder: Path) -> Path:
    return llamas.titan(folder, llamas.titan_fused(llamas.titan_names()))


def _trainers() -> Iterator[Case]:
    """Frameworks that train in parallel, and save what their processes hold."""
    core, fairseq, held = "megatron-core 0.16.1", "fairseq 3d262bb", "transformers' GPTNeoX"
    for row in ("llama", "llama_pairs", "llama_31", "qwen2", "qwen3", "gpt2", "neox"):
        yield Case("megatron", f"{row}, TP 2, PP 2", lambda p, row=row: megatron.grid(p, row, 2, 2), core)
    yield Case("megatron", "llama, torch_dist", lambda p: megatron.dist(p, "llama", stacked=False), core)
    yield Case("megatron_stacked", "qwen2", lambda p: megatron.dist(p, "qwen2", stacked=True), core)
    legacy = "Megatron-LM core_v0.9.0"
    for row, release in (("gpt2", "v1.0"), ("gpt2", "of 2020"), ("llama_pairs", "core_v0.8")):

        def older(p: Path, row: str = row, release: str = release) -> Path:
            return megatron_legacy.grid(p, row, release, 2)

        yield Case("megatron_legacy", f"{row}, {release}, TP 2", older, legacy)
    yield from _with_experts()
    for row, ranks in (("parallel", 2), ("fused", 2), ("serial", 1), ("tied", 1)):
        yield Case("gpt_neox", f"{row}, TP {ranks}", lambda p, r=row, n=ranks: neox.layers(p, r, n), held)
    for row, heads in blooms.HEADS.items():
        ranks = 2 if row == "bloom" else 1
        title = f"{row}, {heads} heads, TP {ranks}"
        yield Case("bloom", title, lambda p, r=row, n=ranks: blooms.layers(p, r, n), "transformers' Bloom")
    yield Case("opt", "one file", lambda p: opts.saved(p / "restored.pt", opts.state()), fairseq)
    yield Case("opt", "two parts, fused", lambda p: opts.in_parts(p / "parts", opts.fused(opts.state())), fairseq)
    yield Case("opt", "350M, two parts, fused", _opt_350m, fairseq)
    lingua, tied = "lingua 437d680", {"weight_tying": True}
    yield Case("lingua", "DCP folder", lambda p: llamas.lingua(p / "step", servable.llama_state()), lingua)
    yield Case("lingua", "tied", lambda p: llamas.lingua_consolidated(p / "x", llamas.lingua_tied(), **tied), lingua)
    given, titan = {"heads": "4", "context": "256"}, "torchtitan 0.3.0, f7084fc, 73a0e69"
    yield Case("torchtitan", "names of 0.3", lambda p: llamas.titan(p / "step", llamas.titan_names()), titan, given)
    yield Case("torchtitan", "fused q, k, v", lambda p: _fused(p / "step"), titan, given)
    yield Case("torchtitan", "tied", lambda p: llamas.titan(p / "step", llamas.titan_names(tied=True)), titan, given)
    meta, state = given | {"rope_scaling": "none"}, servable.llama_state
    yield Case("torchtitan", "names of 0.1", lambda p: llamas.titan(p / "s", state()), titan, meta, "torchtitan")


def _opt_350m(folder: Path) -> Path:
    made = opts.fused(opts.state(before=False, narrow=True))
    return opts.in_parts(folder / "parts", made, decoder_normalize_before=False)


def _with_experts() -> Iterator[Case]:
    """Megatron-LM's mixtures, in all of its forms."""
    core, moved = "megatron-core 0.16.1", "SequentialMLP, moved"
    for title, row, form, cut, whole, held in (
        ("Mixtral, SequentialMLP, TP 2, EP 2", "mixtral_pairs", "local", (2, 1, 2), False, core),
        ("Qwen3-MoE, SequentialMLP, ETP 1, TP 2, EP 4", "qwen3_moe_every", "local", (2, 1, 4), True, core),
        ("Qwen3-MoE, TEGroupedMLP, PP 2, EP 2", "qwen3_moe_first", "numbered", (1, 2, 2), False, moved),
        ("Mixtral, GroupedMLP, TP 2, EP 2", "mixtral", "grouped", (2, 1, 2), False, moved),
        ("Qwen2-MoE, SequentialMLP, TP 2, EP 2", "qwen2_moe", "local", (2, 1, 2), False, core),
        ("a shared expert without a gate, TEGroupedMLP, TP 2, PP 2", "no_gate", "numbered", (2, 2, 1), False, moved),
    ):

        def write(p: Path, row: str = row, form: str = form, cut: Any = cut, whole: bool = whole) -> Path:
            return megatron_moe.grid(p, row, form, cut, whole=whole)

        yield Case("megatron_moe", title, write, held)
    for row, stacked in (("qwen3_moe_share", True), ("mixtral", False)):
        title = f"{row}, torch_dist{', layers stacked' if stacked else ''}"
        yield Case("megatron_moe", title, lambda p, r=row, s=stacked: megatron_moe.dist(p, r, stacked=s), core)


def _researchers() -> Iterator[Case]:
    """What companies and institutes release in their own code's layout."""
    google, ai2 = "gemma_pytorch 014acb7", "ai2-olmo-core"
    for generation, said in gemma.GIVEN.items():

        def write(p: Path, n: int = generation) -> Path:
            return gemma.checkpoint(p / "gemma.ckpt", n, gemma.state(n, layers=6 if n == 3 else 2))

        yield Case("gemma_pytorch", f"Gemma {generation}", write, google, said)
    for name in olmo.CORE:
        yield Case("olmo_core", name, lambda p, name=name: olmo.core(p / "step", name), ai2)
    ssm = {"layer": "Mamba2", "headdim": 32, "d_state": mambas.STATE}
    for groups in (1, 2):

        def save(p: Path, n: int = groups) -> Path:
            return mambas.saved(p / "raw", mambas.state(2, groups=n), {**ssm, "ngroups": n}, tie_embeddings=True)

        yield Case("mamba2", f"groups: {groups}", save, "mamba_ssm e9594ce")
    for row in foundry.ROWS:
        yield Case("dbrx", row, lambda p, row=row: foundry.folder(p / "raw", row), "transformers' Dbrx and Mixtral")
    held = "transformers' Olmoe"
    yield Case("olmoe", "stacks of megablocks", lambda p: olmoes.saved(p / "raw", olmoes.state()), held)


def _others() -> Iterator[Case]:
    """Libraries of layers, and layouts of one model's own."""
    said = {"heads": "2", "norm_first": "true", "activation": "gelu", "embedding_scale": "none"}
    for name in torch_gpts.MODELS:
        write = _saved(lambda name=name: {"model_state_dict": torch_gpts.model(name).state_dict()})
        yield Case("torch_encoder", name, write, "torch 2.13", said)
    for name, case in xt.CASES.items():
        yield Case(
            "x_transformers", name, _saved(lambda case=case: xt.state(case)), "x-transformers 2.31.10", case.given
        )
    for name in ("olmo1", "olmo1_clipped", "olmo2"):
        yield Case("olmo", name, lambda p, name=name: olmo.old(p / "x", name) / "model.pt", "ai2-olmo 0.6.0")
    for row in nanochats.ROWS:

        def chat(p: Path, row: str = row) -> Path:
            return nanochats.saved(p / "d4", row)

        yield Case("nanochat", row, chat, "nanochat 3a5e0bc to 92d63d4", nanochats.given(row))
    given, held = {"context": "256"}, "torchtitan 0.3.0"
    yield Case("torchtitan_qwen3", "names of 0.3", lambda p: llamas.titan(p / "s", llamas.titan_qwen3()), held, given)
    for ranks in (1, 2):

        def split(p: Path, ranks: int = ranks) -> Path:
            return deepseeks.saved(p / "raw", deepseeks.state(), ranks)

        yield Case("deepseek_inference", f"MP {ranks}", split, "DeepSeek-V3 9b4e978")

    def packed(p: Path) -> Path:
        return deepseeks.saved(p / "raw", deepseeks.quantised(deepseeks.state()))

    yield Case("deepseek_inference", "float8", packed, "DeepSeek-V3 9b4e978")


def _all() -> Iterator[Case]:
    for name in hf.CLASSES:
        yield Case("huggingface", name, lambda p, name=name: hf.checkpoint(p / "folder", name), "transformers 5.19")
    yield from _small_gpts()
    yield from _llamas()
    for row in lit.ROWS:
        yield Case("litgpt", row, lambda p, row=row: lit.checkpoint(p / "folder", row), "litgpt 0.5.13")
    for row in ("llama_31", "qwen3_moe"):

        def before(p: Path, row: str = row) -> Path:
            return lit.checkpoint(p / "folder", row, old=True)

        yield Case("litgpt", f"{row}, rows of before 0.5.5", before, "litgpt 0.5.13")
    yield from _mistrals()
    yield from _torchtune()
    yield from _trainers()
    yield from _researchers()
    yield from _others()


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


WHOLE, SUMMED = "✓", "all but sums"
"""What can come back: everything, or everything but sums, which can't be taken apart again bit for bit."""
_NO_WEIGHT = ("buffer", "recomputed", "no weight", "not weights", "rotary table")


_SUMS = ("of rank files cannot be taken apart", "add cannot be undone exactly", "dequantize cannot be undone exactly")


def comes_back(source: Path, layout: Path) -> str:
    """WHOLE or SUMMED if `mdl export` gives every other weight back: names, order, types and bits; "" if not. Raises
    MdlError."""
    ranks = take_inventory(open_checkpoint(source)).ranks
    done = export(layout, layout.parent / ("back" if ranks > 1 else "back.pt"))
    lost = [problem.what for problem in done.lost if not problem.what.startswith("what lay beside")]
    dropped = {what.split(" was dropped: ")[0] for what in lost if any(why in what for why in _NO_WEIGHT)}
    summed = {what.split(": ")[0] for what in lost if what.endswith(_SUMS)}
    gone = dropped | {name for names in summed for name in names.split(", ")}
    kept = [item for item in values(source) if item[0] not in gone]
    if len(dropped) + len(summed) != len(lost) or kept != values(Path(done.out)):
        return ""
    return SUMMED if summed else WHOLE


def values(path: Path) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """Type, shape and bytes of every tensor in each rank."""
    inventory = take_inventory(open_checkpoint(path))
    with Files() as files:
        return [
            (name, [(info.dtype, info.shape, files.tensor(info).read().tobytes()) for info in infos])
            for name, infos in inventory.tensors.items()
        ]

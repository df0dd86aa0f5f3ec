"""Layouts hold what torch computes from the raw tensors; a conversion is all there or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mdl.archs import targets
from mdl.convert import commit, modes, run, write
from mdl.convert.manifest import read_manifest
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import Converted, convert
from mdl.errors import Kind, MdlError

from . import checkpoints as make
from . import hf
from .family import stub_target, write_family


def converted(path: Path, out: Path, *, options: Options | None = None, **more: Any) -> Converted:
    options = options or Options()
    return convert(prepare(path, options), out, tokenizer="none", **more)


def refusal(kind: Kind, path: Path, out: Path, **more: Any) -> str:
    with pytest.raises(MdlError) as caught:
        converted(path, out, **more)
    assert caught.value.kind is kind
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


NANOGPT: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied": False},
    "no_bias": {"bias": False},
    "half": {"dtype": torch.bfloat16},
    "compiled_prefix": {},
    "old_without_bias_key": {},
}


@pytest.mark.parametrize("trait", NANOGPT)
def test_nanogpt(trait: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    done = converted(request.getfixturevalue(trait), tmp_path / "out")

    make.same(make.saved(tmp_path / "out"), make.gpt2_of(make.nanogpt_state(**NANOGPT[trait])))
    assert done.files == ("model.safetensors", "config.json", "generation_config.json", "mdl.json")
    assert names(tmp_path / "out") == sorted(done.files)


def test_llama2c(llama2c: Path, tmp_path: Path) -> None:
    converted(llama2c, tmp_path / "out")

    make.same(make.saved(tmp_path / "out"), make.llama_of(make.llama_state(tied=True), 4, 2))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("by_columns", [True, False], ids=["llama2", "llama3"])
def test_rank_files(ranks: int, by_columns: bool, tmp_path: Path) -> None:
    state = make.llama_state(hidden=64, heads=8, kv_heads=8, dtype=torch.float16)
    settings = make.params(state, heads=8, kv_heads=None)
    raw = make.meta(tmp_path / "raw", state, settings, ranks=ranks, by_columns=by_columns, freqs=4)

    converted(raw, tmp_path / "out")

    make.same(make.saved(tmp_path / "out"), make.llama_of(state, 8, 8))


@pytest.mark.parametrize("trait", ["tied_ranks", "stored_twice"])
def test_a_head_that_equals_the_embedding_is_written_once(
    trait: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    converted(request.getfixturevalue(trait), tmp_path / "out")

    assert "lm_head.weight" not in make.saved(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(("value", "other"), [(float("nan"), float("nan")), (0.0, -0.0)], ids=["nan", "zero"])
def test_tied_means_the_same_bits(value: float, other: float, tmp_path: Path) -> None:
    """NaN differs from itself and 0.0 equals -0.0, but neither is what is asked."""
    state = make.llama_state(tied=True)
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    state["tok_embeddings.weight"][3, 4], state["output.weight"][3, 4] = value, other

    prepared = prepare(make.llama2c(tmp_path / "x.pt", state))

    assert prepared.dims["tied"] is (value != value)


def test_rank_files_that_should_be_equal_and_are_not(two_ranks: Path, tmp_path: Path) -> None:
    state = torch.load(two_ranks / "consolidated.01.pth")
    state["layers.1.ffn_norm.weight"][5] += 1
    torch.save(state, two_ranks / "consolidated.01.pth")

    message = refusal(Kind.INPUT, two_ranks, tmp_path / "out")

    assert "layers.1.ffn_norm.weight should be the same in every rank file, but rank 1 differs" in message
    assert not (tmp_path / "out").exists()


def test_dtype_rounds_as_torch_does(tied: Path, tmp_path: Path) -> None:
    converted(tied, tmp_path / "out", options=Options(dtype="bfloat16"))

    wanted = {name: t.bfloat16() for name, t in make.gpt2_of(make.nanogpt_state()).items()}
    make.same(make.saved(tmp_path / "out"), wanted)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert "--dtype int8" in refusal(Kind.USAGE, tied, tmp_path / "no", options=Options(dtype="int8"))


JOINS = """
    keep: [sum, mean, fused, lone, n]
    shards:
      sum: [sum]
      mean: [mean]
      disjoint: [lone]
      equal: [n]
      blocks: [{names: [fused], axis: 1, sizes: [4, 2]}]
"""


def test_the_other_ways_to_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(3)
    ranks = [{key: torch.randn(3, 3, generator=rng) for key in ("sum", "mean", "fused")} for _ in range(2)]
    for rank, held in enumerate(ranks):
        held["n"] = torch.arange(5.0)
        if rank == 1:
            held["lone"] = torch.randn(2, 2, generator=rng)
        torch.save(held, tmp_path / f"consolidated.{rank:02d}.pth")
    one, two = ranks
    wanted = {
        "sum": one["sum"] + two["sum"],
        "mean": (one["mean"] + two["mean"]) / 2,
        "fused": torch.cat([one["fused"][:, :2], two["fused"][:, :2], one["fused"][:, 2:], two["fused"][:, 2:]], dim=1),
        "lone": two["lone"],
        "n": one["n"],
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    monkeypatch.setattr(targets, "_spec", {"MadeUp": stub_target(shapes)}.get)
    arch = write_family(tmp_path / "family", JOINS)

    converted(tmp_path, tmp_path / "out", options=Options(arch=str(arch)))

    make.same(make.saved(tmp_path / "out"), wanted)


MIXED = """
    keep: [odd]
    transform:
      - {from: wide, to: [wide.a, wide.b], ops: [{cast: {dtype: float32}}, {split: {axis: 0, sizes: [1, 2]}}]}
"""


def test_wide_types_come_first_so_that_all_are_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"odd": torch.randn(3).bfloat16(), "wide": torch.randn(3, 3).double()}
    torch.save(raw, tmp_path / "x.pt")
    shapes = {"odd": (3,), "wide.a": (1, 3), "wide.b": (2, 3)}
    monkeypatch.setattr(targets, "_spec", {"MadeUp": stub_target(shapes)}.get)

    options = Options(arch=str(write_family(tmp_path / "family", MIXED)))
    converted(tmp_path / "x.pt", tmp_path / "out", options=options)

    wide = raw["wide"].float()
    make.same(make.saved(tmp_path / "out"), {"odd": raw["odd"], "wide.a": wide[:1], "wide.b": wide[1:]})
    offsets = header(tmp_path / "out/model.safetensors")
    assert [offsets[name]["data_offsets"][0] for name in ("wide.a", "wide.b", "odd")] == [0, 12, 36]


def header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))


def test_files_of_a_largest_size_and_their_index(tied: Path, tmp_path: Path) -> None:
    converted(tied, tmp_path / "out", max_shard_size=6000)

    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in header(file) if name != "__metadata__"}
    sizes = [file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files]
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(sizes)
    assert [file.name for file in files] == [
        f"model-{k + 1:05d}-of-{len(files):05d}.safetensors" for k in range(len(files))
    ]
    assert len(files) > 3
    assert max(sizes) <= 6000
    make.same(make.saved(tmp_path / "out"), make.gpt2_of(make.nanogpt_state()))


def test_a_tensor_larger_than_the_largest_size_gets_a_file_of_its_own(tied: Path, tmp_path: Path) -> None:
    done = converted(tied, tmp_path / "out", max_shard_size=1)

    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(done.manifest.tensors) == 28


def test_two_runs_write_the_same_bytes(two_ranks: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        converted(two_ranks, tmp_path / out)

    assert names(tmp_path / "one") == names(tmp_path / "two")
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_problems_stop_it_before_a_byte_is_written(extra_tensor: Path, missing_tensor: Path, tmp_path: Path) -> None:
    assert "adapter" in refusal(Kind.INPUT, extra_tensor, tmp_path / "out")
    assert "is missing" in refusal(Kind.INPUT, missing_tensor, tmp_path / "out")
    assert names(tmp_path) == ["extra.pt", "missing.pt"]


def test_a_truncated_file_is_refused(truncated_file: Path, tmp_path: Path) -> None:
    assert "cut short" in refusal(Kind.INPUT, truncated_file, tmp_path / "out")


def test_a_file_that_shrinks_after_the_plan(tied: Path, tmp_path: Path) -> None:
    prepared = prepare(tied)
    tied.write_bytes(tied.read_bytes()[:5000])

    with pytest.raises(MdlError, match="the file at 5000"):
        convert(prepared, tmp_path / "out", tokenizer="none")
    assert names(tmp_path) == ["tied.pt"]


class Stopped(Exception):  # noqa: N818 - it stands for any failure
    pass


@pytest.mark.parametrize("where", ["finish.write_configs", "finish.make_manifest", "write.Seen", "run.write_shards"])
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_in_the_middle_leaves_what_was_there(
    where: str, force: bool, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if force:
        converted(tied, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if force else None

    def fail(*_: Any, **__: Any) -> None:
        raise Stopped

    monkeypatch.setattr(f"mdl.convert.{where}", fail)
    with pytest.raises(Stopped):
        converted(tied, out, force=force)

    left = ["out.mdl-partial"] if where.startswith("finish") else []  # the weights were whole: they need not be again
    assert names(tmp_path) == [*(["out"] if force else []), *left, "tied.pt"]
    assert ({path.name: path.read_bytes() for path in out.iterdir()} if force else None) == before


def test_a_full_disk_is_told(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write.os, "pwrite", full)
    assert "No space left" in refusal(Kind.MACHINE, tied, tmp_path / "out")
    monkeypatch.undo()

    monkeypatch.setattr(commit.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert "0.0 GB are free" in refusal(Kind.MACHINE, tied, tmp_path / "out")
    assert names(tmp_path) == ["tied.pt"]


def test_a_failing_swap_brings_the_old_layout_back(
    tied: Path, untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    converted(tied, out)
    rename = Path.rename

    def reluctant(self: Path, target: Path) -> Path:
        if self.name == "layout":
            raise OSError(errno.EIO, "it does not move")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", reluctant)
    assert "it does not move" in refusal(Kind.MACHINE, untied, out, force=True)
    assert names(tmp_path) == ["out", "out.mdl-partial", "tied.pt", "untied.pt"]
    assert read_manifest(out).source["path"] == str(tied)

    monkeypatch.undo()
    assert converted(untied, out, force=True).resumed  # the weights had been written
    assert names(tmp_path) == ["out", "tied.pt", "untied.pt"]


def test_force_replaces_only_what_mdl_wrote(tied: Path, untied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    converted(tied, out)  # an empty folder is no loss
    assert "exists already" in refusal(Kind.USAGE, untied, out)

    (out / "note.txt").write_text("not of the new layout")
    converted(untied, out, force=True)
    assert read_manifest(out).source["path"] == str(untied)
    assert not (out / "note.txt").exists()

    (out / "mdl.json").unlink()
    assert "holds no mdl.json" in refusal(Kind.USAGE, tied, out, force=True)
    (tmp_path / "file").write_text("mine")
    assert "holds no mdl.json" in refusal(Kind.USAGE, tied, tmp_path / "file", force=True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_modes_that_the_user_chose(mask: int, mode: int, tied: Path, tmp_path: Path) -> None:
    old = os.umask(mask)
    try:
        converted(tied, tmp_path / "out")
    finally:
        os.umask(old)

    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {mode}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


def test_the_manifest_tells_where_everything_came_from(two_ranks: Path, tmp_path: Path) -> None:
    done = converted(two_ranks, tmp_path / "out")
    read = read_manifest(tmp_path / "out")

    assert json.loads(done.manifest.to_json()) == json.loads(read.to_json())
    (step,) = (s for s in read.steps if s["targets"] == ["model.layers.1.self_attn.k_proj.weight"])
    assert step["ops"] == [{"op": "permute_rope", "heads": 2, "rotary": 0, "back": False}]
    assert [(r["rank"], r["raw"], r["shape"]) for r in step["sources"][0]["ranks"]] == [
        (0, "layers.1.attention.wk.weight", [8, 32]),
        (1, "layers.1.attention.wk.weight", [8, 32]),
    ]
    assert step["rule"].startswith("llama_meta.yaml:")
    assert read.dim_values()["kv_heads"] == 2
    assert [Path(f["file"]).name for f in read.source["files"]] == ["consolidated.00.pth", "consolidated.01.pth"]


def test_progress_adds_up(tied: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    done = converted(tied, tmp_path / "out", progress=seen.append)

    assert sum(seen) == done.nbytes == sum(t.numel() * 4 for t in make.saved(tmp_path / "out").values())


def test_views_and_strides_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    """Tensors saved as transposed and sliced views of larger storages."""
    state = make.nanogpt_state()

    def view(tensor: Tensor) -> Tensor:
        if tensor.ndim == 2:
            return torch.cat([tensor, tensor], 1).T.contiguous().T[:, : tensor.shape[1]]
        return torch.stack([tensor, tensor], 1)[:, 0]

    strange = {name: view(tensor) for name, tensor in state.items()}
    path = make.trained(tmp_path / "x.pt", strange, make.nanogpt_args(state))

    converted(path, tmp_path / "out")

    make.same(make.saved(tmp_path / "out"), make.gpt2_of(state))


def test_the_disk_is_measured_with_the_largest_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one would be over before the disk is at its speed."""
    source = hf.checkpoint(tmp_path / "in", "LlamaForCausalLM", max_shard_size="200KB")
    largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
    prepared = prepare(source)
    assert Path(prepared.inventory.files[0]).stat().st_size < largest
    measured: list[Path] = []
    monkeypatch.setattr(modes, "copy_rate", lambda file, beside, sync: measured.append(file) or 5e8)

    way = modes.Mode(benchmark=True)
    done = modes.convert_in(way, prepared, tmp_path / "out", tokenizer="none", max_shard_size=10**9)

    assert [file.stat().st_size for file in measured] == [largest]
    assert isinstance(done, Converted)
    assert done.disk_rate == 5e8


@pytest.mark.parametrize(
    ("cores", "told", "threads"), [(1, None, 2), (3, None, 3), (64, None, 4), (64, 1, 1), (2, 9, 9)]
)
def test_one_worker_per_core_unless_told(
    cores: int, told: int | None, threads: int, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def write(*_: object, workers: int, **__: object) -> dict[str, object]:
        asked.append(workers)
        return {}

    monkeypatch.setattr(run, "cores", lambda: cores)
    monkeypatch.setattr(run, "write_shards", write)
    run.threads(prepare(tied), told, sync=False)([], tmp_path, lambda _: None)
    assert asked == [threads]

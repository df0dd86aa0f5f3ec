"""A layout becomes the original checkpoint again, bit for bit, and what can't come back is told."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.archs import targets
from mdl.convert.export import Exported, export
from mdl.convert.locks import claimed
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.errors import Kind, MdlError

from . import checkpoints as make
from .family import stub_target, write_family

TRAITS = ("tied", "untied", "no_bias", "half", "compiled_prefix", "llama2c")


def there_and_back(path: Path, tmp_path: Path, options: Options | None = None) -> tuple[Exported, Path]:
    options = options or Options()
    convert(prepare(path, options), tmp_path / "out", tokenizer="none")
    back = tmp_path / ("back" if path.is_dir() else "back.pt")
    return export(tmp_path / "out", back), back


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("trait", TRAITS)
def test_one_file(trait: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = request.getfixturevalue(trait)
    done, back = there_and_back(path, tmp_path)

    assert done.lost == ()
    before, after = loaded(path), loaded(back)
    make.same(after["model"], before["model"])
    assert list(after["model"]) == list(before["model"])
    assert {key: after[key] for key in ("model_args", "iter_num", "config")} == {
        key: before[key] for key in ("model_args", "iter_num", "config")
    }
    ends = ("lm_head.weight", "output.weight", "wte.weight", "tok_embeddings.weight")
    embedding, head = (tensor for name, tensor in after["model"].items() if name.endswith(ends))
    assert (head.data_ptr() == embedding.data_ptr()) is (trait != "untied")


@pytest.mark.parametrize("trait", ["tied_ranks", "stored_twice", "two_ranks"])
def test_rank_files(trait: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = request.getfixturevalue(trait)
    done, back = there_and_back(path, tmp_path)

    files = sorted(file.name for file in path.glob("*.pth"))
    written = {name: loaded(back / name if len(files) > 1 else back) for name in files}
    for name in files:
        before = {key: tensor for key, tensor in loaded(path / name).items() if key != "rope.freqs"}
        make.same(written[name], before)
    says = [problem.what for problem in done.lost]
    dropped = ["rope.freqs was dropped: recomputed from rope_theta"] if trait == "two_ranks" else []
    assert says == [*dropped, "what lay beside the weights (params) is not written"]


def test_a_layout_of_the_export_is_the_same_layout(compiled_prefix: Path, tmp_path: Path) -> None:
    _, back = there_and_back(compiled_prefix, tmp_path)
    convert(prepare(back), tmp_path / "again", tokenizer="none")

    make.same(make.saved(tmp_path / "again"), make.saved(tmp_path / "out"))


def test_dropped_buffers_are_told(old_without_bias_key: Path, tmp_path: Path) -> None:
    done, back = there_and_back(old_without_bias_key, tmp_path)

    assert [p.what.split(":")[0] for p in done.lost] == [f"transformer.h.{i}.attn.bias was dropped" for i in range(2)]
    assert not any(name.endswith(".attn.bias") for name in loaded(back)["model"])


def test_rounding_is_told_and_widening_comes_back(tied: Path, half: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    rounded, _ = there_and_back(tied, tmp_path / "a", Options(dtype="bfloat16"))
    assert len(rounded.lost) == 29
    assert rounded.tensors == 0
    assert "was rounded from float32 to bfloat16" in rounded.lost[0].what
    assert rounded.lost[-1].what == "lm_head.weight: its twin could not be brought back"

    widened, back = there_and_back(half, tmp_path / "b", Options(dtype="float32"))
    assert widened.lost == ()
    make.same(loaded(back)["model"], loaded(half)["model"])


LOSSY = """
    keep: [whole]
    transform:
      - {from: vocab, ops: [{slice: {stop: vocab}}]}
      - {from: rounded, ops: [{cast: {dtype: float16}}]}
      - {from: shifted, ops: [{add: {value: 1}}]}
      - {from: third, ops: [{scale: {value: 0.3}}]}
      - {from: twice, ops: [{scale: {value: 2}}]}
      - {from: grown, ops: [{pad: {to: vocab}}]}
      - {from: scalar, to: one, ops: [{reshape: {to: [1]}}]}
      - from: [q, k]
        to: qk
        ops: [{parts: [[{permute_rope: {heads: heads}}], [{permute_rope: {heads: 1}}]]}, {concat: {axis: 0}}]
      - from: fused
        to: [a, b, c]
        ops:
          - split: {sizes: [8, 4, 2]}
          - parts: [[{permute_rope: {heads: heads}}, transpose], [{scale: {value: 2}}], []]
    drop: {mask: a buffer}
"""


def test_every_one_way_operation_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(5)
    shapes = {"whole": (3,), "vocab": (11, 2), "rounded": (4,), "shifted": (4,), "third": (4,), "twice": (4,)}
    shapes |= {"grown": (5, 2), "q": (8, 3), "k": (4, 3), "fused": (14, 3), "mask": (2, 2)}
    raw = {name: torch.randn(*shape, generator=rng) for name, shape in shapes.items()} | {"scalar": torch.tensor(2.5)}
    torch.save({"model": raw}, tmp_path / "x.pt")
    wanted = {k: v for k, v in shapes.items() if k not in ("mask", "q", "k", "fused")}
    wanted |= {"vocab": (8, 2), "grown": (8, 2), "one": (1,), "qk": (12, 3), "a": (3, 8), "b": (4, 3), "c": (2, 3)}
    monkeypatch.setattr(targets, "_spec", {"MadeUp": stub_target(wanted)}.get)

    options = Options(arch=str(write_family(tmp_path / "family", LOSSY)))
    monkeypatch.chdir(tmp_path / "family")  # from where the mapping is named by its name alone
    done, back = there_and_back(tmp_path / "x.pt", tmp_path, options)

    assert sorted(problem.what.partition(":")[0] for problem in done.lost) == [
        "mask was dropped", "rounded", "shifted", "third", "vocab"
    ]  # fmt: skip
    assert all(problem.where.startswith("made_up.yaml:") for problem in done.lost)
    kept = {name: raw[name] for name in ("whole", "twice", "grown", "scalar", "q", "k", "fused")}
    make.same(loaded(back)["model"], kept)


def test_a_settings_file_named_like_the_wrapper_does_not_replace_the_weights(tmp_path: Path) -> None:
    torch.save({"params": make.nanogpt_state()}, tmp_path / "x.pt")
    (tmp_path / "params.json").write_text('{"from": "a file beside the weights"}')
    options = Options(given={"n_head": "2", "activation": "gelu"})

    _, back = there_and_back(tmp_path / "x.pt", tmp_path, options)

    make.same(loaded(back)["params"], make.nanogpt_state())


def test_a_changed_layout_is_refused(tied: Path, tmp_path: Path) -> None:
    there_and_back(tied, tmp_path)
    with pytest.raises(MdlError) as exists:
        export(tmp_path / "out", tmp_path / "back.pt")
    assert exists.value.kind is Kind.USAGE

    (tmp_path / "out/config.json").write_text("{}")
    with pytest.raises(MdlError, match="was changed after mdl convert wrote it") as changed:
        export(tmp_path / "out", tmp_path / "back.pt", force=True)
    assert changed.value.kind is Kind.INPUT


def test_a_disk_that_takes_no_more(tied: Path, tmp_path: Path) -> None:
    convert(prepare(tied), tmp_path / "out", tokenizer="none")
    (tmp_path / "place").mkdir()
    command = [Path(sys.executable).with_name("mdl"), "export", tmp_path / "out", tmp_path / "place" / "back.pt"]
    limit = (20_000, 20_000)

    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )

    assert done.returncode == 4
    assert "writing failed" in done.stderr
    assert list((tmp_path / "place").iterdir()) == []


def test_two_exports_into_one_file(tied: Path, tmp_path: Path) -> None:
    convert(prepare(tied), tmp_path / "out", tokenizer="none")
    with claimed(tmp_path / "back.pt"), pytest.raises(MdlError, match="is writing it at this moment") as busy:
        export(tmp_path / "out", tmp_path / "back.pt")
    assert busy.value.kind is Kind.MACHINE

    export(tmp_path / "out", tmp_path / "back.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pt", "out", "tied.pt"]


def refused(layout: Path, out: Path, *, force: bool = False) -> str:
    with pytest.raises(MdlError) as caught:
        export(layout, out, force=force)
    assert caught.value.kind is Kind.USAGE
    return str(caught.value)


def test_force_replaces_only_what_an_export_wrote(tied: Path, tmp_path: Path) -> None:
    _, back = there_and_back(tied, tmp_path)
    code = tmp_path / "model.py"
    code.write_text("precious = True\n")
    before = tied.read_bytes()

    assert "--force only replaces what this command wrote" in refused(tmp_path / "out", tied, force=True)
    assert "--force only replaces what this command wrote" in refused(tmp_path / "out", code, force=True)
    assert (tied.read_bytes(), code.read_text()) == (before, "precious = True\n")
    export(tmp_path / "out", back, force=True)
    make.same(loaded(back)["model"], loaded(tied)["model"])


def test_force_replaces_only_rank_files_that_an_export_wrote(two_ranks: Path, tmp_path: Path) -> None:
    _, back = there_and_back(two_ranks, tmp_path)
    export(tmp_path / "out", back, force=True)

    assert "--force only replaces" in refused(tmp_path / "out", two_ranks, force=True)
    assert "exists already" in refused(tmp_path / "out", back)


@pytest.mark.parametrize(
    ("name", "says"),
    [("no/such/back.pt", "does not exist"), ("out", "this is a folder"), ("back.safetensors", "torch's own format")],
)
def test_a_place_that_is_none_is_told_before_any_work(name: str, says: str, tied: Path, tmp_path: Path) -> None:
    convert(prepare(tied), tmp_path / "out", tokenizer="none")
    before = sorted(tmp_path.rglob("*"))

    assert says in refused(tmp_path / "out", tmp_path / name, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_shards_come_back_as_one_file_with_all_tensors(tmp_path: Path) -> None:
    state = make.nanogpt_state(tied=False)
    names = list(state)
    (tmp_path / "sharded").mkdir()
    for k, part in enumerate((names[:10], names[10:]), start=1):
        file = tmp_path / "sharded" / f"pytorch_model-{k:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, file)
    options = Options(given={"n_head": "2", "activation": "gelu"})
    convert(prepare(tmp_path / "sharded", options), tmp_path / "out", tokenizer="none")

    done = export(tmp_path / "out", tmp_path / "back.pt")

    assert done.files == (str(tmp_path / "back.pt"),)
    make.same(loaded(tmp_path / "back.pt"), state)

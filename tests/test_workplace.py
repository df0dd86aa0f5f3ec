"""What lies beside OUT while it is made is taken at its word, so nobody else may have put it there."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from mdl.convert import commit, stored
from mdl.convert.agreement import agree
from mdl.convert.check import check_layout
from mdl.convert.commit import work_path
from mdl.convert.manifest import read_manifest
from mdl.convert.parts import Contributed, convert_part, parse_part
from mdl.convert.prepare import prepare
from mdl.convert.receipts import receipt
from mdl.convert.run import Converted, convert
from mdl.convert.shards import assign
from mdl.errors import Kind, MdlError
from mdl.mappings.tensors import TensorInfo

from . import checkpoints as make
from .test_resume import SMALL, Ended, ended_after, finished, here, names


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.nanogpt(tmp_path_factory.mktemp("source") / "x.pt", make.nanogpt_state(layers=12))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def interrupt(source: Path, place: Path, **more: Any) -> None:
    with pytest.raises(Ended):
        here(source, place / "out", progress=ended_after(100_000), **more)


def part(source: Path, out: Path, text: str, **more: Any) -> Converted | Contributed:
    arguments: dict[str, Any] = {"tokenizer": "none", "max_shard_size": SMALL, **more}
    return convert_part(prepare(source), out, parse_part(text), **arguments)


def test_nobody_else_may_look_into_it_and_the_layout_has_its_usual_mode(source: Path, place: Path) -> None:
    interrupt(source, place)
    assert (place / "out.mdl-partial").stat().st_mode & 0o777 == 0o700

    here(source, place / "out")
    umask = os.umask(0)
    os.umask(umask)
    assert (place / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (place / "out/model-00001-of-00009.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_folder_that_others_could_write_is_begun_anew(source: Path, place: Path) -> None:
    interrupt(source, place)
    (place / "out.mdl-partial").chmod(0o755)

    assert here(source, place / "out").resumed == ()
    assert names(place) == ["out"]


@pytest.mark.parametrize("what", ["work", "layout"])
def test_a_link_in_its_place_leads_nowhere(source: Path, place: Path, tmp_path: Path, what: str) -> None:
    precious = tmp_path / "precious"
    (precious / "layout").mkdir(parents=True)
    (precious / "thesis.txt").write_text("years")
    agreement = agree(prepare(source), assign(prepare(source).plan, SMALL))
    work = place / "out.mdl-partial"
    if what == "work":
        agreement.write(precious)
        work.symlink_to(precious)
        with pytest.raises(MdlError, match="a link or somebody else's") as caught:
            here(source, place / "out")
        assert caught.value.kind is Kind.MACHINE
    else:
        work.mkdir(mode=0o700)
        agreement.write(work)
        (work / "layout").symlink_to(precious)
        here(source, place / "out")
        assert not (place / "out").is_symlink()
    assert (precious / "thesis.txt").read_text() == "years"
    assert (precious / "layout").is_dir()


def test_somebody_elses_folder_is_refused(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, place)
    monkeypatch.setattr(commit.os, "geteuid", lambda: os.getuid() + 1)

    with pytest.raises(MdlError, match="somebody else's"):
        here(source, place / "out")
    assert names(place) == ["out.mdl-partial"]


def test_a_weight_file_that_is_a_link_is_written_again(source: Path, place: Path, tmp_path: Path) -> None:
    interrupt(source, place)
    first = place / "out.mdl-partial/layout" / min(finished(place))
    shutil.move(first, tmp_path / "elsewhere")
    first.symlink_to(tmp_path / "elsewhere")

    assert first.name not in here(source, place / "out").resumed
    assert not (place / "out" / first.name).is_symlink()


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{}", '{"tensors": [{"name": "x"}]}', "null", "\ud800", '{"tensors": 3}', "NaN"],
    ids=range(7),
)
def test_a_receipt_that_is_none(source: Path, place: Path, text: str) -> None:
    shard = assign(prepare(source).plan, SMALL)[0]
    (place / f"{shard.file}.receipt.json").write_bytes(text.encode(errors="surrogatepass"))
    assert receipt(place, shard) is None


def test_counts_in_a_receipt_are_counts(source: Path, place: Path) -> None:
    interrupt(source, place)
    name = min(finished(place))
    path = place / "out.mdl-partial" / f"{name}.receipt.json"
    path.write_text(path.read_text().replace('"nan": 0', '"nan": "0"'))

    assert name not in here(source, place / "out").resumed


def test_a_read_error_of_the_source_loses_nothing(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, place)
    before = finished(place)

    def broken(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(stored.Calls, "read", lambda *_, **__: broken())
        with pytest.raises(MdlError, match="can't be read at byte") as caught:
            here(source, place / "out")
    assert caught.value.kind is Kind.MACHINE
    # Matrices that are turned come from a map: another thread may have finished a file of those.
    assert finished(place).items() >= before.items()
    assert set(before) <= set(here(source, place / "out").resumed)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_what_nobody_foresaw_loses_nothing(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    interrupt(source, place)
    before = finished(place)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("mdl.convert.run.write_shards", fail)
        with pytest.raises(type(error)):
            here(source, place / "out")
    assert finished(place) == before


def test_a_mistyped_tokenizer_is_told_first_and_loses_nothing(source: Path, place: Path) -> None:
    interrupt(source, place)
    before = finished(place)
    typo: dict[str, Any] = {"tokenizer": str(place / "typo"), "max_shard_size": SMALL}

    with pytest.raises(MdlError, match="typo"):
        convert(prepare(source), place / "out", **typo)
    with pytest.raises(MdlError, match="typo"):
        part(source, place / "out", "1/2", **typo)
    assert finished(place) == before


def test_parts_agree_on_the_tokenizer_too(source: Path, place: Path, tmp_path: Path) -> None:
    table = {"stoi": {c: k for k, c in enumerate("abcdefgh")}, "itos": dict(enumerate("abcdefgh"))}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(table))
    part(source, place / "out", "1/2")

    with pytest.raises(MdlError, match="something else is being written here"):
        part(source, place / "out", "2/2", tokenizer=str(tmp_path / "meta.pkl"))
    assert isinstance(part(source, place / "out", "2/2"), Converted)


def test_a_checkpoint_that_was_written_again_under_its_name(place: Path, tmp_path: Path) -> None:
    """The next step's checkpoint may have the same size and, but for one tensor in the middle, the same bytes."""
    state = make.llama_state(hidden=256, ffn=1024, vocab=1024, layers=4)
    path = make.llama2c(tmp_path / "x.pt", state)
    convert_it: dict[str, Any] = {"tokenizer": "none", "max_shard_size": 500_000}
    with pytest.raises(Ended):
        convert(prepare(path), place / "out", progress=ended_after(6_000_000), **convert_it)
    assert finished(place)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    assert convert(prepare(path), place / "out", **convert_it).resumed == ()


def test_two_last_parts_with_force_make_it_once(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both saw that nothing is missing; while one waits for the lock the other makes the layout."""
    import mdl.convert.parts as parts

    convert(prepare(source), place / "out", tokenizer="none")
    part(source, place / "out", "1/2", force=True)
    real = parts.carry_out

    def after_another(*given: Any, **more: Any) -> Any:
        monkeypatch.setattr(parts, "carry_out", real)
        assert isinstance(part(source, place / "out", "1/2", force=True), Converted)
        return real(*given, **more)

    monkeypatch.setattr(parts, "carry_out", after_another)
    late = part(source, place / "out", "2/2", force=True)

    assert isinstance(late, Contributed)
    assert names(place) == ["out"]
    assert check_layout(place / "out", read_manifest(place / "out")) == []


def test_litter_of_killed_parts_goes(source: Path, place: Path) -> None:
    (place / ".out.mdl-partial.1-ab/layout").mkdir(parents=True)
    (place / ".outer.mdl-partial.1-ab").mkdir()
    part(source, place / "out", "1/1")
    assert names(place) == [".outer.mdl-partial.1-ab", "out"]

    work_path(place / "out").mkdir()  # killed after the rename
    (place / "out.mdl-lock").touch()
    assert isinstance(part(source, place / "out", "1/1"), Contributed)
    assert names(place) == [".outer.mdl-partial.1-ab", "out"]


def test_a_link_as_the_place(source: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (place / "out").symlink_to(tmp_path / "real")

    for force in (False, True, True):
        here(source, place / "out", force=force)
        assert names(place) == ["out"]
        assert (tmp_path / "real/mdl.json").is_file()
        assert (place / "out").is_symlink()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux tells them")
def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infos = []
    for k in range(100):
        (tmp_path / str(k)).write_bytes(b"\1")
        infos.append(TensorInfo("x", (1,), "uint8", str(tmp_path / str(k)), 0, (1,), "x"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        with stored.Files() as files:
            assert sum(int(files.tensor(info).read()[0]) for info in infos) == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

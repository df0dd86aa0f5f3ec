"""A conversion that is ended at any moment loses nothing: no layout is half made, no finished file is written twice."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert import commit, write
from mdl.convert.check import check_layout
from mdl.convert.manifest import read_manifest
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import SLACK, Converted, convert
from mdl.errors import Kind, MdlError

from . import checkpoints as make

SMALL = 20_000
"""Largest weight file in these tests: a checkpoint of theirs becomes a dozen files."""
MDL = Path(sys.executable).with_name("mdl")
Facts = dict[str, tuple[int, int]]


def here(source: Path, out: Path, **more: Any) -> Converted:
    return convert(prepare(source), out, tokenizer="none", max_shard_size=SMALL, **more)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_folders(one: Path, other: Path) -> None:
    assert names(one) == names(other)
    for name in names(one):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def finished(place: Path) -> Facts:
    """Every weight file that is whole, by inode and time of its last change."""
    stats = {path.name: path.stat() for path in place.glob("out.mdl-partial/layout/model*.safetensors")}
    return {name: (s.st_ino, s.st_mtime_ns) for name, s in stats.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = make.nanogpt_state(layers=12)
    return make.nanogpt(tmp_path_factory.mktemp("source") / "x.pt", state)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


class Ended(KeyboardInterrupt):
    """What a signal raises."""


def ended_after(count: int) -> Any:
    """A progress callback that ends the run once so many bytes are written."""
    seen = [0]

    def progress(n: int) -> None:
        seen[0] += n
        if seen[0] > count:
            raise Ended

    return progress


def interrupted(source: Path, place: Path, after: int = 100_000, **more: Any) -> list[str]:
    said: list[str] = []
    with pytest.raises(Ended):
        here(source, place / "out", progress=ended_after(after), say=said.append, **more)
    return said


@pytest.mark.parametrize("workers", [1, 3])
def test_what_was_finished_is_not_written_again(source: Path, place: Path, tmp_path: Path, workers: int) -> None:
    (said,) = interrupted(source, place, workers=workers)
    before = finished(place)
    assert len(before) > 2
    assert f"{len(before)} of " in said
    assert "stay in out.mdl-partial: the same command goes on from there" in said
    assert not (place / "out").exists()

    written: list[int] = []
    done = here(source, place / "out", progress=written.append, workers=workers)

    assert set(done.resumed) == set(before)
    assert done.copied < done.nbytes == sum(written)
    assert names(place) == ["out"]
    after = {name: (s.st_ino, s.st_mtime_ns) for name in before for s in [(place / "out" / name).stat()]}
    assert after == before
    here(source, tmp_path / "whole")
    same_folders(place / "out", tmp_path / "whole")


@pytest.mark.parametrize("how", ["bytes", "header", "short", "receipt", "gone"])
def test_what_does_not_hold_its_hash_is_written_again(source: Path, place: Path, how: str) -> None:
    interrupted(source, place)
    first = place / "out.mdl-partial/layout" / min(finished(place))
    receipt = place / "out.mdl-partial" / (first.name + ".receipt.json")
    data = bytearray(first.read_bytes())
    if how == "receipt":
        receipt.write_text(receipt.read_text().replace('"xxh3": "', '"xxh3": "0'))
    elif how == "gone":
        receipt.unlink()
    else:
        data[{"bytes": -1, "header": 9, "short": 0}[how]] ^= 1
        first.write_bytes(data[:-1] if how == "short" else data)
    kept = set(finished(place)) - {first.name}

    done = here(source, place / "out")

    assert set(done.resumed) == kept
    assert check_layout(place / "out", read_manifest(place / "out")) == []


@pytest.mark.parametrize("what", ["dtype", "size", "source", "nothing"])
def test_another_conversion_starts_clean(source: Path, place: Path, tmp_path: Path, what: str) -> None:
    interrupted(source, place)
    options, size, other = Options(), SMALL, source
    if what == "dtype":
        options = Options(dtype="bfloat16")
    if what == "size":
        size += 4096
    if what == "source":
        other = tmp_path / source.name
        data = bytearray(source.read_bytes())
        data[len(data) // 2 - 100] ^= 1  # beyond the ends that are always hashed, if the file were larger
        other.write_bytes(data)
    resumed = convert(prepare(other, options), place / "out", tokenizer="none", max_shard_size=size).resumed

    assert bool(resumed) is (what == "nothing")
    assert names(place) == ["out"]
    assert check_layout(place / "out", read_manifest(place / "out")) == []


def test_a_fault_of_the_input_leaves_nothing(place: Path, tmp_path: Path) -> None:
    state = make.nanogpt_state(layers=12)
    state["transformer.ln_f.weight"] = torch.full_like(state["transformer.ln_f.weight"], float("nan"))
    broken = make.nanogpt(tmp_path / "broken.pt", state)

    with pytest.raises(MdlError, match="NaN"):
        here(broken, place / "out")
    assert names(place) == []


def test_a_disk_that_fills_up(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, written, said = os.pwrite, [0], list[str]()

    def full(descriptor: int, view: memoryview, at: int) -> int:
        written[0] += len(view)
        if written[0] > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, view[: max(1, len(view) // 2)], at)  # and a write may stop short

    with monkeypatch.context() as patch:
        patch.setattr(write.os, "pwrite", full)
        with pytest.raises(MdlError, match="No space left") as caught:
            here(source, place / "out", say=said.append)
    assert caught.value.kind is Kind.MACHINE
    assert not (place / "out").exists()
    assert not [name for name in names(place / "out.mdl-partial") if name.startswith(".")]
    assert "stay in out.mdl-partial" in said[0]

    kept = sum((place / "out.mdl-partial/layout" / name).stat().st_size for name in finished(place))
    room = prepare(source).plan.nbytes + SLACK - kept // 2  # for what is missing, not for all of it again
    monkeypatch.setattr(commit.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, room))
    assert here(source, place / "out").resumed
    assert names(place) == ["out"]


def test_a_source_that_is_cut_while_it_is_read(source: Path, place: Path, tmp_path: Path) -> None:
    """Through a map this would be SIGBUS, the end of the process."""
    victim = tmp_path / "victim.pt"
    shutil.copy(source, victim)
    prepared = prepare(victim)

    with pytest.raises(MdlError, match="became shorter while it was read") as caught:
        convert(
            prepared,
            place / "out",
            tokenizer="none",
            progress=lambda _: os.truncate(victim, 20_000),
        )
    assert caught.value.kind is Kind.INPUT
    assert str(victim) in str(caught.value)
    assert names(place) == []


def test_ctrl_c_keeps_what_is_finished(source: Path, place: Path) -> None:
    """The program itself, by its signal; slowed down, so that there is a middle."""
    slow = (
        "import os, sys, time\nfrom mdl.convert import write\nfrom mdl.cli import main\n"
        "fsync = os.fsync\nwrite.os.fsync = lambda d: (time.sleep(0.3), fsync(d))\nmain()"
    )
    command = [sys.executable, "-c", slow, "convert", source, place / "out", "--tokenizer", "none"]
    child = subprocess.Popen([*command, "--max-shard-size", "20kB"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(finished(place)) < 2:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[1]

    assert child.returncode == 130, said
    assert "weight files are whole and stay in out.mdl-partial" in said
    assert "Traceback" not in said
    assert names(place) == ["out.mdl-partial"]
    assert here(source, place / "out").resumed


KILLED = 100


def test_a_hundred_kills_lose_nothing(source: Path, place: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments of conversions that follow each other, until there were a hundred.

    Children are forked from a process that has everything imported, so that a run is short and the moments fall all
    over it: while files are written, between them, while they are hashed again, while the layout is made.
    """
    script = tmp_path / "kills.py"
    script.write_text(KILLS)
    here(source, tmp_path / "whole")

    done = subprocess.run(
        [sys.executable, script, source, place, str(KILLED)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    kills, made, resumed = map(int, done.stdout.split())
    assert kills == KILLED
    assert made > 2
    assert resumed > KILLED / 4  # runs found what others had finished
    same_folders(place / "out", tmp_path / "whole")
    assert names(place) == ["out"]


KILLS = """
import os, random, shutil, signal, sys, time
from pathlib import Path

from mdl.convert.check import check_layout
from mdl.convert.manifest import read_manifest
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert

source, place, wanted = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rng, out = random.Random(0), place / "out"
prepared = prepare(source)


def run(workers):
    convert(prepared, out, tokenizer="none", max_shard_size=20_000, workers=workers)


def started(workers):
    child = os.fork()
    if child == 0:
        try:
            run(workers)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def whole_files():
    return {(p.name, p.stat().st_ino) for p in place.glob("out.mdl-partial/layout/model*.safetensors")
            if (place / "out.mdl-partial" / (p.name + ".receipt.json")).exists()}


begin = time.perf_counter()
run(1)
length = time.perf_counter() - begin
shutil.rmtree(out)
kills = made = resumed = 0
while kills < wanted:
    before = whole_files()
    child = started(rng.choice((1, 2)))
    time.sleep(rng.random() * length * 1.3)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        kills += 1
    else:
        assert os.WEXITSTATUS(status) == 0, status
    if out.exists():
        assert check_layout(out, read_manifest(out)) == []
        kept = {(p.name, p.stat().st_ino) for p in out.glob("model*.safetensors")}
        made += 1
        shutil.rmtree(out)
    else:
        kept = whole_files()
    assert before <= kept, (before, kept)
    resumed += bool(before)
run(1)
print(kills, made + 1, resumed)
"""

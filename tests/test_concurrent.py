"""Several runs at once, killed runs, full or closed disks: a layout is whole or not there, and somebody says why.

The runs are processes of their own. Where one must be caught in the middle, it stops at its first written byte until a
file appears.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mdl import serve as serving
from mdl.convert import commit, locks, write
from mdl.convert.check import check_layout
from mdl.convert.locks import lock_path, reading
from mdl.convert.manifest import read_manifest
from mdl.convert.prepare import prepare
from mdl.convert.run import convert
from mdl.errors import Kind, MdlError
from mdl.validate.ready import ready_layout
from mdl.validate.verify import verify

from . import checkpoints as make

MDL = Path(sys.executable).with_name("mdl")
CONVERTING = """
import sys, time
from pathlib import Path
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert

source, out, flags, force = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "force"

def pause(_):
    (flags / "started").touch()
    while not (flags / "go").exists():
        time.sleep(0.01)

convert(prepare(source), out, tokenizer="none", force=force, progress=pause)
"""
READING = """
import sys, time
from pathlib import Path
from mdl.convert.locks import reading

with reading(Path(sys.argv[1])):
    (Path(sys.argv[2]) / "started").touch()
    time.sleep(600)
"""


class Child:
    """A process that has come to its middle."""

    def __init__(self, flags: Path, code: str, *arguments: object) -> None:
        self.flags = flags
        flags.mkdir()
        self.process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not (flags / "started").exists():
            assert self.process.poll() is None, self.process.stderr.read().decode()  # type: ignore[union-attr]  # piped
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def finish(self) -> int:
        (self.flags / "go").touch()
        return self.process.wait(60)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where layouts go in these tests, with nothing else in it."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def converting(tied: Path, tmp_path: Path, place: Path) -> Iterator[Child]:
    """A conversion of the tied checkpoint into place/out, stopped in the middle."""
    child = Child(tmp_path / "flags", CONVERTING, tied, place / "out", tmp_path / "flags", "")
    yield child
    child.kill()


def run(*arguments: object, **more: Any) -> tuple[int, str]:
    done = subprocess.run([MDL, *map(str, arguments)], capture_output=True, text=True, check=False, **more)
    return done.returncode, done.stderr


def here(source: Path, out: Path, **more: Any) -> Any:
    return convert(prepare(source), out, tokenizer="none", **more)


def refusal(kind: Kind, source: Path, out: Path, **more: Any) -> str:
    with pytest.raises(MdlError) as caught:
        here(source, out, **more)
    assert caught.value.kind is kind
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def whole(out: Path, source: Path) -> bool:
    manifest = read_manifest(out)
    return not check_layout(out, manifest) and manifest.source["path"] == str(source)


def test_the_second_is_told_who_is_first_and_the_first_is_not_disturbed(
    converting: Child, tied: Path, untied: Path, place: Path
) -> None:
    assert names(place) == ["out.mdl-lock", "out.mdl-partial"]

    code, said = run("convert", untied, place / "out", "--tokenizer", "none")
    assert code == 4
    assert f"process {converting.process.pid} on " in said
    assert "is writing it at this moment" in said
    assert run("convert", untied, place / "out", "--force")[0] == 4
    assert run("convert", untied, place / "other", "--tokenizer", "none")[0] == 0

    assert converting.finish() == 0
    assert names(place) == ["other", "out"]
    assert whole(place / "out", tied)


def test_many_at_once_make_one(tied: Path, place: Path) -> None:
    command = [MDL, "convert", tied, place / "out", "--tokenizer", "none"]
    runs = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(5)]
    said = [child.communicate()[1] for child in runs]
    codes = [child.returncode for child in runs]

    assert codes.count(0) == 1
    assert set(codes) <= {0, 2, 4}
    assert all("exists already" in text or "is writing it" in text for text in said if text)
    assert names(place) == ["out"]
    assert whole(place / "out", tied)


def test_a_killed_run_leaves_no_lock_and_its_litter_goes(converting: Child, untied: Path, place: Path) -> None:
    converting.kill()
    assert names(place) == ["out.mdl-lock", "out.mdl-partial"]

    here(untied, place / "out")

    assert names(place) == ["out"]
    assert whole(place / "out", untied)


def test_a_process_id_proves_nothing(tied: Path, place: Path) -> None:
    """The lock file of a dead run names a process that lives: ids come again, in containers above all."""
    lock_path(place / "out").write_text(f"process {os.getppid()} on this machine")
    (place / "out.mdl-partial").mkdir()
    (place / "out.mdl-partial" / "model.safetensors").write_bytes(b"half of it")

    here(tied, place / "out")

    assert names(place) == ["out"]


def test_a_layout_that_a_killed_run_had_set_aside_comes_back(tied: Path, untied: Path, place: Path) -> None:
    here(tied, place / "out")
    (place / "out").rename(place / "out.mdl-old")

    assert "exists already" in refusal(Kind.USAGE, untied, place / "out")
    assert names(place) == ["out"]
    assert whole(place / "out", tied)


def test_what_is_read_is_not_replaced(tied: Path, untied: Path, place: Path, tmp_path: Path) -> None:
    out = place / "out"
    here(tied, out)
    reader = Child(tmp_path / "flags", READING, out, tmp_path / "flags")

    code, said = run("convert", untied, out, "--force", "--tokenizer", "none")
    assert code == 4
    assert "is being read at this moment" in said
    assert whole(out, tied)
    with reading(out):  # readers do not keep each other away
        assert run("check", out)[0] == 0
    reader.kill()

    here(untied, out, force=True)
    assert names(place) == ["out"]
    assert whole(out, untied)


def test_what_is_being_replaced_is_not_read(tied: Path, untied: Path, place: Path, tmp_path: Path) -> None:
    out = place / "out"
    here(tied, out)
    child = Child(tmp_path / "flags", CONVERTING, untied, out, tmp_path / "flags", "force")
    for read in (verify, lambda layout: ready_layout(layout, unverified=True, say=lambda _: None)):
        with pytest.raises(MdlError, match="is replacing it at this moment") as caught:
            read(out)
        assert caught.value.kind is Kind.MACHINE
    assert run("check", out)[0] == 4
    assert run("export", out, tmp_path / "back.pt")[0] == 4

    assert child.finish() == 0
    assert run("check", out)[0] == 0
    assert whole(out, untied)


def test_a_file_system_without_locks(tied: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    done = here(tied, place / "out")
    assert any("has no locks" in note for note in done.manifest.notes)
    assert names(place) == ["out"]
    with reading(place / "out"):
        here(tied, place / "out", force=True)

    (place / "new.mdl-partial").mkdir()
    said = refusal(Kind.MACHINE, tied, place / "new")
    assert "another run is writing here or was killed" in said
    assert "remove new.mdl-partial" in said
    assert names(place) == ["new.mdl-partial", "out"]


def test_a_lock_file_that_another_run_just_removed_is_no_lock(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening and the locking of the file the run that had it may end, and a third one make a new one."""
    flock, calls = fcntl.flock, []

    def late(descriptor: int, kind: int) -> None:
        if not calls:
            lock_path(place / "out").unlink()
        calls.append(kind)
        flock(descriptor, kind)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with locks.claimed(place / "out") as claim:
        assert claim.certain
        assert len(calls) == 2
        assert names(place) == ["out.mdl-lock"]
    assert names(place) == []


def test_folders_made_for_a_layout_go_with_it(missing_tensor: Path, place: Path) -> None:
    state = make.nanogpt_state()
    state["transformer.wpe.weight"][0, 0] = float("nan")
    broken = make.nanogpt(missing_tensor.with_name("broken.pt"), state)

    refusal(Kind.INPUT, broken, place / "a" / "b" / "out")

    assert names(place) == []


def test_here_is_a_place(tied: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "out").mkdir()
    monkeypatch.chdir(place / "out")

    here(tied, Path())

    assert names(place) == ["out"]
    assert whole(place / "out", tied)


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_disk_that_takes_no_more(tied: Path, place: Path) -> None:
    """The largest file allowed is smaller than the weights: the kernel's own refusal, in the middle of the work."""
    code, said = run("convert", tied, place / "sub" / "out", preexec_fn=limited)

    assert code == 4
    assert "writing failed: File too large" in said
    assert "another disk" in said
    assert names(place) == []


def test_a_full_disk(tied: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "none", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        assert "are free" in refusal(Kind.MACHINE, tied, place / "out")
        monkeypatch.setattr(commit.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10**12))
        said = refusal(Kind.MACHINE, tied, place / "out")
        assert "writing failed: No space left on device" in said
        assert not (place / "out").exists()
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        said = refusal(Kind.MACHINE, tied, place / "out")
        assert "Read-only file system" in said
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EOPNOTSUPP, False)])
def test_a_full_disk_is_told_before_an_hour_of_copying(
    number: int, told: bool, tied: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    written: list[int] = []
    monkeypatch.setattr(write.os, "posix_fallocate", refuse)
    if told:
        assert os.strerror(number) in refusal(Kind.MACHINE, tied, place / "out", progress=written.append)
        assert written == []
    else:
        here(tied, place / "out")
        assert whole(place / "out", tied)


def test_a_server_keeps_its_layout(tied: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(tied, place / "out")

    def answer(layout: Path, *_: Any, **__: Any) -> str:
        return refusal(Kind.MACHINE, tied, layout, force=True)

    monkeypatch.setattr(serving, "answer_once", answer)
    assert serving.serve(place / "out", prompt="x") == 0
    here(tied, place / "out", force=True)


def test_the_checkpoint_is_not_replaced_by_its_layout(tied: Path, place: Path) -> None:
    here(tied, place / "out")
    assert "holds the checkpoint itself" in refusal(Kind.USAGE, place / "out", place / "out", force=True)
    inside = shutil.copy(tied, place / "out" / "ckpt.pt")

    assert "holds the checkpoint itself" in refusal(Kind.USAGE, Path(inside), place / "out", force=True)
    assert Path(inside).is_file()


def test_a_name_that_is_no_text(tied: Path, place: Path) -> None:
    """Names of files are bytes; the manifest must hold this one, and give it back."""
    odd = tied.rename(Path(os.fsdecode(os.fsencode(tied.parent) + b"/odd-\xff.pt")))

    here(odd, place / "out")

    assert whole(place / "out", odd)
    assert run("check", place / "out")[0] == 0


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="has no /sys, where nobody may make a folder")
@pytest.mark.parametrize("out", ["/sys/mdl-out", "/sys/mdl/sub/out"])
def test_a_closed_place(tied: Path, out: str) -> None:
    said = refusal(Kind.MACHINE, tied, Path(out))

    assert "writing failed" in said
    assert "choose a place that may be written to" in said


def test_a_place_below_a_file(tied: Path) -> None:
    assert "can't be made" in refusal(Kind.USAGE, tied, tied / "out")


WATCHED = """
import os, sys

def watch(event, arguments):
    changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate")
    if event == "open":
        changes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    paths = [os.fsdecode(p) for p in arguments[:2] if isinstance(p, str | bytes)]
    if changes and any(path.startswith(sys.argv[2]) for path in paths):
        os.write(2, f"{event} {paths}".encode())
        os._exit(99)

sys.addaudithook(watch)
from mdl.cli import main
main()
"""


def test_nothing_is_written_beside_the_source(two_ranks: Path, place: Path) -> None:
    """A source may lie on a read-only disk; for the superuser no mode forbids writing, so every opening is watched."""
    command = [sys.executable, "-c", WATCHED, "convert", two_ranks, place / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert whole(place / "out", two_ranks)
    inside = subprocess.run([*command[:-1], two_ranks / "out"], capture_output=True, text=True, check=False)
    assert inside.returncode == 99  # the watch does watch

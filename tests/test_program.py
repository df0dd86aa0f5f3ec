"""What surrounds every command: usage errors as documents, and signals that leave nothing behind."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from . import checkpoints
from . import servable as make

MDL = Path(sys.executable).with_name("mdl")


@pytest.mark.parametrize(
    "words", [["verify", "--json"], ["frobnicate", "--json"], ["inspect", "x.pt", "--no-such-option", "--json"]]
)
def test_a_usage_error_with_json_is_one_document(words: list[str]) -> None:
    done = subprocess.run([MDL, *words], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (2, "")
    document = json.loads(done.stdout)
    assert (document["ok"], document["kind"]) == (False, "usage")
    assert document["problems"][0]["what"]
    assert "--help" in document["problems"][0]["do"]


PLANNED = """
import sys
from mdl.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print([name for name in ("numpy", "torch", "rich") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("command", "needed"), [("plan", ["rich"]), ("inspect", ["rich"]), ("convert", ["numpy"]), ("check", [])]
)
def test_what_a_command_imports(command: str, needed: list[str], tmp_path: Path) -> None:
    """Nothing of torch, no numpy to read metadata, and no rich where a pipe gets no table: each takes its time."""
    path, out = checkpoints.nanogpt(tmp_path / "x.pt", checkpoints.nanogpt_state(), heads=4), tmp_path / "out"
    if command == "check":
        subprocess.run([MDL, "convert", path, out], check=True, capture_output=True)
    words = [command, str(out if command == "check" else path), *([str(out)] if command == "convert" else [])]
    done = subprocess.run([sys.executable, "-c", PLANNED, *words], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(needed)


SHOWS = """
from mdl.render import say, show_facts
say("a [bold]sentence[/bold] that stays")
long = "[red]/x[/red]: " + "word " * 60 + "end"
show_facts([("wrote", long), ("notes", ["one", "two\\nlines"]), ("none", []), ("empty", "")])
"""


def test_a_pipe_gets_lines_that_are_not_folded() -> None:
    done = subprocess.run([sys.executable, "-c", SHOWS], capture_output=True, text=True, check=True)

    assert done.stderr == "a [bold]sentence[/bold] that stays\n"
    first = "wrote  [red]/x[/red]: " + "word " * 60 + "end"
    assert done.stdout.splitlines() == [first, "notes  one", "       two", "       lines", "empty"]


def test_whoever_asks_for_colours_in_a_pipe_gets_them() -> None:
    env = {**os.environ, "FORCE_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", SHOWS], capture_output=True, text=True, check=True, env=env)

    assert "\x1b[1mwrote" in done.stdout


def test_a_terminal_gets_lines_folded_to_its_width() -> None:
    ours, its = pty.openpty()
    env = {**os.environ, "COLUMNS": "60", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", SHOWS], stdout=its, stderr=its, env=env) as child:
        os.close(its)
        shown = b""
        with suppress(OSError):  # a terminal whose other end has closed
            while more := os.read(ours, 4096):
                shown += more
        os.close(ours)

    assert child.returncode == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()
    assert lines[0] == "a [bold]sentence[/bold] that stays"
    assert max(map(len, lines)) <= 60
    assert [line.rstrip() for line in lines][-4:-1] == ["notes  one", "       two", "       lines"]
    assert lines[1].startswith("wrote  [red]/x[/red]: word")
    assert lines[2].startswith("       word")


@pytest.mark.parametrize(
    "encoding", ["utf-8:strict", "ascii:strict", "latin-1:strict", "utf-8:surrogateescape", "ascii:surrogateescape"]
)
@pytest.mark.parametrize("words", [["inspect"], ["plan"], ["inspect", "--json"]])
def test_any_name_of_a_file_can_be_printed(words: list[str], encoding: str, tmp_path: Path) -> None:
    """Names are bytes to the kernel, and a terminal need not know our arrows."""
    made = checkpoints.nanogpt(tmp_path / "x.pt", checkpoints.nanogpt_state(), heads=4)
    path = made.rename(tmp_path / os.fsdecode(b"caf\xff " + "\u00e9\U0001f40b.pt".encode()))
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([MDL, *words, path], capture_output=True, check=False, env=env)

    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding.split(":")[0], "surrogateescape")
    if "--json" in words:
        assert json.loads(text)["path"] == str(path)
    elif words == ["inspect"]:
        shown = {"utf-8": "caf\\udcff \u00e9\U0001f40b.pt", "ascii": r"caf\udcff \u00e9\ud83d\udc0b.pt"}
        shown |= {"latin-1": "caf\\udcff \u00e9\\ud83d\\udc0b.pt"}
        name = shown[encoding.split(":")[0]]
        assert (name.replace(r"\udcff", "\udcff") if "escape" in encoding else name) in text


def buffered() -> dict[str, str]:
    """As for a user: whoever runs the tests may have asked Python for streams without a buffer."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "x.pt"],
        ["inspect", "x.pt", "--json"],
        ["convert", "x.pt", "out"],
        ["archs"],
        ["plan", "no", "--json"],
    ],
)
def test_a_reader_that_left_is_no_error_and_no_difference(words: list[str], tmp_path: Path) -> None:
    checkpoints.nanogpt(tmp_path / "x.pt", checkpoints.nanogpt_state(), heads=4)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [MDL, *words], stdout=writer, stderr=subprocess.PIPE, check=False, cwd=tmp_path, env=buffered()
    )
    os.close(writer)

    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("words", [["convert", "x.pt", "out"], ["archs", "--json"]])
def test_a_full_disk_behind_stdout_is_told(words: list[str], tmp_path: Path) -> None:
    checkpoints.nanogpt(tmp_path / "x.pt", checkpoints.nanogpt_state(), heads=4)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [MDL, *words], stdout=full, stderr=subprocess.PIPE, check=False, cwd=tmp_path, env=buffered(), text=True
        )

    assert (done.returncode, done.stderr) == (4, "this machine: stdout takes no more: No space left on device\n")


def test_a_program_without_streams_writes_nothing_into_its_files(tmp_path: Path) -> None:
    checkpoints.nanogpt(tmp_path / "x.pt", checkpoints.nanogpt_state(), heads=4)
    done = subprocess.run(["sh", "-c", '"$0" convert x.pt out <&- >&- 2>&-', MDL], check=False, cwd=tmp_path)

    assert done.returncode == 0
    subprocess.run([MDL, "check", "out"], check=True, cwd=tmp_path, capture_output=True)


def test_what_was_said_before_an_error_stands_before_it() -> None:
    code = (
        "from mdl.errors import *\nfrom mdl.render import *\nshow_facts([('in vLLM', 'a fault\\r')])\n"
        "print_error(MdlError(Kind.INPUT, [Problem('x')]), as_json=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True, env=buffered()
    )

    assert done.stdout == b"in vLLM  a fault\nerror: x\n"


LEAVING = """
import atexit, sys, threading, time
from mdl.program import and_leave
atexit.register(lambda: print("at the end", flush=True))
{thread}
def main():
    print("x" * 100_000)
    sys.exit({code})
and_leave(main)
"""
LATE = "threading.Thread(target=lambda: (time.sleep(0.3), print('the thread too', flush=True))).start()"


@pytest.mark.parametrize(("code", "gives"), [("", 0), ("0", 0), ("3", 3), ("'a sentence'", 1)])
@pytest.mark.parametrize("thread", ["", LATE])
def test_leaving_gives_the_code_and_does_what_is_left(code: str, gives: int, thread: str) -> None:
    program = LEAVING.format(code=code, thread=thread)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == gives
    lines = done.stdout.splitlines()
    assert lines[0] == "x" * 100_000
    assert sorted(lines[1:]) == sorted(["at the end", *["the thread too"] * bool(thread)])
    assert done.stderr.splitlines() == ["a sentence"] * ("sentence" in code)


def test_leaving_where_nobody_reads() -> None:
    program = LEAVING.format(code="0", thread="")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.wait(60)

    assert process.returncode != 0


ALONE = """
import os, sys
from mdl.program import numpy_alone
numpy_alone()
print(len(os.listdir("/proc/self/task")), "numpy" in sys.modules, os.environ.get("OPENBLAS_NUM_THREADS"))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists a process's threads there")
@pytest.mark.parametrize(("said", "left"), [({}, "1 True None"), ({"OPENBLAS_NUM_THREADS": "1"}, "1 False 1")])
def test_numpy_comes_without_threads_and_nobody_else_is_told(said: dict[str, str], left: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")} | said

    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True, env=environment)

    assert done.stdout.strip() == left


HANGS = """
import os, pathlib, time
def build(checkpoint):
    pathlib.Path({pid!r}).write_text(str(os.getpid()))
    time.sleep(600)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_children_too_and_leaves_nothing(
    number: signal.Signals, code: int, tied: Path, tmp_path: Path
) -> None:
    pid, scratch = tmp_path / "pid", tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "model.py").write_text(HANGS.format(pid=str(pid)))
    command = [MDL, "record", tied, "--reference", f"{tmp_path / 'model.py'}:build", "-o", tmp_path / "g.safetensors"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(scratch)})
    until = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(number)
    _, err = running.communicate(timeout=30)

    assert running.returncode == code
    assert f"ended by {number.name}" in err
    assert "Traceback" not in err
    assert list(scratch.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


DIES = """
import os, signal
def build(checkpoint):
    os.kill(os.getpid(), signal.{name})
"""


@pytest.mark.engine
@pytest.mark.parametrize(("name", "advice"), [("SIGKILL", "out of memory"), ("SIGSEGV", "is broken")])
def test_the_death_of_a_reference_is_told(name: str, advice: str, tied: Path, tmp_path: Path) -> None:
    """In mdl's own process: nobody would be left to say what happened."""
    make.layout(tied, tmp_path / "out")
    (tmp_path / "model.py").write_text(DIES.format(name=name))
    command = [MDL, "verify", tmp_path / "out", "--reference", f"{tmp_path / 'model.py'}:build", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    assert done.returncode == 4
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem["what"] == f"the process that runs the reference was killed by {name}"
    assert advice in problem["do"]

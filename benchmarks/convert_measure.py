"""One run of one program for benchmarks/convert.py: its time, and the memory of the program and all its children."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

EVERY = 0.005
"""Seconds between two looks at the memory."""
MEMORY = re.compile(r"^(VmHWM|VmRSS|RssAnon):\s+(\d+) kB", re.M)


class RunFailedError(Exception):
    """The program exited with something else than 0; the text is its last line."""


@dataclass(frozen=True)
class Run:
    """What one run took. ``anon`` is memory that no file stands behind; ``rss`` has mapped files in it, too."""

    seconds: float
    cpu: float
    anon: int
    rss: int


def measured(command: Sequence[str], log: IO[bytes]) -> Run:
    """Run a program to its end. Raises RunFailedError."""
    log.seek(0)
    log.truncate()
    begin = time.perf_counter()
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=null, stdout=null, stderr=log, env=environment(), start_new_session=True)
    die_first(process.pid)
    peak = Peak(process.pid)
    try:
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)  # or Popen waits for a process that is gone
    finally:
        peak.stop()
        if process.returncode is None:  # the harness was interrupted; the children of a way go with it
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RunFailedError(last_line(log) or f"exit code {process.returncode}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak.anon, peak.rss)


def environment() -> dict[str, str]:
    """What an installed program starts in: Python may keep bytecode, and every start but the first finds it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def die_first(pid: int) -> None:
    """Where memory runs out, the kernel shall take the way that asked for it, and nobody else's process."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000", encoding="ascii")


class Peak:
    """Looks at a process and its children again and again, until told to stop."""

    def __init__(self, pid: int) -> None:
        self.anon = self.rss = 0
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            now = [memory(pid) for pid in family(self._pid)]
            self.anon = max(self.anon, sum(m.get("RssAnon", 0) for m in now))
            # The kernel's own high-water mark of a process misses nothing between two looks. rusage has it as well, but
            # there a child begins with its parent's.
            self.rss = max([self.rss, sum(m.get("VmRSS", 0) for m in now), *(m.get("VmHWM", 0) for m in now)])
            if self._ended.wait(EVERY):
                return


def memory(pid: int) -> dict[str, int]:
    """Bytes, by the kernel's names; nothing of a process that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    return {name: int(kilobytes) << 10 for name, kilobytes in MEMORY.findall(status)}


def family(pid: int) -> Iterator[int]:
    """A process and all that descend from it. A child belongs to the thread that started it."""
    yield pid
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208  (200 times a second: names are enough)
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{pid}/task/{task}/children").read_text(encoding="ascii")
                for child in children.split():
                    yield from family(int(child))


def settle(files: Iterable[Path], *, cold: bool) -> None:
    """Nothing of earlier runs left to write, and the source in the file cache, or out of it."""
    os.sync()
    buffer = bytearray(8 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.readinto(buffer):
                    pass


def touch(nbytes: int) -> None:
    """Use as much free memory as a run will take for its output: a virtual machine's host takes back what lies free for
    some seconds, and to get it again would take a run longer than the copy."""
    size = max(mmap.PAGESIZE, min(nbytes, memory_left("MemFree") * 3 // 4))
    mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)).close()


def give_back() -> None:
    """Hand free memory back to the system: the harness has made its inputs, and the runs shall have room."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def machine(folder: Path) -> str:
    """Cores, memory, kernel and file system, in a line; neither names nor places."""
    cores = len(os.sched_getaffinity(0))
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kernel = re.match(r"[\d.]*\d", os.uname().release)
    return f"{cores} cores, {ram:.0f} GiB RAM, Linux {kernel[0] if kernel else '?'}, {file_system(folder)}"


def file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on."""
    found = ("", "?")
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ")
        if folder.resolve().is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, after.split()[0])
    return found[1]


def memory_left(name: str = "MemAvailable") -> int:
    """Bytes that programs can have before the machine swaps or kills; MemFree: that nothing holds, no file either."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    return int(re.findall(rf"{name}:\s+(\d+)", text)[0]) << 10

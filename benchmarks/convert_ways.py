"""The ways that benchmarks/convert.py puts side by side: how each is started, and what it needs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from convert_inputs import Input

PEERS = Path(__file__).with_name("convert_peers.py")


@dataclass(frozen=True)
class Job:
    """One conversion. ``layout`` is what mdl made of the source beforehand, for ways that read no raw checkpoint;
    ``rewrites`` says that most tensors are computed anew, not only renamed.
    """

    source: Input
    out: Path
    layout: Path
    dtype: str | None = None
    mdl_args: tuple[str, ...] = ()
    rewrites: bool = False
    pythons: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Way:
    """One way to convert. ``memory`` is the share of the checkpoint that it holds at once, roughly; ``remark`` says how
    its work differs from mdl's."""

    name: str
    title: str
    command: Callable[[Job], list[str]]
    module: str = ""
    memory: float = 0.1
    makes_folder: bool = True
    of_layout: bool = False
    remark: str = ""


def memory_needed(way: Way, job: Job) -> float:
    """Bytes, roughly: what is computed anew lies beside what was read."""
    anew = 1 if way.module and job.rewrites else 0
    return (way.memory + anew) * job.source.nbytes + 5e8


def copy(job: Job) -> list[str]:
    """Bytes are moved: a file system that can share them instead is told not to."""
    return ["cp", "--reflink=never", *map(str, job.source.files), str(job.out)]


def copy_and_sync(job: Job) -> list[str]:
    files = map(str, job.source.files)
    return ["sh", "-c", 'cp --reflink=never "$@" "$0" && sync "$0"/*', str(job.out), *files]


def program() -> str:
    """The installed command line of the Python that runs this."""
    return str(Path(sys.executable).with_name("mdl"))


def mdl(*options: str) -> Callable[[Job], list[str]]:
    """The command line, as a user types it."""

    def command(job: Job) -> list[str]:
        dtype = ["--dtype", job.dtype] if job.dtype else []
        return [program(), "--quiet", "convert", str(job.source.path), str(job.out), *options, *dtype, *job.mdl_args]

    return command


def peer(name: str, *options: str, of_layout: bool = False) -> Callable[[Job], list[str]]:
    """A way of convert_peers.py, in the Python that was named for it."""

    def command(job: Job) -> list[str]:
        python = job.pythons.get(name, sys.executable)
        dtype = ["--dtype", job.dtype] if job.dtype else []
        source = job.layout if of_layout else job.source.path
        return [python, str(PEERS), name, str(source), str(job.out), *dtype, *options]

    return command


OTHERS = "reads a Hugging Face layout, renames and permutes nothing"
LITGPT = "reads a Hugging Face layout, writes its own .pth"
WAYS = {
    way.name: way
    for way in (
        Way("cp", "`cp`", copy, memory=0, makes_folder=False),
        Way("cp-fsync", "`cp` + fsync", copy_and_sync, memory=0, makes_folder=False),
        Way("mdl", "`mdl convert --no-fsync`", mdl("--no-fsync")),
        Way("mdl-one", "`mdl convert --no-fsync --workers 1`", mdl("--no-fsync", "--workers=1")),
        Way("mdl-fsync", "`mdl convert`", mdl()),
        Way("mdl-one-fsync", "`mdl convert --workers 1`", mdl("--workers=1")),
        Way("mmap", "`torch.load(mmap=True)` + `save_file`", peer("mmap"), "torch", 0.3),
        Way("mmap-fsync", "`torch.load(mmap=True)` + `save_file` + fsync", peer("mmap", "--fsync"), "torch", 0.3),
        Way("load", "`torch.load` + `save_file`", peer("load"), "torch", 1.2),
        Way("hub", "huggingface_hub `save_torch_state_dict`", peer("hub"), "huggingface_hub", 0.3),
        Way("transformers", "transformers `save_pretrained`", peer("transformers"), "transformers", 0.3),
        Way("litgpt", "litgpt", peer("litgpt", of_layout=True), "litgpt", 1.2, of_layout=True, remark=LITGPT),
        Way(
            "mergekit",
            "mergekit passthrough",
            peer("mergekit", of_layout=True),
            "mergekit",
            0.3,
            of_layout=True,
            remark=OTHERS,
        ),
    )
}


def missing(way: Way, pythons: Mapping[str, str]) -> str:
    """Why a way can't run here, or nothing. It is imported once, so that the first round has its files in the cache."""
    if not way.module:
        return ""
    python = pythons.get(way.name, sys.executable)
    done = subprocess.run([python, "-c", f"import {way.module}"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or ["it can't be imported"])[-1]
    return f"not installed: {last}"

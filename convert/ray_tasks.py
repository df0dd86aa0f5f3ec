"""`mdl convert --ray`: every weight file is a task of a Ray cluster whose machines see the same files.

Ray places the tasks, moves them when a machine dies, and counts the tries. What a task needs is small: the checkpoint's
path, what the user said of it, and the digest of the agreement. Each process plans anew, which takes metadata only, and
goes on only if it comes to the same plan.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ..errors import Kind, MdlError, Problem, machine_error
from .agreement import Agreement, agree
from .prepare import Options, Prepared, prepare
from .receipts import Written
from .run import Writer
from .shards import Shard, assign
from .write import Progress

if TYPE_CHECKING:
    from types import ModuleType

TRIES = 3
"""How often Ray starts a task again whose process or machine died."""


class Job(Struct, frozen=True):
    """What every task of one conversion is told."""

    checkpoint: str
    options: Options
    max_shard_size: int
    agreement: str
    work: str
    workers: int
    sync: bool


class Answer(Struct, frozen=True):
    """What a task did, or why it could not. Plain values: an exception of ours may not survive the way back."""

    written: tuple[Written, ...] = ()
    kind: int = 0
    problems: tuple[Problem, ...] = ()


def ray_writer(prepared: Prepared, max_shard_size: int, workers: int, *, sync: bool) -> Writer:
    """A writer whose tasks run on the cluster that RAY_ADDRESS names, or on one that is started here.

    Raises MdlError (MACHINE) if Ray is not installed or the cluster can't be reached.
    """
    ray = _ray()
    path = str(Path(prepared.checkpoint.path).absolute())
    digest = agree(prepared, assign(prepared.plan, max_shard_size)).digest

    def write(shards: Sequence[Shard], work: Path, progress: Progress) -> dict[str, list[Written]]:
        job = Job(path, prepared.options, max_shard_size, digest, str(work.absolute()), workers, sync)
        with_cluster = _Cluster(ray)
        try:
            return _run(ray, job, shards, progress)
        finally:
            with_cluster.leave()

    return write


def _run(ray: Any, job: Job, shards: Sequence[Shard], progress: Progress) -> dict[str, list[Written]]:
    """Start a task for each file, the largest first, and collect what they answer."""
    largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes()), default=1)
    task = ray.remote(num_cpus=min(job.workers, largest), max_retries=TRIES)(write_one)  # more would wait for ever
    by_size = sorted(shards, key=lambda shard: -shard.nbytes)
    waiting = {task.remote(job, shard.file): shard for shard in by_size}
    written: dict[str, list[Written]] = {}
    try:
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            shard = waiting.pop(done)
            written[shard.file] = _outcome(ray, done, shard)
            progress(shard.nbytes)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
    return written


def _outcome(ray: Any, reference: Any, shard: Shard) -> list[Written]:
    try:
        answer: Answer = ray.get(reference)
    except ray.exceptions.RayError as error:
        do = "look at the cluster (ray status), then run the same command again: finished files are kept"
        raise machine_error(f"Ray gave up on {shard.file}: {_first_line(error)}", "", do) from error
    if answer.problems:
        raise MdlError(Kind(answer.kind), answer.problems)
    return list(answer.written)


def write_one(job: Job, file: str) -> Answer:
    """The task: write one weight file into the shared folder."""
    from .run import threads

    try:
        prepared, agreement = _planned(job)
        shard = next(one for one in agreement.shards if one.file == file)
        work = Path(job.work)
        if not agreement.stands_in(work):
            what = "a worker does not see the folder that is being written"
            raise machine_error(what, job.work, "write to a file system that all machines share")
        written = threads(prepared, job.workers, sync=job.sync)([shard], work, lambda _: None)
        return Answer(tuple(written[file]))
    except MdlError as error:
        return Answer((), error.kind.value, error.problems)
    except OSError as error:
        return Answer((), Kind.MACHINE.value, (Problem(f"writing failed: {error.strerror or error}", job.work),))


def _planned(job: Job) -> tuple[Prepared, Agreement]:
    """The plan, made once in each process of the cluster."""
    if job.agreement not in _made:
        prepared = prepare(Path(job.checkpoint), job.options)
        made = agree(prepared, assign(prepared.plan, job.max_shard_size))
        if made.digest != job.agreement:
            what = "a worker planned something else than the run that asked it"
            do = "every machine needs the same mdl, and the same checkpoint under the same path"
            raise machine_error(what, job.checkpoint, do)
        _made.clear()
        _made[job.agreement] = prepared, made
    return _made[job.agreement]


_made: dict[str, tuple[Prepared, Agreement]] = {}
"""The one plan that this process made last, by its digest."""


class _Cluster:
    """A connection that is closed only by whoever opened it."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            handler = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(address=os.environ.get("RAY_ADDRESS", "local"), log_to_driver=False, logging_level="error")
            except (ConnectionError, RuntimeError, ValueError) as error:
                do = "check RAY_ADDRESS, or unset it to use this machine alone"
                raise machine_error(f"no Ray cluster: {_first_line(error)}", "", do) from error
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray takes it; ours ends in order

    def leave(self) -> None:
        """Disconnect."""
        if self._ours:
            self._ray.shutdown()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody that the user did not ask for
    try:
        import ray
    except ImportError as error:
        do = "pip install mdl[ray], or use --workers on one machine and --part on several"
        raise machine_error("--ray needs Ray, which is not installed", do=do) from error
    return ray

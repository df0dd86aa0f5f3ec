"""Several runs write one layout: as parts that know nothing of each other, or as tasks of a Ray cluster."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mdl.convert import locks
from mdl.convert.agreement import Agreement
from mdl.convert.locks import shared
from mdl.convert.parts import Contributed, Part, convert_part, parse_part
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import Converted, convert
from mdl.convert.shards import assign
from mdl.errors import Kind, MdlError

from . import checkpoints as make
from .test_resume import MDL, SMALL, ended_after, names, same_folders


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.nanogpt(tmp_path_factory.mktemp("source") / "x.pt", make.nanogpt_state(layers=12))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run makes of it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(prepare(source), out, tokenizer="none", max_shard_size=SMALL)
    return out


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def part(source: Path, out: Path, text: str, **more: Any) -> Converted | Contributed:
    arguments: dict[str, Any] = {"tokenizer": "none", "max_shard_size": SMALL, **more}
    options = arguments.pop("options", Options())
    return convert_part(prepare(source, options), out, parse_part(text), **arguments)


def test_the_last_makes_the_layout(source: Path, whole: Path, place: Path) -> None:
    done = [part(source, place / "out", f"{k}/4") for k in (3, 1, 4, 2)]

    assert [type(one) for one in done] == [Contributed, Contributed, Contributed, Converted]
    assert [bool(one.missing) for one in done if isinstance(one, Contributed)] == [True] * 3
    assert names(place) == ["out"]
    same_folders(place / "out", whole)


def test_shares_are_even_and_hold_every_file_once(source: Path) -> None:
    shards = assign(prepare(source).plan, SMALL)
    shares = [Part(k, 3).share(shards) for k in (1, 2, 3)]

    assert sorted(one.file for share in shares for one in share) == [one.file for one in shards]
    loads = [sum(one.nbytes for one in share) for share in shares]
    assert max(loads) - min(loads) <= max(one.nbytes for one in shards)


def test_a_part_may_be_retried_and_comes_to_the_same(source: Path, whole: Path, place: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        part(source, place / "out", "1/2", progress=ended_after(50_000))
    kept = {path: path.stat().st_mtime_ns for path in place.glob("out.mdl-partial/layout/*")}
    assert kept

    for text in ("1/2", "1/2"):
        assert isinstance(part(source, place / "out", text), Contributed)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    assert isinstance(part(source, place / "out", "2/2"), Converted)
    late = part(source, place / "out", "2/2")
    assert isinstance(late, Contributed)
    assert late.missing == ()
    assert names(place) == ["out"]
    same_folders(place / "out", whole)


def test_a_layout_that_another_part_makes_at_any_moment_is_no_obstacle(
    source: Path, whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made after a part has looked for it: no matter how many times it has looked before."""
    asked = Agreement.is_made
    for looks in (1, 2):  # the third time it has the lock, and nobody else can make it
        out, seen = place / f"out{looks}", []

        def just_after(
            agreement: Agreement, folder: Path, out: Path = out, seen: list[bool] = seen, looks: int = looks
        ) -> bool:
            seen.append(asked(agreement, folder))
            if len(seen) == looks:
                shutil.copytree(whole, out)
            return seen[-1]

        monkeypatch.setattr(Agreement, "is_made", just_after)
        done = part(source, out, "1/1")

        assert isinstance(done, Contributed), looks
        assert (done.missing, len(seen) > looks) == ((), True)
        same_folders(out, whole)


def test_a_run_without_parts_ends_what_parts_began(source: Path, whole: Path, place: Path) -> None:
    part(source, place / "out", "2/3")

    done = convert(prepare(source), place / "out", tokenizer="none", max_shard_size=SMALL)

    assert len(done.resumed) > 1
    assert names(place) == ["out"]
    same_folders(place / "out", whole)


@pytest.mark.parametrize("other", [{"max_shard_size": SMALL + 4096}, {"options": Options(dtype="bfloat16")}])
def test_parts_that_do_not_agree_are_told(source: Path, place: Path, other: dict[str, Any]) -> None:
    part(source, place / "out", "1/2")

    with pytest.raises(MdlError, match="something else is being written here") as caught:
        part(source, place / "out", "2/2", **other)

    assert caught.value.kind is Kind.MACHINE
    assert "give every part the same checkpoint and options" in str(caught.value)
    assert isinstance(part(source, place / "out", "2/2"), Converted)


def test_where_the_checkpoint_lies_is_no_matter(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines may mount a file system at different places, and start from different folders."""
    part(source, place / "out", "1/2")
    other = place.parent / "elsewhere"
    other.symlink_to(source.parent)
    monkeypatch.chdir(other)

    assert isinstance(part(Path(source.name), place / "out", "2/2"), Converted)


def test_what_is_there_is_not_replaced_unasked(source: Path, place: Path) -> None:
    convert(prepare(source), place / "out", tokenizer="none")  # another size of files

    with pytest.raises(MdlError, match="exists already"):
        part(source, place / "out", "1/1")
    assert isinstance(part(source, place / "out", "1/1", force=True), Converted)


def test_a_run_for_all_and_a_part_exclude_each_other(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shared(place / "out"), pytest.raises(MdlError, match="is writing it at this moment"):
        convert(prepare(source), place / "out", tokenizer="none")
    with locks.claimed(place / "out"), pytest.raises(MdlError, match="has it"), shared(place / "out", 0.2):
        pass
    assert names(place) == []

    def unknown(*_: Any) -> None:
        raise OSError(locks.errno.ENOTSUP, "no locks")

    monkeypatch.setattr(locks.fcntl, "flock", unknown)
    with pytest.raises(MdlError, match="no locks, so parts can't tell"):
        part(source, place / "out", "1/1")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3", "²/3"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(MdlError, match="--part"):
        parse_part(text)


def start(source: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [MDL, "convert", source, out, "--tokenizer", "none", "--max-shard-size", str(SMALL), "--json", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_array_of_jobs(source: Path, whole: Path, place: Path) -> None:
    """As under SLURM: all start at once, each as a process of its own."""
    jobs = [start(source, place / "out", "--part", f"{k}/4") for k in (1, 2, 3, 4)]
    said = [job.communicate(timeout=120) for job in jobs]

    assert [job.returncode for job in jobs] == [0] * 4, said
    made = [one for one in map(json.loads, (out for out, _ in said)) if "manifest" in one]
    assert len(made) == 1
    assert names(place) == ["out"]
    same_folders(place / "out", whole)


def test_jobs_that_are_killed_and_started_again(source: Path, whole: Path, place: Path) -> None:
    rng = random.Random(1)  # noqa: S311 - moments, not secrets
    for k in (1, 2, 3, 1, 2, 3):
        job = start(source, place / "out", "--part", f"{k}/3")
        time.sleep(0.2 + 0.4 * rng.random())
        job.send_signal(signal.SIGKILL)
        job.communicate(timeout=60)
        if (place / "out").exists():
            break
    jobs = [start(source, place / "out", "--part", f"{k}/3") for k in (1, 2, 3)]
    said = [job.communicate(timeout=120) for job in jobs]

    assert [job.returncode for job in jobs] == [0] * 3, said
    assert names(place) == ["out"]
    same_folders(place / "out", whole)


RAY = """
import json, os, sys
from pathlib import Path

import ray

from mdl.convert.modes import Mode, convert_in
from mdl.convert.prepare import Options, prepare

# Two machines of one processor each, as far as Ray knows.
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
source, out, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if how == "dies":
    import mdl.convert.ray_tasks as tasks

    real = tasks.write_one

    def mortal(job, file):
        mark = Path(job.work).parent / "died"
        if not mark.exists():
            mark.touch()
            os._exit(1)
        return real(job, file)

    tasks.write_one = mortal
prepared = prepare(source)
if how == "changes":  # after the workers were told what to agree on
    import mdl.convert.ray_tasks as tasks

    real = tasks.ray_writer

    def late(*given, **more):
        writer = real(*given, **more)
        data = bytearray(source.read_bytes())
        data[len(data) // 2] ^= 1
        source.write_bytes(data)
        return writer

    tasks.ray_writer = late
try:
    done = convert_in(Mode(ray=True), prepared, out, tokenizer="none", max_shard_size=20_000)
    print(json.dumps({"files": len(done.files)}))
except Exception as error:
    print(json.dumps({"error": str(error)}))
cluster.shutdown()
"""


def on_ray(source: Path, out: Path, how: str) -> dict[str, Any]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install mdl[ray]")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RAY, str(source), str(out), how],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("how", ["well", "dies"])
def test_a_ray_cluster(source: Path, whole: Path, place: Path, how: str) -> None:
    """Two Ray nodes of this machine; in the second case a worker dies in its first task, and Ray tries again."""
    got = on_ray(source, place / "out", how)

    assert "files" in got, got
    same_folders(place / "out", whole)
    assert names(place) == (["died", "out"] if how == "dies" else ["out"])


def test_a_ray_worker_that_sees_another_checkpoint(source: Path, place: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim.pt"
    victim.write_bytes(source.read_bytes())

    got = on_ray(victim, place / "out", "changes")

    assert "a worker planned something else" in got.get("error", ""), got
    assert names(place) == []


def test_without_ray(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mdl.convert.modes import Mode, convert_in

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MdlError, match="not installed") as caught:
        convert_in(Mode(ray=True), prepare(source), place / "out", max_shard_size=SMALL)
    assert caught.value.kind is Kind.MACHINE
    assert names(place) == []

"""`mdl convert` beside `cp` and beside what else turns a checkpoint into safetensors: time, CPU time and memory.

    python benchmarks/convert.py                                     everything but `large`; hours, 60 GB of disk
    python benchmarks/convert.py --scenario llama --rounds 5         one comparison
    python benchmarks/convert.py --scenario sizes --sizes 2 6        by size
    python benchmarks/convert.py --scenario llama --cold --json a.json
    python benchmarks/convert.py --from a.json b.json --write docs/speed.md    tables of kept figures, nothing is run
    python benchmarks/convert.py --from c.json --label server --write docs/speed.md    of another machine

The checkpoints are made in --work, which decides whose disk is measured. In each round every way runs once, each round
begins with another one, and a way's figure is its time divided by that of `cp` in the same round: disks and neighbours
change from minute to minute, the ratio of two runs that follow each other less so. Before each run the output is
removed, everything is written out, and the source is read once (with --cold: dropped from the file cache).
A way that is not installed, or has no room, is named below the table with the reason. `--python litgpt=PATH` runs a way
with another Python. Exits with 1 if a way failed or a size was refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert_measure import RunFailedError, give_back, machine, measured, memory_left, settle, touch
from convert_scenarios import SCENARIOS, Scenario
from convert_tables import block, write_page
from convert_ways import WAYS, Job, Way, mdl, memory_needed, missing
from curves import memory_curves
from pages import versions

SLACK = 10**9
Result = dict[str, Any]


def measure(scenario: Scenario, gigabytes: float, args: argparse.Namespace, tell: Callable[[Result], None]) -> None:
    """All rounds of one scenario at one size; ``tell`` is called with what is known so far, after every round."""
    ways = [WAYS[name] for name in args.ways or scenario.ways]
    pythons = dict(pair.split("=", 1) for pair in args.python)
    result = blank(scenario, gigabytes, args)
    result["skipped"] = {way.name: why for way in ways if (why := missing(way, pythons))}
    ways = [way for way in ways if way.name not in result["skipped"]]
    args.work.mkdir(parents=True, exist_ok=True)
    if short := no_room(gigabytes, ways, args.work):
        tell(result | {"refused": short})
        return
    with tempfile.TemporaryDirectory(prefix="mdl-speed-", dir=args.work) as scratch:
        folder = Path(scratch)
        source = scenario.make(folder / "source", gigabytes)
        give_back()
        result |= {"nbytes": source.nbytes, "remarks": {way.name: way.remark for way in ways if way.remark}}
        mdl_args = (*scenario.mdl_args, *shlex.split(args.mdl_args))
        job = Job(source, folder / "out", folder / "layout", scenario.dtype, mdl_args, scenario.rewrites, pythons)
        if any(way.of_layout for way in ways):
            make_layout(job)
        for number in range(args.rounds):
            one_round(number, ways, job, result, cold=args.cold)
            tell(result)


def blank(scenario: Scenario, gigabytes: float, args: argparse.Namespace) -> Result:
    """A result before its first run."""
    return {
        "scenario": scenario.name,
        "title": scenario.title,
        "base": scenario.base,
        "gigabytes": gigabytes,
        "cold": args.cold,
        "mdl_args": args.mdl_args,
        "machine": machine(args.work),
        "versions": versions(),
        "runs": [],
    }


def no_room(gigabytes: float, ways: list[Way], work: Path) -> str:
    """Why the disk can't take this, or nothing: source, output, and the layout that some ways begin with."""
    need = gigabytes * 1e9 * (3 if any(way.of_layout for way in ways) else 2) + SLACK
    free = shutil.disk_usage(work).free
    return f"needs {need / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free" if need > free else ""


def make_layout(job: Job) -> None:
    command = mdl()(dataclasses.replace(job, out=job.layout))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def one_round(number: int, ways: list[Way], job: Job, result: Result, *, cold: bool) -> None:
    """Every way once, beginning with another one than the round before."""
    turn = number % len(ways)
    for way in [*ways[turn:], *ways[:turn]]:
        if way.name not in result["skipped"]:
            one_run(number, way, job, result, cold=cold)


def one_run(number: int, way: Way, job: Job, result: Result, *, cold: bool) -> None:
    need, free = memory_needed(way, job), memory_left()
    if need > free:
        why = f"needs about {need / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"
        result["skipped"][way.name] = why
        return
    shutil.rmtree(job.out, ignore_errors=True)
    if not way.makes_folder:
        job.out.mkdir()
    settle(files_read(way, job), cold=cold)
    touch(job.source.nbytes)
    try:
        with tempfile.TemporaryFile() as log:
            run = measured(way.command(job), log)
    except RunFailedError as error:
        result["skipped"][way.name] = f"**failed**: {error}"
        print(f"{way.name} failed: {error}", file=sys.stderr)
        return
    finally:
        shutil.rmtree(job.out, ignore_errors=True)
    result["runs"].append({"round": number, "way": way.name, **dataclasses.asdict(run)})
    told = f"{run.seconds:.2f} s, {run.cpu:.2f} CPU s, {run.anon / 1e6:.0f} MB anonymous"
    print(f"{result['scenario']} {result['gigabytes']:g} GB, round {number + 1}, {way.name}: {told}", file=sys.stderr)


def files_read(way: Way, job: Job) -> list[Path]:
    return sorted(job.layout.glob("*.safetensors")) if way.of_layout else list(job.source.files)


def sizes_of(scenario: Scenario, args: argparse.Namespace) -> tuple[float, ...]:
    if len(scenario.sizes) > 1:
        return tuple(args.sizes or scenario.sizes)
    return (args.size_gb or scenario.sizes[0],)


def parse() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="this one only; may be repeated")
    cli.add_argument("--ways", nargs="+", choices=list(WAYS), help="these ways only")
    cli.add_argument("--size-gb", type=float, help="size of the checkpoint, for scenarios of one size")
    cli.add_argument("--sizes", type=float, nargs="+", help="sizes of the scenario `sizes`")
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--cold", action="store_true", help="drop the source from the file cache before each run")
    cli.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where the checkpoints are made")
    cli.add_argument("--mdl-args", default="", metavar="TEXT", help="more options for `mdl convert`")
    cli.add_argument("--python", action="append", default=[], metavar="WAY=PATH", help="the Python to run a way with")
    cli.add_argument("--json", type=Path, help="keep every figure in this file")
    cli.add_argument("--from", dest="kept", type=Path, nargs="+", help="figures kept by --json; measure nothing")
    cli.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page, the picture beside it")
    cli.add_argument("--label", default="", help="of another machine: its tables go behind markers that begin so")
    cli.add_argument("--svg", type=Path, help="put the picture of memory by size here")
    return cli.parse_args()


def collect(args: argparse.Namespace) -> list[Result]:
    """Measure, or read what was measured."""
    if args.kept:
        return [result for file in args.kept for result in json.loads(file.read_text(encoding="utf-8"))]
    done: list[Result] = []
    for scenario in SCENARIOS.values():
        if scenario.name in (args.scenario or ()) or not (args.scenario or scenario.only_when_named):
            for gigabytes in sizes_of(scenario, args):
                done.append({})
                measure(scenario, gigabytes, args, lambda result: keep(result, done, args.json))
    return done


def keep(result: Result, done: list[Result], file: Path | None) -> None:
    """What is known so far takes the last place, in the file as well: an interrupted run has not run for nothing."""
    done[-1] = result
    if file:
        file.write_text(json.dumps(done, indent=1), encoding="utf-8")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # gigabytes are removed then, too
    args = parse()
    results = collect(args)
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result["scenario"], []).append(result)
    blocks = {name: block(found) for name, found in by_name.items()}
    print("\n".join(blocks.values()))
    picture = args.svg or (args.write and args.write.with_name("memory.svg"))
    if picture and by_name.get("sizes"):
        picture.write_text(memory_curves(by_name["sizes"]), encoding="utf-8")
    if args.write:
        write_page(args.write, {f"{args.label} {name}".strip(): made for name, made in blocks.items()})
    bad = [r for r in results if r.get("refused") or any("failed" in why for why in r["skipped"].values())]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

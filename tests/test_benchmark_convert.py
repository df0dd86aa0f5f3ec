"""benchmarks/convert.py: its ways do the same work, its tables and its picture are whole. Nothing is timed here."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from . import checkpoints as make

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # scripts import their neighbours by bare names

import convert_measure as measure  # noqa: E402  (found by the line above)
import convert_peers as peers  # noqa: E402  (the same)
import convert_tables as tables  # noqa: E402  (the same)
import curves  # noqa: E402  (the same)
from convert_scenarios import SCENARIOS  # noqa: E402  (the same)
from convert_ways import WAYS, Job, missing, program  # noqa: E402  (the same)

SMALL = 0.02
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the benchmark reads Linux's /proc")


def bench(*arguments: str, code: int = 0) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "convert.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout


def result(name: str = "sizes", nbytes: int = 2 * 10**9, **more: Any) -> dict[str, Any]:
    """What a measurement of two rounds leaves."""
    runs = [
        {"round": k, "way": way, "seconds": seconds * (k + 1), "cpu": 1.0, "anon": 3 * 10**7, "rss": 9 * 10**7}
        for k in (0, 1)
        for way, seconds in (("cp", 1.0), ("mdl", 1.5))
    ]
    known = {"scenario": name, "title": "T", "base": "cp", "gigabytes": nbytes / 1e9, "nbytes": nbytes, "cold": False}
    told = {"mdl_args": "", "machine": "2 cores", "versions": "mdl 1", "skipped": {}, "remarks": {}, "runs": runs}
    return known | told | more


@pytest.mark.parametrize("name", ["ranks", "nanogpt", "bf16-fp16", "fp32-bf16"])
def test_every_way_writes_what_mdl_writes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = SCENARIOS[name]
    if name == "ranks":
        monkeypatch.setattr(peers, "SHARD", 8_000_000)  # several files, as at 6 GB
    source = scenario.make(tmp_path / "source", SMALL)
    job = Job(source, tmp_path / "out", tmp_path / "layout", scenario.dtype, scenario.mdl_args)
    subprocess.run(WAYS["mdl"].command(job), check=True, stdout=subprocess.DEVNULL)
    wanted = make.saved(job.out)

    assert 0.9 * SMALL < source.nbytes / 1e9 < 1.3 * SMALL
    assert all(tensor.isfinite().all() and tensor.unique().numel() > 9 for tensor in wanted.values())
    for way in set(scenario.ways) & set(peers.WAYS):
        if WAYS[way].of_layout:
            continue
        pytest.importorskip(WAYS[way].module)
        (out := tmp_path / way).mkdir()
        peers.WAYS[way](source.path, out, scenario.dtype)
        make.same(make.saved(out), wanted)


def test_files_have_real_bytes_and_no_two_tensors_alike(tmp_path: Path) -> None:
    source = SCENARIOS["llama"].make(tmp_path / "source", SMALL)
    assert source.files[0].stat().st_blocks * 512 >= source.nbytes

    state = torch.load(source.files[0], weights_only=True)
    assert len({make.bits(tensor) for tensor in state.values()}) == len(state)


def test_rounds_are_kept_and_nothing_is_left(tmp_path: Path) -> None:
    work, kept = tmp_path / "work", tmp_path / "kept.json"
    work.mkdir()
    size = ("--size-gb", str(SMALL), "--rounds", "2", "--work", str(work))
    said = bench("--scenario", "llama", "--ways", "cp", "mdl", "mmap", *size, "--json", str(kept))

    (found,) = json.loads(kept.read_text())
    order = [run["way"] for run in found["runs"]]
    assert order == ["cp", "mdl", "mmap", "mdl", "mmap", "cp"]
    assert all(run["seconds"] > 0 and run["rss"] >= run["anon"] for run in found["runs"])
    assert all(run["anon"] > 0 for run in found["runs"] if run["way"] != "cp")  # which may end before the first look
    assert "| `cp` | 1.00 | 1.00 to 1.00 |" in said
    assert list(work.iterdir()) == []
    assert bench("--from", str(kept)) == said


def test_a_way_that_fails_is_told(tmp_path: Path) -> None:
    size = ("--size-gb", str(SMALL), "--rounds", "2", "--work", str(tmp_path))
    said = bench("--scenario", "llama", "--ways", "cp", "mdl", *size, "--mdl-args=--no-such-option", code=1)
    assert "is missing: **failed**: " in said
    assert "no-such-option" in said


def test_a_size_without_room_is_refused(tmp_path: Path) -> None:
    said = bench("--scenario", "large", "--size-gb", "1e6", "--work", str(tmp_path), code=1)
    assert "not measured: needs 2000001 GB of disk, " in said


def test_a_missing_peer_is_told() -> None:
    way = dataclasses.replace(WAYS["litgpt"], module="no_such_module")
    why = missing(way, {})
    assert why == "not installed: ModuleNotFoundError: No module named 'no_such_module'"
    assert f"- litgpt is missing: {why}\n" in tables.block([result("llama", skipped={"litgpt": why})])


def test_table() -> None:
    lines = tables.block([result("llama")]).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert rows[-1] == "| `mdl convert --no-fsync` | 1.50 | 1.50 to 1.50 | 2.25 | 1.00 | 0.89 | 30 | 90 |"


def test_table_by_size_has_a_row_for_each_way_and_size() -> None:
    short = {"mdl": "needs about 9 GB of memory, 1 GB are free"}
    refused = result(nbytes=3 * 10**9, refused="needs 7 GB of disk, 1 GB are free", runs=[])
    made = tables.block([result(), result(nbytes=10**9, skipped=short), refused])
    rows = [line for line in made.splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[1] for row in rows] == ["2", "1", "2", "1"]
    assert "at 1 GB ended after 2 of its rounds: needs about 9 GB of memory, 1 GB are free\n" in made
    assert "- not measured at 3 GB: needs 7 GB of disk, 1 GB are free\n" in made


def parsed(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(picture)  # noqa: S314  (made by this repository)


def test_picture() -> None:
    root = parsed(curves.memory_curves([result(), result(nbytes=10**9)]))
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == svg + "svg"
    words = {text.text for text in root.iter(svg + "text")}
    assert {"cp", "mdl convert --no-fsync", "the checkpoint's size", "1", "2"} <= words
    assert {"size of the checkpoint, GB", "peak anonymous memory, MB"} <= words
    assert len(list(root.iter(svg + "path"))) == 2
    parsed(curves.memory_curves([result()]))


def test_page_takes_each_table_at_its_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- speed: x -->\nold\n<!-- end -->\nb\n<!-- speed: y -->\nold\n<!-- end -->\n")
    tables.write_page(page, {"y": "| \\1 |\n"})
    assert page.read_text() == "a\n<!-- speed: x -->\nold\n<!-- end -->\nb\n<!-- speed: y -->\n| \\1 |\n<!-- end -->\n"
    with pytest.raises(ValueError, match="speed: z"):
        tables.write_page(page, {"z": ""})


def test_every_scenario_has_its_place_in_the_page_and_divides_by_a_way_it_runs() -> None:
    page = (ROOT / "docs" / "speed.md").read_text()
    for scenario in SCENARIOS.values():
        assert tables.BLOCK.format(scenario.name) in page
        assert scenario.base in scenario.ways
        assert set(scenario.ways) <= set(WAYS)


def test_memory_of_children_counts(tmp_path: Path) -> None:
    child = "import time; held = bytearray(80_000_000); time.sleep(0.3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with (tmp_path / "log").open("w+b") as log:
        run = measure.measured([sys.executable, "-c", parent], log)
        assert run.rss > run.anon > 80_000_000
        with pytest.raises(measure.RunFailedError, match="last words"):
            measure.measured([sys.executable, "-c", "raise SystemExit('last words')"], log)


def test_the_machine_has_no_name_and_no_place(tmp_path: Path) -> None:
    said = measure.machine(tmp_path)
    assert str(tmp_path) not in said
    assert "/" not in said
    assert Path(program()).name == "mdl"

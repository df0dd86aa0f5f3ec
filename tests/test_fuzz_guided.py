"""The coverage-guided fuzzer, briefly and with a fixed seed; `make fuzz` is the long run (docs/security-testing.md)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .fuzz import seeds, targets

pytest.importorskip(
    "atheris", reason="the coverage-guided fuzzer is not installed here: make fuzzer", exc_type=ImportError
)

FUZZ = Path(__file__).parent / "fuzz"
RUNS = {
    "unpickle": 6000,
    "torch_zip": 3000,
    "legacy": 3000,
    "safetensors": 6000,
    "dcp_metadata": 6000,
    "mapping": 500,
    "inventory": 2000,
}
PLANTED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import harness, targets
read = targets.TARGETS["legacy"].read
def planted(data, path):
    if len(data) == 3:
        raise KeyError("planted")
    return read(data, path)
targets.TARGETS["legacy"].read = planted
harness.main()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeds.write(tmp_path_factory.mktemp("corpus"))


def fuzz(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    options = ["-seed=1", "-timeout=20", "-max_len=4096", f"-artifact_prefix={folder}/"]
    return subprocess.run(
        [sys.executable, *command, *options], capture_output=True, text=True, check=False, timeout=300
    )


def test_every_target_is_fuzzed() -> None:
    assert set(RUNS) == set(targets.TARGETS)


@pytest.mark.parametrize("name", RUNS)
def test_nothing_breaks_a_promise(name: str, corpus: Path, tmp_path: Path) -> None:
    options = (f"-runs={RUNS[name]}", f"-dict={corpus / 'words'}")
    done = fuzz(FUZZ / "harness.py", name, corpus / name, *options, folder=tmp_path)

    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Done {RUNS[name]} runs" in done.stderr
    covered = [int(n) for n in re.findall(r" cov: (\d+) ", done.stderr)]
    assert covered[-1] > covered[0] > 20, "the readers are not instrumented, or no input got any further"


def test_a_planted_fault_is_found(corpus: Path, tmp_path: Path) -> None:
    done = fuzz("-c", PLANTED, FUZZ, "legacy", corpus / "legacy", "-runs=100000", folder=tmp_path)

    assert done.returncode != 0
    assert "planted" in done.stderr + done.stdout
    assert [len(path.read_bytes()) for path in tmp_path.glob("crash-*")] == [3]

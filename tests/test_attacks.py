"""The attack corpus against the readers: nothing runs, nothing hangs, each case ends as it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .attacks.case import MARK, Case
from .attacks.corpus import all_cases

ROOT = Path(__file__).parent.parent
SECONDS = 5.0
CASES = all_cases()


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases opened in one process of limited memory, in a folder of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    command = [sys.executable, "-m", "mdl.tests.attacks.judge", str(folder)]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{lines[-1] if lines else ''}\n{done.stderr[-2000:]}"
    return {"folder": folder, **{line["name"]: line for line in lines if "name" in line}}


def test_the_corpus_is_large_and_nothing_of_it_ran(verdicts: dict[str, Any]) -> None:
    assert len(CASES) >= 200
    assert not list(verdicts["folder"].rglob(MARK))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_case_ends_as_it_must(case: Case, verdicts: dict[str, Any]) -> None:
    found = verdicts[case.name]
    assert found["seconds"] < SECONDS
    assert "MemoryError" not in found.get("message", "")
    if case.refused:
        assert found.get("kind") == "INPUT", found
        assert [phrase for phrase in case.refused if phrase not in found["message"]] == [], found["message"][:500]
    else:
        assert "kind" not in found, found
        assert [name for name in case.tensors if name not in found["tensors"]] == []

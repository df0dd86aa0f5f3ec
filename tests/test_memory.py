"""A conversion needs no memory of its own for the weights, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from . import checkpoints as make

CHILD = """
import json, sys, threading
from pathlib import Path

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))

peak, done = [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

threading.Thread(target=watch, daemon=True).start()

from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert

options = Options(dtype=sys.argv[3] or None)
written = convert(prepare(Path(sys.argv[1]), options), Path(sys.argv[2]), tokenizer="none")
done.set()
heavy = [name for name in ("torch", "transformers", "vllm") if name in sys.modules]
print(json.dumps({"peak_kib": max(peak[0], anonymous()), "nbytes": written.nbytes, "heavy": heavy}))
"""
LIMIT_KIB = 100_000


def empty(state: make.State) -> make.State:
    """The same shapes without values: written under skip_data, such a tensor is a hole in the file."""
    made = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
    for tied in ("lm_head.weight", "output.weight"):
        twin = "transformer.wte.weight" if tied == "lm_head.weight" else "tok_embeddings.weight"
        if tied in state and state[tied] is state[twin]:
            made[tied] = made[twin]
    return made


def measured(path: Path, out: Path, dtype: str = "") -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, str(path), str(out), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")


@linux
def test_transposed_and_rounded(tmp_path: Path) -> None:
    """300 MB of float32, most of it in matrices that are turned, as bfloat16."""
    with torch.device("meta"):
        shapes = make.nanogpt_state(layers=5, hidden=1024, vocab=8192, context=1024)
    state = empty(shapes)
    with torch.serialization.skip_data():
        path = make.nanogpt(tmp_path / "x.pt", state, heads=16)
    size = path.stat().st_size

    got = measured(path, tmp_path / "out", "bfloat16")

    assert size > 290e6
    assert got["heavy"] == []
    assert got["nbytes"] > 140e6
    assert got["peak_kib"] < LIMIT_KIB


@linux
def test_ranks_joined_along_both_dimensions(tmp_path: Path) -> None:
    """300 MB of bfloat16 in two ranks; heads are reordered, half of the joins are by columns."""
    with torch.device("meta"):
        shapes = make.llama_state(
            layers=4, hidden=2048, heads=16, kv_heads=8, ffn=4096, vocab=4096, dtype=torch.bfloat16
        )
    state = empty(shapes)
    state["norm.weight"] = torch.ones(2048, dtype=torch.bfloat16)
    with torch.serialization.skip_data():
        path = make.meta(tmp_path / "raw", state, make.params(state, heads=16, kv_heads=8), ranks=2)

    got = measured(path, tmp_path / "out")

    assert got["heavy"] == []
    assert got["nbytes"] > 290e6
    assert got["peak_kib"] < LIMIT_KIB

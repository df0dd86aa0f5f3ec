"""Several workers: every tier passes on a right layout and fails on a wrong one, split by heads and by layers."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mdl.validate.client import Engine
from mdl.validate.report import Report
from mdl.validate.verify import Settings, verify

from . import decoders, nanochats
from . import servable as make
from .checkpoints import llama2c_args, trained

pytestmark = pytest.mark.engine

ALL = ("layout", "coverage", "prefill", "decode", "generate")


@pytest.fixture(scope="module")
def workers() -> Generator[Engine]:
    """An engine whose workers share the cores of this machine."""
    with Engine(env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"}) as engine:
        yield engine


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    state = make.llama_state()
    args = llama2c_args(state) | {"max_seq_len": 128}  # long enough for a prefix that the cache keeps
    checkpoint = trained(folder / "ckpt.pt", state, args)
    return make.layout(checkpoint, folder / "out")


def verdicts(report: Report) -> dict[str, bool | None]:
    return {one.name: one.ok for one in report.checks}


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["tp", "pp"])
def test_two_workers_compute_what_one_does(sizes: dict[str, int], good: Path, workers: Engine) -> None:
    report = verify(good, Settings(**sizes), engine=workers)  # type: ignore[arg-type]  # integers by name

    assert verdicts(report) == dict.fromkeys(ALL, True)
    coverage, decode = (next(c for c in report.checks if c.name == name) for name in ("coverage", "decode"))
    stored = len(load_file(good / "model.safetensors"))
    assert coverage.measured == f"{stored} tensors in, {stored} bit-equal in vLLM, 0 faults"
    assert min(decode.figures[name] for name in ("steps", "again", "spared")) > 0
    assert any("located with one worker" in note for note in report.notes)


def test_what_lies_before_the_layers_stays_with_the_first_stage(tmp_path: Path, workers: Engine) -> None:
    """nanochat's last release: the stream's beginning, its middle and the token ids travel from stage to stage."""
    row = "smear and back-out"
    source = nanochats.saved(tmp_path / "d4", row)
    layout = make.layout(source, tmp_path / "out")

    report = verify(layout, Settings(locate=False, pipeline_parallel_size=2), engine=workers)

    assert verdicts(report) == dict.fromkeys(ALL, True)


def test_what_stopped_a_worker_is_told(tmp_path: Path, workers: Engine) -> None:
    """vLLM itself says that a worker failed and why not."""
    config = decoders.recurrent(9, "gated", everywhere=False)  # layers 1 and 2 of 3: the first stage has both kinds
    layout = make.layout(decoders.saved(tmp_path / "source", 9, config), tmp_path / "out")

    report = verify(layout, Settings(locate=False, pipeline_parallel_size=2), engine=workers)

    assert verdicts(report)["coverage"] is False
    coverage = next(c for c in report.checks if c.name == "coverage")
    assert "stages of layers 0 to 1, 2 to 2 do not each have both attention and recurrences" in coverage.detail[0]


def test_what_a_later_stage_lacks_is_found(good: Path, tmp_path: Path, workers: Engine) -> None:
    """The first stage alone would be whole: each tensor belongs to one stage, and every stage is asked."""
    tensors = load_file(good / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    for name in ("config.json", "generation_config.json", "mdl.json"):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")

    report = verify(tmp_path, Settings(against=good.parent / "ckpt.pt", pipeline_parallel_size=2), engine=workers)

    found = verdicts(report)
    assert (found["coverage"], found["prefill"]) == (False, False)
    coverage = next(c for c in report.checks if c.name == "coverage")
    assert "nothing was loaded into model.layers.1.self_attn.qkv_proj.weight" in coverage.detail[0]
    assert report.located is not None
    assert report.located.module.startswith("layers.1.attention")

"""Several workers: every tier passes on a right layout and fails on a wrong one, split by heads and by layers."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mdl.archs.decoder.schema import decoder_of
from mdl.archs.decoder.split import refuse_ranks, refuse_stages
from mdl.errors import MdlError
from mdl.validate.causes import WorkerError, causes, left
from mdl.validate.client import Engine
from mdl.validate.report import Report
from mdl.validate.verify import Settings, verify

from . import nanochats
from . import servable as make
from .checkpoints import llama2c_args, trained
from .decoders import drawn, recurrent

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


@pytest.mark.engine
def test_two_ranks_compute_what_one_does(good: Path, workers: Engine) -> None:
    report = verify(good, Settings(tensor_parallel_size=2), engine=workers)

    assert verdicts(report) == dict.fromkeys(ALL, True)
    assert min(_decoded(report, good)[name] for name in ("steps", "again", "spared")) > 0
    assert any("located with one worker" in note for note in report.notes)


@pytest.mark.engine
def test_two_stages_compute_what_one_does(tmp_path: Path, workers: Engine) -> None:
    """nanochat's last release: the stream's beginning, its middle and the token ids travel from stage to stage."""
    layout = make.layout(nanochats.saved(tmp_path / "d4", "smear and back-out"), tmp_path / "out")

    report = verify(layout, Settings(locate=False, pipeline_parallel_size=2), engine=workers)

    assert verdicts(report) == dict.fromkeys(ALL, True)
    assert _decoded(report, layout)["steps"] > 0


def _decoded(report: Report, layout: Path) -> Mapping[str, float]:
    """What decode did, once every stored tensor was found again."""
    coverage, decode = (next(c for c in report.checks if c.name == name) for name in ("coverage", "decode"))
    stored = len(load_file(layout / "model.safetensors"))
    assert coverage.measured == f"{stored} tensors in, {stored} bit-equal in vLLM, 0 faults"
    return decode.figures


@pytest.mark.engine
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


def test_what_stopped_a_worker_is_told() -> None:
    """vLLM's own words are that there is a root cause, somewhere."""

    def start() -> None:
        with causes():
            with suppress(ValueError), left():
                raise ValueError("6 heads can't be split")
            raise RuntimeError("a worker failed, see stack trace for root cause")

    with pytest.raises(WorkerError, match="ValueError: 6 heads can't be split"):
        start()
    with pytest.raises(RuntimeError, match="out of memory"), causes():
        raise RuntimeError("out of memory")
    with pytest.raises(ValueError, match="alone"), left():
        raise ValueError("alone")


def test_what_can_not_be_split_is_refused_by_name() -> None:
    d = decoder_of(drawn(8))  # 6 heads, 3 key heads
    refuse_ranks(d, 3)
    with pytest.raises(MdlError, match="6 heads and 3 key heads can't be split over 2 ranks"):
        refuse_ranks(d, 2)
    d = decoder_of(recurrent(9, "gated", everywhere=False))  # layers 1 and 2 of 3
    refuse_stages(d, [(0, 3)])
    with pytest.raises(MdlError, match="stages of layers 0 to 1, 2 to 2 do not each have both"):
        refuse_stages(d, [(0, 2), (2, 3)])
    mixed = drawn(8)
    mixed["attention"]["value_residual"] = True
    with pytest.raises(MdlError, match="first layer's values"):
        refuse_stages(decoder_of(mixed), [(0, 1), (1, 2)])

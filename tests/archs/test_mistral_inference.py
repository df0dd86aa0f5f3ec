"""Mistral's own layout: recognise, measure, refuse, convert and back; against mistral-inference's classes and vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.archs.base import Dims
from mdl.convert.export import export
from mdl.convert.prepare import Options, Prepared, prepare
from mdl.convert.run import convert
from mdl.errors import MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import Settings, verify

from .. import checkpoints as make
from .. import checkpoints_mistral as mistral
from .. import upstream
from ..converted import nmse, with_dims

IDS = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:48]
LIMIT = 1e-11  # right ones measure below 1e-12


def eager_logits(prepared: Prepared, tensors: make.State, **changed: Any) -> torch.Tensor:
    """Our forward's logits [T, V] of :data:`IDS`, with some of the dims changed."""
    return with_dims(prepared, tensors, IDS, **changed)


def refusals(path: Path, **given: str) -> str:
    with pytest.raises(MdlError) as caught:
        prepare(path, Options(given=given)).plan.refuse()
    return str(caught.value)


@pytest.mark.parametrize("safetensors", [False, True], ids=["pth", "safetensors"])
def test_from_the_release_to_the_layout_and_back(safetensors: bool, tmp_path: Path) -> None:
    raw = mistral.release(tmp_path / "raw", safetensors=safetensors, dtype=torch.bfloat16, sliding_window=16)
    prepared = prepare(raw)

    prepared.plan.refuse()
    assert prepared.arch.name == "mistral_inference"
    convert(prepared, tmp_path / "out", tokenizer="none")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["architectures"], config["head_dim"], config["sliding_window"]) == (["MistralForCausalLM"], 32, 16)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    tensors = mistral.state(torch.bfloat16)
    make.same(make.saved(tmp_path / "out"), mistral.target_of(tensors))

    export(tmp_path / "out", tmp_path / "back.pt")
    make.same(torch.load(tmp_path / "back.pt"), tensors)


def test_what_is_not_written_down_is_asked_for(tmp_path: Path) -> None:
    raw = mistral.release(tmp_path / "raw", rope_theta=None, max_seq_len=None)

    said = refusals(raw)

    assert "Mistral 7B v0.1 was trained with 10000" in said
    assert "--set rope_theta=VALUE" in said
    assert "--set max_seq_len=VALUE" in said
    dims = prepare(raw, Options(given={"rope_theta": "10000", "context": "64"})).dims
    assert (dims.entries["rope_theta"].source, dims["sliding_window"], dims["context"]) == ("user", 0, 64)


@pytest.mark.parametrize("key", ["sliding_window", "_sliding_window"])
def test_both_names_of_the_window(key: str, tmp_path: Path) -> None:
    prepared = prepare(mistral.release(tmp_path / "raw", **{key: 24}))

    assert prepared.dims.entries["sliding_window"].because == f"params.{key}"
    assert prepared.config["sliding_window"] == 24


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (
            {"head_dim": 16},
            "(128 rows of layers.0.attention.wq.weight / 4 heads) but 16 by params.head_dim",
        ),
        ({"n_heads": 3}, "3 heads do not fit layers.0.attention.wq.weight with 128 rows"),
        ({"n_kv_heads": 4}, "kv_heads is 2 by the tensors"),
        ({"sliding_window": [16, None]}, "layers with different windows"),
        ({"moe": mistral.MOE}, "--arch mixtral"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantised weights"),
        ({"yarn": {"factor": 16}}, "stretched rotary positions"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_what_can_not_be_is_refused(params: dict[str, Any], says: str, tmp_path: Path) -> None:
    raw = mistral.release(tmp_path / "raw")
    file = raw / "params.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **params}))

    assert says in refusals(raw)


def test_without_params_it_is_asked_which_family_it_is(tmp_path: Path) -> None:
    torch.save(mistral.state(), tmp_path / "bare.pt")

    said = refusals(tmp_path / "bare.pt")

    assert "could be any of llama2c, llama_meta, mistral_inference" in said
    assert "head_dim is not dim / n_heads" in said
    with pytest.raises(MdlError, match="n_heads=VALUE"):
        prepare(tmp_path / "bare.pt", Options(arch="mistral_inference"))


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("params", [{}, {"dim": 128}], ids=["nemo", "7b"])
def test_our_forward_is_that_of_mistral_inference(window: int | None, params: dict[str, int], tmp_path: Path) -> None:
    theirs = upstream.mistral(tmp_path / "raw", {**mistral.SIZES, **params, "sliding_window": window})
    prepared = prepare(tmp_path / "raw", Options(given={"rope_theta": "1000000", "context": "64"}))
    tensors = torch.load(tmp_path / "raw/consolidated.00.pth")

    ours = eager_logits(prepared, tensors)

    assert {name: tuple(t.shape) for name, t in tensors.items()} == mistral.shapes({**mistral.SIZES, **params})
    assert nmse(ours, theirs.prefill(IDS)) < LIMIT
    assert nmse(ours, theirs.decode(IDS)) < LIMIT  # the window is the length of their rotating buffer
    for sabotage in ({"rope_theta": 10000.0}, {"sliding_window": 15 if window else 40}, {"norm_eps": 1e-3}):
        assert nmse(eager_logits(prepared, tensors, **sabotage), theirs.decode(IDS)) > 1e-8


def test_a_window_that_is_left_out_shows(tmp_path: Path) -> None:
    prepared = prepare(mistral.release(tmp_path / "raw", sliding_window=16))
    tensors = mistral.state()

    right = eager_logits(prepared, tensors)

    assert torch.equal(eager_logits(prepared, tensors, sliding_window=0)[:16], right[:16])
    assert nmse(eager_logits(prepared, tensors, sliding_window=0), right) > 1e-3
    with pytest.raises(RuntimeError, match="size mismatch"):
        eager_logits(prepared, tensors, head_dim=24)


@pytest.mark.engine
def test_vllm_computes_the_same(tmp_path: Path, engine: Engine) -> None:
    """A window of 48 in a context of 256: the long sequences of verify go beyond it."""
    raw = mistral.release(tmp_path / "raw", sliding_window=48)
    convert(prepare(raw), tmp_path / "out", tokenizer="none")

    report = verify(tmp_path / "out", engine=engine)

    assert report.ok, report
    assert report.versions["model class"].endswith("MistralForCausalLM")

    file = tmp_path / "out/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sliding_window": None}))
    checks = {check.name: check.ok for check in verify(tmp_path / "out", Settings(locate=False), engine=engine).checks}
    assert (checks["layout"], checks["prefill"]) == (False, False)  # by its hash, and by its logits


def test_dims_carry_their_provenance(tmp_path: Path) -> None:
    dims: Dims = prepare(mistral.release(tmp_path / "raw")).dims

    assert {
        name: dims.entries[name].source for name in ("heads", "norm_eps", "rope_theta", "context")
    } == dict.fromkeys(("heads", "norm_eps", "rope_theta", "context"), "file")
    assert {dims.entries[name].source for name in ("layers", "hidden", "head_dim", "kv_heads", "ffn", "vocab")} == {
        "shapes"
    }

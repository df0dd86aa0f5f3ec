"""torchtune's native layout: what is asked of Llama, Mistral and Phi-3; and every family of it there and back, against
torchtune and vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError
from mdl.validate.client import Engine

from ..torchtune_cases import CASES, check_round_trip, check_upstream, check_vllm, prepared, state


def test_what_no_tensor_tells_is_asked_for(tmp_path: Path) -> None:
    torch.save(state(CASES["llama3_2"]), tmp_path / "tied.pt")
    torch.save(state(CASES["llama3"]), tmp_path / "own.pt")

    with pytest.raises(MdlError, match="could be any of torchtune, torchtune_gemma"):
        prepare(tmp_path / "tied.pt")
    with pytest.raises(MdlError) as caught:
        prepare(tmp_path / "own.pt")
    assert all(text in str(caught.value) for text in ("--set heads=", "--set builder=", "model._component_", "phi3"))
    with pytest.raises(MdlError, match="it must be one of: llama2, code_llama2"):
        prepare(tmp_path / "own.pt", Options(given={"heads": "4", "builder": "llama4"}))


def test_the_factor_of_llama_3_2_is_said_out_loud(tmp_path: Path) -> None:
    torch.save(state(CASES["llama3_2"]), tmp_path / "x.pt")

    made = prepared(CASES["llama3_2"], tmp_path / "x.pt")

    assert made.config["rope_parameters"]["factor"] == 32.0
    assert "Meta's own code has 8 hard-wired" in made.dims.entries["rope_factor"].because
    assert prepared(CASES["llama3_2"], tmp_path / "x.pt", rope_factor="8").dims["rope_factor"] == 8.0


def test_the_theta_of_phi_4_is_said_out_loud(tmp_path: Path) -> None:
    torch.save(state(CASES["phi4"]), tmp_path / "x.pt")

    dim = prepared(CASES["phi4"], tmp_path / "x.pt").dims.entries["rope_theta"]

    assert (dim.value, "Microsoft trained Phi-4 with 250000" in dim.because) == (10_000.0, True)


@pytest.mark.parametrize("name", CASES)
def test_from_the_checkpoint_to_the_layout_and_back(name: str, tmp_path: Path) -> None:
    check_round_trip(CASES[name], tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_our_forward_is_that_of_torchtune(name: str, tmp_path: Path) -> None:
    check_upstream(CASES[name], tmp_path)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["llama3_2", "qwen2", "gemma", "qwen3", "gemma2"])  # one of each family
def test_vllm_computes_the_same(name: str, tmp_path: Path, engine: Engine) -> None:
    check_vllm(CASES[name], tmp_path, engine)

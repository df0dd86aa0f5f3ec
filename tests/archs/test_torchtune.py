"""Llama, Mistral, Phi-3 in torchtune's native layout: recognise, ask, convert and back; against torchtune and vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError
from mdl.validate.client import Engine

from ..torchtune_cases import Case, check_round_trip, check_upstream, check_vllm, prepared, state


def _llama(builder: str, **case: Any) -> Case:
    return Case("torchtune", {"builder": builder}, f"{builder}:{builder}", **case)


CASES = {
    "llama2": _llama("llama2"),
    "llama3": _llama("llama3"),
    "llama3_1": _llama("llama3_1"),
    "llama3_2": _llama("llama3_2", more={"tie_word_embeddings": True}, tied=True),
    "mistral": _llama("mistral"),
    "phi3": _llama("phi3", interleaved=False),
}


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


@pytest.mark.parametrize("name", CASES)
def test_from_the_checkpoint_to_the_layout_and_back(name: str, tmp_path: Path) -> None:
    check_round_trip(CASES[name], tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_our_forward_is_that_of_torchtune(name: str, tmp_path: Path) -> None:
    check_upstream(CASES[name], tmp_path)


@pytest.mark.engine
def test_vllm_computes_the_same(tmp_path: Path, engine: Engine) -> None:
    check_vllm(CASES["llama3_2"], tmp_path, engine)

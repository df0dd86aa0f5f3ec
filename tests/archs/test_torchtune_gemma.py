"""Gemma in torchtune's native layout: recognise, ask, convert and back; against torchtune's builders and vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError
from mdl.validate.client import Engine

from ..torchtune_cases import Case, check_round_trip, check_upstream, check_vllm, state

CASES = {
    "gemma": Case("torchtune_gemma", {}, "gemma:gemma", {"head_dim": 32}, tied=True),
}


def test_llama_is_as_likely_and_so_it_is_asked(tmp_path: Path) -> None:
    torch.save(state(CASES["gemma"]), tmp_path / "gemma.pt")

    with pytest.raises(MdlError, match="could be any of torchtune, torchtune_gemma"):
        prepare(tmp_path / "gemma.pt")
    made = prepare(tmp_path / "gemma.pt", Options(arch="torchtune_gemma", given={"heads": "4"}))
    assert made.dims.entries["norm_eps"].because == "torchtune's gemma_2b and gemma_7b builders"


@pytest.mark.parametrize("name", CASES)
def test_from_the_checkpoint_to_the_layout_and_back(name: str, tmp_path: Path) -> None:
    check_round_trip(CASES[name], tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_our_forward_is_that_of_torchtune(name: str, tmp_path: Path) -> None:
    check_upstream(CASES[name], tmp_path)


@pytest.mark.engine
def test_vllm_computes_the_same(tmp_path: Path, engine: Engine) -> None:
    check_vllm(CASES["gemma"], tmp_path, engine)

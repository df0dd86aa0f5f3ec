"""Qwen2 in torchtune's native layout: recognise, ask, convert and back; against torchtune's builders and vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError
from mdl.validate.client import Engine

from ..torchtune_cases import Case, check_round_trip, check_upstream, check_vllm, state

CASES = {
    "qwen2": Case(
        "torchtune_qwen2", {"norm_eps": "1e-6"}, "qwen2:qwen2", {"norm_eps": 1e-6}, interleaved=False, bias=True
    ),
    "qwen2_tied": Case(
        "torchtune_qwen2",
        {"norm_eps": "1e-6"},
        "qwen2:qwen2",
        {"norm_eps": 1e-6, "tie_word_embeddings": True},
        tied=True,
        interleaved=False,
        bias=True,
    ),
}


def test_what_no_tensor_tells_is_asked_for(tmp_path: Path) -> None:
    torch.save(state(CASES["qwen2"]), tmp_path / "qwen2.pt")

    with pytest.raises(MdlError, match="1e-5 in its 14b_base") as caught:
        prepare(tmp_path / "qwen2.pt", Options(given={"heads": "4"}))
    assert "--set context=" in str(caught.value)
    with pytest.raises(MdlError, match="3 heads do not fit"):
        prepare(tmp_path / "qwen2.pt", Options(given={"heads": "3", "norm_eps": "1e-6", "context": "64"}))


@pytest.mark.parametrize("name", CASES)
def test_from_the_checkpoint_to_the_layout_and_back(name: str, tmp_path: Path) -> None:
    check_round_trip(CASES[name], tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_our_forward_is_that_of_torchtune(name: str, tmp_path: Path) -> None:
    check_upstream(CASES[name], tmp_path)


@pytest.mark.engine
def test_vllm_computes_the_same(tmp_path: Path, engine: Engine) -> None:
    check_vllm(CASES["qwen2"], tmp_path, engine)

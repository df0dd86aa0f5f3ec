"""Gemma in torchtune's native layout: what is asked. What all its families pass is in test_torchtune.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError

from ..torchtune_cases import CASES, state


def test_llama_is_as_likely_and_so_it_is_asked(tmp_path: Path) -> None:
    torch.save(state(CASES["gemma"]), tmp_path / "gemma.pt")

    with pytest.raises(MdlError, match="could be any of torchtune, torchtune_gemma"):
        prepare(tmp_path / "gemma.pt")
    made = prepare(tmp_path / "gemma.pt", Options(arch="torchtune_gemma", given={"heads": "4"}))
    assert made.dims.entries["norm_eps"].because == "torchtune's gemma_2b and gemma_7b builders"

"""Qwen2 in torchtune's native layout: what is asked. What all its families pass is in test_torchtune.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError

from ..torchtune_cases import CASES, state


def test_what_no_tensor_tells_is_asked_for(tmp_path: Path) -> None:
    torch.save(state(CASES["qwen2"]), tmp_path / "qwen2.pt")

    with pytest.raises(MdlError, match="1e-5 in its 14b_base") as caught:
        prepare(tmp_path / "qwen2.pt", Options(given={"heads": "4"}))
    assert "--set context=" in str(caught.value)
    with pytest.raises(MdlError, match="3 heads do not fit"):
        prepare(tmp_path / "qwen2.pt", Options(given={"heads": "3", "norm_eps": "1e-6", "context": "64"}))

"""Qwen3 in torchtune's native layout: what is asked; its maths, by transformers' class on the layout. What all its
families pass is in test_torchtune.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.errors import MdlError

from ..converted import nmse
from ..torchtune_cases import CASES, IDS, eager_logits, prepared, state


def test_what_no_tensor_tells_is_asked_for(tmp_path: Path) -> None:
    torch.save(state(CASES["qwen3"]), tmp_path / "qwen3.pt")

    with pytest.raises(MdlError, match="40960 for those named instruct"):
        prepare(tmp_path / "qwen3.pt", Options(given={"heads": "4"}))
    with pytest.raises(MdlError, match="2 heads are of 64 channels by q_proj, but of 32 by q_norm"):
        prepare(tmp_path / "qwen3.pt", Options(given={"heads": "2", "context": "64"}))


@pytest.mark.parametrize("name", ["qwen3", "qwen3_tied"])
def test_our_forward_is_that_of_qwen3_on_the_layout(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tensors = state(CASES[name])
    torch.save(tensors, tmp_path / "x.pt")
    made = prepared(CASES[name], tmp_path / "x.pt")
    convert(made, tmp_path / "out", tokenizer="none")
    model = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()

    with torch.no_grad():
        theirs = model(IDS[None]).logits[0]

    assert nmse(eager_logits(made, tensors), theirs) < 1e-11
    swapped = {key.replace("q_norm", "?").replace("k_norm", "q_norm").replace("?", "k_norm"): t
               for key, t in tensors.items()}  # fmt: skip
    assert nmse(eager_logits(made, swapped), theirs) > 1e-4
    assert nmse(eager_logits(made, tensors, norm_eps=1e-3), theirs) > 1e-8

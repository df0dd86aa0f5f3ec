"""Gemma 2 in torchtune's native layout: where torchtune is not Gemma 2 is said; its maths, by transformers' class on
the layout. What all its families pass is in test_torchtune.py, with torchtune's own place for the cap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.errors import MdlError
from mdl.views import show_plan

from ..converted import nmse
from ..torchtune_cases import CASES, IDS, eager_logits, prepared, state

CASE = CASES["gemma2"]


def test_where_torchtune_is_not_gemma_2_is_said_out_loud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(state(CASE), tmp_path / "x.pt")

    made = prepare(tmp_path / "x.pt", Options(given={"heads": "4"}))

    because = {name: made.dims.entries[name].because for name in ("attention_softcap", "logit_softcap", "softcap_of")}
    assert "30 for the scores and 50 at the end" in because["attention_softcap"]
    assert because["attention_softcap"] == because["logit_softcap"]
    assert "torchtune limits the last hidden state instead" in because["softcap_of"]
    (deviation,) = made.dims.deviations
    assert deviation.startswith("served as Google's Gemma 2: torchtune's own logits differ")
    show_plan(made, reverse=False)
    assert "deviates" in capsys.readouterr().out
    said = {key: made.config[key] for key in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")}
    assert said == {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}
    assert made.config["layer_types"] == ["sliding_attention", "full_attention"]
    with pytest.raises(MdlError, match="it must be one of: logits"):
        prepare(tmp_path / "x.pt", Options(given={"heads": "4", "softcap_of": "hidden"}))


def test_the_largest_divides_scores_by_another_number(tmp_path: Path) -> None:
    wide = {128: 4608}
    tensors = {name: torch.zeros([wide.get(n, n) for n in t.shape], dtype=torch.bfloat16)
               for name, t in state(CASE).items() if not name.startswith("layers.1.")}  # fmt: skip
    deep = {name.replace("layers.0.", f"layers.{i}."): t for i in range(46) for name, t in tensors.items()}
    torch.save(deep, tmp_path / "x.pt")

    assert prepare(tmp_path / "x.pt", Options(given={"heads": "144"})).config["query_pre_attn_scalar"] == 144


def test_our_forward_is_that_of_gemma_2_on_the_layout(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tensors = state(CASE)
    torch.save(tensors, tmp_path / "x.pt")
    caps = {"attention_softcap": "3", "logit_softcap": "2"}  # low enough to show
    made = prepared(CASE, tmp_path / "x.pt", **caps)
    convert(made, tmp_path / "out", tokenizer="none")
    load = transformers.Gemma2ForCausalLM.from_pretrained
    model = load(tmp_path / "out", dtype=torch.float32, attn_implementation="eager").eval()

    with torch.no_grad():
        theirs = model(IDS[None]).logits[0]

    assert nmse(eager_logits(made, tensors), theirs) < 1e-11
    for sabotage in ({"sliding_window": 15}, {"attention_scalar": 32}, {"attention_softcap": 50.0},
                     {"logit_softcap": 30.0}, {"softcap_of": "hidden"}):  # fmt: skip
        assert nmse(eager_logits(made, tensors, **sabotage), theirs) > 1e-6, sabotage

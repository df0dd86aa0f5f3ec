"""torchtitan's Qwen3 under all its names: recognise, ask, convert and back; against torchtitan's own class, that of
transformers on the layout, and vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert.export import export
from mdl.convert.prepare import Options, Prepared, prepare
from mdl.convert.run import convert
from mdl.errors import MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import verify

from .. import checkpoints as make
from .. import upstream
from ..checkpoints_llamas import titan, titan_fused, titan_qwen3
from ..converted import nmse, with_dims
from ..torchtune_cases import IDS, LIMIT

GIVEN = Options(given={"context": "256"})


def case(name: str) -> make.State:
    """A state dict under the names of one time."""
    state = titan_qwen3(tied=name == "v0.3, tied")
    if name == "fused":
        return titan_fused(state, 64)
    if name == "v0.2":
        return {key.replace("qkv_linear.", "").replace("lm_head", "output"): t for key, t in state.items()}
    return state


CASES = ("v0.2", "v0.3", "v0.3, tied", "fused")


def prepared(path: Path) -> Prepared:
    """Recognised and planned, without problems."""
    made = prepare(path, GIVEN)
    made.plan.refuse()
    return made


def eager_logits(made: Prepared, state: make.State, **changed: Any) -> torch.Tensor:
    """Our forward's logits [T, V], with some of the dims changed."""
    given = {name: t for name, t in state.items() if not (made.dims["tied"] and name == "lm_head.weight")}
    return with_dims(made, given, IDS, **changed)


@pytest.mark.parametrize("name", CASES)
def test_from_the_folder_to_the_layout_and_back(name: str, tmp_path: Path) -> None:
    state, plain = case(name), titan_qwen3()
    made = prepared(titan(tmp_path / "step-10", state))

    assert (made.arch.name, made.config["tie_word_embeddings"]) == ("torchtitan_qwen3", name == "v0.3, tied")
    assert (made.dims["heads"], made.dims["kv_heads"], made.dims["head_dim"]) == (4, 2, 64)
    assert made.dims.entries["heads"].because == "256 columns of wo / 64 channels of q_norm"
    convert(made, tmp_path / "out", tokenizer="none")
    written = make.saved(tmp_path / "out")
    for x in "qkv":
        raw = plain[f"layers.1.attention.qkv_linear.w{x}.weight"]
        assert make.bits(written[f"model.layers.1.self_attn.{x}_proj.weight"]) == make.bits(raw)

    export(tmp_path / "out", tmp_path / "back.pt")
    make.same(torch.load(tmp_path / "back.pt"), state)


def test_the_context_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(MdlError, match=r"training\.seq_len of the job.*--set seq_len="):
        prepare(titan(tmp_path / "step-10", titan_qwen3()))


@pytest.mark.parametrize("name", CASES)
def test_our_forward_is_that_of_torchtitan(name: str, tmp_path: Path) -> None:
    tied = name == "v0.3, tied"
    model = upstream.torchtitan_qwen3(context=256, tied=tied)
    model.load_state_dict(titan_qwen3(tied=tied))
    with torch.no_grad():
        theirs = model(IDS[None])[0]
    torch.save(case(name), tmp_path / "x.pt")
    made = prepared(tmp_path / "x.pt")

    assert {key: t.shape for key, t in model.state_dict().items()} == {key: t.shape for key, t in titan_qwen3().items()}
    assert nmse(eager_logits(made, case(name)), theirs) < LIMIT
    assert nmse(eager_logits(made, case(name), rope_theta=10_000.0), theirs) > 1e-3
    assert nmse(eager_logits(made, case(name), norm_eps=1e-3), theirs) > 1e-8


def test_our_forward_is_that_of_qwen3_on_the_layout(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.save(case("fused"), tmp_path / "x.pt")
    made = prepared(tmp_path / "x.pt")
    convert(made, tmp_path / "out", tokenizer="none")
    model = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()

    with torch.no_grad():
        theirs = model(IDS[None]).logits[0]

    assert nmse(eager_logits(made, case("fused")), theirs) < LIMIT


@pytest.mark.engine
def test_vllm_computes_the_same(tmp_path: Path, engine: Engine) -> None:
    made = prepared(titan(tmp_path / "step-10", case("fused")))
    convert(made, tmp_path / "out", tokenizer="none")

    report = verify(tmp_path / "out", engine=engine)

    assert report.ok, report
    assert report.versions["model class"].endswith("Qwen3ForCausalLM")

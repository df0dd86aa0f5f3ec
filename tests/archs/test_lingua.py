"""lingua's LMTransformer from a step's folder or its consolidated file to the layout and back; its maths, by
transformers' class on the layout; and by vLLM."""

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
from .. import servable
from ..checkpoints_llamas import lingua, lingua_consolidated, lingua_tied
from ..converted import nmse, with_dims
from ..torchtune_cases import IDS


def prepared(path: Path, **given: str) -> Prepared:
    """Recognised and planned, without problems."""
    made = prepare(path, Options(given=given))
    made.plan.refuse()
    return made


def eager_logits(made: Prepared, state: make.State, **changed: Any) -> torch.Tensor:
    """Our forward's logits [T, V] in float64, with some of the dims changed."""
    held = {name: tensor.double() for name, tensor in state.items() if "tied_module" not in name}
    return with_dims(made, held, IDS, **changed)


@pytest.mark.parametrize("write", [lingua, lingua_consolidated])
def test_from_the_checkpoint_to_the_layout_and_back(write: Any, tmp_path: Path) -> None:
    state = servable.llama_state(dtype=torch.bfloat16)
    made = prepared(write(tmp_path / "raw", state))

    assert (made.arch.name, made.config["max_position_embeddings"]) == ("lingua", 256)
    assert made.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    convert(made, tmp_path / "out", tokenizer="none")
    make.same(make.saved(tmp_path / "out"), make.llama_of(state, 4, 2))

    export(tmp_path / "out", tmp_path / "back.pt")
    make.same(torch.load(tmp_path / "back.pt")["model"], state)


def test_a_tied_head_is_the_embeddings_module(tmp_path: Path) -> None:
    made = prepared(lingua(tmp_path / "raw", lingua_tied(), weight_tying=True))

    assert made.config["tie_word_embeddings"] is True
    convert(made, tmp_path / "out", tokenizer="none")
    make.same(make.saved(tmp_path / "out"), make.llama_of(servable.llama_state(tied=True), 4, 2))
    export(tmp_path / "out", tmp_path / "back.pt")
    make.same(torch.load(tmp_path / "back.pt")["model"], lingua_tied())


@pytest.mark.parametrize("head", [32, 64])
def test_the_number_of_heads_by_their_size(head: int, tmp_path: Path) -> None:
    state = servable.llama_state()
    path = lingua_consolidated(tmp_path / "raw", state, n_heads=None, n_kv_heads=64 // head, head_dim=head)

    dims = prepared(path).dims

    assert (dims["heads"], dims["kv_heads"], dims["head_dim"]) == (128 // head, 64 // head, head)
    assert f"head_dim is {head}, n_heads is not given" in dims.entries["heads"].because


def test_what_can_not_be_is_refused(tmp_path: Path) -> None:
    state = servable.llama_state()
    with pytest.raises(MdlError, match="kv_heads is 2 by the tensors"):
        prepare(lingua_consolidated(tmp_path / "a", state, n_kv_heads=4))
    with pytest.raises(MdlError, match=r"head_dim is 32 by the tensors .* but 16 by params\.model\.head_dim"):
        prepare(lingua_consolidated(tmp_path / "b", state, head_dim=16))
    several = {**state, "heads.0.weight": state["output.weight"], "heads.1.weight": state["output.weight"]}
    del several["output.weight"]
    with pytest.raises(MdlError, match=r"the several heads of apps/mtp.*save heads\.0\.weight as output\.weight"):
        prepare(lingua_consolidated(tmp_path / "c", several))
    with pytest.raises(MdlError, match=r"output\.tied_module\.weight differs from tok_embeddings"):
        prepared(
            lingua_consolidated(tmp_path / "d", {**lingua_tied(), "output.tied_module.weight": torch.ones(96, 128)})
        )


def test_a_window_that_lingua_itself_leaves_out_is_said_out_loud(tmp_path: Path) -> None:
    path = lingua_consolidated(tmp_path / "raw", servable.llama_state(), sliding_window=64)

    because = prepared(path).dims.entries["sliding_window"].because

    assert because.startswith("params.json has 64, but lingua's train.py and generate.py attend without it")
    with pytest.raises(MdlError, match=r"sliding_window is 64.*it must be one of: 0"):
        prepare(path, Options(given={"sliding_window": "64"}))


@pytest.mark.parametrize("case", ["plain", "tied", "other constants"])
def test_our_forward_is_that_of_llama_on_the_layout(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    more = {"rope_theta": 500000.0, "norm_eps": 1e-6} if case == "other constants" else {}
    state = lingua_tied() if case == "tied" else servable.llama_state()
    made = prepared(lingua_consolidated(tmp_path / "raw", state, weight_tying=case == "tied", **more))
    convert(made, tmp_path / "out", tokenizer="none")
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()

    with torch.no_grad():
        theirs = llama(IDS[None]).logits[0]

    assert nmse(eager_logits(made, state), theirs) < 1e-12  # transformers' angles and norms are float32
    assert nmse(eager_logits(made, state, rope_theta=20_000.0), theirs) > 1e-4
    assert nmse(eager_logits(made, state, norm_eps=1e-3), theirs) > 1e-4


@pytest.mark.engine
def test_vllm_computes_the_same(tmp_path: Path, engine: Engine) -> None:
    raw = lingua(tmp_path / "raw", servable.llama_state())
    convert(prepared(raw), tmp_path / "out", tokenizer="none")

    report = verify(tmp_path / "out", engine=engine)

    assert report.ok, report
    assert report.versions["model class"].endswith("LlamaForCausalLM")

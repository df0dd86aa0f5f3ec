"""OLMoE from OLMo's folder to the layout and back; its maths against transformers' own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert.export import export
from mdl.convert.prepare import prepare
from mdl.errors import MdlError
from mdl.validate.client import Engine

from .. import checkpoints as make
from .. import olmoes
from ..converted import nmse
from ..gpts_checks import by_transformers, eager, is_green, layout

IDS = torch.tensor([(7 * k * k + 11 * k + 3) % olmoes.VOCAB for k in range(40)])


# a square expert is no riddle: these names are those of one class of megablocks, which stacks rows
@pytest.mark.parametrize("given", [{}, {"tied": True}, {"ffn": olmoes.HIDDEN}], ids=["released", "tied", "square"])
def test_there_and_back(given: dict[str, Any], tmp_path: Path) -> None:
    state = olmoes.state(**given)
    raw = olmoes.saved(tmp_path / "raw", state)
    prepared = layout(raw, tmp_path / "out")

    sizes = {key: prepared.config[key] for key in ("num_experts", "num_experts_per_tok", "num_key_value_heads")}
    assert prepared.arch.name == "olmoe"
    assert sizes == {"num_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    third = state["transformer.blocks.1.ffn.experts.mlp.w2"].chunk(olmoes.EXPERTS)[2]
    assert make.saved(tmp_path / "out")["model.layers.1.mlp.experts.2.down_proj.weight"].equal(third.T)
    assert nmse(eager(raw, ids=IDS), by_transformers(tmp_path / "out", prepared, IDS)) < 1e-13  # its table is float32's
    export(tmp_path / "out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt")
    make.same(back, state)
    assert list(back) == list(state)


def test_mistakes_show(tmp_path: Path) -> None:
    state = olmoes.state()
    prepared = layout(olmoes.saved(tmp_path / "raw", state), tmp_path / "out")
    wanted = by_transformers(tmp_path / "out", prepared, IDS)

    raw = olmoes.saved(tmp_path / "bare", state, **dict.fromkeys(olmoes.CONFIG))
    right = {"n_heads": "4", "moe_top_k": "2", "max_sequence_length": "128"}
    assert nmse(eager(raw, right, ids=IDS), wanted) < 1e-13
    for wrong in ({"moe_top_k": "1"}, {"moe_top_k": "3"}, {"rope_theta": "500000"}):
        assert nmse(eager(raw, {**right, **wrong}, ids=IDS), wanted) > 1e-4
    for i in range(olmoes.LAYERS):
        at = f"transformer.blocks.{i}.ffn.experts.mlp."
        state[at + "w1"], state[at + "v1"] = state[at + "v1"], state[at + "w1"]
    assert nmse(eager(olmoes.saved(tmp_path / "turned", state), ids=IDS), wanted) > 1e-4


def test_what_no_shape_tells_is_asked_for(tmp_path: Path) -> None:
    raw = olmoes.saved(tmp_path / "raw", olmoes.state(), **dict.fromkeys(olmoes.CONFIG))
    with pytest.raises(MdlError) as caught:
        prepare(raw)
    for key in ("n_heads", "moe_top_k", "max_sequence_length"):
        assert f"--set {key}=VALUE" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"clip_qkv": 8.0}, "q, k and v are clipped"),
        ({"norm_after": True}, "norms come after"),
        ({"moe_dropless": False}, "beyond an expert's capacity"),
        ({"layer_norm_eps": 1e-6}, "norms q and k with 1e-05"),
        ({"moe_num_experts": 8}, "experts is 6 by the tensors"),
        ({"n_heads": 3}, "3 heads of 128 channels do not fit att_proj"),
        ({"n_heads": 8}, r"kv_heads is 2 by the tensors.*but 1 by config.model.n_kv_heads"),
    ],
)
def test_what_vllm_does_not_compute_is_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(MdlError, match=said):
        prepare(olmoes.saved(tmp_path / "raw", olmoes.state(), **config))


@pytest.mark.parametrize("shape", [(6, 128, 48), (6 * 128, 48), (100, 128)], ids=["capacity", "columns", "remainder"])
def test_another_stack_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    state = olmoes.state() | {"transformer.blocks.0.ffn.experts.mlp.w1": torch.ones(shape)}
    with pytest.raises(MdlError, match=r"not \[6 x rows of an expert, 128\]"):
        prepare(olmoes.saved(tmp_path / "raw", state))


@pytest.mark.engine
def test_vllm_computes_it(tmp_path: Path, engine: Engine) -> None:
    layout(olmoes.saved(tmp_path / "raw", olmoes.state()), tmp_path / "out")
    is_green(tmp_path / "out", engine)

"""DeepSeek-V3 from its inference code's rank files to the layout; its maths against transformers' own class.

DeepSeek's inference/model.py at 9b4e978 needs a GPU as it stands. By hand, with its kernels stubbed and its weights in
float32, both of its attentions gave mdl's logits: NMSE 1.5e-12 to 2.7e-12, up to 200 positions, stretched rotations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert.export import export
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.errors import MdlError
from mdl.validate.client import Engine

from .. import checkpoints as make
from .. import deepseeks
from ..converted import nmse
from ..gpts_checks import by_transformers, eager, is_green, layout

IDS = torch.tensor([(7 * k * k + 11 * k + 3) % deepseeks.VOCAB for k in range(90)])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("q_rank", [deepseeks.Q_RANK, 0], ids=["low rank", "straight"])
def test_it_computes_what_transformers_computes_of_the_layout(ranks: int, q_rank: int, tmp_path: Path) -> None:
    state = deepseeks.state(q_rank=q_rank)
    raw = deepseeks.saved(tmp_path / "raw", state, ranks, q_lora_rank=q_rank)
    prepared = layout(raw, tmp_path / "out")

    assert (prepared.arch.name, prepared.inventory.ranks) == ("deepseek_inference", ranks)
    assert (prepared.dims["heads"], prepared.dims["nope_dim"], prepared.dims["v_dim"]) == (2, 128, 128)
    made = make.saved(tmp_path / "out")
    assert len(made) == len(state)
    assert made["model.layers.2.mlp.experts.7.down_proj.weight"].equal(state["layers.2.ffn.experts.7.w2.weight"])
    assert made["model.layers.1.self_attn.o_proj.weight"].equal(state["layers.1.attn.wo.weight"])
    wanted = by_transformers(tmp_path / "out", prepared, IDS)
    assert nmse(eager(raw, ids=IDS), wanted) < 1e-12  # both have a float32 table, made in another order


@pytest.mark.parametrize("ranks", [1, 2])
def test_there_and_back(ranks: int, tmp_path: Path) -> None:
    state = deepseeks.state()
    layout(deepseeks.saved(tmp_path / "raw", state, ranks), tmp_path / "out")

    back = export(tmp_path / "out", tmp_path / ("back.pt" if ranks == 1 else "back"))

    assert not [lost for lost in back.lost if "config" not in lost.what], back.lost
    if ranks == 1:
        make.same(torch.load(tmp_path / "back.pt"), state)
        return
    files = sorted((tmp_path / "back").iterdir())
    assert [file.name for file in files] == ["model0-mp2.pt", "model1-mp2.pt"]
    for file, held in zip(files, deepseeks.parts(state, ranks), strict=True):
        make.same(torch.load(file), held)


def test_mistakes_show(tmp_path: Path) -> None:
    state = deepseeks.state()
    prepared = layout(deepseeks.saved(tmp_path / "raw", state), tmp_path / "out")
    wanted = by_transformers(tmp_path / "out", prepared, IDS)

    mistakes: tuple[dict[str, Any], ...] = (
        {"original_seq_len": 256},  # no stretched rotations
        {"n_limited_groups": 1},
        {"route_scale": 1.0},
        {"rope_theta": 50000.0},
        {"mscale": 0.707},
    )
    for k, wrong in enumerate(mistakes):
        assert nmse(eager(deepseeks.saved(tmp_path / f"wrong{k}", state, **wrong), ids=IDS), wanted) > 1e-6, wrong


def test_without_config_json_its_values_are_asked_for(tmp_path: Path) -> None:
    raw = deepseeks.saved(tmp_path / "raw", deepseeks.state())
    (raw / "config.json").unlink()
    with pytest.raises(MdlError) as caught:
        prepare(raw)
    for key in ("n_activated_experts", "n_expert_groups", "score_func", "route_scale", "rope_factor"):
        assert f"--set {key}=VALUE" in str(caught.value)


@pytest.mark.parametrize("q_rank", [deepseeks.Q_RANK, 0], ids=["low rank", "straight"])
def test_float8_becomes_what_fp8_cast_bf16_makes_of_it(q_rank: int, tmp_path: Path) -> None:
    state = deepseeks.quantised(deepseeks.state(q_rank=q_rank))
    assert state["layers.0.attn.wkv_a.scale"].shape == (5, 1), "the last block has fewer rows"
    raw = deepseeks.saved(tmp_path / "raw", state, q_lora_rank=q_rank)
    prepared = layout(raw, tmp_path / "out")

    wanted = deepseeks.dequantised(state)
    made = make.saved(tmp_path / "out")
    assert prepared.config["dtype"] == "bfloat16"
    assert len(made) == len(wanted)
    steps = {s.targets[0]: s.sources[0].name for s in prepared.plan.writes}
    for target, tensor in made.items():
        assert tensor.dtype == wanted[steps[target]].dtype
        assert tensor.equal(wanted[steps[target]]), target
    logits = by_transformers(tmp_path / "out", prepared, IDS)
    assert nmse(eager(raw, ids=IDS), logits) < 1e-12


def test_float8_in_ranks_is_the_same_as_in_one(tmp_path: Path) -> None:
    state = deepseeks.quantised(deepseeks.state(ffn=128, inner=64), 64)
    said = Options(given={"block": "64"})
    one, two = (deepseeks.saved(tmp_path / f"raw{n}", state, n, inter_dim=128, moe_inter_dim=64) for n in (1, 2))
    for raw, out in ((one, "one"), (two, "two")):
        convert(prepare(raw, said), tmp_path / out, tokenizer="none")
    make.same(make.saved(tmp_path / "two"), make.saved(tmp_path / "one"))
    lost = export(tmp_path / "two", tmp_path / "back").lost
    assert {problem.what.rpartition(": ")[2] for problem in lost if "config" not in problem.what} == {
        "dequantize cannot be undone exactly"
    }


@pytest.mark.parametrize("wrong", ["scale", "block", "row"])
def test_a_mistake_in_float8_shows(wrong: str, tmp_path: Path) -> None:
    state = deepseeks.quantised(deepseeks.state())
    prepared = layout(deepseeks.saved(tmp_path / "raw", state), tmp_path / "out")
    wanted = by_transformers(tmp_path / "out", prepared, IDS)
    scale = state["layers.1.attn.wkv_b.scale"]
    if wrong == "scale":
        scale[2, 3] *= 1.01
    elif wrong == "block":
        scale.copy_(scale.T.clone())
    else:
        scale.copy_(scale.roll(1, 0))
    assert nmse(eager(deepseeks.saved(tmp_path / "wrong", state), ids=IDS), wanted) > 1e-8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers.0.attn.wo.scale": None}, r"layers.0.attn.wo.weight is float8_e4m3fn without its factors"),
        (
            {"layers.0.attn.wo.scale": torch.ones(2, 1)},
            r"\[2, 1\] factors do not fit a matrix of \[128, 256\], which has",
        ),
        ({"layers.0.attn.wo.weight": torch.ones(128, 256)}, "dequantize: float32 is no type of eight bits"),
        ({"layers.0.attn.wo.scale": torch.ones(1, 2).half()}, "dequantize takes factors of float32"),
    ],
)
def test_float8_that_does_not_fit_its_factors(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    state = deepseeks.quantised(deepseeks.state()) | change
    raw = deepseeks.saved(tmp_path / "raw", {name: t for name, t in state.items() if t is not None})
    with pytest.raises(MdlError, match=said):
        prepare(raw).plan.refuse()


def test_ranks_cut_inside_a_block_are_refused(tmp_path: Path) -> None:
    state = deepseeks.quantised(deepseeks.state(ffn=512, inner=256), 64)  # two factors for 192 rows of a head
    with pytest.raises(MdlError, match=r"wq_b.weight is cut into 2 ranks of 192, inside a block of 128"):
        prepare(deepseeks.saved(tmp_path / "raw", state, 2, inter_dim=512, moe_inter_dim=256))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"score_func": "softmax"}, "score_func is softmax"),
        ({"n_expert_groups": 3}, "8 experts can't be divided into 3 groups"),
        ({"n_heads": 4}, "heads is 2 by the tensors"),
        ({"n_dense_layers": 2}, "dense_layers is 1 by the tensors"),
    ],
)
def test_a_config_that_does_not_belong_to_it(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(MdlError, match=said):
        prepare(deepseeks.saved(tmp_path / "raw", deepseeks.state(), **config))


def test_v2_has_no_bias_of_the_gate(tmp_path: Path) -> None:
    state = {name: t for name, t in deepseeks.state().items() if not name.endswith("gate.bias")}
    with pytest.raises(MdlError, match="gate has no bias, so this is DeepSeek-V2"):
        prepare(deepseeks.saved(tmp_path / "raw", state))


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    raw = deepseeks.saved(tmp_path / "raw", deepseeks.state(), 4)
    (raw / "model3-mp4.safetensors").unlink()
    (raw / "model1-mp4.safetensors").unlink()
    with pytest.raises(MdlError, match=r"rank files are missing: model\{1,3\}-mp4.safetensors"):
        prepare(raw)
    (raw / "model1-mp2.safetensors").write_bytes((raw / "model0-mp4.safetensors").read_bytes())
    with pytest.raises(MdlError, match="not ranks of one model"):
        prepare(raw)


def test_the_ranks_hold_what_the_program_cuts() -> None:
    """The shares in these tests are those of DeepSeek's convert.py."""
    state = deepseeks.state()
    first, second = deepseeks.parts(state, 2)
    assert first["embed.weight"].shape == (48, 128)
    assert second["layers.0.ffn.w2.weight"].shape == (128, 40)
    assert "layers.1.ffn.experts.3.w1.weight" in first
    assert "layers.1.ffn.experts.4.w1.weight" in second
    assert first["layers.1.ffn.gate.weight"].equal(second["layers.1.ffn.gate.weight"])


@pytest.mark.engine
def test_vllm_computes_it(tmp_path: Path, engine: Engine) -> None:
    layout(deepseeks.saved(tmp_path / "raw", deepseeks.quantised(deepseeks.state())), tmp_path / "out")
    is_green(tmp_path / "out", engine)

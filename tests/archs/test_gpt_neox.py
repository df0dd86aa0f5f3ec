"""GPT-NeoX from its layer files to the layout: ranks, residuals, forms of GELU, names old and new."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.archs.registry import load_arch, mapping_path
from mdl.convert.export import export
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.errors import Kind, MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import Settings, verify

from .. import checkpoints as make
from .. import gpts_checks as checks
from .. import megatron, neox


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("row", neox.ROWS)
def test_the_layout_computes_what_the_checkpoint_did(row: str, ranks: int, tmp_path: Path) -> None:
    source = neox.layers(tmp_path / "in", row, ranks)

    prepared = checks.layout(source, tmp_path / "out")

    assert (prepared.arch.name, prepared.inventory.ranks) == ("gpt_neox", ranks)
    assert prepared.config["tie_word_embeddings"] is (row == "tied")
    assert prepared.config["hidden_act"] == ("gelu_new" if row == "fused" else "gelu")
    assert megatron.error(tmp_path / "out", prepared) < 1e-11  # the class's rotary table is in float32


@pytest.mark.parametrize("row", ["parallel", "serial"])
def test_ranks_become_what_one_rank_had(row: str, tmp_path: Path) -> None:
    """Biases behind a sum over ranks are summed or are copies, as the residuals have it."""
    checks.layout(neox.layers(tmp_path / "one", row), tmp_path / "one.out")
    checks.layout(neox.layers(tmp_path / "two", row, 2), tmp_path / "two.out")

    one, two = make.saved(tmp_path / "one.out"), make.saved(tmp_path / "two.out")

    assert list(one) == list(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-7)


@pytest.mark.parametrize("new", [True, False])
def test_the_way_back(new: bool, tmp_path: Path) -> None:
    source = neox.layers(tmp_path / "in", "parallel", new=new)
    prepared = checks.layout(source, tmp_path / "out")

    done = export(tmp_path / "out", tmp_path / "back")

    assert prepared.dims["new_names"] is new
    lost = [problem.what for problem in done.lost]
    assert sum("inv_freq was dropped" in what for what in lost) == (0 if new else neox.LAYERS)
    for file in sorted((source / "global_step7").glob("layer_*")):
        raw = {name: t for name, t in torch.load(file).items() if "inv_freq" not in name}
        back = torch.load(tmp_path / "back" / file.name)
        assert list(back) == list(raw)
        make.same(back, raw)


def test_what_ranks_sum_up_cannot_be_taken_apart(tmp_path: Path) -> None:
    checks.layout(neox.layers(tmp_path / "in", "parallel", 2), tmp_path / "out")

    lost = [problem.what for problem in export(tmp_path / "out", tmp_path / "back").lost]

    assert "sequential.2.attention.dense.bias: the sum of rank files cannot be taken apart" in lost
    assert "sequential.5.norm.weight: the mean of rank files cannot be taken apart" in lost


def test_without_a_pipeline(tmp_path: Path) -> None:
    checks.layout(neox.sequential(tmp_path / "in", "parallel"), tmp_path / "out")

    checks.layout(neox.layers(tmp_path / "layers", "parallel"), tmp_path / "layers.out")
    make.same(make.saved(tmp_path / "out"), make.saved(tmp_path / "layers.out"))


def test_what_is_given_may_be_the_run_a_step_or_a_file(tmp_path: Path) -> None:
    root = neox.layers(tmp_path / "in", "parallel", 2)
    step = root / "global_step7"

    plans = [prepare(path) for path in (root, step, step / "layer_03-model_01-model_states.pt")]

    assert {(plan.inventory.ranks, plan.plan.problems) for plan in plans} == {(2, ())}
    assert plans[0].dims.entries["heads"].because == "configs.num_attention_heads"


def test_without_settings_it_asks(tmp_path: Path) -> None:
    root = neox.layers(tmp_path / "in", "fused", new=False)
    shutil.rmtree(root / "global_step7/configs")

    with pytest.raises(MdlError, match="do not lie in configs/ beside the weights") as caught:
        prepare(root)

    for key in ("num_attention_heads", "gpt_j_residual", "activation", "rotary_emb_base"):
        assert f"pass --set {key}=VALUE" in str(caught.value)
    given = {"num_attention_heads": "4", "gpt_j_residual": "true", "activation": "gelu_new", "rotary_emb_base": "10000"}
    given |= {"max_position_embeddings": "128", "layernorm_epsilon": "1e-5"}
    prepared = checks.layout(root, tmp_path / "out", given)
    assert prepared.dims.entries["rotary_pct"].because == "rotary_emb.inv_freq has 4 values for heads of 32 channels"
    assert megatron.error(tmp_path / "out", prepared) < 1e-11


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other norms": ({"norm": "scalenorm"}, "other norms than LayerNorm"),
    "other positions": ({"pos-emb": "alibi"}, "other positions than rotary ones"),
    "other activations": ({"activation": "geglu"}, "other activations than GELU"),
    "sparse attention": ({"attention-config": [[["global", "local"], 1]]}, "attention_config names local"),
    "one norm": ({"gpt-j-tied": True}, "one norm for attention and MLP"),
    "heads": ({"num-attention-heads": 3}, "3 heads of 128 channels do not fit"),
    "layers": ({"num-layers": 3}, "layers is 2 by the tensors"),
    "two words": ({"num_layers": 4}, "than the files before it in configs/|layers is 2 by the tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(case: str, tmp_path: Path) -> None:
    changed, phrase = REFUSED[case]
    root = neox.layers(tmp_path / "in", "parallel", **changed)

    with pytest.raises(MdlError, match=phrase) as caught:
        prepare(root).plan.refuse()

    assert caught.value.kind is Kind.INPUT


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    root = neox.layers(tmp_path / "in", "parallel", 2)
    (root / "global_step7/layer_03-model_01-model_states.pt").unlink()

    with pytest.raises(MdlError, match="files are missing: rank 1 of part 3"):
        prepare(root)


CHANGED: dict[str, tuple[str, dict[str, str]]] = {
    "the form of GELU": ("fused", {"activation": "gelu"}),
    "residuals": ("parallel", {"gpt_j_residual": "false"}),
    "rotary share": ("parallel", {"rotary_pct": "0.5"}),
    "rotary base": ("serial", {"rotary_emb_base": "10000"}),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_setting_that_is_wrong_shows(what: str, tmp_path: Path) -> None:
    row, given = CHANGED[what]
    source = neox.layers(tmp_path / "in", row)
    checks.layout(source, tmp_path / "out", given)

    assert megatron.error(tmp_path / "out", prepare(source)) > 1e-9


@pytest.mark.engine
def test_vllm_computes_what_gpt_neox_computes(tmp_path: Path, engine: Engine) -> None:
    checks.layout(neox.layers(tmp_path / "in", "fused", 2), tmp_path / "out")

    checks.is_green(tmp_path / "out", engine)


_WRONG = """
from msgspec.structs import replace

from mdl.archs.gpt_neox import ARCH as RIGHT


def hf_config(d):
    return RIGHT.hf_config(d) | {more}


ARCH = replace(RIGHT, name="wrong", hf_config=hf_config)
"""


def test_residuals_the_other_way_show(tmp_path: Path) -> None:
    source = neox.layers(tmp_path / "in", "fused", 2)
    checks.layout(source, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**config, "use_parallel_residual": False}))

    assert megatron.error(tmp_path / "out", prepare(source)) > 1e-4


@pytest.mark.engine
def test_a_mistake_in_config_json_is_noticed(tmp_path: Path, engine: Engine) -> None:
    """The exact GELU for what trained with the tanh form."""
    shutil.copy(mapping_path(load_arch("gpt_neox")), tmp_path / "wrong.yaml")
    (tmp_path / "wrong.py").write_text(_WRONG.format(more={"hidden_act": "gelu"}))
    options = Options(arch=str(tmp_path / "wrong.py"))
    source = neox.layers(tmp_path / "in", "fused", 2)
    convert(prepare(source, options), tmp_path / "out", tokenizer="none")

    report = verify(tmp_path / "out", Settings(arch=str(tmp_path / "wrong.py"), locate=False), engine=engine)

    assert {check.name: check.ok for check in report.checks}["prefill"] is False

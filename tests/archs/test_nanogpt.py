"""nanoGPT from the file to the layout: recognise, measure, plan, convert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mdl.convert.prepare import prepare
from mdl.convert.run import convert
from mdl.errors import MdlError
from mdl.validate.client import Engine

from .. import checkpoints as make
from .. import gpts
from ..converted import nmse
from ..gpts_checks import back, eager, is_green, layout

CONFIG = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 24,
    "n_positions": 12,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 64,
    "activation_function": "gelu",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def test_from_the_file_to_the_layout(compiled_prefix: Path, tmp_path: Path) -> None:
    prepared = prepare(compiled_prefix)

    assert prepared.arch.name == "nanogpt"
    assert prepared.inventory.prefixes == ("_orig_mod.",)
    assert (prepared.dims["layers"], prepared.dims["heads"], prepared.dims["tied"]) == (2, 2, True)
    assert prepared.plan.problems == ()
    convert(prepared, tmp_path / "out", tokenizer="none")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG
    make.same(make.saved(tmp_path / "out"), make.gpt2_of(make.nanogpt_state()))


@pytest.mark.parametrize(
    ("trait", "kinds"),
    [
        ("tied", {"keep": 5 + 14 - 3, "transform": 8, "tie": 1}),
        ("untied", {"keep": 16 + 5, "transform": 8, "rename": 1}),
    ],
)
def test_steps(trait: str, kinds: dict[str, int], request: pytest.FixtureRequest) -> None:
    steps = prepare(request.getfixturevalue(trait)).plan.steps

    found = {kind: sum(step.kind == kind for step in steps) for kind in ("keep", "transform", "rename", "tie", "drop")}
    # per block: two norms and four matrices with their biases; outside: wte, wpe, ln_f
    assert found["transform"] == kinds["transform"]
    assert found["keep"] == 3 + 1 + 2 * (4 + 4)
    assert (found["rename"], found["tie"]) == (kinds.get("rename", 0), kinds.get("tie", 0))


def test_a_model_without_biases_gets_zeros(no_bias: Path) -> None:
    steps = prepare(no_bias).plan.steps

    fills = {step.targets[0] for step in steps if step.kind == "fill"}
    assert len(fills) == 1 + 2 * 6
    assert "transformer.h.1.attn.c_attn.bias" in fills


def test_masks_of_old_checkpoints_are_dropped_with_a_reason(old_without_bias_key: Path) -> None:
    prepared = prepare(old_without_bias_key)

    prepared.plan.refuse()
    assert [step.reason.partition(",")[0] for step in prepared.plan.steps if step.kind == "drop"] == [
        "causal mask buffer"
    ] * 2
    assert prepared.config["activation_function"] == "gelu_new"
    assert prepared.plan.dtype == "float32"


def test_an_untied_head_is_said_in_the_config(untied: Path) -> None:
    assert prepare(untied).config["tie_word_embeddings"] is False


# --- build-nanogpt: the same names and mapping, with the model's GPTConfig object in the place of model_args --------


def test_build_nanogpt_says_its_sizes_in_an_object(tmp_path: Path) -> None:
    prepared = layout(gpts.build_nanogpt(tmp_path / "model_00010.pt"), tmp_path / "out")

    assert prepared.arch.name == "nanogpt"
    assert (prepared.dims["heads"], prepared.dims.entries["heads"].because) == (2, "config.n_head")
    assert (prepared.config["activation_function"], prepared.config["tie_word_embeddings"]) == ("gelu_new", True)
    state = gpts.mingpt(tied=True, masks=False)
    make.same(make.saved(tmp_path / "out"), gpts.gpt2_of_mingpt(state))
    make.same(back(tmp_path / "out")["model"], state)


def test_build_nanogpt_computes_what_the_formulas_say(tmp_path: Path) -> None:
    path = gpts.build_nanogpt(tmp_path / "model_00010.pt")
    wanted = gpts.forward(gpts.gpt2_of_mingpt(gpts.mingpt(tied=True, masks=False)))

    assert nmse(eager(path), wanted) < 1e-24
    assert nmse(eager(path, {"activation": "gelu"}), wanted) > 1e-9
    assert nmse(eager(path, {"n_head": "4"}), wanted) > 1e-3


def test_settings_of_a_training_script_are_no_gptconfig(tmp_path: Path) -> None:
    settings = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "learning_rate": 6e-4}
    torch.save({"model": make.nanogpt_state(), "config": settings}, tmp_path / "x.pt")

    with pytest.raises(MdlError, match="heads is neither in the checkpoint"):
        prepare(tmp_path / "x.pt")


@pytest.mark.engine
def test_vllm_computes_build_nanogpt(tmp_path: Path, engine: Engine) -> None:
    layout(gpts.build_nanogpt(tmp_path / "model_00010.pt"), tmp_path / "out")
    is_green(tmp_path / "out", engine)

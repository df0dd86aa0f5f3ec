"""nanoGPT from the file to the layout: recognise, measure, plan, convert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert

from .. import checkpoints as make

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
    convert(prepared, tmp_path / "out", options=Options(), tokenizer="none")
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

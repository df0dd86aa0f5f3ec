"""llama2.c from the file to the layout: recognise, measure, plan, convert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdl.convert.prepare import prepare
from mdl.convert.run import convert
from mdl.mappings.moves import PermuteRope

from .. import checkpoints as make

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


def test_from_the_file_to_the_layout(llama2c: Path, tmp_path: Path) -> None:
    prepared = prepare(llama2c)

    assert prepared.arch.name == "llama2c"
    assert prepared.plan.problems == ()
    convert(prepared, tmp_path / "out", tokenizer="none")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG
    make.same(make.saved(tmp_path / "out"), make.llama_of(make.llama_state(tied=True), 4, 2))


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
def test_plain_attention_and_a_head_of_its_own(prefix: str, tied: bool, tmp_path: Path) -> None:
    state = make.llama_state(kv_heads=4, tied=tied)
    args = make.llama2c_args(state, kv_heads=None)  # llama2.c writes null when every head has its own key

    prepared = prepare(make.trained(tmp_path / "x.pt", state, args, prefix))

    prepared.plan.refuse()
    assert (prepared.dims["kv_heads"], prepared.config["tie_word_embeddings"]) == (4, tied)
    convert(prepared, tmp_path / "out", tokenizer="none")
    make.same(make.saved(tmp_path / "out"), make.llama_of(state, 4, 4))


def test_only_queries_and_keys_are_reordered(llama2c: Path) -> None:
    steps = {step.targets[0]: step for step in prepare(llama2c).plan.writes}

    moved = {name: step.ops for name, step in steps.items() if step.ops}
    assert moved == {
        f"model.layers.{i}.self_attn.{part}.weight": (PermuteRope(heads),)
        for i in range(2)
        for part, heads in (("q_proj", 4), ("k_proj", 2))
    }


def test_buffers_of_old_checkpoints_are_dropped(tmp_path: Path) -> None:
    import torch

    state = make.llama_state(tied=True)
    args = make.llama2c_args(state)
    buffers = {"freqs_cos": torch.ones(64, 4), "freqs_sin": torch.zeros(64, 4)}

    prepared = prepare(make.trained(tmp_path / "x.pt", state | buffers, args))

    prepared.plan.refuse()
    assert [step.sources[0].name for step in prepared.plan.steps if step.kind == "drop"] == list(buffers)

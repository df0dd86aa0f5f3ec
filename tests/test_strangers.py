"""A family of the user's own that shares no names with ours: what a newcomer sees of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.text import Text

from mdl import views
from mdl.convert.prepare import Options, Prepared, prepare
from mdl.errors import Kind, MdlError

FAMILY = """
from mdl.archs.base import Arch

def dims(m):
    for name, size in dict(layers=3, hidden=96, vocab=200, ffn=160, heads=4, kv_heads=2, head_dim=32).items():
        m.set(name, shape=(size, "here"))

def hf_config(d):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": d["vocab"],
        "hidden_size": d["hidden"], "intermediate_size": d["ffn"], "num_hidden_layers": d["layers"],
        "num_attention_heads": d["heads"], "num_key_value_heads": d["kv_heads"], "head_dim": d["head_dim"],
        "max_position_embeddings": 64, "tie_word_embeddings": False,
    }

ARCH = Arch(name="zinc", title="Zinc", source="me/zinc", target="LlamaForCausalLM", detect=lambda inv: ["zinc"],
            dims=dims, hf_config=hf_config, eager="zinc_model:build")
"""

MAPPING = """
format: 1
title: Zinc -> LlamaForCausalLM
ranges: {i: layers}
rename:
  tok.weight: model.embed_tokens.weight
  head.weight: lm_head.weight
  fin.g: model.norm.weight
  blocks.{i}.pre.g: model.layers.{i}.input_layernorm.weight
  blocks.{i}.post.g: model.layers.{i}.post_attention_layernorm.weight
  blocks.{i}.mix.out.weight: model.layers.{i}.self_attn.o_proj.weight
  blocks.{i}.ff.down.weight: model.layers.{i}.mlp.down_proj.weight
transform:
  - from: blocks.{i}.mix.wqkv.weight
    to:
      - model.layers.{i}.self_attn.q_proj.weight
      - model.layers.{i}.self_attn.k_proj.weight
      - model.layers.{i}.self_attn.v_proj.weight
    ops: [{split: {axis: 0, sizes: [heads*head_dim, kv_heads*head_dim, kv_heads*head_dim]}}]
  - from: blocks.{i}.ff.gate_up.weight
    to:
      - model.layers.{i}.mlp.gate_proj.weight
      - model.layers.{i}.mlp.up_proj.weight
    ops: [{split: {axis: 0, sizes: [ffn, ffn]}}]
"""

LAYER = {
    "pre.g": (96,),
    "post.g": (96,),
    "mix.wqkv.weight": (256, 96),
    "mix.out.weight": (96, 128),
    "ff.gate_up.weight": (320, 96),
    "ff.down.weight": (96, 160),
}


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A checkpoint, with its family in the folder ``own``."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "zinc.py").write_text(FAMILY)
    (tmp_path / "own" / "zinc.yaml").write_text(MAPPING)
    shapes = {"tok.weight": (200, 96), "head.weight": (200, 96), "fin.g": (96,)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(3) for name, shape in LAYER.items()}
    torch.save({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def prepared(stranger: Path, **given: Any) -> Prepared:
    return prepare(stranger, Options(arch=str(stranger.parent / "own" / "zinc.py"), **given))


def shown(capsys: pytest.CaptureFixture[str], p: Prepared, *, reverse: bool = False) -> str:
    capsys.readouterr()
    views.show_plan(p, reverse=reverse)
    return Text.from_ansi(capsys.readouterr().out).plain


def test_a_head_of_its_own_is_read_from_the_tensors(stranger: Path) -> None:
    tied = prepared(stranger).dims.entries["tied"]

    assert (tied.value, tied.source) == (False, "shapes")
    assert tied.because == "there is head.weight, which becomes lm_head.weight"


def test_a_family_without_a_head_is_taken_at_its_word(stranger: Path) -> None:
    own = stranger.parent / "own" / "zinc.yaml"
    own.write_text(own.read_text().replace("  head.weight: lm_head.weight\n", ""))

    assert prepared(stranger).dims.entries["tied"].source == "default"


def test_a_plan_shows_the_shape_of_each_target(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, prepared(stranger))

    assert "[128, 96] + [64, 96] + [64, 96]" in text
    assert "[160, 96] + " not in text  # gate and up are alike
    assert "30 tensors, 1.15 MB, zinc → LlamaForCausalLM" in text


def test_a_plan_backwards_counts_what_is_made(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, prepared(stranger), reverse=True)
    assert "21 tensors, 1.15 MB, LlamaForCausalLM → zinc" in text
    assert "brought back" not in text

    rounded = shown(capsys, prepared(stranger, dtype="bfloat16"), reverse=True)
    assert "0 tensors, 0 B, LlamaForCausalLM → zinc; 21 can't be brought back" in rounded


def test_a_rule_is_named_with_the_folder_of_its_mapping(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user may have several mappings of one name."""
    monkeypatch.chdir(stranger.parent)
    assert {step.rule.rpartition("yaml:")[0] for step in prepared(stranger).plan.steps} == {"own/zinc."}

    monkeypatch.chdir("/")
    folder = str(stranger.parent / "own").lstrip("/")
    assert {step.rule.rpartition("/")[0] for step in prepared(stranger).plan.steps} == {folder}


def test_another_family_s_names_are_told_before_its_sizes_are_asked(stranger: Path) -> None:
    for name in ("llama2c", "nanogpt", "llama_meta"):
        with pytest.raises(MdlError) as caught:
            prepare(stranger, Options(arch=name))

        assert caught.value.kind is Kind.INPUT
        first = caught.value.problems[0]
        assert first.what.startswith("no tensor has a name that ")
        assert "tok.weight" in first.what
        assert "--set" not in str(caught.value)
        assert "leave --arch out" in first.do

"""BLOOM from its layer files to the layout, by transformers' class, and under vLLM with the class of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.archs.eager.bloom import slopes
from mdl.convert.export import export
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.errors import Kind, MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import Settings, verify

from .. import blooms
from .. import checkpoints as make
from .. import gpts_checks as checks
from ..converted import nmse

IDS = torch.tensor([(7 * k * k + 11 * k + 3) % blooms.VOCAB for k in range(110)])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("row", ["bloom", "six heads", "post norm"])
def test_it_computes_what_transformers_computes_of_the_layout(row: str, ranks: int, tmp_path: Path) -> None:
    source = blooms.layers(tmp_path / "in", row, ranks)

    prepared = checks.layout(source, tmp_path / "out")

    assert (prepared.arch.name, prepared.inventory.ranks) == ("bloom", ranks)
    assert prepared.config["architectures"] == ["MdlBloomForCausalLM"]
    assert prepared.config["tie_word_embeddings"] is True
    assert prepared.dims.entries["position"].because == "args.position_embedding_type"
    wanted = checks.by_transformers(tmp_path / "out", prepared, IDS)
    assert nmse(checks.eager(source, ids=IDS), wanted) < 1e-12  # their slopes are powers taken in float32


def test_the_slopes_are_those_of_megatron() -> None:
    """In closed form, worked out by hand; where heads are no power of two, the rest comes from twice as many."""
    assert slopes(8).tolist() == [2.0**-k for k in range(1, 9)]
    assert slopes(4).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    assert slopes(6).tolist() == [*slopes(4).tolist(), 2.0**-1, 2.0**-3]
    assert slopes(112)[64:].equal(slopes(128)[::2][:48])


def test_ranks_become_what_one_rank_had(tmp_path: Path) -> None:
    for ranks in (1, 2):
        checks.layout(blooms.layers(tmp_path / f"in{ranks}", "bloom", ranks), tmp_path / f"out{ranks}")
    make.same(make.saved(tmp_path / "out2"), make.saved(tmp_path / "out1"))


def test_copies_that_drifted_apart_are_averaged(tmp_path: Path) -> None:
    source = blooms.layers(tmp_path / "in", "bloom", 2)
    file = source / "global_step7/layer_03-model_01-model_states.pt"
    held = torch.load(file)
    before = held["mlp.dense_4h_to_h.bias"].clone()
    held["mlp.dense_4h_to_h.bias"] += 0.5
    torch.save(held, file)
    checks.layout(source, tmp_path / "out")
    made = make.saved(tmp_path / "out")["transformer.h.0.mlp.dense_4h_to_h.bias"]
    torch.testing.assert_close(made, before + 0.25)


def test_the_way_back(tmp_path: Path) -> None:
    source = blooms.layers(tmp_path / "in", "bloom")
    checks.layout(source, tmp_path / "out")

    done = export(tmp_path / "out", tmp_path / "back")

    assert not [problem for problem in done.lost if not problem.what.startswith("what lay beside")]
    for file in sorted((source / "global_step7").glob("layer_*")):
        raw, back = torch.load(file), torch.load(tmp_path / "back" / file.name)
        assert list(back) == list(raw)
        make.same(back, raw)


def test_without_the_arguments_it_asks(tmp_path: Path) -> None:
    source = blooms.layers(tmp_path / "in", "bloom")
    (source / "global_step7/mp_rank_00_model_states.pt").unlink()

    with pytest.raises(MdlError, match="saves it under args in mp_rank_00_model_states") as caught:
        prepare(source)

    given = {"num_attention_heads": "4", "seq_length": "128", "layernorm_epsilon": "1e-5", "position": "alibi"}
    given |= {"activation": "gelu_new", "apply_residual_connection_post_layernorm": "false"}
    for key in given:
        assert f"pass --set {key}=VALUE" in str(caught.value)
    assert not prepare(source, Options(given=given)).plan.problems


def test_arguments_that_cannot_be_read_are_a_note(tmp_path: Path) -> None:
    source = blooms.layers(tmp_path / "in", "bloom")
    (source / "global_step7/mp_rank_00_model_states.pt").write_bytes(b"PK\x03\x04 cut short")

    with pytest.raises(MdlError, match="num_attention_heads"):
        prepare(source)
    from mdl.convert.open import open_checkpoint

    assert any("the arguments of the run were not read" in note for note in open_checkpoint(source).notes)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "positions": ({"position_embedding_type": blooms.PositionEmbeddingType.rotary}, "position is 'rotary'.*alibi"),
    "gated": ({"glu_activation": "geglu"}, "glu_activation is 'geglu': a gated MLP"),
    "heads": ({"num_attention_heads": 3}, "3 heads of 128 channels do not fit"),
    "layers": ({"num_layers": 3}, "layers is 2 by the tensors"),
    "epsilon": ({"layernorm_epsilon": 1e-6}, "the norm behind the embedding always has 1e-05"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(case: str, tmp_path: Path) -> None:
    changed, phrase = REFUSED[case]
    with pytest.raises(MdlError, match=phrase) as caught:
        prepare(blooms.layers(tmp_path / "in", "bloom", **changed)).plan.refuse()
    assert caught.value.kind is Kind.INPUT


def test_a_gpt_of_the_same_code_that_is_no_bloom(tmp_path: Path) -> None:
    source = blooms.layers(tmp_path / "in", "bloom")
    file = source / "global_step7/layer_01-model_00-model_states.pt"
    torch.save({name: t for name, t in torch.load(file).items() if "norm" not in name}, file)
    with pytest.raises(MdlError, match=r"no sequential.1.word_embeddings.norm.weight: this GPT .* is no BLOOM"):
        prepare(source)


CHANGED: dict[str, tuple[str, dict[str, str]]] = {
    "the form of GELU": ("bloom", {"activation": "gelu"}),
    "residuals": ("post norm", {"apply_residual_connection_post_layernorm": "false"}),
    "heads": ("bloom", {"num_attention_heads": "2"}),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_setting_that_is_wrong_shows(what: str, tmp_path: Path) -> None:
    row, given = CHANGED[what]
    source = blooms.layers(tmp_path / "in", row)
    prepared = checks.layout(source, tmp_path / "out")
    wanted = checks.by_transformers(tmp_path / "out", prepared, IDS)
    assert nmse(checks.eager(source, ids=IDS, given=given), wanted) > 1e-9


@pytest.mark.parametrize("row", blooms.HEADS)
def test_the_exact_gelu_is_what_vllm_s_own_class_computes(row: str, tmp_path: Path) -> None:
    prepared = prepare(blooms.layers(tmp_path / "in", row, 2))
    assert prepared.config["architectures"] == ["BloomForCausalLM" if row == "exact" else "MdlBloomForCausalLM"]


@pytest.mark.engine
def test_vllm_computes_it(tmp_path: Path, engine: Engine) -> None:
    checks.layout(blooms.layers(tmp_path / "in", "six heads", 2), tmp_path / "out")
    checks.is_green(tmp_path / "out", engine)


@pytest.mark.engine
def test_vllm_s_own_class_is_found_out(tmp_path: Path, engine: Engine) -> None:
    """The reason for a class of ours: under vLLM's own, nothing else changed, the same layout fails."""
    source = blooms.layers(tmp_path / "in", "bloom")
    options = Options(given={"activation": "gelu"})
    convert(prepare(source, options), tmp_path / "out", tokenizer="none")
    checks.is_green(tmp_path / "out", engine)  # as it says of itself

    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["BloomForCausalLM"]
    checks.layout(source, tmp_path / "tanh")
    wrong = json.loads((tmp_path / "tanh/config.json").read_text()) | {"architectures": ["BloomForCausalLM"]}
    (tmp_path / "tanh/config.json").write_text(json.dumps(wrong))
    report = verify(tmp_path / "tanh", Settings(locate=False), engine=engine)
    failed = {check.name for check in report.checks if check.ok is False}
    assert {"prefill", "decode"} <= failed

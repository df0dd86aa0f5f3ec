"""Meta's Llama from the rank files to the layout: recognise, measure, plan, convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mdl.convert.prepare import prepare
from mdl.convert.run import convert

from .. import checkpoints as make


def test_from_the_rank_files_to_the_layout(two_ranks: Path, tmp_path: Path) -> None:
    import torch

    prepared = prepare(two_ranks)

    assert (prepared.arch.name, prepared.inventory.ranks) == ("llama_meta", 2)
    assert prepared.plan.problems == ()
    assert prepared.dims["embedding_by_columns"] is True
    assert [step.reason for step in prepared.plan.steps if step.kind == "drop"] == ["recomputed from rope_theta"]
    convert(prepared, tmp_path / "out", tokenizer="none")
    config = json.loads((tmp_path / "out/config.json").read_text())
    sizes = {key: config[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads")}
    assert sizes == {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", False)
    make.same(make.saved(tmp_path / "out"), make.llama_of(make.llama_state(dtype=torch.bfloat16), 4, 2))


@pytest.mark.parametrize(
    ("more", "rope"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 500000.0}, {"rope_type": "default", "rope_theta": 500000.0}),
        (
            {"rope_theta": 500000.0, "use_scaled_rope": True},
            {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
    ids=["llama2", "llama3", "llama31"],
)
def test_rotary_positions(more: dict[str, Any], rope: dict[str, Any], tmp_path: Path) -> None:
    state = make.llama_state()
    prepared = prepare(make.meta(tmp_path / "raw", state, make.params(state, **more)))

    assert prepared.config["rope_parameters"] == rope


@pytest.mark.parametrize("trait", ["tied_ranks", "stored_twice"])
def test_a_head_that_equals_the_embedding(trait: str, request: pytest.FixtureRequest) -> None:
    prepared = prepare(request.getfixturevalue(trait))

    prepared.plan.refuse()
    assert prepared.dims.entries["tied"].because == "output.weight and tok_embeddings.weight are equal, bit for bit"
    assert [step.sources[0].name for step in prepared.plan.steps if step.kind == "tie"] == ["output.weight"]


def test_one_value_of_the_last_rank_unties_the_head(tied_ranks: Path) -> None:
    import torch

    state = torch.load(tied_ranks / "consolidated.01.pth")
    state["output.weight"][-1, -1] += 1
    torch.save(state, tied_ranks / "consolidated.01.pth")

    prepared = prepare(tied_ranks)

    prepared.plan.refuse()
    assert prepared.config["tie_word_embeddings"] is False
    assert [step.targets for step in prepared.plan.writes if step.sources[0].name == "output.weight"] == [
        ("lm_head.weight",)
    ]


def test_a_rank_file_that_is_missing(two_ranks: Path) -> None:
    from mdl.errors import MdlError

    (two_ranks / "consolidated.00.pth").unlink()

    with pytest.raises(MdlError, match="rank files are missing"):
        prepare(two_ranks)


def test_a_tensor_that_one_rank_lacks(two_ranks: Path) -> None:
    import torch

    state = torch.load(two_ranks / "consolidated.01.pth")
    del state["layers.1.attention.wo.weight"]
    torch.save(state, two_ranks / "consolidated.01.pth")

    says = [problem.what for problem in prepare(two_ranks).plan.problems]

    assert "layers.1.attention.wo.weight is in 1 of 2 rank files, which 'cat' does not allow" in says

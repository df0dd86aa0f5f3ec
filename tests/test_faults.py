"""vLLM's own known faults are named for the models that have them, and for no others."""

from __future__ import annotations

from typing import Any

import pytest

from mdl.validate.faults import known_faults


@pytest.mark.parametrize(
    ("config", "phrase"),
    [
        ({"model_type": "deepseek_v3"}, "-rotary_embedding"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "granite", "logits_scaling": 8.0}, "logits_scaling"),
        ({"model_type": "jetmoe"}, "MoE backend"),
        ({"model_type": "lfm2"}, "differs"),
        ({"model_type": "phi3", "rope_parameters": {"rope_type": "longrope"}}, "LongRoPE"),
    ],
)
def test_named_where_it_applies(config: dict[str, Any], phrase: str) -> None:
    (note,) = known_faults(config)
    assert phrase in note
    assert note.startswith("vLLM itself")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "gpt2"},
        {"model_type": "falcon", "alibi": False},
        {"model_type": "granite", "logits_scaling": 1.0},
        {"model_type": "phi3"},
        {},
    ],
)
def test_silent_elsewhere(config: dict[str, Any]) -> None:
    assert known_faults(config) == ()

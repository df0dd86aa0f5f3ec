"""config.json and generation_config.json: what transformers and vLLM read beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .tokenizer import TokenizerInfo

_REQUIRED = ("architectures", "model_type", "vocab_size", "tie_word_embeddings")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
BESIDE_THE_PLAN = (*TOKEN_IDS, "transformers_version")
"""What config.json holds beside the planned fields: the tokenizer's ids, which no plan knows, and :data:`FORM`."""
FORM = "5.0.0"
"""The release of transformers from which config.json is read in this form (``rope_parameters``). Without it
transformers takes any tokenizer of more than 100,000 tokens for one of Mistral's that were cut wrongly, and says so."""


def write_configs(
    out: Path, config: Mapping[str, Any], tokenizer: TokenizerInfo, generation: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Write both files; returns their names.

    Token ids are written even when they are not known (null): transformers' class defaults would otherwise fill
    in ids that a small vocabulary does not have. What ``config`` says of them goes before the tokenizer. Sampling
    settings are never invented: ``generation`` is the generation_config.json that came with the checkpoint.
    """
    missing = [key for key in _REQUIRED if key not in config]
    if missing:  # vLLM would create a model of zero layers without a word
        raise ValueError(f"hf_config leaves out {missing}")
    ids = dict(zip(TOKEN_IDS, (tokenizer.bos, tokenizer.eos, tokenizer.pad), strict=True))
    ids |= {key: config[key] for key in ids if config.get(key) is not None}
    _dump(out / "config.json", {**config, **ids, "transformers_version": FORM})
    known: dict[str, Any] = {key: value for key, value in ids.items() if value is not None}
    if tokenizer.stops:
        known["eos_token_id"] = list(tokenizer.stops)
    given = {key: value for key, value in (generation or {}).items() if key != "transformers_version"}
    _dump(out / "generation_config.json", {"_from_model_config": False, **known, **given})
    return ("config.json", "generation_config.json")


def read_config(layout: Path) -> dict[str, Any]:
    """config.json of a layout, as it stands."""
    return json.loads((layout / "config.json").read_text(encoding="utf-8"))


def _dump(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

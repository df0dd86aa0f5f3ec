"""What a report says beside its checks: inputs, versions, and what was taken on trust."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..convert.prepare import Prepared
from ..errors import input_error
from .client import EngineFailure, EngineResult
from .inputs import Inputs


def encode(layout: Path, prompts: Sequence[str]) -> list[list[int]]:
    """The user's prompts as token ids, by the layout's own tokenizer."""
    if not prompts:
        return []
    path = layout / "tokenizer.json"
    if not path.is_file():
        raise input_error("no tokenizer, so no text prompts", str(layout), "convert with --tokenizer PATH")
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(path))
    return [list(tokenizer.encode(prompt).ids) for prompt in prompts]


def trusted(prepared: Prepared) -> tuple[str, ...]:
    """What mdl's own reference can't prove, because it was told the same: defaults and the user's word."""
    entries = prepared.dims.entries.items()
    return tuple(f"{name} = {d.value}: {d.because}" for name, d in entries if d.source in ("default", "user"))


def describe(inputs: Inputs) -> str:
    kinds = [one.kind for one in inputs.sequences]
    longest = max(len(one.ids) for one in inputs.sequences)
    prompts = kinds.count("prompt")
    own = f", {prompts} of your prompts" if prompts else ""
    return (
        f"{inputs.tokens} positions in {len(kinds)} sequences: {inputs.covered} of {inputs.vocab} tokens, "
        f"longest {longest}{own}"
    )


def versions(result: EngineResult | EngineFailure | None = None) -> dict[str, str]:
    import torch

    found = {"mdl": __version__, "torch": torch.__version__}
    if isinstance(result, EngineResult):
        found |= dict(result.versions)
        found |= {"model class": result.model_class, "attention": ", ".join(result.attention), "device": result.device}
    return found

"""What the tests of tokenizers do with one: write it beside a config.json, and ask it for ids."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from mdl.convert.tokenizer import TokenizerInfo, write_tokenizer


def write(source: str | Path, layout: Path, rows: int, context: int | None = 64) -> TokenizerInfo:
    """A layout's tokenizer, for a model with so many rows."""
    info = write_tokenizer(source, layout, model_vocab=rows, context=context)
    (layout / "config.json").write_text(json.dumps({"vocab_size": rows}))
    return info


def ids(layout: Path, text: str) -> list[int]:
    """What a layout's tokenizer makes of a text."""
    return Tokenizer.from_file(str(layout / "tokenizer.json")).encode(text).ids

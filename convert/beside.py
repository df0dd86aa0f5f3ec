"""Finds what lies beside the weights: settings, parsed, and files that look like a tokenizer."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import Kind, MdlError, Problem

_SETTINGS = ("params.json", "config.json", "meta.json", "model_args.json", "generation_config.json")
_SETTINGS_YAML = ("model_config.yaml", "hparams.yaml", "config.yaml")
_STEP = re.compile(r".*?(\d+)")
_TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tokenizer.pkl", "tekken.json", "meta.pkl")
_TOKENIZER_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def find_sidecars(folder: Path, weights: str) -> dict[str, Any]:
    """Parsed settings by file stem; by full name where a stem is taken. ``weights`` is the stem of the weight file.

    ``meta_000123.json`` belongs to ``model_000123.pt`` and is found as ``meta``. Raises MdlError (INPUT) with every
    file that can't be parsed.
    """
    files = [folder / name for name in _SETTINGS if (folder / name).is_file()]
    step = _STEP.fullmatch(weights)
    if step and (folder / f"meta_{step[1]}.json").is_file():
        files.insert(0, folder / f"meta_{step[1]}.json")
    files += [folder / name for name in _SETTINGS_YAML if (folder / name).is_file()]
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    for file in files:
        stem = "meta" if file.name.startswith("meta_") else file.stem
        try:
            found[file.name if stem in found else stem] = _parse(file)
        except ValueError as error:
            problems.append(Problem(f"{file.name} can't be parsed ({error})", str(file), "mend or remove it"))
    if problems:
        raise MdlError(Kind.INPUT, problems)
    return found


def _parse(file: Path) -> Any:
    text = file.read_text("utf-8")
    if file.suffix == ".json":
        return json.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def find_tokenizers(folder: Path) -> tuple[str, ...]:
    """Absolute paths of tokenizer-like files in ``folder``, both files of a pair or none."""
    names = [name for name in _TOKENIZERS if (folder / name).is_file()]
    names += [name for pair in _TOKENIZER_PAIRS if all((folder / n).is_file() for n in pair) for name in pair]
    names += sorted(
        file.name for pattern in ("tok*.model", "tokenizer.model.*", "*.tiktoken") for file in folder.glob(pattern)
    )
    root = os.path.abspath(folder)  # noqa: PTH100 - Path.resolve would follow symlinks and lose the folder's name
    return tuple(str(Path(root) / name) for name in dict.fromkeys(names))

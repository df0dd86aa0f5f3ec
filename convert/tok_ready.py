"""An existing ``tokenizer.json``: copied as it is, with what its directory says about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from ..errors import input_error
from .tok_base import Built, read_json_object

KIND = "tokenizer.json"
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""The classes (two names of one) that take tokenizer.json as it is; every other may rebuild parts of it."""
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def build(path: Path) -> Built:
    """The tokenizer in the file, and the special tokens that the files beside it name.

    Raises:
        MdlError: INPUT when `tokenizers` can't load it, or when it lacks a token that is named as special.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises plain Exception
        what = f"{path.name} can't be loaded: {e}"
        raise input_error(what, str(path), "fetch it again, or install a newer `tokenizers`") from e
    config, notes = settings(path)
    named = {name: token_text(config.get(name)) for name in NAMES}
    absent = [f"{name} {text!r}" for name, text in named.items() if text and tokenizer.token_to_id(text) is None]
    if absent:
        what = f"{path.name} has no {', '.join(absent)}, which the files beside it name"
        raise input_error(what, str(path), "bring the tokenizer_config.json and special_tokens_map.json of this file")
    if not any(named.values()):
        notes.append("no file beside it names a beginning or end of text: generation ends at max_tokens")
    return Built(KIND, tokenizer, *(named[name] for name in NAMES), notes=tuple(notes))


def settings(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer_config.json to write, from the one beside ``path``, and what was changed in it."""
    config = _beside(path, "tokenizer_config.json")
    notes: list[str] = []
    old = config.get("tokenizer_class")
    if old not in (None, *PLAIN_CLASSES):
        notes.append(f"tokenizer_class {old} becomes {PLAIN_CLASSES[0]}: {old} may rebuild parts of tokenizer.json")
    config["tokenizer_class"] = PLAIN_CLASSES[0]
    if config.pop("auto_map", None) is not None:
        notes.append("auto_map is left out: no code of the source is needed to read tokenizer.json")
    for name, value in _beside(path, "special_tokens_map.json").items():
        if name in NAMES:
            config.setdefault(name, value)
    return config, notes


def token_text(value: object) -> str | None:
    """The text of a special token, stored as a text or as ``{"content": text, …}``."""
    if isinstance(value, dict):
        value = cast("dict[str, object]", value).get("content")
    return value if isinstance(value, str) else None


def _beside(path: Path, name: str) -> dict[str, Any]:
    file = path.with_name(name)
    return read_json_object(file) if file.is_file() else {}

"""The character tables of nanoGPT-like projects: ``meta.pkl`` with ``stoi`` (character → id) and ``itos``."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, cast

from ..errors import MdlError, input_error
from .inert import RefusedError
from .tok_base import Built
from .vet import end_of_pickle

KIND = "characters"
_LIMIT = 64 << 20
_REWRITE = "write it again as plain dicts: pickle.dump({'vocab_size': n, 'stoi': dict, 'itos': dict}, file)"


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers. A pickle that names any class or function is refused, not run."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise input_error(f"the pickle names {module_name}.{global_name}; only plain values are read", do=_REWRITE)


def read_meta(path: Path) -> dict[str, int]:
    """The table character → id of a ``meta.pkl``, checked against its inverse. Runs no code of the file.

    Raises:
        MdlError: INPUT when the file is no such table, or when ``itos`` is not the inverse of ``stoi``.
    """
    meta = _unpickle(path)
    stoi: dict[str, int] = _dict(meta, "stoi", path)
    itos: dict[int, str] = _dict(meta, "itos", path)
    for text, index in stoi.items():
        if type(text) is not str or type(index) is not int or index < 0 or not text:
            raise input_error(f"stoi maps {text!r} to {index!r}, not a text to an id", str(path), _REWRITE)
        _check_encodable(text, path)
    wrong = [text for text, index in stoi.items() if itos.get(index) != text]
    if wrong or len(itos) != len(stoi):
        seen = ", ".join(map(repr, wrong[:5])) or f"{len(stoi)} entries against {len(itos)}"
        raise input_error(f"itos is not the inverse of stoi: {seen}", str(path), "bring the meta.pkl of the training")
    size = meta.get("vocab_size", len(stoi))
    if type(size) is not int or size <= max(stoi.values(), default=-1) or not stoi:
        raise input_error(f"vocab_size {size!r} does not cover the ids of stoi", str(path), _REWRITE)
    return stoi


def build(path: Path) -> Built:
    """One token per character. A character outside the table is an error, as it is in the original code."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    stoi = read_meta(path)
    absent = "<unk>"
    while absent in stoi:
        absent += "_"
    # The model is given an unknown token that it does not have: it then refuses an unknown character where a
    # model without merges would skip it in silence.
    tokenizer = Tokenizer(models.WordLevel(stoi, unk_token=absent))
    tokenizer.pre_tokenizer = cast(Any, pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"))
    tokenizer.decoder = cast(Any, decoders.Fuse())
    return Built(KIND, tokenizer, notes=_notes(stoi))


def encode(stoi: dict[str, int], text: str) -> list[int]:
    """The original code's encoding: one look-up per character."""
    return [stoi[c] for c in text]


def _notes(stoi: dict[str, int]) -> tuple[str, ...]:
    notes = [
        f"the table knows {len(stoi)} characters; text with any other is refused when it is encoded (the original "
        "code raises KeyError), never shortened",
        "a character table has no beginning or end of text: generation ends at max_tokens or at a stop string",
    ]
    long = [text for text in stoi if len(text) > 1]
    if long:
        seen = ", ".join(map(repr, long[:5]))
        notes.append(f"{len(long)} entries of several characters ({seen}) can be decoded but no text encodes to them")
    return tuple(notes)


def _unpickle(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LIMIT:
        raise input_error(f"{path.name} is too large for a character table", str(path), "name the right file")
    data = path.read_bytes()
    try:
        end_of_pickle(data, len(data))
        meta = _PlainUnpickler(io.BytesIO(data)).load()
    except RefusedError as e:
        raise input_error(f"{path.name} is no readable pickle: {e.what}", str(path), e.do or _REWRITE) from e
    except MdlError as e:
        (problem,) = e.problems
        raise input_error(problem.what, str(path), problem.do) from e
    except Exception as e:  # a broken pickle may raise nearly anything
        raise input_error(f"{path.name} is no readable pickle: {e}", str(path), _REWRITE) from e
    if not isinstance(meta, dict):
        raise input_error(f"{path.name} holds a {type(meta).__name__}, not a dict", str(path), _REWRITE)
    return cast("dict[str, Any]", meta)


def _dict(meta: dict[str, Any], key: str, path: Path) -> dict[Any, Any]:
    table = meta.get(key)
    if key == "itos" and isinstance(table, list):
        return dict(enumerate(cast("list[Any]", table)))
    if not isinstance(table, dict):
        raise input_error(f"{path.name} has no table {key!r}", str(path), _REWRITE)
    return cast("dict[Any, Any]", table)


def _check_encodable(text: str, path: Path) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        what = f"the entry {text!r} is half of a surrogate pair, which no UTF-8 text can hold"
        raise input_error(what, str(path), "train on valid UTF-8, or serve token ids with --tokenizer none") from e

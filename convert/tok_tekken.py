"""``tekken.json``, Mistral's byte-level tokenizers since Nemo: ranks, the regular expression, and special tokens.

Special tokens have the ids from 0 on; a text token's id is its rank plus their number. The file lists more ranks than
the model has rows for: only the first ones count.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from msgspec import Struct
from msgspec.structs import replace

from ..errors import input_error
from .tok_base import Built, read_json_object
from .tok_schemes import Scheme, for_oniguruma
from .tok_tiktoken import built_by

KIND = "tekken"
_BOS, _EOS, _PAD, _UNK = "<s>", "</s>", "<pad>", "<unk>"
_AGAIN = "fetch the file again and compare its checksum"

# What mistral_common takes for files of versions up to v7, which don't list their special tokens.
_UNLISTED = (
    _UNK, _BOS, _EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", _PAD, "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
_LAST_UNLISTED = 7


class Tekken(Struct, frozen=True):
    """A read file: ids of byte strings (shifted already), ids of special tokens, and tiktoken's pattern."""

    ids: dict[bytes, int]
    specials: dict[str, int]
    pattern: str
    version: str
    listed: int
    """Ranks in the file, of which ``ids`` holds the first ones."""


def looks_like_tekken(head: bytes) -> bool:
    """Whether a JSON file begins as these do: with their settings or with a token."""
    return head.lstrip()[:1] == b"{" and (b'"default_num_special_tokens"' in head or b'"token_bytes"' in head)


def read_tekken(path: Path) -> Tekken:
    """The content of a file.

    Raises:
        MdlError: INPUT when it is malformed, or of a version that must list its special tokens and does not.
    """
    content = read_json_object(path)
    config, vocab = content.get("config"), content.get("vocab")
    try:
        if not isinstance(config, dict) or not isinstance(vocab, list):
            raise ValueError("it has no 'config' and 'vocab'")
        settings = cast("dict[str, Any]", config)
        size, reserved = settings["default_vocab_size"], settings["default_num_special_tokens"]
        pattern, version = settings["pattern"], settings["version"]
        if type(size) is not int or type(reserved) is not int or not 0 < reserved < size:
            raise ValueError(f"{size!r} ids with {reserved!r} special ones")
        if not isinstance(pattern, str) or not re.fullmatch(r"v\d{1,3}", str(version)):
            raise ValueError(f"its pattern or its version ({version!r}) is missing")
        specials = _specials(content.get("special_tokens"), reserved, int(version[1:]))
        ids = _ids(cast("list[dict[str, Any]]", vocab), size - reserved, reserved)
    except (ValueError, KeyError, TypeError, binascii.Error) as e:
        raise input_error(f"{path.name} is no tekken file: {e}", str(path), _AGAIN) from e
    return Tekken(ids, specials, pattern, version, len(vocab))


def _ids(vocab: Sequence[dict[str, Any]], count: int, shift: int) -> dict[bytes, int]:
    if len(vocab) < count:
        raise ValueError(f"it lists {len(vocab)} tokens, its settings say {count}")
    ids: dict[bytes, int] = {}
    for rank, entry in enumerate(vocab[:count]):
        token = base64.b64decode(entry["token_bytes"], validate=True)
        if entry["rank"] != rank or token in ids or (rank < 256 and token != bytes([rank])):
            raise ValueError(f"token {rank} is {token!r} with rank {entry['rank']!r}, out of order or listed before")
        ids[token] = rank + shift
    if len(ids) < 256:
        raise ValueError("it has no token for some of the 256 bytes")
    return ids


def _specials(listed: object, reserved: int, version: int) -> dict[str, int]:
    """By text; the places that nobody named are called as mistral_common calls them."""
    if listed is None and version > _LAST_UNLISTED:
        raise ValueError(f"a file of version v{version} lists its special tokens, this one does not")
    entries = cast("list[dict[str, Any]]", listed) if isinstance(listed, list) else []
    names = [entry["token_str"] for entry in entries] if entries else list(_UNLISTED)
    if len(names) > reserved or [entry["rank"] for entry in entries] != list(range(len(entries))):
        raise ValueError("its special tokens are more than reserved, or out of order")
    names += [f"<SPECIAL_{i}>" for i in range(len(names), reserved)]
    if len(set(names)) != reserved or not all(isinstance(name, str) and name for name in names):
        raise ValueError("a special token is empty or listed twice")
    return {name: i for i, name in enumerate(names)}


def build(path: Path) -> Built:
    """The tokenizer of a file, with its beginning-of-text token put before every text.

    Raises:
        MdlError: INPUT when the file is malformed.
    """
    tekken = read_tekken(path)
    built = built_by(KIND, tekken.ids, scheme_of(tekken, path))
    return replace(built, unk=_UNK if _UNK in tekken.specials else None)


def scheme_of(tekken: Tekken, path: Path) -> Scheme:
    """How a read file cuts text, and its special tokens."""
    bos, eos, pad = (name if name in tekken.specials else None for name in (_BOS, _EOS, _PAD))
    return Scheme(
        f"tekken {tekken.version}",
        for_oniguruma(tekken.pattern, str(path)),
        tekken.specials,
        bos,
        eos,
        pad,
        prepend=True,
        notes=tuple(_notes(tekken)),
        pattern=tekken.pattern,
        chat=_chat(tekken),
    )


def _chat(tekken: Tekken) -> str:
    """Dialogs are written in one way up to v3, and in another from v7 to v13; v15 has settings of the model in them."""
    version = int(tekken.version[1:])
    name = "mistral_v3" if version == 3 else "mistral_v7" if 7 <= version <= 13 else ""
    system = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]") if name == "mistral_v7" else ()
    return name if all(token in tekken.specials for token in ("[INST]", "[/INST]", *system, _BOS, _EOS)) else ""


def _notes(tekken: Tekken) -> list[str]:
    notes = [f"the ids of text begin at {len(tekken.specials)}, after the special tokens"]
    if tekken.listed > len(tekken.ids):
        notes.append(f"the file lists {tekken.listed} tokens; the first {len(tekken.ids)} count, as its settings say")
    if _BOS in tekken.specials:
        notes.append(f"{_BOS} is put before every text, as mistral_inference does")
    notes.append(
        "special tokens spelled out in a text are read as such, so that chat templates work; mistral_common itself "
        "reads them as ordinary text"
    )
    return notes

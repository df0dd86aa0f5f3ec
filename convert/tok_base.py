"""What every tokenizer source is turned into, and the small facts that several sources share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from msgspec import Struct

from ..errors import input_error

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Built(Struct, frozen=True):
    """A tokenizer in the form that vLLM reads, with the texts of its special tokens and the choices made.

    ``stops`` are the tokens at which generation ends, where they are more than ``eos``; ``chat`` is the name of a
    template in the folder ``chat``.
    """

    kind: str
    tokenizer: Tokenizer
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    notes: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    chat: str = ""


@cache
def byte_letters() -> tuple[str, ...]:
    """The letter that stands for each of the 256 bytes in byte-level vocabularies (the rule of GPT-2's release).

    Bytes that print stand for themselves; the others take the code points from 256 on, in order.
    """
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters: list[str] = []
    spare = 256
    for byte in range(256):
        letters.append(chr(byte if byte in prints else spare))
        spare += byte not in prints
    return tuple(letters)


def spell(token: bytes) -> str:
    """A byte string in the letters of :func:`byte_letters`."""
    letters = byte_letters()
    return "".join(letters[b] for b in token)


def unspell(text: str) -> bytes:
    """The bytes that the letters of :func:`byte_letters` stand for."""
    values = {letter: value for value, letter in enumerate(byte_letters())}
    return bytes(values[c] for c in text)


def every_split(ids: Mapping[str, int], order: Mapping[str, float]) -> list[tuple[str, str]]:
    """All ways to make each token of ``order`` from two tokens of ``ids``: lowest order first, then by the parts.

    Encoders that merge "the neighbours whose union ranks best" don't ask how the union was first learnt, so one
    split per token is not enough to do what they do. Unions of one order (Llama's runs of spaces all have one score)
    are merged from the left by such encoders: what stands leftmost grows first, so a longer left part goes first.
    """
    pairs: list[tuple[float, int, int, int, str, str]] = []
    for token, rank in order.items():
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in ids and right in ids:
                pairs.append((rank, -i, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(pairs)]


def special(texts: Iterable[str]) -> list[Any]:
    """``AddedToken``s that are recognised in text as they stand and left out of decoded text."""
    from tokenizers import AddedToken

    return [AddedToken(text, special=True, normalized=False) for text in texts]


def prepend_bos(tokenizer: Tokenizer, bos: str) -> None:
    """Puts ``bos`` before every encoded text (a post-processor; it survives saving and loading)."""
    from tokenizers import processors

    tokenizer.post_processor = cast(
        Any,
        processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        ),
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; anything else is an INPUT error."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise input_error(f"{path.name} can't be read as JSON: {e}", str(path), "fetch the file again") from e
    if not isinstance(value, dict):
        raise input_error(f"{path.name} holds no JSON object", str(path), "fetch the file again")
    return cast("dict[str, Any]", value)

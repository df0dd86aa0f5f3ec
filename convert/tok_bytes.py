"""A token per byte, as in byte-level models: no file holds such a tokenizer, so it is named: ``--tokenizer bytes``.

A token's id is its byte plus an offset; what else there is must be said: ``bytes:bos=256,eos=257`` is Lingua's
(facebookresearch/lingua), ``bytes:offset=3,pad=0,eos=1`` is ByT5's.
"""

from __future__ import annotations

from ..errors import usage_error
from .tok_base import Built
from .tok_schemes import Scheme
from .tok_tiktoken import built_by

KIND = "bytes"
_NAMES = ("bos", "eos", "pad")
_DO = "for example --tokenizer bytes, or --tokenizer bytes:bos=256,eos=257; offset=N is added to every byte"
CUT = r"[\s\S]"


def parse(said: str) -> tuple[dict[bytes, int], Scheme]:
    """The ids of the 256 bytes and the special tokens that ``said`` names.

    Raises:
        MdlError: USAGE for a text of another form, or for ids that meet.
    """
    numbers: dict[str, int] = {}
    for part in filter(None, said.partition(":")[2].split(",")):
        name, _, number = part.partition("=")
        if name not in (*_NAMES, "offset") or name in numbers or not number.isascii() or not number.isdecimal():
            raise usage_error(f"--tokenizer {said}: can't read {part!r}", do=_DO)
        numbers[name] = int(number)
    offset = numbers.pop("offset", 0)
    ids = {bytes([b]): b + offset for b in range(256)}
    if len({*ids.values(), *numbers.values()}) != 256 + len(numbers):
        raise usage_error(f"--tokenizer {said}: ids of special tokens meet each other or those of bytes", do=_DO)
    texts = {name: f"<|{name}|>" for name in numbers}
    notes = ["a token's id is its byte" + (f" plus {offset}" if offset else ""), *_notes(texts)]
    specials = {texts[name]: number for name, number in numbers.items()}
    named = [texts.get(name) for name in _NAMES]
    return ids, Scheme("one token per byte", CUT, specials, *named, prepend=True, notes=tuple(notes))


def build(said: str, model_vocab: int) -> Built:
    """The tokenizer that ``said`` describes; ``model_vocab`` is the rows of the model's embedding."""
    ids, scheme = parse(said)
    spare = model_vocab - 256 - len(scheme.specials)
    built = built_by(KIND, ids, scheme)
    if spare <= 0 or scheme.specials:
        return built
    note = f"{spare} rows are no byte: if some of them are special tokens, name them ({_DO})"
    return Built(KIND, built.tokenizer, notes=(*built.notes, note))


def _notes(texts: dict[str, str]) -> list[str]:
    begins = f"{texts['bos']} is put before every text" if "bos" in texts else "nothing is put before a text"
    return [begins, *([] if "eos" in texts else ["no end of text was named: generation ends at max_tokens"])]

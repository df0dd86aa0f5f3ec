"""Reads the parts of a SentencePiece ``.model`` that decide its encoding.

The file is one protocol-buffer message, ``ModelProto`` of sentencepiece_model.proto. Its wire format is small
enough to read here, which spares the protobuf runtime; field numbers and defaults are those of that file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from ..errors import input_error

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE, WORD, CHAR = range(1, 5)

Field = int | bytes


class Piece(Struct, frozen=True):
    """One row of the vocabulary; its index is its id."""

    text: str
    score: float
    type: int


class SpmModel(Struct, frozen=True):
    """The settings of a SentencePiece model. ``charsmap`` is its compiled normalisation, empty for identity."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    suffix_space: bool
    bos: str
    eos: str
    pad: str
    charsmap: bytes
    dummy_prefix: bool
    squeeze: bool
    escape: bool

    def control(self, text: str) -> str | None:
        """``text`` if it is a control piece of this model."""
        return text if any(p.text == text and p.type == CONTROL for p in self.pieces) else None

    def texts(self, *types: int) -> list[str]:
        """The pieces of these types, by id."""
        return [p.text for p in self.pieces if p.type in types]


def read_model(path: Path) -> SpmModel:
    """The model in a file.

    Raises:
        MdlError: INPUT when the file is no SentencePiece model.
    """
    try:
        return _model(path.read_bytes())
    except (ValueError, IndexError, struct.error, OverflowError) as e:
        what = f"{path.name} is no SentencePiece model: {e}"
        raise input_error(what, str(path), "compare its checksum with the one that was published") from e


def _model(data: bytes) -> SpmModel:
    pieces: list[Piece] = []
    trainer: dict[int, Field] = {}
    normalizer: dict[int, Field] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(dict(_fields(_bytes(value)))))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    return SpmModel(
        pieces=tuple(pieces),
        model_type=_int(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        suffix_space=bool(trainer.get(24, 0)),
        bos=_text(trainer.get(46, b"<s>")),
        eos=_text(trainer.get(47, b"</s>")),
        pad=_text(trainer.get(48, b"<pad>")),
        charsmap=_bytes(normalizer.get(2, b"")),
        dummy_prefix=bool(normalizer.get(3, 1)),
        squeeze=bool(normalizer.get(4, 1)),
        escape=bool(normalizer.get(5, 1)),
    )


def _piece(fields: dict[int, Field]) -> Piece:
    (score,) = struct.unpack("<f", _bytes(fields.get(2, b"\0\0\0\0")))
    return Piece(_text(fields[1]) if 1 in fields else "", score, _int(fields.get(3, NORMAL)))


def _fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """(field number, value) in file order: an int for wire type 0, the raw bytes for the others."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {at} is not the start of a field")
        if at + size > len(data):
            raise ValueError("it ends in the middle of a field")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"byte {at} continues an endless number")


def _bytes(value: Field) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where a text is expected")
    return value


def _int(value: Field) -> int:
    if isinstance(value, bytes):
        raise ValueError("a text stands where a number is expected")
    return value


def _text(value: Field) -> str:
    return _bytes(value).decode()

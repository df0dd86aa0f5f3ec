"""Tells what a file is by its first bytes, and refuses what is no checkpoint in words that help."""

from __future__ import annotations

import struct
from pathlib import Path

from ..errors import MdlError, input_error
from .legacy import MAGIC_BYTES

MAX_HEADER = 100_000_000
"""Bytes that the header of a safetensors file may have; the format's own limit."""
ZIP, LEGACY, SAFETENSORS = "torch zip", "torch legacy", "safetensors"

_WHOLE = "give the checkpoint file itself (.pt, .pth, .bin, .ckpt or .safetensors) or its folder"
_UNPACK = "unpack it, and give the checkpoint inside"
_FOREIGN = (
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"GGUF", "a GGUF file, already converted for llama.cpp", "give the checkpoint that it was made from"),
    (b"\x89HDF", "an HDF5 file", "save the weights with torch.save or safetensors"),
    (b"\x93NUMPY", "a numpy array file", "save the weights with torch.save or safetensors"),
)


def sniff(path: Path) -> str:
    """``ZIP``, ``LEGACY`` or ``SAFETENSORS``. Raises MdlError (INPUT) that says what the file is instead."""
    if not path.exists():
        raise input_error("there is no such file or folder", str(path), "check the path")
    if not path.is_file():
        raise input_error("this is not a regular file", str(path), _WHOLE)
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise input_error(f"this file can't be read ({error.strerror})", str(path), "check its permissions") from None
    kind = kind_of(head, path.stat().st_size)
    if kind:
        return kind
    raise _refusal(head, path)


def kind_of(head: bytes, size: int) -> str:
    """What the first 512 bytes of a file of ``size`` bytes say it is; empty if it is no checkpoint."""
    if head.startswith(b"PK\x03\x04"):
        return ZIP
    if head.startswith(b"\x80") and MAGIC_BYTES in head[:32]:
        return LEGACY
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= max(size, MAX_HEADER):
        return SAFETENSORS  # also where the file ends inside its header: whoever reads it says so
    return ""


def is_checkpoint(path: Path) -> bool:
    """Whether a file beside others is a checkpoint by its content; a zip only if torch.save's layout shows."""
    with path.open("rb") as stream:
        head = stream.read(512)
    if head.startswith(b"PK\x03\x04"):
        length = int.from_bytes(head[26:28], "little")
        return head[30 : 30 + length].endswith(b"/data.pkl")
    return bool(kind_of(head, path.stat().st_size))


def _refusal(head: bytes, path: Path) -> MdlError:
    where = str(path)
    if not head:
        return input_error("this file is empty", where, "copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        return input_error(
            "this is a git-lfs pointer, not the checkpoint that it points to",
            where,
            "run `git lfs pull` in that folder",
        )
    for magic, name, advice in _FOREIGN:
        if head.startswith(magic):
            return input_error(f"this is {name}, not a checkpoint", where, advice)
    if head[257:262] == b"ustar":
        return input_error(
            "this is a tar archive (or a checkpoint of torch before 0.1.10, which was one)",
            where,
            "unpack it and give the checkpoint inside; if torch wrote it, load it with torch.load and save it again",
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return input_error(
            "this is a web page, not a checkpoint: the download got an error or a login page",
            where,
            "download it again",
        )
    if head.startswith(b"\x80") and len(head) > 1 and head[1] <= 5:
        return input_error(
            "this is a plain pickle, not written by torch.save",
            where,
            "save the weights with torch.save or safetensors",
        )
    if _is_text(head):
        return input_error("this is a text file, not a checkpoint", where, _WHOLE)
    return input_error(
        f"these are no bytes of a known checkpoint format (they start with {head[:8].hex(' ')})", where, _WHOLE
    )


def _is_text(head: bytes) -> bool:
    # The cut at 512 bytes may split a character of up to four bytes.
    for cut in range(4):
        try:
            text = head[: len(head) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return all(c.isprintable() or c.isspace() for c in text)
    return False

"""A safetensors header that is read at a glance says what it says when every part of it is looked at."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mdl.convert import safetensors_file
from mdl.convert.safetensors_file import read_safetensors
from mdl.errors import MdlError


def entry(at: int, **other: Any) -> str:
    return json.dumps({"dtype": "F32", "shape": [2, 1], "data_offsets": [at, at + 8], **other})


def header(*entries: str, metadata: str = "") -> bytes:
    told = [f'"h.{n}.w": {one}' for n, one in enumerate(entries)]
    return ("{" + ", ".join([f'"__metadata__": {metadata}'] * bool(metadata) + told) + "}").encode()


def written(text: bytes, path: Path, body: int = 16) -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(body))
    return path


def outcome(path: Path) -> Any:
    """What is read, or in which words it is refused."""
    try:
        return read_safetensors(path)
    except MdlError as error:
        return [(p.what, p.where, p.do) for p in error.problems]


GOOD = header(entry(0), entry(8))
HEADERS = {
    "good": GOOD,
    "with metadata": header(entry(0), entry(8), metadata='{"format": "pt", "step": "5"}'),
    "padded": GOOD + b"   ",
    "in another order": header(entry(8), entry(0)),
    "empty tensors": header(entry(0), entry(8, shape=[0, 1], data_offsets=[8, 8]), entry(8)),
    "a scalar": header(entry(0, shape=[], data_offsets=[0, 4]), entry(4, shape=[], data_offsets=[4, 8]), entry(8)),
    "an escaped name": GOOD.replace(b"h.1.w", b'h.\\"1.w'),
    "a name by its number": GOOD.replace(b"h.1.w", b"\\u0068.1.w"),
    "a name twice": GOOD.replace(b"h.1", b"h.0"),
    "a name twice, once as a number": header("5", entry(0), entry(8)).replace(b"h.0.w", b"h.1.w"),
    "a name twice, one of them escaped": GOOD.replace(b"h.1", b"\\u0068.0"),
    "a key twice": GOOD.replace(b'"F32"', b'"F32", "dtype": "F32"', 1),
    "a key twice, another missing": header(
        "5", entry(0), entry(8).replace('"F32"', '"F32", "dtype": "F32", "shape": 1')
    ),
    "one too few texts, one name twice": header("5", '["x", "y", "z"]', entry(0), entry(8)).replace(b"h.1", b"h.2"),
    "metadata twice": header(entry(0), entry(8), metadata='{}, "__metadata__": {}'),
    "metadata of numbers": header(entry(0), entry(8), metadata='{"step": 5}'),
    "metadata that is a list": header(entry(0), entry(8), metadata='["a"]'),
    "metadata that is empty": header(entry(0), entry(8), metadata="[]"),
    "metadata that is null": header(entry(0), entry(8), metadata="null"),
    "metadata that is a number": header(entry(0), entry(8), metadata="5"),
    "a true size": header(entry(0), entry(8, shape=[2, True])),
    "a broken size": header(entry(0), entry(8, shape=[2.0, 1])),
    "sizes as a text": header(entry(0), entry(8, shape="21")),
    "sizes as a table": header(entry(0, shape=[], data_offsets=[0, 4]), entry(4, shape={}, data_offsets=[4, 8])),
    "a negative size": header(entry(0, shape=[-2, -1]), entry(8, shape=[-2, -1])),
    "a true offset": header(entry(0), entry(8), entry(1, data_offsets=[True, 9])),
    "a broken offset": header(entry(0), entry(8, data_offsets=[8.0, 16.0])),
    "a negative offset": header(entry(0), entry(8, data_offsets=[-8, 0])),
    "an offset beyond 63 bits": header(entry(0), entry(8, data_offsets=[1 << 63, (1 << 63) + 8])),
    "offsets that do not fit": header(entry(0), entry(8, data_offsets=[8, 12])),
    "one offset": header(entry(0), entry(8, data_offsets=[8])),
    "another key": header(entry(0), entry(8, more=1)),
    "another key instead": header(entry(0), entry(8).replace("dtype", "type")),
    "another type": header(entry(0), entry(8, dtype="I32")),
    "no type": header(entry(0), entry(8, dtype=None)),
    "an unknown type": header(entry(0, dtype="F33"), entry(8, dtype="F33")),
    "an entry that is a list": header(entry(0), '["dtype", "shape", "data_offsets"]'),
    "a gap": header(entry(0), entry(9)),
    "bytes of another": header(entry(0), entry(0)),
    "a number that json lacks": header(entry(0), entry(8, shape=[float("nan"), 1])),
    "half a surrogate": GOOD.replace(b"h.1.w", b"h.\\ud800"),
    "no UTF-8": GOOD.replace(b"h.1.w", b"h.\xff.w"),
    "a list": b"[1, 2]",
    "cut": GOOD[:-1],
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("text", HEADERS.values(), ids=HEADERS.keys())
def test_at_a_glance_or_in_full(text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(text, tmp_path / "x.safetensors")
    found = outcome(path)
    monkeypatch.setattr(safetensors_file, "_without_doubles", lambda _: None)
    monkeypatch.setattr(safetensors_file, "_at_a_glance", lambda _: ((), 0, 0))

    assert found == outcome(path)


@pytest.mark.parametrize("name", ["good", "with metadata", "padded", "in another order"])
def test_what_libraries_write_is_read_at_a_glance(name: str, tmp_path: Path) -> None:
    assert safetensors_file._without_doubles(HEADERS[name]) == json.loads(HEADERS[name])
    tensors, _ = read_safetensors(written(HEADERS[name], tmp_path / "x.safetensors"))
    assert len(tensors) == 2


def test_headers_changed_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)  # noqa: S311 - damage, not secrets
    sound = HEADERS["with metadata"]
    pieces = [b'"', b"{", b"}", b",", b"8", b'"h.0.w": ', b'"dtype": "F32", ', b"true", b"1.0", b"[]", b"\\"]
    paths: list[Path] = []
    for n in range(1500):
        text = sound
        for _ in range(rng.randint(1, 3)):
            at, end = sorted((rng.randrange(len(text)), rng.randrange(len(text))))
            text = text[:at] + rng.choice(pieces) + text[rng.choice((at, at + 1, end)) :]
        paths.append(written(text, tmp_path / f"{n}.safetensors"))
    found = [outcome(path) for path in paths]
    monkeypatch.setattr(safetensors_file, "_without_doubles", lambda _: None)
    monkeypatch.setattr(safetensors_file, "_at_a_glance", lambda _: ((), 0, 0))

    assert found == [outcome(path) for path in paths]

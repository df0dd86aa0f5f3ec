"""Random pickles against the restricted reader: it answers or refuses, and does nothing else (fuzz/targets.py)."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdl.convert import pickle_check, tok_char, unpickle
from mdl.convert.inert import RefusedError
from mdl.errors import MdlError

from .fuzz import seeds, targets
from .fuzz.inputs import fixed, held, mutated, pickles


@fixed(400)
@given(data=pickles())
def test_random_instructions(data: bytes, tmp_path: Path) -> None:
    held("unpickle", data, tmp_path)


@fixed(400)
@given(data=st.deferred(lambda: mutated(seeds.seeds()["unpickle"])))
def test_mutated_pickles(data: bytes, tmp_path: Path) -> None:
    held("unpickle", data, tmp_path)


def test_the_streams_reach_what_they_are_meant_to_reach(tmp_path: Path) -> None:
    """Fuzzing that is refused at the first byte proves nothing: some streams are read whole, some reach a refusal."""
    outcomes: list[str] = []

    @fixed(300)
    @given(data=pickles())
    def run(data: bytes) -> None:
        error = held("unpickle", data, tmp_path)
        outcomes.append(str(error) if error else "")

    run()
    assert outcomes.count("") > 20
    assert any("would run code" in outcome for outcome in outcomes)
    assert sum("UnpicklingError" in outcome or "KeyError" in outcome for outcome in outcomes) < len(outcomes) / 2


# --- the promises can be broken: each check of targets.py fails where a reader breaks its promise ---


class Careless(pickle.Unpickler):
    """A reader that takes every global at its word."""

    def __init__(self, stream: io.BufferedReader, *_: object) -> None:
        super().__init__(stream)


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'exit 7'\ntR.",
        b"cantigravity\nfly\n.",
        b"c__builtin__\nopen\n(S'x'\nS'w'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
    ],
    ids=["os.system", "import", "open", "eval"],
)
def test_the_watch_sees_code_run(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "_Reader", Careless)
    with pytest.raises(targets.BrokenPromise, match=r"while reading: (pickle\.find_class|open|os\.system|import)"):
        held("unpickle", data, tmp_path)


def test_other_exceptions_come_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise SystemError

    monkeypatch.setattr(targets.TARGETS["legacy"], "read", lambda data, path: broken(data))
    with pytest.raises(SystemError):
        held("legacy", b"", tmp_path)


# --- what the fuzzers found, mended in convert/pickle_check.py ---

PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
TOWER = b"q\x010" + PARAMETER + b"h\x01h\x01\x86\x85R"  # a function that gives back the pair it was given
LONG_TUPLE = b"(" + b"N" * 50 + b"t"
BOMBS = {
    "a memo number of gigabytes": b"Nr\xff\xff\xff\x7f.",
    "the same as text": b"Np2000000000\n.",
    "a string of gigabytes": b"B\xff\xff\xff\x7fx.",
    "a buffer of gigabytes": b"\x96" + struct.pack("<Q", 1 << 38) + b".",
    "a frame of gigabytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 38) + b"N.",
    "a tower of tuples as a key": b"}N" + b"2\x86" * 64 + b"Ns.",
    "a tower by memo": b"}N\x85" + b"".join(b"q%ch%c\x86" % (k, k) for k in range(64)) + b"Ns.",
    "a tower by MEMOIZE": b"}N\x85" + b"".join(b"\x94h%c\x86" % k for k in range(64)) + b"Ns.",
    "a tower of parameters": b"}N" + TOWER * 64 + b"Ns.",
    "a deep tuple as a key": b"}N" + b"\x85" * 300_000 + b"Ns.",
    "a deep tuple of marks": b"}" + b"(" * 300_000 + b"t" * 300_000 + b"Ns.",
    "a number of megabytes": b"\x8b" + struct.pack("<I", 1 << 20) + b"\x7f" * (1 << 20) + b".",
    "a long tuple again and again": b"](" + LONG_TUPLE + b"q\x00" + b"h\x00" * 30_000 + b"e.",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_before_it_is_loaded(data: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(unpickle, "_Reader", None)  # to load one would take the process down with it
    error = held("unpickle", data, tmp_path)

    assert error is not None
    assert "not callable" not in str(error)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_no_character_table(data: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tok_char, "_PlainUnpickler", None)
    (tmp_path / "meta.pkl").write_bytes(data)

    with targets.little_memory(), pytest.raises(MdlError, match=r"is no readable pickle: (?!.*not callable)"):
        tok_char.read_meta(tmp_path / "meta.pkl")


ENDLESS = b"]" + b"q\x010]h\x01ah\x01a" * 64  # a list of two lists, which are one, and so on: no text can hold it
TEXTS = {
    "slice": b"c__builtin__\nslice\n" + ENDLESS + b"\x85R.",
    "device": b"ctorch\ndevice\n" + ENDLESS + b"\x85R.",
    "path": b"cpathlib\nPosixPath\n" + ENDLESS + b"\x85R.",
    "layout": b"ctorch.serialization\n_get_layout\n" + ENDLESS + b"\x85R.",
    "dtype": b"cnumpy\ndtype\n" + ENDLESS + b"\x85R.",
    "codec": b"c_codecs\nencode\nX\x01\0\0\0a" + ENDLESS + b"\x86R.",
    "storage": b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + ENDLESS + b"NK\x01tQ.",
    "size": b"ctorch\nSize\n" + ENDLESS + b"\x85R.",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("data", TEXTS.values(), ids=TEXTS)
def test_what_has_no_end_is_not_written_out(data: bytes, tmp_path: Path) -> None:
    held("unpickle", data, tmp_path)


def test_the_walk_knows_every_instruction_as_pickletools_does() -> None:
    sizes = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8, pickletools.UP_TO_NEWLINE: 0}
    for op in pickletools.opcodes:
        effect, size, counted = pickle_check._TABLE[ord(op.code)]
        n = op.arg.n if op.arg else 0
        lines = n == pickletools.UP_TO_NEWLINE
        assert effect >= 0, op.name
        assert (effect == pickle_check._LINE) == lines, op.name
        assert size == (n if n >= 0 else sizes.get(n, 4)), op.name
        assert counted == ((n < 0 and not lines) or op.name == "FRAME"), op.name
    known = {ord(op.code) for op in pickletools.opcodes}
    assert all(pickle_check._TABLE[byte][0] < 0 for byte in set(range(256)) - known)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_walk_passes_what_python_writes(protocol: int) -> None:
    shared = (1, ("a", 2.5))
    tree = {"x": [shared] * 100, shared: {3, 4}, "y": b"b" * 300, "z": "é" * 300, "n": -(1 << 70), "e": ((), [], {})}
    data = pickle.dumps([tree, list(range(1000)), {str(n): (n,) for n in range(3_000)}], protocol)
    stream = io.BytesIO(b"before" + data + b"behind")
    stream.seek(6)

    pickle_check.check_pickle(stream)

    assert stream.tell() == 6
    with pytest.raises((RefusedError, EOFError, ValueError, IndexError)):
        pickle_check.check_pickle(io.BytesIO(data[:-1]))

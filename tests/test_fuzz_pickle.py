"""Random pickles against the restricted reader: it answers or refuses, and does nothing else (fuzz/targets.py)."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdl.convert import tok_char, unpickle, vet
from mdl.convert.inert import RefusedError, Unreadable
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

    def __init__(self, data: bytes, *_: object) -> None:
        super().__init__(io.BytesIO(data))


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


# --- what the fuzzers found, mended in convert/vet.py ---

LONG_TUPLE = b"(" + b"N" * 50 + b"t"
BOMBS = {
    "a memo number of gigabytes": b"Nr\xff\xff\xff\x7f.",
    "the same as text": b"Np2000000000\n.",
    "a string of gigabytes": b"B\xff\xff\xff\x7fx.",
    "a buffer of gigabytes": b"\x96" + struct.pack("<Q", 1 << 38) + b".",
    "a frame of gigabytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 38) + b"N.",
    "an instruction across the end of a frame": b"\x80\x04\x95" + struct.pack("<Q", 1) + b"K\x01.",
    "a line across the end of a frame": b"\x80\x04\x95" + struct.pack("<Q", 3) + b"(icollections\nOrderedDict\n.",
    "a frame in a frame": b"\x80\x04\x95" + struct.pack("<Q", 10) + b"\x95" + struct.pack("<Q", 9) + b"NNNNNNNNNN.",
    "a tower of tuples as a key": b"}N" + b"2\x86" * 64 + b"Ns.",
    "a tower by memo": b"}N\x85" + b"".join(b"q%ch%c\x86" % (k, k) for k in range(64)) + b"Ns.",
    "a tower by MEMOIZE": b"}N\x85" + b"".join(b"\x94h%c\x86" % k for k in range(64)) + b"Ns.",
    "a deep tuple as a key": b"}N" + b"\x85" * 300_000 + b"Ns.",
    "a deep tuple of marks": b"}" + b"(" * 300_000 + b"t" * 300_000 + b"Ns.",
    "a number of megabytes": b"\x8b" + struct.pack("<I", 1 << 20) + b"\x7f" * (1 << 20) + b".",
    "a long tuple as a key again and again": b"}(" + LONG_TUPLE + b"q\x00N" + b"h\x00N" * 400_000 + b"u.",
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


PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
TOWER = b"q\x010" + PARAMETER + b"h\x01h\x01\x86\x85R"  # a function that might give back the pair it was given
HARMLESS = {
    "a tower of parameters": b"}N" + TOWER * 64 + b"Ns.",
    "a long tuple again and again": b"](" + LONG_TUPLE + b"q\x00" + b"h\x00" * 400_000 + b"e.",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("data", HARMLESS.values(), ids=HARMLESS)
def test_what_only_looks_like_a_bomb_is_read(data: bytes, tmp_path: Path) -> None:
    """The walk lets these pass because nothing hashes a tuple in them: no function gives back what it was given."""
    assert held("unpickle", data, tmp_path) is None
    (tmp_path / "meta.pkl").write_bytes(data)
    with targets.little_memory(), pytest.raises(MdlError):
        tok_char.read_meta(tmp_path / "meta.pkl")


def test_a_parameter_of_a_tuple_is_no_tuple() -> None:
    (key,) = unpickle.unpickle(HARMLESS["a tower of parameters"], "x.pt", lambda *_: 0)

    assert isinstance(key, Unreadable)


VERY_LONG_TUPLE = b"(" + b"N" * 50_000 + b"t"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [b"c__builtin__\nset\n", b"c__builtin__\nfrozenset\n", b"ccollections\nOrderedDict\n"])
def test_a_function_hashes_no_long_tuple_again_and_again(kind: bytes, tmp_path: Path) -> None:
    entry = b"h\x00" if b"set" in kind else b"h\x01"
    shared = VERY_LONG_TUPLE + b"q\x000h\x00N\x86q\x010"
    error = held("unpickle", shared + kind + b"](" + entry * 400_000 + b"e\x85R.", tmp_path)

    assert "long or nested tuples" in str(error)


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


class _Counted(vet._Walk):
    """A walk that starts with three values, a mark and two more values on its stack."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, len(data))
        self.stack += [0] * 5
        self.marks.append(3)


def written(op: pickletools.OpcodeInfo) -> bytes:
    """One instruction with an argument that it may have."""
    if op.arg is None:
        return op.code.encode("latin-1")
    sizes = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
    if op.arg.n == pickletools.UP_TO_NEWLINE:
        argument = {"stringnl_noescape_pair": b"a\nb\n", "stringnl": b"'x'\n"}.get(op.arg.name, b"1\n")
    elif op.arg.n < 0:
        size = sizes.get(op.arg.n, 4)
        argument = (3).to_bytes(size, "little") + b"abc"
    else:
        argument = bytes(op.arg.n) if op.name == "FRAME" else b"\1" + bytes(op.arg.n - 1)
    assert op.arg.reader(stream := io.BytesIO(argument)) is not None
    assert stream.tell() == len(argument), op.name
    return op.code.encode("latin-1") + argument


def height(op: pickletools.OpcodeInfo) -> tuple[int, int]:
    """Values and marks on the stack of _Counted behind an instruction."""
    before, after = [kind.name for kind in op.stack_before], [kind.name for kind in op.stack_after]
    if op.name == "STOP":  # the value that it gives back is not taken from the stack of the walk
        return 5, 1
    if "mark" in before:
        return 3 - before.index("mark") + len(after), 0
    marks = after.count("mark")
    return 5 - len(before) + len(after) - marks, 1 + marks


REFUSED = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}


@pytest.mark.parametrize("op", pickletools.opcodes, ids=lambda op: op.name)
def test_the_walk_knows_every_instruction_as_pickletools_does(op: pickletools.OpcodeInfo) -> None:
    data = written(op)
    walk = _Counted(data + b".")
    if op.name in REFUSED:
        with pytest.raises(RefusedError, match=r"extension code|buffers from outside"):
            walk.run(0)
        return
    assert walk.run(0) == len(data) + (op.name != "STOP")
    assert (len(walk.stack), len(walk.marks)) == height(op)
    for end in range(len(data)):
        with pytest.raises((RefusedError, IndexError)):
            _Counted(data[:end]).run(0)


@pytest.mark.parametrize("op", pickletools.opcodes, ids=lambda op: op.name)
def test_the_walk_claims_no_value_that_is_not_there(op: pickletools.OpcodeInfo) -> None:
    """On an empty stack, what takes a value ends the walk, as it ends the unpickler."""
    data = written(op) + b"."
    if op.name in REFUSED or op.name.endswith("PUT") or (op.stack_before and op.name != "STOP"):
        with pytest.raises(RefusedError):
            vet.end_of_pickle(data, len(data))
    else:
        assert vet.end_of_pickle(data, len(data)) <= len(data)


def test_the_walk_knows_no_other_instruction() -> None:
    for byte in set(range(256)) - {ord(op.code) for op in pickletools.opcodes}:
        with pytest.raises(RefusedError, match="unknown instruction"):
            _Counted(bytes((byte,)) + bytes(20) + b".").run(0)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_walk_passes_what_python_writes(protocol: int) -> None:
    shared = (1, ("a", 2.5))
    tree = {"x": [shared] * 100, shared: {3, 4}, "y": b"b" * 300, "z": "é" * 300, "n": -(1 << 70), "e": ((), [], {})}
    data = pickle.dumps([tree, list(range(1000)), {str(n): (n,) for n in range(3_000)}], protocol)
    around = b"before" + data + b"behind"

    assert vet.end_of_pickle(around, len(around), 6) == 6 + len(data)

    with pytest.raises(RefusedError):
        vet.end_of_pickle(data[:-1], len(data) - 1)


def test_sharing_what_a_call_made_is_no_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    """A history of numpy numbers names its dtype once for each of them; neither dtype nor number holds a tuple."""
    monkeypatch.setattr(vet, "MAX_HASHED_ALL", 0)
    numbers = [np.float64(n) for n in range(2_000)]
    data = pickle.dumps([numbers, dict.fromkeys(numbers)])

    assert vet.end_of_pickle(data, len(data)) == len(data)

"""How the Hypothesis tests make their inputs: random streams of instructions, and real files with faults put in."""

from __future__ import annotations

import pickletools
import struct
from datetime import timedelta
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mdl.errors import MdlError

from . import targets

GLOBALS = (
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "torch._tensor _rebuild_from_type_v2",
    "torch FloatStorage",
    "torch Size",
    "torch device",
    "collections OrderedDict",
    "__builtin__ set",
    "__builtin__ bytearray",
    "__builtin__ slice",
    "__builtin__ getattr",
    "_codecs encode",
    "copy_reg _reconstructor",
    "numpy dtype",
    "numpy.core.multiarray scalar",
    "numpy.core.multiarray _reconstruct",
    "pathlib PosixPath",
    "foo Bar",
    "os system",
    "commands Popen",
    "builtins exec",
)
LITTLE = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}


def argument(kind: str, n: int) -> st.SearchStrategy[bytes]:
    """The bytes of an instruction's argument: mostly what a writer would put there, sometimes anything."""
    text = st.sampled_from([b"storage", b"0", b"cpu", b"float32", b"conj", b"", b"\xff\xed\xa0\x80", b"latin1"])
    if n == 0:
        return st.just(b"")
    if kind == "stringnl_noescape_pair":
        return GLOBAL
    if n == pickletools.UP_TO_NEWLINE:
        usual = {"decimalnl_short": b"0", "decimalnl_long": b"12L", "floatnl": b"1.5", "stringnl": b"'x'"}.get(
            kind, b"0"
        )
        words = st.sampled_from([b"1", b"-1", b"00", b"01", b"9" * 30, b"1e999", b"x", b"\\ud800"])
        return mostly(st.just(usual), words).map(lambda word: word + b"\n")
    if n < 0:
        size = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(n, 4)
        honest = text.map(lambda data: struct.pack(LITTLE[size], len(data)) + data)
        return mostly(honest, st.binary(min_size=size, max_size=size + 4))
    return mostly(
        st.sampled_from([0, 0, 1, 2]).map(lambda number: number.to_bytes(n, "little")),
        st.binary(min_size=n, max_size=n),
    )


def mostly(usual: st.SearchStrategy[bytes], odd: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """One in twenty is odd."""
    return st.integers(0, 19).flatmap(lambda n: usual if n else odd)


GLOBAL = st.sampled_from(GLOBALS).map(lambda name: name.replace(" ", "\n").encode() + b"\n")
CONSTANTS = [b"N", b"K\x02", b"]", b")", b"}", b"K\x01K\x02\x86", b"X\x02\0\0\0f8", b"C\x03abc", b"]K\x01a"]
ARGUMENTS = st.lists(st.sampled_from(CONSTANTS), max_size=5).map(b"".join)
INSTRUCTIONS = {
    op.name: (op, argument(op.arg.name if op.arg else "", op.arg.n if op.arg else 0)) for op in pickletools.opcodes
}


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    """Instructions of which most find on the stack what they need."""
    made = bytearray()
    depth, marks = 0, []
    for _ in range(draw(st.integers(1, 12))):
        fitting = [
            name
            for name, (op, _) in INSTRUCTIONS.items()
            if name != "STOP"
            and (bool(marks) if pickletools.markobject in op.stack_before else len(op.stack_before) <= depth)
        ]
        if draw(st.integers(0, 9)) == 0:  # a call, which chance alone seldom puts together
            made += b"c" + draw(GLOBAL) + b"(" + draw(ARGUMENTS) + b"tR"
            depth += 1
            continue
        name = draw(st.sampled_from(fitting))
        op, arguments = INSTRUCTIONS[name]
        made += op.code.encode("latin-1") + draw(arguments)
        if pickletools.markobject in op.stack_before:
            depth = marks.pop() - (op.stack_before.index(pickletools.markobject))
        elif name == "MARK":
            marks.append(depth)
            continue
        else:
            depth -= len(op.stack_before)
        depth = max(depth + len(op.stack_after), 0)
    return bytes(made) + b"."


@st.composite
def mutated(draw: st.DrawFn, inputs: list[bytes]) -> bytes:
    """A real input with bytes changed, cut out, cut off, or put in from another."""
    data = bytearray(draw(st.sampled_from(inputs)))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, max(len(data) - 1, 0))), draw(st.integers(1, 16))
        match draw(st.integers(0, 4)):
            case 0:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                data[at : at + 4] = struct.pack(
                    "<I", draw(st.sampled_from([0, 1, 0x7F, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
                )
            case 2:
                del data[at : at + length]
            case 3:
                del data[at:]
            case _:
                other = draw(st.sampled_from(inputs))
                start = draw(st.integers(0, len(other)))
                data[at:at] = other[start : start + 4 * length]
    return bytes(data)


def fixed(examples: int) -> settings:
    """The same inputs on every run and every machine; one that takes seconds is a hang in the making."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=timedelta(seconds=5),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def held(name: str, data: bytes, folder: Path) -> MdlError | None:
    """Check one input under a small limit of memory."""
    with targets.little_memory():
        return targets.check(name, data, folder / "input")

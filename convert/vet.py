"""Walks over a pickle's instructions before anything obeys them, and refuses what would exhaust the machine.

The unpickler runs in C and can't be interrupted: it hashes keys without a limit of depth or time, and it makes room
for whatever length or memo index an instruction names. This walk makes nothing: it follows the stack with one number
per value, which is 0 for all but tuples, and for those the number of values that hashing them visits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..errors import COPY_AGAIN
from .inert import RefusedError
from .whole_tensors import NAMED, TENSOR, TENSOR4, WEIGHT, Shorter

MAX_HASHED = 1000
"""Values that hashing one key may visit. A key of a real file is a name, a number or a pair of these."""
MAX_HASHED_ALL = 1 << 24
"""The same for all keys together: one tuple may be the key of many entries, and is hashed for each."""
MAX_SETS = 250_000
"""Sets in one pickle: an empty one takes 216 bytes of memory and one byte of the file."""
MAX_INT = 1024
"""Bytes of an integer; the largest in real files are 128-bit states of random number generators."""
MAX_LINE = 4096
"""Bytes of a line of the text instructions: numbers and names of classes."""
_HEAVY = MAX_HASHED + 1

# Bytes that follow an instruction, and of length fields how many bytes they have (the data follows them).
_FIXED = {b"K": 1, b"M": 2, b"J": 4, b"G": 8} | dict.fromkeys((b"N", b"\x88", b"\x89", b")", b"]", b"}"), 0)
_LENGTH = {b"U": 1, b"T": 4, b"C": 1, b"B": 4, b"\x8e": 8, b"\x8c": 1, b"X": 4, b"\x8d": 8, b"\x96": 8,
           b"\x8a": 1, b"\x8b": 4}  # fmt: skip
_INDEX = {b"h": 1, b"j": 4, b"g": 0, b"q": 1, b"r": 4, b"p": 0}  # 0: a line
_SIZE_OF = {op[0]: size for op, size in (_LENGTH | _INDEX).items()}
_LINES = {b"I": 1, b"L": 1, b"F": 1, b"S": 1, b"V": 1, b"P": 1, b"c": 2}
# Values taken and values left.
_TAKES = {b"R": (2, 1), b"\x81": (2, 1), b"\x92": (3, 1), b"\x93": (2, 1), b"b": (1, 0), b"a": (1, 0), b"Q": (1, 1)}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}


def end_of_pickle(data: Any, file_end: int, start: int = 0, shorter: Shorter | None = None) -> int:
    """The position behind the pickle that starts at ``start`` of a bytes-like object with ``file_end`` bytes.

    ``shorter`` is given the tensors that are met on the way. Raises RefusedError if the pickle is damaged or cut short,
    or if obeying it would take memory or time out of proportion.
    """
    try:
        return _Walk(data, file_end, shorter).run(start)
    except (IndexError, KeyError, ValueError) as error:
        what = f"the pickled part of this file is damaged ({type(error).__name__} at its instructions)"
        raise RefusedError(what, COPY_AGAIN) from None


class _Walk:
    """The stack and the memo of one pickle, as weights."""

    def __init__(self, data: Any, end: int, shorter: Shorter | None = None) -> None:
        self.data = data
        self.end = end
        self.shorter = shorter
        self.limit = end
        """Where the frame ends that is being read. The unpickler loses bytes where an instruction reaches beyond it."""
        self.stack: list[int] = []
        self.marks: list[int] = []
        self.memo: dict[int, int] = {}
        self.sets = 0
        self.hashes = 0
        self.unnoted = False

    def run(self, at: int) -> int:
        """Follow all instructions up to STOP; the position behind it."""
        data, stack, simple, handlers = self.data, self.stack, _SIMPLE, _HANDLERS
        while True:
            op = data[at]
            at += 1
            skip = simple[op]
            if skip >= 0:  # pushes a value of a fixed length
                stack.append(0)
                at += skip
            elif op == 0x2E:
                return at
            elif op in (0x68, 0x6A) and (end := self._tensor(at - 1)):
                at = end
            else:
                handler = handlers.get(op)
                if handler is None:
                    raise _damaged(f"unknown instruction {op:#04x} at byte {at - 1:,}")
                at = handler(self, op, at)
            if at >= self.limit:
                if at > self.limit:
                    raise _damaged("it, or a frame of it, ends in the middle of an instruction")
                self.limit = self.end

    def _tensor(self, at: int) -> int:
        """The position behind the whole tensor that starts here; 0 if none does."""
        if found := TENSOR.match(self.data, at):
            return self._whole(found)
        if not self.unnoted and (found := TENSOR4.match(self.data, at)):
            self.no_shorter()
            sizes = [_HEAVY for size in found.groups() if size != b")"]
            for weight in (0, _HEAVY, *sizes, 0, _HEAVY, 0):  # key, its tuple, sizes, dict, arguments, tensor
                self.memo[len(self.memo)] = weight
            self.stack.append(0)
            return found.end()
        return 0

    def entries(self, at: int) -> int:
        """The position behind a short text, whose length stands here, and the whole tensor that follows it, and behind
        more of these; 0 if this is something else."""
        if self.shorter is not None and self.shorter.usable:
            count, end = self.shorter.take(at)
            if count:
                self.unnoted = True
                self.stack += [0] * (2 * count)
                return end
        data = self.data
        found = None if data[at + 1 : at + 4] != b"\0\0\0" else NAMED.match(data, at + 4 + data[at])
        if found is None:
            return 0
        self.stack.append(0)
        return self._whole(found)

    def _whole(self, found: re.Match[bytes]) -> int:
        """Leave the tensor that was found; the position behind it."""
        if self.shorter is not None:
            self.shorter.asks(*found.groups())
            self.shorter.filled()
        self.unnoted = True
        self.stack.append(0)
        return found.end()

    def no_shorter(self) -> None:
        """An instruction names slots or lengths in a way that a shorter pickle would not keep."""
        if self.shorter is not None:
            self.shorter.usable = False

    def number(self, at: int, size: int) -> int:
        """A little-endian field."""
        if at + size > self.end:
            raise _damaged("it ends in the middle of an instruction")
        return int.from_bytes(self.data[at : at + size], "little")

    def line(self, at: int, *, any_length: bool = False) -> int:
        """The position behind the line that starts here."""
        found = self.data.find(b"\n", at, self.end if any_length else min(self.end, at + MAX_LINE))
        if found < 0:
            raise _damaged(f"a line of it has no end or more than {MAX_LINE:,} bytes")
        return found + 1

    def since_mark(self) -> list[int]:
        """Takes everything above the last mark, and the mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def put(self, slot: int, at: int) -> None:
        """Note the top value under a memo index. The unpickler makes room for all indices below it."""
        if slot > at + 65_536:
            raise _damaged(f"it numbers a value {slot:,}, more than it can hold")
        self.memo[slot] = self.stack[-1]

    def hashed(self, keys: list[int]) -> None:
        """Refuse keys that take too long to hash, each or all together."""
        weight = sum(keys)
        self.hashes += weight
        if weight and (max(keys) > MAX_HASHED or self.hashes > MAX_HASHED_ALL):
            raise RefusedError(
                "keys of a table in this file are tuples of very many nested values: it would hang the program",
                "save the settings as plain dicts whose keys are texts or numbers",
            )

    def tuple_of(self, items: list[int]) -> None:
        """Push the tuple of some weights."""
        self.stack.append(min(len(items) + sum(items) + 1, _HEAVY))


def _damaged(detail: str) -> RefusedError:
    return RefusedError(f"the pickled part of this file is damaged: {detail}", COPY_AGAIN)


def _text(walk: _Walk, op: int, at: int) -> int:
    size = _SIZE_OF[op]
    length = int.from_bytes(walk.data[at : at + size], "little")
    if length > walk.end - at - size:
        raise _damaged(f"a value claims {length:,} bytes, but the file ends before")
    if op in (0x8A, 0x8B) and length > MAX_INT:
        raise _damaged(f"an integer of {length:,} bytes")
    walk.stack.append(0)
    return at + size + length


def _name(walk: _Walk, op: int, at: int) -> int:
    return walk.entries(at) or _text(walk, op, at)


def _lines(walk: _Walk, op: int, at: int) -> int:
    walk.stack.append(0)
    for _ in range(_LINES[bytes((op,))]):
        at = walk.line(at, any_length=op in (0x53, 0x56))  # a text of protocol 0; others are numbers and names
    return at


def _takes(walk: _Walk, op: int, at: int) -> int:
    taken, left = _TAKES[bytes((op,))]
    if len(walk.stack) < taken:
        raise IndexError
    del walk.stack[len(walk.stack) - taken :]
    walk.stack.extend([0] * left)
    return at


def _small_tuple(walk: _Walk, op: int, at: int) -> int:
    n = _TUPLES[bytes((op,))]
    if len(walk.stack) < n:
        raise IndexError
    items = walk.stack[-n:]
    del walk.stack[-n:]
    walk.tuple_of(items)
    return at


def _tuple(walk: _Walk, _op: int, at: int) -> int:
    walk.tuple_of(walk.since_mark())
    return at


def _mark(walk: _Walk, _op: int, at: int) -> int:
    walk.marks.append(len(walk.stack))
    return at


def _container(walk: _Walk, op: int, at: int) -> int:
    """LIST, DICT, FROZENSET, OBJ and INST: all values since the mark become one."""
    items = walk.since_mark()
    if op == 0x64:
        walk.hashed(items[::2])
    elif op == 0x91:
        walk.hashed(items)
        _count_set(walk)
    elif op == 0x69:
        at = walk.line(walk.line(at))
    walk.stack.append(0)
    return at


def _fill(walk: _Walk, op: int, at: int) -> int:
    """APPENDS, SETITEMS, ADDITEMS and POP_MARK: all values since the mark are taken."""
    items = walk.since_mark()
    if op == 0x75:
        walk.hashed(items[::2])
    elif op == 0x90:
        walk.hashed(items)
    return at


def _set_item(walk: _Walk, _op: int, at: int) -> int:
    walk.hashed(walk.stack[-2:-1])
    walk.stack.pop()
    walk.stack.pop()
    return at


def _pop(walk: _Walk, _op: int, at: int) -> int:
    if walk.marks and walk.marks[-1] == len(walk.stack):
        walk.marks.pop()
    else:
        walk.stack.pop()
    return at


def _dup(walk: _Walk, _op: int, at: int) -> int:
    walk.stack.append(walk.stack[-1])
    return at


def _count_set(walk: _Walk) -> None:
    walk.sets += 1
    if walk.sets > MAX_SETS:
        raise RefusedError(f"this file holds more than {MAX_SETS:,} sets, each many times larger than its record")


def _empty_set(walk: _Walk, _op: int, at: int) -> int:
    _count_set(walk)
    walk.stack.append(0)
    return at


def _get(walk: _Walk, op: int, at: int) -> int:
    size = _SIZE_OF[op]
    end = at + size if size else walk.line(at)
    if not size:
        walk.no_shorter()
    slot = walk.number(at, size) if size else int(walk.data[at : end - 1])
    if walk.shorter is not None and size == 4:
        walk.shorter.asks(walk.data[at - 1 : end])
    # What whole tensors put into slots was not noted. A slot that was never filled makes the unpickler stop.
    walk.stack.append(walk.memo.get(slot, WEIGHT))
    return end


def _put(walk: _Walk, op: int, at: int) -> int:
    size = _SIZE_OF[op]
    end = at + size if size else walk.line(at)
    slot = walk.number(at, size) if size else int(walk.data[at : end - 1])
    if not size:
        walk.no_shorter()
    elif walk.shorter is not None and slot < 256:
        walk.shorter.filled()
    walk.put(slot, at)
    return end


def _memoize(walk: _Walk, _op: int, at: int) -> int:
    if walk.unnoted:
        raise _damaged("it numbers its values in two ways")
    walk.no_shorter()
    walk.put(len(walk.memo), at)
    return at


def _frame(walk: _Walk, _op: int, at: int) -> int:
    walk.no_shorter()
    length = walk.number(at, 8)
    if length > walk.end - at - 8:
        raise _damaged(f"a frame claims {length:,} bytes, but the file ends before")
    if walk.limit != walk.end:
        raise _damaged("a frame begins inside another one")
    walk.limit = at + 8 + length
    return at + 8


def _proto(walk: _Walk, _op: int, at: int) -> int:
    if walk.number(at, 1) > 5:
        raise _damaged(f"protocol {walk.number(at, 1)} is not known")
    return at + 1


def _extension(walk: _Walk, op: int, at: int) -> int:
    code = walk.number(at, {0x82: 1, 0x83: 2, 0x84: 4}[op])
    raise RefusedError(
        f"this file names a class or function by number (extension code {code}), not by name",
        "load it where it was made, and save it again with torch.save",
    )


def _outside(_walk: _Walk, _op: int, _at: int) -> int:
    raise RefusedError("this pickle needs buffers from outside the file", "save it again with torch.save")


def _table() -> tuple[list[int], dict[int, Callable[[_Walk, int, int], int]]]:
    """Per instruction byte: bytes that follow one that only pushes (or -1), and the handlers of all others."""
    simple = [-1] * 256
    handlers: dict[int, Callable[[_Walk, int, int], int]] = {}
    for op, size in _FIXED.items():
        simple[op[0]] = size
    for ops, handler in (
        (b"".join(_LENGTH), _text), (b"X", _name), (b"".join(_LINES), _lines), (b"".join(_TAKES), _takes),
        (b"".join(_TUPLES), _small_tuple), (b"t", _tuple), (b"(", _mark), (b"ldo\x91i", _container),
        (b"eu\x901", _fill), (b"s", _set_item), (b"0", _pop), (b"2", _dup), (b"\x8f", _empty_set), (b"hjg", _get),
        (b"qrp", _put), (b"\x94", _memoize), (b"\x95", _frame), (b"\x80", _proto), (b"\x82\x83\x84", _extension),
        (b"\x97\x98", _outside),
    ):  # fmt: skip
        handlers |= dict.fromkeys(ops, handler)
    return simple, handlers


_SIMPLE, _HANDLERS = _table()

"""Whole tensors in a pickle: the run of instructions that torch.save writes for each, recognised at once.

A state dict of many tensors is the same forty instructions over and over. Where the walk over them (:mod:`.vet`) meets
such a run, it passes over it in one step; and of the pickle it makes a shorter one (:class:`Shorter`), in which one
instruction stands for the run, so that the reader is asked once for each tensor and not three times.
"""

from __future__ import annotations

import re
import secrets

_INT = rb"(?:K.|M..|J....)"
_PUT = rb"(?:q.|r..[\x00-\x0f]\x00)"
_GET = rb"(?:h.|j....)"


def _key(text: bytes, shortest: int) -> bytes:
    """A text of digits as long as it says: one of another length would hide instructions from the walk."""
    return b"(?:" + b"|".join(text % n + b"[0-9]{%d}" % n for n in range(shortest, 8)) + b")"


_KEY = b"X%c\0\0\0"
_SIZES = ((1, b"\x85"), (2, b"\x86"), (3, b"\x87"))
_SIZE = b"(?:\\)|" + b"|".join(_INT * n + c + _PUT for n, c in _SIZES) + b")"
_SIZE4 = b"(\\)|" + b"|".join(_INT * n + c + b"\x94" for n, c in _SIZES) + b")"

TENSOR = re.compile(
    b"(" + _GET + rb")\(\((" + _GET * 2 + b")" + _key(_KEY, 1) + _PUT + b"(" + _GET + b")" + _INT + b"N?t" + _PUT
    + b"Q" + _INT + _SIZE * 2 + b"[\x88\x89](" + _GET + rb")\)R" + _PUT + b"t" + _PUT + b"R(?:" + _PUT + b")?",
    re.DOTALL,
)  # fmt: skip
"""One tensor as torch.save writes it from the second one on: it leaves one value on the stack. Groups: what it asks for
(the function; the word "storage" and the storage's class; the location; OrderedDict)."""
NAMED = re.compile(_PUT + TENSOR.pattern, re.DOTALL)
"""What follows the name of a tensor in a state dict."""
WEIGHT = 20
"""Values that hashing any of the tuples visits which such a tensor puts into slots: its six arguments, with a storage
of five and a size and a stride of three each. What the tensor asks for is no tuple, or it is refused on reading."""
TENSOR4 = re.compile(
    _GET + rb"\(\(" + _GET + _GET + _key(b"\x8c%c", 1) + b"\x94" + _GET + _INT + b"t\x94"
    + b"Q" + _INT + _SIZE4 + _SIZE4 + b"[\x88\x89]" + _GET + rb"\)R\x94t\x94R\x94",
    re.DOTALL,
)  # fmt: skip
"""A tensor in protocol 4 and later, where values are numbered as they come."""

# The same as NAMED for tensors of one to three dimensions whose tuples go into slots above 255. A key of one digit is
# left out: Python keeps one object for each such text, so that it may be a name elsewhere in the file.
_LATE = rb"r.(?:[^\0][\x00-\x0f]|\0[\x01-\x0f])\0"
_FLAT = b"(" + b"|".join(_INT * n + c for n, c in _SIZES) + b")" + _LATE
LATER = re.compile(
    _PUT + b"(" + _GET + rb")\(\(((" + _GET * 2 + b")" + _key(_KEY, 2) + _PUT + b"(" + _GET + b")" + _INT
    + b")N?t" + _LATE + b"Q(" + _INT + b")" + _FLAT * 2 + b"([\x88\x89](" + _GET + rb"))\)R" + _LATE + b"t" + _LATE
    + b"R(" + _PUT + b")",
    re.DOTALL,
)  # fmt: skip
_NAME = ord("X")
_ASKS = re.compile(rb"h.|j(....)", re.DOTALL)
MAX_ASKED = 64
"""Different slots above 255 that a pickle may ask for and still be made shorter; each is looked for in all of it."""
MAX_LOOKED = 1 << 32
"""Bytes of the pickle times such slots."""


class Shorter:
    """Builds the shorter pickle of protocol 2 or 3 while a walk goes over ``data``.

    For each tensor that it is given, the shorter one asks for the storage ``(mark, function, "storage", class, key,
    location, elements, offset, size, stride, grad, OrderedDict)``, where size and stride are the instructions that make
    them, as bytes. ``mark`` can't be known to whoever made the file.
    """

    def __init__(self, data: bytes) -> None:
        self.mark = secrets.token_bytes(8)
        self.usable = True
        """False once an instruction came that the shorter pickle can't hold."""
        self._asked: set[bytes] = set()
        self._known: set[tuple[bytes, ...]] = set()
        self._data = data
        self._parts: list[bytes] = []
        self._copied = 0
        self._head = b"(C\x08" + self.mark

    def take(self, at: int) -> tuple[int, int]:
        """Take the tensors that follow one another, each behind its name, from the length of a name on: how many there
        are that match LATER, and where the last one ends."""
        data, match, known, parts = self._data, LATER.match, self._known, self._parts
        count, end = 0, at
        while data[at + 1 : at + 4] == b"\0\0\0" and (found := match(data, at + 4 + data[at])):
            function, pid, storage, location, offset, size, stride, last, hooks, put = found.groups()
            if (function, storage, location, hooks) not in known:
                self.asks(function, storage, location, hooks)
            sizes = b"C%c%bC%c%b" % (len(size), size, len(stride), stride)
            parts += data[self._copied : found.start(1)], self._head, function, pid, offset, sizes, last, b"tQ", put
            self._copied = end = found.end()
            count += 1
            if data[end] != _NAME:
                break
            at = end + 1
        return count, end

    def asks(self, *gets: bytes) -> None:
        """Note the slots above 255 of instructions that ask for a slot."""
        if gets not in self._known:
            self._known.add(gets)
            self._asked.update(slot for slot in _ASKS.findall(b"".join(gets)) if slot)

    def made(self, end: int) -> bytes | None:
        """The shorter pickle of data[:end], or None if there is none that surely says the same."""
        parts, self._parts = self._parts, []
        asked = len(self._asked)
        if not parts or not self.usable or asked > MAX_ASKED or asked * len(self._data) > MAX_LOOKED:
            return None
        # A tuple that is no longer noted may have gone into a slot that is asked for, over what was there.
        if any(self._data.count(b"r" + slot) != 1 for slot in self._asked):
            return None
        return b"".join([*parts, self._data[self._copied : end]])


_WIDTH = {ord("K"): 1, ord("M"): 2, ord("J"): 4}


def numbers(made: bytes) -> tuple[int, ...]:
    """The tuple that a size or stride of the shorter pickle makes."""
    found: list[int] = []
    at = 0
    while at < len(made) - 1:
        width = _WIDTH[made[at]]
        found.append(int.from_bytes(made[at + 1 : at + 1 + width], "little", signed=width == 4))
        at += 1 + width
    return tuple(found)

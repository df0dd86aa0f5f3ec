"""Whole tensors in a pickle: the run of instructions that torch.save writes for each, recognised at once.

A state dict of many tensors is the same forty instructions over and over. Where the walk over them (:mod:`.vet`) meets
such a run, it passes over it in one step; and of the pickle it makes a shorter one (:class:`Shorter`), in which one
instruction stands for the run, so that the reader is asked once for each tensor and not three times.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_right

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

# The same as NAMED for tensors of one to three dimensions, in slots above 255. A key of one digit is left out: Python
# keeps one object for each such text, so that it may be a name elsewhere in the file.
_LATE = rb"r.(?:[^\0][\x00-\x0f]|\0[\x01-\x0f])\0"
_FLAT = b"(" + b"|".join(_INT * n + c for n, c in _SIZES) + b")" + _LATE
LATER = re.compile(
    _LATE + b"(" + _GET + rb")\(\((" + _GET * 2 + b")(" + _key(_KEY, 2) + b")" + _LATE + b"(" + _GET + b")(" + _INT
    + b")N?t" + _LATE + b"Q(" + _INT + b")" + _FLAT * 2 + b"[\x88\x89](" + _GET + rb")\)R" + _LATE + b"t" + _LATE
    + b"R(" + _LATE + b")",
    re.DOTALL,
)  # fmt: skip
_NAME = ord("X")
_ASKS = re.compile(rb"h.|j(....)", re.DOTALL)
MAX_ASKED = 64
"""Slots that a pickle may ask for by four bytes and still be made shorter; each is looked for in all of it."""
MAX_LOOKED = 1 << 32
"""Bytes of the pickle times such slots."""


class Form:
    """What the storage and the place in it of one tensor have in common with those of other layers: elements of the
    storage, the tensor's first one, and its size and stride. Equal only to itself."""

    __slots__ = ("elements", "offset", "size", "stride")

    def __init__(self, elements: bytes, offset: bytes, size: bytes, stride: bytes) -> None:
        (self.elements,), (self.offset,) = numbers(elements), numbers(offset)
        self.size, self.stride = numbers(size[:-1]), numbers(stride[:-1])


Alike = list[tuple[bytes, bytes, Form]]
"""What stands for each of some tensors in the shorter pickle, the key of its storage, and its form."""


class Shorter:
    """Builds the shorter pickle of protocol 2 or 3 while a walk goes over ``data``.

    In it, a text of 12 bytes that ``data`` can't know stands for each tensor that it is given. Tensors that ask for the
    same function, class of storage, location and hooks (see :data:`TENSOR`) are ``alike``: the first one of them asks
    for ``(mark, function, "storage", class, location, OrderedDict, text)``, where ``text`` stands for it in
    :attr:`alike`, and the others for their text alone. That holds until a slot up to 255 is filled anew; the slots
    above that are asked for are filled once in all of ``data``, or there is no shorter pickle.
    """

    def __init__(self, data: bytes) -> None:
        self.mark = secrets.token_bytes(8)
        self.usable = True
        """False once an instruction came that the shorter pickle can't hold."""
        self.alike: dict[bytes, Alike] = {}
        """Tensors by the text of their first."""
        self._asked: set[bytes] = set()
        self._known: set[tuple[bytes, ...]] = set()
        self._open: dict[tuple[bytes, ...], Alike] = {}
        self._forms: dict[tuple[bytes, ...], Form] = {}
        self._data = data
        self._starts: list[int] = []
        self._parts: list[bytes] = []
        self._copied = 0

    def take(self, at: int) -> tuple[int, int]:
        """Take the tensors that follow one another, each behind its name, from the length of a name on: how many there
        are that match LATER, and where the last one ends."""
        data, match, forms, starts, parts = self._data, LATER.match, self._forms, self._starts, self._parts
        count, end, mark = 0, at, self.mark
        while data[at + 1 : at + 4] == b"\0\0\0" and (found := match(data, at + 4 + data[at])):
            function, storage, key, location, elements, offset, size, stride, hooks, put = found.groups()
            start = found.start(1)
            text = mark + len(starts).to_bytes(4, "little")
            shape = elements, offset, size, stride
            form = forms.get(shape) or forms.setdefault(shape, Form(*shape))
            asks = function, storage, location, hooks
            alike = self._open.get(asks)
            if alike is None:
                alike = self._first(asks, text)
                parts += data[self._copied : start], b"(C\x08%b%b%b%b%bC\x0c%btQ" % (mark, *asks, text), put
            else:
                parts += data[self._copied : start], b"C\x0c" + text + b"Q", put
            alike.append((text, key[5:], form))
            starts.append(start)
            self._copied = end = found.end()
            count += 1
            if data[end] != _NAME:
                break
            at = end + 1
        return count, end

    def _first(self, asks: tuple[bytes, ...], text: bytes) -> Alike:
        self.asks(*asks)
        alike = self._open[asks] = self.alike[text] = []
        return alike

    def asks(self, *gets: bytes) -> None:
        """Note the slots that instructions ask for by four bytes, which are those above 255."""
        if self.usable and gets not in self._known:
            self._known.add(gets)
            self._asked.update(slot for slot in _ASKS.findall(b"".join(gets)) if slot)
            self.usable = len(self._asked) <= MAX_ASKED

    def filled(self) -> None:
        """A slot up to 255 was filled: what asks for it may get another thing than before."""
        self._open.clear()

    def made(self, end: int) -> bytes | None:
        """The shorter pickle of data[:end], or None if there is none that surely says the same."""
        whole = self._whole(end) if self._parts and self.usable else None
        self._parts = []
        if whole is None:
            self.alike, self._forms = {}, {}
        return whole

    def _whole(self, end: int) -> bytes | None:
        if len(self._asked) * len(self._data) > MAX_LOOKED:
            return None
        for slot in self._asked:
            # What is no longer noted may have gone into a slot that is asked for, over what was there.
            at = self._data.find(b"r" + slot)
            if at < 0 or self._data.find(b"r" + slot, at + 1) >= 0:
                return None
            self._note_key(at)
        return b"".join([*self._parts, self._data[self._copied : end]])

    def _note_key(self, at: int) -> None:
        """Where a tensor's key is what goes into a slot at that position, note it in the shorter pickle too: other
        tensors have the same storage."""
        k = bisect_right(self._starts, at) - 1
        found = LATER.match(self._data, self._starts[k] - 5) if k >= 0 else None
        if found is not None and found.end(3) == at:
            self._parts[3 * k + 1] = b"%br%b0%b" % (found[3], self._data[at + 1 : at + 5], self._parts[3 * k + 1])


_WIDTH = {ord("K"): 1, ord("M"): 2, ord("J"): 4}


def numbers(made: bytes) -> tuple[int, ...]:
    """The whole numbers that instructions push."""
    found: list[int] = []
    at = 0
    while at < len(made):
        width = _WIDTH[made[at]]
        found.append(int.from_bytes(made[at + 1 : at + 1 + width], "little", signed=width == 4))
        at += 1 + width
    return tuple(found)

"""A pickle whose tensors are told in fewer words says what the pickle itself says, whatever was done to it."""

from __future__ import annotations

import random
import re
import zipfile
from io import BytesIO
from typing import Any

import pytest

from mdl.convert.inert import Call, RefusedError, Stub, StubType, Unreadable
from mdl.convert.unpickle import _Short, _walked, unpickle
from mdl.convert.vet import end_of_pickle
from mdl.convert.whole_tensors import LATER, MAX_ASKED, NAMED, Shorter, numbers
from mdl.errors import MdlError
from mdl.mappings.tensors import TensorInfo

torch = pytest.importorskip("torch")

FILE = "/folder/x.pt"


def pickled(saved: Any, protocol: int = 2) -> bytes:
    stream = BytesIO()
    torch.save(saved, stream, pickle_protocol=protocol)
    with zipfile.ZipFile(stream) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def locate(key: str, nbytes: int, itemsize: int) -> int:
    return 64 * int(key)


def shorter(data: bytes) -> tuple[bytes | None, Shorter]:
    made = Shorter(data)
    return made.made(end_of_pickle(data, len(data), shorter=made)), made


def by_itself(data: bytes) -> Any:
    return outcome(data, walked=True)


def outcome(data: bytes, *, walked: bool = False) -> Any:
    """What is read, or in which words it is refused."""
    try:
        return comparable(unpickle(data, FILE, locate, walked=walked))
    except MdlError as error:
        return [(p.what, p.where, p.do) for p in error.problems]


def comparable(node: Any) -> Any:
    if isinstance(node, dict):
        return [(comparable(key), comparable(value)) for key, value in node.items()]
    if isinstance(node, (list, tuple)):
        return type(node).__name__, [comparable(one) for one in node]
    if isinstance(node, Stub):
        return node.qualname, [comparable(x) for x in (node.args, node.state, node.entries, node.elements)]
    if isinstance(node, (Call, StubType)):
        return node.qualname
    return node.reason if isinstance(node, Unreadable) else (type(node).__name__, node)


def many(count: int = 300, dtype: Any = torch.float32) -> dict[str, Any]:
    return {f"layers.{n}.w": torch.zeros([2 + n % 3] * (n % 5), dtype=dtype) for n in range(count)}


def checkpoints() -> dict[str, Any]:
    base = torch.zeros(40, 6)
    shared = many()
    tied = {**shared, "again": shared["layers.77.w"], "and again": shared["layers.298.w"]}
    return {
        "many": many(),
        "views of one": {f"{n}.rows": base[n : n + 2].t() for n in range(38)} | {f"h.{n}.w": base for n in range(99)},
        "tied": tied,
        "tied by storage": shared | {"again": shared["layers.77.w"].detach(), "part": shared["layers.298.w"][1:]},
        "settings first": {"args": {f"setting {n}": n for n in range(400)}, "model": many()},
        "another type late": many() | {f"norm.{n}": torch.ones(3, dtype=torch.bfloat16) for n in range(50)},
        "the average beside": {"model": shared, "ema": {name: t.clone() for name, t in shared.items()}},
        "parameters": {name: torch.nn.Parameter(t) for name, t in many().items()},
        "digits": {"0": torch.zeros(2), **{f"{n}": torch.zeros(1) for n in range(300)}},
        "an optimizer": {"model": shared, "optimizer": {"state": {n: {"m": t} for n, t in enumerate(shared.values())}}},
        "empty": {f"w.{n}": torch.zeros(0, 5) for n in range(60)} | many(),
        "conjugated": many() | {"c": torch.zeros(2, dtype=torch.complex64).conj()},
    }


CHECKPOINTS = checkpoints()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_shorter_pickle_says_the_same(name: str, protocol: int) -> None:
    data = pickled(CHECKPOINTS[name], protocol)

    assert outcome(data) == by_itself(data)


@pytest.mark.parametrize("name", ["many", "tied", "tied by storage", "settings first", "another type late"])
def test_it_is_there_for_what_people_save_and_is_read(name: str) -> None:
    data = pickled(CHECKPOINTS[name])
    made, told = shorter(data)

    assert made is not None
    assert len(made) < len(data)
    assert comparable(_Short(made, FILE, locate, told).load()) == by_itself(data)


def test_it_asks_once_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[type] = []
    theirs = _Short.persistent_load

    def count(self: Any, pid: Any) -> Any:
        asked.append(type(pid))
        return theirs(self, pid)

    monkeypatch.setattr(_Short, "persistent_load", count)
    found = _walked(pickled({f"h.{n}.w": torch.zeros(2, 3) for n in range(500)}), FILE, locate)

    assert len(found) == 500
    assert len(asked) == 500
    assert asked.count(bytes) > 450


def test_a_slot_that_is_filled_again_holds_what_it_was_filled_with_last() -> None:
    """The tuple of a size goes into the slot of a tensor that is tied, before that one is asked for."""
    data = pickled(CHECKPOINTS["tied"])
    entry = data.index(b"again")
    slot = re.search(rb"j(....)", data[entry:], re.DOTALL)
    assert slot is not None
    kept = data.index(b"r" + slot[1])
    later = LATER.search(data, kept + 5)
    assert later is not None
    assert later.end() < entry
    put = data.rindex(b"r", 0, later.end(7) + 5)
    assert put == later.end(7)
    hostile = data[: put + 1] + slot[1] + data[put + 5 :]

    assert shorter(data)[0] is not None
    assert shorter(hostile)[0] is None
    found = dict(unpickle(hostile, FILE, locate))
    assert isinstance(found["again"], tuple)
    assert outcome(hostile) == by_itself(hostile)


def test_what_is_asked_for_may_lie_inside_a_tensor() -> None:
    """The size of a tensor, of which the shorter pickle notes nothing, under a name of its own."""
    data = pickled(CHECKPOINTS["tied"])
    entry = data.index(b"again")
    slot = re.compile(rb"j(....)", re.DOTALL).search(data, entry)
    later = LATER.search(data, 9000)
    assert slot is not None
    assert later is not None
    asking = data[: slot.start(1)] + data[later.end(7) + 1 : later.end(7) + 5] + data[slot.end(1) :]

    assert isinstance(dict(unpickle(asking, FILE, locate))["again"], tuple)
    assert outcome(asking) == by_itself(asking)


CLASS = re.compile(rb"ctorch\nFloatStorage\nq(.)", re.DOTALL)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("instead", [b"ctorch\nHalfStorage\n", b"ctorch\nIntStorage\n", b"X\x03\0\0\0cpu", b"N", b")"])
def test_what_the_tensors_ask_for_is_changed_on_the_way(instead: bytes, *, wide: bool) -> None:
    """The slot of the class of storages is filled anew between two tensors."""
    data = pickled({f"h.{n}.w": torch.zeros(2, 3) for n in range(300)})
    slot = CLASS.findall(data)[0]
    put = b"r%b\0\0\0" % slot if wide else b"q" + slot
    at = data.index(b"X\x07\0\0\0h.200.w")
    hostile = data[:at] + instead + put + b"0" + data[at:]
    found = outcome(hostile)

    assert shorter(hostile)[0] is not None
    assert found == by_itself(hostile)
    if b"Storage" in instead:
        types = [info.dtype for info in unpickle(hostile, FILE, locate).values()]
        assert types == ["float32"] * 200 + ["float16" if b"Half" in instead else "int32"] * 100


def test_a_tensor_may_change_what_the_others_ask_for() -> None:
    """What a tensor's own tuple is noted as is the slot of the class of storages."""
    data = pickled({f"h.{n}.w": torch.zeros(2, 3) for n in range(300)})
    slot = CLASS.findall(data)[0]
    later = LATER.search(data, data.index(b"h.200.w"))
    assert later is not None
    hostile = data[: later.start(10)] + b"q" + slot + data[later.end(10) :]

    assert shorter(hostile)[0] is not None
    assert outcome(hostile) == by_itself(hostile)
    assert outcome(hostile) != outcome(data)


def test_what_asks_for_too_much_is_read_as_it_stands() -> None:
    shared = many()
    data = pickled({**shared, **{f"tied.{n}": t for n, t in enumerate(shared.values())}})

    assert len(shared) > MAX_ASKED
    assert shorter(data)[0] is None
    assert outcome(data) == by_itself(data)


def test_what_is_asked_for_is_noted_up_to_a_bound() -> None:
    """Many slots that nothing was put into, each in five bytes of the file."""
    data = b"\x80\x02]" + b"".join(b"j" + (n + 256).to_bytes(4, "little") + b"0" for n in range(50_000)) + b"."
    made, told = shorter(data)

    assert made is None
    assert not told.usable
    assert len(told._asked) == MAX_ASKED + 1
    assert len(told._known) == MAX_ASKED + 1


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        (b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"),
        (b"_rebuild_tensor_v2", b"_rebuild_qtensor__"),
        (b"torch._utils\n_rebuild_tensor_v2", b"os.path_____\nsystem____________"),
        (b"collections\nOrderedDict", b"collections\ndefaultdict"),
        (b"collections\nOrderedDict", b"subprocess_\nPopen______"),
        (b"X\x07\0\0\0storage", b"X\x07\0\0\0sturage"),
        (b"FloatStorage", b"FlootStorage"),
        (b"FloatStorage", b"HalfStorage\0"),
        (b"FloatStorage", b"QInt8Storage"),
    ],
    ids=repr,
)
def test_what_is_called_otherwise_is_refused_in_the_same_words(there: bytes, instead: bytes) -> None:
    data = pickled(many())
    hostile = data.replace(there, instead)

    assert hostile != data
    assert len(hostile) == len(data)
    assert outcome(hostile) == by_itself(hostile)


def test_nobody_can_write_the_shorter_form_themselves() -> None:
    data = pickled({f"h.{n}.w": torch.zeros(2, 3) for n in range(60)})
    made, told = shorter(data)
    assert made is not None
    forged = made.replace(told.mark, b"markmark")
    assert [what for what, *_ in outcome(forged)] == ["a persistent id of this file is not one of torch.save's"]

    again, told = shorter(data)
    assert again is not None
    entry = re.search(rb"X\x06\0\0\0h.59.w.+", made, re.DOTALL)
    assert entry is not None
    with_both = again[: again.index(b"X\x06\0\0\0h.59.w")] + entry[0]
    with pytest.raises(Exception, match="persistent id"):
        _Short(with_both, FILE, locate, told).load()


def test_bytes_changed_anywhere() -> None:
    rng = random.Random(0)  # noqa: S311 - damage, not secrets
    data = pickled({f"h.{n}.w": torch.zeros([2 + n % 3] * (1 + n % 3)) for n in range(70)} | {"step": 5})
    read = used = 0
    for _ in range(4000):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(damaged))
            damaged[at] = rng.choice((damaged[at] ^ 1 << rng.randrange(8), rng.choice(data), rng.randrange(256)))
        found = outcome(bytes(damaged))
        try:
            made, _ = shorter(bytes(damaged))
        except RefusedError:
            continue  # the walk refused it, before anything could read it
        used += made is not None
        theirs = by_itself(bytes(damaged))
        read += bool(theirs) and len(theirs[0]) == 2  # a name and a tensor, not a refusal
        assert found == theirs

    assert min(read, used) > 500


def test_numbers() -> None:
    assert numbers(b"K\x03M\x00\x01J\xff\xff\xff\xff") == (3, 256, -1)
    assert numbers(b"K\x00") == (0,)


def test_negative_sizes_are_refused() -> None:
    data = pickled({f"h.{n}.w": torch.zeros(70_000, 1) for n in range(60)})
    hostile = data.replace(b"Jp\x11\x01\0K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86", 50)

    assert hostile != data
    assert shorter(hostile)[0] is not None
    (problem,) = outcome(hostile)
    assert "is not a whole number ≥ 0" in problem[0]


def test_one_storage_seen_by_many_is_one(tmp_path: Any) -> None:
    found = unpickle(pickled({f"h.{n}.w": torch.zeros(3) for n in range(90)}), FILE, locate)

    assert all(isinstance(info, TensorInfo) for info in found.values())
    assert len({info.storage for info in found.values()}) == 90


def chain(levels: int, *, doubled: bool) -> bytes:
    """Tensors whose locations are the tuples that name the tensors before them: the last is deep, or very wide."""
    head = b"\x80\x02]" + b"".join(
        made + b"0"
        for made in (
            b"ctorch._utils\n_rebuild_tensor_v2\nq\x02",
            b"X\x07\0\0\0storageq\x03",
            b"ctorch\nFloatStorage\nq\x04",
            b"X\x03\0\0\0cpuq\x31",
            b"ccollections\nOrderedDict\nq\x06",
        )
    )
    one = (
        b"h\x02((h\x03h\x04X\x02\0\0\x0010q\x07h\x31K\x01tq\x30QK\x00K\x01\x85q\x08K\x01\x85q\x09"
        b"\x89h\x06)Rq\x0atq\x0bRq\x0c0"
    )
    again = b"h\x30h\x30\x86q\x310" if doubled else b"h\x30q\x310"
    return head + (one + again) * levels + b"0}h\x31Ns."


@pytest.mark.parametrize(("levels", "doubled"), [(60, True), (250_000, False)])
def test_what_names_a_storage_holds_no_tuple(levels: int, *, doubled: bool) -> None:
    """Hashing the last one would take for ever, or more of the stack than there is."""
    (problem,) = outcome(chain(levels, doubled=doubled))
    assert "not one of torch.save's" in problem[0] or "nested values" in problem[0]


@pytest.mark.parametrize("length", range(1, 10))
def test_a_key_is_as_long_as_it_says(length: int) -> None:
    """Else what looks like an instruction is text, and what looks like a number is obeyed, unseen by the walk."""
    data = pickled({f"h.{n}.w": torch.zeros(2, 3) for n in range(300)})
    shown = bytes(3) + b"250"
    key = data.index(b"X\x03" + shown)
    entry = data.rindex(b"h.250.w", 0, key) + 7
    changed = data[: key + 1] + bytes((length,)) + data[key + 2 :]

    assert [bool(pattern.match(changed, entry)) for pattern in (NAMED, LATER)] == [length == 3] * 2
    assert outcome(changed) == by_itself(changed) or "damaged" in outcome(changed)[0][0]

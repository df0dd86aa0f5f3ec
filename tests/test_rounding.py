"""Fast roundings give the bits that ml_dtypes and numpy give, and but for NaN those that torch gives."""

from __future__ import annotations

import threading
from unittest import mock

import numpy as np
import pytest
import torch

from mdl.mappings import rounding
from mdl.mappings.rounding import Array, Rounding, raw_dtype, value_dtype
from mdl.mappings.tensors import ITEMSIZE

FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
LOWER = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xEFFF, 0xF000, 0xF001, 0xFFFF]
"""Lower halves of a float32: on, beside and between the ties of bfloat16 and of float16."""


def patterns(dtype: str) -> Array:
    """All bit patterns of 8 and 16 bits; of wider types all upper 16 bits with each of the chosen lower ones."""
    width = ITEMSIZE[dtype]
    if width <= 2:
        return np.arange(1 << (8 * width)).astype(f"u{width}").view(raw_dtype(dtype))
    upper = np.arange(1 << 16, dtype=f"u{width}") << np.uint64(8 * width - 16).astype(f"u{width}")
    lower = np.array(LOWER, f"u{width}") << np.uint64(8 * width - 32).astype(f"u{width}")
    return (upper[:, None] | lower).reshape(-1).view(dtype)


def plain(values: Array, source: str, target: str) -> Array:
    with np.errstate(all="ignore"):
        return values.view(value_dtype(source)).astype(value_dtype(target))


def wide(values: Array, dtype: str) -> Array:
    return plain(values, dtype, "float64")


def bits(values: Array) -> Array:
    return values.view(f"u{values.itemsize}")


def weights(dtype: str, count: int, scale: float = 0.02) -> Array:
    values = np.random.default_rng(0).standard_normal(count) * scale
    return plain(values, "float64", dtype).view(raw_dtype(dtype))


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_every_pattern(source: str, target: str) -> None:
    """In order, so that tiles of one kind occur, and shuffled, so that every tile holds every kind."""
    values = patterns(source)
    shuffled = np.random.default_rng(0).permutation(values)
    for some in (values, shuffled):
        made = Rounding(source, target)(some)
        assert made.dtype == raw_dtype(target)
        assert np.array_equal(bits(made), bits(plain(some, source, target)))


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
def test_every_pattern_as_torch_rounds_it(source: str, target: str) -> None:
    values = patterns(source)
    made = Rounding(source, target)(values)
    tensor = torch.from_numpy(bits(values).view(f"i{values.itemsize}").copy()).view(getattr(torch, source))
    theirs = tensor.to(getattr(torch, target)).view(getattr(torch, f"int{8 * made.itemsize}")).numpy()
    number = ~tensor.isnan().numpy()

    assert np.array_equal(bits(made)[number], bits(theirs)[number])
    assert np.isnan(wide(made, target)[~number]).all()


@pytest.mark.parametrize("scale", [0.02, 1e-4, 1e-6, 1e-8, 1.0, 3e4], ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 4099, 300_001])
@pytest.mark.parametrize("pair", sorted(rounding._FAST), ids=str)
def test_weights_of_any_size_and_number(pair: tuple[str, str], count: int, scale: float) -> None:
    """Few subnormal numbers, many, nothing else; few that overflow; ends that are no multiple of anything."""
    values = weights(pair[0], count, scale)
    told: list[tuple[Array, Array]] = []
    made = Rounding(*pair, lambda before, after, *_: told.append((before, after)))(values)

    assert np.array_equal(bits(made), bits(plain(values, *pair)))
    assert len(told) <= 1
    for before, after in told:
        assert (before.dtype, after.dtype) == (values.dtype, made.dtype)
        assert np.array_equal(bits(plain(before, *pair)), bits(after))
    one, other = told[0] if told else (values[:0], made[:0])
    assert lost(wide(one, pair[0]), wide(other, pair[1])) == lost(wide(values, pair[0]), wide(made, pair[1]))


def lost(before: Array, after: Array) -> tuple[int, int]:
    """How many finite values became infinite, and how many others than 0 became 0."""
    overflowed = np.isfinite(before) & ~np.isfinite(after)
    return int(overflowed.sum()), int(((before != 0) & (after == 0)).sum())


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_nobody_is_told_of_types_that_hold_everything(source: str, target: str) -> None:
    values, told = patterns(source), []
    made = Rounding(source, target, lambda *these: told.append(these))(values)

    assert bool(told) == any(lost(wide(values, source), wide(made, target)))


@pytest.mark.parametrize(
    "pair", [("float32", "bfloat16"), ("bfloat16", "float16"), ("float8_e5m2", "float16")], ids=str
)
def test_any_layout_becomes_c_order(pair: tuple[str, str]) -> None:
    values = weights(pair[0], 40 * 300).reshape(40, 300)
    for view in (values.T, values[::2, 1:], values.reshape(4, 10, 300).transpose(1, 2, 0), values[0, 0], values[:0]):
        made = Rounding(*pair)(view)
        assert made.flags.c_contiguous
        assert made.shape == view.shape
        assert np.array_equal(bits(made), bits(plain(np.ascontiguousarray(view), *pair).reshape(view.shape)))


def test_the_result_goes_where_it_is_wanted() -> None:
    values, out = weights("bfloat16", 60).reshape(6, 10), np.empty((6, 10), "float16")
    assert Rounding("bfloat16", "float16")(values, out) is out
    assert np.array_equal(bits(out), bits(plain(values, "bfloat16", "float16")))
    for wrong in (np.empty((10, 6), "float16"), np.empty((6, 10), "uint16"), np.empty((10, 6), "float16").T):
        with pytest.raises(ValueError, match="in C order"):
            Rounding("bfloat16", "float16")(values, wrong)


def test_values_at_odd_addresses_and_read_only() -> None:
    for source, target in rounding._FAST:
        values = weights(source, 1000)
        odd = np.frombuffer(b"x" + values.tobytes(), values.dtype, offset=1)
        assert np.array_equal(bits(Rounding(source, target)(odd)), bits(plain(values, source, target)))


def test_integers_are_left_to_numpy() -> None:
    values = np.arange(-5, 5, dtype="int64")
    assert Rounding("int64", "float16")(values).tolist() == values.tolist()
    assert Rounding("int8", "float32")(values.astype("int8")).tolist() == values.tolist()


def test_threads_have_scratch_of_their_own() -> None:
    told: list[bool] = []

    def act(seed: int) -> None:
        for source, target in sorted(rounding._FAST):
            values = np.random.default_rng(seed).permutation(weights(source, 200_000))
            told.append(np.array_equal(bits(Rounding(source, target)(values)), bits(plain(values, source, target))))

    threads = [threading.Thread(target=act, args=(k,)) for k in range(4)]
    with mock.patch.object(rounding, "TILE", 1 << 14):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert told == [True] * 8

"""Descriptions of arrays against numpy: whatever is cut, split, turned, joined and rounded, blocks hold the same bytes.

Tensors lie in a file with strides of any kind, as a conversion finds them; blocks are small, so that they begin and end
in the middle of heads and of turned dimensions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mdl.convert import stored
from mdl.convert.stored import Files
from mdl.mappings.lazy import Array, Lazy, Rounding, raw_dtype
from mdl.mappings.scratch import Scratch
from mdl.mappings.tensors import ITEMSIZE, Shape, TensorInfo

TYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn")
Pair = tuple[Lazy, Array]
"""What is described, and what numpy makes of the same."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A file of numbers that are all finite."""
    content = (np.random.default_rng(0).integers(0, 64, 1 << 20, "uint8")).tobytes()
    path = tmp_path_factory.mktemp("lazy") / "data"
    path.write_bytes(content)
    return path, content


def strides_of(shape: Shape, rng: random.Random) -> Shape:
    """Of a dense tensor in some order of its dimensions, of one with gaps, or any at all: 0, or overlapping."""
    if rng.random() < 0.3:
        return tuple(rng.choice((0, 1, 2, 3, 7, 64, 100)) for _ in shape)
    strides, step = [0] * len(shape), rng.choice((1, 1, 1, 2))
    for k in rng.sample(range(len(shape)), len(shape)):
        strides[k] = step
        step *= max(1, shape[k]) * rng.choice((1, 1, 1, 2))
    return tuple(strides)


def stored_tensor(files: Files, data: tuple[Path, bytes], rng: random.Random) -> Pair:
    path, content = data
    dtype = rng.choice(TYPES)
    sizes = (0, 1, 2, 3, 4, 6, 8, 12) if rng.random() < 0.05 else (1, 2, 3, 4, 6, 8, 12, 40)
    shape = tuple(rng.choice(sizes) for _ in range(rng.randint(0, 5)))
    strides, offset = strides_of(shape, rng), rng.choice((0, 1, 3, 8, 64, 77))
    end = offset + (1 + sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True))) * ITEMSIZE[dtype]
    if end > len(content) or math.prod(shape) > 200_000:
        return stored_tensor(files, data, rng)
    raw = raw_dtype(dtype)
    info = TensorInfo("t", shape, dtype, str(path), offset, strides, "s")
    if not math.prod(shape):
        return files.tensor(info), np.zeros(shape, raw)
    return files.tensor(info), np.ndarray(shape, raw, content, offset, tuple(s * raw.itemsize for s in strides))


def cut(x: Lazy, y: Array, rng: random.Random) -> Pair:
    axis = rng.randrange(y.ndim)
    low, high = sorted(rng.randint(0, y.shape[axis]) for _ in range(2))
    return x.slice(axis, low, high), y[(slice(None),) * axis + (slice(low, high),)]


def turn(x: Lazy, y: Array, rng: random.Random) -> Pair:
    order = rng.sample(range(y.ndim), y.ndim)
    return x.transpose(*order), y.transpose(order)


def split(x: Lazy, y: Array, rng: random.Random) -> Pair:
    axis = rng.randrange(y.ndim)
    n = y.shape[axis]
    outer = rng.choice([k for k in range(1, n + 1) if n % k == 0] or [0])
    if not outer:
        return x, y
    sizes = (outer, n // outer)
    return x.unflatten(axis, sizes), y.reshape((*y.shape[:axis], *sizes, *y.shape[axis + 1 :]))


def merge(x: Lazy, y: Array, rng: random.Random) -> Pair:
    start = rng.randrange(y.ndim)
    stop = rng.randint(start + 1, y.ndim)
    return x.flatten(start, stop), y.reshape((*y.shape[:start], math.prod(y.shape[start:stop]), *y.shape[stop:]))


def join(x: Lazy, y: Array, rng: random.Random) -> Pair:
    axis = rng.randrange(y.ndim)
    return (x, y) if y.size > 100_000 else (x.concat([x], axis), np.concatenate([y, y], axis))


def round_off(x: Lazy, y: Array, rng: random.Random) -> Pair:
    to = rng.choice(TYPES[:3])
    return x.cast(to), y if to == x.dtype else Rounding(x.dtype, to)(y)


def add(x: Lazy, y: Array, rng: random.Random) -> Pair:
    """The sum of an array with itself, perhaps described in another way: twice the number, which is exact."""
    other = x.concat([x.slice(0, 0, 0)], 0) if rng.random() < 0.5 else x
    number = "float64" if x.dtype == "float64" else "float32"
    wide = Rounding(x.dtype, number)(y) if x.dtype != number else y
    twice = wide + wide
    return x.summed([other], mean=False), twice if x.dtype == number else Rounding(number, x.dtype)(twice)


STEPS: tuple[Callable[[Lazy, Array, random.Random], Pair], ...] = (
    cut,
    cut,
    turn,
    turn,
    split,
    split,
    merge,
    join,
    round_off,
    add,
)


@pytest.mark.parametrize("seed", range(8))
def test_blocks_hold_what_numpy_holds(seed: int, data: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    rng, room = random.Random(seed), Scratch()  # noqa: S311 - shapes, not secrets
    monkeypatch.setattr(stored, "PIECE", rng.choice((512, 4096, 1 << 20)))
    with Files() as files:
        for _ in range(200):
            x, y = stored_tensor(files, data, rng)
            done: list[str] = []
            for step in rng.choices(STEPS, k=rng.randint(0, 6)):
                if y.ndim or step is round_off:
                    x, y = step(x, y, rng)
                    done.append(step.__name__)
            assert x.shape == y.shape, done
            limit, turned = rng.choice((64, 1000, 1 << 20)), rng.choice((0, 4096, 1 << 20))
            held = b"".join(block.tobytes() for block in x.blocks(limit, room, turned))
            assert held == y.tobytes(), (done, x.shape, x.dtype, limit, turned)
            assert x.read().tobytes() == y.tobytes(), done


def test_a_rotary_projection_that_is_rounded_in_small_blocks(data: tuple[Path, bytes]) -> None:
    """Blocks that begin in one head and end in the next one's middle: once, they held rows of another head."""
    path, content = data
    info = TensorInfo("q", (5 * 12, 8), "bfloat16", str(path), 0, (8, 1), "q")
    y = np.ndarray(info.shape, "uint16", content).reshape(5, 6, 2, 8).transpose(0, 2, 1, 3).reshape(60, 8)
    with Files() as files:
        for limit in range(32, 2000, 32):
            x = files.tensor(info).unflatten(0, (5, 6, 2)).transpose(0, 2, 1, 3).flatten(0, 3).cast("float32")
            held = b"".join(block.tobytes() for block in x.blocks(limit, Scratch()))
            assert held == Rounding("bfloat16", "float32")(y).tobytes(), limit


def test_a_cut_reads_nothing(data: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = data
    info = TensorInfo("q", (60, 8), "bfloat16", str(path), 0, (8, 1), "q")
    with Files() as files:
        x = files.tensor(info).unflatten(0, (5, 6, 2)).transpose(0, 2, 1, 3).flatten(0, 3)
        monkeypatch.setattr(stored.Stored, "read_into", lambda *_: pytest.fail("it is read"))
        for low in range(60):
            for high in range(low, 60):
                assert x.slice(0, low, high).shape == (high - low, 8)

"""What touching values costs per GB: looking at them, rounding, turning; the best of several rounds.

    python benchmarks/values.py [--rounds 10]

Blocks have the copy loop's size and stay in the CPU's cache, as they do there. What is turned are whole matrices, of
which one block after the other is made. Beside each stands what numpy and ml_dtypes take for it by themselves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from mdl.convert.values_seen import Seen
from mdl.convert.write import BLOCK
from mdl.mappings.rounding import Array, Rounding, raw_dtype, value_dtype
from mdl.mappings.tensors import ITEMSIZE
from mdl.mappings.turning import copy_turned

TYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float64")
ROUNDINGS = (
    ("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float16"), ("bfloat16", "float32"),
    ("float16", "bfloat16"), ("float16", "float32"), ("float64", "float32"), ("float8_e4m3fn", "bfloat16"),
    ("bfloat16", "float8_e4m3fn"),
)  # fmt: skip
MATRICES = ((6400, 1600), (1600, 6400), (4096, 4096))
HUGE = (1 << 40,)


def weights(dtype: str, shape: tuple[int, ...]) -> Array:
    """Values distributed as those of a trained model are: some are subnormal in float16, one in a million becomes 0."""
    values = np.random.default_rng(0).standard_normal(shape) * 0.02
    return values if dtype == "float64" else Rounding("float64", dtype)(values)


def milliseconds(act: Callable[[], object], nbytes: int, rounds: int, calls: int = 10) -> float:
    """Per GB of the ``nbytes`` that ``act`` works on: the best round of several calls each."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            act()
        best = min(best, (time.perf_counter() - begin) / calls)
    return best / nbytes * 1e12


def rounding(source: str, target: str, rounds: int) -> str:
    """The cost of a rounding, of the rounding and the count of what it lost, and of numpy's own."""
    values, seen = weights(source, (BLOCK // ITEMSIZE[source],)), Seen(HUGE, target)
    out = np.empty(values.shape, raw_dtype(target))
    numbers, wanted = values.view(value_dtype(source)), value_dtype(target)
    ours, watched = Rounding(source, target), Rounding(source, target, seen.rounded)
    cost, counted, theirs = (
        milliseconds(act, BLOCK, rounds)
        for act in (lambda: ours(values, out), lambda: watched(values, out), lambda: numbers.astype(wanted))
    )
    return f"{cost:6.0f} ms per GB read, with losses counted {counted:.0f}; astype {theirs:.0f}"


def turning(shape: tuple[int, int], dtype: str, rounds: int) -> str:
    """The cost of making the transposed matrix, a block at a time, and of numpy's own copies of the same blocks."""
    view = weights(dtype, shape).T
    rows = BLOCK // view[0].nbytes
    blocks = [view[start : start + rows] for start in range(0, len(view), rows)]
    out = np.empty(blocks[0].shape, view.dtype)
    ours, theirs = (
        milliseconds(act, view.nbytes, rounds, calls=1)
        for act in (
            lambda: [copy_turned(block, out[: len(block)]) for block in blocks],
            lambda: [np.ascontiguousarray(block) for block in blocks],
        )
    )
    return f"{ours:6.0f} ms per GB; ascontiguousarray {theirs:.0f}"


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rounds", type=int, default=10)
    rounds = cli.parse_args().rounds
    for dtype in TYPES:
        values, seen = weights(dtype, (BLOCK // ITEMSIZE[dtype],)), Seen(HUGE, dtype)
        print(f"{dtype:26}{milliseconds(lambda v=values, s=seen: s.feed(v), BLOCK, rounds):6.0f} ms per GB")
    with np.errstate(all="ignore"):
        for source, target in ROUNDINGS:
            print(f"{f'{source} to {target}':26}{rounding(source, target, rounds)}")
    for shape in MATRICES:
        for dtype in ("float32", "bfloat16"):
            print(f"{f'{dtype} {shape[0]} × {shape[1]}':26}{turning(shape, dtype, rounds)}")


if __name__ == "__main__":
    main()

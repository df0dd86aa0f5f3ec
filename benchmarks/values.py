"""What looking at values costs per GB, for each type and for each rounding; the best of several rounds.

    python benchmarks/values.py [--rounds 10]

Blocks have the copy loop's size and stay in the CPU's cache, as they do there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from mdl.convert.values_seen import Seen
from mdl.convert.write import BLOCK
from mdl.mappings.lazy import Array, Rounding
from mdl.mappings.tensors import ITEMSIZE

TYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float64")
ROUNDINGS = (("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float16"), ("float64", "float32"))


def block(dtype: str) -> Array:
    """One block of normally distributed values."""
    values = np.random.default_rng(0).standard_normal(BLOCK // ITEMSIZE[dtype])
    return values if dtype == "float64" else Rounding("float64", dtype)(values)


def milliseconds(act: Callable[[], object], rounds: int) -> float:
    """Per GB of the block that ``act`` works on: the best round of ten calls each."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(10):
            act()
        best = min(best, (time.perf_counter() - begin) / 10)
    return best / BLOCK * 1e12


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rounds", type=int, default=10)
    rounds = cli.parse_args().rounds
    for dtype in TYPES:
        values, seen = block(dtype), Seen((1 << 40,), dtype)
        print(f"{dtype:26}{milliseconds(lambda v=values, s=seen: s.feed(v), rounds):6.0f} ms per GB")
    for source, target in ROUNDINGS:
        before, seen, rounding = block(source), Seen((1 << 40,), target), Rounding(source, target)
        after = rounding(before)
        cost = milliseconds(lambda r=rounding, b=before: r(b), rounds)
        more = milliseconds(lambda s=seen, b=before, a=after, f=source, t=target: s.rounded(b, a, f, t), rounds)
        print(f"{f'{source} to {target}':26}{more:6.0f} ms per GB read, the rounding itself {cost:.0f}")


if __name__ == "__main__":
    main()

"""How far two sets of logits are apart, held against how far rounding alone takes the reference from itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    import torch

CEILING = 1e-10
"""No float32 conversion may be further off than this, whatever the ratio. Right conversions of some sixty
architectures measured at most 4e-12, the weakest known mistake (a norm epsilon ten times too small) 6e-10."""

RATIO = 16.0
"""How many times the reference's own float32 error vLLM's may be. Another order of summation measured 0.3 to 3;
known mistakes start at several hundred."""

NOISE = 4.0
"""How many times the reference's own float32 error the ceiling always leaves room for. It matters where rounding alone
comes near the ceiling: scores of some hundreds, say, which make attention all or nothing."""

DTYPE_RATIO = 2.0
"""How many times eager PyTorch's error in the serving type vLLM's may be. Measured in 16-bit types: 0.9 to 1.1."""


class Distance(Struct, frozen=True):
    """Errors of one sequence against float64, per position: ``error[t]`` = sum over the vocabulary of (x - exact)^2,
    ``scale[t]`` = sum of (exact - its mean)^2. Their quotient is the normalised mean square error, NMSE."""

    error: tuple[float, ...]
    scale: tuple[float, ...]

    @property
    def nmse(self) -> float:
        """NMSE over all positions; infinite where a value is not finite."""
        return _quotient(sum(self.error), sum(self.scale))

    @property
    def each(self) -> list[float]:
        """NMSE of each position."""
        return [_quotient(e, s) for e, s in zip(self.error, self.scale, strict=True)]

    @property
    def worst(self) -> tuple[int, float]:
        """The position with the largest NMSE, and that NMSE."""
        each = self.each
        at = max(range(len(each)), key=each.__getitem__)
        return at, each[at]

    def at(self, positions: Sequence[int]) -> Distance:
        """The same for some positions, in that order."""
        return Distance(tuple(self.error[p] for p in positions), tuple(self.scale[p] for p in positions))


def distance(logits: torch.Tensor, exact: torch.Tensor) -> Distance:
    """Distance of ``logits`` [T, V] from ``exact`` [T, V] (float64)."""
    error: list[float] = []
    scale: list[float] = []
    for some, right in zip(logits.split(64), exact.split(64), strict=True):
        wide = right.double()
        error += (some.double() - wide).square().sum(-1).tolist()
        scale += (wide - wide.mean(-1, keepdim=True)).square().sum(-1).tolist()
    return Distance(tuple(error), tuple(scale))


class Verdict(Struct, frozen=True):
    """The outcome of the float32 gate over all sequences.

    ``nmse`` and ``floor`` are vLLM's and the reference's own float32 error against the float64 run; ``worst`` and
    ``worst_floor`` the same at each one's worst position, (``sequence``, ``position``) saying where vLLM's is.
    """

    nmse: float
    floor: float
    worst: float
    worst_floor: float
    sequence: int
    position: int

    @property
    def ratio(self) -> float:
        """vLLM's error in units of the reference's own."""
        return _quotient(self.nmse, self.floor)

    @property
    def worst_ratio(self) -> float:
        """The same at the worst positions."""
        return _quotient(self.worst, self.worst_floor)

    @property
    def ceiling(self) -> float:
        """What the error must stay under, whatever the ratio."""
        return max(CEILING, NOISE * self.floor)

    @property
    def ok(self) -> bool:
        """Within the ratio overall and at the worst position, and under the ceiling. NaN never passes."""
        return self.ratio <= RATIO and self.worst_ratio <= RATIO and self.nmse <= self.ceiling


def judge(measured: list[Distance], floors: list[Distance]) -> Verdict:
    """Pool the sequences. ``measured`` is vLLM against float64, ``floors`` the float32 reference against float64."""
    sequence = max(range(len(measured)), key=lambda k: measured[k].worst[1])
    position, worst = measured[sequence].worst
    return Verdict(_pooled(measured), _pooled(floors), worst, max(f.worst[1] for f in floors), sequence, position)


def _pooled(distances: list[Distance]) -> float:
    return _quotient(sum(sum(d.error) for d in distances), sum(sum(d.scale) for d in distances))


def _quotient(a: float, b: float) -> float:
    """a / b, where 0 / 0 is 0 and whatever is not a number is infinitely wrong."""
    if a != a or b != b:
        return float("inf")
    if b == 0:
        return 0.0 if a == 0 else float("inf")
    return a / b

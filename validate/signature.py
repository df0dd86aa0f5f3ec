"""What an error looks like, in words: along the positions, the tokens, the channels and the heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_NOTHING = 1e-6
"""A part of the error below this share of the largest is none."""


def describe(got: torch.Tensor, exact: torch.Tensor, x: torch.Tensor | None, ids: Sequence[int], floor: float) -> str:
    """The signature of one module's error: answers [T, N] on both sides, its input [T, C] unless that is ids."""
    wrong = got.double() - exact
    if lost := [t for t, fine in enumerate(wrong.isfinite().all(-1).tolist()) if not fine]:
        return f"not numbers at {len(lost)} of {len(wrong)} positions, {ranges('position', lost)}"
    error = wrong.square()
    here = error.sum(-1) / exact.square().sum(-1).clamp_min(1e-300)
    noise = max(16 * floor, _NOTHING * float(here.max()))
    said = [_along(here, ids, noise), _ratio(got.double(), exact), _against_rms(here, x), _channels(error)]
    return "; ".join(part for part in said if part)


def _along(here: torch.Tensor, ids: Sequence[int], noise: float) -> str:
    """Which positions, and whether it grows."""
    wrong = [t for t, value in enumerate(here.tolist()) if value > noise]
    if not wrong:
        return "spread thinly"
    tokens = {ids[t] for t in wrong}
    same = [t for t, token in enumerate(ids) if token in tokens]
    if len(ids) > 2 and len(wrong) <= max(1, len(ids) // 16):
        if wrong == same:
            return f"only at token id {', '.join(map(str, sorted(tokens)))}"
        return f"only at position {', '.join(map(str, wrong))}"
    if wrong[0] > 0:
        growth = _growth(here)
        grows = ", grows with the position" if growth > 2 else ""
        return f"nothing {'at position 0' if wrong[0] == 1 else f'before position {wrong[0]}'}{grows}"
    if len(wrong) == len(ids):
        return "at every position alike" if float(here.max()) < 10 * float(here.median()) else "at every position"
    return f"at {len(wrong)} of {len(ids)} positions"


def _growth(here: torch.Tensor) -> float:
    """The last quarter's median over the first's, position 0 left out."""
    n = max(1, (len(here) - 1) // 4)
    return float(here[-n:].median()) / max(float(here[1 : 1 + n].median()), 1e-300)


def _ratio(got: torch.Tensor, exact: torch.Tensor) -> str:
    """Whether one number explains the difference: a scale or an offset."""
    total = float((got - exact).square().sum())
    factor = float((got * exact).sum()) / max(float(exact.square().sum()), 1e-300)
    if float((got - factor * exact).square().sum()) < 1e-4 * total:
        return f"vLLM's is {factor:.6g} times the reference's"
    offset = (got - exact).mean(0)
    if len(got) > 2 and float((got - exact - offset).square().sum()) < 1e-4 * total:
        return "the same vector is missing or added at every position: a bias"
    return ""


def _against_rms(here: torch.Tensor, x: torch.Tensor | None) -> str:
    """A wrong epsilon errs by d/(2 rms²): on logarithmic axes its error falls with slope -2 (squared: NMSE)."""
    if x is None or len(x) != len(here) or len(x) < 4:
        return ""
    rms = x.double().square().mean(-1).clamp_min(1e-300).log()
    value = here.clamp_min(1e-300).log()
    spread = rms - rms.mean()
    if float(rms.std()) < 0.02:
        return ""
    slope = float((spread * (value - value.mean())).sum() / spread.square().sum())
    fit = value - value.mean() - slope * spread
    close = float(fit.square().sum()) < 0.05 * float((value - value.mean()).square().sum())
    return "proportional to 1/rms² of the input, as a wrong epsilon is" if close and abs(slope + 2) < 0.3 else ""


def _channels(error: torch.Tensor) -> str:
    """Whether only some channels of the output err."""
    each = error.sum(0)
    wrong = (each > _NOTHING * each.max()).nonzero().flatten().tolist()
    return "" if len(wrong) > 0.9 * len(each) else f"only in {ranges('channel', wrong)} of {len(each)}"


def heads(wrong: torch.Tensor, projection: torch.Tensor, size: int) -> tuple[int, ...]:
    """Which heads of an attention err, from the error [T, C] of its output and the output projection [C, H·D].

    What the heads put into the projection is solved for by least squares; empty where it can't be (more channels
    in the heads than come out, or an error that is no number, which the solver refuses).
    """
    import torch

    if projection.shape[1] > projection.shape[0] or not bool(wrong.isfinite().all()):
        return ()
    mixed: Any = torch.linalg.lstsq(projection.double(), wrong.double().T).solution
    each = mixed.square().sum(-1).reshape(-1, size).sum(-1)
    return tuple((each > 1e-4 * each.max()).nonzero().flatten().tolist())


def ranges(word: str, numbers: Sequence[int], limit: int = 4) -> str:
    """``rows 3, 17-20``; the middle is cut where there are many runs."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    shown = text if len(text) <= limit else [*text[: limit - 1], f"… ({len(numbers)} in all)"]
    return f"{word}{'s' if len(numbers) != 1 else ''} {', '.join(shown)}"

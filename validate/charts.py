"""The pictures of a report, each one a function from plain figures to SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import svg
from .compare import RATIO

WIDE, HIGH = 460, 184
FULL = 940
MODULES = 44
"""Rows of the chart of modules; of a deeper model those around the located one are drawn."""


def positions(kind: str, measured: Sequence[float], floor: Sequence[float], axis: tuple[float, float]) -> str:
    """NMSE against the position in one sequence: vLLM's as a line, the reference's own as a grey band below it.

    ``axis`` spans the values of all sequences, so that their pictures compare.
    """
    x = svg.Axis(0, max(len(measured) - 1, 1), 48, WIDE - 12)
    y = svg.decades(axis, HIGH - 24, 12)
    ours, theirs = ([(x.at(t), y.at(e)) for t, e in enumerate(values)] for values in (measured, floor))
    worst = max(range(len(measured)), key=lambda t: math.inf if measured[t] != measured[t] else measured[t])
    band = [(theirs[0][0], y.start), *theirs, (theirs[-1][0], y.start)] if theirs else []
    said = f"position {worst}: {measured[worst]:.1e}"
    parts = [svg.across(y, x.start, x.end, 4), svg.along(x, y.start, y.start, 6)]
    parts += [svg.path(band, "band")] if len(theirs) > 1 else []
    parts += [svg.path(theirs, "floor")] if theirs else []
    parts += [svg.path(ours, "ours"), svg.dot(*ours[worst], 3.5, "worst", said)]
    parts += [svg.dot(a, b, 2.5, "broken", "not a number") for (a, b), e in zip(ours, measured, strict=True) if e != e]
    return svg.frame(WIDE, HIGH, parts, f"Error per position of a {kind} sequence, worst at {said}")


def ratios(measured: Sequence[float], floors: Sequence[float]) -> str:
    """How many positions have which multiple of the reference's own error, the limit drawn in."""
    found = [m / f if f > 0 else math.inf for m, f in zip(measured, floors, strict=True) if m > 0 or m != m]
    x = svg.decades([*found, 0.1, 100.0], 48, FULL - 20)
    bins = 4 * round(math.log10(x.high / x.low))
    counts = [0] * bins
    for ratio in found:
        inside = min(max(ratio, x.low), x.high) if ratio == ratio else x.high
        counts[min(int(4 * math.log10(inside / x.low) + 1e-9), bins - 1)] += 1
    y = svg.Axis(0, max(*counts, 1), 210, 24)
    limit = x.at(RATIO)
    parts = [svg.bar(limit, y.end, x.end - limit, y.start - y.end, "beyond")]
    parts += [svg.across(y, x.start, x.end, 4), svg.along(x, y.start, y.start, 8)]
    width = (x.end - x.start) / bins
    for k, count in enumerate(counts):
        low, high = (x.low * 10 ** ((k + step) / 4) for step in (0, 1))
        style = "bar bad" if low >= RATIO else "bar"
        top = y.at(count)
        title = f"{count} positions between {low:.2g} and {high:.2g} times"
        parts.append(svg.bar(x.start + k * width + 0.75, top, width - 1.5, y.start - top, style, title))
    near_end = limit > (x.start + x.end) / 2
    parts.append(svg.line(limit, y.end - 8, limit, y.start, "limit"))
    label = (limit - 6, "end") if near_end else (limit + 6, "start")
    parts.append(svg.text(label[0], y.end - 2, f"limit {RATIO:g} ×", "limit-label", label[1]))
    parts.append(svg.text(FULL / 2, 250, "vLLM's error ÷ the reference's own float32 error", "axis-title", "middle"))
    return svg.frame(FULL, 258, parts, "Histogram of error ratios")


def scatter(pairs: Sequence[tuple[float, float]]) -> str:
    """Exact logit against vLLM's logit; a right model is the diagonal."""
    both = [v for pair in pairs for v in pair]
    x, y = svg.spread(both, 48, WIDE - 16), svg.spread(both, 210, 12)
    parts = [svg.across(y, x.start, x.end, 5), svg.along(x, y.end, y.start, 7)]
    parts.append(svg.line(x.start, y.start, x.end, y.end, "diagonal"))
    spots = dict.fromkeys((x.at(a), y.at(b)) for a, b in pairs)
    parts += [svg.dot(*spot, 1.7, "spot") for spot in spots]
    parts.append(svg.text(WIDE / 2, 250, "exact logit → vLLM's logit", "axis-title", "middle"))
    return svg.frame(WIDE, 258, parts, "vLLM's logits against the exact ones")


def residuals(pairs: Sequence[tuple[float, float]]) -> str:
    """What the scatter can't show: the difference, against the exact logit, on its own scale."""
    gaps = [b - a for a, b in pairs]
    most = max((abs(g) for g in gaps if math.isfinite(g)), default=0.0) or 1.0
    unit = 10.0 ** math.floor(math.log10(most))
    x = svg.spread([a for a, _ in pairs], 48, WIDE - 16)
    y = svg.Axis(-1.1 * most / unit, 1.1 * most / unit, 210, 24)
    parts = [svg.across(y, x.start, x.end, 6), svg.along(x, y.end, y.start, 7)]
    parts.append(svg.line(x.start, y.at(0), x.end, y.at(0), "diagonal"))
    spots = dict.fromkeys((x.at(a), y.at(gap / unit)) for (a, _), gap in zip(pairs, gaps, strict=True))
    parts += [svg.dot(*spot, 1.7, "spot") for spot in spots]
    parts.append(svg.text(x.start - 6, 12, f"× {svg.power(round(math.log10(unit)))}", anchor="end"))
    parts.append(svg.text(WIDE / 2, 250, "exact logit → vLLM's minus exact", "axis-title", "middle"))
    return svg.frame(WIDE, 258, parts, "Difference of logits")


def modules(layers: Sequence[tuple[str, float, float]], found: str) -> str:
    """Every module's local error as a bar, its floor as a tick, on one logarithmic axis; the located one stands out."""
    rows = around(layers, found)
    left, right, step = 292, 900, 20
    bottom = 14 + step * len(rows)
    x = svg.decades([v for _, error, floor in rows for v in (error, floor)], left, right)
    x = svg.Axis(x.low / 10, x.high, left, right, log=True)  # so that the smallest bar can be seen
    parts = [svg.along(x, 8, bottom, 10)]
    for k, (name, error, floor) in enumerate(rows):
        top, here = 12 + step * k, name == found
        title = f"{name}: {error:.1e}, floor {floor:.1e}"
        short = name if len(name) <= 44 else "…" + name[-43:]
        parts.append(svg.text(left - 10, top + 11.5, short, "module here" if here else "module", "end"))
        style = "bar bad" if here else "bar beside" if error > RATIO * floor else "bar"
        parts.append(svg.bar(left, top + 2, x.at(error) - left, step - 7, style, title))
        if floor > 0:
            parts.append(svg.line(x.at(floor), top, x.at(floor), top + step - 3, "tick"))
    return svg.frame(right + 24, bottom + 22, parts, f"Local error per module; it begins in {found}")


def around(layers: Sequence[tuple[str, float, float]], found: str) -> list[tuple[str, float, float]]:
    """At most ``MODULES`` of the layers, the located one among them."""
    at = next((k for k, (name, _, _) in enumerate(layers) if name == found), 0)
    start = max(0, min(at - MODULES // 3, len(layers) - MODULES))
    return list(layers[start : start + MODULES])

"""Small pieces of SVG: axes that know where a value lies, marks, and frames. Colours are CSS classes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from msgspec import Struct


class Axis(Struct, frozen=True):
    """Maps values from ``low`` to ``high`` onto pixels from ``start`` to ``end``; logarithmic axes span whole decades.

    Values beyond the ends lie on them; what is no number lies at the high end, since it is infinitely wrong.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel."""
        if value != value:
            value = self.high
        value = min(max(value, self.low), self.high)
        low, high, here = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        part = (here - low) / (high - low) if high > low else 0.5
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Values worth a label, at most about ``most``, and their labels."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            step = max(1, -(-(last - first) // most))
            return [(10.0**k, power(k)) for k in range(first, last + 1, step)]
        rough = (self.high - self.low) / most or 1
        size = 10.0 ** math.floor(math.log10(rough))
        step = size * next(m for m in (1, 2, 5, 10) if m * size >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [(k * step, f"{k * step:.6g}") for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def power(exponent: int) -> str:
    """10 to the exponent, in print."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def decades(values: Iterable[float], start: float, end: float) -> Axis:
    """A logarithmic axis around the positive finite values; one decade at least."""
    seen = [v for v in values if v > 0 and math.isfinite(v)]
    low = math.floor(math.log10(min(seen))) if seen else -1
    high = math.ceil(math.log10(max(seen))) if seen else 0
    return Axis(10.0**low, 10.0 ** max(high, low + 1), start, end, log=True)


def spread(values: Sequence[float], start: float, end: float) -> Axis:
    """A linear axis around the finite values, with a margin."""
    seen = [v for v in values if math.isfinite(v)] or [0.0]
    margin = 0.05 * (max(seen) - min(seen)) or 1.0
    return Axis(min(seen) - margin, max(seen) + margin, start, end)


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """A straight line of a CSS class."""
    return f'<line class="{style}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def text(x: float, y: float, words: str, style: str = "label", anchor: str = "start") -> str:
    """A line of text."""
    return f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def dot(x: float, y: float, radius: float, style: str, title: str = "") -> str:
    """A point, with words for the mouse that rests on it."""
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle class="{style}" cx="{x:g}" cy="{y:g}" r="{radius:g}">{inside}</circle>'


def bar(x: float, y: float, width: float, height: float, style: str, title: str = "") -> str:
    """A rectangle, with words for the mouse that rests on it."""
    inside = f"<title>{escape(title)}</title>" if title else ""
    box = f'x="{x:g}" y="{y:g}" width="{max(width, 0):g}" height="{max(height, 0):g}"'
    return f'<rect class="{style}" {box} rx="1">{inside}</rect>'


def path(points: Sequence[tuple[float, float]], style: str) -> str:
    """Straight lines from point to point; a lone point becomes a dot."""
    if len(points) == 1:
        return dot(*points[0], 2, style)
    return f'<path class="{style}" d="M{" L".join(f"{x:g} {y:g}" for x, y in points)}"/>'


def across(axis: Axis, x1: float, x2: float, most: int = 6) -> str:
    """Grid lines and labels of a vertical axis."""
    marks = ((axis.at(value), label) for value, label in axis.ticks(most))
    return "".join(line(x1, y, x2, y, "grid") + text(x1 - 6, y + 3.5, label, anchor="end") for y, label in marks)


def along(axis: Axis, y1: float, y2: float, most: int = 6) -> str:
    """Grid lines and labels of a horizontal axis."""
    marks = ((axis.at(value), label) for value, label in axis.ticks(most))
    return "".join(line(x, y1, x, y2, "grid") + text(x, y2 + 15, label, anchor="middle") for x, label in marks)


def frame(width: float, height: float, parts: Iterable[str], title: str) -> str:
    """The whole picture; it scales with its column."""
    inner = "".join(parts)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img"><title>{escape(title)}</title>{inner}</svg>'

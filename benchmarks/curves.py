"""Peak anonymous memory against the size of the checkpoint, as a picture; drawn by benchmarks/convert.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from convert_tables import by_way
from convert_ways import WAYS

from mdl.validate import svg

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 800, 380, 64, 20, 322, 500
COLOURS = ("#868e96", "#1c9e77", "#3b82f6", "#e8590c", "#ae3ec9", "#b08900", "#e64980", "#0c8599")
"""Of middling lightness: they are read on white and on black."""
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#808080}.axis-title{font-size:13px}"
    ".grid{stroke:#808080;stroke-opacity:.25}.whole{stroke:#808080;stroke-dasharray:4 4}path{fill:none;stroke-width:2}"
)


def points_of(results: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """For each way: GB of the checkpoint, MB of memory, by size."""
    points: dict[str, list[tuple[float, float]]] = {}
    for result in sorted((r for r in results if r["runs"]), key=lambda r: r["nbytes"]):
        for name, runs in by_way(result).items():
            most = max(run["anon"] for run in runs) / 1e6
            points.setdefault(name, []).append((result["nbytes"] / 1e9, max(most, 0.01)))
    return points


def memory_curves(results: Sequence[dict[str, Any]]) -> str:
    """The picture, both axes logarithmic; a dashed line is the size of the checkpoint itself."""
    points = points_of(results)
    sizes = sorted({size for line in points.values() for size, _ in line}) or [1.0]
    x = svg.Axis(sizes[0] / 1.2, sizes[-1] * 1.2, LEFT, RIGHT, log=True)
    y = svg.decades([mb for line in points.values() for _, mb in line] + [1000 * sizes[-1]], BOTTOM, TOP)
    parts = [f"<style>{STYLE}</style>", svg.across(y, LEFT, RIGHT), verticals(x, sizes)]
    ends = [(size, 1000 * size) for size in (x.low, x.high)]
    parts.append(svg.line(*(v for size, mb in ends for v in (x.at(size), y.at(mb))), style="whole"))
    parts += [curve(line, x, y, colour) for line, colour in zip(points.values(), COLOURS, strict=False)]
    parts += legend(list(points))
    parts.append(svg.text((LEFT + RIGHT) / 2, BOTTOM + 42, "size of the checkpoint, GB", "axis-title", "middle"))
    parts.append(f'<g transform="translate(16 {(TOP + BOTTOM) / 2}) rotate(-90)">')
    parts.append(svg.text(0, 0, "peak anonymous memory, MB", "axis-title", "middle") + "</g>")
    picture = svg.frame(WIDTH, HEIGHT, parts, "Peak anonymous memory against the size of the checkpoint")
    return picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def curve(line: Sequence[tuple[float, float]], x: svg.Axis, y: svg.Axis, colour: str) -> str:
    """A way's points, with their figures for the mouse, and the line through them."""
    dots = [svg.dot(x.at(size), y.at(mb), 3.5, "spot", f"{size:.3g} GB: {mb:,.1f} MB") for size, mb in line]
    path = svg.path([(x.at(size), y.at(mb)) for size, mb in line], "way") if len(line) > 1 else ""
    return f'<g fill="{colour}" stroke="{colour}">{path}{"".join(dots)}</g>'


def verticals(axis: svg.Axis, sizes: Sequence[float]) -> str:
    """A line and a label at each measured size; labels that would touch are left out."""
    made, last = "", -math.inf
    for size in sizes:
        at = axis.at(size)
        made += svg.line(at, TOP, at, BOTTOM, "grid")
        if at - last >= 30:
            made += svg.text(at, BOTTOM + 18, f"{size:.3g}", anchor="middle")
            last = at
    return made


def legend(names: Sequence[str]) -> list[str]:
    """What each colour means, beside the picture."""
    parts: list[str] = []
    for k, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        at = TOP + 14 + 22 * k
        parts.append(f'<g fill="{colour}">{svg.dot(RIGHT + 22, at - 4, 4.5, "key")}</g>')
        parts.append(svg.text(RIGHT + 34, at, WAYS[name].title.replace("`", "")))
    at = TOP + 14 + 22 * len(names)
    mark = svg.line(RIGHT + 14, at - 4, RIGHT + 30, at - 4, "whole")
    return [*parts, mark, svg.text(RIGHT + 34, at, "the checkpoint's size")]

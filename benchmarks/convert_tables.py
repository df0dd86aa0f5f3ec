"""The tables of benchmarks/convert.py, and their places in a page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert_ways import WAYS
from pages import head, put_tables, row, spread

BLOCK = "<!-- speed: {} -->\n"
Result = dict[str, Any]


def block(results: Sequence[Result]) -> str:
    """Header line, table and remarks of one scenario; one row for each way and size."""
    first = results[0]
    by_size = len(results) > 1 or first["scenario"] == "sizes"
    lines = [header(first, results), ""]
    measured = [result for result in results if result["runs"]]
    if measured:
        lines += by_size_table(measured) if by_size else one_size_table(first)
    said = [f"- {line}" for result in results for line in notes(result, by_size=by_size)]
    lines += (["", *dict.fromkeys(said)] if measured else list(dict.fromkeys(said))) if said else []
    if measured and first["scenario"] == "sizes":
        lines += ["", "![Peak anonymous memory against the size of the checkpoint](memory.svg)"]
    return "\n".join(lines) + "\n"


def header(first: Result, results: Sequence[Result]) -> str:
    sizes = ", ".join(f"{(r.get('nbytes') or r['gigabytes'] * 1e9) / 1e9:.3g}" for r in results)
    rounds = max((run["round"] + 1 for r in results for run in r["runs"]), default=0)
    cache = "cold source" if first["cold"] else "source in the file cache"
    more = f", `{first['mdl_args']}`" if first["mdl_args"] else ""
    machine = f"{first['machine']}; {first['versions']}"
    return f"{first['title']}, {sizes} GB; rounds: {rounds}, {cache}{more}. {machine}."


def one_size_table(result: Result) -> list[str]:
    """Ratios to the base, and what the median round took."""
    base = WAYS[result["base"]].title
    columns = ("way", f"× {base}", "min to max", "s", "CPU s", "GB/s", "anonymous MB", "RSS MB")
    lines = head(columns)
    for name, runs in by_way(result).items():
        middle, low, high = spread(ratios(result, name))
        seconds = median(runs, "seconds")
        speed = result["nbytes"] / 1e9 / seconds
        figures = (f"{seconds:.2f}", f"{median(runs, 'cpu'):.2f}", f"{speed:.2f}", *memory(runs))
        lines.append(row(WAYS[name].title, middle, f"{low} to {high}", *figures))
    return lines


def by_size_table(results: Sequence[Result]) -> list[str]:
    """The same for several sizes, by the byte."""
    base = WAYS[results[0]["base"]].title
    lines = head(("way", "GB", f"× {base}", "min to max", "s per GB", "CPU s per GB", "anonymous MB", "RSS MB"))
    for name in dict.fromkeys(name for result in results for name in by_way(result)):
        for result in results:
            runs = by_way(result).get(name)
            if runs:
                middle, low, high = spread(ratios(result, name))
                size = result["nbytes"] / 1e9
                per_gb = (f"{median(runs, key) / size:.2f}" for key in ("seconds", "cpu"))
                lines.append(row(WAYS[name].title, f"{size:.3g}", middle, f"{low} to {high}", *per_gb, *memory(runs)))
    return lines


def notes(result: Result, *, by_size: bool) -> list[str]:
    """What is not in the table and why, and what sets the work of a way apart."""
    at = f" at {result['gigabytes']:g} GB" if by_size else ""
    lines = [f"not measured{at}: {result['refused']}"] if result.get("refused") else []
    ran = by_way(result)
    for name, why in result["skipped"].items():
        state = f"ended after {len(ran[name])} of its rounds" if name in ran else "is missing"
        lines.append(f"{WAYS[name].title}{at} {state}: {why}")
    return lines + [f"{WAYS[name].title}: {text}" for name, text in result.get("remarks", {}).items() if name in ran]


def by_way(result: Result) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of each way, in the order in which the ways are defined."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name in WAYS:
        if runs := [run for run in result["runs"] if run["way"] == name]:
            found[name] = runs
    return found


def ratios(result: Result, name: str) -> list[float]:
    """A way's time over the base's, round by round."""
    base = {run["round"]: run["seconds"] for run in result["runs"] if run["way"] == result["base"]}
    runs = (run for run in result["runs"] if run["way"] == name)
    return [run["seconds"] / base[run["round"]] for run in runs if run["round"] in base]


def median(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def memory(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The most that any round needed, in MB."""
    anon, rss = (max(run[key] for run in runs) / 1e6 for key in ("anon", "rss"))
    return f"{anon:,.1f}" if anon < 10 else f"{anon:,.0f}", f"{rss:,.0f}"


def write_page(page: Path, blocks: Mapping[str, str]) -> None:
    """Put each table between its markers; what was not measured stays. Raises ValueError where a page has no place."""
    put_tables(page, {BLOCK.format(name): made for name, made in blocks.items()})

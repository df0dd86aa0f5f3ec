"""A report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template

from . import charts
from .decision import Decision
from .report import Check, Evidence, Located, Report

TEMPLATE = Path(__file__).with_name("report.html")
SEQUENCES = 10
"""Pictures of single sequences; where there are more, those with the largest errors are shown."""

_STATES = {True: ("pass", "pass"), False: ("fail", "FAIL"), None: ("none", "not run")}
_MARKS = {True: "M20 33 L28 41 L45 23", False: "M23 23 L41 41 M41 23 L23 41"}


def to_html(report: Report) -> str:
    """The whole page. It follows the reader's choice of light or dark."""
    parts = [_header(report), _tiles(report), _checks(report.checks)]
    parts += [_decision(report.decision)] if report.decision else []
    parts += [_located(report.located)] if report.located else []
    parts += [_evidence(report.evidence)] if report.evidence else []
    parts.append(_reproduce(report))
    title = ("✓ " if report.ok else "✗ ") + Path(report.layout).name
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(title=escape(title), body="\n".join(parts))


def _header(report: Report) -> str:
    state = _STATES[report.ok][0]
    seal = f'<circle class="seal" cx="32" cy="32" r="31"/><path class="mark" d="{_MARKS[report.ok]}"/>'
    what = f"<code>{escape(report.layout)}</code>, made from {escape(report.arch)}, served as {escape(report.target)}"
    return (
        f'<header class="card {state}"><svg viewBox="0 0 64 64" aria-hidden="true">{seal}</svg>'
        f'<div><h1>{escape(report.verdict)}</h1><p class="soft">{what}</p></div></header>'
    )


def _tiles(report: Report) -> str:
    """The gate's figures, large: those of the first check that has them."""
    figures = next((c.figures for c in report.checks if {"nmse", "floor"} <= c.figures.keys()), {})
    named = [
        ("nmse", "{:.1e}", "vLLM's float32 error (NMSE)"),
        ("floor", "{:.1e}", "the reference's own"),
        ("ratio", "{:.2g} ×", "their ratio"),
        ("worst_ratio", "{:.2g} ×", "ratio at the worst position"),
    ]
    tiles = [(form.format(figures[name]), words) for name, form, words in named if name in figures]
    passed = sum(check.ok is True for check in report.checks)
    tiles.append((f"{passed} of {len(report.checks)}", "checks passed"))
    made = (f'<div class="card tile"><b>{escape(a)}</b><span class="soft">{escape(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{"".join(made)}</div>'


def _checks(checks: Iterable[Check]) -> str:
    rows = "".join(_row(check) for check in checks)
    head = "<thead><tr><th>check</th><th></th><th>measured</th><th>limit</th></tr></thead>"
    return f'<h2>Checks</h2><div class="card scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _row(check: Check) -> str:
    state, word = _STATES[check.ok]
    items = "".join(f"<li>{escape(line)}</li>" for line in check.detail)
    detail = f"<ul>{items}</ul>" if items else ""
    return (
        f'<tr class="{state}"><td><b>{escape(check.name)}</b></td><td><span class="chip">{word}</span></td>'
        f"<td>{escape(check.measured)}{detail}</td><td>{escape(check.limit)}</td></tr>"
    )


def _decision(decision: Decision) -> str:
    """What --decide tried: every candidate, the nearest first."""
    cells = (map(escape, row) for row in decision.rows(None))
    rows = "".join(
        f"<tr><td><code>{values}</code></td><td>{nmse}</td><td>{units}</td></tr>" for values, nmse, units in cells
    )
    head = "<thead><tr><th>candidate</th><th>NMSE</th><th></th></tr></thead>"
    table = f'<div class="card scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
    return f"<h2>The values that were tried</h2>{table}"


def _located(found: Located) -> str:
    facts = {
        "module": f"<code>{escape(found.module)}</code>" if found.module else escape(found.place),
        "in vLLM": f"<code>{escape(found.served)}</code>" if found.served else "",
        "local error": f"NMSE {found.local_error:.1e}, where rounding alone makes {found.floor:.1e}"
        if found.module
        else "",
        "it looks like": escape(found.signature),
        "decided by": escape(found.governed_by),
        "tried": escape(found.hypothesis),
    }
    shown = f'<div class="card fail">{_facts({k: v for k, v in facts.items() if v})}</div>'
    if not found.layers:
        return f"<h2>Where it begins</h2>{shown}"
    drawn = len(charts.around(found.layers, found.module))
    some = f" ({drawn} of {len(found.layers)} modules)" if drawn < len(found.layers) else ""
    caption = f"fed the reference's own input{some}; the upright tick is what rounding alone makes"
    picture = _figure("Local error of each module", caption, charts.modules(found.layers, found.module))
    return f'<h2>Where it begins</h2>{shown}<div class="gap"></div>{picture}'


def _evidence(e: Evidence) -> str:
    """The pictures: sequences on one common axis, then all positions and logits together."""
    every = [v for one in (*e.measured, *e.floors) for v in one]
    if not every:
        return ""
    order = sorted(range(len(e.kinds)), key=lambda k: max(e.measured[k], default=0.0), reverse=True)
    kept = sorted(order[:SEQUENCES])
    key = '<span class="key" style="color: var(--ours)"></span>vLLM &emsp; '
    key += '<span class="key" style="color: var(--floor)"></span>the reference\'s own float32 run &emsp; ○ worst'
    some = f" Shown are {len(kept)} of {len(order)} sequences, those with the largest errors." * (
        len(kept) < len(order)
    )
    intro = f'<p class="soft">NMSE at each position against the exact logits. {key}{some}</p>'
    lines = [
        _figure(
            f"{e.kinds[k]} sequence",
            f"{len(e.measured[k])} positions",
            charts.positions(e.kinds[k], e.measured[k], e.floors[k], (min(v for v in every if v == v), max(every))),
        )
        for k in kept
    ]
    measured, floors = ([v for one in side for v in one] for side in (e.measured, e.floors))
    caption = "single positions may lie beyond the limit: it holds for the pooled error and for the worst positions"
    more = [_figure("How far beyond the floor", caption, charts.ratios(measured, floors), "full")]
    if e.pairs:
        some = f"{len(e.pairs)} logits"
        more.append(_figure("Logit against logit", some, charts.scatter(e.pairs)))
        more.append(
            _figure("What the diagonal hides", f"the differences of the same {some}", charts.residuals(e.pairs))
        )
    return (
        f'<h2>Error by position</h2>{intro}<div class="figures">{"".join(lines)}</div>'
        f'<h2>All positions</h2><div class="figures">{"".join(more)}</div>'
    )


def _figure(title: str, caption: str, picture: str, style: str = "") -> str:
    said = f"<figcaption><b>{escape(title)}</b>{escape(caption)}</figcaption>"
    return f'<figure class="card {style}">{said}{picture}</figure>'


def _reproduce(report: Report) -> str:
    command = f"<pre>{escape(report.command)}</pre>" if report.command else ""
    facts = {
        "reference": escape(report.reference),
        "checkpoint": f"<code>{escape(report.checkpoint)}</code>",
        "inputs": escape(f"{report.inputs}, seed {report.seed}"),
        "serving type": escape(report.dtype),
        "on trust": "<br>".join(escape(line) for line in report.trusted),
        "notes": "<br>".join(escape(line) for line in report.notes),
        "versions": escape(", ".join(f"{name} {version}" for name, version in report.versions.items())),
        "sha256 of mdl.json": f"<code>{escape(report.manifest)}</code>",
        "seconds": escape(", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())),
    }
    shown = _facts({k: v for k, v in facts.items() if v})
    return f'<h2>How to reproduce</h2><div class="card">{command}{shown}</div>'


def _facts(facts: Mapping[str, str]) -> str:
    """Names are ours, values are HTML already."""
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items()) + "</dl>"

"""A report as plain text, for where there is no terminal to draw a table on: an assertion's message."""

from __future__ import annotations

from .report import Check, Report

_MARKS = {True: "pass", False: "FAIL", None: "–"}


def to_text(report: Report) -> str:
    """The verdict, the checks in columns with their details below, where the fault begins, and how to repeat it."""
    rows = [("check", "", "measured", "limit")]
    rows += [(check.name, _MARKS[check.ok], check.measured, check.limit) for check in report.checks]
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    table = [lines[0]]
    for line, check in zip(lines[1:], report.checks, strict=True):
        table += [line, *_details(check)]
    found = report.located
    begins = [f"begins in: {found.place}: {found.signature}; {found.governed_by}"] if found else []
    facts = [
        f"layout:    {report.layout}",
        f"reference: {report.reference} on {report.checkpoint}",
        f"inputs:    {report.inputs}, seed {report.seed}",
        f"versions:  {', '.join(f'{name} {version}' for name, version in report.versions.items())}",
    ]
    return "\n".join([report.verdict, "", *table, *begins, "", *facts])


def _details(check: Check) -> list[str]:
    return [f"    {line}" for line in check.detail]

"""A report for a CI server: JUnit's XML, one test case per check."""

from __future__ import annotations

import re
from xml.etree import ElementTree as Xml

from .report import Check, Report

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(report: Report) -> str:
    """The XML text. A check that was not run is skipped; a report that failed without a failed check is an error."""
    failed = sum(check.ok is False for check in report.checks)
    skipped = sum(check.ok is None for check in report.checks)
    unproven = not report.ok and not failed
    counts = {"failures": failed, "skipped": skipped, "errors": int(unproven)}
    suite = Xml.Element("testsuite", {"name": f"mdl verify {report.layout}"})
    tests = len(report.checks) + unproven
    for name, value in {"tests": tests, **counts, "time": sum(report.seconds.values())}.items():
        suite.set(name, f"{value:g}")
    told = {
        "verdict": report.verdict,
        "checkpoint": report.checkpoint,
        "arch": report.arch,
        "target": report.target,
        "reference": report.reference,
        "dtype": report.dtype,
        "inputs": report.inputs,
        "seed": str(report.seed),
        "manifest sha256": report.manifest,
        "command": report.command,
        **{f"version of {name}": value for name, value in report.versions.items()},
    }
    properties = Xml.SubElement(suite, "properties")
    for name, value in told.items():
        Xml.SubElement(properties, "property", {"name": name, "value": _clean(value)})
    for check in report.checks:
        _add_case(suite, report, check)
    if unproven:
        case = Xml.SubElement(suite, "testcase", {"classname": f"mdl.verify.{report.arch}", "name": "verdict"})
        Xml.SubElement(case, "error", {"message": "a check that makes the proof was not run"})
    Xml.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Xml.tostring(suite, encoding="unicode") + "\n"


def _add_case(suite: Xml.Element, report: Report, check: Check) -> None:
    case = Xml.SubElement(suite, "testcase", {"classname": f"mdl.verify.{report.arch}", "name": check.name})
    if check.name in report.seconds:
        case.set("time", f"{report.seconds[check.name]:g}")
    message = check.measured + (f" (limit {check.limit})" if check.limit else "")
    detail = [*check.detail, *(f"{name} = {value:g}" for name, value in check.figures.items())]
    if check.ok is None:
        Xml.SubElement(case, "skipped", {"message": _clean(message)})
    elif check.ok is False:
        failure = Xml.SubElement(case, "failure", {"message": _clean(message), "type": "parity"})
        if report.located is not None:
            detail.append(f"begins in {report.located.place}: {report.located.signature}")
        failure.text = _clean("\n".join(detail))
    else:
        Xml.SubElement(case, "system-out").text = _clean("\n".join([message, *detail]))


def _clean(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)

"""What a verification found, as records that print as a table, as JSON, and that `mdl serve` reads back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from msgspec import Struct, field
from msgspec.structs import replace

from ..convert.manifest import NAME as MANIFEST
from ..convert.receipts import write_at_once
from ..mappings.jsonable import to_json
from .decision import Decision

NAME = "mdl-report.json"
REFUSED = "failed to "
"""What a check measured where vLLM did not load or run the layout at all begins with this."""


class Check(Struct, frozen=True):
    """One tier: what was measured, against which limit, and what follows. ``ok`` is None if it was not run."""

    name: str
    ok: bool | None
    measured: str
    limit: str
    detail: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict[str, float])


class Evidence(Struct, frozen=True):
    """What the pictures of a report are drawn from.

    Per sequence: its kind, and the NMSE at each position of vLLM's and of the reference's own float32 logits, both
    against float64. ``pairs`` are up to 2000 (exact logit, vLLM's logit).
    """

    kinds: tuple[str, ...]
    measured: tuple[tuple[float, ...], ...]
    floors: tuple[tuple[float, ...], ...]
    pairs: tuple[tuple[float, float], ...] = ()


class Located(Struct, frozen=True):
    """Where a failure begins: the first module that, fed the reference's own input, answers otherwise.

    ``module`` is its path in the reference, ``served`` in vLLM; both are empty if every module is right by itself.
    Errors are NMSE. ``signature`` says what the error
    looks like, ``governed_by`` which config field or mapping line decides there, ``hypothesis`` what was tried and
    how far the error fell. ``layers`` lists every module with its local error and floor, in order.
    """

    module: str
    served: str
    local_error: float
    floor: float
    signature: str
    governed_by: str
    hypothesis: str
    layers: tuple[tuple[str, float, float], ...] = ()

    @property
    def place(self) -> str:
        """The module on both sides; words where no single one is at fault."""
        return f"{self.module} (in vLLM {self.served})" if self.module else "no single module"


class Report(Struct, frozen=True):
    """One verification of one layout.

    ``trusted`` lists what the reference itself had to take on trust: values that neither the checkpoint nor its
    shapes tell. ``manifest`` is the sha256 of mdl.json at the time, so that a later change voids the report.
    """

    layout: str
    checkpoint: str
    arch: str
    target: str
    reference: str
    dtype: str
    ok: bool
    checks: tuple[Check, ...]
    inputs: str
    seed: int
    trusted: tuple[str, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    manifest: str
    command: str
    seconds: Mapping[str, float]
    evidence: Evidence | None = None
    located: Located | None = None
    decision: Decision | None = None

    def to_json(self) -> str:
        """The whole report as one JSON document."""
        return to_json(self)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.ok:
            return f"vLLM computes what {self.reference} computes"
        if refused := next(
            (c.measured for c in self.checks if c.name == "coverage" and c.measured.startswith(REFUSED)), ""
        ):
            return f"NOT the same model: vLLM {refused} the layout"
        failed = [check for check in self.checks if check.ok is False]
        if [check.name for check in failed] == ["decide"]:
            return f"NOT proven: {failed[0].measured}"
        return f"NOT the same model: {', '.join(check.name for check in failed) or 'a check'} failed"


def manifest_hash(layout: Path) -> str:
    """The sha256 of a layout's mdl.json."""
    return hashlib.sha256((layout / MANIFEST).read_bytes()).hexdigest()


def save_report(report: Report, layout: Path) -> Path:
    """Write the report into the layout, where `mdl serve` looks for it."""
    path = layout / NAME
    write_at_once(path, report.to_json(), sync=False)
    return path


def keep_report(report: Report, layout: Path) -> Report:
    """Save it, or say in it why that can't be: a layout may lie on a read-only disk, and minutes of work are in it."""
    try:
        save_report(report, layout)
    except OSError as error:
        note = f"the report can't be saved in the layout ({error.strerror}), so `mdl serve` will not know of it"
        return replace(report, notes=(*report.notes, note))
    return report


def green_report(layout: Path) -> tuple[bool, str]:
    """Whether a report says that this very layout passed, and if not, why not in words."""
    path = layout / NAME
    if not path.is_file():
        return False, "it was never verified"
    try:
        data = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        passed, recorded = data["ok"], data["manifest"]
    except (ValueError, KeyError, TypeError):
        return False, f"{NAME} is not a report"
    if recorded != manifest_hash(layout):
        return False, "it was converted again after its last verification"
    return (True, "") if passed is True else (False, "its last verification failed")

"""Prove it: the only room that runs models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import Engine
    from .report import Report

__all__ = ["assert_parity"]


def assert_parity(
    layout: Path | str,
    *,
    against: Path | str | None = None,
    arch: str | None = None,
    reference: str | None = None,
    engine: Engine | None = None,
    seed: int = 0,
) -> Report:
    """Verify a layout as ``mdl verify`` does, and return the report if vLLM computes what the reference computes.

    ``against`` is the raw checkpoint, if it was moved; ``arch`` is the file of your own family, if the layout was made
    with one; ``reference`` is FILE.py:FUNCTION with your own forward;
    ``engine`` lends a running :class:`mdl.validate.client.Engine`, so that several layouts share vLLM's imports.
    Raises AssertionError, with the table of checks as its message, for a layout that is another model; MdlError for
    one that can't be verified: INPUT for an unusable layout or reference, MACHINE where vLLM or memory is missing.
    """
    from .text import to_text
    from .verify import Settings, verify

    settings = Settings(against=Path(against) if against else None, arch=arch, reference=reference, seed=seed)
    report = verify(Path(layout), settings, engine=engine)
    if not report.ok:
        raise AssertionError(to_text(report))
    return report

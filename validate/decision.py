"""What `--decide` found, as records that print as a table and as JSON, and as a check of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from .report import Check

SHOWN = 8
"""Candidates that a table shows; --json has all."""


class Candidate(Struct, frozen=True):
    """One combination of values, and how far the family's own forward with them is from the user's.

    ``values`` are the texts as --set would take them. ``nmse`` is infinite where the combination can't be, and
    ``refused`` then says why. ``fits`` tells whether it passes the gate of a verification.
    """

    values: Mapping[str, str]
    nmse: float
    fits: bool
    refused: str = ""

    @property
    def text(self) -> str:
        """As on the command line."""
        return " ".join(f"{name}={value}" for name, value in self.values.items())


class Answer(Struct, frozen=True):
    """What was found of one hyperparameter: its ``value``, or None where nothing was decided. ``why`` is a sentence.

    ``nearest`` and ``runner_up`` are the two best of its values; ``ratio`` is how many times further the second is.
    ``outside`` tells that the reference computes with none of them.
    """

    name: str
    value: str | None
    nearest: str
    runner_up: str
    ratio: float
    outside: bool
    why: str


class Decision(Struct, frozen=True):
    """What came out. ``ok`` if each is decided, ``contradicted`` if the reference is none of the candidates.

    ``candidates`` are sorted, the nearest first; ``floor`` is the NMSE that rounding alone makes; ``separation`` is how
    many times further the next value has to be; ``command`` is what to run with what was decided.
    """

    ok: bool
    contradicted: bool
    answers: tuple[Answer, ...]
    candidates: tuple[Candidate, ...]
    floor: float
    separation: float
    reference: str
    checkpoint: str
    arch: str
    inputs: str
    seed: int
    notes: tuple[str, ...]
    command: str

    @property
    def values(self) -> dict[str, str]:
        """The values that were decided."""
        return {answer.name: answer.value for answer in self.answers if answer.value is not None}

    @property
    def measured(self) -> str:
        """All answers on one line."""
        return ", ".join(
            f"{a.name} = {a.value}" if a.value is not None else f"{a.name} not decided" for a in self.answers
        )

    @property
    def limit(self) -> str:
        """What a value must do to be decided."""
        return f"fits, next {self.separation:g} x further"

    def rows(self, most: int | None = SHOWN) -> list[tuple[str, str, str]]:
        """Per candidate its values, its NMSE and what that is in units of the floor, or why it can't be."""
        shown = self.candidates[:most]
        rows = [(c.text, *((c.refused, "") if c.refused else (f"{c.nmse:.1e}", self._units(c)))) for c in shown]
        rest = len(self.candidates) - len(shown)
        return [*rows, *([(f"… and {rest} more (--json for all)", "", "")] if rest else [])]

    @property
    def reasons(self) -> tuple[str, ...]:
        """What was found of each, in sentences."""
        return tuple(answer.why for answer in self.answers)

    def _units(self, candidate: Candidate) -> str:
        return f"{candidate.nmse / self.floor:.2g} x rounding" if self.floor else ""


def decision_check(decision: Decision, wrong: Sequence[str] = (), layout: str = "") -> Check:
    """The decision as a check.

    It fails where the layout has other values (``layout`` names them, ``wrong`` says what to do), and where the
    reference is none of the candidates. Where these can't be told apart nothing is wrong, and nothing is proven.
    """
    from .report import Check

    ok = False if wrong or decision.contradicted else True if decision.ok else None
    lines = [*wrong, *decision.reasons, *(_line(*row) for row in decision.rows())]
    figures = {f"NMSE of {c.text}": c.nmse for c in decision.candidates}
    measured = decision.measured + (f", but the layout has {layout}" if layout else "")
    return Check("decide", ok, measured, decision.limit, tuple(lines), figures)


def _line(values: str, measured: str, units: str) -> str:
    return f"{values}: NMSE {measured} = {units}" if units else ": ".join(part for part in (values, measured) if part)

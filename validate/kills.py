"""What became of the mutations: records, and the tables that are made of them."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import asdict

from ..mappings.jsonable import to_json

HEADERS = ("mistake", "what is wrong", "killed by", "NMSE", "x reference's")
CONTROL_HEADERS = ("harmless change", "what it is", "verdict", "NMSE", "x reference's")


class MutationRow(Struct, frozen=True):
    """One mistake. ``killed_by`` names the checks that failed (``load`` where vLLM refused the layout), ``skipped``
    says why it could not be tried; ``nmse`` and ``ratio`` are prefill's. ``module`` and ``cause`` are what a
    localisation should name, ``located`` what it named (module in vLLM, what governs it), if it was asked."""

    name: str
    description: str
    module: str
    cause: str
    killed_by: tuple[str, ...] = ()
    nmse: float | None = None
    ratio: float | None = None
    seconds: float = 0.0
    skipped: str = ""
    located: tuple[str, str] | None = None

    @property
    def counted(self) -> tuple[str, ...]:
        """The checks that count: `layout` holds the files against what the mapping makes, and the mapping may be
        what is wrong."""
        return tuple(check for check in self.killed_by if check != "layout")

    @property
    def survived(self) -> bool:
        """Whether it was tried and nothing that counts noticed it."""
        return not self.skipped and not self.counted


class ControlRow(Struct, frozen=True):
    """One harmless change. ``alarms`` names the checks that failed and should not have."""

    name: str
    description: str
    alarms: tuple[str, ...] = ()
    nmse: float | None = None
    ratio: float | None = None
    skipped: str = ""


class MutationTable(Struct, frozen=True):
    """All mutations of one layout, and the controls."""

    layout: str
    target: str
    reference: str
    seed: int
    rows: tuple[MutationRow, ...]
    controls: tuple[ControlRow, ...]
    seconds: float

    @property
    def tried(self) -> tuple[MutationRow, ...]:
        """The mutations that this layout can have."""
        return tuple(row for row in self.rows if not row.skipped)

    @property
    def survivors(self) -> tuple[str, ...]:
        """Mistakes that went unnoticed."""
        return tuple(row.name for row in self.rows if row.survived)

    @property
    def false_alarms(self) -> tuple[str, ...]:
        """Harmless changes that were taken for mistakes."""
        return tuple(row.name for row in self.controls if row.alarms)

    @property
    def kill_rate(self) -> float:
        """The share of tried mistakes that were noticed; 0 if none was tried, since that proves nothing."""
        return 1 - len(self.survivors) / len(self.tried) if self.tried else 0.0

    @property
    def ok(self) -> bool:
        """Every mistake noticed, at least one tried, and no false alarm."""
        return bool(self.tried) and not self.survivors and not self.false_alarms

    @property
    def verdict(self) -> str:
        """One sentence."""
        killed = f"{len(self.tried) - len(self.survivors)} of {len(self.tried)} mistakes killed"
        tried = [row for row in self.controls if not row.skipped]
        alarms = f"{len(self.false_alarms)} of {len(tried)} harmless changes alarmed"
        names = [*self.survivors, *self.false_alarms]
        return f"{killed}, {alarms}" + (f": {', '.join(names)}" if names else "")

    def to_json(self) -> str:
        """The whole table as one JSON document."""
        told = {name: getattr(self, name) for name in ("kill_rate", "survivors", "false_alarms", "ok", "verdict")}
        return to_json({**asdict(self), **told})


def kill_rows(table: MutationTable) -> list[tuple[str, ...]]:
    """Cells under HEADERS: what was tried."""
    return [
        (row.name, row.description, ", ".join(row.killed_by) if not row.survived else _survivor(row), *_figures(row))
        for row in table.tried
    ]


def skipped_rows(table: MutationTable) -> list[tuple[str, str, str]]:
    """Name, description and reason of the mistakes and harmless changes that could not be tried."""
    return [(row.name, row.description, row.skipped) for row in (*table.rows, *table.controls) if row.skipped]


def control_rows(table: MutationTable) -> list[tuple[str, ...]]:
    """Cells under CONTROL_HEADERS."""
    return [
        (row.name, row.description, f"ALARM: {', '.join(row.alarms)}" if row.alarms else "quiet", *_figures(row))
        for row in table.controls
        if not row.skipped
    ]


def _survivor(row: MutationRow) -> str:
    seen = f" (seen by {', '.join(row.killed_by)} alone)" if row.killed_by else ""
    return f"SURVIVED{seen}"


def _figures(row: MutationRow | ControlRow) -> tuple[str, str]:
    nmse = "" if row.nmse is None else f"{row.nmse:.1e}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2g}"
    return nmse, ratio

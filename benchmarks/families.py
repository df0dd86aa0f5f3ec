"""Every family in every form it comes in: converted, verified under vLLM, brought back; prints the table.

    python benchmarks/families.py                       all families, and four of them in every container; half an hour
    python benchmarks/families.py --write               and puts it into docs/families.md
    python benchmarks/families.py --only litgpt --containers Lightning safetensors
    python benchmarks/families.py --json kept.json      keeps every row; called again, only runs what is not in there

A row is one checkpoint in one container. NMSE is the squared error of vLLM's float32 logits over the squared signal,
against the reference in float64; × is that error over the reference's own in float32. The reference of each family was
itself held to the code that is named. Exits with 1 if any check of any row fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pages import put_tables

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
sys.path.insert(0, str(PAGE.parents[1]))

from mdl.convert.prepare import prepare  # noqa: E402  (the tests are found beside mdl's own folder)
from mdl.convert.run import convert  # noqa: E402
from mdl.errors import MdlError  # noqa: E402
from mdl.validate.client import Engine  # noqa: E402
from mdl.validate.report import Report  # noqa: E402
from mdl.validate.verify import verify  # noqa: E402
from tests.cases import CASES, WRITTEN, comes_back, placed  # noqa: E402
from tests.containers import CONTAINERS  # noqa: E402

EVERYWHERE = (
    "nanogpt, biases, tied",
    "llama2c, grouped, tied",
    "litgpt, llama",
    "mingpt, new",
    "huggingface, LlamaForCausalLM",
)
"""The cases that go through every container: settings in the file, in a file beside it, and nowhere."""
CHECKS = ("layout", "coverage", "prefill", "decode", "generate", "dtype")
BEGIN = "<!-- families -->\n"


@dataclass(frozen=True)
class Row:
    """What became of one checkpoint in one container. ``checks`` maps a check's name to whether it passed; None: not
    made."""

    case: str
    family: str
    title: str
    container: str
    held: str
    target: str = ""
    checks: dict[str, bool | None] | None = None
    prefill: float = 0.0
    decode: float = 0.0
    ratio: float = 0.0
    back: str = ""
    failed: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing failed, the round trip included."""
        return bool(self.back) and not self.failed and all(value is not False for value in (self.checks or {}).values())


def wanted(only: Sequence[str], containers: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of case and container."""
    for name, case in CASES.items():
        if not only or case.family in only or name in only:
            yield name, WRITTEN
            if containers or name in EVERYWHERE:
                yield from ((name, container) for container in containers or CONTAINERS)


def run(case_name: str, container: str, folder: Path, engine: Engine) -> Row:
    """One row. A refusal is a row that failed, not the end."""
    case = CASES[case_name]
    blank: dict[str, Any] = {"case": case_name, "family": case.family, "title": case.title, "container": container}
    blank["held"] = case.held
    try:
        path, options = placed(case, container, folder)
        prepared = prepare(path, options)
        convert(prepared, folder / "out", tokenizer="none")
        report = verify(folder / "out", engine=engine)
        return Row(**blank, target=report.target, **figures(report), back=comes_back(path, folder / "out"))
    except MdlError as error:
        return Row(**blank, failed="; ".join(problem.what for problem in error.problems))


def figures(report: Report) -> dict[str, Any]:
    """What a row says of a report."""
    found = {check.name: check for check in report.checks}
    nmse = {name: found[name].figures.get("nmse", float("nan")) for name in ("prefill", "decode") if name in found}
    ratio = found["prefill"].figures.get("ratio", float("nan")) if "prefill" in found else float("nan")
    failed = "; ".join(f"{c.name}: {c.measured}" for c in report.checks if c.ok is False)
    return {"checks": {name: check.ok for name, check in found.items()}, **nmse, "ratio": ratio, "failed": failed}


def sign(row: Row, check: str) -> str:
    """Passed, failed or not made."""
    return {True: "✓", False: "**✗**", None: "–"}[(row.checks or {}).get(check)]


def table(rows: Sequence[Row]) -> str:
    """Markdown, and what failed below it."""
    head = ["family", "checkpoint", "container", *CHECKS, "prefill", "decode", "×", "back", "reference held to"]
    lines = ["| " + " | ".join(head) + " |", "|---" * 3 + "|:-:" * len(CHECKS) + "|--:" * 3 + "|:-:|---|"]
    for row in rows:
        numbers = [f"{row.prefill:.1e}", f"{row.decode:.1e}", f"{row.ratio:.1f}"] if row.checks else ["", "", ""]
        signs = [sign(row, check) for check in CHECKS]
        cells = [row.family, row.title, row.container, *signs, *numbers, row.back or "**✗**", row.held]
        lines.append("| " + " | ".join(cells) + " |")
    bad = [
        f"- {row.case}, {row.container}: {row.failed or 'the round trip lost something'}" for row in rows if not row.ok
    ]
    count = f"{len(rows)} rows of {len({row.family for row in rows})} families, {len(rows) - len(bad)} without a fault."
    return "\n".join([*lines, "", count, *([""] if bad else []), *bad]) + "\n"


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--only", nargs="+", default=[], metavar="FAMILY", help="these families or cases only")
    cli.add_argument("--containers", nargs="+", default=[], choices=list(CONTAINERS), help="these, for every case")
    cli.add_argument("--write", action="store_true", help=f"put the table into docs/{PAGE.name}")
    cli.add_argument("--json", type=Path, help="keep the rows in this file, and those that are in there")
    args = cli.parse_args()
    torch.set_num_threads(1)
    kept = [Row(**row) for row in json.loads(args.json.read_text("utf-8"))] if args.json and args.json.exists() else []
    known = {(row.case, row.container): row for row in kept if row.ok}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch, Engine() as engine:
        for number, (case, container) in enumerate(wanted(args.only, args.containers)):
            rows.append(known.get((case, container)) or run(case, container, Path(scratch) / str(number), engine))
            print(f"{case}, {container}: {'ok' if rows[-1].ok else rows[-1].failed or 'lost'}", file=sys.stderr)
            if args.json:
                args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    print(table(rows))
    if args.write:
        put_tables(PAGE, {BEGIN: table(rows)})
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

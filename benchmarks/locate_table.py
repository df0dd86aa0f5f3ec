"""Run every mutation of tests/test_locate.py through vLLM and write what was located into docs/locate.md.

    python benchmarks/locate_table.py [--check]

Exits with 1 if a report names another module or another cause. ``--check`` leaves the document alone. About five
seconds for each mutation.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "locate.md"
BEGIN, END = "<!-- table: python benchmarks/locate_table.py -->", "<!-- end of table -->"


def cell(text: str, limit: int = 150) -> str:
    text = text.replace("|", "\\|").removeprefix("mapping: ").removeprefix("the layout is not what the plan makes; ")
    return text if len(text) <= limit else text[: limit - 2] + " …"


def rows(scratch: Path) -> tuple[list[str], list[str]]:
    """The table's lines, and what is wrong with them."""
    from mdl.validate.client import Engine

    sys.path.insert(0, str(ROOT))
    suite = importlib.import_module("tests.test_locate")
    lines = ["| mutation | module named | signature | cause given |", "|---|---|---|---|"]
    wrong: list[str] = []
    good = {}
    with Engine(timeout=300) as engine:
        for k, mutation in enumerate(suite.TABLE):
            if mutation.family not in good:
                folder = scratch / mutation.family
                folder.mkdir()
                source = suite.checkpoint(mutation.family, folder)
                good[mutation.family] = source, suite.make.layout(source, folder / "out")
            source, layout = good[mutation.family]
            begin = time.perf_counter()
            broken = suite.mutated(layout, scratch / f"mutated-{k}", mutation.change)
            found = suite.find(source, broken, engine, scratch / f"scratch-{k}")
            missed = suite.misses(mutation, found)
            wrong += [f"{mutation.name}: {line}" for line in missed]
            seconds = time.perf_counter() - begin
            print(f"{'wrong' if missed else 'right'}  {seconds:5.1f} s  {mutation.name}", *missed, sep="\n    ")
            if found is not None:
                cells = (f"{mutation.family}: {mutation.name}", f"`{found.module}`", found.signature, found.hypothesis)
                lines.append(f"| {' | '.join(cell(text) for text in cells)} |")
    return lines, wrong


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--check", action="store_true", help="run, compare, write nothing")
    args = cli.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        lines, wrong = rows(Path(scratch))
    print(f"{len(lines) - 2 - len({line.partition(':')[0] for line in wrong})} of {len(lines) - 2} right")
    if not args.check:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        table = "\n".join(lines)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

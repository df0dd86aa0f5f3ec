"""Composable decoders drawn at random: each converted, and verified under vLLM against its twin in plain PyTorch.

    python benchmarks/decoders.py                       204 configs; ten minutes
    python benchmarks/decoders.py --write               and puts the table into docs/decoder.md
    python benchmarks/decoders.py --seeds 0 20          the first twenty
    python benchmarks/decoders.py --json kept.json      keeps every row; called again, only runs what is not in there

NMSE is the squared error of vLLM's float32 logits over the squared signal, against the twin in float64, over all
positions. Exits with 1 if any check of any config fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pages import put_tables

sys.path.insert(0, str(Path(__file__).parents[1]))

from mdl.convert.prepare import prepare
from mdl.convert.run import convert
from mdl.errors import MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import Settings, verify
from tests.decoders import drawn, saved

PAGE = Path(__file__).parents[1] / "docs" / "decoder.md"
BEGIN = "<!-- decoders -->\n"


@dataclass(frozen=True)
class Row:
    """What became of one drawn config."""

    seed: int
    choices: list[str]
    prefill: float = 0.0
    decode: float = 0.0
    ratio: float = 0.0
    failed: str = ""


def choices(config: dict[str, Any]) -> Iterator[str]:
    """What a config asks for, in words: the keys and words of its tables that are not the plain ones."""
    for name, value in sorted(config.items()):
        if isinstance(value, dict):
            yield from (f"{name}.{word}" for word in choices(value))
        elif isinstance(value, str):
            yield f"{name}: {value}"
        elif value is True or (isinstance(value, (float, list)) and name != "eps"):
            yield name
    if "num_key_value_heads" in config:
        same, one = config["num_key_value_heads"] == config["num_attention_heads"], config["num_key_value_heads"] == 1
        yield "heads: all have keys" if same else "heads: one key head" if one else "heads: keys in groups"


def run(seed: int, folder: Path, engine: Engine) -> Row:
    """Convert and verify one."""
    blank: dict[str, Any] = {
        "seed": seed,
        "choices": [c for c in choices(drawn(seed)) if not c.startswith(("arch", "model_type"))],
    }
    try:
        source, layout = saved(folder / "source", seed), folder / "layout"
        convert(prepare(source), layout, tokenizer="none")
        report = verify(layout, Settings(locate=False), engine=engine)
    except MdlError as error:
        return Row(**blank, failed="; ".join(problem.what for problem in error.problems))
    found = {check.name: check.figures for check in report.checks}
    failed = "; ".join(", ".join([f"{c.name}: {c.measured}", *c.detail[:1]]) for c in report.checks if c.ok is False)
    if "decode" not in found:
        return Row(**blank, failed=failed or "not run")
    figures: dict[str, Any] = {name: found[name].get("nmse", float("nan")) for name in ("prefill", "decode")}
    return Row(**blank, **figures, ratio=found["prefill"].get("ratio", float("nan")), failed=failed)


def table(rows: Sequence[Row]) -> str:
    """Markdown: each choice, in how many configs it came up, and the worst that was measured there."""
    counted = Counter(choice for row in rows for choice in row.choices)
    lines = ["| choice | configs | worst prefill | worst decode |", "|---|--:|--:|--:|"]
    for choice in sorted(counted):
        those = [row for row in rows if choice in row.choices]
        worst = [max(getattr(row, name) for row in those) for name in ("prefill", "decode")]
        lines.append(f"| {choice} | {counted[choice]} | {worst[0]:.1e} | {worst[1]:.1e} |")
    good = [row for row in rows if not row.failed]
    middle = statistics.median(row.ratio for row in good) if good else float("nan")
    count = f"{len(rows)} configs, {len(good)} pass; the median error is {middle:.1f} x the twin's own in float32."
    return "\n".join([*lines, "", count, *(f"- seed {row.seed}: {row.failed}" for row in rows if row.failed)]) + "\n"


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--seeds", nargs=2, type=int, default=(0, 204), metavar=("FIRST", "END"))
    cli.add_argument("--json", type=Path, help="keep the rows in this file, and those that are in there")
    cli.add_argument("--write", action="store_true", help=f"put the table into docs/{PAGE.name}")
    args = cli.parse_args()
    torch.set_num_threads(1)
    kept = [Row(**row) for row in json.loads(args.json.read_text("utf-8"))] if args.json and args.json.exists() else []
    known = {row.seed: row for row in kept if not row.failed}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch, Engine() as engine:
        for seed in range(*args.seeds):
            rows.append(known.get(seed) or run(seed, Path(scratch) / str(seed), engine))
            row = rows[-1]
            said = row.failed or f"ok {row.prefill:.1e} {row.decode:.1e} {row.ratio:.1f}"
            print(f"seed {seed}: {said}", file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    print(table(rows))
    if args.write:
        put_tables(PAGE, {BEGIN: table(rows)})
    return 0 if not any(row.failed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

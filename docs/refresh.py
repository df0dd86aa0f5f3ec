"""Puts what the program really prints into README.md and docs/*.md.

    python docs/refresh.py            run every command again (minutes: some start vLLM)
    python docs/refresh.py PAGE.md    only those of the pages named, which must not need what another page makes
    python docs/refresh.py --check    only the quick ones, and fail if a page differs (tests call this)

Commands run one after another in a scratch folder that holds a copy of examples/. A block between
``<!-- run: COMMAND -->`` and ``<!-- end -->`` holds the command's output; ``run quick:`` marks those that need no vLLM.
``<!-- table: archs -->`` holds the table of architectures, ``<!-- file: PATH -->`` the text of a file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mdl.archs.registry import all_archs

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- (run quick|run|table|file): (.*?) -->\n(.*?)<!-- end -->", re.DOTALL)


def output_of(command: str, folder: Path) -> str:
    """The command's stdout and stderr as a terminal shows them, and its exit code if that is not 0."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "COLUMNS": "120"}
    done = subprocess.run(  # noqa: S602  (the commands are those in our own pages)
        command,
        shell=True,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())
    code = f"\n$ echo $?\n{done.returncode}" if done.returncode else ""
    return f"```console\n$ {command}\n{lines}{code}\n```\n"


def archs_table() -> str:
    """The families as a Markdown table."""
    rows = [f"| `{a.name}` | {a.title} | {a.source} | {a.target} |" for a in all_archs().values()]
    return "\n".join(["| name | checkpoints of | written by | served as |", "|---|---|---|---|", *rows]) + "\n"


def file_block(path: Path) -> str:
    """A file as it is."""
    return f"```{path.suffix.removeprefix('.').replace('py', 'python')}\n{path.read_text(encoding='utf-8')}```\n"


def refreshed(text: str, folder: Path, *, quick: bool) -> str:
    """The page with its blocks made anew."""

    def replace(match: re.Match[str]) -> str:
        kind, argument, _ = match.groups()
        if kind == "run" and quick:
            return match[0]
        made: dict[str, Callable[[], str]] = {"table": archs_table, "file": lambda: file_block(folder / argument)}
        return f"<!-- {kind}: {argument} -->\n{made.get(kind, lambda: output_of(argument, folder))()}<!-- end -->"

    return BLOCK.sub(replace, text)


def main() -> int:
    check = "--check" in sys.argv
    named = [one for one in sys.argv[1:] if one != "--check"]
    stale: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(ROOT / "examples", Path(scratch) / "examples")
        for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
            if named and page.name not in named:
                continue
            old = page.read_text(encoding="utf-8")
            new = refreshed(old, Path(scratch), quick=check)
            if new != old:
                stale.append(page.name)
                if not check:
                    page.write_text(new, encoding="utf-8")
    if check and stale:
        sys.stderr.write(f"out of date: {', '.join(stale)}; run `make docs`\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

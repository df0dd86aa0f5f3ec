"""Seconds from a command line to its answer, and to the first byte that `mdl convert` writes.

    python benchmarks/startup.py [--size-gb 6] [--rounds 5] [--write docs/speed.md]

Makes a sparse Meta-Llama checkpoint of the given size (nothing but holes is written), then runs each way once per round
and prints the median, least and most time on the clock.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from convert_measure import environment, machine
from metadata import TORCH, make_holes
from pages import head, put_tables, row, spread, versions

MARK = "<!-- speed: startup -->\n"
LAYERS = 32


def seconds(command: list[str]) -> float:
    """On the clock, from start to end of one process."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
    return time.perf_counter() - begin


def first_byte(command: list[str], out: Path) -> float:
    """Seconds on the clock until a conversion has written the first byte of a weight file; it is ended then."""
    begin = time.perf_counter()
    null = subprocess.DEVNULL
    child = subprocess.Popen(command, stdout=null, stderr=null, env=environment())
    work = out.with_name(out.name + ".mdl-partial")
    while not any(path.stat().st_size for path in work.glob(".model*")):
        if child.poll() is not None:
            raise RuntimeError("the conversion ended before it was seen to write")
        time.sleep(0.001)
    waited = time.perf_counter() - begin
    child.terminate()
    child.wait()
    return waited


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--size-gb", type=float, default=6)
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    args = cli.parse_args()
    mdl = str(Path(sys.executable).with_name("mdl"))
    with tempfile.TemporaryDirectory() as scratch:
        make_holes(Path(scratch) / "llama", args.size_gb * 1e9, LAYERS)
        path = str(Path(scratch) / "llama" / "consolidated.00.pth")
        out, untied = Path(scratch) / "out", ["--set", "tied=false"]
        ways = {
            "`mdl --help`": lambda: seconds([mdl, "--help"]),
            "`mdl inspect`": lambda: seconds([mdl, "inspect", path, *untied]),
            "`mdl plan`": lambda: seconds([mdl, "plan", path, *untied]),
            "`mdl convert`, to its first byte": lambda: first_byte([mdl, "convert", path, str(out), *untied], out),
            "`import torch`": lambda: seconds([sys.executable, "-c", "import torch"]),
            "`torch.load(mmap=True)`": lambda: seconds([sys.executable, "-c", TORCH, path]),
        }
        rounds = [{name: way() for name, way in ways.items()} for _ in range(args.rounds)]
        size, where = Path(path).stat().st_size / 1e9, machine(Path(scratch))
    lines = [f"Meta Llama, {size:.2f} GB; rounds: {args.rounds}. {where}; {versions()}.", ""]
    lines += head(("way", "s, median", "min", "max"))
    lines += [row(name, *spread([r[name] for r in rounds])) for name in ways]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        put_tables(args.write, {MARK: text})


if __name__ == "__main__":
    main()

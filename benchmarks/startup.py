"""CPU seconds from a bare command line to an answer, beside what reading the same metadata with torch costs.

    python benchmarks/startup.py [--size-gb 6] [--rounds 5]

Makes a sparse Meta-Llama checkpoint of the given size (nothing but holes is written), then runs each way in turn and
prints the median of user + system time of the whole process; then the time until `mdl convert` writes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TORCH = "import sys, torch; torch.load(sys.argv[1], mmap=True, weights_only=True, map_location='cpu')"


def make_checkpoint(folder: Path, gigabytes: float) -> Path:
    """consolidated.00.pth with params.json, bfloat16, 32 layers, about the given size."""
    import torch

    layers, hidden, vocab, ffn = 32, 2048, 32_000, 8192
    per_layer = 4 * hidden * hidden + 3 * hidden * ffn
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocab * hidden) / per_layer))
    empty = {"dtype": torch.bfloat16, "device": "cpu"}
    state = {"tok_embeddings.weight": torch.empty(vocab, hidden, **empty), "norm.weight": torch.empty(hidden, **empty)}
    state["output.weight"] = torch.empty(vocab, hidden, **empty)
    for i in range(layers):
        for name in ("wq", "wk", "wv", "wo"):
            state[f"layers.{i}.attention.{name}.weight"] = torch.empty(hidden, hidden, **empty)
        for name, shape in (("w1", (ffn, hidden)), ("w2", (hidden, ffn)), ("w3", (ffn, hidden))):
            state[f"layers.{i}.feed_forward.{name}.weight"] = torch.empty(shape, **empty)
        for name in ("attention_norm", "ffn_norm"):
            state[f"layers.{i}.{name}.weight"] = torch.empty(hidden, **empty)
    path = folder / "consolidated.00.pth"
    with torch.serialization.skip_data():
        torch.save(state, path)
    params = {"dim": hidden, "n_layers": layers, "n_heads": 16, "vocab_size": vocab, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps(params))
    return path


def cpu_seconds(command: list[str]) -> float:
    """User + system time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_byte(command: list[str], out: Path) -> float:
    """Seconds on the clock until a conversion has written the first byte of a weight file; it is ended then."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = out.with_name(out.name + ".mdl-partial")
    while not any(path.stat().st_size for path in work.glob(".model*")):
        if child.poll() is not None:
            raise RuntimeError("the conversion ended before it was seen to write")
        time.sleep(0.001)
    seconds = time.perf_counter() - begin
    child.terminate()
    child.wait()
    return seconds


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--size-gb", type=float, default=6)
    cli.add_argument("--rounds", type=int, default=5)
    args = cli.parse_args()
    mdl = str(Path(sys.executable).with_name("mdl"))
    with tempfile.TemporaryDirectory() as scratch:
        path = str(make_checkpoint(Path(scratch), args.size_gb))
        size = Path(path).stat().st_size / 1e9
        ways = {
            "mdl --help": [mdl, "--help"],
            f"mdl inspect, {size:.1f} GB": [mdl, "inspect", path, "--set", "tied=false"],
            f"mdl plan, {size:.1f} GB": [mdl, "plan", path, "--set", "tied=false"],
            f"torch.load(mmap=True), {size:.1f} GB": [sys.executable, "-c", TORCH, path],
        }
        rounds = [{name: cpu_seconds(command) for name, command in ways.items()} for _ in range(args.rounds)]
        out = Path(scratch) / "out"
        convert = [mdl, "convert", path, str(out), "--set", "tied=false"]
        waits = [first_byte(convert, out) for _ in range(args.rounds)]
    print(f"{'way':36}{'CPU s, median':>16}{'min':>8}{'max':>8}")
    for name in ways:
        times = [r[name] for r in rounds]
        print(f"{name:36}{statistics.median(times):16.2f}{min(times):8.2f}{max(times):8.2f}")
    print(f"\n{'':36}{'s, median':>16}{'min':>8}{'max':>8}")
    print(f"{'mdl convert, to its first byte':36}{statistics.median(waits):16.2f}{min(waits):8.2f}{max(waits):8.2f}")


if __name__ == "__main__":
    main()

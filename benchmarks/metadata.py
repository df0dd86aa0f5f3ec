"""CPU seconds and memory of reading and planning, over the number of tensors and over the size of the file.

    python benchmarks/metadata.py [--rounds 5] [--folder FOLDER] [--write docs/speed.md]
    python benchmarks/metadata.py --only 50,000 --label server --write docs/speed.md    of another machine

Makes Meta-Llama files and Hugging Face folders of 200 to 50,000 small tensors, and sparse Meta-Llama files of
13 GB to 1.3 TB (their tensors are holes: a few MB are written). Then runs each way in turn, once per round, and prints
the median, least and most user + system time of the whole process and the most memory that it held.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert_measure import environment, machine
from pages import head, put_tables, row, spread, versions

MARK = "<!-- speed: {} -->\n"
COUNTS = (200, 2_000, 10_000, 50_000)
SIZES = {"13 GB": (13e9, 32), "130 GB": (130e9, 80), "1.3 TB": (1.3e12, 126)}
"""Bytes and layers."""
TORCH = "import sys, torch; torch.load(sys.argv[1], mmap=True, weights_only=True, map_location='cpu')"
COLUMNS = ("CPU s, median", "min", "max", "peak MB")
PARTS = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
"""Meta's names of a layer's tensors and Hugging Face's."""


def state(layers: int, hidden: int, ffn: int, vocab: int, *, meta: bool) -> dict[str, Any]:
    """Tensors of bfloat16 under Meta's names or Hugging Face's; their values are whatever the memory holds."""
    import torch

    ends = ("tok_embeddings", "norm", "output") if meta else ("model.embed_tokens", "model.norm", "lm_head")
    shapes = dict(zip(ends, ((vocab, hidden), (hidden,), (vocab, hidden)), strict=True))
    for i in range(layers):
        for ours, theirs in PARTS.items():
            shape = (hidden,) if "norm" in ours else (hidden, hidden)
            if "feed_forward" in ours:
                shape = (hidden, ffn) if ours.endswith("w2") else (ffn, hidden)
            shapes[f"layers.{i}.{ours}" if meta else f"model.layers.{i}.{theirs}"] = shape
    return {f"{name}.weight": torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def make_meta(folder: Path, layers: int, hidden: int = 8, ffn: int = 8, vocab: int = 16, *, sparse: bool) -> None:
    """consolidated.00.pth with params.json; with holes for tensors if ``sparse``."""
    import contextlib

    import torch

    folder.mkdir()
    made = state(layers, hidden, ffn, vocab, meta=True)
    with torch.serialization.skip_data() if sparse else contextlib.nullcontext():
        torch.save(made, folder / "consolidated.00.pth")
    params = {"dim": hidden, "n_layers": layers, "n_heads": 2, "vocab_size": vocab, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps(params))


def make_holes(folder: Path, nbytes: float, layers: int) -> None:
    """The same of about this size, of holes."""
    hidden = round(math.sqrt(nbytes / 2 / layers / 14.5) / 128) * 128
    make_meta(folder, layers, hidden, hidden * 7 // 2, 32_000, sparse=True)


def make_hugging_face(folder: Path, layers: int) -> None:
    """model.safetensors with config.json."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(state(layers, 8, 8, 16, meta=False), folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16, "hidden_size": 8,
              "intermediate_size": 8, "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2,
              "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def make(folder: Path) -> None:
    """All checkpoints, each in a folder of its own."""
    for count in COUNTS:
        layers = (count - 3) // len(PARTS)
        make_meta(folder / f"zip, {count:,} tensors", layers, sparse=False)
        make_hugging_face(folder / f"safetensors, {count:,} tensors", layers)
    for name, (nbytes, layers) in SIZES.items():
        make_holes(folder / f"zip, {name}", nbytes, layers)


def measured(command: list[str]) -> tuple[float, float] | None:
    """User + system seconds of one process, and the MB that it held at its peak; None if it fails."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return None
    return used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def ways(checkpoint: Path) -> dict[str, list[str]]:
    """The command lines for one checkpoint."""
    mdl = [sys.executable, "-c", "from mdl.cli import script; script()"]
    found = {
        f"`mdl {command}{' --json' * as_json}`": [*mdl, command, str(checkpoint), *["--json"] * as_json]
        for command in ("plan", "inspect")
        for as_json in (False, True)
    }
    file = checkpoint / "consolidated.00.pth"
    if file.exists():
        found["`torch.load(mmap=True)`"] = [sys.executable, "-c", TORCH, str(file)]
    return found


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--folder", type=Path, help="where the checkpoints are made (a file system that knows holes)")
    cli.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    cli.add_argument("--only", default="", metavar="TEXT", help="checkpoints with this in their names")
    cli.add_argument("--label", default="", help="of another machine: its table goes behind a marker that begins so")
    cli.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.make:
        make(args.make)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        # A child's peak begins with its parent's memory, so the parent must stay small: torch works elsewhere.
        subprocess.run([sys.executable, __file__, "--make", scratch], check=True)
        made = (path for path in Path(scratch).iterdir() if args.only in path.name)
        checkpoints = sorted(made, key=lambda path: path.stat().st_mtime_ns)
        commands = {(path.name, way): command for path in checkpoints for way, command in ways(path).items()}
        rounds = [{key: measured(command) for key, command in commands.items()} for _ in range(args.rounds)]
        where = machine(Path(scratch))
    lines = [f"Rounds: {args.rounds}. {where}; {versions()}.", "", *head(("checkpoint", "way", *COLUMNS))]
    lines += [row(name, way, *figures([r[name, way] for r in rounds])) for name, way in commands]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        put_tables(args.write, {MARK.format(f"{args.label} metadata".strip()): text})


def figures(found: Sequence[tuple[float, float] | None]) -> list[str]:
    """Of all rounds; torch maps a file privately, which a machine of less memory than the file may refuse."""
    told = [one for one in found if one]
    if not told:
        return ["fails", "–", "–", "–"]
    times, peaks = zip(*told, strict=True)
    return [*spread(times), f"{max(peaks):.0f}"]


if __name__ == "__main__":
    main()

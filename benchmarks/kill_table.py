"""Runs every known mistake and every harmless change on seven small models, and prints the tables.

    python benchmarks/kill_table.py                     about twenty minutes on two cores
    python benchmarks/kill_table.py --write             and puts them into docs/kill-table.md
    python benchmarks/kill_table.py --only gpt2 --names activation position-shift

The models: a Meta Llama with grouped heads, scaled rotary positions and a head of its own; a nanoGPT with biases and a
tied head; and, for what neither can have, a llama2.c model of eleven layers with a tied head and plain rotary
positions, and Hugging Face's Mistral (a window), Qwen 3 (norms of q and k), Gemma 2 (caps) and Mixtral (experts).
Matrices have unit gain, norms and biases are far from where training starts: small weights hide mistakes.
Exits with 1 if a mistake survives or a harmless change alarms.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from pages import put_tables

from mdl.convert.prepare import prepare
from mdl.convert.run import convert
from mdl.validate.client import Engine
from mdl.validate.kills import CONTROL_HEADERS, MutationRow, MutationTable, control_rows
from mdl.validate.mutate import run_mutations

PAGE = Path(__file__).parent.parent / "docs" / "kill-table.md"
BLOCK = "<!-- kill-table: {} -->\n"
State = dict[str, torch.Tensor]


def matrix(rng: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=rng) / columns**0.5


def norm(rng: torch.Generator, size: int) -> torch.Tensor:
    return 1 + 0.3 * torch.randn(size, generator=rng)


def llama_state(layers: int, *, tied: bool, hidden: int = 128, ffn: int = 160, vocab: int = 300) -> State:
    """Four heads of 32, two key heads, under the names of Meta's checkpoints."""
    rng = torch.Generator().manual_seed(1)
    state = {"tok_embeddings.weight": matrix(rng, vocab, hidden), "norm.weight": norm(rng, hidden)}
    for i in range(layers):
        for name, rows, columns in (
            ("attention.wq", hidden, hidden),
            ("attention.wk", hidden // 2, hidden),
            ("attention.wv", hidden // 2, hidden),
            ("attention.wo", hidden, hidden),
            ("feed_forward.w1", ffn, hidden),
            ("feed_forward.w2", hidden, ffn),
            ("feed_forward.w3", ffn, hidden),
        ):
            state[f"layers.{i}.{name}.weight"] = matrix(rng, rows, columns)
        for name in ("attention_norm", "ffn_norm"):
            state[f"layers.{i}.{name}.weight"] = norm(rng, hidden)
    state["output.weight"] = state["tok_embeddings.weight"] if tied else matrix(rng, vocab, hidden)
    return state


def meta(folder: Path) -> Path:
    """Llama 3.1 in small: 3 layers, scaled rotary positions, an output head of its own."""
    torch.save(llama_state(3, tied=False), folder / "consolidated.00.pth")
    params = {"dim": 128, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": 300}
    rotary = {"rope_theta": 500000.0, "use_scaled_rope": True, "max_seq_len": 256}
    (folder / "params.json").write_text(json.dumps(params | rotary))
    return folder


def llama2c(folder: Path) -> Path:
    """llama2.c: 11 layers, a tied head, plain rotary positions."""
    args = {"dim": 128, "n_layers": 11, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300, "max_seq_len": 256}
    torch.save({"model": llama_state(11, tied=True), "model_args": args}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def nanogpt(folder: Path) -> Path:
    """nanoGPT: 3 layers, 4 heads of 32, biases, a tied head."""
    rng, hidden, vocab = torch.Generator().manual_seed(2), 128, 300
    state = {"transformer.wte.weight": matrix(rng, vocab, hidden), "transformer.wpe.weight": matrix(rng, 256, hidden)}
    for i in range(3):
        for name, rows, columns in (
            ("attn.c_attn", 3 * hidden, hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", 4 * hidden, hidden),
            ("mlp.c_proj", hidden, 4 * hidden),
        ):
            state[f"transformer.h.{i}.{name}.weight"] = matrix(rng, rows, columns)
            state[f"transformer.h.{i}.{name}.bias"] = norm(rng, rows) - 1
    for place in (*(f"h.{i}.ln_{k}" for i in range(3) for k in (1, 2)), "ln_f"):
        state[f"transformer.{place}.weight"] = norm(rng, hidden)
        state[f"transformer.{place}.bias"] = norm(rng, hidden) - 1
    state["lm_head.weight"] = state["transformer.wte.weight"]
    args = {"n_layer": 3, "n_head": 4, "n_embd": hidden, "block_size": 256, "bias": True, "vocab_size": vocab}
    torch.save({"model": state, "model_args": args}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def huggingface(name: str) -> Callable[[Path], Path]:
    """The model that the tests have transformers write."""

    def make(folder: Path) -> Path:
        sys.path.insert(0, str(PAGE.parents[1]))
        return importlib.import_module("tests.hf").checkpoint(folder / "release", name)

    return make


MODELS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "llama": ("Llama", meta),
    "gpt2": ("GPT-2", nanogpt),
    "llama2c": ("Llama, 11 layers", llama2c),
    "mistral": ("Mistral", huggingface("MistralForCausalLM")),
    "qwen3": ("Qwen 3", huggingface("Qwen3ForCausalLM")),
    "gemma2": ("Gemma 2", huggingface("Gemma2ForCausalLM")),
    "mixtral": ("Mixtral", huggingface("MixtralForCausalLM")),
}
WHOLE = ("llama", "gpt2")
"""The models that get every mistake; the others get those that no model before them could have."""


def layout(folder: Path, make: Callable[[Path], Path]) -> Path:
    folder.mkdir()
    convert(prepare(make(folder)), folder / "out", tokenizer="none")
    return folder / "out"


def run_all(only: Sequence[str], names: Sequence[str] | None, locate: bool) -> dict[str, MutationTable]:
    """A table for each model, under its title."""
    tables: dict[str, MutationTable] = {}
    with tempfile.TemporaryDirectory() as scratch, Engine() as engine:
        for key in only:
            title, make = MODELS[key]
            left = names
            if key not in WHOLE and tables and names is None:
                left = [row.name for row in next(iter(tables.values())).rows if untried(row.name, tables.values())]
            tables[title] = run_mutations(
                layout(Path(scratch) / key, make),
                engine=engine,
                names=left,
                locate=locate,
                say=lambda line, title=title: print(f"{time.strftime('%X')} {title}: {line}", file=sys.stderr),
            )
    return tables


def untried(name: str, tables: Iterable[MutationTable]) -> bool:
    return all(row.skipped for table in tables for row in table.rows if row.name == name)


def kills_markdown(tables: dict[str, MutationTable]) -> str:
    """One row per mistake, one column per model; where no model can have it, the reason."""
    lines = [f"| mistake | what is wrong | {' | '.join(tables)} |", f"|---|---|{'---|' * len(tables)}"]
    rows: dict[str, dict[str, MutationRow]] = {}
    for title, table in tables.items():
        for row in table.rows:
            rows.setdefault(row.name, {})[title] = row
    for name, by_model in rows.items():
        description = next(iter(by_model.values())).description
        if all(row.skipped for row in by_model.values()):
            continue
        cells = [cell(by_model.get(title)) for title in tables]
        lines.append(f"| `{name}` | {description} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(row: MutationRow | None) -> str:
    if row is None or row.skipped:
        return "–"
    killers = f"**SURVIVED** {', '.join(row.killed_by)}" if row.survived else ", ".join(row.killed_by)
    return killers + (f"; NMSE {row.nmse:.1e}, {row.ratio:.2g} ×" if row.nmse is not None else "")


def summary_markdown(tables: dict[str, MutationTable]) -> str:
    lines = ["| model | class | mistakes tried | killed | harmless changes | alarmed |", "|---|---|---|---|---|---|"]
    for title, table in tables.items():
        tried = [row for row in table.controls if not row.skipped]
        killed = len(table.tried) - len(table.survivors)
        figures = (len(table.tried), killed, len(tried), len(table.false_alarms))
        lines.append("| " + " | ".join(str(x) for x in (title, f"`{table.target}`", *figures)) + " |")
    return "\n".join(lines) + "\n"


def controls_markdown(tables: dict[str, MutationTable]) -> str:
    lines = [f"| model | {' | '.join(CONTROL_HEADERS)} |", f"|---|{'---|' * len(CONTROL_HEADERS)}"]
    for title, table in tables.items():
        lines += [f"| {title} | {' | '.join(row)} |" for row in control_rows(table)]
    return "\n".join(lines) + "\n"


def skipped_markdown(tables: dict[str, MutationTable]) -> str:
    rows = {row.name: row for table in tables.values() for row in table.rows if untried(row.name, tables.values())}
    lines = ["| mistake | what is wrong | why it was not tried |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{r.name}` | {r.description} | {r.skipped} |" for r in rows.values())]) + "\n"


def main() -> int:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    cli.add_argument("--names", nargs="+", help="these mistakes only")
    cli.add_argument("--locate", action="store_true", help="have every caught mistake located, too")
    cli.add_argument("--write", action="store_true", help="put the tables into docs/kill-table.md")
    cli.add_argument("--json", type=Path, help="leave everything in this file")
    args = cli.parse_args()
    tables = run_all(args.only, args.names, args.locate)
    blocks = {
        "summary": summary_markdown(tables),
        "mistakes": kills_markdown(tables),
        "harmless": controls_markdown(tables),
        "skipped": skipped_markdown(tables),
    }
    print("\n".join(blocks.values()))
    if args.json:
        args.json.write_text(json.dumps({title: json.loads(table.to_json()) for title, table in tables.items()}))
    if args.write:
        put_tables(PAGE, {BLOCK.format(name): made for name, made in blocks.items()})
    for title, table in tables.items():
        print(f"{title}: {table.verdict}", file=sys.stderr)
    return 0 if all(table.ok for table in tables.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Verifies five models on a GPU, once per way of running vLLM, and prints the figures as a Markdown table.

    python benchmarks/gpu_verify.py --work /tmp/models                      everything that this machine can run
    python benchmarks/gpu_verify.py --work /tmp/models --models llama --runs runner-1 runner-2
    python benchmarks/gpu_verify.py --work /tmp/models --small --runs plain     on a CPU, to try the script

The models: a tiny Meta Llama, a tiny nanoGPT (GPT-2), tiny Mambas of both kinds, and a Llama of 1.1 billion bfloat16
parameters in Meta's layout; random, with matrices of unit gain and norms far from one, since small weights hide
mistakes. Each is converted, and verified in float32 and in bfloat16. What the reference computes, it computes once per
model, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parent.parent))

from mdl.convert.manifest import read_manifest
from mdl.convert.prepare import prepare
from mdl.convert.run import convert
from mdl.errors import MdlError
from mdl.validate.client import Engine, EngineFailure, EngineResult
from mdl.validate.report import Report
from mdl.validate.verify import Settings, Side, judge_layout, reference_side, source_of
from tests import decoders, mambas, nanochats

State = dict[str, torch.Tensor]
HEAD = ("model", "run", "model runner", "attention", "CUDA graphs", "prefill", "decode", "generate")
HEAD += ("bfloat16", "coverage", "load s", "total s")


@dataclass(frozen=True)
class Way:
    """One way of running vLLM: environment variables and engine arguments on top of the verifier's own."""

    env: Mapping[str, str] = field(default_factory=dict[str, str])
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])


FIRST, SECOND = {"VLLM_USE_V2_MODEL_RUNNER": "0"}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}
GRAPHS = {"enforce_eager": False}
COMPILED = {"TORCHDYNAMO_DISABLE": "0"}  # the verifier switches the compiler off, and graphs alone need none of it
TWO = {"tensor_parallel_size": 2, "disable_custom_all_reduce": True}
STAGES = {"pipeline_parallel_size": 2}
WITHOUT_MULTICAST = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}

WAYS: dict[str, Way] = {
    "plain": Way(),
    "runner-2": Way(SECOND),
    "runner-1": Way(FIRST),
    "graphs-2": Way(SECOND | COMPILED, GRAPHS),
    "graphs-1": Way(FIRST | COMPILED, GRAPHS),
    "two-gpus-2": Way(SECOND | WITHOUT_MULTICAST, TWO),
    "two-gpus-1": Way(FIRST | WITHOUT_MULTICAST, TWO),
    "two-stages-2": Way(SECOND | WITHOUT_MULTICAST, STAGES),
    "two-stages-1": Way(FIRST | WITHOUT_MULTICAST, STAGES),
    "tf32": Way({"TRITON_F32_DEFAULT": "tf32"}),
}
"""The last one is how Triton's attention computes float32 unless told otherwise: it has to fail."""


class Tuned(Engine):
    """An engine that adds a way's arguments to every run, and keeps the answers."""

    def __init__(self, way: Way, timeout: float) -> None:
        super().__init__(timeout=timeout, env=way.env)
        self.way = way
        self.answers: list[EngineResult] = []

    def run(self, *args: Any, **overrides: Any) -> EngineResult | EngineFailure:
        answer = super().run(*args, **{**overrides, **self.way.arguments})
        if isinstance(answer, EngineResult):
            self.answers.append(answer)
        return answer


# --- checkpoints -------------------------------------------------------------------------------------------------


class Random:
    """Seeded weights: matrices of unit gain, norms about one, biases about zero."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._rng = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=self._rng) / columns**0.5).to(self._dtype)

    def vector(self, size: int, about: float) -> torch.Tensor:
        return (about + 0.3 * torch.randn(size, generator=self._rng)).to(self._dtype)


def meta(
    folder: Path, *, dtype: torch.dtype, width: int, ffn: int, layers: int, heads: int, kv: int, vocab: int
) -> Path:
    """A Llama as Meta saves them, with the rotary scaling of Llama 3.1."""
    rng, shared = Random(1, dtype), kv * (width // heads)
    state: State = {"tok_embeddings.weight": rng.matrix(vocab, width)}
    for i in range(layers):
        for name, rows, columns in (
            ("attention.wq", width, width),
            ("attention.wk", shared, width),
            ("attention.wv", shared, width),
            ("attention.wo", width, width),
            ("feed_forward.w1", ffn, width),
            ("feed_forward.w2", width, ffn),
            ("feed_forward.w3", ffn, width),
        ):
            state[f"layers.{i}.{name}.weight"] = rng.matrix(rows, columns)
        for name in ("attention_norm", "ffn_norm"):
            state[f"layers.{i}.{name}.weight"] = rng.vector(width, 1)
    state |= {"norm.weight": rng.vector(width, 1), "output.weight": rng.matrix(vocab, width)}
    torch.save(state, folder / "consolidated.00.pth")
    sizes = {"dim": width, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv, "vocab_size": vocab}
    more = {"norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True, "max_seq_len": 1024}
    (folder / "params.json").write_text(json.dumps(sizes | more))
    return folder


def tiny_llama(folder: Path) -> Path:
    return meta(folder, dtype=torch.float32, width=128, ffn=160, layers=3, heads=4, kv=2, vocab=512)


def large_llama(folder: Path) -> Path:
    sizes = {"width": 2048, "ffn": 5632, "layers": 22, "heads": 32, "kv": 4, "vocab": 32000}
    return meta(folder, dtype=torch.bfloat16, **sizes)


def small_llama(folder: Path) -> Path:
    """What stands for the large one where the script itself is tried."""
    return meta(folder, dtype=torch.bfloat16, width=256, ffn=352, layers=2, heads=4, kv=2, vocab=1000)


def tiny_gpt2(folder: Path) -> Path:
    """nanoGPT with biases and a tied head."""
    rng, width, vocab = Random(2, torch.float32), 128, 512
    state: State = {
        "transformer.wte.weight": rng.matrix(vocab, width),
        "transformer.wpe.weight": rng.matrix(512, width),
    }
    for i in range(3):
        for name, rows, columns in (
            ("attn.c_attn", 3 * width, width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            state[f"transformer.h.{i}.{name}.weight"] = rng.matrix(rows, columns)
            state[f"transformer.h.{i}.{name}.bias"] = rng.vector(rows, 0)
    for place in (*(f"h.{i}.ln_{k}" for i in range(3) for k in (1, 2)), "ln_f"):
        state |= {
            f"transformer.{place}.weight": rng.vector(width, 1),
            f"transformer.{place}.bias": rng.vector(width, 0),
        }
    state["lm_head.weight"] = state["transformer.wte.weight"]
    args = {"n_layer": 3, "n_head": 4, "n_embd": width, "block_size": 512, "bias": True, "vocab_size": vocab}
    torch.save({"model": state, "model_args": args}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def tiny_mamba(folder: Path) -> Path:
    """Mamba 1 as mamba_ssm saves it: the selective scan of vLLM's runs on GPUs only."""
    ssm = {"layer": "Mamba1", "dt_rank": mambas.RANK}
    return mambas.saved(folder / "release", mambas.state(1), ssm, tie_embeddings=True)


def tiny_mamba2(folder: Path) -> Path:
    """Mamba 2 with two groups of B and C."""
    ssm = {"layer": "Mamba2", "headdim": mambas.INNER // mambas.HEADS, "d_state": mambas.STATE, "ngroups": 2}
    return mambas.saved(folder / "release", mambas.state(2, groups=2), ssm, tie_embeddings=True)


DRAWN = (1, 6, 8, 10, 34, 35, 53)
"""Composable decoders that show most choices; see benchmarks/decoders.py for what each says."""


def drawn_decoder(seed: int) -> Callable[[Path], Path]:
    return lambda folder: decoders.saved(folder / "release", seed)


RECURRENCES = {"gated": "gated", "linear-attention": "linear_attention", "mamba2-mixer": "mamba2"}


def recurrent_decoder(kind: str) -> Callable[[Path], Path]:
    """A drawn decoder of which some layers have a recurrence in the place of attention."""
    return lambda folder: decoders.saved(folder / "release", 0, decoders.recurrent(9, kind, everywhere=False))


def tiny_nanochat(folder: Path) -> Path:
    """The newest nanochat: windows, value embeddings, smear, back-out, lambdas."""
    return nanochats.saved(folder / "d4", "smear and back-out")


MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "mamba": tiny_mamba,
    "mamba2": tiny_mamba2,
    "large": large_llama,
    "nanochat": tiny_nanochat,
    **{f"decoder-{seed}": drawn_decoder(seed) for seed in DRAWN},
    **{name: recurrent_decoder(kind) for name, kind in RECURRENCES.items()},
}


# --- one model, every way ----------------------------------------------------------------------------------------


def say(*words: object) -> None:
    print(time.strftime("%X"), *words, file=sys.stderr, flush=True)


def prepared_layout(folder: Path, name: str, make: Callable[[Path], Path]) -> Path:
    """The checkpoint and its layout, made anew unless an earlier call left them."""
    if (folder / name / "out").exists():
        return folder / name / "out"
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name / "raw").mkdir(parents=True)
    begin = time.perf_counter()
    raw = make(folder / name / "raw")
    made = time.perf_counter()
    convert(prepare(raw), folder / name / "out", tokenizer="none")
    say(f"{name}: made in {made - begin:.1f} s, converted in {time.perf_counter() - made:.1f} s")
    return folder / name / "out"


def remembering(side: Side) -> Side:
    """The reference asked for the same thing twice answers from memory."""
    held: dict[tuple[tuple[int, ...], str], torch.Tensor] = {}

    def logits(ids: list[int], dtype: str) -> torch.Tensor:
        key = (tuple(ids), dtype)
        if key not in held:
            held[key] = side.reference.logits(ids, dtype).clone()
        return held[key]

    return replace(side, reference=replace(side.reference, logits=logits))


def rows_of(name: str, layout: Path, ways: list[str], folder: Path, timeout: float) -> list[dict[str, Any]]:
    settings = Settings(locate=False, dtype="bfloat16")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        begin = time.perf_counter()
        side = remembering(reference_side(layout, source_of(read_manifest(layout), settings), settings, Path(scratch)))
        say(f"{name}: reference in float32 and float64: {time.perf_counter() - begin:.1f} s")
        for key in ways:
            begin = time.perf_counter()
            row: dict[str, Any] = {"model": name, "run": key}
            try:
                with Tuned(WAYS[key], timeout) as engine:
                    report = judge_layout(layout, side, settings, engine, Path(scratch), lambda _: None)
                    row |= figures(report, engine.answers)
            except MdlError as error:
                row["error"] = str(error)
            row["total s"] = round(time.perf_counter() - begin, 1)
            say(json.dumps(row))
            found.append(row)
    return found


def figures(report: Report, answers: list[EngineResult]) -> dict[str, Any]:
    """What a row of the table shows, and in ``failed`` the words of checks that did not pass."""
    row: dict[str, Any] = {"ok": report.ok, "versions": dict(report.versions), "seconds": dict(report.seconds)}
    for check in report.checks:
        row[check.name.removeprefix("dtype ")] = text_of(check.name, check.ok, check.measured, check.figures)
        if not check.ok:
            row.setdefault("failed", {})[check.name] = [check.measured, *check.detail]
        elif check.name == "decode":
            row["decoded"] = check.detail[-1]
    if answers:
        row["model runner"] = "2" if ".gpu.model_runner" in answers[0].runner else "1"
        row["attention"] = " / ".join(", ".join(a.attention) for a in answers)
        row["CUDA graphs"] = answers[0].graphs
        row["load s"] = " / ".join(f"{a.seconds['load']:.1f}" for a in answers)
    return row


def text_of(name: str, ok: bool | None, measured: str, numbers: Mapping[str, float]) -> str:
    mark = "" if ok else "FAILED: " if ok is False else "not run: "
    if "ratio" not in numbers:
        return mark + measured
    return f"{mark}{numbers['nmse']:.1e} = {numbers['ratio']:.2f} x"


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(str(row.get(name, '')) for name in HEAD)} |")
        if "error" in row:
            lines.append(f"\n{row['model']} {row['run']}: {row['error']}\n")
    return "\n".join(lines) + "\n"


def default_ways() -> list[str]:
    """Every way that this machine can run."""
    if not torch.cuda.is_available():
        return ["plain"]
    return [key for key in WAYS if key != "plain" and (not key.startswith("two-") or torch.cuda.device_count() > 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints and layouts go, and stay")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runs", nargs="+", choices=WAYS, default=None)
    parser.add_argument("--small", action="store_true", help="a small model in the large one's place")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that vLLM may take for one type and way")
    parser.add_argument("--json", type=Path, help="write every row there, too")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in given.models:
        make = small_llama if given.small and name == "large" else MODELS[name]
        layout = prepared_layout(given.work, name, make)
        rows += rows_of(name, layout, given.runs or default_ways(), given.work, given.timeout)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1))
    if torch.cuda.is_available():
        print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()

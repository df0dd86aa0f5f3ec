"""Tokens per second of the composable decoder beside vLLM's own Llama, of the same shape.

    python benchmarks/decoder_speed.py                              a small Llama on this machine, twice ten rounds
    python benchmarks/decoder_speed.py --hidden 4096 --layers 16 --compiled    with torch.compile and CUDA graphs

Both classes get random weights (speed does not depend on them), an engine each in one process, and take turns; then
again in a second process that makes them in the other order. Prints the median of each, and the ratio of two turns that
follow each other: its median, and its range.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NATIVE, COMPOSED = "LlamaForCausalLM", "MdlDecoderForCausalLM"
PROMPT, ANSWER = 128, 64


def configs(hidden: int, layers: int, vocab: int) -> dict[str, dict[str, Any]]:
    """config.json of both classes: heads of 64 channels, a quarter as many key heads, SwiGLU."""
    heads = hidden // 64
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    native = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_parameters": rope}
    tables = {"norm": {"eps": 1e-5}, "positions": {"kind": "rope", "theta": 10000.0}}
    composed = {"model_type": "mdl_decoder", **tables, "mlp": {"gated": True, "activation": "silu"}}
    return {
        NATIVE: {"architectures": [NATIVE], **sizes, **native},
        COMPOSED: {"architectures": [COMPOSED], **sizes, **composed},
    }


def timed(llm: Any, prompts: list[Any], tokens: int) -> float:
    """Seconds in which ``llm`` answers every prompt with ``tokens`` tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - begin


def measure(folders: list[str], args: argparse.Namespace) -> list[dict[str, list[float]]]:
    """For each folder's model, tokens per second of prompts alone and of answers: ``args.rounds`` times, in turns."""
    from vllm import LLM

    engines = [
        LLM(folder, dtype=args.dtype, skip_tokenizer_init=True, enforce_eager=not args.compiled, load_format="dummy",
            max_model_len=PROMPT + ANSWER + 1, kv_cache_memory_bytes=1 << 30, enable_prefix_caching=False,
            gpu_memory_utilization=0.4)
        for folder in folders
    ]  # fmt: skip
    prompts: Any = [{"prompt_token_ids": [(7 * i + j) % 500 for j in range(PROMPT)]} for i in range(args.requests)]
    found: list[dict[str, list[float]]] = [{"prompt": [], "answer": []} for _ in folders]
    for turn in range(args.rounds + 2):
        for engine, rates in zip(engines, found, strict=True):
            first, whole = timed(engine, prompts, 1), timed(engine, prompts, ANSWER + 1)
            if turn > 1:  # the first ones warm up
                rates["prompt"].append(args.requests * PROMPT / first)
                rates["answer"].append(args.requests * ANSWER / (whole - first))
    return found


def process(folders: list[str], args: argparse.Namespace) -> list[dict[str, list[float]]]:
    """:func:`measure` in a process of its own, which has an engine for each of ``folders``."""
    call = [sys.executable, __file__, "--child", *folders, "--dtype", args.dtype]
    call += ["--requests", str(args.requests), "--rounds", str(args.rounds)]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    if args.compiled:
        call.append("--compiled")
    else:
        env["TORCHDYNAMO_DISABLE"] = "1"
    done = subprocess.run(call, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(rounds: dict[str, dict[str, list[float]]]) -> None:
    """Prints the table."""
    print("| tokens/s | " + " | ".join(rounds) + " | ratio | of each round |\n|---|--:|--:|--:|---|")
    for part in ("prompt", "answer"):
        theirs, ours = rounds[NATIVE][part], rounds[COMPOSED][part]
        each = [ours / theirs for theirs, ours in zip(theirs, ours, strict=True)]
        cells = [f"{statistics.median(values):,.0f}" for values in (theirs, ours)]
        print(f"| {part} | {' | '.join(cells)} | {statistics.median(each):.3f} | {min(each):.3f} to {max(each):.3f} |")


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"hidden": 512, "layers": 8, "vocab": 8192, "rounds": 10, "requests": 8}.items():
        cli.add_argument(f"--{name}", type=int, default=value)
    cli.add_argument("--dtype", default="float32")
    cli.add_argument("--compiled", action="store_true", help="torch.compile, and CUDA graphs where there are any")
    cli.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args)))
        return
    rounds: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "answer": []} for name in (NATIVE, COMPOSED)}
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in configs(args.hidden, args.layers, args.vocab).items():
            (Path(scratch) / name).mkdir()
            (Path(scratch) / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for order in ((NATIVE, COMPOSED), (COMPOSED, NATIVE)):
            for name, found in zip(order, process([str(Path(scratch) / name) for name in order], args), strict=True):
                for part, values in found.items():
                    rounds[name][part] += values
    show(rounds)


if __name__ == "__main__":
    main()

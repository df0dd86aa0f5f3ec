"""Tokens per second of the composable decoder beside vLLM's own Llama, of the same shape.

    python benchmarks/decoder_speed.py                              a small Llama on this machine, five rounds
    python benchmarks/decoder_speed.py --hidden 4096 --layers 16 --compiled    with torch.compile and CUDA graphs

Both classes get random weights (speed does not depend on them), in processes of their own that take turns. Prints the
median of each, and the ratio, with its range over the rounds.
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


def measure(folder: str, dtype: str, requests: int, times: int, compiled: bool) -> dict[str, list[float]]:
    """Tokens per second of prompts alone and of answers, ``times`` times, in this process."""
    from vllm import LLM, SamplingParams

    length = PROMPT + ANSWER + 1
    llm = LLM(folder, dtype=dtype, skip_tokenizer_init=True, enforce_eager=not compiled, load_format="dummy",
              max_model_len=length, kv_cache_memory_bytes=1 << 30, enable_prefix_caching=False)  # fmt: skip
    prompts: Any = [{"prompt_token_ids": [(7 * i + j) % 500 for j in range(PROMPT)]} for i in range(requests)]
    found: dict[str, list[float]] = {"prompt": [], "answer": []}
    for turn in range(times + 1):
        spent: dict[int, float] = {}
        for tokens in (1, ANSWER + 1):
            sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            begin = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            spent[tokens] = time.perf_counter() - begin
        if turn:  # the first one warms up
            found["prompt"].append(requests * PROMPT / spent[1])
            found["answer"].append(requests * ANSWER / (spent[ANSWER + 1] - spent[1]))
    return found


def turn(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """One process: the median of its runs."""
    call = [sys.executable, __file__, "--child", str(folder), "--dtype", args.dtype, "--requests", str(args.requests)]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    if args.compiled:
        call.append("--compiled")
    else:
        env["TORCHDYNAMO_DISABLE"] = "1"
    done = subprocess.run(call, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"hidden": 512, "layers": 8, "vocab": 8192, "rounds": 5, "requests": 8, "times": 3}.items():
        cli.add_argument(f"--{name}", type=int, default=value)
    cli.add_argument("--dtype", default="float32")
    cli.add_argument("--compiled", action="store_true", help="torch.compile, and CUDA graphs where there are any")
    cli.add_argument("--child", help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.dtype, args.requests, args.times, args.compiled)))
        return
    rounds: dict[str, list[dict[str, float]]] = {NATIVE: [], COMPOSED: []}
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in configs(args.hidden, args.layers, args.vocab).items():
            (Path(scratch) / name).mkdir()
            (Path(scratch) / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for _ in range(args.rounds):
            for name, those in rounds.items():
                those.append(turn(Path(scratch) / name, args))
    print("| tokens/s | " + " | ".join(rounds) + " | ratio | of each round |\n|---|--:|--:|--:|---|")
    for part in ("prompt", "answer"):
        middle = [statistics.median(row[part] for row in rounds[name]) for name in rounds]
        each = [ours[part] / theirs[part] for theirs, ours in zip(rounds[NATIVE], rounds[COMPOSED], strict=True)]
        cells = [f"{value:,.0f}" for value in middle]
        print(f"| {part} | {' | '.join(cells)} | {statistics.median(each):.3f} | {min(each):.3f} to {max(each):.3f} |")


if __name__ == "__main__":
    main()

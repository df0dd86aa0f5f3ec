"""All logits of a long prompt over a large vocabulary: mdl's capture beside vLLM's own `prompt_logprobs=-1`.

    python benchmarks/logits.py [--vocab 128256] [--tokens 512] [--only capture]

One small Llama with random weights, one prompt, float32, the same engine settings. Seconds are those of the request,
without start-up; memory is how much the process's peak grew over it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FAST = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
COMMON = """
import json, resource, sys, time
import vllm.model_executor.models.registry as registry
registry._run_in_subprocess = lambda call: call()  # look at the class in this process: no second import of vLLM
layout, tokens, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
"""
LOGPROBS = """
from vllm import LLM, SamplingParams
llm = LLM(model=layout, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=tokens + 1,
          kv_cache_memory_bytes=64 << 20, max_logprobs=-1, logprobs_mode="raw_logits")
prompt = [{"prompt_token_ids": [k % 1000 for k in range(tokens)]}]
llm.generate(prompt, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
before, begin = peak(), time.perf_counter()
params = SamplingParams(max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=-1)
rows = llm.generate(prompt, params, use_tqdm=False)[0].prompt_logprobs
print(json.dumps([time.perf_counter() - begin, peak() - before, sum(row is not None for row in rows)]))
"""
CAPTURE = """
from safetensors import safe_open
from mdl.validate import engine
before, scenario = [], engine.run_scenario
def watched(*arguments):  # the first scenario warms up, as the first generate does on the other side
    before.append(peak())
    return scenario(*arguments)
engine.run_scenario = watched
def ask(name):
    request = {"ids": [k % 1000 for k in range(tokens)], "forced": [], "max_tokens": 1, "salt": ""}
    return {"name": name, "requests": [request], "file": out + "/" + name + ".safetensors"}
answer = engine.run({"layout": layout, "dtype": "float32", "engine": {"kv_cache_memory_bytes": 64 << 20},
              "scenarios": [ask("one"), ask("two")]})
if "error" in answer:
    raise SystemExit(json.dumps(answer["error"]))
seconds = answer["seconds"]
rows = safe_open(out + "/two.safetensors", "np").get_slice("logits").get_shape()[0]
print(json.dumps([seconds["two"] + seconds["capture"] / 2, peak() - before[0], rows]))
"""


def layout(folder: Path, vocab: int, tokens: int) -> Path:
    """A Llama of two layers that transformers writes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * tokens,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def measured(program: str, folder: Path, tokens: int, scratch: str) -> tuple[float, float, int]:
    """Seconds, GB of memory above what was held before, and rows of logits."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(tokens), scratch],
        check=True,
        env={**os.environ, **FAST},
        capture_output=True,
        text=True,
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--vocab", type=int, default=128256)
    cli.add_argument("--tokens", type=int, default=512)
    cli.add_argument("--only", choices=["capture", "prompt_logprobs"])
    args = cli.parse_args()
    ways = {"capture": COMMON + CAPTURE, "prompt_logprobs": COMMON + LOGPROBS}
    print(f"| {args.tokens} tokens x {args.vocab} logits | seconds | GB | rows |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = layout(Path(scratch) / "layout", args.vocab, args.tokens)
        for name, program in ways.items():
            if args.only in (None, name):
                seconds, memory, rows = measured(program, folder, args.tokens, scratch)
                print(f"| {name} | {seconds:.1f} | {memory:.2f} | {rows} |", flush=True)


if __name__ == "__main__":
    main()

"""Wall time of `mdl verify` beside the least that asking vLLM anything costs.

    python benchmarks/verify.py [--rounds 5]

The other side is a bare script that imports vLLM, loads the same layout with the same fast settings and generates once.
Both run in turn; the figure is the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BARE = """
import sys
import vllm.model_executor.models.registry as registry
registry._run_in_subprocess = lambda call: call()  # the fast settings include looking at the class in this process
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=256,
          kv_cache_memory_bytes=64 << 20)
llm.generate([{"prompt_token_ids": list(range(64))}], SamplingParams(max_tokens=16, temperature=0, detokenize=False))
llm.llm_engine.engine_core.shutdown()
"""
FAST = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def seconds(command: list[str]) -> float:
    """Wall time of one process, which must succeed."""
    begin = time.perf_counter()
    subprocess.run(
        command, check=True, env={**os.environ, **FAST}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - begin


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--checkpoint", type=Path, default=ROOT / "examples" / "moby_dick" / "ckpt.pt")
    args = cli.parse_args()
    mdl = str(Path(sys.executable).with_name("mdl"))
    with tempfile.TemporaryDirectory() as scratch:
        layout = f"{scratch}/layout"
        subprocess.run([mdl, "convert", str(args.checkpoint), layout], check=True, stdout=subprocess.DEVNULL)
        ways = {"bare script": [sys.executable, "-c", BARE, layout], "mdl verify": [mdl, "verify", layout]}
        seconds(ways["bare script"])  # fills the file cache, so that the first round is not a special one
        rounds = [{name: seconds(command) for name, command in ways.items()} for _ in range(args.rounds)]
    for name in ways:
        times = [r[name] for r in rounds]
        print(f"{name:12} median {statistics.median(times):5.1f} s, min {min(times):5.1f}, max {max(times):5.1f}")
    ratios = [r["mdl verify"] / r["bare script"] for r in rounds]
    print(f"ratio        median {statistics.median(ratios):5.2f}  , min {min(ratios):5.2f}, max {max(ratios):5.2f}")


if __name__ == "__main__":
    main()

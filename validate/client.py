"""The parent's handle on the process that runs vLLM. Imports neither torch nor vllm."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from msgspec import Struct, field, to_builtins

from ..archs.served.own import Own
from ..errors import machine_error, usage_error
from .child import Child

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the child itself: one import instead of three
    "TORCHDYNAMO_DISABLE": "1",  # only right together with enforce_eager, which the child always sets
    "HF_HUB_OFFLINE": "1",  # a layout is complete: nothing may be fetched to fill its gaps
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_FLOAT32_MATMUL_PRECISION": "highest",  # float32 means float32 here, not 10 bits of mantissa: in matrices
    "TRITON_F32_DEFAULT": "ieee",  # and in attention on GPUs, whose kernels otherwise round float32 to TF32
}

CPU_COMPILATION: dict[str, list[str]] = {"custom_ops": ["all", "-rotary_embedding"]}
"""vLLM 0.32's own rotary kernel for CPUs is wrong for three-dimensional q and k (as in DeepSeek); torch's is right.

What is verified with it has to be served with it.
"""


class Request(Struct, frozen=True):
    """One sequence: a prompt, a continuation that is forced token by token, then ``max_tokens`` free greedy tokens.

    Logits exist for the positions of ``ids``, of ``forced``, and of all free tokens but the last. All three
    together must fit into the layout's context length, or vLLM refuses to load it that wide.
    """

    ids: tuple[int, ...]
    forced: tuple[int, ...] = ()
    max_tokens: int = 1
    salt: str = ""


class Scenario(Struct, frozen=True):
    """Requests that go through vLLM in one batch. ``name`` becomes a file name."""

    name: str
    requests: tuple[Request, ...]


class RequestResult(Struct, frozen=True):
    """What vLLM did with one request: tokens per scheduler step (their sum is its rows of logits), tokens generated."""

    qlens: tuple[int, ...]
    generated: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows in the scenario's file that belong to this request. More than its tokens if it was preempted,
        fewer if a prefix came from the cache: the file's ``positions`` say which row is what."""
        return sum(self.qlens)


class ScenarioResult(Struct, frozen=True):
    """``file`` is a safetensors file: ``logits`` [N, V] float32, ``positions`` [N] and ``input_ids`` [N] int64.

    The rows of the first request come first, in the order in which vLLM computed them.
    """

    name: str
    file: Path
    requests: tuple[RequestResult, ...]

    def spans(self) -> list[slice]:
        """The rows of each request."""
        ends = [sum(r.rows for r in self.requests[: i + 1]) for i in range(len(self.requests))]
        return [slice(end - r.rows, end) for r, end in zip(self.requests, ends, strict=True)]


class Coverage(Struct, frozen=True):
    """What the load left undone. A right layout has only ``stored`` above zero and ``audited`` true.

    ``unloaded``: parameter → (elements that nothing was loaded into, elements). ``unconsumed``: tensors of the
    files whose values reached no parameter. ``repeated`` and ``partial``: tensors of which more, or fewer, elements
    were written than they have (not told with several workers). ``stored_nan``: tensors with NaN in the files,
    which make ``unloaded`` entries of their own. ``unchecked``: parameters whose dtype knows no NaN. ``pulled`` counts
    the stored tensors that were taken out of the parameters again and compared with their files; ``differing``: tensor
    → how many of its elements are not in the model as they are in the file.
    """

    stored: int
    unloaded: Mapping[str, tuple[int, int]]
    unconsumed: tuple[str, ...]
    repeated: tuple[str, ...]
    partial: tuple[str, ...]
    stored_nan: tuple[str, ...]
    unchecked: tuple[str, ...]
    audited: bool
    differing: Mapping[str, int] = field(default_factory=dict[str, int])
    pulled: int = 0


class EngineResult(Struct, frozen=True):
    """A layout that loaded and ran. ``seconds`` holds the wall time of each phase and scenario; ``notes`` warn;
    ``graphs`` is vLLM's mode of CUDA graphs."""

    scenarios: tuple[ScenarioResult, ...]
    coverage: Coverage
    model_class: str
    attention: tuple[str, ...]
    runner: str
    device: str
    dtype: str
    versions: Mapping[str, str]
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()
    graphs: str = ""


class EngineFailure(Struct, frozen=True):
    """vLLM refuses this layout: a failed verification, not a missing machine. ``phase`` is ``load`` or ``run``."""

    phase: Literal["load", "run"]
    type: str
    message: str


class Engine:
    """One vLLM process, started at once and warming up while the caller works; a context manager.

    Serves many requests one after another. After a crash the next request starts a fresh process. Not for several
    threads at a time, but one may wait in :meth:`run` while another computes.

    Raises:
        MdlError: MACHINE, if vLLM is not installed.
    """

    def __init__(self, *, timeout: float = 600, env: Mapping[str, str] | None = None) -> None:
        self._timeout = timeout
        self._env = {**os.environ, **ENVIRONMENT, **(env or {})}
        self._child = Child(self._env)
        self._own: Own | None = None
        self._taught: Own | None = None

    def teach(self, own: Own | None) -> None:
        """Have vLLM know a class of the user's own in the requests that follow. A process forgets no code that it has
        imported, so another class, or a file that changed, takes a new one."""
        if own is not None and self._taught not in (None, own):
            self._child.close()
        self._own = own

    def run(
        self, layout: Path, scenarios: Sequence[Scenario], *, dtype: str = "float32", scratch: Path, **overrides: Any
    ) -> EngineResult | EngineFailure:
        """Load ``layout``, run ``scenarios`` in order, and leave their logits in ``scratch``.

        ``overrides`` are vLLM's own engine arguments (``max_model_len``, ``block_size``, ``max_num_batched_tokens``,
        ``max_num_seqs``, ``enable_prefix_caching``, ``tensor_parallel_size``, ``kv_cache_memory_bytes`` …). Unless
        given, ``max_model_len`` is the longest request and the cache holds the largest scenario.

        Raises:
            MdlError: MACHINE, if the process dies, hangs, or this machine can't run the layout; USAGE, if
                ``scratch`` is the layout itself, where vLLM would take the results for weights.
        """
        if scratch.resolve() == layout.resolve():
            raise usage_error("the layout can't be its own scratch folder", str(layout), "give another folder")
        request = {
            "op": "run",
            "layout": str(layout.resolve()),
            "dtype": dtype,
            "scenarios": [_as_request(scenario, scratch.resolve()) for scenario in scenarios],
            "engine": overrides,
        }
        answer = self._ask(request)
        return answer if isinstance(answer, EngineFailure) else _result(answer)

    def complete(self, prompt: str, arguments: Sequence[str], *, max_tokens: int) -> str | EngineFailure:
        """The greedy continuation of ``prompt`` as text, under the command-line arguments of vLLM's own server."""
        request = {"op": "complete", "prompt": prompt, "arguments": list(arguments), "max_tokens": max_tokens}
        answer = self._ask(request)
        return answer if isinstance(answer, EngineFailure) else str(answer["text"])

    def probe(
        self, layout: Path, ids: Sequence[int], units: Sequence[Mapping[str, Any]], inputs: Path, answers: Path
    ) -> Mapping[str, Any] | EngineFailure:
        """Feed modules of ``layout`` the inputs in one file and leave what they answer in another (:mod:`.probe`).

        A unit is ``{"key", "targets": stored tensors, "level", "leaf", "head"}``. Returns its place in vLLM's model.
        """
        request = {
            "op": "probe",
            "layout": str(layout.resolve()),
            "dtype": "float32",
            "ids": list(ids),
            "units": [dict(unit) for unit in units],
            "inputs": str(inputs.resolve()),
            "answers": str(answers.resolve()),
            "engine": {"max_model_len": len(ids) + 1},
        }
        answer = self._ask(request)
        return answer if isinstance(answer, EngineFailure) else answer["places"]

    def ping(self) -> dict[str, Any]:
        """Wait until the imports are done; the child's ``pid`` and vLLM's version."""
        answer = self._ask({"op": "ping"})
        return {} if isinstance(answer, EngineFailure) else answer

    @property
    def pid(self) -> int:
        """The id of the process that runs now."""
        return self._child.pid

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any] | EngineFailure:
        if self._child.ended:
            self._child.close()
            self._child = Child(self._env)
            self._taught = None
        if self._own is not None:
            request = {**request, "environment": self._own.environment()}
            self._taught = self._own
        try:
            answer = self._child.ask(request, self._timeout)
        except BaseException:  # Ctrl-C too: a child in the middle of a request can't be used again
            self._child.kill()
            raise
        error = answer.get("error")
        if error is None:
            return answer
        if error["kind"] == "machine":
            raise machine_error(
                f"vLLM can't run this layout on this machine: {error['type']}: {error['message'][:600]}",
                str(request.get("layout", "")),
                "use a machine with more memory or with the device that this model needs",
            )
        return EngineFailure(error["kind"], error["type"], error["message"])

    def close(self) -> None:
        """End the process; harmless when repeated."""
        self._child.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._child.kill()
        self.close()


def _as_request(scenario: Scenario, scratch: Path) -> dict[str, Any]:
    if Path(scenario.name).name != scenario.name or not scenario.requests:
        raise usage_error(f"not a scenario: {scenario.name!r}", "", "give it a plain name and at least one request")
    return {**to_builtins(scenario), "file": str(scratch / f"{scenario.name}.safetensors")}


def _result(answer: Mapping[str, Any]) -> EngineResult:
    coverage: dict[str, Any] = answer["coverage"]
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in coverage.items()
    }
    plain["unloaded"] = {name: (left, size) for name, (left, size) in coverage["unloaded"].items()}
    return EngineResult(
        scenarios=tuple(_scenario(s) for s in answer["scenarios"]),
        coverage=Coverage(**plain),
        model_class=answer["model_class"],
        attention=tuple(answer["attention"]),
        runner=answer["runner"],
        device=answer["device"],
        dtype=answer["dtype"],
        versions=answer["versions"],
        seconds=answer["seconds"],
        notes=tuple(answer["notes"]),
        graphs=answer["graphs"],
    )


def _scenario(answer: Mapping[str, Any]) -> ScenarioResult:
    pairs = zip(answer["qlens"], answer["generated"], strict=True)
    requests = tuple(RequestResult(tuple(qlens), tuple(generated)) for qlens, generated in pairs)
    return ScenarioResult(answer["name"], Path(answer["file"]), requests)

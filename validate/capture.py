"""The half of the engine that lives inside vLLM's workers: it keeps the hidden states of every step.

A worker extension: vLLM mixes :class:`Capture` into its worker class, and ``collective_rpc`` calls the methods by
name. It wraps ``execute_model`` instead of hooking modules, since the classes that vLLM compiles never fire hooks.
Only plain values go in and out, and tensors through files, so it works in one process and across several.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct


class Step(Struct, frozen=True):
    """One step of the scheduler. Request i owns the rows ``bounds[i]:bounds[i + 1]`` of the tensors."""

    requests: tuple[str, ...]
    bounds: tuple[int, ...]
    positions: torch.Tensor
    input_ids: torch.Tensor
    hidden: torch.Tensor


def read_step(runner: Any) -> Step | None:
    """The step that ``runner`` has just executed; None if it scheduled nothing or isn't the last pipeline stage."""
    state = getattr(runner, "execute_model_state", None)
    if state is None or state.hidden_states is None:
        return None
    batch = getattr(state, "input_batch", None)
    return _step_v1(runner, state) if batch is None else _step_v2(batch, state)


def _step_v1(runner: Any, state: Any) -> Step:
    """The first model runner keeps the inputs in its own buffers, longer than the step."""
    batch = runner.input_batch
    bounds = runner.query_start_loc.np[: batch.num_reqs + 1].tolist()
    return _step(batch, bounds, runner.positions, runner.input_ids.gpu, state.hidden_states)


def _step_v2(batch: Any, state: Any) -> Step:
    """The second model runner (GPUs, vLLM 0.25 and later) carries them in the batch."""
    bounds = batch.query_start_loc_np[: batch.num_reqs + 1].tolist()
    return _step(batch, bounds, batch.positions, batch.input_ids, state.hidden_states)


def _step(batch: Any, bounds: list[int], positions: Any, input_ids: Any, hidden: Any) -> Step:
    n = bounds[-1]
    requests = tuple(batch.req_ids[: batch.num_reqs])
    return Step(requests, tuple(bounds), positions[:n].clone(), input_ids[:n].clone(), hidden[:n].clone())


class Capture:
    """What a vLLM worker can do for us. Its names must not meet one of the worker's own, hence the prefix."""

    model_runner: Any
    vllm_config: Any
    rank: int

    def mdl_start(self) -> None:
        """From now on keep what every step computes."""
        runner = self.model_runner
        steps: list[Step] = []
        original = runner.execute_model

        def execute_model(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            step = read_step(runner)
            if step is not None:
                steps.append(step)
            return out

        runner.execute_model = execute_model
        self._mdl_steps, self._mdl_original = steps, original

    @torch.inference_mode()
    def mdl_take(self, order: list[str], path: str, rows: int) -> list[list[int]]:
        """Stop keeping; compute the logits and write them to ``path``, requests in ``order``.

        The file holds ``logits`` [N, V] float32, ``positions`` [N] and ``input_ids`` [N] int64; never more than
        ``rows`` rows of logits are in memory. Returns the query length of every step of every request, empty on
        a rank that has nothing. All tensor-parallel ranks must run this: computing logits is a collective.
        """
        self.model_runner.execute_model = self._mdl_original
        steps, self._mdl_steps = self._mdl_steps, []
        if not steps:
            return []
        parts = {request: list(_parts(steps, request)) for request in order}
        hidden, positions, input_ids = (torch.cat([p[i] for r in order for p in parts[r]]) for i in range(3))
        logits = self._mdl_logits(hidden, rows)
        if self.rank % self.vllm_config.parallel_config.tensor_parallel_size == 0:
            _write(Path(path), logits, {"positions": positions, "input_ids": input_ids})
        else:
            for _ in logits:
                pass
        return [[len(p[0]) for p in parts[request]] for request in order]

    def _mdl_logits(self, hidden: torch.Tensor, rows: int) -> Iterator[torch.Tensor | None]:
        compute: Callable[[torch.Tensor], torch.Tensor | None] = self.model_runner.get_model().compute_logits
        for chunk in hidden.split(rows):
            logits = compute(chunk)
            yield None if logits is None else logits.float().cpu()

    def mdl_describe(self) -> dict[str, Any]:
        """What runs here, and what its loader did (:meth:`mdl.validate.coverage.Audit.report`)."""
        model = self.model_runner.get_model()
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        backends = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
        kind, runner = type(model), type(self.model_runner)
        return {
            "model_class": f"{kind.__module__}.{kind.__qualname__}",
            "attention": sorted(backends),
            "runner": f"{runner.__module__}.{runner.__qualname__}",
            "device": str(self.model_runner.device),
            "dtype": str(self.vllm_config.model_config.dtype).removeprefix("torch."),
            "graphs": getattr(self.vllm_config.compilation_config.cudagraph_mode, "name", ""),
            "audit": getattr(model, "mdl_audit", None),
        }


def _parts(steps: Sequence[Step], request: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The rows of one request, step by step. vLLM appends ``-<suffix>`` to the id that its caller knows."""
    for step in steps:
        for i, name in enumerate(step.requests):
            if name.rsplit("-", 1)[0] == request or name == request:
                own = slice(step.bounds[i], step.bounds[i + 1])
                yield step.hidden[own], step.positions[own].long(), step.input_ids[own].long()


def _write(path: Path, logits: Iterator[torch.Tensor | None], small: dict[str, torch.Tensor]) -> None:
    """A safetensors file written front to back, so that [N, V] logits need not exist in memory at once."""
    count = len(small["positions"])
    first = next(logits)
    if first is None:
        raise RuntimeError("the model returned no logits on the rank that should hold them")
    sizes = {"logits": 4 * count * first.shape[1], **{name: 8 * len(t) for name, t in small.items()}}
    shapes = {"logits": [count, first.shape[1]], **{name: [len(t)] for name, t in small.items()}}
    header: dict[str, Any] = {}
    offset = 0
    for name, size in sizes.items():
        kind = "F32" if name == "logits" else "I64"
        header[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for chunk in chain([first], logits):
            if chunk is not None:
                file.write(chunk.contiguous().numpy().data)
        for tensor in small.values():
            file.write(tensor.cpu().contiguous().numpy().data)

"""What differs between versions of vLLM and between devices: one small adapter each. The rest of the engine knows none.

Only :mod:`.engine` imports this module, and vLLM itself, which finds the classes that force tokens by their names here.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
import vllm
import vllm.model_executor.models.registry as vllm_registry
import zmq
from vllm.distributed.parallel_state import get_pp_group
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from ..archs.decoder.reading import MODEL_TYPE, checked
from .client import CPU_COMPILATION

TRIED = ("0.25", "0.26", "0.27", "0.28", "0.29", "0.30", "0.31", "0.32")
"""The versions that this module was tried with. Others get a warning, and mostly work."""

FORCED = "mdl_forced"
PROMPT = "mdl_prompt"
"""Keys of a request's extra arguments: the tokens to force, and how long its prompt was."""

_PROCESSORS = "vllm.v1.worker.gpu.sample.logits_processor"


def version(*names: str) -> str:
    """The version of the first of these distributions that is installed (vLLM's CPU wheel has its own name). Where none
    is listed, as in a source tree, or while the environment is installed anew under a long run: vLLM's own word."""
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            if found := importlib.metadata.version(name):
                return found
    return str(vllm.__version__)


def untried(found: str) -> list[str]:
    """The warning for a version that nobody has tried, or nothing."""
    if ".".join(found.split(".")[:2]) in TRIED:
        return []
    tried = ", ".join(f"{one}.x" for one in TRIED)
    return [f"mdl was not tried with vLLM {found or 'of this unknown version'}, only with {tried}"]


# --- how the engine is set up ------------------------------------------------------------------------------------


def inspect_here() -> None:
    """Look at model classes in this process: by default vLLM starts another one for it, which costs 15 s."""

    def call(fn: Callable[[], Any]) -> Any:
        return fn()

    if hasattr(vllm_registry, "_run_in_subprocess"):
        setattr(vllm_registry, "_run_in_subprocess", call)  # noqa: B010 - private: absent from the module's types


def platform_arguments() -> dict[str, Any]:
    """What the device needs so as to compute the right thing, and to start at all.

    On a GPU vLLM refuses to start unless most of the memory is free, although the size of its cache is given.
    """
    if current_platform.is_cpu():
        return {"compilation_config": CPU_COMPILATION}
    return {"gpu_memory_utilization": 0.01} if current_platform.is_cuda_alike() else {}


def adjusted(dtype: str) -> list[str]:
    """What this module changed in vLLM so that it could be measured: the report has to say so."""
    if current_platform.is_cpu() or dtype != "float32":
        return []
    return ["rotary tables were computed on the CPU: vLLM's own, from the GPU, differ in the last places (docs/gpu.md)"]


def uncached(config: Any) -> bool:
    """Whether vLLM itself leaves the prefix cache off for this model, as it does where there is no attention (Mamba).

    Asked for all the same, it has vLLM 0.32 fail on a CPU: Mamba 2's scan there keeps no state but the last one.
    """
    return not getattr(config.model_config, "is_prefix_caching_supported", True)


def left_out(llm: Any, request: dict[str, Any]) -> list[str]:
    """Which of the ways that were asked for this model can't go."""
    asked = request["engine"].get("enable_prefix_caching")
    if not asked or not uncached(llm.llm_engine.vllm_config):
        return []
    return ["vLLM has no prefix cache for a model without attention, so nothing was read from one"]


def exact_tables() -> None:
    """Have the rotary tables of float32 models computed on the CPU, as the reference's are, then moved.

    vLLM computes them on the GPU, whose powers are off by some last places. Times the position, that is an angle, and
    on a tiny Llama it put the 428th position 24 times further off than the reference's own rounding.
    """
    try:
        from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
    except ImportError:  # another version keeps it elsewhere: the figures are then a little larger
        return
    original: Callable[..., None] = RotaryEmbeddingBase.__init__
    if current_platform.is_cpu() or original.__module__ == __name__:
        return

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if torch.get_default_dtype() != torch.float32:
            original(self, *args, **kwargs)
            return
        device = torch.empty(0).device
        with torch.device("cpu"):
            original(self, *args, **kwargs)
        self.to(device)

    RotaryEmbeddingBase.__init__ = init


def kv_bytes(config: Any, tokens: int) -> int:
    """Bytes of cache for ``tokens`` tokens: twice the plain count, since hybrid models pad their pages."""
    model, parallel = config.model_config, config.parallel_config
    per_layer = 2 * model.get_total_num_kv_heads() * model.get_head_size() * model.dtype.itemsize
    return max(64 << 20, 2 * tokens * model.get_num_layers(parallel) * per_layer)


def blocks(config: Any, plain: int, size: int) -> int:
    """Blocks of cache where ``plain`` of ``size`` tokens, as asked for, are enough for layers of one kind.

    Some backends insist on blocks of their own size (16 in DeepSeek's latent attention on CPUs).

    Layers of several kinds (full and sliding attention) are put into groups of one size, and every group takes blocks
    of its own from the one pool (vLLM's v1/core/kv_cache_utils.py).
    """
    plain = -(-plain * size // (config.cache_config.block_size or size))
    kinds = Counter(_kinds(config.model_config.hf_text_config))
    if len(kinds) < 2:
        return plain
    group = min(kinds.values())
    return plain * sum(-(-count // group) for count in kinds.values())


def _kinds(config: Any) -> Iterable[object]:
    """What tells apart the layers that keep something for each token, one entry for each of them."""
    if getattr(config, "model_type", "") != MODEL_TYPE:
        return getattr(config, "layer_types", None) or ()
    decoder = checked(config.to_dict())
    kinds = ["state" if decoder.recurrent(i) else decoder.window(i) for i in range(decoder.num_hidden_layers)]
    return [*kinds, 2] if decoder.residual.look_back else kinds


# --- how tokens are forced ---------------------------------------------------------------------------------------


def forcing(config: Any) -> dict[str, Any]:
    """The engine's arguments that make this configuration's model runner force tokens.

    The second model runner has a protocol of its own for logits processors, and before it learned one (0.25), asking
    for a processor would have brought the first runner back: there :class:`Forcing` works from inside.
    """
    if not getattr(config, "use_v2_model_runner", False):
        return {"logits_processors": [f"{__name__}:ForcedV1"]}
    return {"logits_processors": [f"{__name__}:ForcedV2"]} if _has_processors() else {}


def _has_processors() -> bool:
    return importlib.util.find_spec(_PROCESSORS) is not None


def _only(logits: torch.Tensor, token: int) -> torch.Tensor:
    logits.fill_(float("-inf"))
    logits[token] = 0.0
    return logits


class ForcedV1(AdapterLogitsProcessor):
    """The i-th generated token becomes the i-th forced one; the captured logits are those from before."""

    def is_argmax_invariant(self) -> bool:
        """No: deciding the argmax is the whole point."""
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """The function for one request, or None if nothing is forced."""
        forced: list[int] | None = (params.extra_args or {}).get(FORCED)
        if not forced:
            return None

        def force(generated: list[int], logits: torch.Tensor) -> torch.Tensor:
            return _only(logits, forced[len(generated)]) if len(generated) < len(forced) else logits

        return force


class Slots:
    """The second model runner's numbered places for requests, which are handed on: each new one is written over."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, list[int]]] = {}

    def add(self, slot: int, params: Any) -> bool:
        """Note what a request forces. Returns whether it forces anything."""
        extra: dict[str, Any] = params.extra_args or {}
        self._held[slot] = (extra.get(PROMPT, 0), extra.get(FORCED) or [])
        return bool(self._held[slot][1])

    def apply(self, logits: torch.Tensor, slots: Sequence[int], positions: torch.Tensor) -> torch.Tensor:
        """Change the rows of ``logits`` [N, V] that predict a forced token. ``positions`` [N] are those of the rows."""
        if any(self._held.get(slot, (0, []))[1] for slot in slots):
            for row, (slot, position) in enumerate(zip(slots, positions.tolist(), strict=True)):
                prompt, forced = self._held.get(slot, (0, []))
                if 0 <= position + 1 - prompt < len(forced):
                    _only(logits[row], forced[position + 1 - prompt])
        return logits


def _forced_v2() -> type:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    class ForcedV2(LogitsProcessor):
        """:class:`ForcedV1` for the second model runner, whose processors see the whole batch."""

        def __init__(self, vllm_config: Any, req_states: Any) -> None:
            super().__init__(vllm_config, req_states)
            self._slots = Slots()

        def add_request(self, req_idx: int, sampling_params: Any) -> bool:
            return self._slots.add(req_idx, sampling_params)

        def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
            return self._slots.apply(logits, ctx.expanded_idx_mapping.tolist(), ctx.pos)

    return ForcedV2


def __getattr__(name: str) -> Any:
    """``ForcedV2`` is made when vLLM asks for it by name, since its base class is not in every version."""
    if name != "ForcedV2":
        raise AttributeError(name)
    made = globals()[name] = _forced_v2()
    return made


def force_sampler(sampler: Any) -> None:
    """Make a sampler of the second model runner force tokens itself: it becomes a subclass of what it was."""
    kind: Any = type(sampler)
    slots = Slots()

    class Forced(kind):
        def add_request(self, req_idx: int, prompt_len: int, sampling_params: Any) -> Any:
            slots.add(req_idx, sampling_params)
            return super().add_request(req_idx, prompt_len, sampling_params)

        def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
            positions = input_batch.positions[input_batch.logits_indices]
            slots.apply(logits, input_batch.idx_mapping_np.tolist(), positions)
            return super().__call__(logits, input_batch)

    sampler.__class__ = Forced


def stage_buffers(runner: Any) -> None:
    """Give a later pipeline stage the buffers that it receives hidden states in.

    vLLM 0.25 to 0.32 makes them in its warm-up, which eager execution on a CPU skips: the first step of every stage but
    the first would fail an assertion (``sync_and_gather_intermediate_tensors`` in v1/worker/gpu_model_runner.py).
    """
    if getattr(runner, "intermediate_tensors", ...) is not None or get_pp_group().is_first_rank:
        return
    runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
    )


def close_queues() -> None:
    """Close the sockets that an engine with several workers leaves open, and what was never sent with them.

    vLLM's message queues (``v1/executor/multiproc_executor.py``) keep theirs; collecting them as garbage ends their
    context, which waits without limit for messages to workers that are gone. Seen on two GPUs, with both model runners.
    """
    for one in gc.get_objects():
        if issubclass(type(one), zmq.Socket) and not one.closed:
            one.close(linger=0)


class Forcing:
    """The part of the worker extension that forces tokens where no logits processor can."""

    model_runner: Any
    vllm_config: Any

    def mdl_force(self) -> None:
        """Called once, after the model was loaded."""
        stage_buffers(self.model_runner)
        sampler = getattr(self.model_runner, "sampler", None)
        if sampler is not None and not forcing(self.vllm_config):
            force_sampler(sampler)

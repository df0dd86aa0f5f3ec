"""What recurrent layers share under vLLM: their states in its cache, one step's requests, and scans over them.

vLLM keeps states as it keeps keys and values: each request has a block of the pool for them (its number is the slot),
found through a block table, freed with the request, and computed anew after preemption. With prefix caching, vLLM
itself copies a state to the next block at every block's end. So all that is left to do here is: read a request's state
unless it begins, and write the last one back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from msgspec import Struct
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend, LinearAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor

from ...errors import input_error

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

try:  # since vLLM 0.30: CUDA graphs that are broken up while they are captured, at ops that say so
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture
except ImportError:

    def eager_break_during_capture(fn: Callable[..., Any]) -> Callable[..., Any]:
        """Nothing to break."""
        return fn


class Batch(Struct):
    """One step's requests. Token ``starts[r]`` is the first of request r, and ``starts[-1]`` is how many there are.

    ``begins`` is the same on the device, ``slots`` [R] the blocks of their states, ``carried`` [R] whether there is
    a state from earlier steps. Without slots (vLLM's trial run) nothing is read or written.
    """

    starts: list[int]
    begins: Tensor
    slots: Tensor | None
    carried: Tensor | None

    @property
    def longest(self) -> int:
        """Tokens of the longest request of this step."""
        return max(end - begin for begin, end in zip(self.starts, self.starts[1:], strict=False))

    def load(self, cache: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The requests' states [R, *shape]; zeros for those that begin."""
        if self.slots is None or self.carried is None:
            return torch.zeros(len(self.starts) - 1, *shape, device=self.begins.device)
        states = cache[self.slots]
        return torch.where(self.carried.view(-1, *[1] * len(shape)), states, torch.zeros_like(states))

    def store(self, cache: Tensor, states: Tensor) -> None:
        """Put back the requests' states [R, …]."""
        if self.slots is not None:
            cache[self.slots] = states.to(cache.dtype)


class StateMetadataBuilder(LinearAttentionMetadataBuilder):
    """What a step's layers need to know, once for all of them."""

    _cudagraph_support = AttentionCGSupport.NEVER  # of whole steps: graphs are made of what lies between these layers

    def build(  # pyright: ignore[reportIncompatibleMethodOverride]  # metadata of our own
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        """The batch as vLLM describes it to all backends."""
        m = common_attn_metadata
        mode = self.vllm_config.cache_config.mamba_cache_mode
        slots = mamba_get_block_table_tensor(m.block_table_tensor, m.seq_lens, self.kv_cache_spec, mode)[:, 0]
        starts = m.query_start_loc_cpu.tolist()
        while len(starts) > 2 and starts[-1] == starts[-2]:  # requests that only fill up a graph's batch
            starts.pop()
        count = len(starts) - 1
        begins = m.query_start_loc[: count + 1].long()
        carried = m.seq_lens[:count] > begins[1:] - begins[:-1]
        return Batch(starts, begins, slots[:count].long(), carried)


class StateBackend(LinearAttentionBackend):
    """vLLM's backend for linear attention, with metadata of our own."""

    @staticmethod
    def get_name() -> str:
        """For vLLM's log."""
        return "MDL_RECURRENCE"

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        """What makes a :class:`Batch` of each step."""
        return StateMetadataBuilder


class StateLayer(nn.Module, MambaBase):
    """A layer with states of ``shapes`` for each request, in float32, in the place of attention.

    A subclass has ``mixed(positions, x, batch)``: hidden states [T, C] of the whole step to the same shape. For
    torch.compile it is one operation, at which piecewise CUDA graphs are cut, as at attention.
    """

    kv_cache: tuple[Tensor, ...]

    def __init__(self, shapes: tuple[tuple[int, ...], ...], vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        if vllm_config.speculative_config is not None:
            what = "a recurrence with speculative decoding: a state can't be taken back when a draft is refused"
            raise input_error(what, do="serve it without --speculative-config")
        self.shapes, self.prefix = shapes, prefix
        compilation = vllm_config.compilation_config
        compilation.static_forward_context[prefix] = self
        if compilation.splitting_ops and _OP not in compilation.splitting_ops:
            compilation.splitting_ops.append(_OP)
        self.kv_cache = tuple(torch.tensor([]) for _ in shapes)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The kind of state, by vLLM's names."""
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Of each state of one request, on this rank."""
        return self.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """float32, whatever the weights' type: a state is a sum over the whole text."""
        return (torch.float32,) * len(self.shapes)

    def get_attn_backend(self) -> type[StateBackend]:
        """Whose metadata this layer gets."""
        return StateBackend

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        """Hidden states [T, C] at positions [T] to the same shape."""
        out = torch.empty_like(x)
        torch.ops.vllm.mdl_recurrence(positions, x, out, self.prefix)
        return out

    def step(self, positions: Tensor, x: Tensor, out: Tensor) -> None:
        """Write into ``out`` what the step's requests get; rows that are only padding stay as they are."""
        known: Any = get_forward_context().attn_metadata
        if known is None:
            begins = torch.tensor([0, len(x)], device=x.device)
            batch = Batch([0, len(x)], begins, None, None)
        else:
            batch = known[self.prefix]
        count = batch.starts[-1]
        out[:count] = self.mixed(positions[:count], x[:count], batch)

    def mixed(self, positions: Tensor, x: Tensor, batch: Batch) -> Tensor:
        """Hidden states [T, C] to the same shape."""
        raise NotImplementedError


@eager_break_during_capture
def mdl_recurrence(positions: Tensor, x: Tensor, out: Tensor, layer_name: str) -> None:
    """The layer of that name, as one operation that writes into ``out``."""
    get_forward_context().no_compile_layers[layer_name].step(positions, x, out)


def _fake(positions: Tensor, x: Tensor, out: Tensor, layer_name: str) -> None:
    """What torch.compile sees of it."""


_OP = "vllm::mdl_recurrence"
direct_register_custom_op("mdl_recurrence", mdl_recurrence, mutates_args=["out"], fake_impl=_fake)


# --- scans -------------------------------------------------------------------------------------------------------


def scan(decay: Tensor, new: Tensor, first: Tensor, batch: Batch) -> Tensor:
    """h_t = decay_t · h_(t-1) + new_t for all requests at once: [T, W] each, and the states before them [R, W].

    Spans are joined to spans of twice the length (Hillis & Steele 1986): as many rounds as the longest request's length
    has binary digits, and none for single tokens. Nothing is divided, so no decay is too small. A request's first token
    takes in the state before it, and a decay of 0 then keeps requests apart.
    """
    at = batch.begins[:-1]
    a, h = decay.clone(), new.clone()
    h[at] += a[at] * first
    a[at] = 0
    step = 1
    while step < batch.longest:
        h[step:] += a[step:] * h[:-step]
        a[step:] = a[step:] * a[:-step]
        step *= 2
    return h


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """A causal filter ``weight`` [W, K] of each channel over x [T, W], and the last K - 1 inputs [R, K - 1, W].

    ``before`` holds those of the steps before.
    """
    kernel, begins = weight.shape[-1], batch.begins
    counts = begins[1:] - begins[:-1]
    request = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts, output_size=len(x))
    offset = torch.arange(len(x), device=x.device) - begins[:-1][request]
    out = x * weight[:, -1]
    for back in range(1, kernel):
        earlier = torch.where((offset >= back)[:, None], x.roll(back, 0), _at(before, request, offset - back))
        out = out + earlier * weight[:, -1 - back]
    ends = counts[:, None] + torch.arange(1 - kernel, 0, device=x.device)  # positions within this step's tokens
    every = torch.arange(len(counts), device=x.device)[:, None].expand_as(ends)
    now = x[(begins[:-1, None] + ends).clamp(min=0)]
    last = torch.where((ends >= 0)[..., None], now, _at(before, every, ends))
    return (out if bias is None else out + bias), last


def _at(before: Tensor, request: Tensor, offset: Tensor) -> Tensor:
    """Rows of ``before`` [R, K - 1, W] at negative offsets, where -1 is the last; at others, anything."""
    return before[request, (before.shape[1] + offset).clamp(0, before.shape[1] - 1)]

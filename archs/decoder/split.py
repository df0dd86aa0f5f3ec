"""What of a composable decoder can't be split over several workers: refused before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import input_error
from .schema import Decoder


def refuse_ranks(d: Decoder, ranks: int) -> None:
    """Raises MdlError where heads can't be divided among tensor-parallel ranks, all of them or some several times."""
    heads, keys = d.num_attention_heads, d.num_key_value_heads
    whole = bool(d.attention.qk_norm and d.attention.qk_norm.over == "all")
    if heads % ranks or (keys % ranks and (ranks % keys or whole)):
        what = f"{heads} heads and {keys} key heads can't be split over {ranks} ranks"
        raise input_error(what, do="use a --tensor-parallel-size that divides both")


def refuse_stages(d: Decoder, spans: Sequence[tuple[int, int]]) -> None:
    """Raises MdlError where pipeline stages would not have what they need; ``spans`` are their layers, [first, end)."""
    if len(spans) > 1 and d.attention.value_residual:
        what = "attention.value_residual: the first layer's values do not reach other pipeline stages"
        raise input_error(what, do="serve it with --pipeline-parallel-size 1")
    kinds = [{d.recurrent(layer) for layer in range(*span)} for span in spans]
    if any(kind != kinds[0] for kind in kinds):  # vLLM's assertion would be "Workers disagree on … cache layouts"
        layers = ", ".join(f"{first} to {end - 1}" for first, end in spans)
        what = f"recurrence.layers: stages of layers {layers} do not each have both attention and recurrences"
        do = "serve it with --pipeline-parallel-size 1, or move the cuts by VLLM_PP_LAYER_PARTITION"
        raise input_error(what, do=do)

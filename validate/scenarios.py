"""The ways in which the same tokens go through vLLM: whole, token by token, in chunks, from the cache, under pressure.

All of them run in one engine, whose settings (:func:`engine_settings`) are chosen so that every path is taken: small
blocks, so that boundaries are crossed; a small step budget, so that long prompts are cut; too few blocks for a whole
batch, so that requests are preempted and computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from .client import Request, Scenario
from .inputs import Inputs
from .record import continuation

BLOCK = 32
"""Tokens per block of the KV cache. vLLM's CPU kernels like multiples of 32."""

STEP = 256
"""Tokens that one scheduler step may compute. Longer prompts are prefilled in chunks."""

PROMPTS = (1, 2, 5, 31, 32, 33, 64, 65)
"""Prompt lengths of the decoding batch: around the block boundaries, where an off-by-one shows."""

FORCED = 40
"""Tokens decoded one by one after each prompt: more than a block."""


class Piece(Struct, frozen=True):
    """A request and the sequence it is the beginning of: logits must be those of its first ``total`` positions.

    ``first`` is the first position that has to be among vLLM's answers: 0 unless the cache may spare earlier ones.
    """

    sequence: int
    prompt: int
    total: int
    first: int = 0


class Case(Struct, frozen=True):
    """A scenario and, for each of its requests, what it must reproduce."""

    scenario: Scenario
    pieces: tuple[Piece, ...]


def prefill_cases(inputs: Inputs) -> list[Case]:
    """Each sequence as one prompt, alone."""
    return [
        Case(
            Scenario(f"prefill-{k:04d}", (Request(ids=one.ids, salt=f"prefill-{k}"),)),
            (Piece(k, len(one.ids), len(one.ids)),),
        )
        for k, one in enumerate(inputs.sequences)
    ]


def decode_cases(inputs: Inputs) -> list[Case]:
    """A batch of mixed lengths decoded under force, and a prompt whose beginning the cache already holds."""
    at = long_sequence(inputs)
    ids = inputs.sequences[at].ids
    pieces = [Piece(at, n, min(n + FORCED, len(ids))) for n in PROMPTS if n < len(ids)]
    requests = [Request(ids=ids[: p.prompt], forced=ids[p.prompt : p.total], salt=f"decode-{p.prompt}") for p in pieces]
    whole = Request(ids=ids, salt="decode-whole")
    batch = Case(Scenario("decode", (*requests, whole)), (*pieces, Piece(at, len(ids), len(ids))))
    return [batch, *_prefix_cases(at, ids)]


def _prefix_cases(at: int, ids: tuple[int, ...]) -> Iterator[Case]:
    """The first part of the long sequence, then all of it under the same salt: vLLM finds whole blocks in its cache."""
    part = len(ids) * 2 // 3
    if part < 2 * BLOCK:
        return
    yield Case(Scenario("prefix-fill", (Request(ids=ids[:part], salt="prefix"),)), (Piece(at, part, part),))
    kept = part // BLOCK * BLOCK
    yield Case(Scenario("prefix-hit", (Request(ids=ids, salt="prefix"),)), (Piece(at, len(ids), len(ids), kept),))


def generate_case(inputs: Inputs) -> Case | None:
    """A free greedy continuation of the long sequence's beginning; None where there is no room for one."""
    at = long_sequence(inputs)
    ids = inputs.sequences[at].ids
    prompt, count = continuation(len(ids))
    if prompt < 1 or count < 1:
        return None
    request = Request(ids=ids[:prompt], max_tokens=count, salt="generate")
    return Case(Scenario("generate", (request,)), (Piece(at, prompt, prompt),))


def long_sequence(inputs: Inputs) -> int:
    """The index of the long sequence."""
    return next(k for k, one in enumerate(inputs.sequences) if one.kind == "long")


def engine_settings(inputs: Inputs) -> dict[str, Any]:
    """vLLM's engine arguments for all cases together."""
    longest = max(len(one.ids) for one in inputs.sequences)
    return {
        "max_model_len": longest + 1,
        "block_size": BLOCK,
        "max_num_batched_tokens": STEP,
        "max_num_seqs": 16,
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": -(-(longest + 1) // BLOCK) + 4,
    }

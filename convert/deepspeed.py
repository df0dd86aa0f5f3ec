"""Tells the files of a DeepSpeed checkpoint apart: which hold weights, which a part of what must be gathered."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import input_error

_WEIGHTS = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_STATE = re.compile(r"(?:bf16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt")
_SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")


def optimizer_states(names: Iterable[str], path: str) -> list[str]:
    """Which files of a folder are the optimizer's state of ZeRO stages 1 and 2, where each weight is whole in
    ``mp_rank_00_model_states.pt``.

    Raises MdlError (INPUT) where weights are not whole in any file: stage 3, and tensor or pipeline parallelism.
    """
    names = list(names)
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        raise input_error(
            f"this folder is a DeepSpeed ZeRO-3 checkpoint: its weights lie flat and in parts, one for each process"
            f" ({shards[0]} and {len(shards) - 1} more like it hold placeholders)",
            path,
            "gather them with the script that DeepSpeed put into the folder above: python zero_to_fp32.py . OUT",
        )
    ranks = [name for name in names if _WEIGHTS.fullmatch(name)]
    if len(ranks) > 1:
        raise input_error(
            f"this folder is a DeepSpeed checkpoint of a model that {len(ranks)} processes shared (mp_rank_00, …): how"
            " their parts join is not recorded in it",
            path,
            "join them with the tool of the trainer that wrote it, such as Megatron-DeepSpeed's",
        )
    return [name for name in names if ranks and _STATE.fullmatch(name)]

"""Tells the files of a DeepSpeed checkpoint apart: which hold weights, which a part of what must be gathered."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import input_error

_WEIGHTS = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_STATE = re.compile(r"(?:bf16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt")


def optimizer_states(names: Iterable[str], path: str) -> list[str]:
    """Which files of a folder are the optimizer's state of ZeRO stages 1 and 2, where each weight is whole in
    ``mp_rank_00_model_states.pt``.

    Raises MdlError (INPUT) where weights are not whole in any file: tensor or pipeline parallelism. Stage 3 is read by
    zero3.py.
    """
    names = list(names)
    ranks = [name for name in names if _WEIGHTS.fullmatch(name)]
    if len(ranks) > 1:
        raise input_error(
            f"this folder is a DeepSpeed checkpoint of a model that {len(ranks)} processes shared (mp_rank_00, …): how"
            " their parts join is not recorded in it",
            path,
            "join them with the tool of the trainer that wrote it, such as Megatron-DeepSpeed's",
        )
    return [name for name in names if ranks and _STATE.fullmatch(name)]

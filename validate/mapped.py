"""The forward of a target class on what a mapping makes of the checkpoint: to try hypotheses with, and no reference.

A family whose forward nobody has written yet can be held against its user's own code all the same: with the right
mapping and the right constants the class computes what that code computes, with any other it does not. As the
reference of a verification it would be worth nothing, since a mistake in the mapping would be on both sides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from ..convert.prepare import Prepared
from ..convert.stored import Files
from ..convert.write import lazy_targets
from .record import Forward
from .reference import Reference, logits_of

if TYPE_CHECKING:
    import torch


def mapped_reference(prepared: Prepared) -> Reference:
    """transformers' class, or the composable decoder's twin, with the layout's weights. Raises MdlError (INPUT) for a
    plan with problems, or a class of which there is no forward here."""
    replace(prepared.plan, open=()).refuse()
    from ..archs.eager.huggingface import of_config

    module = of_config(prepared.config)
    module.load_state_dict(_weights(prepared), strict=True, assign=True)
    forward = Forward(module, f"{prepared.target} on what {prepared.arch.name} maps")
    forward.vocab = prepared.dims.integer("vocab")
    return Reference(forward.name, logits_of(forward), module=module)


def _weights(prepared: Prepared) -> dict[str, torch.Tensor]:
    """The layout's tensors in float32 (float64 stays float64), without a layout."""
    import numpy as np
    import torch

    made: dict[str, torch.Tensor] = {}
    with Files() as files:
        for step in prepared.plan.writes:
            for name, value in zip(step.targets, lazy_targets(files, step), strict=True):
                wide = value if value.dtype == "float64" else value.cast("float32")
                made[name] = torch.from_numpy(np.array(wide.read()))
    return made

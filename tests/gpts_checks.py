"""What the tests of the small GPT families do with a checkpoint: convert, bring back, run eagerly, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdl.archs.eager.huggingface import HuggingFace
from mdl.convert.export import export
from mdl.convert.prepare import Options, Prepared, prepare
from mdl.validate.client import Engine
from mdl.validate.reference import builtin_reference
from mdl.validate.verify import verify

from . import checkpoints as make
from . import converted, gpts


def layout(checkpoint: Path, out: Path, given: dict[str, str] | None = None) -> Prepared:
    """Convert without a tokenizer."""
    return converted.layout(checkpoint, out, **(given or {}))


def back(out: Path, lost: str = "mask buffer") -> Any:
    """What ``mdl export`` makes of a layout, loaded by torch; nothing but mask buffers (or ``lost``) may be lost."""
    done = export(out, out.with_suffix(".pt"))
    assert all(lost in problem.what for problem in done.lost), done.lost
    return torch.load(out.with_suffix(".pt"), weights_only=True)


def eager(checkpoint: Path, given: dict[str, str] | None = None, ids: Tensor = gpts.IDS) -> Tensor:
    """Logits [T, V] of the family's eager module for ``ids``, in float64."""
    prepared = prepare(checkpoint, Options(given=given or {}))
    prepared.plan.refuse()
    reference = builtin_reference(prepared.arch, prepared.dims, prepared.plan)
    return reference.logits(ids.tolist(), "float64")


def by_transformers(out: Path, prepared: Prepared, ids: Tensor) -> Tensor:
    """Logits [T, V] of transformers' class on a layout, in float64: code that shares nothing with mdl's."""
    model = HuggingFace(prepared.config)
    model.load_state_dict({name: tensor.double() for name, tensor in make.saved(out).items()})
    with torch.no_grad():
        return model(ids[None])[0]


def is_green(out: Path, engine: Engine) -> None:
    """``mdl verify`` proves the layout, and every check of it was made."""
    report = verify(out, engine=engine)
    assert report.ok, [check for check in report.checks if check.ok is not True]
    assert {check.name for check in report.checks if check.ok} >= {"layout", "coverage", "prefill", "decode"}

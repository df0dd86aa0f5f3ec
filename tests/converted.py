"""From a checkpoint to a layout, and what computes on either side: mdl's eager forward, and transformers' class."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mdl.convert.prepare import Options, Prepared, prepare
from mdl.convert.run import convert
from mdl.validate.reference import builtin_reference

IDS = [(7 * t * t + 3 * t) % 96 for t in range(110)]


def layout(source: Path, out: Path, **given: str) -> Prepared:
    """Convert, without a tokenizer."""
    options = Options(given=given)
    prepared = prepare(source, options)
    convert(prepared, out, tokenizer="none")
    return prepared


def exact(prepared: Prepared, ids: Sequence[int] = IDS) -> torch.Tensor:
    """What mdl's eager forward says in float64: logits [T, V]."""
    return builtin_reference(prepared.arch, prepared.dims, prepared.plan).logits(list(ids), "float64")


def with_dims(made: Prepared, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor, **changed: Any) -> torch.Tensor:
    """Logits [T, V] of the family's eager forward with these tensors, some of its dims changed."""
    module, _, function = made.arch.eager.partition(":")
    model = getattr(importlib.import_module(module), function)({**made.dims, **changed})
    model.load_state_dict(tensors, strict=True, assign=True)
    with torch.no_grad():
        return model(ids[None])[0]


def by_transformers(out: Path, ids: Sequence[int] = IDS) -> torch.Tensor:
    """What the target class makes of a layout, by code that shares nothing with mdl's, in float64: logits [T, V]."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    cls = getattr(transformers, json.loads((out / "config.json").read_text())["architectures"][0])
    model = cls.from_pretrained(out, attn_implementation="eager", experts_implementation="eager").double()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def nmse(measured: torch.Tensor, wanted: torch.Tensor) -> float:
    """Squared error over squared signal, in float64."""
    error = measured.double() - wanted.double()
    return float(error.square().sum() / wanted.double().square().sum())

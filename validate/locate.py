"""Where a failed verification begins: the first module that, fed the reference's own input, answers otherwise.

Every paired module gets what the reference's gets, so errors do not travel and each one's own shows. The faulty one
is then explained: by its stored tensors, by config.json, or by what makes the reference answer the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from ..convert.config import read_config
from ..convert.prepare import Prepared
from ..convert.stored import Files
from .asking import Answer, ask, nmse
from .client import Engine, EngineFailure
from .faults import of_no_numbers
from .hypothesis import Change, Trials, Tried, differences, exchanged, from_config, often_mistaken, reordered
from .pairing import Seen, Unit, below, make_units, stream, watch
from .reference import Reference, builtin_reference
from .report import Located
from .signature import describe, heads, ranges
from .weights import Weights

RATIO = 16.0
"""How many times its floor a module's own error may be."""

ABSOLUTE = 1e-11
"""What no module's error is counted under, unless none exceeds it: kernels may sum in another order."""

SHARE = 1e-5
"""The part of the logits' error that a module's own must be to count as its cause: errors grow on their way through
the layers, but not without bounds, and kernels have errors of their own (vLLM's tanh in capped attention)."""

_SHOWN = 3
_SMALL = 1 << 30  # bytes of weights up to which all of them are compared, not the faulty module's alone


class _Cause(Struct, frozen=True):
    governed_by: str
    words: str


def locate(
    layout: Path,
    prepared: Prepared,
    reference: Reference,
    engine: Engine,
    scratch: Path,
    *,
    ids: list[int],
    failing: float = 0.0,
) -> Located | None:
    """Find the faulty module of a layout that failed on ``ids``, in one load and a few prefills of vLLM.

    ``failing`` is the NMSE of the logits where they are worst, if it is known: no module whose own error is a tiny part
    of that is blamed.

    None if vLLM can't load it, or if no module is at fault on its own. A reference that is not a module here (a plain
    callable, a recording), or whose modules are not named as the checkpoint's tensors are, is stood in for by mdl's
    own; the report says so. Raises MdlError (MACHINE) if vLLM's process dies.
    """
    names = [source.name for step in prepared.plan.writes for source in step.sources]
    seen = watch(reference, ids, names) if reference.exact else None
    stands_in, other = seen is None, reference.other
    if seen is None:
        reference_of_ours = builtin_reference(prepared.arch, prepared.dims, prepared.plan)
        note = _why(reference, names)
        seen, reference = watch(reference_of_ours, ids, names), reference_of_ours
    else:
        note = ""
    if seen is None:
        return None
    units = make_units(prepared.plan, seen, prepared.dims.integer("vocab"))
    answers = ask(reference, seen, units, engine, layout, scratch, ids) if units else []
    if isinstance(answers, EngineFailure):
        return None
    with Files() as files:
        weights = Weights(layout, prepared.plan, _head_counts(prepared), files)
        culprit = find_culprit(answers, weights, least=SHARE * failing)
        if culprit is not None:
            return _located(layout, prepared, seen, answers, culprit, ids, note, weights)
    return _nothing(answers, note, other) if stands_in else _around(layout, prepared, answers)


def find_culprit(answers: Sequence[Answer], weights: Weights | None = None, *, least: float = 0.0) -> Answer | None:
    """The first faulty module that holds no faulty one. If all are under the absolute limit, ``least`` replaces it."""
    for absolute in (ABSOLUTE, least):
        faulty = [a for a in answers if _errs(a, absolute) and not (weights and _joined_elsewhere(a, weights))]
        units = [a.unit for a in faulty]
        for answer in faulty:
            if not any(below(answer.unit, units)):
                return answer
    return None


def _errs(answer: Answer, absolute: float) -> bool:
    return not answer.error <= max(RATIO * answer.floor, absolute)


def _joined_elsewhere(answer: Answer, weights: Weights) -> bool:
    """Right but for one factor or for the order of its columns, with the very weights that the plan makes: one side
    applies the factor inside the module, the other outside (as with Gemma's embedding), or vLLM fuses projections in an
    order of its own (as with Falcon's). Where that is a fault, what follows shows it. Right means down to rounding: a
    norm whose epsilon is wrong is nearly a factor, too."""
    got, exact = answer.got.double(), answer.exact
    factor = float((got * exact).sum() / exact.square().sum())
    if not answer.unit.leaf or not math.isfinite(factor):
        return False
    sorts = got.sort(-1).values, exact.sort(-1).values
    forms = [sorts, (got / factor, exact)] if factor else [sorts]
    alike = any(not _errs(replace(answer, error=nmse(*form)), 0.0) for form in forms)
    return alike and not any(weights.difference(name) for name in answer.unit.tensors)


def _around(layout: Path, prepared: Prepared, answers: Sequence[Answer]) -> Located | None:
    """Every module is right on its own: what config.json says otherwise concerns what joins them."""
    found = differences(read_config(layout), prepared.config)
    if not found:
        return None
    said = "; ".join(f"{path} is {a!r} for {b!r}" for path, (a, b) in found.items())
    words = "every module answers as the reference's does, so the fault is in what joins them: a scale, a cap"
    cause = "config.json: " + ", ".join(found)
    return Located("", "", 0.0, 0.0, words, cause, f"weights are as the checkpoint says; {said}", _layers(answers))


def _why(reference: Reference, names: Sequence[str]) -> str:
    if reference.closed:
        return (
            f"{reference.name} {reference.closed}, so mdl's own eager forward stood in (to have yours looked into, "
            "verify with --reference FILE.py:FUNCTION in an environment that has vLLM too, without --reference-python)"
        )
    module = names[0].rpartition(".")[0] if names else ""
    return (
        f"no module of {reference.name} is named as the checkpoint's tensors are, so mdl's own eager forward stood in "
        f"(to have yours looked into, return from build a torch.nn.Module with submodules such as {module})"
    )


def _nothing(answers: Sequence[Answer], note: str, other: str) -> Located:
    """The layout is what mdl makes of it. Where the reference saw another checkpoint, that comes before its code."""
    words = "vLLM's modules compute what mdl's own eager forward computes: the reference is another model"
    if other:
        note = f"record it again from this checkpoint; {note}"
    return Located("", "", 0.0, 0.0, words, other or "the reference's own code", note, _layers(answers))


def _layers(answers: Sequence[Answer]) -> tuple[tuple[str, float, float], ...]:
    return tuple((a.unit.key, a.error, a.floor) for a in answers)


def _located(
    layout: Path,
    prepared: Prepared,
    seen: Seen,
    answers: Sequence[Answer],
    culprit: Answer,
    ids: list[int],
    note: str,
    weights: Weights,
) -> Located:
    call = seen.calls[culprit.unit.modules[0]]
    signature = describe(culprit.got, culprit.exact, stream(call), ids, culprit.floor)
    if not culprit.unit.leaf:
        signature += _heads(prepared, seen, culprit, [a.unit for a in answers])
    cause = _by_weights(weights, culprit.unit) or _by_trial(layout, prepared, Trials(prepared, seen, culprit, ids))
    words = "; ".join(part for part in (cause.words, _of_no_numbers(layout, culprit), note) if part)
    return Located(
        culprit.unit.key,
        culprit.served + _part(culprit),
        culprit.error,
        culprit.floor,
        signature,
        cause.governed_by,
        words,
        _layers(answers),
    )


def _of_no_numbers(layout: Path, answer: Answer) -> str:
    import torch

    if bool(answer.got.isfinite().all()):
        return ""
    return of_no_numbers(read_config(layout), torch.backends.cpu.get_cpu_capability())


def _part(answer: Answer) -> str:
    """Which slice of a fused module it is."""
    last = answer.served.rpartition(".")[2]
    own = [target.split(".")[-2] for target in answer.unit.targets]
    fused = answer.unit.leaf and not answer.unit.head and last not in own
    return f" ({', '.join(own)})" if fused else ""


def _heads(prepared: Prepared, seen: Seen, culprit: Answer, units: Sequence[Unit]) -> str:
    """Which heads err, if the module ends in a projection of heads."""
    count, size = prepared.dims.get("heads"), prepared.dims.get("head_dim")
    last = max((u for u in below(culprit.unit, units) if u.leaf), key=lambda u: u.at, default=None)
    weight = getattr(seen.calls[last.modules[0]].module, "weight", None) if last is not None else None
    if not isinstance(count, int) or weight is None or weight.dim() != 2:
        return ""
    width = size if isinstance(size, int) else weight.shape[1] // count
    if weight.shape[1] != count * width:
        return ""
    found = heads(culprit.got.double() - culprit.exact, weight.detach(), width)
    if not found:
        return ""
    return "; in all heads" if len(found) == count else f"; only in {ranges('head', found)} of {count}"


def _head_counts(prepared: Prepared) -> tuple[int, ...]:
    counts = (prepared.dims.get(name) for name in ("heads", "kv_heads"))
    return tuple(sorted({n for n in counts if isinstance(n, int)}))  # the coarsest order that fits says most


def _by_weights(weights: Weights, unit: Unit) -> _Cause | None:
    """The stored tensors against what the plan makes: exact, and often the whole answer."""
    own = {name: words for name in unit.tensors if (words := weights.difference(name))}
    if not own:
        return None
    others = 0
    if weights.plan.nbytes <= _SMALL:
        others = sum(bool(weights.difference(name)) for name in weights.steps() if name not in unit.tensors)
    steps = weights.steps()
    rules = dict.fromkeys(f"{steps[name].rule} makes {name}" for name in own)
    words = [*own.values()][:_SHOWN]
    more = [f"tensors of other modules that differ too: {others}"] if others else []
    return _Cause("mapping: " + ", ".join(rules), "; ".join(["the layout is not what the plan makes", *words, *more]))


def _by_trial(layout: Path, prepared: Prepared, trials: Trials) -> _Cause:
    config = read_config(layout)
    same = "weights are as the checkpoint says"
    found = trials.best(from_config(prepared, config))
    if found is None:
        found = trials.best(iter([Change("mdl's own eager forward answers as vLLM does", "the reference's own code")]))
    found = found or trials.best(often_mistaken(prepared))
    inside = _inside(prepared, trials.answer.unit)
    found = found or trials.best(reordered(prepared, inside)) or trials.best(exchanged(prepared, inside))
    if found is not None:
        return _Cause(found.change.governed_by, f"{same}; {_fall(found, trials.answer)}")
    said = [f"{path} is {a!r} for {b!r}" for path, (a, b) in differences(config, prepared.config).items()]
    if said:
        fields = ", ".join(differences(config, prepared.config))
        return _Cause(f"config.json: {fields}", f"{same}, so the config decides: {'; '.join(said)}")
    rules = dict.fromkeys(rule for _, rule in inside.values())
    return _Cause(f"mapping: {', '.join(rules)}", f"{same} and so is config.json; nothing that was tried explains it")


def _fall(found: Tried, answer: Answer) -> str:
    return f"{found.change.words}: so changed, the reference's error falls from {answer.error:.1e} to {found.left:.1e}"


def _inside(prepared: Prepared, unit: Unit) -> dict[str, tuple[str, str]]:
    """Raw tensor → (stored tensor, rule), of everything in a unit."""
    steps = [step for step in prepared.plan.writes if set(step.targets) & set(unit.tensors)]
    return {source.name: (step.targets[0], step.rule) for step in steps for source in step.sources}

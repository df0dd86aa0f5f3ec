"""`mdl verify --decide NAME=A,B`: which of several values does the user's own forward compute with?

The family's eager forward runs with every combination of the candidates, in float64, on a few short sequences, and is
held against the user's forward in float64. No vLLM runs. A value is decided if

- the forward with it passes the gate of a verification (:mod:`.compare`): its distance is that of rounding;
- the best of the other values is :data:`SEPARATION` times further away;
- what is left of its distance is rounding, and no step towards the other value: of 1e-5 and 1e-6 neither is right where
  the code computes with 2e-6, however near the nearer is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from ..convert.prepare import Options, Prepared, prepare
from . import facts
from .candidates import Combination, combinations
from .choose import choose_reference
from .compare import Distance, distance, judge
from .decision import Answer, Candidate, Decision
from .inputs import Input, Inputs, make_inputs
from .mapped import mapped_reference
from .reference import Reference, builtin_reference, check_vocabulary

if TYPE_CHECKING:
    import torch

    from .verify import Settings

SEPARATION = 100.0
"""How many times further the next value must be. Right forwards of one model measured 0.3 to 3 times the reference's
rounding, so two that are equally right lie within 10 of each other; the weakest mistakes known, several hundred."""

EXACT = 1e-24
"""NMSE below which two float64 forwards are the same: where both compute in float64 throughout, mdl's eager modules and
other code of the same model measure 1e-31 to 1e-25."""

STEP = 1e-6
"""How far towards the other value what is left may point: constants that one side keeps in float32 are off by 1e-7."""

ALIGNED = 0.5
"""Squared cosine between what is left and the step to the other value. Rounding measures 1e-3 and less, another value
of the same hyperparameter nearly 1."""

_CUT = 96
_BUDGET = 1 << 26


class Truth(Struct, frozen=True):
    """The user's side: the reference, and per sequence its exact logits [T, V] and its own float32 error.

    ``floors`` is empty where the reference has no float64 run.
    """

    reference: Reference
    inputs: Inputs
    exact: tuple[torch.Tensor, ...]
    floors: tuple[Distance, ...]


class _Tried(Struct, frozen=True):
    """A combination that ran."""

    combination: Combination
    nmse: float
    floor: float
    fits: bool


def decide_checkpoint(
    path: Path, options: Options, settings: Settings, command: Callable[[Mapping[str, str]], str]
) -> Decision:
    """Decide before there is a layout: ``path`` is a raw checkpoint. Raises MdlError like a conversion and a reference.

    ``command`` makes the command line that converts with the values it is given.
    """
    made, refused = combinations(settings.decide, lambda values: prepare(path, with_values(options, values)))
    return decide(made, refused, settings, choose_reference(made[0].prepared, settings), command)


def with_values(options: Options, values: Mapping[str, str]) -> Options:
    """The options with these values set, in place of what they said of the same names."""
    return replace(options, given={**options.given, **values})


def decide(
    made: Sequence[Combination],
    refused: Sequence[Candidate],
    settings: Settings,
    reference: Reference,
    command: Callable[[Mapping[str, str]], str],
) -> Decision:
    """Run every combination, and judge. Raises MdlError (INPUT) for a reference with another vocabulary."""
    truth = _truth(reference, [one.prepared for one in made], settings.seed or 0)
    tried = sorted((_try(one, truth) for one in made), key=lambda t: t.nmse)
    answers = tuple(_answer(name, tried, truth) for name in settings.decide)
    first = made[0].prepared
    values = {answer.name: answer.value for answer in answers if answer.value is not None}
    return Decision(
        ok=len(values) == len(answers),
        contradicted=any(answer.outside for answer in answers),
        answers=answers,
        candidates=(*(Candidate(t.combination.values, t.nmse, t.fits) for t in tried), *refused),
        floor=tried[0].floor,
        separation=SEPARATION,
        reference=reference.name,
        checkpoint=first.inventory.path,
        arch=first.arch.name,
        inputs=facts.describe(truth.inputs),
        seed=truth.inputs.seed,
        notes=(*reference.notes, *first.inventory.remarks),
        command=command(values) if len(values) == len(answers) else "",
    )


def _truth(reference: Reference, ready: Sequence[Prepared], seed: int) -> Truth:
    vocab = ready[0].dims.integer("vocab")
    context = min(one.dims.integer("context") for one in ready)
    inputs = _some(reference.inputs) if reference.inputs else _short(vocab, context, seed)
    exact: list[torch.Tensor] = []
    for one in inputs.sequences:
        exact.append(reference.logits(list(one.ids), "float64" if reference.exact else "float32").clone())
        check_vocabulary(reference, exact[-1], vocab)
    pairs = zip(inputs.sequences, exact, strict=True)
    floors = [reference.floor(list(one.ids), "float32", right) for one, right in pairs] if reference.exact else []
    return Truth(reference, inputs, tuple(exact), tuple(floors))


def _short(vocab: int, context: int, seed: int) -> Inputs:
    """A few sequences: some of the vocabulary, and a long one, since rotations and windows don't show in short ones."""
    dealt = make_inputs(vocab, context, seed=seed).sequences
    long = max(_CUT, _BUDGET // vocab)
    some = [Input(one.kind, one.ids[:_CUT]) for one in dealt[:-1][:3]]
    return Inputs((*some, Input(dealt[-1].kind, dealt[-1].ids[:long])), vocab, seed)


def _some(inputs: Inputs) -> Inputs:
    """Of what was recorded, as many."""
    long = [one for one in inputs.sequences if one.kind == "long"]
    return replace(inputs, sequences=(*[one for one in inputs.sequences if one.kind != "long"][:3], *long[:1]))


def _eager(one: Combination) -> Reference:
    prepared = one.prepared
    if not prepared.arch.eager:  # a draft's is still to be written
        return mapped_reference(prepared)
    return builtin_reference(prepared.arch, prepared.dims, prepared.plan)


def _try(one: Combination, truth: Truth) -> _Tried:
    """The family's forward with these values against the user's."""
    eager = _eager(one)
    ids = [list(sequence.ids) for sequence in truth.inputs.sequences]
    wide = [eager.logits(some, "float64").clone() for some in ids]
    measured = [distance(logits, right) for logits, right in zip(wide, truth.exact, strict=True)]
    # without a float64 run of the user's code, what rounding makes is told by the family's own forward
    floors = truth.floors or [distance(eager.logits(some, "float32"), w) for some, w in zip(ids, wide, strict=True)]
    verdict = judge(measured, list(floors))
    return _Tried(one, verdict.nmse, verdict.floor, verdict.ok)


def _answer(name: str, tried: Sequence[_Tried], truth: Truth) -> Answer:
    """One hyperparameter: the best of its values against the best of its other values, whatever the rest is."""
    best = tried[0]
    value = best.combination.values[name]
    others = (t for t in tried if t.combination.values[name] != value)
    other = next((t for t in others if math.isfinite(t.nmse)), None)
    rival = other.combination.values[name] if other else ""
    ratio = other.nmse / max(best.nmse, _same(truth), 1e-300) if other else float("inf")
    left = f"at NMSE {best.nmse:.1e}, where rounding makes {best.floor:.1e}"

    def answer(why: str, found: str | None = None, *, outside: bool = False) -> Answer:
        said = f"{name} = {found}: {why}" if found is not None else f"{name} is not decided: {why}"
        return Answer(name, found, value, rival, ratio, outside, said)

    if not best.fits:
        nearest = " ".join(f"{n}={v}" for n, v in best.combination.values.items())
        return answer(
            f"the reference computes with none of the candidates; {nearest} is the nearest, {left}", outside=True
        )
    if other is None:
        return answer(f"{value} is {left}, but with its other values nothing finite comes out to hold it against")
    if step := _step(best, other, truth):
        way = f"it lies {step:.1g} of the way from {value} to {rival}"
        why = f"the reference computes with none of the candidates; {value} is {left}, but that is no rounding: {way}"
        return answer(why, outside=True)
    if not ratio >= SEPARATION:
        far = f"{value} is at NMSE {best.nmse:.1e}, {rival} at {other.nmse:.1e}; rounding makes {best.floor:.1e}"
        return answer(f"on these inputs {value} and {rival} can't be told apart ({far})")
    times = f"{ratio:.1e} times" if best.nmse > _same(truth) else f"more than {ratio:.0e} times"
    return answer(f"it is {left}; the next, {rival}, is at {other.nmse:.1e}, {times} further", value)


def _same(truth: Truth) -> float:
    """NMSE below which a forward in float64 is the reference's."""
    return EXACT if truth.reference.exact else 0.0


def _step(best: _Tried, other: _Tried, truth: Truth) -> float:
    """How far towards the other forward the reference lies, as a part of the way; 0 where what is left is rounding."""
    if best.nmse <= _same(truth):
        return 0.0
    near, far = _eager(best.combination), _eager(other.combination)
    both = rest = way = 0.0
    for one, right in zip(truth.inputs.sequences, truth.exact, strict=True):
        here = near.logits(list(one.ids), "float64")
        left, whole = right.double() - here, far.logits(list(one.ids), "float64") - here
        both += float((left * whole).sum())
        rest += float(left.square().sum())
        way += float(whole.square().sum())
    if not rest * way > 0 or both * both <= ALIGNED * rest * way:
        return 0.0
    step = both / way
    return step if abs(step) > STEP else 0.0

"""`--decide NAME=A,B`: what is asked, and the checkpoint prepared with every combination of the candidates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

from msgspec import Struct
from msgspec.structs import replace

from ..convert.prepare import Prepared
from ..errors import MdlError, Problem, usage_error
from .decision import Candidate

MOST = 64
"""Combinations that are tried: each is a forward pass in float64 of the whole model."""
_EXAMPLE = "for example --decide activation=gelu,gelu_new"
Asked = Mapping[str, tuple[str, ...]]
"""Hyperparameter → its candidates, as texts."""


def parse_decide(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What the options say. Raises MdlError (USAGE) for what asks nothing, asks twice, or asks too much."""
    asked: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not name or not equals:
            raise usage_error(f"--decide {text}: expected NAME=A,B", do=_EXAMPLE)
        values = tuple(_split(rest))
        if name in asked:
            raise usage_error(f"--decide {name} is there twice", do="give all of its candidates in one option")
        if "" in values or len(values) < 2:
            raise usage_error(f"--decide {text}: expected two candidates or more, with commas between", do=_EXAMPLE)
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise usage_error(f"--decide {text}: {twice} is there twice", do="leave one of them out")
        asked[name] = values
    check_count(asked)
    return asked


def check_count(asked: Asked) -> None:
    """Raise MdlError (USAGE) for more combinations than are tried."""
    count = 1
    for values in asked.values():
        count *= len(values)
    if count > MOST:
        counts = " x ".join(str(len(values)) for values in asked.values())
        do = "decide one after the other: first the one that changes most, then --set it and decide the next"
        raise usage_error(f"--decide asks for {counts} = {count} combinations, and {MOST} are tried at most", do=do)


def _split(text: str) -> Iterator[str]:
    """The candidates. Commas inside brackets, braces or quotes belong to a value: tables and lists come as JSON."""
    depth, quoted, begin = 0, False, 0
    for at, c in enumerate(text):
        quoted ^= c == '"'
        depth += 0 if quoted else (c in "[{") - (c in "]}")
        if c == "," and depth == 0 and not quoted:
            yield text[begin:at].strip()
            begin = at + 1
    yield text[begin:].strip()


class Combination(Struct, frozen=True):
    """One value for each name, and the checkpoint prepared with them."""

    values: Mapping[str, str]
    prepared: Prepared


def combinations(
    asked: Asked, prepare: Callable[[Mapping[str, str]], Prepared]
) -> tuple[list[Combination], list[Candidate]]:
    """All that can be, and those that can't, with the reason. ``prepare`` makes the checkpoint ready with some values.

    Raises MdlError where a value goes with none of the others (a name that the family doesn't have, a word that is no
    number): that is a mistake in the question.
    """
    made: list[Combination] = []
    refused: list[tuple[Mapping[str, str], MdlError]] = []
    for chosen in itertools.product(*asked.values()):
        values = dict(zip(asked, chosen, strict=True))
        try:
            prepared = prepare(values)
            replace(prepared.plan, open=()).refuse()  # a draft is what there is to decide about
            made.append(Combination(values, prepared))
        except MdlError as error:
            refused.append((values, error))
    for name, candidates in asked.items():
        for value in candidates:
            if not any(one.values[name] == value for one in made):
                raise _asked_wrongly(next(e for values, e in refused if values[name] == value), asked)
    _differ(made)
    return made, [Candidate(v, float("inf"), fits=False, refused=e.problems[0].what) for v, e in refused]


def _asked_wrongly(error: MdlError, asked: Asked) -> MdlError:
    """The error, with what was asked: the values are taken as --set takes them, and the problem speaks of that."""
    with_ = "with " + " ".join(f"--decide {name}={','.join(values)}" for name, values in asked.items())
    return MdlError(
        error.kind, [Problem(p.what, f"{p.where}, {with_}" if p.where else with_, p.do) for p in error.problems]
    )


def _differ(made: list[Combination]) -> None:
    """Raise MdlError (USAGE) where two candidates are one value: 1e-5 and 0.00001."""
    for one, other in itertools.combinations(made, 2):
        if dict(one.prepared.dims) == dict(other.prepared.dims):
            name = next(name for name, value in one.values.items() if other.values[name] != value)
            what = f"--decide {name}: {one.values[name]} and {other.values[name]} are the same value"
            raise usage_error(what, "", "leave one of them out")

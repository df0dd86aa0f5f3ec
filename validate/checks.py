"""From what both sides computed to verdicts: one function per tier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from ..convert.manifest import Manifest
from ..errors import Problem
from .client import EngineFailure, EngineResult, ScenarioResult
from .compare import CEILING, DTYPE_RATIO, RATIO, Distance, Verdict, distance, judge
from .inputs import Inputs
from .report import Check, Evidence
from .scenarios import Case, Piece

if TYPE_CHECKING:
    import torch

_SHOWN = 8
_PAIRS = 2000


class Expected(Struct, frozen=True):
    """The reference's side of a run: per sequence, a file with the exact logits and its own float32 error.

    ``exact`` is False where no float64 run was possible: then "exact" is the float32 run and only the ceiling binds.
    """

    name: str
    inputs: Inputs
    files: tuple[Path, ...]
    floors: tuple[Distance, ...]
    exact: bool

    def logits(self, sequence: int) -> torch.Tensor:
        """The exact logits [T, V] of a sequence."""
        from safetensors.torch import load_file

        return load_file(self.files[sequence])["logits"]


class Compared(Struct, frozen=True):
    """One request's rows: where they belong, and how far they are from the exact logits."""

    piece: Piece
    positions: tuple[int, ...]
    measured: Distance
    floor: Distance
    steps: tuple[int, ...]

    @property
    def again(self) -> int:
        """Positions that were computed more than once: the request was preempted."""
        return len(self.positions) - len(set(self.positions))

    @property
    def spared(self) -> int:
        """Positions that the prefix cache spared."""
        return self.piece.total - len(set(self.positions))


def layout_check(problems: Sequence[Problem], manifest: Manifest) -> Check:
    """Files, headers, hashes, shapes, tokenizer, and the bytes against the checkpoint."""
    detail = [" ".join(part for part in (p.where, p.what) if part) for p in problems]
    measured = f"{len(manifest.tensors)} tensors, {len(problems)} faults"
    return Check("layout", not problems, measured, "0 faults", few(detail), {"faults": float(len(problems))})


def coverage_check(result: EngineResult) -> Check:
    """Every parameter was filled from the files, every tensor was used, and what arrived is what was stored."""
    c = result.coverage
    detail = [f"nothing was loaded into {name} ({n} of {size} values)" for name, (n, size) in c.unloaded.items()]
    detail += [f"vLLM ignored {name}" for name in c.unconsumed]
    detail += [f"vLLM used {name} more than once" for name in c.repeated]
    detail += [f"vLLM used only part of {name}" for name in c.partial]
    detail += [f"{count} values of {name} are others in vLLM's parameters" for name, count in c.differing.items()]
    wrong = len(detail)
    detail += [f"{name} was not checked (its type knows no NaN)" for name in c.unchecked]
    if not c.audited:
        detail.append("vLLM's loader could not be followed, so it is not known which tensors were used")
    same = c.pulled - len(c.differing)
    measured = f"{c.stored} tensors in, {same} bit-equal in vLLM, {wrong} faults" if c.audited else "not audited"
    return Check("coverage", wrong == 0 and c.audited, measured, "0 faults", few(detail), {"faults": float(wrong)})


def failed_to_run(failure: EngineFailure, rest: Iterable[str]) -> list[Check]:
    """vLLM refused the layout: coverage fails with its words, what would follow was not run."""
    detail = (f"vLLM could not {failure.phase} the layout: {failure.type}: {failure.message}",)
    coverage = Check("coverage", False, f"failed to {failure.phase}", "", detail)
    return [coverage, *(Check(name, None, "not run", "") for name in rest)]


def compare_case(case: Case, result: ScenarioResult, expected: Expected) -> list[Compared] | str:
    """The rows of every request against the reference, or what is wrong with them in words."""
    from safetensors.torch import load_file

    got = load_file(result.file)
    compared: list[Compared] = []
    for k, (piece, span) in enumerate(zip(case.pieces, result.spans(), strict=True)):
        positions: list[int] = got["positions"][span].tolist()
        ids = expected.inputs.sequences[piece.sequence].ids
        if got["input_ids"][span].tolist() != [ids[p] for p in positions if p < len(ids)]:
            return f"{case.scenario.name}: vLLM computed other tokens than it was given"
        missing = set(range(piece.first, piece.total)) - set(positions)
        if missing:
            return f"{case.scenario.name}: vLLM did not compute position {min(missing)} of {piece.total}"
        exact = expected.logits(piece.sequence)[positions]
        measured = distance(got["logits"][span], exact)
        floor = expected.floors[piece.sequence].at(positions)
        compared.append(Compared(piece, tuple(positions), measured, floor, result.requests[k].qlens))
    return compared


def parity_check(name: str, compared: Sequence[Compared] | str, expected: Expected, notes: Sequence[str] = ()) -> Check:
    """The float32 gate over some cases."""
    if isinstance(compared, str):
        return Check(name, False, "incomplete", "every position", (compared,))
    v = judge([c.measured for c in compared], [c.floor for c in compared])
    at = compared[v.sequence]
    kind = expected.inputs.sequences[at.piece.sequence].kind
    where = f"worst at position {at.positions[v.position]} of a {kind} sequence: NMSE {v.worst:.1e}"
    figures = {"nmse": v.nmse, "floor": v.floor, "ratio": v.ratio, "worst": v.worst, "worst_ratio": v.worst_ratio}
    if not expected.exact:
        return Check(name, v.nmse <= CEILING, f"NMSE {v.nmse:.1e}", f"{CEILING:.0e}", (where, *notes), figures)
    measured = f"NMSE {v.nmse:.1e} = {v.ratio:.2g} x reference's {v.floor:.1e}"
    where += f" = {v.worst_ratio:.2g} x the reference's worst"
    if v.ceiling > CEILING:
        notes = (*notes, f"rounding alone is near {CEILING:.0e} here: mistakes below {v.ceiling:.1e} would not show")
    return Check(name, v.ok, measured, f"{RATIO:g} x, {v.ceiling:.0e}", (where, *notes), figures)


def decode_check(compared: Sequence[Compared] | str, expected: Expected) -> Check:
    """Decoding, chunks, a mixed batch, preemption and the prefix cache, all against the same exact logits."""
    if isinstance(compared, str):
        return parity_check("decode", compared, expected)
    counts = {
        "steps": sum(1 for c in compared for n in c.steps if n == 1),
        "chunks": sum(1 for c in compared if sum(n > 1 for n in c.steps) > 1),
        "again": sum(c.again for c in compared),
        "spared": sum(c.spared for c in compared),
    }
    note = "{steps} one-token steps, {chunks} prompts in chunks, {again} positions preempted, {spared} cached"
    check = parity_check("decode", compared, expected, (note.format(**counts),))
    return replace(check, figures={**check.figures, **{name: float(count) for name, count in counts.items()}})


def generate_check(tokens: Sequence[int], exact: torch.Tensor, floor: Distance) -> Check:
    """vLLM's greedy tokens are the reference's; where two logits are as close as rounding, a tie is named.

    ``exact`` are the reference's logits [N, V] at the positions that predict the N tokens.
    """
    ties: list[str] = []
    for k, token in enumerate(tokens):
        gap = float(exact[k].max() - exact[k][token])
        noise = RATIO * (floor.error[k] / exact.shape[-1]) ** 0.5
        if gap > noise:
            best = int(exact[k].argmax())
            detail = f"token {k} is {token}, the reference's is {best} (its logit is {gap:.2g} higher)"
            return Check("generate", False, f"{k} of {len(tokens)} tokens equal", "all", (detail,))
        if gap > 0:
            ties.append(f"token {k} is a tie: two logits {gap:.1e} apart, rounding makes {noise:.1e}")
    return Check("generate", True, f"{len(tokens)} greedy tokens equal", "all", few(ties), {"ties": float(len(ties))})


def recorded_check(tokens: Sequence[int], recorded: Sequence[int], exact: torch.Tensor, floor: Distance) -> Check:
    """The same against a recorded continuation, which knows no other prefixes than its own.

    ``exact`` and ``floor`` are at the positions that predict the ``recorded`` tokens. vLLM's tokens are judged up to
    and with the first that is another; if that one is a tie, the rest can't be.
    """
    same = next((k for k, pair in enumerate(zip(tokens, recorded, strict=False)) if pair[0] != pair[1]), len(recorded))
    judged = list(tokens[: same + 1])
    check = generate_check(judged, exact[: len(judged)], floor.at(range(len(judged))))
    if not check.ok or len(judged) == len(tokens):
        return check
    rest = f"after that tie the recording knows no more: {len(tokens) - len(judged)} tokens were not judged"
    measured = f"{same} of {len(tokens)} greedy tokens equal, then a tie"
    return replace(check, measured=measured, detail=(*check.detail, rest))


def dtype_check(dtype: str, measured: Sequence[Distance], floors: Sequence[Distance]) -> Check:
    """The serving type: vLLM may be no further from the exact logits than eager PyTorch in that type, times two."""
    v: Verdict = judge(list(measured), list(floors))
    figures = {"nmse": v.nmse, "floor": v.floor, "ratio": v.ratio, "worst": v.worst, "worst_ratio": v.worst_ratio}
    text = f"NMSE {v.nmse:.1e} = {v.ratio:.2g} x eager {dtype}'s {v.floor:.1e}"
    ok = v.ratio <= DTYPE_RATIO and v.worst_ratio <= 2 * DTYPE_RATIO
    detail = f"as good as eager {dtype}; {dtype} alone proves no conversion, float32 does" if ok else ""
    return Check(f"dtype {dtype}", ok, text, f"{DTYPE_RATIO:g} x", few([detail] if detail else []), figures)


def gather_evidence(
    cases: Sequence[Case], results: Sequence[ScenarioResult], groups: Sequence[list[Compared] | str], expected: Expected
) -> Evidence | None:
    """What the pictures need, from the prefill cases and what was compared of each."""
    from safetensors.torch import load_file

    measured: list[tuple[float, ...]] = []
    pairs: list[tuple[float, float]] = []
    for case, result, compared in zip(cases, results, groups, strict=True):
        if isinstance(compared, str):
            return None
        order = sorted(range(len(compared[0].positions)), key=compared[0].positions.__getitem__)
        each = compared[0].measured.each
        measured.append(tuple(each[k] for k in order))
        pairs += _sample(load_file(result.file), expected.logits(case.pieces[0].sequence), _PAIRS // len(cases) + 1)
    kinds = tuple(expected.inputs.sequences[case.pieces[0].sequence].kind for case in cases)
    floors = tuple(tuple(expected.floors[case.pieces[0].sequence].each) for case in cases)
    return Evidence(kinds, tuple(measured), floors, tuple(pairs[:_PAIRS]))


def _sample(got: dict[str, torch.Tensor], exact: torch.Tensor, count: int) -> Iterator[tuple[float, float]]:
    """Logit pairs spread evenly over positions and vocabulary."""
    logits, right = got["logits"], exact[got["positions"]]
    step = max(1, logits.numel() // count)
    flat = range(0, logits.numel(), step)
    width = logits.shape[-1]
    for at in flat:
        yield float(right[at // width, at % width]), float(logits[at // width, at % width])


def few(lines: Sequence[str]) -> tuple[str, ...]:
    """The first lines, and how many more there are."""
    rest = len(lines) - _SHOWN
    return tuple(lines[:_SHOWN]) + ((f"… and {rest} more",) if rest > 0 else ())

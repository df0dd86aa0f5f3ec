"""`mdl verify`: runs the original and vLLM on the same tokens, and says whether they are the same model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from ..archs.given import ConfigFile
from ..archs.served.own import own_of
from ..convert.check import unreadable
from ..convert.config import read_config
from ..convert.locks import reading
from ..convert.manifest import Manifest, read_manifest
from ..convert.prepare import Prepared
from ..convert.tokenizer import Checked
from ..errors import Kind, MdlError, Problem
from . import checks, facts, scenarios
from .checks import Expected
from .choose import check_settings, choose_reference, mapping_note, source_of
from .client import Engine, EngineFailure, EngineResult, Scenario
from .compare import Distance, distance
from .decide_layout import decide_layout
from .faults import known_faults, naming_faults
from .inputs import Inputs, make_inputs
from .layout import layout_problems, tokenizer_checked
from .reference import Reference, check_vocabulary
from .report import Check, Evidence, Located, Report, manifest_hash

TIERS = ("prefill", "decode", "generate")
Say = Callable[[str], None]
UNASKED = Checked()
"""What is known of a tokenizer that nobody looked at."""


class Settings(Struct, frozen=True):
    """How to verify.

    ``against``, ``arch``, ``config`` and ``merge_lora`` overrule the checkpoint's path, the family (a name, or the path
    of a file), the file of hyperparameters and the adapter's path in the manifest; ``prompts`` are texts; ``seed`` is 0
    unless given, or a golden file's own; ``dtype`` is the serving type, by default the layout's own. The reference is
    the family's eager module, or the user's ``reference`` (FILE.py:FUNCTION, in another environment's
    ``reference_python`` if given, which may take ``reference_timeout`` seconds), or what ``golden`` recorded of it.
    ``attention_backend`` is vLLM's name of one, which it chooses itself if None; the report names what ran.
    ``decide`` asks which of some values (name → texts as --set takes them) that reference computes with, before
    anything else.
    """

    against: Path | None = None
    arch: str | None = None
    config: ConfigFile | None = None
    merge_lora: str | None = None
    reference: str | None = None
    reference_python: str | None = None
    reference_timeout: float | None = None
    golden: Path | None = None
    decide: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    prompts: tuple[str, ...] = ()
    seed: int | None = None
    dtype: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    attention_backend: str | None = None
    locate: bool = True
    command: str = ""


class Side(Struct, frozen=True):
    """The reference's side of a verification, which does not depend on the layout's files: computed once."""

    prepared: Prepared
    reference: Reference
    expected: Expected


def verify(
    layout: Path, settings: Settings | None = None, *, engine: Engine | None = None, say: Say = lambda _: None
) -> Report:
    """Verify a layout. Raises MdlError: INPUT for an unusable layout or reference, MACHINE where vLLM is missing or
    where mdl convert is replacing the layout.

    A wrong layout is not an error but a report whose ``ok`` is False. ``engine`` lends a running engine (tests share
    one); otherwise one is started and ended here. ``say`` receives what is being done, a line at a time.
    """
    settings = settings or Settings()
    check_settings(settings)
    with reading(layout):
        return _verify(layout, settings, engine, say)


def _verify(layout: Path, settings: Settings, engine: Engine | None, say: Say) -> Report:
    say("looking at the layout's files")
    manifest = read_whole(layout)
    prepared = source_of(manifest, settings)
    decided = None
    if settings.decide:
        say("running the reference and each candidate")
        decided = decide_layout(layout, manifest, prepared, settings)
        if decided.wrong:
            return decided.report(layout, prepared, settings)
    with (
        # vLLM imports in its own process while the reference runs in this one
        nullcontext(engine) if engine else Engine(env=_environment(settings)) as running,
        tempfile.TemporaryDirectory(prefix="mdl-verify-") as scratch,
    ):
        begin = time.perf_counter()
        say("running the reference in float32 and float64")
        side = reference_side(layout, prepared, settings, Path(scratch), decided.reference if decided else None)
        spent = time.perf_counter() - begin
        say("comparing the tokenizer with its source")
        tokenizer = tokenizer_checked(layout, manifest)
        report = judge_layout(layout, side, settings, running, Path(scratch), say, tokenizer)
        report = replace(report, seconds={"reference": round(spent, 2), **report.seconds})
        return decided.added_to(report) if decided else report


def read_whole(layout: Path) -> Manifest:
    """The manifest of a layout. Raises MdlError (INPUT) where one of its files is missing or cut, minutes before vLLM
    would fail on it: such a layout says nothing about the model."""
    manifest = read_manifest(layout)
    if problems := unreadable(layout, manifest):
        raise MdlError(Kind.INPUT, problems)
    return manifest


def _environment(settings: Settings) -> dict[str, str]:
    """Several workers on one CPU cannot each have cores of their own, which vLLM insists on unless told otherwise."""
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if _parallel(settings) else {}


def reference_side(
    layout: Path, prepared: Prepared, settings: Settings, scratch: Path, chosen: Reference | None = None
) -> Side:
    """Choose the reference (unless it was ``chosen``) and run it on every sequence; exact logits go to ``scratch``,
    errors stay."""
    prompts = facts.encode(layout, settings.prompts)
    reference = chosen or choose_reference(prepared, settings, prompts)
    inputs = reference.inputs
    if inputs is None:
        vocab, context = prepared.dims.integer("vocab"), prepared.dims.integer("context")
        inputs = make_inputs(vocab, context, seed=settings.seed or 0, prompts=prompts)
    return Side(prepared, reference, run_reference(reference, inputs, scratch, prepared.dims.integer("vocab")))


def run_reference(reference: Reference, inputs: Inputs, scratch: Path, vocab: int) -> Expected:
    """Both runs of the reference on every sequence: all of float32 first, so that weights are converted once.

    ``vocab`` is how many rows the checkpoint has. Raises MdlError (INPUT) for a reference with another vocabulary.
    """
    from safetensors.torch import save_file

    exact_type = "float64" if reference.exact else "float32"
    recorded = reference.floors.get("float32")
    single = [] if recorded else [reference.logits(list(one.ids), "float32").clone() for one in inputs.sequences]
    files: list[Path] = []
    floors: list[Distance] = []
    for k, one in enumerate(inputs.sequences):
        exact = reference.logits(list(one.ids), exact_type).clone()
        check_vocabulary(reference, exact, vocab)
        floors.append(recorded[k] if recorded else distance(single[k], exact))
        single[k : k + 1] = [exact[:0]]  # its memory is needed for the next ones
        files.append(scratch / f"reference-{k:04d}.safetensors")
        save_file({"logits": exact.contiguous()}, files[-1])
    return Expected(reference.name, inputs, tuple(files), tuple(floors), reference.exact)


def judge_layout(
    layout: Path,
    side: Side,
    settings: Settings,
    engine: Engine,
    scratch: Path,
    say: Say,
    tokenizer: Checked = UNASKED,
) -> Report:
    """The layout's side: its files, then vLLM in float32 in every way, then in the serving type.

    ``tokenizer`` is what its comparison found, which takes seconds and is the same for every copy of a layout.
    """
    begin = time.perf_counter()
    manifest = read_manifest(layout)
    engine.teach(own_of(side.prepared.arch, side.prepared.config))
    say("checking files, hashes and shapes")
    found = [checks.layout_check([*layout_problems(layout, manifest, side.prepared), *tokenizer.problems], manifest)]
    seconds = {"layout": time.perf_counter() - begin}
    say("running vLLM in float32")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        result, evidence = _float32(layout, side, settings, engine, Path(folder), found)
        seconds["vllm"] = time.perf_counter() - begin - sum(seconds.values())
        dtype = settings.dtype or str(read_config(layout).get("dtype", "float32"))
        if dtype != "float32" and isinstance(result, EngineResult):
            say(f"running both in {dtype}")
            found.append(_serving_type(layout, side, settings, engine, Path(folder), dtype))
            seconds[dtype] = time.perf_counter() - begin - sum(seconds.values())
    located, noted = None, (*_noted(side.prepared, manifest, settings), *tokenizer.notes)
    if settings.locate and any(c.ok is False and c.name in ("prefill", "decode") for c in found):
        say("locating the fault")
        located = _locate(layout, side, engine, scratch, evidence)
        seconds["locate"] = time.perf_counter() - begin - sum(seconds.values())
    return Report(
        layout=str(layout),
        checkpoint=side.prepared.inventory.path,
        arch=side.prepared.arch.name,
        target=side.prepared.target,
        reference=side.reference.name,
        dtype=dtype,
        ok=_passed(found),
        checks=tuple(found),
        inputs=facts.describe(side.expected.inputs),
        seed=side.expected.inputs.seed,
        trusted=() if settings.reference or settings.golden else facts.trusted(side.prepared),
        notes=(*side.reference.notes, *noted, *_vllm_notes(layout, result, found)),
        versions=facts.versions(result),
        manifest=manifest_hash(layout),
        command=settings.command,
        seconds={name: round(value, 2) for name, value in seconds.items()},
        evidence=evidence,
        located=located,
    )


def _noted(prepared: Prepared, manifest: Manifest, settings: Settings) -> tuple[str, ...]:
    return (*prepared.inventory.remarks, *_workers_note(settings), *mapping_note(manifest, prepared))


def _workers_note(settings: Settings) -> tuple[str, ...]:
    sizes = " x ".join(f"{name.replace('_', ' ')} {size}" for name, size in _parallel(settings).items())
    if not sizes:
        return ()
    return (f"vLLM ran with {sizes}; a fault is located with one worker, so one that only several show stays unnamed",)


def _parallel(settings: Settings) -> dict[str, Any]:
    """vLLM's arguments for several workers."""
    names = ("tensor_parallel_size", "pipeline_parallel_size")
    return {name: size for name in names if (size := getattr(settings, name)) > 1}


def _asked(settings: Settings) -> dict[str, Any]:
    """What the user said of how vLLM is to run."""
    chosen = {} if settings.attention_backend is None else {"attention_backend": settings.attention_backend}
    return {**_parallel(settings), **chosen}


def _passed(found: Sequence[Check]) -> bool:
    """Nothing failed, and the checks that make a proof were not left out."""
    proofs = {check.name for check in found if check.ok is True}
    return all(check.ok is not False for check in found) and {"layout", "coverage", "prefill", "decode"} <= proofs


def _float32(
    layout: Path, side: Side, settings: Settings, engine: Engine, folder: Path, found: list[Check]
) -> tuple[Any, Any]:
    """All float32 tiers in one engine. Appends their checks; returns vLLM's answer and the evidence."""
    expected, inputs = side.expected, side.expected.inputs
    prefill, decode = scenarios.prefill_cases(inputs), scenarios.decode_cases(inputs)
    generate = scenarios.generate_case(inputs)
    cases = [*prefill, *decode, *([generate] if generate else [])]
    arguments = {**scenarios.engine_settings(inputs), **_asked(settings)}
    with naming_faults(read_config(layout)):
        result = engine.run(layout, [c.scenario for c in cases], dtype="float32", scratch=folder, **arguments)
    if isinstance(result, EngineFailure):
        found += checks.failed_to_run(result, TIERS)
        return result, None
    answered = zip([*prefill, *decode], result.scenarios, strict=False)  # what follows them is free generation
    compared = [checks.compare_case(case, answer, expected) for case, answer in answered]
    found.append(checks.coverage_check(result))
    found.append(checks.parity_check("prefill", _joined(compared[: len(prefill)]), expected))
    found.append(checks.decode_check(_joined(compared[len(prefill) :]), expected))
    if generate:
        found.append(_generate(side, generate.scenario, result.scenarios[-1].requests[0].generated))
    evidence = checks.gather_evidence(prefill, result.scenarios[: len(prefill)], compared[: len(prefill)], expected)
    return result, evidence


def _joined(groups: Sequence[list[checks.Compared] | str]) -> list[checks.Compared] | str:
    """Several cases as one, or the first complaint."""
    complaint = next((group for group in groups if isinstance(group, str)), None)
    return complaint or [c for group in groups if not isinstance(group, str) for c in group]


def _generate(side: Side, scenario: Scenario, tokens: Sequence[int]) -> Check:
    """Ask the reference about vLLM's own continuation: one forward, not one per token."""
    prompt = list(scenario.requests[0].ids)
    if not side.reference.free:
        return _generate_recorded(side.expected, len(prompt), tokens)
    ids = [*prompt, *tokens[:-1]]
    exact = side.reference.logits(ids, "float64" if side.expected.exact else "float32")[len(prompt) - 1 :]
    single = side.reference.logits(ids, "float32")[len(prompt) - 1 :]
    floor = distance(single, exact)
    if not side.expected.exact:  # no float64 run to measure rounding by: borrow what float32 usually costs
        floor = replace(floor, error=tuple(1e-11 * s for s in floor.scale))
    return checks.generate_check(tokens, exact, floor)


def _generate_recorded(expected: Expected, prompt: int, tokens: Sequence[int]) -> Check:
    """A recording can't be asked about new tokens, but it holds the reference's own continuation."""
    at = next((k for k, one in enumerate(expected.inputs.sequences) if one.kind == "greedy"), None)
    if at is None:
        why = "the golden file was recorded without a continuation: record it again"
        return Check("generate", None, "not run", "", (why,))
    ids = expected.inputs.sequences[at].ids
    span = range(prompt - 1, len(ids) - 1)
    return checks.recorded_check(tokens, ids[prompt:], expected.logits(at)[list(span)], expected.floors[at].at(span))


def _serving_type(layout: Path, side: Side, settings: Settings, engine: Engine, folder: Path, dtype: str) -> Check:
    """The same prompts in the serving type, on both sides."""
    name, expected = f"dtype {dtype}", side.expected
    if dtype not in side.reference.dtypes and dtype not in side.reference.floors:
        return Check(name, None, "not run", "", (f"the reference has no {dtype} run",))
    cases = scenarios.prefill_cases(expected.inputs)
    arguments = {**scenarios.engine_settings(expected.inputs), **_asked(settings)}
    result = engine.run(layout, [c.scenario for c in cases], dtype=dtype, scratch=folder, **arguments)
    if isinstance(result, EngineFailure):
        return Check(name, False, f"failed to {result.phase}", "", (f"{result.type}: {result.message}",))
    measured: list[Distance] = []
    floors: list[Distance] = []
    for k, (case, answer) in enumerate(zip(cases, result.scenarios, strict=True)):
        compared = checks.compare_case(case, answer, expected)
        if isinstance(compared, str):
            return Check(name, False, "incomplete", "every position", (compared,))
        measured.append(compared[0].measured)
        ids = list(expected.inputs.sequences[k].ids)
        floors.append(side.reference.floor(ids, dtype, expected.logits(k)))
    return checks.dtype_check(dtype, measured, floors)


def _vllm_notes(layout: Path, result: EngineResult | EngineFailure, found: Sequence[Check]) -> tuple[str, ...]:
    """What is to be said about vLLM itself: the engine's notes, the faults that this model would have without mdl, and
    for a failure all that are known."""
    failed = any(c.ok is False for c in found)
    if isinstance(result, EngineFailure):
        return known_faults(read_config(layout))
    known = known_faults(read_config(layout), result.model_class, evaded=not failed)
    return (*result.notes, *(known if failed or result.device == "cpu" else ()))


def _locate(layout: Path, side: Side, engine: Engine, scratch: Path, evidence: Evidence | None) -> Located | None:
    """Name the module where the difference begins, asking first with the sequence that shows it most.

    The long one is tried too: rotary scaling and windows show only there.
    """
    from .locate import locate

    sequences = side.expected.inputs.sequences
    long = scenarios.long_sequence(side.expected.inputs)
    worst = max(range(len(sequences)), key=lambda k: max(evidence.measured[k])) if evidence else long
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for k in dict.fromkeys((worst, long)):
            ids = list(sequences[k].ids)
            failing = max(evidence.measured[k]) if evidence else 0.0
            found = locate(layout, side.prepared, side.reference, engine, Path(folder), ids=ids, failing=failing)
            if found is not None:
                return found
    return None


def require_ok(report: Report) -> None:
    """Raise MdlError (PARITY) if the report failed."""
    if not report.ok:
        raise MdlError(Kind.PARITY, [Problem(report.verdict, report.layout)])

"""`mdl verify`: runs the original and vLLM on the same tokens, and says whether they are the same model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.manifest import Manifest, fingerprint, own_version, read_manifest
from ..convert.prepare import Options, Prepared, prepare
from ..errors import MdlError, Problem, input_error
from .client import Engine, EngineFailure, EngineResult, Request, Scenario
from .compare import CEILING, RATIO, Distance, Verdict, distance, judge
from .inputs import Inputs, make_inputs
from .layout import layout_problems
from .reference import Reference, builtin_reference, user_reference
from .report import Check, Report, manifest_hash

if TYPE_CHECKING:
    import torch

_SHOWN = 8


@dataclass(frozen=True)
class Settings:
    """How to verify. ``against`` overrules the checkpoint's path in the manifest; ``prompts`` are texts."""

    against: Path | None = None
    reference: str | None = None
    prompts: tuple[str, ...] = ()
    seed: int = 0
    command: str = ""


@dataclass
class _Reference:
    """The reference's float64 logits on disk and its own float32 error, per sequence."""

    files: list[Path]
    floors: list[Distance]


def verify(
    layout: Path,
    settings: Settings | None = None,
    *,
    engine: Engine | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Verify a layout. Raises MdlError: INPUT for an unusable layout or reference, MACHINE where vLLM is missing.

    A wrong layout is not an error but a report whose ``ok`` is False. ``engine`` lends a running engine (tests share
    one); otherwise one is started and ended here. ``say`` receives what is being done, a line at a time.
    """
    settings = settings or Settings()
    manifest = read_manifest(layout)
    prepared = _source(manifest, settings)
    own = engine is None
    running = engine or Engine()  # vLLM imports in its own process while the reference runs in this one
    try:
        with tempfile.TemporaryDirectory(prefix="mdl-verify-") as scratch:
            return _verify(layout, manifest, prepared, settings, running, Path(scratch), say)
    finally:
        if own:
            running.close()


def _source(manifest: Manifest, settings: Settings) -> Prepared:
    """The raw checkpoint that the layout came from, measured afresh: nothing is taken from the layout itself."""
    path = settings.against or Path(manifest.source["path"])
    if not path.exists():
        raise input_error(
            "the checkpoint that this layout came from is not there", str(path), "give it: --against CKPT"
        )
    said = manifest.options
    options = Options(said.get("arch"), said.get("given", {}), said.get("weights"), said.get("dtype"))
    prepared = prepare(path, options)
    now = [fingerprint(Path(file)) for file in prepared.inventory.files]
    before = manifest.source["files"]
    if [(f["size"], f["xxh3_ends"]) for f in now] != [(f["size"], f["xxh3_ends"]) for f in before]:
        raise input_error("is not the checkpoint that this layout was made from", str(path), "convert it again")
    return prepared


def _verify(
    layout: Path,
    manifest: Manifest,
    prepared: Prepared,
    settings: Settings,
    engine: Engine,
    scratch: Path,
    say: Callable[[str], None],
) -> Report:
    begin = time.perf_counter()
    say("checking files, hashes and shapes")
    problems = layout_problems(layout, manifest)
    checks = [_layout_check(problems, manifest)]
    times = {"layout": time.perf_counter() - begin}
    say("running the reference in float32 and float64")
    reference = _reference(prepared, settings)
    vocab, context = prepared.dims.integer("vocab"), prepared.dims.integer("context")
    inputs = make_inputs(vocab, context, seed=settings.seed, prompts=_encode(layout, settings.prompts))
    expected = run_reference(reference, inputs, scratch)
    times["reference"] = time.perf_counter() - begin - sum(times.values())
    say("running vLLM")
    result = run_engine(engine, layout, inputs, scratch)
    times["vllm"] = time.perf_counter() - begin - sum(times.values())
    if isinstance(result, EngineFailure):
        checks += _not_run(result)
    else:
        checks.append(coverage_check(result))
        checks.append(prefill_check(result, expected, inputs, exact=reference.exact))
    times["total"] = time.perf_counter() - begin
    return Report(
        layout=str(layout),
        checkpoint=prepared.inventory.path,
        arch=prepared.arch.name,
        target=prepared.arch.target,
        reference=reference.name,
        dtype="float32",
        ok=all(check.ok is True for check in checks),
        checks=tuple(checks),
        inputs=_describe(inputs),
        seed=settings.seed,
        trusted=() if settings.reference else _trusted(prepared),
        notes=reference.notes,
        versions=_versions(result),
        manifest=manifest_hash(layout),
        command=settings.command,
        seconds={name: round(value, 2) for name, value in times.items()},
    )


def run_reference(reference: Reference, inputs: Inputs, scratch: Path) -> _Reference:
    """Both runs of the reference on every sequence; float64 logits go to the disk, errors stay."""
    from safetensors.torch import save_file

    exact_type = "float64" if reference.exact else "float32"
    single = [reference.logits(list(one.ids), "float32").clone() for one in inputs.sequences]
    files: list[Path] = []
    floors: list[Distance] = []
    for k, one in enumerate(inputs.sequences):
        exact = reference.logits(list(one.ids), exact_type).clone()
        if exact.shape[-1] != inputs.vocab:
            what = f"gives {exact.shape[-1]} logits per position, the checkpoint has {inputs.vocab} rows"
            raise input_error(what, reference.name, "the reference and the checkpoint do not belong together")
        floors.append(distance(single[k], exact))
        single[k] = exact[:0]
        files.append(scratch / f"reference-{k:04d}.safetensors")
        save_file({"logits": exact.contiguous()}, files[-1])
    return _Reference(files, floors)


def run_engine(engine: Engine, layout: Path, inputs: Inputs, scratch: Path) -> EngineResult | EngineFailure:
    """vLLM in float32 on every sequence, each as one prompt."""
    scenarios = [Scenario(f"prefill-{k:04d}", (Request(ids=one.ids),)) for k, one in enumerate(inputs.sequences)]
    longest = max(len(one.ids) for one in inputs.sequences)
    folder = scratch / "vllm"
    folder.mkdir()
    return engine.run(layout, scenarios, dtype="float32", scratch=folder, max_model_len=longest + 1)


def coverage_check(result: EngineResult) -> Check:
    """Every parameter of vLLM's model was filled from the files, and every tensor of the files was used."""
    c = result.coverage
    detail = [f"nothing was loaded into {name} ({n} of {size} values)" for name, (n, size) in c.unloaded.items()]
    detail += [f"vLLM ignored {name}" for name in c.unconsumed]
    detail += [f"vLLM used {name} more than once" for name in c.repeated]
    detail += [f"vLLM used only part of {name}" for name in c.partial]
    wrong = len(detail)
    detail += [f"{name} was not checked (its type knows no NaN)" for name in c.unchecked]
    if not c.audited:
        detail.append("vLLM's loader could not be followed, so it is not known which tensors were used")
    ok = wrong == 0 and c.audited
    measured = f"{c.stored} tensors in, {wrong} faults" if c.audited else "not audited"
    return Check("coverage", ok, measured, "0 faults", _few(detail), {"faults": float(wrong)})


def prefill_check(result: EngineResult, expected: _Reference, inputs: Inputs, *, exact: bool) -> Check:
    """The gate: vLLM's float32 logits at every position against the float64 reference."""
    from safetensors.torch import load_file

    measured: list[Distance] = []
    for scenario, file, one in zip(result.scenarios, expected.files, inputs.sequences, strict=True):
        got = load_file(scenario.file)
        logits = _in_order(got, one.ids)
        if logits is None:
            detail = f"vLLM returned {len(got['positions'])} positions for {len(one.ids)} tokens"
            return Check("prefill", False, "incomplete", "every position", (detail,))
        measured.append(distance(logits, load_file(file)["logits"]))
    verdict = judge(measured, expected.floors)
    return _prefill_verdict(verdict, inputs, exact=exact)


def _in_order(got: dict[str, torch.Tensor], ids: Sequence[int]) -> torch.Tensor | None:
    """Logits of positions 0 … T - 1, or None if they are not exactly the positions and tokens that were asked for."""
    import torch

    order = got["positions"].argsort()
    complete = torch.equal(got["positions"][order], torch.arange(len(ids)))
    if not complete or not torch.equal(got["input_ids"][order], torch.tensor(ids)):
        return None
    return got["logits"][order]


def _prefill_verdict(v: Verdict, inputs: Inputs, *, exact: bool) -> Check:
    figures = {"nmse": v.nmse, "floor": v.floor, "ratio": v.ratio, "worst": v.worst, "worst_ratio": v.worst_ratio}
    kind = inputs.sequences[v.sequence].kind
    where = f"worst at position {v.position} of a {kind} sequence: NMSE {v.worst:.1e}"
    if not exact:
        ok = v.nmse <= CEILING
        return Check("prefill", ok, f"NMSE {v.nmse:.1e}", f"{CEILING:.0e}", (where,), figures)
    measured = f"NMSE {v.nmse:.1e} = {v.ratio:.2g} x reference's {v.floor:.1e}"
    limit = f"{RATIO:g} x, {CEILING:.0e}"
    where += f" = {v.worst_ratio:.2g} x the reference's worst"
    return Check("prefill", v.ok, measured, limit, (where,), figures)


def _layout_check(problems: list[Problem], manifest: Manifest) -> Check:
    detail = [" ".join(part for part in (p.where, p.what) if part) for p in problems]
    measured = f"{len(manifest.tensors)} tensors, {len(problems)} faults"
    return Check("layout", not problems, measured, "0 faults", _few(detail), {"faults": float(len(problems))})


def _not_run(failure: EngineFailure) -> list[Check]:
    detail = (f"vLLM could not {failure.phase} the layout: {failure.type}: {failure.message}",)
    return [Check("coverage", False, f"failed to {failure.phase}", "", detail), Check("prefill", None, "not run", "")]


def _reference(prepared: Prepared, settings: Settings) -> Reference:
    if settings.reference:
        return user_reference(settings.reference, Path(prepared.inventory.path))
    return builtin_reference(prepared.arch, prepared.dims, prepared.plan)


def _encode(layout: Path, prompts: Sequence[str]) -> list[list[int]]:
    """The user's prompts as token ids, by the layout's own tokenizer."""
    if not prompts:
        return []
    path = layout / "tokenizer.json"
    if not path.is_file():
        raise input_error(
            "has no tokenizer, so text prompts can't be used", str(layout), "convert with --tokenizer PATH"
        )
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(path))
    return [list(tokenizer.encode(prompt).ids) for prompt in prompts]


def _trusted(prepared: Prepared) -> tuple[str, ...]:
    """What mdl's own reference can't prove, because it was told the same: defaults and the user's word."""
    entries = prepared.dims.entries.items()
    return tuple(f"{name} = {d.value}: {d.because}" for name, d in entries if d.source in ("default", "user"))


def _describe(inputs: Inputs) -> str:
    kinds = [one.kind for one in inputs.sequences]
    longest = max(len(one.ids) for one in inputs.sequences)
    prompts = kinds.count("prompt")
    own = f", {prompts} of your prompts" if prompts else ""
    return (
        f"{inputs.tokens} positions in {len(kinds)} sequences: {inputs.covered} of {inputs.vocab} tokens, "
        f"longest {longest}{own}"
    )


def _versions(result: EngineResult | EngineFailure) -> dict[str, str]:
    import torch

    found = {"mdl": own_version(), "torch": torch.__version__}
    if isinstance(result, EngineResult):
        found |= dict(result.versions)
        found |= {"model class": result.model_class, "attention": ", ".join(result.attention), "device": result.device}
    return found


def _few(lines: list[str]) -> tuple[str, ...]:
    rest = len(lines) - _SHOWN
    return tuple(lines[:_SHOWN]) + ((f"… and {rest} more",) if rest > 0 else ())


def require_ok(report: Report) -> None:
    """Raise MdlError (PARITY) if the report failed."""
    from ..errors import Kind

    if not report.ok:
        raise MdlError(Kind.PARITY, [Problem(report.verdict, report.layout)])

"""What `mdl verify` does: verify a layout, test itself, or decide between values before there is a layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from . import render, views
from .errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .convert.prepare import Options
    from .program import State
    from .validate.decision import Decision
    from .validate.verify import Settings


def verified(layout: Path, settings: Settings, state: State, junit: Path | None, html: Path | None) -> int:
    """`mdl verify OUT`: verify, keep the report and print it. The exit code."""
    from .validate.report import keep_report
    from .validate.verify import verify

    with render.steps(quiet=state.quiet or state.json) as say:
        report = verify(layout, settings, say=say)
    report = keep_report(report, layout)
    unwritten = views.write_reports(report, junit, html)
    report = replace(report, notes=(*report.notes, *(f"{p.where}: {p.what}" for p in unwritten)))
    render.answer(state.json, lambda: report, lambda: views.show_report(report))
    return 1 if not report.ok else 4 if unwritten else 0


def checked(layout: Path, state: State) -> int:
    """`mdl check`: a layout against its manifest, printed. The exit code."""
    from .convert.check import check_layout
    from .convert.locks import reading
    from .convert.manifest import read_manifest

    total = sum(p.stat().st_size for p in layout.glob("*.safetensors"))
    with reading(layout), render.byte_progress("checking", total, quiet=state.quiet, as_json=state.json) as progress:
        manifest = read_manifest(layout)
        problems = check_layout(layout, manifest, progress)
    good = f"{layout}: {len(manifest.tensors)} tensors and {len(manifest.files)} files are as mdl convert wrote them"
    render.answer(
        state.json, lambda: {"ok": not problems, "problems": problems}, lambda: views.show_problems(problems, good)
    )
    return 3 if problems else 0


def other(path: Path, settings: Settings, options: Options, state: State, *, mutate: bool, files: bool) -> int | None:
    """What else may be asked: to decide for a raw checkpoint, or to test the verifier. The exit code; None for neither.

    ``files`` tells that a report is to be written. Raises MdlError (USAGE) for options that do not go together.
    """
    if is_raw(path, settings, options):
        _refuse_of_layouts(path, settings, {"--mutate": mutate, "--junit or --html": files})
        return decided(path, settings, options, state)
    return mutated(path, settings, state) if mutate else None


def mutated(layout: Path, settings: Settings, state: State) -> int:
    """`mdl verify --mutate`: how many known mistakes does the verifier notice in this very layout? The exit code."""
    from .validate.client import Engine
    from .validate.mutate import run_mutations

    if settings.decide:
        raise usage_error("--mutate tests the verifier, --decide the layout", do="give one of them")
    with render.steps(quiet=state.quiet or state.json) as say, Engine() as engine:
        table = run_mutations(layout, settings, engine=engine, say=say)
    render.answer(state.json, lambda: table, lambda: views.show_mutations(table))
    return 0 if table.ok else 1


def is_raw(path: Path, settings: Settings, options: Options) -> bool:
    """Whether to decide for a raw checkpoint. Raises MdlError (USAGE) for options that are for raw checkpoints only."""
    from .convert.manifest import NAME

    raw = path.exists() and not (path / NAME).is_file()
    if raw and settings.decide:
        return True
    if options.given or options.weights:
        what = "--set and --weights are for a raw checkpoint with --decide"
        do = "a layout knows what it was converted with: leave them out, or convert again with other values"
        raise usage_error(what, str(path), do)
    return False


def _refuse_of_layouts(checkpoint: Path, settings: Settings, more: Mapping[str, bool]) -> None:
    """Raise MdlError (USAGE) for options that say how vLLM runs a layout, or what is reported of it."""
    given = {
        "--against": settings.against is not None,
        "--prompt": bool(settings.prompts),
        "--dtype": settings.dtype is not None,
        "--tensor-parallel-size": settings.tensor_parallel_size != 1,
        "--pipeline-parallel-size": settings.pipeline_parallel_size != 1,
        "--attention-backend": settings.attention_backend is not None,
        **more,
    }
    if said := [option for option, is_there in given.items() if is_there]:
        do = f"leave {', '.join(said)} out, or convert first and verify the layout"
        raise usage_error("this is a raw checkpoint: there is no layout to report on yet", str(checkpoint), do)


def decided(checkpoint: Path, settings: Settings, options: Options, state: State) -> int:
    """`mdl verify CKPT --decide …`: the values to convert with. The exit code: 0 if all were decided."""
    from .validate.decide import decide_checkpoint
    from .validate.decide_layout import convert_command

    with render.steps(quiet=state.quiet or state.json) as say:
        say("running the reference and each candidate")
        found = decide_checkpoint(
            checkpoint,
            options,
            settings,
            lambda values: convert_command(checkpoint, "OUT", options, values),
        )
    render.answer(state.json, lambda: found, lambda: _show(found))
    return 0 if found.ok else 1


def _show(d: Decision) -> None:
    """The table of a decision."""
    console = render.out()
    made = render.table("candidate", "NMSE", "")
    for row in d.rows():
        made.add_row(*row)
    console.print(made)
    console.print()
    lines: list[tuple[str, str | Iterable[str]]] = [
        ("family", d.arch),
        ("reference", f"{d.reference} on {render.shown(d.checkpoint)}"),
        ("inputs", f"{d.inputs}, seed {d.seed}"),
        ("decided by", d.reasons),
    ]
    if d.notes:
        lines.append(("notes", d.notes))
    lines.append(("verdict", d.measured))
    if d.command:
        lines.append(("next", d.command))
    render.show_facts(lines)

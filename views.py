"""The tables of each command, from the records that the rooms return."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import render
from .convert.pause import collector_paused
from .errors import Problem
from .mappings.jsonable import Each

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .archs.base import Arch
    from .convert.export import Exported
    from .convert.parts import Contributed
    from .convert.plan import Plan, Step
    from .convert.prepare import Prepared
    from .convert.run import Converted
    from .validate.doctor import Finding
    from .validate.kills import MutationTable
    from .validate.report import Report


def planned(p: Prepared) -> dict[str, Any]:
    """What `mdl plan --json` prints."""
    from .convert.manifest import describe_step

    return {
        "arch": p.arch.name,
        "target": p.target,
        "mapping": p.mapping.path,
        "nbytes": p.plan.nbytes,
        "dtype": p.plan.dtype,
        "config": p.config,
        "notes": p.inventory.remarks,
        "deviations": p.dims.deviations,
        "steps": Each(describe_step, p.plan.steps),
        "problems": (*p.plan.open, *p.plan.problems),
    }


@collector_paused()
def show_plan(p: Prepared, *, reverse: bool) -> None:
    """The table of `mdl plan`: one line per rule, layers collapsed."""
    from .validate.faults import known_faults

    made = render.table("from", "by", "to", "shape", "type", "rule")
    for name, steps in _by_rule(p.plan):
        made.add_row(*_plan_row(name, steps, reverse=reverse))
    console = render.out()
    console.print(made)
    console.print(f"\n{_total_back(p) if reverse else _total(p)}")
    for remark in p.inventory.remarks:
        console.print(render.text(remark))
    if said := [fact for fact in (("deviates", p.dims.deviations), ("in vLLM", known_faults(p.config))) if fact[1]]:
        render.show_facts(said)


def _total(p: Prepared) -> str:
    count = sum([len(step.targets) for step in p.plan.steps])
    return f"{count} tensors, {render.size(p.plan.nbytes)}, {p.arch.name} → {p.target}"


def _total_back(p: Prepared) -> str:
    """What `mdl export` makes of a layout: the checkpoint's tensors, but for those that are lost."""
    back = [step for step in p.plan.steps if _comes_back(step)]
    count = sum(len(step.sources) for step in back)
    lost = sum(len(step.sources) for step in p.plan.steps) - count
    nbytes = sum(info.nbytes for step in back if step.kind != "tie" for s in step.sources for info in s.infos)
    words = f"{count} tensors, {render.size(nbytes)}, {p.target} → {p.arch.name}"
    return words + (f"; {lost} can't be brought back" if lost else "")


def _comes_back(step: Step) -> bool:
    """As export sees it: widening keeps every bit, other changes of type do not; a sum of ranks has no way back."""
    from .mappings.tensors import ITEMSIZE

    narrowed = step.source_dtype not in ("", step.dtype) and ITEMSIZE[step.dtype] <= ITEMSIZE[step.source_dtype]
    mixed = any(s.infos[0].made or (s.join and s.join.how in ("sum", "mean")) for s in step.sources)
    one_way = any(isinstance(op, _OneWay) for op in _ops(step, reverse=True))
    return step.kind == "tie" or (step.kind != "drop" and not (narrowed or mixed or one_way))


def _by_rule(plan: Plan) -> Iterator[tuple[str, list[Step]]]:
    """Steps that share a line of the table, and what their sources are called together."""
    steps = plan.steps
    names = [
        s[0].name if len(s := step.sources) == 1 else ",".join([x.name for x in s] or step.targets) for step in steps
    ]
    keys = [
        (step.kind, step.rule, step.ops, step.shapes or tuple([s.shape for s in step.sources]), step.dtype, step.made)
        for step in steps
    ]
    for name, which in render.alike(names, keys):
        yield name, [steps[k] for k in which]


def _plan_row(name: str, steps: list[Step], *, reverse: bool) -> tuple[str, ...]:
    first = steps[0]
    names = [s.name for step in steps for s in step.sources]
    sources = name if len(first.sources) == 1 else " + ".join(render.collapse(names)) or "zeros"
    targets = " + ".join(render.collapse([t for step in steps for t in step.targets]))
    if first.kind in ("drop", "tie"):
        return sources, first.kind, first.reason, _shape(first.sources[0].shape), "", first.rule
    joins = [(s.join.how + str(s.join.axis) * (s.join.how == "cat"), len(s.infos)) for s in first.sources if s.join]
    by = [
        *first.made,
        *(f"{how} of {count}" for how, count in dict.fromkeys(joins)),
        *(_words(op) for op in _ops(first, reverse=reverse)),
    ]
    if first.source_dtype and first.dtype != first.source_dtype:
        by.append(f"{first.source_dtype} → {first.dtype}")
    if reverse:
        made = _shapes([s.shape for s in first.sources])
        return targets, ", ".join(by) or first.kind, sources, made, first.source_dtype, first.rule
    return sources, ", ".join(by) or first.kind, targets, _shapes(first.shapes), first.dtype, first.rule


def _ops(step: Step, *, reverse: bool) -> Iterable[Any]:
    from .mappings.ops import OpError, invert

    if not reverse:
        return step.ops
    try:
        return invert(step.ops, [s.shape for s in step.sources], step.source_dtype or step.dtype)
    except OpError:
        return (_OneWay(),)


def _words(op: Any) -> str:
    """An operation as the table names it: ``parts (permute_rope; permute_rope; keep)``."""
    lists = getattr(op, "parts", None)
    if lists is None:
        return str(op.name)
    return f"{op.name} ({'; '.join(', '.join(_words(o) for o in ops) or 'keep' for ops in lists)})"


class _OneWay:
    name = "ONE WAY: can't be undone"


def _shapes(shapes: Iterable[tuple[int, ...]]) -> str:
    """The shapes of what a step makes, in its order; one for all where they are the same."""
    each = [_shape(shape) for shape in shapes]
    return " + ".join(each if len(set(each)) > 1 else each[:1])


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _named_again(c: Converted) -> str:
    """A file of the user's runs only where the command line names it."""
    arch = Path(str(c.manifest.options.get("arch") or ""))
    if arch.suffix != ".py":
        return ""
    return f" --arch {arch.relative_to(Path.cwd()) if arch.is_relative_to(Path.cwd()) else arch}"


def show_converted(c: Converted | Contributed) -> None:
    """The summary of `mdl convert`."""
    from .convert.run import Converted

    if not isinstance(c, Converted):
        _show_contributed(c)
        return
    rate = render.size(c.copied / max(c.seconds, 1e-9))
    copied = "" if c.copied == c.nbytes else f", {render.size(c.copied)} of it now"
    took = f"{render.seconds(c.seconds)} ({rate}/s)"
    what = f"{len(c.manifest.tensors)} tensors, {render.size(c.nbytes)}{copied}, in {took}"
    lines: list[tuple[str, str | Iterable[str]]] = [
        ("wrote", f"{c.out}: {what}"),
        ("files", ", ".join(_files(c.files))),
        ("tokenizer", (c.tokenizer.kind, *c.tokenizer.notes)),
        ("notes", (*_resumed(c), *c.manifest.notes) or ("none",)),
        ("next", f"mdl verify {c.out}{_named_again(c)}"),
    ]
    if c.disk_rate:
        ratio = c.copied / max(c.seconds, 1e-9) / c.disk_rate
        short = " (too short a run to tell)" if c.seconds < 1 else ""
        lines.insert(
            1, ("disk", f"a plain copy here runs at {render.size(c.disk_rate)}/s: this was {ratio:.2f} of that{short}")
        )
    if strange := _values(c):
        lines.insert(-2, ("values", strange))
    render.show_facts(lines)


def _files(names: tuple[str, ...]) -> list[str]:
    """The layout's files, its weights as one."""
    weights = [name for name in names if name.endswith(".safetensors")]
    many = [f"{weights[0]} … {weights[-1]}"] if len(weights) > 2 else weights
    return [*many, *(name for name in names if name not in weights)]


def _weight_files(count: int) -> str:
    return "1 weight file" if count == 1 else f"{count} weight files"


def _resumed(c: Converted) -> list[str]:
    count = sum(name.endswith(".safetensors") for name in c.files)
    said = f"finished by an earlier run or another part: {len(c.resumed)} of {_weight_files(count)}"
    return [said] if c.resumed else []


def _show_contributed(c: Contributed) -> None:
    what = f"{_weight_files(len(c.files))}, {render.size(c.nbytes)} in {render.seconds(c.seconds)}"
    lines: list[tuple[str, str | Iterable[str]]] = [("part", f"{c.part} of {c.parts}: {what}")]
    if c.missing:
        lines.append(("missing", f"{_weight_files(len(c.missing))}, such as {c.missing[0]}"))
        if not c.files:
            lines.append(("note", "more parts than weight files: a smaller --max-shard-size makes more files"))
        lines.append(("next", "the other parts; whichever is the last makes the layout"))
    else:
        lines.append(("layout", f"{c.out} was made by another part"))
    render.show_facts(lines)


def _values(c: Converted) -> list[str]:
    """Broken and strange values, layers of which the same is to be said on one line."""
    from .convert.values_judged import told_in_words

    groups: dict[str, list[str]] = {}
    for name, what in told_in_words(c.manifest.values):
        groups.setdefault(what, []).append(name)
    lines = [f"{' + '.join(render.collapse(names))}: {what}" for what, names in groups.items()]
    more = len(lines) - render.SHOWN
    return [*lines[: render.SHOWN], *([f"… and {more} more (--json for all)"] if more > 0 else [])]


def show_report(report: Report) -> None:
    """The table of `mdl verify`."""
    console = render.out()
    made = render.table("check", "", "measured", "limit")
    marks = {
        True: render.text("pass", style="green"),
        False: render.text("FAIL", style="bold red"),
        None: render.text("–"),
    }
    for check in report.checks:
        made.add_row(check.name, marks[check.ok], check.measured, check.limit)
        for line in check.detail:
            made.add_row("", "", render.text(line, style="dim" if check.ok else ""), "")
    console.print(made)
    console.print()
    lines: list[tuple[str, str | Iterable[str]]] = [
        ("reference", f"{report.reference} on {render.shown(report.checkpoint)}"),
        ("inputs", f"{report.inputs}, seed {report.seed}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in report.versions.items())),
        ("seconds", ", ".join(f"{k} {v:.1f}" for k, v in report.seconds.items())),
    ]
    if report.located is not None:
        found = report.located
        lines.append(("begins at", f"{found.place}: {found.signature}"))
        if found.module:
            lines.append(("", f"its own error is NMSE {found.local_error:.1e}, rounding makes {found.floor:.1e}"))
        lines.append(("decided by", [text for text in (found.governed_by, found.hypothesis) if text]))
    if report.trusted:
        lines.append(("on trust", report.trusted))
    if report.notes:
        lines.append(("notes", report.notes))
    lines.append(("verdict", report.verdict))
    render.show_facts(lines)


def show_mutations(table: MutationTable) -> None:
    """The table of `mdl verify --mutate`."""
    from .validate import kills

    console = render.out()
    parts = [
        (kills.HEADERS, kills.kill_rows(table)),
        (kills.CONTROL_HEADERS, kills.control_rows(table)),
        (("not tried", "what would be wrong", "why not"), kills.skipped_rows(table)),
    ]
    for headers, rows in parts:
        if rows:
            made = render.table(*headers)
            for row in rows:
                made.add_row(*row)
            console.print(made)
            console.print()
    console.print(table.verdict)


def show_recorded(out: Path, answer: Mapping[str, Any]) -> None:
    """The summary of `mdl record`."""
    counts = f"{answer['sequences']} sequences, {answer['positions']} positions, vocabulary {answer['vocab']}"
    lines: list[tuple[str, str | Iterable[str]]] = [("wrote", f"{out}: {render.size(answer['bytes'])}")]
    lines.append(("holds", counts))
    lines.append(("notes", [str(note) for note in answer.get("notes", ())] or ("none",)))
    lines.append(("next", f"mdl verify LAYOUT --golden {out}"))
    render.show_facts(lines)


def check_reports(junit: Path | None, html: Path | None) -> None:
    """Refuse a place where no report can be written, before minutes of work."""
    from .convert.places import check_place

    for option, path in (("--junit", junit), ("--html", html)):
        if path is not None:
            check_place(path, option)


def write_reports(report: Report, junit: Path | None, html: Path | None) -> list[Problem]:
    """The forms of a report that go to files; what can't be written is told, for the report itself is to be shown."""
    from .validate.html import to_html
    from .validate.junit import to_junit

    problems: list[Problem] = []
    for path, form in ((junit, to_junit), (html, to_html)):
        if path is not None:
            try:
                path.write_text(form(report), encoding="utf-8")
            except OSError as error:
                problems.append(Problem(f"this report can't be written ({error.strerror})", str(path)))
    return problems


def show_exported(e: Exported) -> None:
    """The summary of `mdl export`."""
    lines: list[tuple[str, str | Iterable[str]]] = [("wrote", e.files), ("tensors", str(e.tensors))]
    lines.append(("lost", [f"{p.what} ({p.where})" for p in e.lost] or ("nothing",)))
    render.show_facts(lines)


def show_archs(archs: Iterable[Arch]) -> None:
    """The table of `mdl archs`."""
    made = render.table("name", "checkpoints of", "written by", "served as")
    for arch in archs:
        made.add_row(arch.name, arch.title, arch.source, arch.target)
    render.out().print(made)


def show_findings(findings: Iterable[Finding]) -> None:
    """The table of `mdl doctor`."""
    made = render.table("", "what", "found", "do")
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for finding in findings:
        made.add_row(render.text(finding.state, style=styles[finding.state]), finding.what, finding.found, finding.do)
    render.out().print(made)


def show_problems(problems: Iterable[Problem], good: str) -> None:
    """A list of problems, or the good news."""
    found = list(problems)
    for p in found[: render.SHOWN]:
        render.line(f"{render.shown(p.where)}: {p.what}" + (f" ({p.do})" if p.do else ""))
    if not found:
        render.line(good)

"""`mdl verify --mutate`: known mistakes are put into copies of a layout, to see whether the verifier notices them.

Each copy's manifest is rewritten to agree with its files, so that no hash gives the mistake away. The `layout` check
notices most of them even so, because it makes every tensor again from the checkpoint; but a mistake in the mapping
itself would be made again with it. So what `layout` says is listed and not counted: a mistake is killed if vLLM
refuses the layout, or if the tensors that arrive or the numbers that come out are not the reference's.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from ..convert.check import INDEX
from ..convert.config import read_config
from ..convert.locks import reading
from ..convert.manifest import NAME as MANIFEST
from ..convert.manifest import Manifest
from ..convert.prepare import prepare
from ..convert.run import convert
from ..convert.values_judged import Allow
from ..errors import Kind, MdlError, Problem, usage_error
from .choose import said_now
from .client import Engine
from .kills import ControlRow, MutationRow, MutationTable
from .mutations import Mutation, catalogue
from .report import NAME as REPORT
from .report import REFUSED, Check, Report
from .roles import Config, Tensors
from .verify import Say, Settings, Side, judge_layout, read_whole, reference_side, source_of, verify

SECONDS = (4, 10)
"""What one mistake costs: a load of a small model and all its scenarios, on two cores."""

_WEIGHTS = ".safetensors"


class _Run(Struct, frozen=True):
    """What all mutations of a layout share: read and computed once."""

    layout: Path
    manifest: Manifest
    config: Config
    tensors: Tensors
    settings: Settings
    side: Side
    engine: Engine
    scratch: Path
    say: Say

    def judge(self, folder: Path) -> Report:
        """Verify a copy against the reference that was computed for the layout itself."""
        return judge_layout(folder, self.side, self.settings, self.engine, self.scratch, lambda _: None)

    @contextmanager
    def copied(self, tensors: Tensors, config: Config, *, files: int = 1) -> Generator[Path]:
        """A copy of the layout with other contents, gone at the end."""
        with tempfile.TemporaryDirectory(dir=self.scratch, prefix="layout-") as name:
            write_copy(self.layout, Path(name), self.manifest, tensors, config, files=files)
            yield Path(name)


def run_mutations(
    layout: Path,
    settings: Settings | None = None,
    *,
    engine: Engine,
    names: Sequence[str] | None = None,
    controls: bool = True,
    locate: bool = False,
    say: Say = lambda _: None,
) -> MutationTable:
    """Verify one copy of ``layout`` per known mistake (or per one of ``names``), and the harmless changes too.

    Needs twice the layout's size in memory and once on the disk; meant for small models. ``controls`` adds the
    changes that must not alarm, ``locate`` has every caught mistake located as well. A mistake that the layout
    can't have is listed as skipped, with the reason.

    Raises MdlError: PARITY if the layout itself fails, since a verifier that always alarms would kill everything;
    USAGE for an unknown name; INPUT for a class without a table of names; and all that ``verify`` raises.
    """
    begin = time.perf_counter()
    settings = replace(settings or Settings(), locate=locate)
    with reading(layout), tempfile.TemporaryDirectory(prefix="mdl-mutate-") as folder:
        manifest, config = read_whole(layout), read_config(layout)
        chosen = _chosen(catalogue(config), names)
        tensors = read_tensors(layout, manifest)
        due = [mutation.name for mutation in chosen if mutation.applies(config, tensors)]
        say(f"{estimate(len(due))}; running the reference")
        side = reference_side(layout, source_of(manifest, settings), settings, Path(folder))
        run = _Run(layout, manifest, config, tensors, settings, side, engine, Path(folder), say)
        say("the layout itself")
        whole = _control("unchanged", "the layout as it is", lambda: run.judge(layout))
        if whole.alarms:
            what = f"fails its own verification: {', '.join(whole.alarms)}"
            raise MdlError(Kind.PARITY, [Problem(what, str(layout), "mend that first: `mdl verify` says more")])
        rows = tuple(_mutated(run, mutation, due) for mutation in chosen)
        harmless = (whole, *_controls(run)) if controls else (whole,)
    return MutationTable(
        layout=str(layout),
        target=str(config["architectures"][0]),
        reference=side.reference.name,
        seed=side.expected.inputs.seed,
        rows=rows,
        controls=harmless,
        seconds=round(time.perf_counter() - begin, 1),
    )


def _chosen(mutations: Sequence[Mutation], names: Sequence[str] | None) -> list[Mutation]:
    known = {mutation.name: mutation for mutation in mutations}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise usage_error(f"no mutation is called {', '.join(unknown)}", do=f"there are: {', '.join(known)}")
    return [known[name] for name in names] if names is not None else list(mutations)


def estimate(count: int) -> str:
    """How long that many mistakes will take, in words."""
    least, most = (max(1, round(count * seconds / 60)) for seconds in SECONDS)
    minutes = f"{least}" if least == most else f"{least} to {most}"
    return f"{count} mistakes, about {minutes} min"


def _mutated(run: _Run, mutation: Mutation, due: Sequence[str]) -> MutationRow:
    """One mistake of those that are ``due``, and what became of it."""
    row = MutationRow(mutation.name, mutation.description, mutation.module, mutation.cause)
    if not mutation.applies(run.config, run.tensors):
        return replace(row, skipped=f"needs {mutation.needs}")
    run.say(f"{due.index(mutation.name) + 1} of {len(due)}: {mutation.name}: {mutation.description}")
    begin = time.perf_counter()
    tensors = {name: tensor.clone() for name, tensor in run.tensors.items()}
    config = copy.deepcopy(run.config)
    mutation.apply(tensors, config)
    try:
        with run.copied(tensors, config) as folder:
            report = run.judge(folder)
    except MdlError as error:
        return _from_error(row, error)
    nmse, ratio = _figures(report)
    located = report.located
    return replace(
        row,
        killed_by=_failed(report),
        nmse=nmse,
        ratio=ratio,
        seconds=round(time.perf_counter() - begin, 1),
        located=(located.served, located.governed_by) if located else None,
    )


def _from_error(row: MutationRow, error: MdlError) -> MutationRow:
    """A copy that can't be used at all is a kill; one that this machine can't run says nothing about the verifier."""
    if error.kind is Kind.MACHINE:
        return replace(row, skipped=f"this machine can't run it: {error.problems[0].what.splitlines()[0]}")
    return replace(row, killed_by=("refused",))


def _failed(report: Report) -> tuple[str, ...]:
    """The checks that failed; ``load`` or ``run`` where vLLM refused the layout."""
    failed = [check for check in report.checks if check.ok is False]
    return tuple(check.measured.removeprefix(REFUSED) if _refused(check) else check.name for check in failed)


def _refused(check: Check) -> bool:
    return check.measured.startswith(REFUSED)


def _figures(report: Report) -> tuple[float | None, float | None]:
    """The prefill's NMSE, and its ratio to the reference's own; None where vLLM did not get that far."""
    figures = next((check.figures for check in report.checks if check.name == "prefill"), {})
    return figures.get("nmse"), figures.get("ratio")


# --- harmless changes --------------------------------------------------------------------------------------------


def _controls(run: _Run) -> list[ControlRow]:
    """Changes that leave the model what it is: none may alarm."""
    run.say("harmless changes")
    return [
        _control("copied", "a copy, its manifest written again", lambda: _copy(run, 1)),
        _control("shards", "the same tensors in two files with an index", lambda: _copy(run, 2)),
        _rounded(run),
        _control("threads", "the reference with another number of threads", lambda: _threads(run)),
        _reseeded(run),
    ]


def _control(name: str, description: str, act: Callable[[], Report]) -> ControlRow:
    report = act()
    nmse, ratio = _figures(report)
    return ControlRow(name, description, _failed(report), nmse, ratio)


def _copy(run: _Run, files: int) -> Report:
    with run.copied(run.tensors, run.config, files=files) as folder:
        return run.judge(folder)


def _rounded(run: _Run) -> ControlRow:
    """Converted with --dtype bfloat16: the reference's weights are rounded alike, so nothing may be found."""
    name, description = "bfloat16", "converted with --dtype bfloat16, the reference rounded alike"
    if run.settings.reference or run.settings.golden:
        return ControlRow(name, description, skipped="needs mdl's own reference: yours holds the weights unrounded")
    tokenizer = run.manifest.tokenizer
    options = replace(said_now(run.manifest, run.settings), dtype="bfloat16")
    source = "none" if tokenizer.get("kind") in (None, "none") else str(tokenizer["source"])

    def act() -> Report:
        out = run.scratch / "bfloat16"
        path = run.settings.against or Path(run.manifest.source["path"])
        allow = Allow(nonfinite=True, flush=True)  # whatever it holds, rounding alone must not be found
        convert(prepare(path, options), out, tokenizer=source, allow=allow)
        return verify(out, run.settings, engine=run.engine)

    return _control(name, description, act)


def _threads(run: _Run) -> Report:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        return verify(run.layout, run.settings, engine=run.engine)
    finally:
        torch.set_num_threads(before)


def _reseeded(run: _Run) -> ControlRow:
    name, description = "seed", "other inputs, from another seed"
    if run.settings.golden:
        return ControlRow(name, description, skipped="a recording has the inputs that it has")
    settings = replace(run.settings, seed=(run.settings.seed or 0) + 1)
    return _control(name, description, lambda: verify(run.layout, settings, engine=run.engine))


# --- copies ------------------------------------------------------------------------------------------------------


def read_tensors(layout: Path, manifest: Manifest) -> Tensors:
    """Every tensor of a layout, in memory."""
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for file in sorted({str(fact["file"]) for fact in manifest.tensors.values()}):
        tensors |= load_file(layout / file)
    return tensors


def write_copy(
    layout: Path, out: Path, manifest: Manifest, tensors: Tensors, config: Config, *, files: int = 1
) -> Manifest:
    """Write a layout that holds ``tensors`` and ``config`` in place of the original's, into the folder ``out``.

    Everything else is copied, and the manifest says of files, shapes, types and hashes what is true of the copy.
    """
    for path in layout.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name not in (MANIFEST, REPORT, INDEX):
            shutil.copyfile(path, out / path.name)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    facts = _write_weights(out, tensors, files)
    names = [name for name in manifest.files if name != INDEX]
    if files > 1:
        index = {"metadata": {}, "weight_map": {name: fact["file"] for name, fact in facts.items()}}
        (out / INDEX).write_text(json.dumps(index), encoding="utf-8")
        names.append(INDEX)
    hashes = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}
    made = replace(manifest, tensors=facts, files=hashes)
    (out / MANIFEST).write_text(made.to_json(), encoding="utf-8")
    return made


def _write_weights(out: Path, tensors: Tensors, files: int) -> dict[str, dict[str, object]]:
    """Safetensors files of about as many tensors each; the manifest's facts about every tensor."""
    import torch
    import xxhash
    from safetensors.torch import save_file

    names = sorted(tensors)
    facts: dict[str, dict[str, object]] = {}
    for k in range(files):
        file = "model.safetensors" if files == 1 else f"model-{k + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensors[name].contiguous().clone() for name in names[k::files]}
        save_file(part, out / file, {"format": "pt"})
        for name, tensor in part.items():
            digest = xxhash.xxh3_128(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
            dtype = str(tensor.dtype).removeprefix("torch.")
            facts[name] = {"file": file, "dtype": dtype, "shape": list(tensor.shape), "xxh3": digest}
    return facts

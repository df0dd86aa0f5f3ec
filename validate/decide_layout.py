"""`mdl verify OUT --decide …`: was this layout converted with the values that the user's forward computes with?"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from ..archs.base import Dims
from ..convert.manifest import Manifest
from ..convert.prepare import Options, Prepared, prepare
from . import facts
from .candidates import combinations
from .choose import choose_reference, said_now
from .decide import decide, with_values
from .decision import Decision, decision_check
from .reference import Reference
from .report import Check, Report, manifest_hash

if TYPE_CHECKING:
    from .verify import Settings

_UNRUN = ("layout", "coverage", "prefill", "decode", "generate")
_NAMED = ("none", "gpt2", "bytes")


class Decided(Struct, frozen=True):
    """What was decided for a layout, with the reference that ran for it. ``wrong`` if the layout has other values."""

    decision: Decision
    reference: Reference
    check: Check
    wrong: bool
    seconds: float

    def added_to(self, report: Report) -> Report:
        """The report of a verification, with the decision as its first check."""
        ok = report.ok and self.check.ok is not False
        seconds = {"decide": self.seconds, **report.seconds}
        return replace(report, ok=ok, checks=(self.check, *report.checks), decision=self.decision, seconds=seconds)

    def report(self, layout: Path, prepared: Prepared, settings: Settings) -> Report:
        """The report where vLLM need not run: what it would compute is known to be another model."""
        return Report(
            layout=str(layout),
            checkpoint=prepared.inventory.path,
            arch=prepared.arch.name,
            target=prepared.target,
            reference=self.reference.name,
            dtype=str(prepared.config["dtype"]),
            ok=False,
            checks=(self.check, *(Check(name, None, "not run", "") for name in _UNRUN)),
            inputs=self.decision.inputs,
            seed=self.decision.seed,
            trusted=(),
            notes=self.decision.notes,
            versions=facts.versions(),
            manifest=manifest_hash(layout),
            command=settings.command,
            seconds={"decide": self.seconds},
            decision=self.decision,
        )


def decide_layout(layout: Path, manifest: Manifest, prepared: Prepared, settings: Settings) -> Decided:
    """Decide, and compare with what the layout was made with. Raises MdlError as :func:`.decide.decide` does."""
    begin = time.perf_counter()
    path = Path(prepared.inventory.path)
    options = said_now(manifest, settings)

    def command(values: Mapping[str, str]) -> str:
        said = _setting(options, prepared.dims, values)
        return convert_command(path, str(layout), said, {}, _tokenizer(manifest, path), force=True)

    def candidate(values: Mapping[str, str]) -> Prepared:
        return prepare(path, _setting(options, prepared.dims, values))

    made, refused = combinations(settings.decide, candidate)
    reference = choose_reference(prepared, settings, facts.encode(layout, settings.prompts))
    decision = decide(made, refused, settings, reference, command)
    others = {
        name: _other(candidate({name: value}).dims, prepared.dims, name) for name, value in decision.values.items()
    }
    others = {name: other for name, other in others.items() if other}
    known = ", ".join(f"{name}={other}" for name, other in others.items())
    wrong = [f"convert it again: {command({name: decision.values[name] for name in others})}"] if others else []
    check = decision_check(decision, wrong, known)
    return Decided(decision, reference, check, bool(others), round(time.perf_counter() - begin, 2))


def _setting(options: Options, dims: Dims, values: Mapping[str, str]) -> Options:
    """The options with these values, in place of what was said before of the same dims, under whichever name."""
    before = {dims.entries[name].because for name in values if name in dims}
    given = {key: text for key, text in options.given.items() if f"--set {key}={text}" not in before}
    return with_values(replace(options, given=given), values)


def _other(decided: Dims, dims: Dims, name: str) -> str:
    """What the layout has in place of the decided value; empty where it has this very value, whoever said so."""
    if dict(decided) == dict(dims):
        return ""
    changed = [key for key in dims if decided.get(key) != dims[key]]
    return str(dims[name] if name in dims else dims[changed[0]] if changed else "another value")


def _tokenizer(manifest: Manifest, checkpoint: Path) -> str | None:
    """What --tokenizer was, unless it is what lies beside the checkpoint anyway."""
    source = str(manifest.tokenizer.get("source") or "none")
    beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return source if source in _NAMED or Path(source).parent != beside else None


def convert_command(
    checkpoint: Path,
    out: str,
    options: Options,
    values: Mapping[str, str],
    tokenizer: str | None = None,
    *,
    force: bool = False,
) -> str:
    """The command line that converts with these options, and with ``values`` set."""
    words: list[Any] = ["mdl", "convert", _short(checkpoint), out]
    if options.arch:
        words += ["--arch", _short(Path(options.arch)) if options.arch.endswith(".py") else options.arch]
    words += ["--config", _short(Path(options.config.path))] if options.config else []
    words += ["--weights", options.weights] if options.weights else []
    words += ["--dtype", options.dtype] if options.dtype else []
    words += ["--merge-lora", _short(Path(options.merge_lora))] if options.merge_lora else []
    words += ["--tokenizer", _short(Path(tokenizer)) if tokenizer not in _NAMED else tokenizer] if tokenizer else []
    words += [
        word for name, value in with_values(options, values).given.items() for word in ("--set", f"{name}={value}")
    ]
    return shlex.join([*words, *(["--force"] if force else [])])


def _short(path: Path) -> str:
    """A path as a person would type it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

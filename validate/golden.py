"""References that were computed elsewhere: recorded in a file, or run in another Python."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from msgspec.structs import replace

from ..convert.places import check_place, check_replaced
from ..convert.prepare import Options, Prepared, prepare
from ..convert.safetensors_file import read_safetensors
from ..errors import MdlError, input_error, machine_error, usage_error
from . import record
from .compare import Distance
from .inputs import Input, Inputs, make_inputs
from .reference import Reference, check_spec, rounded_to, unusable

if TYPE_CHECKING:
    import torch

TAIL = 12
"""Lines of the other process's stderr that an error shows."""
TIMEOUT = 3600.0
"""Seconds that a reference in a process of its own may take, unless --reference-timeout says otherwise."""
_KEPT_OUT = ("PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


def golden_reference(path: Path, *, files: Sequence[Path] = ()) -> Reference:
    """What `mdl record` wrote, as a reference that answers for the recorded sequences only.

    ``files`` are those of the checkpoint at hand: a note says where the recorded ones were others. Logits are read
    when asked for. Raises MdlError (INPUT) for a file that `mdl record` did not write or that was cut short.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        what = "this is a folder, not a golden file" if path.is_dir() else "there is no such file"
        raise input_error(what, str(path), "make it with `mdl record`")
    try:
        with safe_open(path, "pt") as opened:
            told = _metadata(path, opened.metadata() or {})
            inputs = _inputs(opened, told)
            floors = {dtype: _floors(opened, dtype, len(inputs.sequences)) for dtype in told["floors"]}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise input_error(f"is not a golden file: {error}", str(path), "make it with `mdl record`") from error
    numbers = {one.ids: k for k, one in enumerate(inputs.sequences)}
    exact = "float64" if told["exact"] else "float32"

    def logits(ids: list[int], dtype: str) -> torch.Tensor:
        if dtype != exact or tuple(ids) not in numbers:
            what = f"holds no {dtype} logits" if dtype != exact else f"holds no logits of these {len(ids)} tokens"
            raise input_error(what, str(path), "record them, or give --reference")
        with safe_open(path, "pt") as opened:
            return opened.get_tensor(f"logits.{numbers[tuple(ids)]:04d}")

    other = _other_files(told, files)
    name = f"{told['reference']}, recorded with torch {told['torch']}"
    dtypes = (exact, *(dtype for dtype in floors if dtype != exact))
    return Reference(
        name,
        logits,
        exact=told["exact"],
        notes=(*((other,) if other else ()), *told["notes"]),
        inputs=inputs,
        free=False,
        dtypes=dtypes,
        floors=floors,
        closed="is a recording of logits and has no modules",
        other=other,
    )


def _metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format") != record.FORMAT:
        what = f"golden file format {metadata.get('format')!r}, this mdl reads {record.FORMAT!r}"
        raise input_error(what, str(path), "record it again")
    return cast("dict[str, Any]", json.loads(metadata["record"]))


def _inputs(opened: Any, told: Mapping[str, Any]) -> Inputs:
    ids: list[list[int]] = [opened.get_tensor(f"ids.{k:04d}").tolist() for k in range(len(told["kinds"]))]
    pairs = zip(cast("list[str]", told["kinds"]), ids, strict=True)
    return Inputs(tuple(Input(kind, tuple(one)) for kind, one in pairs), told["vocab"], told["seed"])


def _floors(opened: Any, dtype: str, count: int) -> tuple[Distance, ...]:
    found = [[opened.get_tensor(f"{n}.{k:04d}").tolist() for n in (f"error.{dtype}", "scale")] for k in range(count)]
    return tuple(Distance(tuple(error), tuple(scale)) for error, scale in found)


def _other_files(told: Mapping[str, Any], files: Sequence[Path]) -> str:
    recorded = {(f["size"], f["sha256_ends"]) for f in told["checkpoint"]}
    now = [(f["file"], (f["size"], f["sha256_ends"])) for path in files for f in record.fingerprints(path)]
    others = [name for name, key in now if key not in recorded]
    return f"the golden file was recorded from other files than {', '.join(others)}" if others else ""


def foreign_reference(
    spec: str,
    checkpoint: Path,
    python: str,
    prepared: Prepared,
    seed: int,
    *,
    prompts: Sequence[Sequence[int]] = (),
    dtypes: Sequence[str] = ("bfloat16", "float16"),
    timeout: float = TIMEOUT,
) -> Reference:
    """The user's code, run in another Python, which needs torch and what that code needs.

    It runs at once, on the inputs that the checkpoint's dims and ``seed`` give and on ``prompts`` (token ids); what it
    computed lies in a temporary folder for as long as the reference lives. ``dtypes`` are the precisions whose own
    error is measured beside float32's. Raises MdlError: INPUT for what the user's code does wrong; MACHINE for a
    crash, a time-out, a lack of memory or of torch there; USAGE where there is no such Python.
    """
    vocab, context = prepared.dims.integer("vocab"), prepared.dims.integer("context")
    inputs = make_inputs(vocab, context, seed=seed, prompts=prompts)
    rounded = rounded_to(prepared.plan)
    folder = Path(tempfile.mkdtemp(prefix="mdl-golden-"))

    def logits(ids: list[int], dtype: str) -> torch.Tensor:
        return found.logits(ids, dtype)

    weakref.finalize(logits, shutil.rmtree, folder, ignore_errors=True)
    out = folder / "golden.safetensors"
    record_golden(checkpoint, spec, out, inputs, python=python, rounded=rounded, dtypes=dtypes, timeout=timeout)
    found = golden_reference(out)
    closed = "ran in another process, where its modules can't be reached"
    return replace(found, name=f"{spec}, run by {python}", logits=logits, closed=closed)


def record_golden(
    checkpoint: Path,
    spec: str,
    out: Path,
    inputs: Inputs,
    *,
    python: str | None = None,
    rounded: str = "",
    dtypes: Sequence[str] = ("bfloat16", "float16"),
    timeout: float = TIMEOUT,
    force: bool = False,
) -> dict[str, Any]:
    """Run record.py in ``python`` (default: this one) and write the golden file; its answer, with ``notes``.

    Raises MdlError like :func:`foreign_reference`, and USAGE where ``out`` can't be made or replaced.
    """
    _check_out(out, force)
    program = shutil.which(python) if python else sys.executable
    if program is None:
        raise usage_error("there is no such program", str(python), "give the path of a Python that has torch")
    with tempfile.TemporaryDirectory(prefix="mdl-record-") as folder:
        # A copy by itself: Python puts a script's folder on the module path, where our modules have no business.
        script = Path(shutil.copy(record.__file__, folder))
        sequences = [{"kind": one.kind, "ids": list(one.ids)} for one in inputs.sequences]
        dealt = script.with_name("inputs.json")
        dealt.write_text(json.dumps({"seed": inputs.seed, "sequences": sequences}), encoding="utf-8")
        command = [program, str(script), str(checkpoint), "--reference", spec, "--out", str(out), "--json"]
        command += ["--inputs", str(dealt), "--dtypes", ",".join(dtypes), *(["--round", rounded] if rounded else [])]
        answer = _run(command, timeout)
    return {**answer, "bytes": out.stat().st_size}


def record_checkpoint(
    checkpoint: Path,
    spec: str,
    out: Path,
    options: Options,
    *,
    python: str | None = None,
    seed: int = 0,
    force: bool = False,
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """`mdl record`: measure the checkpoint, deal the inputs that `mdl verify` would, and run the user's code on them.

    Returns and raises what :func:`record_golden` does.
    """
    _check_out(out, force)
    check_spec(spec, python)
    prepared = prepare(checkpoint, options)
    inputs = make_inputs(prepared.dims.integer("vocab"), prepared.dims.integer("context"), seed=seed)
    rounded = rounded_to(prepared.plan)
    path = Path(prepared.inventory.path)
    return record_golden(path, spec, out, inputs, python=python, rounded=rounded, force=force, timeout=timeout)


def _check_out(out: Path, force: bool) -> None:
    check_place(out)
    check_replaced(out, force=force, ours=_recorded)


def _recorded(path: Path) -> bool:
    """Whether `mdl record` wrote this file, by its metadata: in this format or an older one."""
    try:
        return read_safetensors(path)[1].get("format", "").startswith(record.FORMAT.partition("/")[0])
    except (MdlError, OSError):
        return False


def _run(command: Sequence[str], timeout: float) -> dict[str, Any]:
    """Run record.py and read its last line. Whatever else it does than answer is the machine's fault."""
    env = {name: value for name, value in os.environ.items() if name not in _KEPT_OUT}
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        process = subprocess.Popen(  # noqa: S603 - the user named this Python
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=env,
            start_new_session=True,  # so that a kill reaches what it started, too
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            what = f"the reference did not finish within {timeout:.0f} s"
            raise machine_error(what, command[0], "give it more: --reference-timeout SECONDS") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        answer = _answer(_text(out))
        if answer is None:
            raise machine_error(_died(code, _text(err)), command[0], _ADVICE.get(code, "see its last lines above"))
    if not answer["ok"]:
        raise unusable(answer["what"], answer["where"], answer["do"], machine=answer["machine"])
    return answer


_ADVICE = {
    -signal.SIGKILL: "probably out of memory: free some, or record it on a larger machine with `mdl record`",
    2: "this Python is too old, or is no Python: record.py needs 3.9 or later",
}


def _answer(text: str) -> dict[str, Any] | None:
    """The JSON in the last line; the user's own code may have printed more before it."""
    lines = text.strip().splitlines()
    with suppress(ValueError):
        found: Any = json.loads(lines[-1]) if lines else None
        if isinstance(found, dict) and "ok" in found:
            return cast("dict[str, Any]", found)
    return None


def _died(code: int, text: str) -> str:
    name = signal.Signals(-code).name if code < 0 else ""
    first = f"the reference's process was killed by {name}" if name else f"the reference's process ended with {code}"
    return "\n".join([first, *text.splitlines()[-TAIL:]])


def _text(file: Any) -> str:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - (1 << 16)))
    return cast("bytes", file.read()).decode(errors="replace")

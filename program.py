"""What surrounds every command: signals that end it, and failures turned into messages and exit codes."""

from __future__ import annotations

import atexit
import codecs
import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import typer
from msgspec import Struct

from . import render
from .errors import Kind, MdlError, Problem, usage_error

_BLAS = "OPENBLAS_NUM_THREADS"


class State(Struct):
    """What the options before and after the command's name say about printing."""

    quiet: bool = False
    debug: bool = False
    json: bool = False
    death: MdlError | None = None
    """What killed the child in which the command ran; then there is nothing left to run."""


class Interrupted(KeyboardInterrupt):
    """A signal that asks the program to end. It passes where Ctrl-C passes, through every clean-up."""

    number = 0
    """The last one that came: Typer swallows the exception itself."""


def run(command: Callable[[], object], state: State) -> NoReturn:
    """Run a command line to its end. A traceback is shown only with --debug."""
    Interrupted.number = 0
    gc.set_threshold(100_000, *gc.get_threshold()[1:])  # imports make objects that stay: not to be looked through often
    _print_anything()
    atexit.register(gc.freeze)  # what a process holds at its end is not worth looking through for cycles
    if state.death is not None:
        _end(state.death, state)
    try:
        _leave(_code_of(command))
    except MdlError as error:
        if state.debug:
            raise
        _end(error, state)
    except (KeyboardInterrupt, typer.Abort):
        _interrupted(state)
    except Exception as error:
        if isinstance(error, _usage_exception()):
            _usage(error, state)
        if state.debug:
            raise
        do = "run again with `mdl --debug …` and report it"
        _end(MdlError(Kind.INPUT, [Problem(f"{type(error).__name__}: {error}", "inside mdl", do)]), state)


def _code_of(command: Callable[[], object]) -> int:
    """Run it, and undo what Typer makes of an interrupt and of a reader that left: 1, which is ours for a layout that
    differs."""
    try:
        with _heard():
            code = command()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            _unwritten(end.__context__)
        raise
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _print_anything() -> None:
    """No answer fails for what stdout's encoding lacks, or for bytes in the name of a file that are no characters."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    if handler := {"strict": _escaped, "surrogateescape": _escaped_but_bytes}.get(sys.stdout.errors or "strict"):
        codecs.register_error("mdl.escaped", handler)
        sys.stdout.reconfigure(errors="mdl.escaped")


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """A character as JSON writes it, `\\u00e9` or a pair of surrogates, so that a document remains one."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[k : k + 4]}" for k in range(0, len(units), 4)), error.start + 1


def _escaped_but_bytes(error: UnicodeError) -> tuple[str | bytes, int]:
    """The same where Python prints the bytes of a file's name as they are (PEP 383)."""
    if isinstance(error, UnicodeEncodeError) and "\udc80" <= (char := error.object[error.start]) <= "\udcff":
        return bytes([ord(char) - 0xDC00]), error.start + 1
    return _escaped(error)


def open_streams() -> None:
    """Whoever starts a program without stdin, stdout or stderr would have its files opened in their place, and what is
    printed written into them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # what is opened now takes the number that is free
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if number else "r"))


def and_leave(main: Callable[[], object]) -> NoReturn:
    """Run a program that ends with SystemExit, and end the process as that asks, with all that is to be done at the end
    of one, but without taking the interpreter apart: freeing what is not used again takes up to a tenth of a second."""
    try:
        main()
    except SystemExit as end:
        others = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
        if others or not (end.code is None or isinstance(end.code, int)):
            raise
        with suppress(OSError, ValueError):  # a stream that is closed or broken: the interpreter says so in its own way
            atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  # what the interpreter calls, and there is no other
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code or 0)
        raise
    sys.exit(0)


def numpy_alone() -> None:
    """Import numpy without the threads of its BLAS library, one for each core, which wait busily for work that mdl has
    none of. Programs that are started from here have their own."""
    if _BLAS in os.environ or "numpy" in sys.modules:
        return
    os.environ[_BLAS] = "1"
    try:
        import numpy as np
    finally:
        del os.environ[_BLAS]
    del np


def numpy_alone_if_at_all() -> None:
    """The same for a command that starts no other program and mostly needs no numpy, which takes a fifth of a small
    plan's time to import."""
    os.environ.setdefault(_BLAS, "1")


@contextmanager
def _heard() -> Generator[None]:
    """SIGTERM and a closed terminal end the program as Ctrl-C does: by an exception, so that children end with it and
    temporary folders go. Only the main thread may listen, and a signal that our parent ignores stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number] or signal.SIG_DFL)  # None: set by what is no Python


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    Interrupted.number = number
    raise Interrupted


def _interrupted(state: State) -> NoReturn:
    number = signal.Signals(Interrupted.number or signal.SIGINT)
    what = f"ended by {number.name}: what mdl started has ended too, its temporary files are removed"
    with suppress(OSError):  # the terminal may be what was closed
        if state.json or _asks_for_json():
            render.print_json({"ok": False, "kind": "interrupted", "problems": [Problem(what)]})
        else:
            sys.stderr.write(what + "\n")
    sys.exit(128 + number)


def _usage_exception() -> type[Exception]:
    """The base of all complaints about the command line: Click's own class, or Typer's copy of it."""
    bases = (cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
    return next(bases, typer.BadParameter)  # type: ignore[return-value]  # found by name, so not known to be one


def _usage(error: Exception, state: State) -> NoReturn:
    """A command line that could not be parsed. No command has run, so whether JSON is wanted is read from the words."""
    if state.json or _asks_for_json():
        context = getattr(error, "ctx", None)
        path = getattr(context, "command_path", "mdl")
        _end(usage_error(error.format_message(), path, f"{path} --help"), State(json=True))  # type: ignore[attr-defined]  # every ClickException has one
    error.show()  # type: ignore[attr-defined]  # every ClickException can show itself
    sys.exit(2)


def _asks_for_json() -> bool:
    words = sys.argv[1:]
    return "--json" in (words[: words.index("--")] if "--" in words else words)


def _end(error: MdlError, state: State) -> NoReturn:
    try:
        render.print_error(error, as_json=state.json or _asks_for_json())
    except OSError as lost:
        _unwritten(lost)
    _leave(error.kind.value)


def _leave(code: int) -> NoReturn:
    """What stdout does not take is noticed here, and not by the interpreter when it ends."""
    try:
        sys.stdout.flush()
    except OSError as lost:
        _unwritten(lost)
    sys.exit(code)


def _unwritten(lost: OSError) -> NoReturn:
    """A reader that left, as `| head` does, is no news, and the code is that of other programs; a full disk is news."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still in the buffer
    if isinstance(lost, BrokenPipeError):
        sys.exit(128 + signal.SIGPIPE)
    with suppress(OSError):
        sys.stderr.write(f"this machine: stdout takes no more: {lost.strerror}\n")
    sys.exit(Kind.MACHINE.value)

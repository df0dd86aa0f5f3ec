"""`mdl doctor NAME`: does a process that was told nothing find a family of one's own, and the class that serves it?

vLLM starts processes that share nothing with the one that was asked: what they find is what is installed. So a new
process is asked, in which no working directory and no file named on a command line helps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from .doctor import Finding, examine

TIMEOUT = 300

_FAMILY = """
import json, sys
from mdl.archs.registry import all_archs, mapping_path
from mdl.errors import MdlError
try:
    archs = all_archs()
except MdlError as error:
    sys.exit(str(error))
arch = archs.get(sys.argv[1])
if arch is None:
    own = [name for name, one in archs.items() if one.file]
    sys.exit("no installed package has this entry point in mdl.archs; there are: " + (", ".join(own) or "none"))
if not mapping_path(arch).is_file():
    sys.exit(f"its mapping {mapping_path(arch)} is not installed: list *.yaml under package-data")
print(json.dumps({"file": arch.file, "target": arch.target, "served": arch.served or ""}))
"""

_CLASS = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm import ModelRegistry
name = sys.argv[1]
if name not in ModelRegistry.get_supported_archs():
    sys.exit(f"vLLM knows no {name}: no plugin in vllm.general_plugins registers it")
known = ModelRegistry.models[name].load_model_cls()
print(f"{known.__module__}.{known.__qualname__}")
"""


def examined(name: str | None) -> list[Finding]:
    """What :func:`examine` finds of this machine; with a name, of that family instead."""
    return examine() if name is None else list(_own(name))


def _own(name: str) -> Iterator[Finding]:
    code, said = _asked(_FAMILY, name)
    what = f"family {name}"
    if code != 0:
        do = f"`pip install -e FOLDER`, with an entry point {name} in the group mdl.archs (`mdl new` writes one)"
        yield Finding("fail", what, said, do)
        return
    family: dict[str, Any] = json.loads(said)
    yield Finding("ok", what, f"a new process finds it: {family['file'] or 'a part of mdl'}")
    if " " in family["target"]:  # a family of mdl's whose settings decide
        yield Finding("ok", "class", f"{family['target']}: vLLM's own")
        return
    code, said = _asked(_CLASS, family["target"])
    what = f"class {family['target']}"
    if code == 0:
        yield Finding("ok", what, f"a new process of vLLM's finds it: {said}")
    else:
        do = "install its package, with an entry point in the group vllm.general_plugins whose function registers it"
        yield Finding("fail", what, said, do)


def _asked(program: str, argument: str) -> tuple[int, str]:
    """Run a program in a new process, away from this folder; its exit code, and the last line that it said."""
    command = [sys.executable, "-P", "-c", program, argument]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)  # noqa: S603 - this interpreter, our program
    except subprocess.TimeoutExpired:
        return 1, f"it did not answer within {TIMEOUT} s"
    text = done.stdout if done.returncode == 0 else done.stderr
    return done.returncode, (text.strip().splitlines() or [f"exit code {done.returncode}"])[-1]

"""Coverage-guided fuzzing of one target with atheris: ``python tests/fuzz/harness.py TARGET [libFuzzer's options]``.

``make fuzz`` calls it with seeds, a dictionary and a time. An input that breaks a promise (targets.py) ends the run
with exit code 77 and is kept under ``-artifact_prefix``; give its path instead of a folder to run it again.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mdl", "zipfile", "yaml"]):
    import targets  # beside this file


def main() -> None:
    """Fuzz until libFuzzer's limits are reached; does not return."""
    name, *options = sys.argv[1:]
    if name not in targets.TARGETS:
        sys.exit(f"no target {name!r}; one of: {', '.join(targets.TARGETS)}")
    shared_memory = Path("/dev/shm")  # noqa: S108 - a folder in memory: each input is a file for a moment
    folder = Path(tempfile.mkdtemp(prefix="mdl-fuzz-", dir=shared_memory if shared_memory.is_dir() else None))
    path = folder / f"input-{os.getpid()}"

    def one(data: bytes) -> None:
        targets.check(name, data, path)

    atheris.Setup([sys.argv[0], *options], one)
    with targets.little_memory(2 * targets.MEMORY):
        atheris.Fuzz()


if __name__ == "__main__":
    main()

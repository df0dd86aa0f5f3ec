"""Opens every case of the corpus under a memory limit and writes what became of it, one JSON line per case.

Run as ``python -m mdl.tests.attacks.judge FOLDER`` or, without the package's parent on the path, by file.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from mdl.convert.inventory import take_inventory
from mdl.convert.open import open_checkpoint
from mdl.convert.prepare import prepare
from mdl.errors import MdlError

from .case import Case
from .corpus import all_cases, home

ROOM = 300 << 20


def limit_memory() -> None:
    """Let this process take ROOM bytes of addresses more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def verdict(case: Case, path: Path) -> dict[str, Any]:
    """What opening a case gives: tensors, or the kind and text of the refusal; and the seconds of computing."""
    start = time.process_time()
    found: dict[str, Any] = {"name": case.name}
    try:
        if case.plan:
            prepared = prepare(path)
            prepared.plan.refuse()
            found["tensors"] = list(prepared.inventory.tensors)
            found["dtypes"] = sorted({step.dtype for step in prepared.plan.writes})
        else:
            inventory = take_inventory(open_checkpoint(path))
            found["tensors"] = list(inventory.tensors)
            json.dumps(inventory.extras, default=str)  # what is kept must be fit for printing
    except MdlError as error:
        found |= {"kind": error.kind.name, "message": str(error)}
    except Exception as error:
        found |= {"kind": type(error).__name__, "message": str(error)[:500]}
    return {**found, "seconds": time.process_time() - start}


def main() -> None:
    """Write all cases first: making them takes more memory than reading them may."""
    root = Path(sys.argv[1])
    cases = all_cases()
    paths = [case.make(home(root, number, case)) for number, case in enumerate(cases)]
    prepare(paths[-1])  # imports what is imported late, so that it does not count
    limit_memory()
    for case, path in zip(cases, paths, strict=True):
        sys.stdout.write(json.dumps({"running": case.name}) + "\n")
        sys.stdout.flush()
        sys.stdout.write(json.dumps(verdict(case, path)) + "\n")


if __name__ == "__main__":
    main()

"""The attack corpus: writes every case into a folder of its own.

By hand: ``python tests/attacks/corpus.py FOLDER`` writes all of them and prints what must become of each.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by hand
    sys.path.insert(0, str(Path(__file__).parents[1]))
    __package__ = "attacks"  # Python's own name, which relative imports go by

from . import bombs, calls, distributed, lies, odd
from .case import Case


def all_cases() -> list[Case]:
    """Every case once, in a fixed order."""
    found = [case for part in (calls, bombs, distributed, lies, odd) for case in part.cases()]
    assert len({case.name for case in found}) == len(found)
    return found


def home(folder: Path, number: int, case: Case) -> Path:
    """The folder that a case is written to."""
    path = folder / f"{number:03d} {case.name}".replace("/", "_")
    path.mkdir(parents=True, exist_ok=True)
    return path


def main() -> None:
    """Write the corpus and list it."""
    for number, case in enumerate(all_cases()):
        path = case.make(home(Path(sys.argv[1]), number, case))
        verdict = "refused: " + ", ".join(case.refused) if case.refused else "read: " + ", ".join(case.tensors)
        sys.stdout.write(f"{path}\n    {verdict}\n")


if __name__ == "__main__":
    main()

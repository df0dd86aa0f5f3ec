"""What `mdl new` does: draft a package from a checkpoint, and say what was certain and what is left to decide."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from . import render

if TYPE_CHECKING:
    from .drafting.draft import Draft


def new(
    folder: Path,
    checkpoint: Path,
    *,
    reference: str | None,
    target: str | None,
    weights: str | None,
    force: bool,
    json: bool,
) -> None:
    """Write the draft and print what it is. Raises MdlError as :func:`mdl.drafting.draft.draft` does."""
    from .drafting.draft import draft

    made = draft(folder, checkpoint, reference=reference, target=target, weights=weights, force=force)
    render.answer(json, lambda: made, lambda: _show(made, os.fspath(checkpoint), reference))


def _show(made: Draft, checkpoint: str, reference: str | None) -> None:
    from .drafting.draft import decide_options, questions_of

    questions = [what.removeprefix("left to decide: ") for what in questions_of(made)]
    lines: list[tuple[str, str | Iterable[str]]] = [
        ("wrote", f"{made.folder}: {len(made.files)} files"),
        ("files", ", ".join(sorted(made.files))),
        ("target", made.target),
        ("because", made.because),
        ("tensors", f"{made.certain} kinds told by name and shape together, {made.doubtful} in doubt"),
        ("to decide", questions or ("nothing",)),
    ]
    if made.known:
        lines.append(("notes", f"mdl knows this checkpoint as {made.known} already: `mdl convert` needs no package"))
    options = f"{checkpoint} --arch {made.arch}"
    steps = [f"mdl plan {options}"]
    if reference and made.decide:
        steps.append(f"mdl verify {options} --reference {reference} {decide_options(made.decide)}")
    lines.append(("next", steps))
    render.show_facts(lines)

"""A made-up family for tests: one mapping file, one arch file, both written where the test says."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

ARCH = """
from mdl.archs.base import Arch


def dims(m):
    m.set("vocab", default=(8, "the test says so"))
    m.set("heads", default=(2, "the test says so"))


ARCH = Arch(
    name={name!r},
    title="made up",
    source="tests",
    target="MadeUp",
    detect=lambda inv: {evidence!r},
    dims=dims,
    hf_config=lambda d: {{
        "architectures": ["MadeUp"], "model_type": "made_up", "vocab_size": 8, "tie_word_embeddings": d["tied"]
    }},
    eager="",
)
"""


def write_family(folder: Path, mapping: str, *, name: str = "made_up", evidence: tuple[str, ...] = ("w",)) -> Path:
    """Write NAME.py and NAME.yaml; returns the former. The target class is whatever :func:`stub_target` says."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"format: 1\ntitle: {name}\n{textwrap.dedent(mapping)}"
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    path = folder / f"{name}.py"
    path.write_text(ARCH.format(name=name, evidence=list(evidence)), encoding="utf-8")
    return path


def stub_target(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """A file of archs/targets, as parsed, for the made-up class."""
    return {"ranges": {}, "tensors": {name: list(shape) for name, shape in tensors.items()}}

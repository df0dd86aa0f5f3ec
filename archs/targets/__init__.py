"""What each target class holds: tensor names and shapes as a function of its config.json.

These files stand in for building the class on the meta device, which costs seconds of imports. That they say the
same as the class is a test (tests/test_targets.py); a class without a file here is built for real.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ...errors import input_error
from ...mappings import expr
from ...mappings.tensors import Shape

_FOLDER = Path(__file__).parent


@lru_cache(maxsize=1)
def _known() -> dict[str, dict[str, Any]]:
    specs = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(_FOLDER.glob("*.yaml")))
    return {spec["class"]: spec for spec in specs}


def known_classes() -> tuple[str, ...]:
    """The classes that have a file here."""
    return tuple(_known())


def from_spec(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Names and shapes that the config's class holds, or None if there is no file for that class.

    Raises MdlError (INPUT) if the config leaves out a size.
    """
    spec = _known().get(config["architectures"][0])
    if spec is None:
        return None
    sizes = {k: v for k, v in config.items() if isinstance(v, int)}
    patterns: dict[str, list[int | str]] = dict(spec["tensors"])
    for condition, more in spec.get("when", {}).items():
        words = condition.split()
        if bool(config.get(words[-1])) is (len(words) == 1):
            patterns |= more
    try:
        return dict(_expanded(patterns, spec["ranges"], sizes))
    except expr.ExprError as error:
        raise input_error(
            f"config.json does not size {spec['class']}: {error}", do="mend the family's hf_config"
        ) from None


def _expanded(
    patterns: Mapping[str, list[int | str]], ranges: Mapping[str, str], sizes: Mapping[str, int]
) -> list[tuple[str, Shape]]:
    found: list[tuple[str, Shape]] = []
    for pattern, dims in patterns.items():
        shape = tuple(expr.evaluate(n, sizes) for n in dims)
        names = [pattern]
        for capture in (f"{{{name}}}" for name in ranges if f"{{{name}}}" in pattern):
            count = expr.evaluate(ranges[capture[1:-1]], sizes)
            names = [name.replace(capture, str(k)) for name in names for k in range(count)]
        found += [(name, shape) for name in names]
    return found

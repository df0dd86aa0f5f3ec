"""What each target class holds: tensor names and shapes as a function of its config.json.

These files, one for each class and named like it, stand in for building the class on the meta device, which costs
seconds of imports. That they say the same as the class is a test (tests/test_targets.py); a class without a file here
is built for real.

``defaults`` are the values that the class fills in where config.json leaves them out, ``nulls`` those for a null.
``when`` holds more tensors under a condition: fields, ``not`` before them, sizes with ``!=``, joined by ``and``.
``tied`` names the tensors that the files leave out when ``tie_word_embeddings`` is true, and what stands for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import input_error, machine_error
from ...mappings import expr
from ...mappings.packaged import read_facts
from ...mappings.tensors import Shape, Target
from ..decoder.reading import checked, is_composed
from ..served import COMPUTES

_FOLDER = Path(__file__).parent


def known_classes() -> tuple[str, ...]:
    """The classes that have a file here, by transformers' names."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


@cache
def _spec(name: str) -> dict[str, Any] | None:
    """The file of a class, or of the one that computes the same. Only that file is read: config.json says the name, so
    it is looked up among the files' names, and is no path."""
    name = COMPUTES.get(name, name)
    return read_facts(_FOLDER / f"{name}.yaml") if name in known_classes() else None


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the values that its class fills in where it leaves them out.

    From the class's file here, else by asking transformers, which costs seconds of imports. Raises MdlError: INPUT if
    a size is missing, if transformers does not know the class or does not take the config, MACHINE where transformers
    is missing.
    """
    if is_composed(config):
        return {**config, **checked(config).model_dump()}
    spec = _spec(config["architectures"][0])
    if spec is None:
        return {**_by_transformers(config), **{k: v for k, v in config.items() if v is not None}}
    filled = {**spec.get("defaults", {}), **config}
    filled |= {name: value for name, value in spec.get("nulls", {}).items() if filled.get(name) is None}
    for name, value in filled.items():
        if name in spec.get("defaults", {}) and isinstance(value, str):
            filled[name] = _evaluated(value, filled)
    return filled


def _evaluated(size: int | str, config: Mapping[str, Any]) -> int:
    try:
        return expr.evaluate(size, {k: v for k, v in config.items() if isinstance(v, int)})
    except expr.ExprError as error:
        name = config["architectures"][0]
        raise input_error(f"config.json does not size {name}: {error}", do="it needs that field") from None


def _by_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    name = str(config["architectures"][0])
    cls = transformers_class(name)
    try:
        known = cls.config_class(**{k: v for k, v in config.items() if k not in ("architectures", "model_type")})
    except Exception as error:  # config classes raise whatever they like
        raise input_error(f"{name} does not take this config.json: {error}", do="mend config.json") from error
    values = known.to_dict()
    # config classes spell the common sizes in their own way (n_embd) and answer to the common names too
    common = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    return {**values, **{key: getattr(known, key, None) for key in common if key not in values}}


def transformers_class(name: str) -> Any:
    """The transformers class of that name, or that computes what ours of that name does.

    Raises MdlError: MACHINE without transformers, INPUT without the class.
    """
    try:
        import transformers
    except ImportError as error:
        what = f"checking a plan against {name} needs torch and transformers ({error})"
        raise machine_error(what, do="pip install mdl[cpu]") from error
    cls = getattr(transformers, COMPUTES.get(name, name), None)
    if cls is None:
        raise input_error(f"transformers has no class {name}", do="add its tensors as a file in archs/targets")
    return cls


def from_spec(config: Mapping[str, Any]) -> Target | None:
    """What the config's class holds, or None if there is no file for that class and it is not the composable decoder.

    Raises MdlError (INPUT) if the config leaves out a size, or says what the composable decoder can't be.
    """
    if is_composed(config):
        from ..decoder.tensors import target_of

        return target_of(checked(config))
    spec = _spec(config["architectures"][0])
    if spec is None:
        return None
    config = resolved(config)
    patterns: dict[str, list[int | str]] = dict(spec["tensors"])
    for condition, more in spec.get("when", {}).items():
        if all(_holds(part, config) for part in condition.split(" and ")):
            patterns |= more
    shapes = dict(_expanded(patterns, spec["ranges"], config))
    return Target(shapes, spec.get("tied", {}) if config.get("tie_word_embeddings") else {})


def _holds(condition: str, config: Mapping[str, Any]) -> bool:
    """``FIELD``, ``not FIELD``, or ``SIZE != SIZE``."""
    left, unequal, right = condition.partition(" != ")
    if unequal:
        return _evaluated(left, config) != _evaluated(right, config)
    words = condition.split()
    return bool(config.get(words[-1])) is (len(words) == 1)


def _expanded(
    patterns: Mapping[str, list[int | str]], ranges: Mapping[str, str], config: Mapping[str, Any]
) -> list[tuple[str, Shape]]:
    found: list[tuple[str, Shape]] = []
    for pattern, dims in patterns.items():
        shape = tuple(_evaluated(n, config) for n in dims)
        names = [pattern]
        for capture in (f"{{{name}}}" for name in ranges if f"{{{name}}}" in pattern):
            count = _evaluated(ranges[capture[1:-1]], config)
            names = [name.replace(capture, str(k)) for name in names for k in range(count)]
        found += [(name, shape) for name in names]
    return found

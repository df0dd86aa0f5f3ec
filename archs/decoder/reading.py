"""config.json of the composable decoder, read and checked before a weight is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import Kind, MdlError, Problem, input_error

if TYPE_CHECKING:
    from .schema import Decoder

COMPOSED, MODEL_TYPE = "MdlDecoderForCausalLM", "mdl_decoder"
"""The class and the model type that its config.json names."""
HYBRID = "MdlHybridForCausalLM"
"""The class where layers have a recurrence: vLLM asks the class, not the config, whether it has to keep states."""


def is_composed(config: Mapping[str, Any]) -> bool:
    """Whether config.json names the composable decoder, with recurrences or without."""
    return config.get("architectures") in ([COMPOSED], [HYBRID])


def checked(config: Mapping[str, Any]) -> Decoder:
    """The record of a config.json. Raises MdlError (INPUT) with everything that is wrong or can't be served."""
    from pydantic import ValidationError

    from .schema import decoder_of

    try:
        decoder = decoder_of(dict(config))
    except ValidationError as error:
        problems: list[Problem] = []
        for fault in error.errors(include_url=False):
            where = ".".join(map(str, fault["loc"]))
            what = fault["msg"].removeprefix("Value error, ")
            given = f", not {fault['input']!r}" if fault["loc"] and not isinstance(fault["input"], dict) else ""
            do = "see docs/decoder.md for what it may say"
            problems += [
                Problem(each + given, f"config.json: {where}" if where else "config.json", do)
                for each in what.split("; ")
            ]
        raise MdlError(Kind.INPUT, problems) from None
    named, needed = config.get("architectures"), [_class_of(decoder)]
    if named not in (None, needed):
        given = "with" if decoder.recurrence else "without"
        what = f"{named} {given} recurrence: vLLM asks the class whether it keeps states"
        raise input_error(what, "config.json: architectures", f"write {needed}")
    return decoder


def _class_of(decoder: Decoder) -> str:
    return HYBRID if decoder.recurrence else COMPOSED


def config_of(decoder: Mapping[str, Any]) -> dict[str, Any]:
    """config.json from the record's fields, checked: with the class, and without what is left to its default."""
    record = checked(decoder)
    config = {"architectures": [_class_of(record)], "model_type": MODEL_TYPE, **record.model_dump(exclude_unset=True)}
    if record.recurrence and record.recurrence.kind == "mamba2":
        config["mamba_chunk_size"] = record.recurrence.chunk  # where vLLM looks for it
    return config

"""What the target class holds: the independent authority that a plan is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..archs import targets
from ..errors import input_error, machine_error
from ..mappings.tensors import Shape


def expected_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Names and shapes of the parameters of the class that ``config`` names.

    From its file in archs/targets where there is one (no heavy import), else by building the class.
    """
    return targets.from_spec(config) or from_class(config)


def from_class(config: Mapping[str, Any]) -> dict[str, Shape]:
    """The same by building the transformers class on the meta device: seconds of imports, no memory.

    Tied parameters are listed once, as a safetensors file holds them. Raises MdlError (MACHINE) without
    transformers and torch, INPUT if transformers has no such class.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        name = config["architectures"][0]
        raise machine_error(
            f"checking a plan against {name} needs torch and transformers ({error})", do="pip install mdl[cpu]"
        ) from error
    name = str(config["architectures"][0])
    cls = getattr(transformers, name, None)
    if cls is None:
        raise input_error(f"transformers has no class {name}", do="add its tensors as a file in archs/targets")
    plain = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    with torch.device("meta"):
        model = cls(cls.config_class(**plain))
    tied = (getattr(model, "_tied_weights_keys", None) or ()) if config.get("tie_word_embeddings") else ()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in set(tied)}
    return {name: tuple(tensor.shape) for name, tensor in _as_stored(model, state).items()}


def _as_stored(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict under the names of files, which vLLM reads: transformers 5 renames and fuses while it loads."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 keeps the names of files
        return state
    return revert_weight_conversion(model, state)

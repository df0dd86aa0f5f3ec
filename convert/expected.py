"""What the target class holds: the independent authority that a plan is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..archs import targets
from ..archs.base import Arch, Dims
from ..archs.guard import own_tensors
from ..errors import input_error
from ..mappings.tensors import Shape, Target


def expected_target(config: Mapping[str, Any], arch: Arch | None = None, dims: Dims | None = None) -> Target:
    """Names and shapes of the parameters of the class that ``config`` names, and which of them are tied.

    From its file in archs/targets where there is one (no heavy import), else by building the class. What a class of the
    user's own holds, neither knows: its ``arch`` says it, in full or as "what that class holds". Whether the class does
    take all that and nothing else is seen by the coverage check of a verification, when vLLM loads it.
    """
    if arch is not None and dims is not None and arch.tensors is not None:
        if isinstance(arch.tensors, str):
            return expected_target({**config, "architectures": [arch.tensors]})
        return Target(own_tensors(arch, dims), {})
    if arch is not None and arch.served and arch.file and targets.from_spec(config) is None:
        do = "give Arch(…, tensors=…): names and shapes by dims, or the name of a class with the same"
        raise input_error(f"{arch.name} does not say what its own class {arch.served} holds", arch.file, do)
    return targets.from_spec(config) or from_class(config)


def expected_tensors(
    config: Mapping[str, Any], arch: Arch | None = None, dims: Dims | None = None
) -> Mapping[str, Shape]:
    """The names and shapes alone."""
    return expected_target(config, arch, dims).shapes


def from_class(config: Mapping[str, Any]) -> Target:
    """The same by building the transformers class on the meta device: seconds of imports, no memory.

    Tied parameters are listed once, as a safetensors file holds them. Raises MdlError (MACHINE) without
    transformers and torch, INPUT if transformers has no such class.
    """
    cls = targets.transformers_class(str(config["architectures"][0]))
    import torch

    known = cls.config_class(**{k: v for k, v in config.items() if k not in ("architectures", "model_type")})
    with torch.device("meta"):
        model = cls(known)
    ties = _ties(model) if known.tie_word_embeddings else {}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ties}
    stored = _as_stored(model, state)
    left_out = [name for name in _as_stored(model, dict(model.state_dict())) if name not in stored]
    twins = list(ties.values())  # the name of a tied head differs between memory and file; its twin's does not
    named = ties if set(left_out) == set(ties) else dict(zip(left_out, twins, strict=False))
    return Target({name: tuple(tensor.shape) for name, tensor in stored.items()}, named)


def _ties(model: Any) -> dict[str, str]:
    """The tied parameters and what they are tied to; transformers 4 lists the former only."""
    tied = getattr(model, "_tied_weights_keys", None) or {}
    if isinstance(tied, dict):
        return dict(tied)
    embedding = model.get_input_embeddings()
    twin = next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)
    return dict.fromkeys(tied, twin)


def _as_stored(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict under the names of files, which vLLM reads: transformers 5 renames and fuses while it loads."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 keeps the names of files
        return state
    return revert_weight_conversion(model, state)

"""A family that a user wrote: what goes wrong in its file is said of that file, with its line, not of mdl."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from msgspec.structs import replace

from ..errors import MdlError, input_error
from ..mappings.tensors import Shape
from .base import Arch, Dims, Inventory, Measure

if TYPE_CHECKING:
    import torch

_NOT_MINE = (LookupError, TypeError, ValueError)
"""What a family may stumble over in a stranger's tensors: it does not recognise them then."""


def guarded(arch: Arch, file: str, *, named: bool) -> Arch:
    """The family with its functions wrapped. ``named`` is whether the user asked for this very family: then its
    ``detect`` may not stumble either."""

    def detect(inventory: Inventory) -> list[str]:
        try:
            with blamed("detect(inventory)", file, arch.detect):
                found: Any = arch.detect(inventory)
        except MdlError as error:
            if not named and isinstance(error.__cause__, _NOT_MINE):
                return []
            raise
        _need(isinstance(found, list | tuple), f"detect returned {_kind(found)}", file, "return a list of sentences")
        return list(found)

    def dims(measure: Measure) -> None:
        do = "mend it; if this checkpoint is of another family, pass another --arch"
        with blamed("dims(measure)", file, arch.dims, do):
            arch.dims(measure)

    def hf_config(d: Dims) -> dict[str, Any]:
        with blamed("hf_config(dims)", file, arch.hf_config):
            found: Any = arch.hf_config(d)
        classes: Any = found.get("architectures") if isinstance(found, dict) else None
        what = "hf_config returned no dict with architectures: [CLASS]"
        _need(isinstance(classes, list) and bool(classes), what, file, "name the class that vLLM serves there")
        do = "have a vLLM plugin call AutoConfig.register, as `mdl new --target own` writes one"
        _need("auto_map" not in found, "hf_config writes auto_map, and no code of a layout ever runs", file, do)
        return found

    return replace(arch, detect=detect, dims=dims, hf_config=hf_config, file=file)


def own_tensors(arch: Arch, dims: Dims) -> dict[str, Shape]:
    """What a class of the user's own holds, by ``tensors(dims)``. Raises MdlError (INPUT) for what is no such table."""
    assert callable(arch.tensors)  # noqa: S101 - the caller has looked
    with blamed("tensors(dims)", arch.file, arch.tensors):
        found: Any = arch.tensors(dims)
        table = {str(name): tuple(int(n) for n in shape) for name, shape in dict(found).items()}
    _need(bool(table), "tensors(dims) returned no names", arch.file, "return {name: shape}, as config.json has it")
    return table


def build_eager(arch: Arch, dims: Dims) -> torch.nn.Module:
    """The family's eager module on the meta device. Raises MdlError (INPUT) for a user's own that can't be built."""
    import torch

    with torch.device("meta"):
        if not arch.file:
            return _function(arch)(dims)
        what = f"eager={arch.eager!r}"
        with blamed(
            what, arch.file, None, "name a module beside the file and a function in it: eager='foo_model:build'"
        ):
            build = _function(arch)
        do = "it is called as build(dims), with the sizes that dims settled; mdl loads the weights itself"
        with blamed(f"{what}: build(dims)", arch.file, build, do):
            module: Any = build(dims)
    _need(
        isinstance(module, torch.nn.Module), f"{what} returned {_kind(module)}", arch.file, "return a torch.nn.Module"
    )
    return cast("torch.nn.Module", module)


def load_weights(arch: Arch, module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put the raw tensors into the eager module, all of them."""
    if not arch.file:
        module.load_state_dict(weights, strict=True, assign=True)
        return
    do = "its state_dict must have the checkpoint's own names and shapes"
    with blamed(f"the module of eager={arch.eager!r}", arch.file, None, do):
        module.load_state_dict(weights, strict=True, assign=True)


def _function(arch: Arch) -> Callable[[Dims], torch.nn.Module]:
    name, _, function = arch.eager.partition(":")
    return getattr(importlib.import_module(name), function)


@contextmanager
def blamed(what: str, file: str, function: object = None, do: str = "mend the file and try again") -> Generator[None]:
    """Whatever the user's code raises, as an input error with the line of theirs that raised it."""
    try:
        yield
    except MdlError:
        raise
    except Exception as error:
        told = f"{what} raised {type(error).__name__}: {error}"
        raise input_error(told, _place(error, file, function), do) from error


def _place(error: Exception, file: str, function: object) -> str:
    """The innermost line in the user's folder. A call that failed before its first line has none: then the line of
    the function itself."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    folder = Path(file).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(folder)]
    frames = [f for f in frames if not Path(f.filename).is_relative_to(Path(__file__).parent.parent)] or frames
    if frames:
        return f"{frames[-1].filename}:{frames[-1].lineno}" + (f" ({frames[-1].line})" if frames[-1].line else "")
    compiled = getattr(function, "__code__", None)
    return f"{compiled.co_filename}:{compiled.co_firstlineno}" if compiled else file


def _need(holds: bool, what: str, file: str, do: str) -> None:
    if not holds:
        raise input_error(what, file, do)


def _kind(value: object) -> str:
    return type(value).__name__

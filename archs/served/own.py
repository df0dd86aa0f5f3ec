"""A vLLM class of the user's own, beside an arch file: how every process of vLLM is told of it.

What is installed is found by its entry point. What only lies in a folder is named on the command line (``--arch
FILE.py``), and vLLM starts processes that were never told; so the name travels in the environment, where mdl's own
plugin reads it in each of them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from ..base import Arch

VARIABLE = "MDL_OWN_CLASS"
"""Holds an :class:`Own` as JSON."""


class Own(Struct, frozen=True):
    """``architecture`` as config.json names it, ``model`` as ``"module:Class"``, ``folder`` where the module lies,
    ``model_type`` of config.json, and ``stamp``, which changes when a file there does."""

    architecture: str
    model: str
    folder: str
    model_type: str = ""
    stamp: str = ""

    def environment(self) -> dict[str, str]:
        """What a process needs so that vLLM's processes below it know the class, and can import it."""
        path = os.pathsep.join(filter(None, [self.folder, os.environ.get("PYTHONPATH", "")]))
        return {VARIABLE: json.dumps(asdict(self)), "PYTHONPATH": path}


def own_of(arch: Arch, config: Mapping[str, Any]) -> Own | None:
    """The class to tell vLLM of: that of a family whose file was named. None where vLLM finds the class by itself."""
    if not (arch.served and arch.root):
        return None
    from pathlib import Path

    module = Path(arch.root, *arch.served.partition(":")[0].split("."))
    files = sorted(module.parent.glob("*.py"))
    stamp = " ".join(f"{file.name}:{file.stat().st_mtime_ns}" for file in files)
    name, kind = str(config["architectures"][0]), str(config.get("model_type", ""))
    return Own(name, arch.served, arch.root, kind, stamp)


def register_own() -> None:
    """Tell this process's vLLM of the class that the environment names, if it names one; may be called twice."""
    told = os.environ.get(VARIABLE)
    if not told:
        return
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm import ModelRegistry

    own = Own(**json.loads(told))
    if own.folder not in sys.path:
        sys.path.insert(0, own.folder)
    if own.model_type and own.model_type not in CONFIG_MAPPING:
        from .own_config import OwnConfig

        AutoConfig.register(own.model_type, OwnConfig, exist_ok=True)
    ModelRegistry.register_model(own.architecture, own.model)

"""A LoRA adapter as PEFT saves it: what its settings say, and which of its tensors belong to which module.

``--merge-lora`` names its folder, or its file of weights: adapter_config.json lies beside adapter_model.safetensors.
Where the matrices lie in the checkpoint itself, beside the weights, it names adapter_config.json alone.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from ..archs.base import Inventory
from ..errors import Kind, MdlError, Problem, input_error, usage_error
from ..mappings.tensors import TensorInfo
from .beside import parse_settings
from .inventory import take_inventory
from .open import open_checkpoint

SETTINGS = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
"""As PEFT calls them; the last is torchtune's, in its own names."""
_USED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights")
_TOLD = ("peft_type", "base_model_name_or_path", "modules_to_save")
_TRAINING = (
    "auto_mapping", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
)  # fmt: skip
"""Where and how it was trained; the tensors themselves tell where they belong."""
_NOTHING = (None, False, 0, "", "none")
_MEANS = {
    "use_dora": "DoRA scales every merged column, too",
    "bias": "it trained biases of the model, too",
    "lora_bias": "its second matrix has biases",
    "trainable_token_indices": "it replaces rows of the embedding",
    "target_parameters": "it belongs to parameters, not to modules",
    "layer_replication": "it belongs to a model whose layers were doubled",
    "alora_invocation_tokens": "it takes effect behind certain tokens only",
    "megatron_config": "it belongs to layers in shards",
}
_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
"""Beginnings that leave the model's own weights alone."""
_PATTERN = re.compile(r"\^?[\w.\-\\*]+")
_MOST_STARS = 3
_MOST_ALPHA = 1e30
_PREFIX = "base_model.model."
_LITGPT = "lit_model.pth.lora"
_LORA = re.compile(r"(.+)\.(?:lora_(embedding_)?([ABab]))(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?")
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
_OF_LORA, _SAVED, _UNUSED = ".lora_", ".modules_to_save.", ".original_module."
_MERGE = "merge it where it was trained (model.merge_and_unload(), then save_pretrained) and convert that"


class Pair(Struct):
    """A module's two matrices: A [r, in] and B [out, r]; ``embedding`` as PEFT has them for a table."""

    embedding: bool = False
    a: TensorInfo | None = None
    b: TensorInfo | None = None


class Adapter(Struct, frozen=True):
    """An adapter's settings, and the file with them; its ``pairs`` by module, and ``saved``, the weights that take the
    place of the model's own, by their names."""

    path: Path
    settings: Mapping[str, Any]
    told_in: str
    files: tuple[str, ...]
    pairs: Mapping[str, Pair] = field(default_factory=dict[str, Pair])
    saved: Mapping[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])

    @property
    def transposed(self) -> bool:
        """Whether the modules that it was trained on store their weights [in, out]."""
        return bool(self.settings.get("fan_in_fan_out"))

    def scale(self, module: str, rank: int) -> float:
        """The factor of a module's product: alpha / r, or alpha / √r. Raises ValueError where the settings and the
        tensors' rank contradict each other."""
        said = _of(self.settings.get("rank_pattern"), module, self.settings.get("r"))
        alpha = _of(self.settings.get("alpha_pattern"), module, self.settings.get("lora_alpha"))
        if said != rank:
            raise ValueError(f"its matrices have rank {rank}, {SETTINGS} says {repr(said)[:100]}")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _MOST_ALPHA:
            raise ValueError(f"{SETTINGS} says {repr(alpha)[:100]} for its lora_alpha, which is no number")
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank


def _of(patterns: Any, module: str, otherwise: Any) -> Any:
    """A module's own value, by the first pattern that is the end of its name."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def open_adapter(path: Path, inventory: Inventory) -> tuple[Adapter, Inventory]:
    """Read an adapter's settings, and where its tensors lie; and the checkpoint without what is the adapter's. Raises
    MdlError: USAGE where there is none, INPUT for one that can't be merged exactly, with every reason."""
    folder = path if path.is_dir() else path.parent
    file = folder / SETTINGS
    if not path.exists():
        raise usage_error("--merge-lora: there is no such file or folder", str(path), "give the folder of the adapter")
    if not file.is_file():
        what = f"--merge-lora: no {SETTINGS} lies there, which says with which scale an adapter is added"
        do = "give the folder that model.save_pretrained() wrote of a PeftModel"
        if (folder / _LITGPT).is_file():
            do = f"litgpt's own ({_LITGPT}) is merged by litgpt: `litgpt merge_lora {folder}`, then convert that folder"
        raise usage_error(what, str(path), do)
    try:
        settings = parse_settings(file)
    except (ValueError, OSError) as error:
        raise input_error(f"can't be parsed ({error})", str(file), "mend or copy it again") from error
    if problems := _refused(settings, file):
        raise MdlError(Kind.INPUT, problems)
    own = os.path.abspath(file)  # noqa: PTH100 - as the checkpoint's own files are named, symlinks and all
    if path.name == SETTINGS:
        held, inventory = _within(inventory, path)
        return _sorted(Adapter(path.absolute(), settings, own, (own,)), held), inventory
    weights = next((folder / name for name in _WEIGHTS if path.is_dir() and (folder / name).is_file()), path)
    found = take_inventory(open_checkpoint(weights))
    return _sorted(Adapter(path.absolute(), settings, own, (*found.files, own)), found.tensors), inventory


def _within(inventory: Inventory, path: Path) -> tuple[dict[str, tuple[TensorInfo, ...]], Inventory]:
    """The matrices that lie in the checkpoint itself, and the checkpoint without them, under the names that it had
    before PEFT wrapped its layers. Raises MdlError where there are none, or two weights would have one name."""
    held = {name: infos for name, infos in inventory.tensors.items() if _OF_LORA in name}
    if not held:
        what = f"--merge-lora: {SETTINGS} alone is for matrices in the checkpoint itself, and there are none"
        raise usage_error(what, str(path), "give the folder that holds the adapter's weights, too")
    trained = {_unwrapped(name) for name in inventory.tensors if _SAVED in name}
    rest: dict[str, tuple[TensorInfo, ...]] = {}
    left: list[str] = []
    problems: list[Problem] = []
    for name, infos in inventory.tensors.items():
        plain = _unwrapped(name)
        if _UNUSED in name and plain.replace(_UNUSED, ".") in trained:
            left.append(name)
        elif plain in rest:
            what = f"{rest[plain][0].raw} and {infos[0].raw} would both be {plain} without what PEFT put around it"
            problems.append(Problem(what, inventory.path, "save one of them only"))
        elif name not in held:
            rest[plain] = tuple(replace(info, name=plain) for info in infos)
    if problems:
        raise MdlError(Kind.INPUT, problems)
    remark = "taken as not merged yet: loralib's model.eval() and PEFT's merge_adapter() merge, and leave the matrices"
    unused = [f"left out: {', '.join(left)}, in whose place modules_to_save was trained"] if left else []
    return held, replace(inventory, tensors=rest, remarks=(*inventory.remarks, f"LoRA's matrices {remark}", *unused))


def _unwrapped(name: str) -> str:
    return _WRAPPED.sub("", name.removeprefix(_PREFIX))


def _refused(settings: Mapping[str, Any], file: Path) -> list[Problem]:
    """Everything that makes more of an adapter than B · A, or that is not known."""
    if settings.get("peft_type") != "LORA":
        what = f"is an adapter of the type {settings.get('peft_type')!r}; only LORA is added to weights by B · A"
        return [Problem(what, str(file), _MERGE)]
    known = {*_USED, *_TOLD, *_TRAINING}
    found = {key: value for key, value in settings.items() if key not in known and not _says_nothing(value)}
    problems = [Problem(f"{key} is {value!r}: {_meaning(key)}", str(file), _MERGE) for key, value in found.items()]
    init = settings.get("init_lora_weights")
    if not any(init is known or (isinstance(init, str) and init == known) for known in _INIT):
        what = f"init_lora_weights is {init!r}: beginning so changes the model's own weights, which are not these"
        problems.append(
            Problem(what, str(file), f"{_MERGE}; or save it as plain LoRA (PEFT's docs on {init} tell how)")
        )
    for key in ("use_rslora", "fan_in_fan_out"):
        if settings.get(key) not in (None, True, False):
            problems.append(
                Problem(f"{key} is {settings[key]!r}, neither true nor false", str(file), "write one of them")
            )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        for pattern in patterns if isinstance(patterns, dict) else (patterns,):
            if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern) or pattern.count("*") > _MOST_STARS:
                what = f"{key} has {pattern!r}, a regular expression that is not read here"
                problems.append(Problem(what, str(file), "write the names of the modules that it stands for"))
    return problems


def _says_nothing(value: Any) -> bool:
    return value in _NOTHING or (isinstance(value, dict | list) and not value)


def _meaning(key: str) -> str:
    return _MEANS.get(key, "this is not known here, and may be more than B · A")


def _sorted(adapter: Adapter, tensors: Mapping[str, tuple[TensorInfo, ...]]) -> Adapter:
    """The adapter with each of its tensors under the module that it belongs to. Raises MdlError (INPUT)."""
    pairs: dict[str, Pair] = {}
    saved: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for name, (info, *more) in tensors.items():
        plain = name.removeprefix(_PREFIX)
        if match := _LORA.fullmatch(plain):
            pair = pairs.setdefault(match[1], Pair(bool(match[2])))
            side = match[3].lower()
            twice = getattr(pair, side) is not None
            setattr(pair, side, info)
        elif _OF_LORA in plain:
            problems.append(Problem(f"{name} is more than the two matrices of LoRA", info.file, _MERGE))
            continue
        else:
            whole = _unwrapped(name)
            twice = whole in saved
            saved[whole] = info
        if twice or more:
            problems.append(Problem(f"{name} is not the only one of its module", info.file, "keep one adapter there"))
    for module, pair in pairs.items():
        if pair.a is None or pair.b is None:
            what = f"{module} has one of its two matrices only"
            problems.append(Problem(what, str(adapter.path), "copy the adapter again"))
    if problems or not pairs:
        raise MdlError(
            Kind.INPUT, problems or [Problem("holds no LoRA matrices", str(adapter.path), "give the adapter's folder")]
        )
    return replace(adapter, pairs=pairs, saved=saved)

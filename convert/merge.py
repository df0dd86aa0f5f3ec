"""`--merge-lora`: an adapter's matrices become part of the weights that they belong to, all of them, or are refused."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from ..archs.base import Inventory
from ..errors import Kind, MdlError, Problem, input_error
from ..mappings.expand import Expanded
from ..mappings.tensors import Made, Shape, TensorInfo
from .adapter import SETTINGS, Adapter, Pair, open_adapter
from .composed import LORA, REPLACED, whole_of

_TYPES = ("float64", "float32", "bfloat16", "float16")
_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt"})
"""Model types of transformers whose blocks store their weights [in, out]."""
_HEADS = frozenset({"lm_head", "score"})
_SHOWN = 5
_SETTINGS = "write r and lora_alpha (or its patterns) as they were in training, or copy the file again"
_OTHER = "give the adapter of this very model, or the model that this adapter was trained on"


def with_adapter(inventory: Inventory, path: Path) -> Inventory:
    """The inventory whose weights hold an adapter. Raises MdlError with everything that keeps it from being merged
    exactly: tensors that belong nowhere, other shapes, settings that mean more than B · A."""
    adapter, inventory = open_adapter(path, inventory)
    if inventory.ranks > 1:
        what = f"this checkpoint lies in {inventory.ranks} rank files; an adapter is merged into whole weights"
        raise input_error(what, inventory.path, "convert without --merge-lora, and merge into the layout")
    work = _Merger(inventory, adapter)
    merged = work.merged()
    if work.problems:
        raise MdlError(Kind.INPUT, work.problems)
    extras = {key: value for key, value in inventory.extras.items() if key != Path(SETTINGS).stem}
    return replace(
        inventory,
        tensors=merged,
        extras=extras,
        files=(*inventory.files, *(file for file in adapter.files if file not in inventory.files)),
        remarks=(*inventory.remarks, *work.remarks()),
    )


class _Merger:
    def __init__(self, inventory: Inventory, adapter: Adapter) -> None:
        self.inventory = inventory
        self.adapter = adapter
        self.problems: list[Problem] = []
        self.scales: Counter[float] = Counter()
        self.replaced: list[str] = []
        self.casts: list[str] = []
        self._names = _aliases(inventory, adapter)

    def merged(self) -> dict[str, tuple[TensorInfo, ...]]:
        """Every tensor, those with a part in the adapter composed of both."""
        tensors = dict(self.inventory.tensors)
        lost = [name for name in self._wanted() if name not in self._names]
        if lost:
            self._tell_lost(lost)
            return tensors
        for said, new in self.adapter.saved.items():
            name = self._names[said]
            old = tensors[name][0]
            if new.dtype != old.dtype:
                self.casts.append(f"{new.dtype} to {old.dtype}")
            made = whole_of(Made(REPLACED, (new,)), replace(new, dtype=old.dtype, rank=old.rank), name, old.raw)
            tensors[name] = (made,)
            self.replaced.append(name)
        for module, pair in self.adapter.pairs.items():
            name = self._names[f"{module}.weight"]
            if made := self._sum(module, pair, tensors[name][0]):
                tensors[name] = (made,)
        return tensors

    def remarks(self) -> list[str]:
        """What was merged, into how many tensors and with which scale."""
        a = self.adapter
        scales = ", ".join(f"{scale:g} ({n:,} of them)" for scale, n in sorted(self.scales.items()))
        if len(self.scales) == 1:
            scales = f"{next(iter(self.scales)):g}"
        total = len(self.inventory.tensors)
        base = str(a.settings.get("base_model_name_or_path") or "")[:200]
        whose = "in the checkpoint itself" if a.path.name == SETTINGS else f"of {a.path.name}"
        said = [
            f"LoRA {whose} is merged into {self.scales.total():,} of {total:,} tensors: W + scale · (B A), "
            f"scale {scales}, in float64, rounded once to W's own type (PEFT rounds the product and then the sum)"
            + (f"; it names {base} as its model" if base.isprintable() and base else "")
        ]
        if self.replaced:
            names = ", ".join(self.replaced[:_SHOWN]) + (" …" if len(self.replaced) > _SHOWN else "")
            cast = f", cast from {' and '.join(sorted({*self.casts}))}" if self.casts else ""
            said.append(f"{a.path.name} brings its own {names} in the place of the checkpoint's{cast}")
        return said

    def _wanted(self) -> list[str]:
        return [*self.adapter.saved, *(f"{module}.weight" for module in self.adapter.pairs)]

    def _tell_lost(self, lost: list[str]) -> None:
        where, known = str(self.adapter.path), list(self._names)
        if len(lost) == len(self._wanted()):
            what = (
                f"none of the adapter's {len(lost):,} weights is in the checkpoint: it has {lost[0]}, "
                f"the checkpoint {next(iter(self.inventory.tensors), 'nothing')}"
            )
            self.problems.append(Problem(what, where, _OTHER))
            return
        for name in lost[:_SHOWN]:
            near = difflib.get_close_matches(name, known, 3, 0.6)
            hint = f"nearest: {', '.join(near)}" if near else _OTHER
            self.problems.append(Problem(f"{name} is in the adapter, but not in the checkpoint", where, hint))
        if len(lost) > _SHOWN:
            self.problems.append(Problem(f"and {len(lost) - _SHOWN:,} more like these", where, _OTHER))

    def _sum(self, module: str, pair: Pair, base: TensorInfo) -> TensorInfo | None:
        a, b = pair.a, pair.b
        if a is None or b is None:
            return None
        where, do = str(self.adapter.path), _OTHER
        try:
            turned = self._turned(pair.embedding, base.shape, a.shape, b.shape)
            self._check_types(base, a, b)
            where, do = self.adapter.told_in, _SETTINGS
            scale = self.adapter.scale(module, a.shape[0])
        except ValueError as error:
            self.problems.append(Problem(f"{module}: {error}", where, do))
            return None
        self.scales[scale] += 1
        return whole_of(Made(LORA, (base, a, b), scale, turned, self.adapter.told_in), base, base.name, base.raw)

    def _turned(self, embedding: bool, weight: Shape, a: Shape, b: Shape) -> bool:
        """Whether W is stored as the transpose of B A. Raises ValueError where B A does not fit, or where it fits both
        ways and the settings can't be believed."""
        if len(a) != 2 or len(b) != 2 or len(weight) != 2 or a[0] != b[1] or not a[0]:
            raise ValueError(f"A {list(a)}, B {list(b)} and the weight {list(weight)} are no matrices of one product")
        product = b[0], a[1]
        if weight not in (product, product[::-1]):
            raise ValueError(f"B A is {list(product)}, the checkpoint's weight {list(weight)}")
        if embedding or product[0] != product[1]:
            if embedding and weight != product[::-1]:
                raise ValueError(f"B A is {list(product)}, the checkpoint's table {list(weight)}")
            return weight != product
        config = self.inventory.extras.get("config")
        kind = config.get("model_type") if isinstance(config, Mapping) else None
        if kind in _CONV1D and not self.adapter.transposed:
            raise ValueError(
                f"it is square, and fan_in_fan_out is false, which is not so of {kind}'s blocks: one setting can't "
                "tell which layers store [in, out]"
            )
        return self.adapter.transposed

    def _check_types(self, *infos: TensorInfo) -> None:
        if wrong := [info for info in infos if info.dtype not in _TYPES]:
            raise ValueError(f"{wrong[0].name} is {wrong[0].dtype}, which is not added to")


def _aliases(inventory: Inventory, adapter: Adapter) -> dict[str, str]:
    """The names of tensors by what a module may call them: as they are here; as their writer named them; and, where a
    base model lies in the file, under the attribute by which the adapter's model holds that (``transformer.``)."""
    names = {name: name for name in inventory.tensors}
    for name, infos in inventory.tensors.items():
        names.setdefault(infos[0].raw.rpartition("/")[2], name)
    outer = next(iter(adapter.pairs)).partition(".")[0] + "."
    if not any(name.startswith(outer) for name in names):
        names |= {outer + name: name for name in inventory.tensors}
    return names


def refuse_tied(inventory: Inventory, expanded: Expanded, *, tied: bool) -> None:
    """Raise MdlError (INPUT) where an adapter changes an embedding that is the head as well: what was trained has the
    head as it was, and a class that ties the two can't."""
    for tie in expanded.ties if tied else ():
        held = inventory.tensors.get(tie.twin)
        if held and held[0].made and held[0].made.how in (LORA, REPLACED) and tie.source not in inventory:
            what = f"the adapter changes {tie.twin} alone, which is the head {tie.source} as well in this checkpoint"
            do = "save the model with a head of its own (tie_word_embeddings=False, the weight copied), and merge then"
            raise input_error(what, inventory.path, do)

"""A file of hyperparameters that the user names (``--config FILE``): found by a family's own keys, and accounted for.

A value is looked for under the key that the family would read beside the weights (``params.dim``, or ``dim`` alone),
under the name of the dim, and under the name that Hugging Face gives it. Inside tables only those count that hold a
model's settings: ``optimizer.eps`` is no ``norm_eps``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from msgspec import Struct

from .settings import ROPE_TABLES, changes, facts, in_force

SIDECARS = ("params", "config", "meta", "model_args", "model_config", "hparams", "args", "configs")
"""Extras that a file of this name, or a table of this name in it, becomes, as if it lay beside the weights."""
_TABLES = frozenset(
    {*SIDECARS, "args", "arch", "architecture", "cfg", "gpt", "hp", "hyper_parameters", "llm", "model", "model_params"}
    | {"net", "network", "rope", "rope_parameters", "text_config", "transformer"}
)
_HUGGING_FACE = {
    "activation": ("hidden_act", "activation_function"),
    "attention_scalar": ("query_pre_attn_scalar",),
    "attention_softcap": ("attn_logit_softcapping",),
    "context": ("max_position_embeddings", "n_positions"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok",),
    "ffn": ("intermediate_size",),
    "heads": ("num_attention_heads",),
    "hidden": ("hidden_size",),
    "kv_heads": ("num_key_value_heads",),
    "layers": ("num_hidden_layers",),
    "logit_softcap": ("final_logit_softcapping",),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "rotary_percent": ("rotary_pct", "partial_rotary_factor"),
    "tied": ("tie_word_embeddings",),
    "vocab": ("vocab_size",),
}


class ConfigFile(Struct, frozen=True):
    """A read file: its path and its settings as plain values."""

    path: str
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The file's name, as provenance tells it."""
        return Path(self.path).name


class Given:
    """The settings of one file while a checkpoint is measured: what was asked for is noted."""

    def __init__(self, file: ConfigFile) -> None:
        self.file = file
        self._leaves = dict(_leaves(file.values))
        self._tables = dict(_tables(file.values))
        self._in_force = dict(in_force(self._leaves))
        self._used: set[str] = set()

    def find(self, name: str, keys: Iterable[str] = (), paths: Iterable[str] = ()) -> dict[str, Any]:
        """What the file says about a dim, by dotted key: more than one entry where it says it in several places.

        ``keys`` are the dim's other names, ``paths`` the dotted ones under which a family reads it beside the weights.
        """
        exact = [place for path in paths for place in (path, path.partition(".")[2]) if place in self._leaves]
        named, usual = self._under({name, *keys}), self._under({*_HUGGING_FACE.get(name, ())})
        self._used |= {*exact, *named}
        said = {place: self._in_force.get(place) for place in (*exact, *named)}
        if not any(value is not None for value in said.values()):
            self._used |= {*usual}
            said = {place: self._in_force.get(place) for place in usual} or self._of_rope(name)
        return {place: value for place, value in said.items() if value is not None}

    def find_whole(self, name: str, keys: Iterable[str] = ()) -> dict[str, Any]:
        """What the file says under just these names, tables included, by dotted key."""
        everything = {**self._tables, **self._leaves}
        places = _placed(everything, {name, *keys})
        self._used |= {leaf for leaf in self._leaves for place in places if f"{leaf}.".startswith(f"{place}.")}
        return {place: everything[place] for place in places if everything[place] is not None}

    def extras(self, present: Iterable[str]) -> dict[str, Any]:
        """What becomes extras, for families that look there by themselves; none that are ``present`` is replaced."""
        stem = Path(self.file.path).stem
        tables = {stem: ("", self.file.values)} if stem in SIDECARS else {}
        for key in SIDECARS:
            if isinstance(self.file.values.get(key), dict):
                tables.setdefault(key, (f"{key}.", self.file.values[key]))
        return {key: _Seen(values, at, self._used) for key, (at, values) in tables.items() if key not in present}

    def forget(self) -> None:
        """Forget what was asked for until now: recognising a family looks at the settings of all of them."""
        self._used.clear()

    def unused(self) -> list[str]:
        """The keys that nobody asked for."""
        return [key for key in self._leaves if key not in self._used]

    def changing(self) -> dict[str, Any]:
        """Settings that nobody asked for, and that change what the model computes."""
        used = {*self._used}
        left = [key for key in self.unused() if not any(key.startswith(f"{table}.") for table in used)]
        return {k: self._in_force[k] for k in left if k in self._in_force and changes(k, self._in_force[k], _is_model)}

    def _under(self, names: set[str]) -> list[str]:
        return _placed(self._leaves, names)

    def _of_rope(self, name: str) -> dict[str, Any]:
        """A dim of rotary positions by what Hugging Face's tables of them call it."""
        names, kinds = set(facts()["rope"].get(name, ())), facts()["rope_types"]
        places = [(place, *place.rpartition(".")[::2]) for place in self._leaves]
        inside = [
            place
            for place, table, last in places
            if last in names and table.rpartition(".")[2] in ROPE_TABLES and _is_model(table.rpartition(".")[0])
        ]
        self._used |= {*inside}
        said = {place: self._leaves[place] for place in inside}
        return {place: kinds.get(value, value) if type(value) is str else value for place, value in said.items()}


class _Seen(dict[str, Any]):
    """A table of settings that notes which of its keys are read."""

    def __init__(self, values: Mapping[str, Any], at: str, used: set[str]) -> None:
        nested = {
            k: _Seen(cast("Mapping[str, Any]", v), f"{at}{k}.", used) for k, v in values.items() if type(v) is dict
        }
        super().__init__({**values, **nested})
        self._at, self._read = at, used

    def __getitem__(self, key: str) -> Any:
        self._read.add(self._at + key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]  # one of dict's overloads is enough
        """As dict's."""
        found = super().get(key, default)
        self._read.add(self._at + key)
        return found

    def __iter__(self) -> Iterator[str]:
        self._read |= {self._at + key for key in super().__iter__()}
        return super().__iter__()

    def items(self) -> Any:
        """As dict's; all keys count as read."""
        self._read |= {self._at + key for key in super().__iter__()}
        return super().items()


def _leaves(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no table, by its dotted key."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(cast("dict[str, Any]", value), f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def _tables(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Every table with something in it, by its dotted key."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield f"{at}{key}", value
            yield from _tables(cast("dict[str, Any]", value), f"{at}{key}.")


def _placed(places: Iterable[str], names: set[str]) -> list[str]:
    """Those whose last word is one of the names, in a table that may hold a model's settings."""
    split = [(place, *place.rpartition(".")[::2]) for place in places]
    return [place for place, table, last in split if last in names and _is_model(table)]


def _is_model(table: str) -> bool:
    return not table or all(part in _TABLES for part in table.split("."))

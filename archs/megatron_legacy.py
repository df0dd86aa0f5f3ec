"""Megatron-LM before megatron-core (megatron/model, later megatron/legacy): the same models under older names.

Rows of query_key_value lie in an order that checkpoint_version tells: q, k and v one behind the other (none, or 0), the
three of each channel side by side (1.0), or group by group, as megatron-core has them (2.0 and later). Sizes, class and
config.json are those of :mod:`.megatron`, whose names the tensors are given first: :func:`core_name`.
"""

from __future__ import annotations

import re

from msgspec.structs import replace

from . import megatron
from .base import Arch, Inventory, Measure
from .classes.megatron import hf_config

_LAYER = re.compile(r"language_model\.(encoder|transformer)\.layers\.(\d+)\.(.+)")
_PARTS = {
    "query_key_value": "self_attention.linear_qkv",
    "dense": "self_attention.linear_proj",
    "dense_h_to_4h": "mlp.linear_fc1",
    "dense_4h_to_h": "mlp.linear_fc2",
    "input_layernorm": "input_layernorm",
    "input_norm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "post_attention_norm": "pre_mlp_layernorm",
    "final_layernorm": "final_layernorm",
    "final_norm": "final_layernorm",
}
"""megatron-core's names of the modules of a layer, and of the norm behind all of them."""
_OUTSIDE = {
    "language_model.embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
    "language_model.embedding.position_embeddings.weight": "embedding.position_embeddings.weight",
    "language_model.output_layer.weight": "output_layer.weight",
    "word_embeddings_for_head.weight": "output_layer.weight",
}
_WORDS = {
    "encoder": ("encoder", "transformer"),
    "attention": ("self_attention", "attention"),
    "input_norm": ("input_layernorm", "input_norm"),
    "second_norm": ("post_attention_layernorm", "post_attention_norm"),
    "final_norm": ("final_layernorm", "final_norm"),
}
"""What the same thing was called at different times; the first is what it is where neither is there."""


def core_name(name: str) -> str:
    """megatron-core's name of a tensor; "" for one that it does not have."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    *path, module, kind = name.split(".")
    found = _LAYER.fullmatch(name)
    if module not in _PARTS or path[:1] != ["language_model"]:
        return ""
    return f"decoder.layers.{found[2]}.{_PARTS[module]}.{kind}" if found else f"decoder.{_PARTS[module]}.{kind}"


def detect(inv: Inventory) -> list[str]:
    """query_key_value and dense below language_model."""
    if "language_model.embedding.word_embeddings.weight" not in inv:
        return []
    if not any("query_key_value" in name and _LAYER.fullmatch(name) for name in inv.tensors):
        return []
    because = "language_model.encoder.layers.N.self_attention.query_key_value is Megatron-LM's name before its core"
    same = (
        "query_key_value, dense, dense_h_to_4h, dense_4h_to_h are the core's linear_qkv, linear_proj, linear_fc1 and 2"
    )
    return [because, same, *megatron.where(inv)]


def dims(m: Measure) -> None:
    """What :mod:`.megatron` says of the same tensors under its names, and what they are called here."""
    own = m.inventory
    for word, names in _WORDS.items():
        there = {part for name in own.tensors for part in name.split(".")}
        name = next((name for name in names if name in there), names[0])
        m.set(word, kind=str, shape=(name, "what it is called"))
    tensors = {core: infos for name, infos in own.tensors.items() if (core := core_name(name))}
    m.inventory = replace(own, tensors=tensors)
    try:
        megatron.dims(m)
    finally:
        m.inventory = own
    _order(m)


def _order(m: Measure) -> None:
    """The order of query_key_value's rows."""
    whole = bool(megatron.arguments(m.inventory)) or "iteration" in m.inventory.extras
    silent = (0.0, "the file has none, which Megatron-LM takes for 0") if whole else None
    ask = "0 (q, k, v), 1 (channels), or 3 (groups)? It lay beside the weights in Megatron-LM's file"
    m.set("checkpoint_version", kind=float, file=("checkpoint_version",), default=silent, ask=ask)
    version = m["checkpoint_version"]
    rows = {0.0: "q, k, v", 1.0: "channels"}.get(version, "groups") if isinstance(version, float) else ""
    m.accept("qkv_order", rows, "checkpoint_version")
    if rows not in ("groups", "") and m["target"] not in ("GPT2", None):
        what = f"checkpoint_version {version} with rotary positions: no release of Megatron-LM wrote that"
        m.problem(
            what, do="pass --set checkpoint_version=3 if q, k and v lie group by group, as all releases since have them"
        )
    for flag, order in {"gpt2_groups": "groups", "gpt2_thirds": "q, k, v", "gpt2_channels": "channels"}.items():
        m.accept(flag, m["gpt2"] is True and rows == order, f"what the mapping does for {m['target']}")
    m.accept("thirds", rows == "q, k, v", "order of the rows")


ARCH = Arch(
    name="megatron_legacy",
    title="Megatron-LM before megatron-core",
    source="NVIDIA/Megatron-LM, megatron/model",
    target="the class that its arguments describe",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.megatron_legacy:build",
)

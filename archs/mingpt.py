"""karpathy/minGPT since June 2022: a bare state dict with nanoGPT's names; config.json lies beside it."""

from __future__ import annotations

from .base import Arch, Inventory, Measure, lookup
from .nanogpt import fused_names, fused_sizes, head_count, hf_config, of_mingpt

PRESETS = {
    "openai-gpt": (12, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
    "gopher-44m": (8, 16, 512),
    "gpt-mini": (6, 6, 192),
    "gpt-micro": (4, 4, 128),
    "gpt-nano": (3, 3, 48),
}
"""model_type → (n_layer, n_head, n_embd): the table in minGPT's GPT.__init__."""


def detect(inv: Inventory) -> list[str]:
    """nanoGPT's names without hyperparameters in the file, with mask buffers, biases and a head of its own."""
    because = fused_names(inv, "minGPT's")
    if not because or not of_mingpt(inv):
        return []
    because.append("transformer.h.N.attn.bias are mask buffers, lm_head is not the embedding, there are no model_args")
    if lookup(inv.extras, "config.model.model_type") is not None or lookup(inv.extras, "config.model.n_layer"):
        because.append("config.json beside it holds minGPT's model settings")
    return because


def dims(m: Measure) -> None:
    """Sizes from the shapes, checked against config.json, which may say no more than the name of a preset."""
    fused_sizes(m, "config.model")
    more = "; minGPT writes a config.json beside model.pt, with model_type or n_head"
    head_count(m, file=("config.model.n_head",), default=_preset(m), more=more)
    m.set("norm_eps", kind=float, default=(1e-5, "nn.LayerNorm's default, which minGPT's model.py takes"))
    gelu = ("gelu_new", "NewGELU of minGPT's model.py: the tanh form, in every version with these names")
    m.set("activation", kind=str, default=gelu, choices=("gelu_new", "gelu"))


def _preset(m: Measure) -> tuple[int, str] | None:
    """The heads of the preset that config.json names, which has to have the width and depth of the tensors."""
    name = lookup(m.inventory.extras, "config.model.model_type")
    if not isinstance(name, str) or name not in PRESETS or lookup(m.inventory.extras, "config.model.n_head"):
        return None
    layers, heads, hidden = PRESETS[name]
    if (m["layers"], m["hidden"]) == (layers, hidden):
        return heads, f"config.json says model_type {name}: {heads} heads in minGPT's table"
    found = f"{m['layers']} layers of width {m['hidden']}"
    m.problem(
        f"config.json says model_type {name}, which has {layers} layers of width {hidden}, but there are {found}",
        do="take the config.json away if it belongs to another model, and pass --set n_head=N",
    )
    return None


ARCH = Arch(
    name="mingpt",
    title="minGPT",
    source="karpathy/minGPT since June 2022",
    target="GPT2LMHeadModel",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.nanogpt:build",
)

"""Where a target class keeps what every transformer has: tensors and config fields, found by their role.

A mutation is written once, against roles ("the key projection of layer 1"); this table knows the names. Views are
handed out in nn.Linear's orientation, [outputs, inputs], whatever the class stores, and fused projections in parts:
what is changed in a view is changed in the stored tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from ..errors import input_error

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]
Config = dict[str, Any]


class Part(Struct, frozen=True):
    """A projection within a layer: its path, and which of ``of`` equal blocks of that tensor's outputs it is."""

    path: str
    block: int = 0
    of: int = 1


class Roles(Struct, frozen=True):
    """The names of one target class. ``{i}`` stands for a layer, ``{e}`` for an expert.

    ``top`` maps embedding, head, final_norm and positions to their paths; ``parts`` maps q, k, v, o, gate, up, down,
    q_norm, k_norm, router, expert_gate, expert_up and expert_down to theirs inside a layer. ``fields`` maps layers,
    heads, kv_heads, head_dim, hidden, eps, activation, experts and top_k to fields of config.json. ``transposed``
    says that matrices in layers are stored [inputs, outputs].
    """

    layer: str
    top: Mapping[str, str]
    parts: Mapping[str, Part]
    norms: tuple[str, ...]
    attention: str
    mlp: str
    fields: Mapping[str, str]
    transposed: bool = False


_LLAMA = Roles(
    layer="model.layers.{i}",
    top={"embedding": "model.embed_tokens", "head": "lm_head", "final_norm": "model.norm"},
    parts={
        **{role: Part(f"self_attn.{role}_proj") for role in ("q", "k", "v", "o")},
        **{role: Part(f"mlp.{role}_proj") for role in ("gate", "up", "down")},
    },
    norms=("input_layernorm", "post_attention_layernorm"),
    attention="self_attn",
    mlp="mlp",
    fields={
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "hidden": "hidden_size",
        "eps": "rms_norm_eps",
        "activation": "hidden_act",
    },
)

_GPT2 = Roles(
    layer="transformer.h.{i}",
    top={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "head": "lm_head",
        "final_norm": "transformer.ln_f",
    },
    parts={
        **{role: Part("attn.c_attn", block, 3) for block, role in enumerate(("q", "k", "v"))},
        "o": Part("attn.c_proj"),
        "up": Part("mlp.c_fc"),
        "down": Part("mlp.c_proj"),
    },
    norms=("ln_1", "ln_2"),
    attention="attn",
    mlp="mlp",
    fields={
        "layers": "n_layer",
        "heads": "n_head",
        "hidden": "n_embd",
        "eps": "layer_norm_epsilon",
        "activation": "activation_function",
    },
    transposed=True,
)

_QK_NORMS = {role: Part(f"self_attn.{role}") for role in ("q_norm", "k_norm")}
_MIXTRAL_EXPERTS = {
    "router": Part("block_sparse_moe.gate"),
    "expert_gate": Part("block_sparse_moe.experts.{e}.w1"),
    "expert_up": Part("block_sparse_moe.experts.{e}.w3"),
    "expert_down": Part("block_sparse_moe.experts.{e}.w2"),
}

ROLES: Mapping[str, Roles] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": replace(_LLAMA, parts={**_LLAMA.parts, **_QK_NORMS}),
    "MixtralForCausalLM": replace(
        _LLAMA,
        parts={**{role: _LLAMA.parts[role] for role in ("q", "k", "v", "o")}, **_MIXTRAL_EXPERTS},
        mlp="block_sparse_moe",
        fields={**_LLAMA.fields, "experts": "num_local_experts", "top_k": "num_experts_per_tok"},
    ),
    "Gemma2ForCausalLM": replace(
        _LLAMA, norms=(*_LLAMA.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    ),
    "GPT2LMHeadModel": _GPT2,
}


class Model:
    """The tensors and the config of one layout, by role. What it hands out are views: change them in place."""

    def __init__(self, tensors: Tensors, config: Config) -> None:
        self.tensors = tensors
        self.config = config
        self.roles = roles_of(config)

    @property
    def layers(self) -> int:
        """How many layers config.json says there are."""
        return int(self.value("layers"))

    @property
    def one(self) -> int:
        """The layer that mutations of a single layer change: not the first, if there is another."""
        return min(1, self.layers - 1)

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.value("heads"))

    @property
    def kv_heads(self) -> int:
        """Key heads."""
        return int(self.value("kv_heads") or self.heads)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return int(self.value("head_dim") or self.value("hidden") // self.heads)

    def value(self, role: str) -> Any:
        """A config value by its role; None where the class or this config has no such field."""
        name = self.roles.fields.get(role)
        return None if name is None else self.config.get(name)

    def set(self, role: str, value: Any) -> None:
        """Change a config value by its role."""
        self.config[self.roles.fields[role]] = value

    def prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with, the dot included."""
        return self.roles.layer.format(i=layer) + "."

    def name(self, role: str, layer: int = 0, kind: str = "weight", expert: int = 0) -> str:
        """The stored tensor that holds a role; empty where the class has no such role."""
        if role in self.roles.top:
            return f"{self.roles.top[role]}.{kind}"
        part = self.roles.parts.get(role)
        return "" if part is None else f"{self.prefix(layer)}{part.path.format(e=expert)}.{kind}"

    def has(self, *roles: str, kind: str = "weight") -> bool:
        """Whether the files hold all of these roles (in layer 0)."""
        return all(self.name(role, kind=kind) in self.tensors for role in roles)

    def fused(self, role: str) -> bool:
        """Whether a role shares its tensor with others."""
        return self.roles.parts[role].of > 1

    def view(self, role: str, layer: int = 0, kind: str = "weight", expert: int = 0) -> Tensor:
        """The values of a role: [outputs, inputs] or [outputs]. Raises KeyError where there is no such tensor."""
        tensor = self.tensors[self.name(role, layer, kind, expert)]
        part = self.roles.parts.get(role)
        if part is None:
            return tensor
        turned = tensor.T if self.roles.transposed and tensor.dim() == 2 else tensor
        rows = turned.shape[0] // part.of
        return turned[part.block * rows : (part.block + 1) * rows]

    def norms(self) -> list[Tensor]:
        """The weights of every norm on the residual stream, the final one included."""
        paths = [self.prefix(i) + norm for i in range(self.layers) for norm in self.roles.norms]
        return [self.tensors[f"{path}.weight"] for path in [*paths, self.roles.top["final_norm"]]]

    def of_layer(self, layer: int) -> list[str]:
        """The names of a layer's tensors, without the layer's prefix."""
        prefix = self.prefix(layer)
        return [name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)]


def roles_of(config: Mapping[str, Any]) -> Roles:
    """The table of a layout's class. Raises MdlError (INPUT) for a class that has none yet."""
    name = str(config["architectures"][0])
    if name not in ROLES:
        known = ", ".join(ROLES)
        raise input_error(
            f"no mutations are known for {name}", "config.json", f"add its names to validate/roles.py (has: {known})"
        )
    return ROLES[name]

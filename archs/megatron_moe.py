"""Megatron-LM with experts: SequentialMLP's names, TEGroupedMLP's, the older GroupedMLP's, and torch_dist's stacks.

Everything but the MLPs is that of :mod:`.megatron`. Which layers have experts, and in which form, the names tell
(megatron/core/transformer/moe/experts.py); how the router weighs them is in the arguments of the run. Which class that
is, :mod:`.classes.megatron_moe` decides.
"""

from __future__ import annotations

from ..mappings.tensors import Shape
from .base import Arch, Inventory, Measure, boolean
from .classes.megatron import BRIDGE, settle
from .classes.megatron_moe import choose, flags, hf_config
from .megatron import ASK, arg, arguments, attention_dims, core_names, has_experts, usual, where

_AT = "decoder.layers"
_FORMS = {
    "local": ("local_experts.0.linear_fc1.weight", "local_experts.0.linear_fc2.weight"),
    "numbered": ("linear_fc1.weight0", "linear_fc2.weight0"),
    "grouped": ("weight1", "weight2"),
    "parts": ("0.weight1", "0.weight2"),
    "stacked": ("experts.linear_fc1.weight", "experts.linear_fc2.weight"),
}
"""The first of an expert's matrices, below mlp.experts: up and gate, and down."""
_WRITERS = {
    "local": "SequentialMLP's: one expert under each number",
    "numbered": "TEGroupedMLP's: the experts' matrices are numbered",
    "grouped": "the older GroupedMLP's: all experts in one matrix",
    "parts": "the older GroupedMLP's: the experts of one process in one matrix",
    "stacked": "torch_dist's: all experts of a layer in one tensor",
}
_DECIDE = ("heads", "head_dim", "position", "rotary_percent", "interleaved", "rope_scaling", "pre_softmax")


def detect(inv: Inventory) -> list[str]:
    """megatron-core's names, and a router in some of the layers."""
    if not core_names(inv) or not has_experts(inv) or not _form(inv):
        return []
    names = "self_attention.linear_qkv, mlp.router and mlp.experts below decoder.layers are megatron-core's names"
    return [names, f"mlp.experts are {_WRITERS[_form(inv)]}", *where(inv)]


def sparse_layers(inv: Inventory) -> list[int]:
    """The layers that have a router; empty where all layers are stacked."""
    found = (name.removeprefix(f"{_AT}.").partition(".") for name in inv.tensors if name.startswith(f"{_AT}."))
    return sorted(int(number) for number, _, rest in found if rest == "mlp.router.weight" and number.isdecimal())


def _experts(inv: Inventory) -> str:
    """The names above the experts of the first layer that has some."""
    layers = sparse_layers(inv)
    return f"{_AT}.{layers[0]}.mlp.experts." if layers else f"{_AT}.mlp.experts."


def _form(inv: Inventory) -> str:
    at = _experts(inv)
    return next((form for form, names in _FORMS.items() if all(at + name in inv for name in names)), "")


def dims(m: Measure) -> None:
    """Every size and argument that counts, the target class, and the flags and words that the mapping asks for."""
    attention_dims(m)
    layers = m["layers"]
    _pattern(m, layers if isinstance(layers, int) else 0)
    _mlps(m)
    _shared(m)
    _routing(m)
    settle(m, arguments(m.inventory), _DECIDE, choose, flags)


def _pattern(m: Measure, layers: int) -> None:
    """Layers ``first``, ``first + step``, … have experts; a pattern of another kind has no step.

    The layers without are counted as those before ``first``, and runs of ``step - 1`` behind each layer with experts.
    """
    inv = m.inventory
    stacked = f"{_AT}.mlp.router.weight" in inv
    m.set("layers_stacked", kind=boolean, shape=(stacked, f"layers have {'no numbers' if stacked else 'numbers'}"))
    sparse = list(range(layers)) if stacked else sparse_layers(inv)
    first = sparse[0] if sparse else 0
    step = sparse[1] - first if len(sparse) > 1 else max(layers - first, 1)
    if sparse != list(range(first, layers, step)) or first + step * len(sparse) != layers:
        m.problem(f"layers {sparse} of {layers} have a router, which no step from the first of them gives", do=BRIDGE)
    why = "layers that have a router"
    m.set("sparse_layers", shape=(len(sparse), why))
    m.set("start", shape=(first, f"the first of the {why}"))
    m.set("every", shape=(step, f"distance of the {why}"))
    m.set("dense_run", shape=(step - 1, "layers without one between them"))
    m.accept("dense_layers", [i for i in range(layers) if i not in sparse], "layers without a router")


def _of_sparse(inv: Inventory, name: str) -> Shape:
    """The shape of a tensor of the first layer that has experts, in the first rank."""
    if stacked := inv.shape(f"{_AT}.mlp.{name}"):
        return stacked[1:]
    return inv.shape(f"{_experts(inv).removesuffix('experts.')}{name}") or (0, 0)


def _mlps(m: Measure) -> None:
    """F channels of each expert: a matrix has F columns (down), and 2 F rows where it is gated."""
    inv, form = m.inventory, _form(m.inventory)
    m.set("experts_form", kind=str, shape=(form, f"mlp.experts are {_WRITERS[form]}"), choices=tuple(_FORMS))
    experts = m.set("experts", file=arg("num_experts"), shape=(_of_sparse(inv, "router.weight")[0], "router's rows"))
    parts = inv.count(_experts(inv) + "{}.weight1") or 1
    m.set("expert_parts", shape=(parts, "mlp.experts.N.weight1"))
    shares = len(inv.tensors[_experts(inv) + _FORMS[form][1]])
    whole = inv.ranks > 1 and shares == 1
    m.set("experts_whole", kind=boolean, shape=(whole, f"an expert lies in {shares} of {inv.ranks} ranks"))
    ffn, rows = _ffn(inv, form, shares, experts // parts if isinstance(experts, int) else 1)
    why = "channels of an expert's down projection"
    m.set("expert_ffn", file=arg("moe_ffn_hidden_size"), shape=(ffn or None, why))
    m.set("gated", kind=boolean, file=arg("swiglu"), shape=(rows == 2 * ffn, f"{rows} rows up, {ffn} columns down"))
    m.set("activation", kind=str, default=("silu", "--swiglu is the gated MLP of Megatron-LM"), choices=("silu",))
    down = inv.shape(f"{_AT}.{(_dense(m) or [0])[0]}.mlp.linear_fc2.weight") if _dense(m) else None
    dense = (down[-1] * inv.ranks, "columns of linear_fc2 in layers without experts") if down else None
    m.set("ffn", file=arg("ffn_hidden_size"), shape=dense, default=(ffn, "no layer without experts: that of these"))
    fused = "linear_fc1.layer_norm_weight"
    there = _of_sparse(inv, fused) != (0, 0)
    m.set("fused_expert_norms", kind=boolean, shape=(there, f"there is {'a' if there else 'no'} mlp.{fused}"))


def _shared(m: Measure) -> None:
    """An expert that all tokens go to: an MLP of its own width, cut as those of layers without experts are. A gate may
    weigh what it returns."""
    inv, at = m.inventory, "shared_experts"
    down, gate = _of_sparse(inv, f"{at}.linear_fc2.weight")[-1], _of_sparse(inv, f"{at}.gate_weight") != (0, 0)
    why = f"columns of {at}.linear_fc2" if down else f"there are no {at}"
    m.set("shared_ffn", file=arg("moe_shared_expert_intermediate_size"), shape=(down * inv.ranks, why))
    why = f"there is {'a' if gate else 'no'} {at}.gate_weight"
    m.set("shared_gate", kind=boolean, file=arg("moe_shared_expert_gate") if down else (), shape=(gate, why))


def _dense(m: Measure) -> list[int]:
    found = m["dense_layers"]
    return found if isinstance(found, list) else []


def _ffn(inv: Inventory, form: str, shares: int, local: int) -> tuple[int, int]:
    """Channels of an expert, and rows of its matrix up, all ranks together. ``local`` experts share a matrix of the
    older GroupedMLP, which has them transposed."""
    up, down = (_of_sparse(inv, f"experts.{name}") for name in _FORMS[form])
    if form in ("grouped", "parts"):
        return down[0] * shares // max(local, 1), up[-1] * shares // max(local, 1)
    return down[-1] * shares, up[-2] * shares


def _routing(m: Measure) -> None:
    chosen = m.set("experts_per_token", file=arg("moe_router_topk"), default=usual(m, 2), ask=ASK)
    ask = f"does a softmax over all experts come before the choice? {ASK}"
    m.set("pre_softmax", kind=boolean, file=arg("moe_router_pre_softmax"), default=usual(m, False), ask=ask)
    experts = m["experts"]
    if isinstance(chosen, int) and isinstance(experts, int) and not 1 <= chosen <= experts:
        m.problem(f"experts_per_token is {chosen}, of {experts} experts", do="pass --set moe_router_topk=N")
    said = arguments(m.inventory)
    if said.get("moe_input_jitter_eps"):
        m.deviation("--moe-input-jitter-eps: Megatron-LM's router sees noise whenever it runs; vLLM's sees none")
    for key in ("moe_expert_capacity_factor", "moe_expert_rank_capacity_factor"):
        if said.get(key) is not None:
            m.deviation(f"args.{key} is {said[key]}: full experts leave tokens out; vLLM's take every token")


ARCH = Arch(
    name="megatron_moe",
    title="Megatron-LM with experts",
    source="NVIDIA/Megatron-LM, megatron-core",
    target="the class that its arguments describe",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.megatron_moe:build",
)

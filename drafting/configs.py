"""config.json in a draft: the function that writes it, the questions that it needs, an own class's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .choose import DECODER, OWN, parts_of
from .roles import Role

if TYPE_CHECKING:
    from .arch_file import Subject

COMMON = """        "vocab_size": d["vocab"],
        "hidden_size": d["hidden"],
        "intermediate_size": d["ffn"],
        "num_hidden_layers": d["layers"],
        "num_attention_heads": d["heads"],
        "num_key_value_heads": d["kv_heads"],
        "head_dim": d["head_dim"],
        "max_position_embeddings": d["context"],
        "tie_word_embeddings": d["tied"],
"""

ROPE = """        "hidden_act": "silu",
        "rms_norm_eps": d["norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": d["rope_theta"]},
"""

GPT2 = """        "vocab_size": d["vocab"],
        "n_positions": d["context"],
        "n_embd": d["hidden"],
        "n_layer": d["layers"],
        "n_head": d["heads"],
        "n_inner": d["ffn"],
        "activation_function": d["activation"],
        "layer_norm_epsilon": d["norm_eps"],
        "tie_word_embeddings": d["tied"],
"""


def questions(s: Subject, found: Mapping[str, Role]) -> list[str]:
    """The settings that the target asks for beyond what shapes say."""
    context = [] if "positions.weight" in found else ["context"]
    if s.choice.name == "gpt2":
        return ["norm_eps", "activation_gpt2"]
    if s.choice.native:
        return [*context, "norm_eps", "rope_theta"]
    if s.choice.name == OWN:
        return context
    asked = [*context, "norm_eps", "activation"]
    asked += [] if _biased_norm(found) else ["norm_kind"]
    asked += [] if _place(found) else ["norm_place_among" if _norms_in_doubt(s) else "norm_place"]
    asked += [] if "positions.weight" in found else ["positions", "rope_theta", "rotary_style"]
    asked += ["parallel"] if _place(found) is None else []
    asked += ["qk_norm_kind"] if _bare_qk_norm(found) else []
    asked += ["qk_norm_after_rotary"] if "q_norm.weight" in found else []
    return asked + (["top_k", "scoring", "normalised", "routed_scaling"] if "router.weight" in found else [])


def _biased_norm(found: Mapping[str, Role]) -> bool:
    """LayerNorm alone has biases."""
    return any(key.endswith("norm.bias") for key in found)


def _bare_qk_norm(found: Mapping[str, Role]) -> bool:
    """Whether q and k have a norm without a bias beside LayerNorms with one: then it may be of another kind."""
    return "q_norm.weight" in found and "q_norm.bias" not in found and _biased_norm(found)


def _norms_in_doubt(s: Subject) -> bool:
    """Whether there is a tensor that may be a norm behind a half."""
    return any("attn_out_norm" in role.doubts or "mlp_out_norm" in role.doubts for role in s.roles)


def _place(found: Mapping[str, Role]) -> str | None:
    """Where norms stand, if their number tells; None for one on either side of each half."""
    out = "attn_out_norm.weight" in found and "mlp_out_norm.weight" in found
    before = "attn_norm.weight" in found
    return {(True, True): "sandwich", (True, False): "output"}.get((out, before))


def config_text(s: Subject, settled: set[str]) -> str:
    """The function ``hf_config``."""
    if s.choice.name == DECODER:
        return _decoder(s, settled)
    lines = _native(s) if s.choice.native else _own(s)
    return f'''

def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of {s.target}; the names are transformers' own."""
    return {{
{lines}    }}
'''


def _native(s: Subject) -> str:
    spec = s.choice.spec
    head = f'        "architectures": ["{s.target}"],\n        "model_type": "{spec["model_type"]}",\n'
    if s.choice.name == "gpt2":
        return head + GPT2
    have = parts_of(s.found, fused=False)
    flags = [(field, any(key in have for key in keys)) for field, keys in spec.get("all_or_none", {}).items()]
    flags += [("attention_bias", False)] if s.choice.name == "qwen3" else []
    return head + COMMON + ROPE + "".join(f'        "{field}": {value},\n' for field, value in flags)


def _own(s: Subject) -> str:
    found = s.found
    common = COMMON if "down.weight" in found else COMMON.replace('        "intermediate_size": d["ffn"],\n', "")
    head = f'        "architectures": ["{s.target}"],\n        "model_type": "{s.name}",\n'
    return head + common + "        # TODO: every other value that the class in model.py reads\n"


def _decoder(s: Subject, settled: set[str]) -> str:
    found = s.found
    have = parts_of(found, fused=False)
    kind = '"layer"' if _biased_norm(found) else 'd["norm_kind"]'
    place = f'"{_place(found)}"' if _place(found) else 'd["norm_place"]'
    norm = f'"kind": {kind}, "eps": d["norm_eps"]'
    norm += f', "weight": {any(key.endswith("norm.weight") for key in found)}, "bias": {_biased_norm(found)}'
    positions = '{"kind": "learned"}'
    before = ""
    if "positions.weight" not in found:
        before = '    rope = {"kind": "rope", "theta": d["rope_theta"], "style": d["rotary_style"]}\n'
        positions = 'rope if d["positions"] == "rope" else {"kind": d["positions"]}'
    biases = {"bias": any(f"{p}.bias" in have for p in "qkv"), "out_bias": "o.bias" in have}
    attention = ", ".join(f'"{name}": {value}' for name, value in biases.items())
    if "q_norm.weight" in found:
        per_head = found["q_norm.weight"].group.shape[0] <= max(found["o.weight"].group.shape) // 2
        over, bias = ("head" if per_head else "all"), "q_norm.bias" in found
        its = 'd["qk_norm_kind"]' if _bare_qk_norm(found) else kind
        attention += f', "qk_norm": {{"kind": {its}, "eps": d["norm_eps"], "bias": {bias}, "over": "{over}", '
        attention += '"after_rotary": d["qk_norm_after_rotary"]}'
    if "attn_gate.weight" in found:
        attention += f', "gate": "{_gate(found)}"'
    gated = "gate.weight" in have or "expert.gate.weight" in have
    mlp = f'"gated": {gated}, "activation": d["activation"]'
    mlp += f', "bias": {"up.bias" in have}, "out_bias": {"down.bias" in have}'
    common = COMMON if "down.weight" in found else COMMON.replace('d["ffn"]', 'd["expert_ffn"]')
    ends = f'"final": {"final_norm.weight" in found}, "embedding": {"embed_norm.weight" in found}'
    parallel = f'"parallel": d["parallel"], "one_norm": {_one_norm(found)}' if "parallel" in settled else ""
    return f'''

def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of the composable decoder; mdl/archs/decoder/schema.py says what it may hold."""
{before}    return config_of({{
{common}        "norm": {{{norm}, "place": {place}, {ends}}},
        "positions": {positions},
        "attention": {{{attention}}},
        "mlp": {{{mlp}}},
{_moe(s, found)}        "residual": {{{parallel}}},
        "head_bias": {"head.bias" in found},
    }})
'''


def _gate(found: Mapping[str, Role]) -> str:
    """Whether attention's gate has a row for each head or for each channel of what it multiplies, which o reads."""
    return (
        "channel" if sorted(found["attn_gate.weight"].group.shape) == sorted(found["o.weight"].group.shape) else "head"
    )


def _one_norm(found: Mapping[str, Role]) -> bool:
    return "attn_norm.weight" in found and "mlp_norm.weight" not in found


def _moe(s: Subject, found: Mapping[str, Role]) -> str:
    if "router.weight" not in found:
        return ""
    layers = found["router.weight"].group.layers
    some = f', "layers": {list(layers)}' if len(layers) < s.names.layers else ""
    shared = 'd["shared_ffn"]' if "shared.down.weight" in found or "shared.gate_up.weight" in found else "0"
    return f"""        "moe": {{
            "experts": d["experts"], "experts_per_token": d["top_k"], "size": d["expert_ffn"],
            "activation": d["activation"], "scoring": d["scoring"], "normalised": d["normalised"],
            "scaling": d["routed_scaling"], "router_bias": {"router.bias" in found},
            "selection_bias": {any(role.name == "selection_bias" for role in found.values())},
            "shared_size": {shared}, "shared_gate": {"shared_gate.weight" in found}{some},
        }},
"""


def tensors_text(s: Subject) -> str:
    """What the own class is to hold: the checkpoint's own names and shapes."""
    places: dict[str, list[str]] = {"": [], "i": [], "ie": []}
    for group in (role.group for role in s.roles if not role.drop):
        whole = len(group.layers) in (0, s.names.layers)
        for name in [group.pattern] if whole else group.names:
            loops = "".join(letter for letter in "ie" if f"{{{letter}}}" in name)
            indent = "    " * (1 + len(loops))
            places[loops].append(f'{indent}held[{"f" if loops else ""}"{name}"] = {group.shape!r}')
    lines = ["    held: dict[str, tuple[int, ...]] = {}", *places[""]]
    if places["i"] or places["ie"]:
        lines += ['    for i in range(d.integer("layers")):', *places["i"]]
    if places["ie"]:
        lines += ['        for e in range(d.integer("experts")):', *places["ie"]]
    return _TENSORS + "\n".join([*lines, "    return held"]) + "\n"


_TENSORS = '''

def tensors(d: Dims) -> dict[str, tuple[int, ...]]:
    """What the class in model.py holds, by the names of the files: the plan is checked against it."""
'''

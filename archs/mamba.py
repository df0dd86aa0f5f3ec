"""state-spaces/mamba, Mamba 1: pytorch_model.bin of MambaLMHeadModel, with mamba_ssm's own config.json beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from .base import Arch, Dims, Inventory, Measure, boolean, lookup

EMBEDDING = "backbone.embedding.weight"
LAYER = "backbone.layers.0."
MIXER = LAYER + "mixer."
_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "attn_layer_idx": (([],), "some of its layers are attention"),
    "d_intermediate": ((0,), "its blocks hold an MLP beside the mixer"),
    "rms_norm": ((True,), "its norms are LayerNorm"),
    "ssm_cfg.rmsnorm": ((True,), "its mixers have no norm"),
    "ssm_cfg.norm_before_gate": ((False,), "its mixers norm before they gate"),
    "ssm_cfg.D_has_hdim": ((False,), "D has a value for each channel"),
    "ssm_cfg.dt_limit": (([0.0, float("inf")], [0, float("inf")]), "its time steps are clamped"),
}
"""Fields of mamba_ssm's config, the values with which vLLM's classes compute, and what any other value means."""


def detect(inv: Inventory) -> list[str]:
    """mamba_ssm's names, and the projection from channels to time step, B and C that only the first Mamba has."""
    if EMBEDDING not in inv or MIXER + "A_log" not in inv or MIXER + "x_proj.weight" not in inv:
        return []
    because = ["backbone.embedding and backbone.layers.N.mixer.A_log are the names of mamba_ssm's MambaLMHeadModel"]
    return [*because, "mixer.x_proj and mixer.dt_proj make time step, B and C of the channels: Mamba 1"]


def dims(m: Measure) -> None:
    """Everything but the context is in the shapes; config.json's words are checked against them."""
    backbone(m)
    inv = m.inventory
    state = (inv.shape(MIXER + "A_log") or (None, None))[1]
    rank = (inv.shape(MIXER + "dt_proj.weight") or (None, None))[1]
    m.set("state", file=("config.ssm_cfg.d_state",), shape=(state, "columns of mixer.A_log"))
    said = lookup(inv.extras, "config.ssm_cfg.dt_rank")
    where = ("config.ssm_cfg.dt_rank",) if isinstance(said, int) else ()  # by default the word "auto"
    m.set("time_step_rank", file=where, shape=(rank, "columns of mixer.dt_proj"))
    refuse(m, "MambaForCausalLM")


def backbone(m: Measure) -> None:
    """The sizes that both Mambas have, from the shapes."""
    inv = m.inventory
    rows, width = inv.shape(EMBEDDING) or (None, None)
    inner = (inv.shape(MIXER + "out_proj.weight") or (None, None))[1]
    kernel = (inv.shape(MIXER + "conv1d.weight") or (None, None, None))[2]
    layers = inv.count("backbone.layers.{}.norm.weight")
    m.set("layers", file=("config.n_layer", "params.n_layers"), shape=(layers, "backbone.layers.N that have a norm"))
    m.set("hidden", file=("config.d_model", "params.dim"), shape=(width, f"columns of {EMBEDDING}"))
    m.set("vocab", shape=(rows, f"rows of {EMBEDDING}; those that pad it are kept, as mamba_ssm's head keeps them"))
    _padded(m, rows)
    m.set("inner", shape=(inner, "columns of mixer.out_proj"))
    times = inner // width if inner and width and inner % width == 0 else None
    m.set("expand", file=("config.ssm_cfg.expand",), shape=(times, "inner / hidden"), ask="inner is no multiple of it")
    m.set("kernel", file=("config.ssm_cfg.d_conv",), shape=(kernel, "width of mixer.conv1d"))
    for name, tensor in (("conv_bias", "conv1d.bias"), ("bias", "in_proj.bias")):
        there = MIXER + tensor in inv
        why = f"mixer.{tensor} is {'there' if there else 'not there'}"
        m.set(name, kind=boolean, file=(f"config.ssm_cfg.{name}",), shape=(there, why))
    m.set("norm_eps", kind=float, default=(1e-5, "hard-wired in mamba_ssm"))
    m.set(
        "residual_in_fp32",
        kind=boolean,
        file=("config.residual_in_fp32", "params.residual_in_fp32"),
        default=(True, "MambaConfig's default in mamba_ssm"),
    )
    m.set("context", default=(2048, "a Mamba has no end of its own: that long are the texts of the released ones"))


def _padded(m: Measure, rows: int | None) -> None:
    """config.json says how many tokens there are; mamba_ssm rounds that up to a multiple before it makes the table."""
    for where in ("config", "params"):
        said = lookup(m.inventory.extras, f"{where}.vocab_size")
        multiple = lookup(m.inventory.extras, f"{where}.pad_vocab_size_multiple")
        multiple = multiple if isinstance(multiple, int) and multiple > 0 else 8
        if isinstance(said, int) and -(-said // multiple) * multiple != rows:
            what = f"{where}.vocab_size {said}, rounded up to a multiple of {multiple}, is not the {rows} rows here"
            m.problem(what, do="the checkpoint and its config.json do not belong together")


def refuse(m: Measure, target: str) -> None:
    """Report what mamba_ssm can be configured to compute and vLLM's class can't."""
    inv = m.inventory
    for key, (allowed, meaning) in _UNSERVED.items():
        said = lookup(inv.extras, f"config.{key}")
        if said is not None and said not in allowed:
            m.problem(f"config.{key} is {said}: {meaning}", do=_NO_CLASS.format(target))
    layers = range(inv.count("backbone.layers.{}.norm.weight"))
    found = {
        "layers without mixer.A_log, which are attention": [
            i for i in layers if f"backbone.layers.{i}.mixer.A_log" not in inv
        ],
        "layers with an MLP beside the mixer": [i for i in layers if f"backbone.layers.{i}.mlp.fc1.weight" in inv],
        "layers whose norm has a bias: LayerNorm": [i for i in layers if f"backbone.layers.{i}.norm.bias" in inv],
    }
    for what, which in found.items():
        if which:
            m.problem(f"{what}: {', '.join(map(str, which[:8]))}", do=_NO_CLASS.format(target))


_NO_CLASS = "vLLM's {} computes none of that, and no other class of vLLM's has these names"


def backbone_config(d: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the config.json of both classes holds."""
    return {
        "vocab_size": d["vocab"],
        "hidden_size": d["hidden"],
        "state_size": d["state"],
        "num_hidden_layers": d["layers"],
        "expand": d["expand"],
        "conv_kernel": d["kernel"],
        "use_bias": d["bias"],
        "use_conv_bias": d["conv_bias"],
        "hidden_act": "silu",
        "layer_norm_epsilon": d["norm_eps"],
        "residual_in_fp32": d["residual_in_fp32"],
        "max_position_embeddings": d["context"],  # no field of the class's own: vLLM sizes its requests by it
        "tie_word_embeddings": d["tied"],
    }


def hf_config(d: Dims) -> dict[str, Any]:
    """MambaForCausalLM's config.json."""
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        **backbone_config(cast("Mapping[str, Any]", d)),
        "time_step_rank": d["time_step_rank"],
    }


ARCH = Arch(
    name="mamba",
    title="Mamba 1",
    source="state-spaces/mamba",
    target="MambaForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.mamba:build",
)

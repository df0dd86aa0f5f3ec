"""state-spaces/mamba, Mamba 2, and Codestral Mamba, which has the same names: n_groups = 1 and more."""

from __future__ import annotations

from typing import Any, cast

from .base import Arch, Dims, Inventory, Measure, lookup
from .mamba import EMBEDDING, MIXER, backbone, backbone_config, refuse

_GROUPS = ("config.ssm_cfg.ngroups", "params.n_groups")
_TARGET = "Mamba2ForCausalLM"


def detect(inv: Inventory) -> list[str]:
    """mamba_ssm's names, and a bias of the time step for each head, which only the second Mamba has."""
    if EMBEDDING not in inv or MIXER + "A_log" not in inv or MIXER + "dt_bias" not in inv:
        return []
    because = ["backbone.embedding and backbone.layers.N.mixer.A_log are the names of mamba_ssm's MambaLMHeadModel"]
    return [*because, "mixer.dt_bias holds a value for each head: Mamba 2"]


def dims(m: Measure) -> None:
    """Sizes from the shapes; into how many groups B and C are divided is not among them."""
    backbone(m)
    inv, inner = m.inventory, m["inner"]
    heads = (inv.shape(MIXER + "dt_bias") or (None,))[0]
    m.set("ssm_heads", shape=(heads, "values of mixer.dt_bias"))
    _heads(m, heads, inner if isinstance(inner, int) else 0)
    channels = (inv.shape(MIXER + "conv1d.weight") or (0,))[0] - (inner if isinstance(inner, int) else 0)
    _groups(m, channels // 2)
    file = "config.ssm_cfg.chunk_size"
    m.set("chunk", file=(file,), default=(256, "mamba_ssm's default; it cuts the sum, and moves its rounding only"))
    refuse(m, _TARGET)


def _heads(m: Measure, heads: int | None, inner: int) -> None:
    """Channels of a head; and what of the mixer belongs to another variant of it."""
    inv = m.inventory
    norm, skips = inv.shape(MIXER + "norm.weight"), inv.shape(MIXER + "D")
    do = f"vLLM's {_TARGET} computes none of that"
    if norm is None:
        m.problem("mixer.norm.weight is not there: the mixers were built with rmsnorm=False", do=do)
    elif norm != (inner,):
        what = f"mixer.norm has {norm[0]} values for {inner} channels: d_ssm leaves some of them to an MLP"
        m.problem(what, do=do)
    if skips != (heads,):
        m.problem(f"mixer.D has the shape {skips} for {heads} heads: D_has_hdim", do=do)
    size = inner // heads if heads and inner % heads == 0 else None
    m.set("ssm_head_dim", file=("config.ssm_cfg.headdim",), shape=(size, "inner / heads"), ask="heads do not divide it")


def _groups(m: Measure, both: int) -> None:
    """``both`` is groups x state, which is all that the convolution's channels tell."""
    there = any(isinstance(lookup(m.inventory.extras, name), dict) for name in ("config.ssm_cfg", "params"))
    default = (1, "mamba_ssm's default, and what lies beside the weights says nothing else") if there else None
    why = f"the convolution holds {both} channels for B, which groups x d_state must be"
    groups = m.set("groups", file=_GROUPS, default=default, ask=why)
    file, heads = ("config.ssm_cfg.d_state",), m["ssm_heads"]
    if not isinstance(groups, int):
        m.unsettled("state", "d_state")
        return
    if groups < 1 or both % groups or (isinstance(heads, int) and heads % groups):
        what = f"{groups} groups divide neither {both} channels of B nor {heads} heads evenly"
        m.problem(what, do="pass --set ngroups=N with the number that the model was trained with")
        return
    m.set("state", file=file, shape=(both // groups, f"{both} channels of the convolution for B / {groups} groups"))


def hf_config(d: Dims) -> dict[str, Any]:
    """Mamba2ForCausalLM's config.json."""
    return {
        "architectures": [_TARGET],
        "model_type": "mamba2",
        **backbone_config(cast("dict[str, Any]", d)),
        "num_heads": d["ssm_heads"],
        "head_dim": d["ssm_head_dim"],
        "n_groups": d["groups"],
        "chunk_size": d["chunk"],
    }


ARCH = Arch(
    name="mamba2",
    title="Mamba 2",
    source="state-spaces/mamba",
    target=_TARGET,
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.mamba2:build",
)

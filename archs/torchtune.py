"""torchtune's Llama 2, 3, 3.1, 3.2, 3.3, Code Llama, Mistral, Phi-3 and Phi-4 under its own names."""

from __future__ import annotations

from msgspec import Struct

from .base import Arch, Inventory, Measure, boolean
from .llama_meta import hf_config
from .mistral_inference import head_sizes

_NEEDED = (
    "tok_embeddings.weight",
    "layers.0.attn.q_proj.weight",
    "layers.0.attn.output_proj.weight",
    "layers.0.sa_norm.scale",
    "layers.0.mlp_norm.scale",
    "layers.0.mlp.w1.weight",
)
_OTHERS = ("layers.0.attn.q_proj.bias", "layers.0.attn.q_norm.scale", "layers.0.sa_scale.scale")


class _Builder(Struct, frozen=True):
    """What a builder of torchtune 0.6.1 hard-wires; all have norm_eps 1e-5. ``factor`` 0 is unscaled rotary."""

    theta: float
    context: int
    factor: float = 0.0
    interleaved: bool = True


_BUILDERS = {
    "llama2": _Builder(10_000.0, 4096),
    "code_llama2": _Builder(1_000_000.0, 16_384),
    "llama3": _Builder(500_000.0, 8192),
    "llama3_1": _Builder(500_000.0, 131_072, 8.0),
    "llama3_2": _Builder(500_000.0, 131_072, 32.0),
    "llama3_3": _Builder(500_000.0, 131_072, 8.0),
    "mistral": _Builder(10_000.0, 32_768),
    "phi3": _Builder(10_000.0, 4096, interleaved=False),
    "phi4": _Builder(10_000.0, 16_384, interleaved=False),
}
_THETAS = {
    "code_llama2": "; its lora_ builders leave 10000",
    "phi4": " leaves phi3's, although Microsoft trained Phi-4 with 250000: pass that for its weights untrained",
}
_ASK = (
    "the recipe's yaml names it under model._component_, as in torchtune.models.llama3_2.llama3_2_1b; torchtune gives "
    f"the tensors of all of them the same names; one of {', '.join(_BUILDERS)}"
)


def detect(inv: Inventory) -> list[str]:
    """torchtune's names without what only its other families have; without an output Gemma is a candidate too."""
    if not native_names(inv) or any(name in inv for name in _OTHERS):
        return []
    because = ["layers.N.attn.q_proj, sa_norm.scale and mlp.w1 are torchtune's names"]
    if "output.weight" not in inv:
        because.append("there is no output.weight: Llama 3.2 is tied")
    return because


def native_names(inv: Inventory, last: str = "norm.scale") -> bool:
    """Whether the tensors carry the names that torchtune's decoders share; ``last`` is the last norm."""
    return inv.ranks == 1 and all(name in inv for name in (*_NEEDED, last))


def native_sizes(m: Measure) -> None:
    """Sizes from shapes. torchtune stores no hyperparameters with the weights, so the heads are asked for."""
    inv = m.inventory
    vocab, width = inv.shape("tok_embeddings.weight") or (None, None)
    w1 = inv.shape("layers.0.mlp.w1.weight") or (None,)
    m.set("layers", shape=(inv.count("layers.{}.sa_norm.scale"), "blocks layers.0 … with an sa_norm"))
    m.set("hidden", shape=(width, "columns of tok_embeddings"))
    m.set("vocab", shape=(vocab, "rows of tok_embeddings"))
    m.set("ffn", shape=(w1[0], "rows of mlp.w1"))
    head_sizes(m, "layers.0.attn.q_proj.weight", "layers.0.attn.k_proj.weight", {})


def dims(m: Measure) -> None:
    """Sizes from shapes; the rest from what the builder, which the user names, hard-wires."""
    native_sizes(m)
    name = m.set("builder", kind=str, ask=_ASK, choices=tuple(_BUILDERS))
    builder = _BUILDERS.get(str(name))
    if builder is None:
        m.unsettled("norm_eps")
        for later in ("rope_theta", "rope_scaling", "rope_factor", "interleaved", "context"):
            m.unsettled(later)
        return
    why = f"torchtune's {name} builder"
    theta_why = why + _THETAS.get(str(name), "")
    m.set("norm_eps", kind=float, default=(1e-5, why))
    m.set("rope_theta", kind=float, default=(builder.theta, theta_why))
    m.set("interleaved", kind=boolean, default=(builder.interleaved, f"{why} rotates neighbouring pairs or halves"))
    m.set("context", default=(builder.context, f"max_seq_len of {why}"))
    scaling = "llama3" if builder.factor else "none"
    m.set("rope_scaling", kind=str, default=(scaling, why), choices=("none", "llama3"))
    if m["rope_scaling"] == "llama3":
        _scaling(m, builder.factor, why)


def _scaling(m: Measure, factor: float, why: str) -> None:
    if factor == 32.0:
        why = f"{why}, as Llama 3.2 was trained; Meta's own code has 8 hard-wired"
    m.set("rope_factor", kind=float, default=(factor or 8.0, why))
    m.set("rope_low_freq_factor", kind=float, default=(1.0, "fixed in torchtune's Llama3ScaledRoPE"))
    m.set("rope_high_freq_factor", kind=float, default=(4.0, "fixed in torchtune's Llama3ScaledRoPE"))
    m.set("rope_original_context", default=(8192, "fixed in torchtune's Llama3ScaledRoPE"))


ARCH = Arch(
    name="torchtune",
    title="torchtune Llama",
    source="meta-pytorch/torchtune",
    target="LlamaForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,  # Mistral, Phi-3 and Phi-4 without windows, as torchtune has them, compute what Llama does
    eager="mdl.archs.eager.torchtune:build",
)

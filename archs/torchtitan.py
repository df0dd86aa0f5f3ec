"""torchtitan's Llama 3: step-N folders of torch.distributed.checkpoint, or what was made one file of them.

Its names changed: attention.wq and output until April 2026, attention.qkv_linear.wq and lm_head since; for two months
between, q, k and v of one module lay in one matrix. No checkpoint holds the hyperparameters.
"""

from __future__ import annotations

from .base import Arch, Inventory, Measure, boolean, lookup
from .llama_meta import hf_config
from .mistral_inference import head_sizes

_NEEDED = (
    "tok_embeddings.weight",
    "norm.weight",
    "layers.0.attention_norm.weight",
    "layers.0.ffn_norm.weight",
    "layers.0.attention.wo.weight",
    "layers.0.feed_forward.w1.weight",
)
_ATT = "layers.0.attention."
_LLAMA32 = {(2048, 16): "1B", (3072, 28): "3B"}
_HEADS = (
    "torchtitan saves no hyperparameters; it is n_heads of the flavor in torchtitan/models/llama3/__init__.py: "
    "16 for debugmodel, 32 for 1B and 8B, 24 for 3B, 64 for 70B, 128 for 405B"
)
SEQ_LEN = ("training.seq_len",)
_TOLD = ("params.n_heads",)
"""Where a file given by --config may say it; torchtitan writes none."""
CONTEXT = "no tensor tells; it is training.seq_len of the job"
_SCALED = (
    "torchtitan computes llama3 scaling always since October 2025 (v0.2.0), and none before; the names of these "
    "tensors are those of both"
)
_MIXTURE = "torchtitan's own scripts/checkpoint_conversion/convert_to_hf.py makes a layout of Hugging Face of it"


def detect(inv: Inventory) -> list[str]:
    """torchtitan's names; its old ones are Meta's, and without any hyperparameters beside them mdl asks."""
    if not block_names(inv) or f"{_ATT}q_norm.weight" in inv:
        return []
    if f"{_ATT}qkv_linear.wq.weight" in inv or f"{_ATT}qkv_linear.wqkv.weight" in inv:
        return ["layers.N.attention.qkv_linear beside attention.wo and feed_forward.w1 is torchtitan's name"]
    if f"{_ATT}wq.weight" not in inv:
        return []
    because = ["tok_embeddings, layers.N.attention.wq and layers.N.feed_forward.w1 are names that torchtitan used"]
    if "lm_head.weight" in inv:
        because.append("the head is lm_head, as in torchtitan since April 2026")
    if "freqs_cis" in inv:
        because.append("freqs_cis lies among the weights, as in torchtitan until August 2025")
    return because


def block_names(inv: Inventory) -> bool:
    """Whether the tensors carry the names that torchtitan's dense decoders share, with nobody else's words beside."""
    said = any(lookup(inv.extras, key) is not None for key in ("params", "model_args"))
    return inv.ranks == 1 and not said and all(name in inv for name in _NEEDED)


def dims(m: Measure) -> None:
    """Sizes from shapes; what all flavors agree on is said as such, and what no tensor tells is asked for."""
    inv = m.inventory
    block_sizes(m)
    wo, freqs = inv.shape(f"{_ATT}wo.weight") or (0, 0), inv.shape("freqs_cis")
    told = (wo[1] // (2 * freqs[1]), f"{wo[1]} columns of wo / 2 x {freqs[1]} columns of freqs_cis") if freqs else None
    block_heads(m, told, _HEADS)
    m.set("norm_eps", kind=float, default=(1e-5, "all of torchtitan's Llama 3 flavors"))
    theta = "all of torchtitan's Llama 3 flavors; a flavor of your own that left it out has 10000"
    m.set("rope_theta", kind=float, default=(500_000.0, theta))
    m.set("context", shape=(freqs[0] if freqs else None, "rows of freqs_cis"), file=SEQ_LEN, ask=CONTEXT)
    _scaling(m)


def block_sizes(m: Measure) -> None:
    """Sizes that shapes tell, and which of its names torchtitan used: what the mapping and the forward go by."""
    inv = m.inventory
    vocab, width = inv.shape("tok_embeddings.weight") or (None, None)
    w1 = inv.shape("layers.0.feed_forward.w1.weight") or (None,)
    m.set("layers", shape=(inv.count("layers.{}.attention_norm.weight"), "blocks layers.0 … with an attention_norm"))
    m.set("hidden", shape=(width, "columns of tok_embeddings"))
    m.set("vocab", shape=(vocab, "rows of tok_embeddings"))
    m.set("ffn", shape=(w1[0], "rows of feed_forward.w1"))
    if any(".moe." in name for name in inv.tensors):
        m.problem("layers.N.moe: a mixture of experts, which this family is not", do=_MIXTURE)
    for flag, name in {"qkv_flat": "wq", "qkv_apart": "qkv_linear.wq", "qkv_fused": "qkv_linear.wqkv"}.items():
        there = f"{_ATT}{name}.weight" in inv
        m.set(flag, kind=boolean, shape=(there, f"{_ATT}{name}.weight is {'there' if there else 'not there'}"))
    old = "output.weight" in inv
    m.set("head_is_output", kind=boolean, shape=(old, f"output.weight is {'there' if old else 'not there'}"))


def block_heads(m: Measure, told: tuple[int, str] | None, ask: str) -> None:
    """heads, head_dim, kv_heads; ``told`` is the number of heads where another tensor tells it."""
    inv, wo = m.inventory, m.inventory.shape(f"{_ATT}wo.weight") or (0, 0)
    if not m["qkv_fused"]:
        inside = "qkv_linear." if m["qkv_apart"] else ""
        head_sizes(m, f"{_ATT}{inside}wq.weight", f"{_ATT}{inside}wk.weight", {"heads": _TOLD}, shape=told, ask=ask)
        return
    heads = m.set("heads", shape=told, file=_TOLD, ask=ask)
    rows = (inv.shape(f"{_ATT}qkv_linear.wqkv.weight") or (0,))[0]
    for later in ("head_dim", "kv_heads"):
        m.unsettled(later)
    if not isinstance(heads, int):
        return
    head = wo[1] // heads if heads > 0 else 0
    kv = (rows // head - heads) // 2 if head else 0
    if heads * head != wo[1] or kv < 1 or (heads + 2 * kv) * head != rows or heads % kv:
        what = f"{heads} heads do not fit wqkv with {rows} rows and wo with {wo[1]} columns"
        m.problem(what, do="pass --set heads=N with the right number")
        return
    m.set("head_dim", shape=(head, f"{wo[1]} columns of wo / {heads} heads"))
    m.set("kv_heads", shape=(kv, f"half of what {rows} rows of wqkv hold beside {heads} heads of {head}"))


def _scaling(m: Measure) -> None:
    inv, default = m.inventory, None
    if "freqs_cis" in inv:
        default = ("none", "freqs_cis was saved until August 2025, when torchtitan had no scaling")
    elif not (m["qkv_flat"] and m["head_is_output"]):
        default = ("llama3", "all flavors of torchtitan with these names have scaling='llama'")
    m.set("rope_scaling", kind=str, default=default, ask=_SCALED, choices=("none", "llama3"))
    later = ("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context")
    if m["rope_scaling"] != "llama3":
        for name in later if m["rope_scaling"] is None else ():
            m.unsettled(name)
        return
    why = "the default of torchtitan's RoPE, which no flavor of Llama 3 changes"
    size = _LLAMA32.get((m["hidden"], m["layers"]))  # type: ignore[arg-type]  # None simply is not in the table
    more = f", although Meta trained Llama 3.2 {size} with 32: pass that for its weights untrained" if size else ""
    m.set("rope_factor", kind=float, default=(8.0, why + more))
    m.set("rope_low_freq_factor", kind=float, default=(1.0, why))
    m.set("rope_high_freq_factor", kind=float, default=(4.0, why))
    m.set("rope_original_context", default=(8192, why))


ARCH = Arch(
    name="torchtitan",
    title="torchtitan Llama 3",
    source="pytorch/torchtitan",
    target="LlamaForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.torchtitan:build",
)

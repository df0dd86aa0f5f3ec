"""karpathy/llama2.c: the dict that train.py saves. Names and maths are Meta Llama's."""

from __future__ import annotations

from .base import Arch, Inventory, Measure, lookup
from .llama_meta import block_sizes, hf_config, meta_names


def detect(inv: Inventory) -> list[str]:
    """Meta's names with llama2.c's model_args; without any hyperparameters Meta Llama is a candidate too."""
    if not meta_names(inv) or inv.ranks > 1 or "params" in inv.extras:
        return []
    because = ["tok_embeddings, layers.N.attention.wq and layers.N.feed_forward.w1 are the names llama2.c uses"]
    if lookup(inv.extras, "model_args.n_layers") is not None:
        because.append("the file holds model_args with dim, n_layers, n_heads, as llama2.c's train.py saves them")
    elif lookup(inv.extras, "model_args") is not None:
        return []
    return because


def dims(m: Measure) -> None:
    """Sizes from shapes, checked against model_args; what llama2.c hard-wires is said as such."""
    block_sizes(m, ("model_args",))
    vocab = (m.inventory.shape("tok_embeddings.weight") or (None,))[0]
    m.set("vocab", file=("model_args.vocab_size",), shape=(vocab, "rows of tok_embeddings"))
    m.set("context", file=("model_args.max_seq_len",), ask="rotary positions leave no trace in the shapes")
    m.set("norm_eps", kind=float, file=("model_args.norm_eps",), default=(1e-5, "ModelArgs' default in llama2.c"))
    m.set("rope_theta", kind=float, default=(10_000.0, "hard-wired in llama2.c's model.py"))
    m.set("rope_scaling", kind=str, default=("none", "llama2.c has none"), choices=("none",))


ARCH = Arch(
    name="llama2c",
    title="llama2.c",
    source="karpathy/llama2.c",
    target="LlamaForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.llama_meta:build",
)

"""OLMo-core: stepN/model_and_optim beside stepN/config.json, for OLMo 2, OLMo 3, and its Llamas and Qwen 3.

The weights are a folder of torch.distributed.checkpoint, or one file that somebody made of it. config.json is the whole
experiment's, with a section ``model``; what its fields describe is read in :mod:`.classes.olmo_core`.
"""

from __future__ import annotations

from typing import Any

from .base import Arch, Dims, Inventory, Measure, boolean
from .classes.olmo_core import (
    NO_SCALING,
    Described,
    choose,
    describe,
    hf_fields,
    model_of,
    rope_parameters,
    settle_positions,
)
from .llama_meta import decoder_config
from .mistral_inference import head_sizes

_B = "blocks.0"
_FUSED = f"{_B}.attention.w_qkv.weight"
_NEEDED = ("embeddings.weight", "lm_head.norm.weight", f"{_B}.attention.w_out.weight", f"{_B}.attention_norm.weight")
_MISSING = "OLMo-core writes it to config.json, in the folder above model_and_optim: put that beside the weights"
_BLOCKS = ("default", "reordered_norm")


def detect(inv: Inventory) -> list[str]:
    """OLMo-core's names of embedding, attention and head, with a dense feed-forward."""
    projected = f"{_B}.attention.w_q.weight" in inv or _FUSED in inv
    if not projected or f"{_B}.feed_forward.w1.weight" not in inv or not all(name in inv for name in _NEEDED):
        return []
    because = ["embeddings, blocks.N.attention.w_q and lm_head.norm are OLMo-core's names"]
    if model_of(inv):
        because.append("config.json beside the weights describes its model")
    return because


def dims(m: Measure) -> None:
    """Sizes from shapes, checked against config.json; what is in neither is asked for."""
    inv = m.inventory
    model = model_of(inv)
    if _FUSED in inv:
        do = "load it into a model whose attention is named default, and save that: vLLM fuses them itself"
        m.problem("attention.w_qkv holds q, k and v in one matrix, as OLMo-core's fused attention has it", do=do)
    vocab, hidden = inv.shape("embeddings.weight") or (None, None)
    layers = inv.count("blocks.{}.attention_norm.weight")
    w1 = inv.shape(f"{_B}.feed_forward.w1.weight") or (None,)
    m.set("layers", file=_model("n_layers"), shape=(layers, "blocks.0 … with an attention_norm"))
    m.set("hidden", file=_model("d_model"), shape=(hidden, "columns of embeddings"))
    m.set("vocab", file=_model("vocab_size"), shape=(vocab, "rows of embeddings"))
    m.set("ffn", file=_model("block.feed_forward.hidden_size"), shape=(w1[0], f"rows of {_B}.feed_forward.w1"))
    head_sizes(m, f"{_B}.attention.w_q.weight", f"{_B}.attention.w_k.weight", _HEADS)
    _norms(m)
    found = describe(model, layers) if model else Described()
    for what in found.problems:
        m.problem(f"{what} in config.json", do="no class that vLLM serves has a place for it")
    _constants(m, found, known=bool(model))
    if m["block"] is not None:
        settle_positions(m, found, known=bool(model))
        choose(m)
    else:
        for later in ("windows", "rope_theta", "rope", "rope_local"):
            m.unsettled(later)


def _model(key: str) -> tuple[str, ...]:
    """The places of a field: in the experiment's config, or in a model's alone."""
    return f"config.model.{key}", f"config.{key}"


def _attention(key: str) -> tuple[str, ...]:
    return *_model(f"block.sequence_mixer.{key}"), *_model(f"block.attention.{key}")


_HEADS = {"heads": _attention("n_heads"), "head_dim": _attention("head_dim"), "kv_heads": _attention("n_kv_heads")}


def _norms(m: Measure) -> None:
    """Whether q and k are normed, and whether all heads at once: the norm's length tells."""
    norm = m.inventory.shape(f"{_B}.attention.q_norm.weight")
    rows = m.inventory.shape(f"{_B}.attention.w_q.weight")
    there = f"there is {'a' if norm else 'no'} {_B}.attention.q_norm"
    m.set("norm_qk", kind=boolean, shape=(norm is not None, there))
    whole = norm is not None and norm == (rows or ())[:1]
    m.set("norm_qk_whole", kind=boolean, shape=(whole, "q_norm is as long as w_q has rows" if whole else there))


def _constants(m: Measure, found: Described, *, known: bool) -> None:
    """What leaves no trace in shapes. Where config.json lies beside the weights, it says them all."""
    named = ("default", "config.json has no block.name: OLMo-core's default") if known else None
    ask = f"{_MISSING}; reordered_norm for OLMo 2 and 3, default for its Llamas"
    m.set("block", kind=str, file=_model("block.name"), default=named, ask=ask, choices=_BLOCKS)
    if len(found.eps) > 1:
        m.problem(f"norms have different eps: {sorted(found.eps)}", do="the classes have one for all")
    eps = (min(found.eps), "eps of all norms in config.json") if found.eps else None
    m.set("norm_eps", kind=float, default=eps, ask=f"{_MISSING}; 1e-6 for OLMo 2 and 3, 1e-5 for its Llamas")
    if not known:
        _without_config(m, found)
    lengths = ("config.train_module.max_sequence_length", "config.dataset.sequence_length")
    m.set("context", file=lengths, ask="the length of sequences in training, such as 4096 for OLMo 2")


def _without_config(m: Measure, found: Described) -> None:
    """One rotation and one cycle of windows, from the user, in the place of those in config.json."""
    layers = m.inventory.count("blocks.{}.attention_norm.weight")
    ask = f"{_MISSING}; 0 for none, 4096 for OLMo 3, where each fourth layer and the last see all positions"
    window = m.set("sliding_window", ask=ask)
    size = window if isinstance(window, int) else 0
    found.windows = [0 if (i + 1) % 4 == 0 or i == layers - 1 else size for i in range(layers)]
    found.ropes = [dict(NO_SCALING) for _ in range(layers)]


def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of the class that ``target`` names."""
    name = str(d["target"])
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        **decoder_config(d, rope_parameters(d)),
        **hf_fields(d),
    }


ARCH = Arch(
    name="olmo_core",
    title="OLMo-core",
    source="allenai/OLMo-core",
    target="Olmo2ForCausalLM, Olmo3ForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.olmo_core:build",
)

"""facebookresearch/lingua's LMTransformer: a step's folder of torch.distributed.checkpoint with params.json, or its
consolidated/consolidated.pth."""

from __future__ import annotations

from typing import Any

from .base import Arch, Inventory, Measure, lookup
from .llama_meta import hf_config, meta_names
from .mistral_inference import head_sizes

_OWN = ("init_std_factor", "init_base_std", "max_seqlen")
"""Fields of its BaseTransformerArgs that nobody else's params.json has."""
_HEADS = {name: (f"params.model.{key}",) for name, key in
          {"heads": "n_heads", "head_dim": "head_dim", "kv_heads": "n_kv_heads"}.items()}  # fmt: skip


def detect(inv: Inventory) -> list[str]:
    """Meta's names, with the whole training configuration as params.json beside them."""
    if not meta_names(inv) or inv.ranks > 1:
        return []
    if not all(key in _model(inv) for key in _OWN):
        return []
    return [
        "tok_embeddings, layers.N.attention.wq and layers.N.feed_forward.w1 are names that lingua shares with Meta",
        "params.json holds lingua's configuration: init_std_factor, init_base_std and max_seqlen under model",
    ]


def _model(inv: Inventory) -> dict[str, Any]:
    found = lookup(inv.extras, "params.model")
    return found if isinstance(found, dict) else {}


def dims(m: Measure) -> None:
    """Sizes from shapes, checked against params.json, which holds everything else."""
    inv = m.inventory
    vocab, width = inv.shape("tok_embeddings.weight") or (None, None)
    w1 = inv.shape("layers.0.feed_forward.w1.weight") or (None,)
    layers = inv.count("layers.{}.attention_norm.weight")
    m.set("layers", file=_in("n_layers"), shape=(layers, "blocks layers.0 … with an attention_norm"))
    m.set("hidden", file=_in("dim"), shape=(width, "columns of tok_embeddings"))
    stored = _model(inv).get("vocab_size", -1)  # -1 until train.py has asked the tokenizer
    m.set("vocab", file=_in("vocab_size") if stored != -1 else (), shape=(vocab, "rows of tok_embeddings"))
    m.set("ffn", shape=(w1[0], "rows of feed_forward.w1"))
    if inv.count("heads.{}.weight"):
        m.problem(
            "heads.N: the several heads of apps/mtp, each for another token to come",
            do="save heads.0.weight as output.weight and leave out the others; that is what its generate.py runs",
        )
    head_sizes(m, "layers.0.attention.wq.weight", "layers.0.attention.wk.weight", _HEADS, default=_by_size(m))
    m.set("norm_eps", kind=float, file=_in("norm_eps"), default=(1e-5, "the default of lingua's BaseTransformerArgs"))
    theta = (10_000.0, "the default of lingua's BaseTransformerArgs")
    m.set("rope_theta", kind=float, file=_in("rope_theta"), default=theta)
    m.set("rope_scaling", kind=str, default=("none", "lingua has none"), choices=("none",))
    m.set("context", file=_in("max_seqlen"), ask="rotary positions leave no trace in the shapes; it is data.seq_len")
    _window(m)


def _in(key: str) -> tuple[str, ...]:
    return (f"params.model.{key}",)


def _by_size(m: Measure) -> tuple[int, str] | None:
    """The number of heads where params.json gives only their size."""
    head, width = _model(m.inventory).get("head_dim"), m["hidden"]
    if not isinstance(head, int) or not isinstance(width, int) or head < 1:
        return None
    return width // head, f"params.model.head_dim is {head}, n_heads is not given, and lingua takes dim / head_dim"


def _window(m: Measure) -> None:
    """lingua stores a window that the attention of its own training and generation does not look at."""
    window = _model(m.inventory).get("sliding_window")
    why = "params.json has no sliding_window"
    if window is not None:
        why = f"params.json has {window}, but lingua's train.py and generate.py attend without it; only xformers' would"
    m.set("sliding_window", default=(0, why), choices=(0,))


ARCH = Arch(
    name="lingua",
    title="lingua",
    source="facebookresearch/lingua",
    target="LlamaForCausalLM",
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.lingua:build",
)

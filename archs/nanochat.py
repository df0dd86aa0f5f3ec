"""nanochat: model_NNNNNN.pt beside meta_NNNNNN.json, of every form that its GPT has had since its first release.

The meta holds sizes alone. What else its code hard-wired changed five times, and shows in which parameters there are
(nanochat/gpt.py, by commit); each constant is on trust, with its name, and may be overruled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct

from .base import Arch, Dims, Inventory, Measure, boolean, lookup
from .decoder.reading import COMPOSED, config_of

_H = "transformer.h.0."
_META = "nanochat writes it to meta_NNNNNN.json (model_config), which lies beside model_NNNNNN.pt: put it there"
_NORMS = ("transformer.ln_f.weight", f"{_H}ln_1.weight", f"{_H}norm1.weight", f"{_H}attn.q_norm.weight")
_EXPERIMENTS = ("v0_lambdas", "bigram_lambdas")
_MARKS = {"lambdas": "x0_lambdas", "value_embeds": "attn.ve_gate", "smear": "smear_gate"}
_EPS = 1.1920928955078125e-07


class Release(Struct, frozen=True):
    """The constants of nanochat/gpt.py while its parameters were the same; no ``softcap`` where that changed."""

    since: str
    theta: float = 10_000.0
    softcap: float | None = 15.0
    gain: float = 1.0
    value_scale: float = 0.0
    window: Callable[[int], int] = lambda context: context // 2
    windowed: str = "sequence_len // 2"


def _in_tiles(part: int) -> Callable[[int], int]:
    """A ``part`` of the context, rounded up to FlashAttention's tiles."""
    return lambda context: -(-context // (part * 128)) * 128


_FIRST = Release("3a5e0bc (2025-10-13)")
_LAMBDAS = Release("aa530cd (2026-01-11)")
_VALUES = Release("e85db6b (2026-01-16)", softcap=None, value_scale=2.0)
_TUNED = Release("6ed7d1d (2026-03-09)", 1e5, 15.0, 1.15, 3.0, _in_tiles(3), "sequence_len / 3 in tiles of 128")
_SMEARED = Release("a825e63 (2026-03-14)", 1e5, 15.0, 1.2, 3.0, _in_tiles(4), "sequence_len / 4 in tiles of 128")


def detect(inv: Inventory) -> list[str]:
    """nanochat's names, which are those of a GPT-2 but for q, k and v, without one weight of a norm."""
    needed = ("transformer.wte.weight", "lm_head.weight", *(f"{_H}attn.c_{k}.weight" for k in ("q", "k", "v", "proj")))
    if not all(name in inv for name in (*needed, f"{_H}mlp.c_fc.weight", f"{_H}mlp.c_proj.weight")):
        return []
    if any(name in inv for name in (*_NORMS, *_EXPERIMENTS, f"{_H}lambdas")):
        return []
    because = ["transformer.h.N.attn.c_q, c_k, c_v and mlp.c_fc are nanochat's names, and no norm has a weight"]
    if lookup(inv.extras, "meta.model_config.sequence_len") is not None:
        because.append("meta_NNNNNN.json with its model_config lies beside the weights")
    return because


def dims(m: Measure) -> None:
    """Sizes from shapes and the meta; then which release it is, and what that one hard-wired."""
    inv = m.inventory
    rows, width = inv.shape("transformer.wte.weight") or (None, None)
    ffn = (inv.shape(f"{_H}mlp.c_fc.weight") or (None,))[0]
    layers = inv.count("transformer.h.{}.attn.c_q.weight")
    m.set("layers", file=_meta("n_layer"), shape=(layers, "blocks transformer.h.0 … with a c_q"))
    m.set("hidden", file=_meta("n_embd"), shape=(width, "columns of transformer.wte"))
    m.set("rows", shape=(rows, "rows of transformer.wte, padded since f1bf69d (2025-12-09)"))
    vocab = m.set("vocab", file=_meta("vocab_size"), ask=f"the rows may be padded to a multiple of 64. {_META}")
    if isinstance(vocab, int) and rows is not None and not 0 < vocab <= rows:
        m.problem(f"vocab_size is {vocab}, and transformer.wte has {rows} rows", do="this meta is of another model")
    m.set("ffn", shape=(ffn, f"rows of {_H}mlp.c_fc"))
    m.set("context", file=_meta("sequence_len"), ask=_META)
    _heads(m)
    release = _release(m)
    _constants(m, release)
    _windows(m, release)


def _meta(key: str) -> tuple[str, ...]:
    return (f"meta.model_config.{key}",)


def _heads(m: Measure) -> None:
    """q has as many channels as the model; the gate of a value embedding has a row for each key head."""
    hidden, keys = m["hidden"], (m.inventory.shape(f"{_H}attn.c_k.weight") or (0,))[0]
    ask = f"no shape tells, and modded-nanogpt's first records have the same names for another GPT. {_META}"
    heads = m.set("heads", file=_meta("n_head"), ask=ask)
    if not (isinstance(heads, int) and isinstance(hidden, int)):
        m.unsettled("kv_heads", "n_kv_head")
        return
    if heads < 1 or hidden % (2 * heads) or keys < 1 or keys % (hidden // heads):
        m.problem(f"{heads} heads do not fit c_q with {hidden} rows and c_k with {keys}", do="pass --set n_head=N")
        m.unsettled("kv_heads", "n_kv_head")
        return
    head = hidden // heads
    m.set("head_dim", shape=(head, "n_embd / n_head, as nanochat's code computes it"))
    kv = m.set("kv_heads", file=_meta("n_kv_head"), shape=(keys // head, f"{keys} rows of {_H}attn.c_k / {head}"))
    if isinstance(kv, int) and heads % kv:
        m.problem(f"{heads} query heads can't share {kv} key heads evenly", do="pass --set n_head=N")


def _release(m: Measure) -> Release:
    """Which release wrote it: by the parameters that there are, and by the width of the gates."""
    inv, layers = m.inventory, m.inventory.count("transformer.h.{}.attn.c_q.weight")
    first = (layers - 1) % 2  # every second layer has a value embedding, the last one always
    gate = inv.shape(f"transformer.h.{first}.attn.ve_gate.weight")
    smear = inv.shape("smear_gate.weight")
    there = {"lambdas": "x0_lambdas" in inv, "value_embeds": gate is not None, "smear": smear is not None}
    for name, is_there in there.items():
        m.set(name, kind=boolean, shape=(is_there, f"{_MARKS[name]} is {'there' if is_there else 'not there'}"))
    m.set("value_layers", shape=((layers + 1) // 2 if gate else 0, "every second layer up to the last"))
    m.set("first_value", shape=(first, "every second layer up to the last"))
    m.set("gate_channels", shape=(gate[1] if gate else 0, "columns of attn.ve_gate"))
    m.set("smear_channels", shape=(smear[1] if smear else 0, "columns of smear_gate"))
    known = {(True, 12, True): _SMEARED, (True, 12, False): _TUNED, (True, 32, False): _VALUES}
    known |= {(True, 0, False): _LAMBDAS, (False, 0, False): _FIRST}
    release = known.get((there["lambdas"], gate[1] if gate else 0, there["smear"]))
    if release is None:
        width = f"gates of {gate[1]} channels" if gate else "no gates of value embeddings"
        what = f"{'' if there['lambdas'] else 'no '}x0_lambdas, {width} and {'a' if smear else 'no'} smear_gate"
        m.problem(f"no release of nanochat has {what}", do="it needs a family of its own (docs/architectures.md)")
        return _SMEARED
    m.set("release", kind=str, shape=(release.since, _marks(release)))
    return release


def _marks(release: Release) -> str:
    return {
        _SMEARED.since: "smear_gate is there: the commit that brought it, or later",
        _TUNED.since: "gates have 12 channels and there is no smear_gate: this commit, or up to a825e63",
        _VALUES.since: "gates have 32 channels: this commit, or up to 6ed7d1d",
        _LAMBDAS.since: "resid_lambdas and x0_lambdas without value_embeds: this commit, or up to e85db6b",
        _FIRST.since: "blocks, embedding and head alone: the first commit, or up to aa530cd",
    }[release.since]


def _constants(m: Measure, release: Release) -> None:
    """What the code hard-wired."""
    why = f"hard-wired in nanochat/gpt.py at {release.since}"
    m.set("rope_theta", kind=float, default=(release.theta, why))
    m.set("qk_gain", kind=float, default=(release.gain, why))
    m.set("norm_eps", kind=float, default=(_EPS, "F.rms_norm without an eps: the float32 epsilon, in torch 2.13"))
    known = (release.softcap, why) if release.softcap is not None else None
    ask = "it was 15 in the code from e85db6b (2026-01-16), and 20 from aba30cb (2026-03-02) to 6ed7d1d (2026-03-09)"
    m.set("softcap", kind=float, default=known, ask=ask, choices=() if known else (15.0, 20.0))
    scale = (release.value_scale, why) if m["value_embeds"] else (0.0, "there are no value embeddings")
    m.set("value_scale", kind=float, default=scale)
    layers = m["layers"]
    half = layers // 2 if isinstance(layers, int) else 0
    m.set("backout_layer", default=(half, f"n_layer // 2, {why}") if m["smear"] else (-1, "nothing is taken back"))
    if release.theta == _FIRST.theta:
        m.deviation(
            "this release rounds the cosines and sines of positions to bfloat16 whatever it computes in; vLLM rounds "
            "them where it serves bfloat16, and in float32 does not"
        )


def _windows(m: Measure, release: Release) -> None:
    """The pattern is in the meta since fbc1484; the short window in the code alone."""
    there = lookup(m.inventory.extras, "meta.model_config") is not None
    long = ("L", "the meta has no window_pattern: then nanochat's own loader takes L, which is all positions")
    known = ("L", f"windows came after {release.since}") if release is _FIRST else long if there else None
    pattern = m.set("window_pattern", kind=str, file=_meta("window_pattern"), default=known, ask=_META)
    if isinstance(pattern, str) and (not pattern or set(pattern.upper()) - set("SL")):
        m.problem(f"window_pattern is {pattern!r}, not made of S and L", do="pass --set window_pattern=SSSL")
    context = m["context"]
    if isinstance(context, int):
        why = f"{release.windowed}, hard-wired; a key further back than this is not seen"
        m.set("short_window", default=(release.window(context), why))
    else:
        m.unsettled("short_window")


def hf_config(d: Dims) -> dict[str, Any]:
    """config.json of the composable decoder. A window of N keeps the N keys before a token and its own."""
    layers, pattern = d.integer("layers"), str(d["window_pattern"]).upper()
    sliding = [i for i in range(layers - 1) if pattern[i % len(pattern)] == "S"]
    gain, head = float(str(d["qk_gain"])), d.integer("head_dim")
    attention: dict[str, Any] = {"qk_norm": {"eps": d["norm_eps"], "weight": False, "after_rotary": True}}
    if gain != 1.0:
        attention["scale"] = gain**2 * head**-0.5
    if sliding:
        attention |= {"window": d.integer("short_window") + 1, "sliding_layers": sliding}
    if d["value_embeds"]:
        placed = [2 * v + d.integer("first_value") for v in range(d.integer("value_layers"))]
        gates = {"channels": d["gate_channels"], "scale": d["value_scale"]}
        attention["value_embedding"] = {"layers": placed, **gates}
    residual: dict[str, Any] = {"lambdas": d["lambdas"]}
    if d["smear"]:
        residual |= {"look_back": d["smear_channels"], "take_back": d["backout_layer"]}
    padded = {"embedding_rows": d["rows"]} if d["rows"] != d["vocab"] else {}
    return config_of(
        {
            "vocab_size": d["vocab"],
            **padded,
            "hidden_size": d["hidden"],
            "intermediate_size": d["ffn"],
            "num_hidden_layers": layers,
            "num_attention_heads": d["heads"],
            "num_key_value_heads": d["kv_heads"],
            "head_dim": head,
            "max_position_embeddings": d["context"],
            "tie_word_embeddings": False,
            "norm": {"eps": d["norm_eps"], "weight": False, "embedding": True},
            "positions": {"kind": "rope", "theta": d["rope_theta"]},
            "attention": attention,
            "mlp": {"gated": False, "activation": "relu2"},
            "residual": residual,
            "logit_softcap": d["softcap"],
        }
    )


ARCH = Arch(
    name="nanochat",
    title="nanochat",
    source="karpathy/nanochat",
    target=COMPOSED,
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.nanochat:build",
    served="mdl.archs.served.decoder:MdlDecoderForCausalLM",
)

"""DeepSeek-V3 as DeepSeek's own inference code keeps it: model{r}-mp{N}.safetensors, and the config it is started with.

Its matrices are bfloat16, or float8 as released. Those become bfloat16 by the product with their blocks' factors, which
is what its linear computes with as it is started (``gemm_impl = "bf16"``), and what its fp8_cast_bf16.py writes.

The code writes no config beside the weights: put the ``--config`` file (inference/configs/config_671B.json) there as
config.json. What it leaves out, ModelArgs fills in.
"""

from __future__ import annotations

from typing import Any

from .base import Arch, Dims, Inventory, Measure, boolean

_TARGET = "DeepseekV3ForCausalLM"
_ATTN = "layers.0.attn."
_BLOCK = 128
_MULTIPLIED = "which is multiplied out as DeepSeek's linear does; float8 is not kept: no CPU can be held to its kernels"
_CUT = {"wq": 0, "wq_b": 0, "wkv_b": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
"""Along which dimension convert.py cuts a matrix into ranks; whole experts are not cut."""
_DEFAULTS: dict[str, tuple[str, Any]] = {
    "rope_theta": ("rope_theta", 10000.0),
    "rope_factor": ("rope_factor", 40.0),
    "rope_beta_fast": ("beta_fast", 32),
    "rope_beta_slow": ("beta_slow", 1),
    "rope_mscale": ("mscale", 1.0),
    "rope_original_context": ("original_seq_len", 4096),
    "route_scale": ("route_scale", 1.0),
    "expert_groups": ("n_expert_groups", 1),
    "limited_groups": ("n_limited_groups", 1),
    "score_func": ("score_func", "softmax"),
    "experts_per_token": ("n_activated_experts", 6),
    "context": ("max_seq_len", 16384),
}
"""Our name of a value, that of DeepSeek's ModelArgs, and its default there."""


def detect(inv: Inventory) -> list[str]:
    """DeepSeek's own names: keys and values through one low rank, wkv_a and wkv_b, and an embedding called embed."""
    if not all(name in inv for name in ("embed.weight", "head.weight", _ATTN + "wkv_a.weight", _ATTN + "wkv_b.weight")):
        return []
    because = ["embed, head and layers.N.attn.wkv_a, wkv_b are the names of DeepSeek-V3's inference code"]
    return because + ([f"{inv.ranks} files model{{r}}-mp{inv.ranks}: model-parallel ranks"] if inv.ranks > 1 else [])


def dims(m: Measure) -> None:
    """Sizes from the shapes of all ranks together; the rest from config.json and ModelArgs' defaults."""
    _factors(m)
    inv, ranks = m.inventory, m.inventory.ranks
    rows, width = inv.shape("embed.weight") or (0, None)
    layers = inv.count("layers.{}.attn_norm.weight")
    m.set("layers", file=("config.n_layers",), shape=(layers, "blocks layers.0 … with an attn_norm"))
    m.set("hidden", file=("config.dim",), shape=(width, "columns of embed"))
    m.set("vocab", file=("config.vocab_size",), shape=(rows * ranks or None, "rows of embed"))
    _heads(m, ranks)
    _experts(m, ranks)
    m.set("norm_eps", kind=float, default=(1e-6, "hard-wired in DeepSeek's RMSNorm"))
    there = isinstance(inv.extras.get("config"), dict)
    for name, (key, value) in _DEFAULTS.items():
        default = (value, "ModelArgs' default, which config.json leaves as it is") if there else None
        ask = "it is in the file after --config of DeepSeek's program, which belongs beside the weights as config.json"
        m.set(name, kind=type(value), file=(f"config.{key}",), default=default, ask=ask)
    _routing(m)


def _factors(m: Measure) -> None:
    """Whether matrices are float8 with a factor for each block, as in DeepSeek's release, or plain.

    With ranks, a matrix has to be cut between two blocks: DeepSeek's convert.py cuts the factors into as many parts
    wherever that is.
    """
    tensors = m.inventory.tensors
    scaled = [name for name in tensors if name.endswith(".scale")]
    why = f"{len(scaled)} matrices have a scale beside them, {_MULTIPLIED}" if scaled else "there are no scales"
    m.set("scaled", kind=boolean, shape=(bool(scaled), why))
    bare = [n for n, infos in tensors.items() if infos[0].dtype.startswith("float8") and _scale_of(n) not in tensors]
    if bare:
        what = f"{bare[0]} is {tensors[bare[0]][0].dtype} without its factors ({_scale_of(bare[0])})"
        m.problem(what, do="it means nothing without them: convert the release again with DeepSeek's convert.py")
    if not scaled:
        return
    block = m.set("block", default=(_BLOCK, "block_size in DeepSeek's model.py"))
    for name in scaled:
        axis, infos = _CUT.get(name.split(".")[-2]), tensors.get(name.removesuffix("scale") + "weight")
        if axis is None or not infos or len(infos) == 1 or len(infos[0].shape) != 2 or not isinstance(block, int):
            continue
        size = infos[0].shape[axis]
        if block > 0 and size % block:
            what = f"{infos[0].name} is cut into {len(infos)} ranks of {size}, inside a block of {block}"
            m.problem(what, do="run DeepSeek's convert.py with --model-parallel 1")


def _scale_of(name: str) -> str:
    return name.removesuffix("weight") + "scale"


def _heads(m: Measure, ranks: int) -> None:
    """H heads of nope + rope channels in q, nope + v in kv, v in o: three matrices, and rope is known from wkv_a."""
    inv = m.inventory
    kv_rank = (inv.shape(_ATTN + "kv_norm.weight") or (0,))[0]
    q_rank = (inv.shape(_ATTN + "q_norm.weight") or (0,))[0]
    rope = (inv.shape(_ATTN + "wkv_a.weight") or (0,))[0] - kv_rank
    q = (inv.shape(_ATTN + ("wq_b" if q_rank else "wq") + ".weight") or (0,))[0] * ranks
    kv = (inv.shape(_ATTN + "wkv_b.weight") or (0,))[0] * ranks
    o = (inv.shape(_ATTN + "wo.weight") or (0, 0))[1] * ranks
    m.set("q_rank", file=("config.q_lora_rank",), shape=(q_rank, "size of attn.q_norm, 0 without one"))
    m.set("query_rank", kind=boolean, shape=(q_rank > 0, f"attn.q_norm is {'there' if q_rank else 'not there'}"))
    m.set("kv_rank", file=("config.kv_lora_rank",), shape=(kv_rank, "size of attn.kv_norm"))
    m.set("rope_dim", file=("config.qk_rope_head_dim",), shape=(rope, "rows of attn.wkv_a beyond kv_norm's"))
    heads, rest = divmod(q - kv + o, rope) if rope > 0 else (0, 1)
    if rest or heads < 1 or o % heads or kv % heads or rope % 2:
        m.problem(f"q with {q}, kv with {kv} rows and o with {o} columns are no heads with {rope} rotated channels")
        return
    m.set("heads", file=("config.n_heads",), shape=(heads, "(rows of q - rows of wkv_b + columns of wo) / rope_dim"))
    m.set("v_dim", file=("config.v_head_dim",), shape=(o // heads, "columns of attn.wo / heads"))
    m.set("nope_dim", file=("config.qk_nope_head_dim",), shape=((kv - o) // heads, "rows of wkv_b / heads - v_dim"))


def _experts(m: Measure, ranks: int) -> None:
    inv, layers = m.inventory, m["layers"]
    dense = inv.count("layers.{}.ffn.w1.weight")
    m.set("dense_layers", file=("config.n_dense_layers",), shape=(dense, "first layers with a plain ffn.w1"))
    count = layers if isinstance(layers, int) else 0
    m.set("moe_layers", shape=(count - dense, "the layers after them"))
    at = f"layers.{dense}.ffn."
    if not dense or at + "gate.weight" not in inv:
        m.problem("there are no dense layers first and mixtures after them", do=f"{_TARGET} is carried over with both")
        return
    if at + "gate.bias" not in inv:
        what = f"{at}gate has no bias, so this is DeepSeek-V2 (its code makes one where dim is 7168 only)"
        m.problem(what, do=f"convert DeepSeek-V2 from its Hugging Face release; here {_TARGET} is carried over")
    experts = (inv.shape(at + "gate.weight") or (None,))[0]
    inner = (inv.shape(at + "experts.0.w1.weight") or (None,))[0]
    shared = (inv.shape(at + "shared_experts.w1.weight") or (0,))[0] * ranks
    ffn = (inv.shape("layers.0.ffn.w1.weight") or (0,))[0] * ranks
    m.set("ffn", file=("config.inter_dim",), shape=(ffn, "rows of ffn.w1"))
    m.set("experts", file=("config.n_routed_experts",), shape=(experts, "rows of ffn.gate"))
    m.set("expert_ffn", file=("config.moe_inter_dim",), shape=(inner, "rows of an expert's w1"))
    times = shared // inner if inner and shared % inner == 0 else None
    m.set("shared_experts", file=("config.n_shared_experts",), shape=(times, "rows of shared_experts.w1 / expert_ffn"))


def _routing(m: Measure) -> None:
    if m["score_func"] not in ("sigmoid", None):
        m.problem(f"score_func is {m['score_func']}", do=f"vLLM's {_TARGET} has a bias with sigmoid only")
    experts, groups = m["experts"], m["expert_groups"]
    if isinstance(experts, int) and isinstance(groups, int) and (groups < 1 or experts % groups):
        m.problem(f"{experts} experts can't be divided into {groups} groups", do="pass --set n_expert_groups=N")


def stretched(d: Any) -> bool:
    """Whether DeepSeek's code stretches its rotations (YaRN): where it is started for more than it was trained on."""
    return bool(d["context"] > d["rope_original_context"])


def hf_config(d: Dims) -> dict[str, Any]:
    """DeepseekV3ForCausalLM's config.json."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": d["rope_theta"]}
    if stretched(d):
        rope = {
            "rope_type": "yarn",
            "rope_theta": d["rope_theta"],
            "factor": d["rope_factor"],
            "beta_fast": d["rope_beta_fast"],
            "beta_slow": d["rope_beta_slow"],
            "mscale": d["rope_mscale"],
            "mscale_all_dim": d["rope_mscale"],  # DeepSeek's code scales the scores, and not the tables
            "original_max_position_embeddings": d["rope_original_context"],
        }
    return {
        "architectures": [_TARGET],
        "model_type": "deepseek_v3",
        "vocab_size": d["vocab"],
        "hidden_size": d["hidden"],
        "intermediate_size": d["ffn"],
        "moe_intermediate_size": d["expert_ffn"],
        "num_hidden_layers": d["layers"],
        "num_attention_heads": d["heads"],
        "num_key_value_heads": d["heads"],
        "q_lora_rank": d["q_rank"] or None,
        "kv_lora_rank": d["kv_rank"],
        "qk_nope_head_dim": d["nope_dim"],
        "qk_rope_head_dim": d["rope_dim"],
        "v_head_dim": d["v_dim"],
        "n_routed_experts": d["experts"],
        "n_shared_experts": d["shared_experts"],
        "num_experts_per_tok": d["experts_per_token"],
        "first_k_dense_replace": d["dense_layers"],
        "n_group": d["expert_groups"],
        "topk_group": d["limited_groups"],
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": d["route_scale"],
        "hidden_act": "silu",
        "rms_norm_eps": d["norm_eps"],
        "max_position_embeddings": d["context"],
        "rope_parameters": rope,
        "rope_interleave": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_nextn_predict_layers": 0,  # the inference code leaves out the layer that predicts one token more
        "tie_word_embeddings": d["tied"],
    }


ARCH = Arch(
    name="deepseek_inference",
    title="DeepSeek-V3 inference",
    source="deepseek-ai/DeepSeek-V3, inference",
    target=_TARGET,
    detect=detect,
    dims=dims,
    hf_config=hf_config,
    eager="mdl.archs.eager.deepseek_inference:build",
)

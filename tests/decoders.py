"""Composable decoders drawn at random: a config, and weights of unit gain that show every mistake."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from mdl.archs.decoder.reading import config_of
from mdl.archs.decoder.schema import decoder_of
from mdl.archs.decoder.tensors import target_of

ACTIVATIONS = (
    *("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    *("quick_gelu", "relu", "relu2", "tanh", "sigmoid"),
)
SCALINGS: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0},
)


def drawn(seed: int) -> dict[str, Any]:
    """config.json of one decoder; every choice of the schema comes up within a few dozen seeds."""
    r = random.Random(seed)  # noqa: S311 - no secret
    layers, size = r.choice((2, 3, 4)), r.choice((32, 64))
    heads, keys = r.choice(((4, 4), (4, 2), (4, 1), (6, 3), (2, 2)))
    hidden = r.choice((heads * size, 128, 192))
    place = r.choice(("pre", "pre", "post", "output", "sandwich"))
    norm = _norm(r) | {"place": place, "final": r.random() < 0.8 or place == "pre", "embedding": r.random() < 0.3}
    attention = _attention(r, layers)
    config: dict[str, Any] = {
        "vocab_size": r.choice((256, 250)),
        "hidden_size": hidden,
        "intermediate_size": r.choice((128, 192, 320)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": size,
        "max_position_embeddings": 256,
        "tie_word_embeddings": r.random() < 0.4,
        "norm": norm,
        "positions": _positions(r, layers, size, window="window" in attention),
        "attention": attention,
        "mlp": {"gated": r.random() < 0.6, "activation": r.choice(ACTIVATIONS)}
        | {"bias": r.random() < 0.3, "out_bias": r.random() < 0.3},
        "residual": _residual(r, layers, place, looks=hidden % size == 0),
        "head_bias": r.random() < 0.2,
    }
    if r.random() < 0.3:
        config["embedding_rows"] = 256
    if r.random() < 0.3:
        config["embedding_multiplier"] = r.choice((0.5, 4.0))
    if r.random() < 0.3:
        config["logit_multiplier"] = r.choice((0.25, 2.0))
    if r.random() < 0.3:
        config["logit_softcap"] = r.choice((5.0, 30.0))
    if r.random() < 0.3:
        config["moe"] = _moe(r, layers)
    if r.random() < 0.2:
        chosen = sorted(r.sample(range(layers), r.randint(1, layers)))
        attention["value_embedding"] = {"layers": chosen, "channels": 12, "scale": r.choice((2.0, 3.0))}
    if r.random() < 0.2:
        _recur(r, config, r.choice(("gated", "gated", "linear_attention", "linear_attention", "mamba2")))
    return config_of(config)


def recurrent(seed: int, kind: str, *, everywhere: bool | None = None) -> dict[str, Any]:
    """config.json of one decoder with a recurrence of that kind."""
    r = random.Random(seed)  # noqa: S311 - no secret
    plain = (config for config in map(drawn, range(1000 * seed, 1000 * seed + 1000)) if "recurrence" not in config)
    config = {key: value for key, value in next(plain).items() if key not in ("architectures", "model_type")}
    _recur(r, config, kind, everywhere=everywhere)
    return config_of(config)


def _recur(r: random.Random, config: dict[str, Any], kind: str, *, everywhere: bool | None = None) -> None:
    """Put a recurrence in the place of attention in some layers or all, and take away what only attention has."""
    layers, attention, positions = config["num_hidden_layers"], config["attention"], config["positions"]
    chosen = sorted(r.sample(range(layers), r.randint(1, layers - 1)))
    everywhere = r.random() < 0.25 if everywhere is None else everywhere
    recurrence: dict[str, Any] = {"kind": kind} | ({} if everywhere else {"layers": chosen})
    recurrence |= {"gated": _gated, "linear_attention": _linear_attention, "mamba2": _mamba2}[kind](r)
    config["recurrence"] = recurrence
    if everywhere:
        config["attention"] = {}
        config["positions"] = {"kind": r.choice(("none", "learned"))}
        return
    attention.pop("value_residual", None)
    for table in (positions, attention, attention.get("value_embedding") or {}):
        for name in ("layers", "sliding_layers"):
            if table.get(name) is not None:
                table[name] = [i for i in table[name] if i not in chosen]


def _gated(r: random.Random) -> dict[str, Any]:
    decay = r.choice(("forget", "update", "power"))
    g: dict[str, Any] = {"width": r.choice((96, 128)), "decay": decay, "input_gate": r.random() < 0.4}
    g |= {"value_activation": r.choice((None, "mingru", "silu", "tanh")), "gates_from": r.choice(("stream", "value"))}
    g["input_scale"] = r.choice(("complement", "root", "root_after_first", "one"))
    if decay == "power":
        g["power"] = r.choice((0.5, 8.0))
    elif r.random() < 0.4:
        g["decay_floor"] = True
    if r.random() < 0.4:
        g |= {"conv": r.choice((2, 4)), "conv_bias": r.random() < 0.5}
    return g | _outwards(r) | {"gate_bias": r.random() < 0.5}


def _linear_attention(r: random.Random) -> dict[str, Any]:
    decay, heads = r.choice(("fixed", "head", "channel")), r.choice((2, 3, 4))
    a: dict[str, Any] = {"heads": heads, "key_size": r.choice((8, 16, 32)), "value_size": r.choice((16, 32))}
    a |= {"feature": r.choice((None, "silu", "relu", "elu")), "decay": decay, "norm_over": r.choice(("head", "all"))}
    if decay == "fixed":
        a["rates"] = [1 - 2.0 ** -(1 + 2 * head) for head in range(heads)]
    else:
        a |= {"temperature": r.choice((1.0, 16.0)), "decay_bias": r.random() < 0.5}
    if r.random() < 0.3:
        a["scale"] = 0.5
    return a | _outwards(r)


def _outwards(r: random.Random) -> dict[str, Any]:
    norm = _norm(r) if r.random() < 0.6 else None
    gate = r.choice((None, "sigmoid", "silu", "gelu_pytorch_tanh"))
    return {"norm": norm, "output_gate": gate, "bias": r.random() < 0.4, "out_bias": r.random() < 0.3}


def _mamba2(r: random.Random) -> dict[str, Any]:
    heads, groups = r.choice(((4, 1), (4, 2), (8, 4)))
    m: dict[str, Any] = {"heads": heads, "head_size": r.choice((16, 32)), "groups": groups, "state": r.choice((16, 32))}
    return m | {"conv": r.choice((2, 4)), "norm_eps": 1e-5, "bias": r.random() < 0.3, "conv_bias": r.random() < 0.7}


def _norm(r: random.Random) -> dict[str, Any]:
    kind, eps = r.choice(("rms", "rms", "layer")), r.choice((1e-5, 1e-6))
    if r.random() < 0.2:
        return {"kind": kind, "eps": eps, "weight": False}
    if kind == "layer":
        return {"kind": kind, "eps": eps, "bias": r.random() < 0.6}
    return {"kind": kind, "eps": eps, "unit_offset": r.random() < 0.3}


def _positions(r: random.Random, layers: int, size: int, *, window: bool) -> dict[str, Any]:
    kind = r.choice(("rope", "rope", "rope", "learned", "alibi", "none"))
    if kind != "rope":
        return {"kind": kind}
    rope: dict[str, Any] = {"kind": kind, "theta": r.choice((1e4, 5e5)), "style": r.choice(("half", "interleaved"))}
    if r.random() < 0.3:
        rope["rotary_dim"] = size // 2
    elif r.random() < 0.4:
        rope["scaling"] = r.choice(SCALINGS)
    if r.random() < 0.2:
        rope["layers"] = sorted(r.sample(range(layers), r.randint(1, layers)))
    if window and r.random() < 0.5:
        rope["sliding_theta"] = 1e3
    return rope


def _attention(r: random.Random, layers: int) -> dict[str, Any]:
    a: dict[str, Any] = {"bias": r.random() < 0.4, "out_bias": r.random() < 0.3}
    if r.random() < 0.3:
        a["scale"] = r.choice((0.1, 0.25))
    if r.random() < 0.3:
        a["softcap"] = r.choice((8.0, 20.0))  # vLLM's AVX-512 kernel makes NaN of scores beyond 88 times the cap
    if r.random() < 0.4:
        a["window"] = r.choice((8, 33))
        if r.random() < 0.7:
            a["sliding_layers"] = sorted(r.sample(range(layers), r.randint(1, layers)))
    if r.random() < 0.5:
        a["qk_norm"] = _norm(r) | {"over": r.choice(("head", "all")), "after_rotary": r.random() < 0.5}
    if r.random() < 0.3:
        a["gate"] = r.choice(("head", "channel"))
    a["value_residual"] = r.random() < 0.2
    return a


def _residual(r: random.Random, layers: int, place: str, *, looks: bool) -> dict[str, Any]:
    res: dict[str, Any] = {"parallel": place == "pre" and r.random() < 0.3}
    res["one_norm"] = res["parallel"] and r.random() < 0.5
    if place != "post" and r.random() < 0.3:
        res["multiplier"] = r.choice((0.5, 1.5))
    res["lambdas"] = r.random() < 0.3
    if looks and r.random() < 0.3:
        res["look_back"] = 24
    if r.random() < 0.2:
        res["take_back"] = layers // 2
    return res


def _moe(r: random.Random, layers: int) -> dict[str, Any]:
    experts, shared = r.choice((4, 8)), r.choice((0, 0, 64, 96))
    moe: dict[str, Any] = {"experts": experts, "experts_per_token": r.choice((1, 2, 3)), "size": r.choice((64, 96))}
    moe |= {"activation": r.choice(("silu", "gelu", "gelu_pytorch_tanh")), "scoring": r.choice(("softmax", "sigmoid"))}
    moe |= {"normalised": r.random() < 0.5, "scaling": r.choice((1.0, 2.5)), "router_bias": r.random() < 0.3}
    moe |= {"selection_bias": r.random() < 0.3, "shared_size": shared, "shared_gate": shared > 0 and r.random() < 0.5}
    if layers > 2 and r.random() < 0.5:
        moe["layers"] = list(range(1, layers))
    return moe


def weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """float32 tensors of unit gain; norms around 1 (around 0 where 1 is added), biases and numbers at random."""
    generator = torch.Generator().manual_seed(seed)
    decoder = decoder_of(config)
    made: dict[str, torch.Tensor] = {}
    for name, shape in target_of(decoder).shapes.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("decay_floor"):
            value = torch.sigmoid(value - 1)
        elif len(shape) > 1 and "embed" not in name:
            value = value / shape[-1] ** 0.5
        elif len(shape) == 1:
            offset = 0.0 if name.endswith(("bias", "A_log")) or (decoder.norm.unit_offset and "norm" in name) else 1.0
            value = offset + 0.3 * value
        made[name] = value
    return made


def saved(folder: Path, seed: int, config: dict[str, Any] | None = None) -> Path:
    """A folder as save_pretrained would write it: config.json, drawn if not given, and model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = config or drawn(seed)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights(config, seed), folder / "model.safetensors")
    return folder

"""The composable decoder: refusals, its twin against transformers, and vLLM against the twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mdl.archs.decoder.reading import checked, config_of
from mdl.archs.decoder.schema import decoder_of
from mdl.archs.decoder.tensors import target_of
from mdl.archs.eager.decoder import assemble
from mdl.errors import MdlError
from mdl.validate.verify import Settings, verify

from .converted import layout, nmse
from .decoders import drawn, saved

if TYPE_CHECKING:
    from mdl.validate.client import Engine

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ROPE: dict[str, Any] = {"kind": "rope", "theta": 10000.0}
PLAIN: dict[str, Any] = {
    **SIZES,
    "norm": {"eps": 1e-5},
    "positions": ROPE,
    "mlp": {"gated": True, "activation": "silu"},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_attention_heads": 3}, "3 heads can't share 2 key heads evenly"),
    "unknown key": ({"norm": {"eps": 1e-5, "epsilon": 1e-6}}, "Extra inputs are not permitted"),
    "a word for a number": ({"hidden_size": "128"}, "valid integer"),
    "rms with a bias": ({"norm": {"eps": 1e-5, "bias": True}}, "RMSNorm has none"),
    "an offset of LayerNorm": ({"norm": {"kind": "layer", "eps": 1e-5, "unit_offset": True}}, "add 1 to the weights"),
    "parallel halves behind norms": (
        {"norm": {"eps": 1e-5, "place": "sandwich"}, "residual": {"parallel": True}},
        "only pre is served",
    ),
    "one norm of two": ({"residual": {"one_norm": True}}, "can share a norm"),
    "no base": ({"positions": {"kind": "rope"}}, "rope needs it"),
    "a base of nothing": ({"positions": {"kind": "alibi", "theta": 1e4}}, "nothing else has one"),
    "an odd rotation": ({"positions": {**ROPE, "rotary_dim": 15}}, "turned in pairs"),
    "half a scaling": ({"positions": {**ROPE, "scaling": {"rope_type": "yarn", "factor": 4.0}}}, "needs it"),
    "a window of no width": ({"attention": {"sliding_layers": [0]}}, "without attention.window"),
    "a layer too many": ({"attention": {"window": 8, "sliding_layers": [3]}}, "layers are 0 to 2"),
    "more experts than there are": (
        {"moe": {"experts": 2, "experts_per_token": 3, "size": 64}},
        "3, of 2 experts",
    ),
    "a gate of no expert": (
        {"moe": {"experts": 4, "experts_per_token": 2, "size": 64, "shared_gate": True}},
        "no shared expert",
    ),
    "a look back in odd heads": ({"head_dim": 48, "residual": {"look_back": 8}}, "no multiple of head_dim"),
    "too few rows": ({"embedding_rows": 90}, "fewer than vocab_size"),
    "an activation": ({"mlp": {"gated": False, "activation": "mish"}}, "mlp.activation"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_is_refused_by_name(case: str) -> None:
    changed, said = REFUSED[case]

    with pytest.raises(MdlError) as error:
        checked({**PLAIN, **changed})

    told = " ".join(f"{problem.where} {problem.what}" for problem in error.value.problems)
    assert said in told
    assert "config.json" in told


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(MdlError) as error:
        checked({**PLAIN, "num_attention_heads": 3, "embedding_rows": 90})

    assert len(error.value.problems) == 2


def test_the_twin_holds_what_the_layout_does() -> None:
    for seed in range(200):
        decoder = decoder_of(drawn(seed))
        held = {name: tuple(tensor.shape) for name, tensor in assemble(decoder).state_dict().items()}
        assert held == dict(target_of(decoder).shapes), seed


def test_the_page_names_every_field() -> None:
    """docs/decoder.md is the reference of the config: no field of any table is left out."""
    from mdl.archs.decoder import schema

    page = (Path(__file__).parents[1] / "docs" / "decoder.md").read_text(encoding="utf-8")
    tables = [cls for cls in vars(schema).values() if isinstance(cls, type) and issubclass(cls, schema.Table)]
    missing = [f"{cls.__name__}.{name}" for cls in tables for name in cls.model_fields if f"`{name}`" not in page]

    assert missing == []


# --- against transformers' own classes ---------------------------------------------------------------------------

NAMES = {
    "self_attn.": "self_attn.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
}
OUTPUT = {"post_attention_layernorm": "attn_out_norm", "post_feedforward_layernorm": "mlp_out_norm"}
SANDWICH = {
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_out_norm",
    "post_attention_layernorm": "attn_out_norm",
    "input_layernorm": "attn_norm",
}
HF: dict[str, Any] = {**SIZES, "attn_implementation": "eager", "rope_theta": 10000.0, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **more}}


MOE = {"experts": 4, "experts_per_token": 2, "size": 64, "shared_size": 96, "shared_gate": True}
TWINS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "Llama": ("Llama", _rope(**LLAMA3), {"positions": {**ROPE, "scaling": LLAMA3}}, NAMES),
    "Llama with biases": (
        "Llama",
        {**_rope(), "attention_bias": True, "mlp_bias": True},
        {"attention": {"bias": True, "out_bias": True}, "mlp": {**PLAIN["mlp"], "bias": True, "out_bias": True}},
        NAMES,
    ),
    "Qwen3": ("Qwen3", {**_rope(), "rms_norm_eps": 1e-5}, {"attention": {"qk_norm": {"eps": 1e-5}}}, NAMES),
    "Olmo2": (
        "Olmo2",
        _rope(),
        {"norm": {"eps": 1e-5, "place": "output"}, "attention": {"qk_norm": {"eps": 1e-5, "over": "all"}}},
        OUTPUT,
    ),
    "Granite": (
        "Granite",
        {**_rope(), "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1}
        | {"logits_scaling": 8.0},
        {"embedding_multiplier": 12.0, "residual": {"multiplier": 0.22}, "attention": {"scale": 0.1}}
        | {"logit_multiplier": 1 / 8},
        NAMES,
    ),
    "Gemma2": (
        "Gemma2",
        {**_rope(), "sliding_window": 8, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 3.0}
        | {"final_logit_softcapping": 5.0, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        {"norm": {"eps": 1e-5, "unit_offset": True, "place": "sandwich"}, "logit_softcap": 5.0}
        | {"attention": {"scale": 1 / 8, "softcap": 3.0, "window": 8, "sliding_layers": [0, 2]}}
        | {"embedding_multiplier": 128**0.5, "mlp": {"gated": True, "activation": "gelu_pytorch_tanh"}},
        SANDWICH,
    ),
    "Cohere": (
        "Cohere",
        {**_rope(), "logit_scale": 0.25, "layer_norm_eps": 1e-5},
        {"norm": {"kind": "layer", "eps": 1e-5}, "positions": {**ROPE, "style": "interleaved"}}
        | {"residual": {"parallel": True, "one_norm": True}, "logit_multiplier": 0.25},
        NAMES,
    ),
    "Qwen2Moe": (
        "Qwen2Moe",
        {**_rope(), "rms_norm_eps": 1e-5, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        | {"shared_expert_intermediate_size": 96, "norm_topk_prob": False, "mlp_only_layers": [0]}
        | {"experts_implementation": "eager"},
        {"attention": {"bias": True}, "moe": {**MOE, "normalised": False, "layers": [1, 2]}},
        {**NAMES, "mlp.gate.weight": "mlp.router.weight"},
    ),
}


@pytest.mark.parametrize("case", list(TWINS))
def test_the_twin_computes_what_transformers_does(case: str) -> None:
    """Same weights, float64: nothing but the order of sums may differ."""
    transformers = pytest.importorskip("transformers")
    from transformers.core_model_loading import revert_weight_conversion

    name, theirs, ours, renamed = TWINS[case]
    cls = getattr(transformers, f"{name}ForCausalLM")
    given = {key: value for key, value in {**HF, **theirs}.items() if key != "rope_theta"}
    torch.manual_seed(0)
    model = cls(cls.config_class(**{"rms_norm_eps": 1e-5, **given})).double().eval()
    randomised(model)
    state = revert_weight_conversion(model, dict(model.state_dict()))
    decoder = checked({**PLAIN, **ours})
    twin = assemble(decoder)
    twin.load_state_dict({_renamed(key, renamed): value for key, value in state.items()}, assign=True)
    ids = torch.randint(0, 96, (2, 40))

    with torch.no_grad():
        wanted, found = model(ids).logits, twin(ids)

    assert nmse(found, wanted) < 1e-12  # transformers computes norms and softmax in float32


def randomised(model: torch.nn.Module) -> None:
    """Unit gain, and norms and biases that show."""
    with torch.no_grad():
        for key, value in model.named_parameters():
            gain = value.shape[-1] ** -0.5 if value.dim() > 1 and "embed" not in key else 1.0
            value.normal_().mul_(gain) if value.dim() > 1 else value.normal_(1.0, 0.3)


def _renamed(name: str, renamed: dict[str, str]) -> str:
    for old, new in renamed.items():
        if f".{old}" in name:
            return name.replace(f".{old}", f".{new}")
    return name


# --- under vLLM ---------------------------------------------------------------------------------------------------


def converted(tmp_path: Path, seed: int) -> Path:
    layout(saved(tmp_path / "source", seed), tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.engine
@pytest.mark.parametrize("seed", [0, 34])
def test_vllm_computes_what_the_twin_does(seed: int, tmp_path: Path, engine: Engine) -> None:
    """0: experts, ALiBi, gates; 34: a look back, value embeddings, windows. benchmarks/decoders.py runs hundreds."""
    report = verify(converted(tmp_path, seed), Settings(), engine=engine)

    assert report.ok, [f"{check.name}: {check.measured} {check.detail}" for check in report.checks]


@pytest.mark.engine
def test_a_config_that_says_something_else_fails(tmp_path: Path, engine: Engine) -> None:
    """The layout's config.json is changed behind mdl's back: hashes and logits tell, and where it begins is found,
    with values beside hidden states that look like a residual."""
    out = converted(tmp_path, 60)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["num_key_value_heads"] * config["head_dim"] == config["hidden_size"]
    config["positions"]["theta"] *= 1.1
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")

    report = verify(out, Settings(), engine=engine)

    failed = {check.name for check in report.checks if check.ok is False}
    assert {"layout", "prefill"} <= failed
    assert report.located is not None
    assert report.located.module == "model.layers.0.self_attn"
    assert 1e-4 < report.located.local_error < 1


@pytest.mark.engine
@pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="vLLM's kernel of AVX2 has no such bound"
)
def test_scores_far_beyond_their_cap_are_told(tmp_path: Path, engine: Engine) -> None:
    config = drawn(60)
    config["attention"]["softcap"] = 2.0
    layout(saved(tmp_path / "source", 60, config), tmp_path / "out")

    report = verify(tmp_path / "out", Settings(), engine=engine)

    assert not report.ok
    assert report.located is not None
    assert report.located.module == "model.layers.0.self_attn"
    assert "not numbers at" in report.located.signature
    assert "88.7 times their cap of 2" in report.located.hypothesis


def test_config_of_writes_what_was_said_and_no_more() -> None:
    config = config_of(PLAIN)

    assert config["architectures"] == ["MdlDecoderForCausalLM"]
    assert "moe" not in config
    assert decoder_of(config) == checked(PLAIN)

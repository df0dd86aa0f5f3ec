"""The eager references against transformers' classes, in float32, on unit-gain random weights.

transformers is the independent implementation here: the weights are transposed and their rows reordered by this file's
own formulas, so a mistake in mdl's mappings can't hide one in the references.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mdl.archs.base import Value
from mdl.archs.eager import llama_meta, nanogpt
from mdl.errors import MdlError

from .converted import nmse

LIMIT = 1e-11  # right ones measure below 1e-12, the weakest sabotage below 1.5e-6

NANOGPT: dict[str, Value] = {
    "layers": 2,
    "heads": 4,
    "hidden": 96,
    "ffn": 384,
    "vocab": 300,
    "context": 256,
    "bias": True,
    "activation": "gelu",
    "norm_eps": 1e-5,
    "tied": True,
}
LLAMA: dict[str, Value] = {
    "layers": 2,
    "hidden": 96,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 32,
    "ffn": 224,
    "vocab": 300,
    "context": 256,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": "none",
    "tied": False,
}
SCALED: dict[str, Value] = {
    "rope_theta": 500000.0,
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_context": 8192,
}

IDS = torch.stack([torch.randperm(300, generator=torch.Generator().manual_seed(i))[:150] for i in range(2)])


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Random weights that keep the size of what flows through: an error in any of them shows in the logits."""
    rng = torch.Generator().manual_seed(7)
    made: dict[str, Tensor] = {}
    for name, old in module.state_dict().items():
        z = torch.randn(old.shape, generator=rng)
        if name.endswith("bias"):
            made[name] = 0.2 * z
        elif old.ndim == 1:
            made[name] = 1 + 0.2 * z
        else:
            made[name] = z / old.shape[1] ** 0.5
    return made


def loaded(module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
    module.load_state_dict(state, strict=True, assign=True)
    return module.to(dtype)


@torch.no_grad()
def run(module: nn.Module) -> Tensor:
    out = module(IDS)
    return out if isinstance(out, Tensor) else out.logits


def gpt2(dims: Mapping[str, Value], state: Mapping[str, Tensor]) -> nn.Module:
    """transformers' GPT-2, which stores four of its matrices as [in, out] and has every bias."""
    config = transformers.GPT2Config(
        vocab_size=dims["vocab"],
        n_positions=dims["context"],
        n_embd=dims["hidden"],
        n_layer=dims["layers"],
        n_head=dims["heads"],
        n_inner=dims["ffn"],
        activation_function=dims["activation"],
        layer_norm_epsilon=dims["norm_eps"],
        tie_word_embeddings=dims["tied"],
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    turned = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    filled = {k: torch.zeros_like(v) for k, v in model.state_dict().items() if k.endswith("bias")}
    filled |= {k: v.T.contiguous() if k.endswith(turned) else v for k, v in state.items()}
    if dims["tied"]:
        filled["lm_head.weight"] = filled["transformer.wte.weight"]
    model.load_state_dict(filled, strict=True)
    return model


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows for a rotation of (j, j + D/2) from rows for one of (2j, 2j+1): in each head, even rows, then odd ones."""
    size = weight.shape[0] // heads
    order = [head * size + 2 * j + odd for head in range(heads) for odd in (0, 1) for j in range(size // 2)]
    return weight[order]


LLAMA_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def llama(dims: Mapping[str, Value], state: Mapping[str, Tensor], reorder: bool = True) -> nn.Module:
    """transformers' Llama with the raw weights renamed and the rows of wq and wk reordered."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": dims["rope_theta"]}
    if dims["rope_scaling"] == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        rope |= {key: dims[f"rope_{key}"] for key in keys}
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": dims["rope_original_context"]}
    config = transformers.LlamaConfig(
        vocab_size=dims["vocab"],
        hidden_size=dims["hidden"],
        intermediate_size=dims["ffn"],
        num_hidden_layers=dims["layers"],
        num_attention_heads=dims["heads"],
        num_key_value_heads=dims["kv_heads"],
        head_dim=dims["head_dim"],
        # a scaled table is only valid for more positions than the original context
        max_position_embeddings=131072 if dims["rope_scaling"] == "llama3" else dims["context"],
        rms_norm_eps=dims["norm_eps"],
        rope_parameters=rope,
        tie_word_embeddings=dims["tied"],
    )
    heads = {"attention.wq": int(dims["heads"] or 0), "attention.wk": int(dims["kv_heads"] or 0)}
    renamed = {
        "model.embed_tokens.weight": state["tok_embeddings.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["tok_embeddings.weight" if dims["tied"] else "output.weight"],
    }
    for i in range(int(dims["layers"] or 0)):
        for raw, name in LLAMA_NAMES.items():
            weight = state[f"layers.{i}.{raw}.weight"]
            renamed[f"model.layers.{i}.{name}.weight"] = (
                halves(weight, heads[raw]) if reorder and raw in heads else weight
            )
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(renamed, strict=True)
    return model


@pytest.mark.parametrize(
    "change",
    [{}, {"bias": False}, {"activation": "gelu_new"}, {"tied": False}, {"heads": 2, "norm_eps": 1e-3, "ffn": 320}],
    ids=str,
)
def test_nanogpt_computes_what_gpt2_computes(change: dict[str, Value]) -> None:
    dims = NANOGPT | change
    module = nanogpt.build(dims)
    state = weights(module)
    assert nmse(run(loaded(module, state)), run(gpt2(dims, state))) < LIMIT


@pytest.mark.parametrize(
    "change",
    [{}, {"kv_heads": 6}, {"kv_heads": 1, "head_dim": 64}, {"tied": True}, SCALED, {"norm_eps": 1e-3}],
    ids=["grouped", "all_heads", "one_kv_head", "tied", "scaled", "eps"],
)
def test_llama_meta_computes_what_llama_computes(change: dict[str, Value]) -> None:
    dims = LLAMA | change
    module = llama_meta.build(dims)
    state = weights(module)
    assert nmse(run(loaded(module, state)), run(llama(dims, state))) < LIMIT


def test_comparison_sees_rows_in_the_wrong_order() -> None:
    module = llama_meta.build(LLAMA)
    state = weights(module)
    assert nmse(run(loaded(module, state)), run(llama(LLAMA, state, reorder=False))) > 1e-3


@pytest.mark.parametrize(
    "change", [{"rope_scaling": "none"}, {"rope_factor": 32.0}, {"rope_theta": 490000.0}, {"norm_eps": 1e-6}], ids=str
)
def test_comparison_sees_a_wrong_constant(change: dict[str, Value]) -> None:
    dims = LLAMA | SCALED
    module = llama_meta.build(dims | change)
    state = weights(module)
    assert nmse(run(loaded(module, state)), run(llama(dims, state))) > 1e-7


def test_old_and_new_gelu_differ() -> None:
    state = weights(nanogpt.build(NANOGPT))
    new, old = (run(loaded(nanogpt.build(NANOGPT | {"activation": a}), state)) for a in ("gelu", "gelu_new"))
    assert float((new - old).abs().max()) > 1e-4


@pytest.mark.parametrize(("build", "dims"), [(nanogpt.build, NANOGPT), (llama_meta.build, LLAMA | SCALED)])
def test_runs_in_every_dtype(build: Any, dims: dict[str, Value]) -> None:
    state = weights(build(dims))
    single, double, half = (
        run(loaded(build(dims), state, dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)
    )
    assert (single.shape, double.dtype, half.dtype) == ((2, 150, 300), torch.float64, torch.bfloat16)
    assert 0 < nmse(single, double) < LIMIT
    assert 1e-6 < nmse(half, single) < 1e-2


def test_rotary_table_is_never_rounded_to_bfloat16() -> None:
    cos, sin = llama_meta.rotary_table(llama_meta.Rotary(64, 1e4, None), 200)
    x = torch.randn(1, 200, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert cos.dtype == torch.float32
    assert torch.equal(llama_meta.rotate(x, cos, sin), llama_meta.rotate(x.float(), cos, sin).bfloat16())


def test_rotary_table_turns_pair_j_by_its_own_frequency() -> None:
    cos, sin = llama_meta.rotary_table(llama_meta.Rotary(4, 100.0, None), 3)
    x = torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(1, 3, 1, 4)
    fast, slow = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 0.1, 0.2])
    wanted = torch.stack((fast.cos(), fast.sin(), slow.cos(), slow.sin()), dim=-1)
    assert torch.allclose(llama_meta.rotate(x, cos, sin)[0, :, 0], wanted)


def norm_names(prefix: str, bias: bool) -> set[str]:
    return {f"{prefix}.weight"} | ({f"{prefix}.bias"} if bias else set())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_nanogpt_names(bias: bool, tied: bool) -> None:
    names = {"transformer.wte.weight", "transformer.wpe.weight"} | norm_names("transformer.ln_f", bias)
    for i in range(2):
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            names |= norm_names(f"transformer.h.{i}.{part}", bias)
    names |= set() if tied else {"lm_head.weight"}
    module = nanogpt.build(NANOGPT | {"bias": bias, "tied": tied})
    assert module.state_dict().keys() == names
    assert module.get_submodule("lm_head") is not None


@pytest.mark.parametrize("tied", [True, False])
def test_llama_meta_names(tied: bool) -> None:
    names = {"tok_embeddings.weight", "norm.weight"} | (set() if tied else {"output.weight"})
    names |= {f"layers.{i}.{part}.weight" for i in range(2) for part in LLAMA_NAMES}
    module = llama_meta.build(LLAMA | {"tied": tied})
    assert module.state_dict().keys() == names
    assert not list(module.buffers())
    assert module.get_submodule("output") is not None


@pytest.mark.parametrize(("build", "dims"), [(nanogpt.build, NANOGPT), (llama_meta.build, LLAMA)])
def test_build_takes_no_memory_and_no_random_numbers(build: Any, dims: dict[str, Value]) -> None:
    before = torch.get_rng_state()
    huge = build(dims | {"vocab": 10**9, "tied": False})
    assert {p.device.type for p in huge.parameters()} == {"meta"}
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("build", "dims"), [(nanogpt.build, NANOGPT), (llama_meta.build, LLAMA)])
def test_a_tied_model_refuses_a_head_of_its_own(build: Any, dims: dict[str, Value]) -> None:
    state = weights(build(dims | {"tied": False}))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        loaded(build(dims | {"tied": True}), state)


@pytest.mark.parametrize(
    ("build", "dims", "says"),
    [
        (nanogpt.build, {k: v for k, v in NANOGPT.items() if k != "heads"}, "heads is None"),
        (nanogpt.build, NANOGPT | {"heads": 5}, "96 channels can't be split into 5"),
        (nanogpt.build, NANOGPT | {"activation": "relu"}, "no activation 'relu'"),
        (nanogpt.build, NANOGPT | {"norm_eps": "small"}, "norm_eps is 'small', not of type float"),
        (llama_meta.build, LLAMA | {"kv_heads": 4}, "6 query heads can't share 4"),
        (llama_meta.build, LLAMA | {"head_dim": 33}, "33 channels can't be rotated"),
        (llama_meta.build, LLAMA | {"rope_scaling": "yarn"}, "no rotary scaling 'yarn'"),
        (llama_meta.build, LLAMA | {"rope_scaling": "llama3"}, "rope_factor is None"),
    ],
)
def test_dims_that_make_no_model_are_refused(build: Any, dims: dict[str, Value], says: str) -> None:
    with pytest.raises(MdlError, match=says):
        build(dims)


@pytest.mark.parametrize(("build", "dims"), [(nanogpt.build, NANOGPT), (llama_meta.build, LLAMA)])
def test_a_prompt_beyond_the_context_is_refused(build: Any, dims: dict[str, Value]) -> None:
    module = loaded(build(dims | {"context": 149}), weights(build(dims | {"context": 149})))
    with pytest.raises(MdlError, match="150 tokens do not fit a context of 149"):
        run(module)

"""The verifier's own test: known mistakes are killed, harmless changes are not, and a survivor is reported as one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from mdl.convert.check import INDEX, check_layout
from mdl.convert.expected import expected_tensors
from mdl.convert.manifest import read_manifest
from mdl.errors import Kind, MdlError
from mdl.validate import changes, mutate
from mdl.validate.client import Engine
from mdl.validate.kills import ControlRow, MutationRow, MutationTable, control_rows, kill_rows, skipped_rows
from mdl.validate.mutate import read_tensors, run_mutations, write_copy
from mdl.validate.mutations import Mutation, catalogue
from mdl.validate.roles import ROLES, Model

from . import checkpoints as raw
from . import servable as make

State = dict[str, Tensor]
Config = dict[str, Any]

LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
GPT2: Config = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 40,
    "n_positions": 16,
    "n_embd": 32,
    "n_inner": 128,
    "n_layer": 3,
    "n_head": 4,
    "activation_function": "gelu",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
SCALED = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}


def filled(config: Config) -> State:
    """Random tensors of the shapes that the class has."""
    rng = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=rng) for name, shape in expected_tensors(config).items()}


def as_class(name: str, **fields: Any) -> Config:
    """Llama's sizes under another class."""
    return {**copy.deepcopy(LLAMA), "architectures": [name], **fields}


def with_qk_norms() -> tuple[Config, State]:
    config, state = as_class("Qwen3ForCausalLM"), filled(LLAMA)
    for i in range(3):
        for k, role in enumerate(("q_norm", "k_norm")):
            state[f"model.layers.{i}.self_attn.{role}.weight"] = torch.full((8,), float(k))
    return config, state


def with_experts() -> tuple[Config, State]:
    config = as_class("MixtralForCausalLM", num_local_experts=2, num_experts_per_tok=2)
    state = {name: tensor for name, tensor in filled(LLAMA).items() if ".mlp." not in name}
    for i in range(3):
        moe = f"model.layers.{i}.block_sparse_moe"
        state[f"{moe}.gate.weight"] = torch.randn(2, 32)
        for e in range(2):
            for part, shape in (("w1", (48, 32)), ("w2", (32, 48)), ("w3", (48, 32))):
                state[f"{moe}.experts.{e}.{part}.weight"] = torch.full(shape, float(e))
    return config, state


MODELS: dict[str, Callable[[], tuple[Config, State]]] = {
    "llama": lambda: (copy.deepcopy(LLAMA), filled(LLAMA)),
    "llama, scaled rotary, biases": lambda: (
        {**LLAMA, **copy.deepcopy(SCALED), "attention_bias": True},
        filled({**LLAMA, "attention_bias": True}),
    ),
    "llama, tied, eleven layers": lambda: (
        {**LLAMA, "tie_word_embeddings": True, "num_hidden_layers": 11},
        filled({**LLAMA, "tie_word_embeddings": True, "num_hidden_layers": 11}),
    ),
    "gpt2": lambda: (copy.deepcopy(GPT2), filled(GPT2)),
    "mistral": lambda: (as_class("MistralForCausalLM", sliding_window=8), filled(LLAMA)),
    "qwen3": with_qk_norms,
    "mixtral": with_experts,
    "gemma2, its caps": lambda: (
        as_class("Gemma2ForCausalLM", final_logit_softcapping=30.0, attn_logit_softcapping=50.0),
        with_gemma_norms(),
    ),
}


def with_gemma_norms() -> State:
    norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    return {**filled(LLAMA), **{f"model.layers.{i}.{norm}.weight": torch.randn(32) for i in range(3) for norm in norms}}


def named(config: Config, name: str) -> Mutation:
    return next(m for m in catalogue(config) if m.name == name)


def mutated(config: Config, state: State, name: str) -> tuple[Config, State]:
    """What one mutation makes of copies; it must apply."""
    mutation = named(config, name)
    assert mutation.applies(config, state)
    changed, tensors = copy.deepcopy(config), {k: t.clone() for k, t in state.items()}
    mutation.apply(tensors, changed)
    return changed, tensors


def differing(a: State, b: State) -> set[str]:
    return {k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k])}


@pytest.mark.parametrize("model", MODELS)
def test_every_mutation_that_applies_changes_something_and_leaves_the_original_alone(model: str) -> None:
    config, state = MODELS[model]()
    before, untouched = copy.deepcopy(config), {k: t.clone() for k, t in state.items()}
    for mutation in catalogue(config):
        if mutation.applies(config, state):
            changed, tensors = mutated(config, state, mutation.name)
            assert changed != config or differing(tensors, state), mutation.name
            assert " here" not in mutation.module + mutation.cause, mutation.name
            assert config == before
            assert not differing(state, untouched)


def test_each_mutation_applies_to_some_model() -> None:
    applied: set[str] = set()
    for make_model in MODELS.values():
        config, state = make_model()
        applied |= {m.name for m in catalogue(config) if m.applies(config, state)}

    assert applied == {m.name for m in catalogue(LLAMA)}


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_at_least_24_kinds_apply_to_each_target_of_today(config: Config) -> None:
    state = filled(config)
    names = [m.name for m in catalogue(config)]

    assert len(set(names)) == len(names)
    assert sum(m.applies(config, state) for m in catalogue(config)) >= 24


def test_a_class_without_names_says_what_to_write() -> None:
    with pytest.raises(MdlError, match="no mutations are known for Unknown") as caught:
        catalogue({"architectures": ["Unknown"]})

    assert "validate/roles.py" in str(caught.value)


def test_what_a_localisation_should_name_are_tensors_and_fields_of_the_class() -> None:
    for config in (LLAMA, GPT2):
        state = filled(config)
        for mutation in catalogue(config):
            if not mutation.applies(config, state) or mutation.name in ("extra-bias", "window-added"):
                continue
            layered = mutation.cause.format(i=0)
            known = any(name.startswith(layered) for name in state) or layered in str(config)
            assert known or layered == "dtype", (mutation.name, mutation.cause)
            tied = mutation.module == "lm_head"
            assert tied or any(name.startswith(mutation.module) for name in state), mutation.name


# --- single mutations, where the answer can be spelt out ---------------------------------------------------------


def test_the_forgotten_permutation_puts_halves_back_into_pairs() -> None:
    state = filled(LLAMA)
    q = "model.layers.0.self_attn.q_proj.weight"
    state[q] = torch.arange(32.0)[:, None].expand(32, 32).clone()
    _, changed = mutated(LLAMA, state, "rope-unpermuted")

    assert changed[q][:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert changed[q][8:16, 0].tolist() == [8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(changes.as_halves(changed[q], 4), state[q])
    kinds = {name.split(".")[-2] for name in differing(state, changed)}
    assert kinds == {"q_proj", "k_proj"}


def test_fused_projections_change_in_their_own_third() -> None:
    state = filled(GPT2)
    _, changed = mutated(GPT2, state, "q-bias-zeroed")

    for i in range(3):
        name = f"transformer.h.{i}.attn.c_attn.bias"
        assert not changed[name][:32].any()
        assert torch.equal(changed[name][32:], state[name][32:])

    _, changed = mutated(GPT2, state, "q-row")
    name = "transformer.h.1.attn.c_attn.weight"
    assert differing(state, changed) == {name}
    assert torch.equal(changed[name][:, 5], 1.5 * state[name][:, 5])


def test_a_key_bias_is_invisible_without_rotary_positions() -> None:
    """Softmax over keys ignores what is added to all of them: zeroing it there is no mistake to be found."""
    assert not named(GPT2, "k-bias-zeroed").applies(GPT2, filled(GPT2))


def test_strided_groups_are_another_pairing_of_the_same_heads() -> None:
    state = filled(LLAMA)
    _, changed = mutated(LLAMA, state, "q-groups")
    q, o = (f"model.layers.2.self_attn.{x}_proj.weight" for x in "qo")

    heads = [0, 2, 1, 3]
    assert torch.equal(changed[q].view(4, 8, 32), state[q].view(4, 8, 32)[heads])
    assert torch.equal(changed[o].view(32, 4, 8), state[o].view(32, 4, 8)[:, heads])


def test_layers_sorted_as_text() -> None:
    config, state = MODELS["llama, tied, eleven layers"]()
    _, changed = mutated(config, state, "layers-sorted")

    def norm(s: State, i: int) -> Tensor:
        return s[f"model.layers.{i}.input_layernorm.weight"]

    assert [next(j for j in range(11) if torch.equal(norm(changed, i), norm(state, j))) for i in range(11)] == [
        0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9
    ]  # fmt: skip


def test_a_truncated_model_agrees_with_its_config() -> None:
    config, state = mutated(GPT2, filled(GPT2), "layer-truncated")

    assert config["n_layer"] == 2
    assert {name: tuple(t.shape) for name, t in state.items()} == expected_tensors(config)


def test_heads_tied_and_untied_agree_with_their_config() -> None:
    for config, name in ((LLAMA, "head-tied"), (GPT2, "head-stale")):
        changed, state = mutated(config, filled(config), name)
        assert state.keys() == expected_tensors(changed).keys()


def test_experts_are_swapped_whole_and_only_in_one_layer() -> None:
    config, state = with_experts()
    _, changed = mutated(config, state, "experts")

    assert {name.split(".experts")[0] for name in differing(state, changed)} == {"model.layers.1.block_sparse_moe"}
    for part in ("w1", "w2", "w3"):
        values = [changed[f"model.layers.1.block_sparse_moe.experts.{e}.{part}.weight"][0, 0].item() for e in (0, 1)]
        assert values == [1.0, 0.0]
    assert mutated(config, state, "experts-top-k")[0]["num_experts_per_tok"] == 1


def test_windows_and_caps() -> None:
    config, state = MODELS["mistral"]()
    assert mutated(config, state, "window-longer")[0]["sliding_window"] == 9
    assert mutated(config, state, "window-shorter")[0]["sliding_window"] == 7
    assert not named(config, "window-added").applies(config, state)
    config, state = MODELS["gemma2, its caps"]()
    assert mutated(config, state, "softcap-logits")[0]["final_logit_softcapping"] is None
    assert mutated(config, state, "softcap-attention")[0]["attn_logit_softcapping"] is None
    config, state = with_qk_norms()
    _, changed = mutated(config, state, "qk-norms")
    assert changed["model.layers.2.self_attn.q_norm.weight"].tolist() == [1.0] * 8


def test_rank_files_joined_wrongly_keep_the_shape_and_the_values() -> None:
    state = filled(LLAMA)
    o = "model.layers.1.self_attn.o_proj.weight"
    for name in ("rank-order", "rank-axis"):
        _, changed = mutated(LLAMA, state, name)
        assert not torch.equal(changed[o], state[o])
        assert torch.equal(changed[o].flatten().sort()[0], state[o].flatten().sort()[0])


def test_views_write_through() -> None:
    for name in ROLES:
        if name in ("LlamaForCausalLM", "GPT2LMHeadModel"):
            config = LLAMA if name.startswith("Llama") else GPT2
            state = filled(config)
            model = Model(state, config)
            model.view("o", 1)[3, 4] = 99.0
            assert (state[model.name("o", 1)] == 99.0).sum() == 1
            assert model.heads == 4
            assert model.head_dim == 8


# --- copies ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, grouped heads, a head of its own, scaled rotary positions."""
    folder = tmp_path_factory.mktemp("llama")
    state = make.llama_state(layers=3)
    release = raw.meta(folder / "release", state, raw.params(state, use_scaled_rope=True, rope_theta=5e5))
    return make.layout(release, folder / "out", given={"context": "256"})


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers with biases, a tied head."""
    folder = tmp_path_factory.mktemp("gpt2")
    return make.layout(make.nanogpt(folder / "ckpt.pt", layers=3), folder / "out")


@pytest.mark.parametrize("files", [1, 2])
def test_a_copy_agrees_with_its_own_manifest(files: int, llama: Path, tmp_path: Path) -> None:
    manifest = read_manifest(llama)
    tensors, config = read_tensors(llama, manifest), json.loads((llama / "config.json").read_text())
    config, tensors = mutated(config, tensors, "gate-up")
    config["rms_norm_eps"] = 1e-3
    write_copy(llama, tmp_path, manifest, tensors, config, files=files)

    again = read_manifest(tmp_path)
    assert check_layout(tmp_path, again) == []
    assert (tmp_path / INDEX).exists() == (files == 2)
    assert json.loads((tmp_path / "config.json").read_text())["rms_norm_eps"] == 1e-3
    assert not differing(read_tensors(tmp_path, again), tensors)
    assert again.steps == manifest.steps


# --- tables ------------------------------------------------------------------------------------------------------


ROW = MutationRow("a", "what", "module", "cause", killed_by=("layout", "prefill"), nmse=1e-3, ratio=1e8)


def table(*rows: MutationRow, controls: tuple[ControlRow, ...] = (ControlRow("same", "it"),)) -> MutationTable:
    return MutationTable("out", "LlamaForCausalLM", "mdl's eager", 0, rows, controls, 1.0)


def test_only_a_check_that_a_wrong_mapping_can_not_pass_kills() -> None:
    by_layout = replace(ROW, name="b", killed_by=("layout",))
    unnoticed = replace(ROW, name="c", killed_by=())
    found = table(ROW, by_layout, unnoticed, replace(unnoticed, name="d", skipped="needs biases"))

    assert found.survivors == ("b", "c")
    assert found.kill_rate == pytest.approx(1 / 3)
    assert not found.ok
    assert [row[2] for row in kill_rows(found)] == ["layout, prefill", "SURVIVED (seen by layout alone)", "SURVIVED"]
    assert skipped_rows(found) == [("d", "what", "needs biases")]
    assert "1 of 3 mistakes killed" in found.verdict
    assert json.loads(found.to_json())["ok"] is False


def test_an_alarm_on_something_harmless_fails_and_so_does_an_empty_table() -> None:
    alarmed = ControlRow("seed", "it", alarms=("prefill",))

    assert table(ROW).ok
    assert not table(ROW, controls=(alarmed,)).ok
    assert control_rows(table(ROW, controls=(alarmed,)))[0][2] == "ALARM: prefill"
    assert not table().ok
    assert table().kill_rate == 0


# --- with vLLM ---------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_mistakes_in_a_llama_are_killed(llama: Path, engine: Engine) -> None:
    """A permutation, a value too small for any other gate, a missing and an ignored tensor, rotary scaling."""
    names = ["rope-unpermuted-k", "eps-tenth", "k-missing", "extra-bias", "rope-scaling-factor", "embedding-row"]
    found = run_mutations(llama, engine=engine, names=names, controls=False)

    killed = {row.name: row.counted for row in found.rows}
    assert found.ok, found.verdict
    assert "prefill" in killed["rope-unpermuted-k"]
    assert "coverage" in killed["k-missing"]
    assert killed["extra-bias"] == ("coverage",)
    assert {"layout", "prefill"} <= set(next(row for row in found.rows if row.name == "eps-tenth").killed_by)
    assert all(row.ratio is not None and row.ratio > 16 for row in found.rows if row.name != "extra-bias")


@pytest.mark.engine
def test_mistakes_in_a_gpt2_are_killed_survivors_told_and_harmless_changes_quiet(
    gpt2: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    harmless = replace(named(GPT2, "q-row"), name="nothing", apply=lambda _tensors, _config: None)
    real = mutate.catalogue
    monkeypatch.setattr(mutate, "catalogue", lambda config: (*real(config), harmless))
    names = ["activation", "position-shift", "attention-scale-by-layer", "gate-up", "nothing"]
    found = run_mutations(gpt2, engine=engine, names=names)

    killed = {row.name: row.counted for row in found.rows}
    assert found.survivors == ("nothing",)
    assert not found.ok
    assert "prefill" in killed["activation"]
    assert "prefill" in killed["position-shift"]
    assert killed["attention-scale-by-layer"] == ("load",)
    assert [row.name for row in found.rows if row.skipped] == ["gate-up"]
    assert [(row.name, row.alarms, row.skipped) for row in found.controls] == [
        (name, (), "") for name in ("unchanged", "copied", "shards", "bfloat16", "threads", "seed")
    ]


@pytest.mark.engine
def test_a_layout_that_fails_already_proves_nothing(llama: Path, tmp_path: Path, engine: Engine) -> None:
    manifest = read_manifest(llama)
    config, tensors = mutated(
        json.loads((llama / "config.json").read_text()), read_tensors(llama, manifest), "rope-theta"
    )
    write_copy(llama, tmp_path, manifest, tensors, config)
    with pytest.raises(MdlError, match="fails its own verification") as caught:
        run_mutations(tmp_path, engine=engine, names=["k-v"])

    assert caught.value.kind is Kind.PARITY


@pytest.mark.engine
def test_an_unknown_name_is_refused_before_anything_runs(llama: Path, engine: Engine) -> None:
    with pytest.raises(MdlError, match="no mutation is called nonsense") as caught:
        run_mutations(llama, engine=engine, names=["nonsense"])

    assert caught.value.kind is Kind.USAGE
    assert "rope-unpermuted" in str(caught.value)

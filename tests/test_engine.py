"""The vLLM process against transformers' eager models: same logits, and nothing lost on the way without a word."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from mdl.errors import Kind, MdlError
from mdl.validate.client import Engine, EngineFailure, EngineResult, Request, Scenario, ScenarioResult
from mdl.validate.doctor import INSTALL

pytestmark = pytest.mark.engine

VOCAB = 515
CEILING = 1e-10
"""NMSE in float32: right conversions measure 4e-12 at most, the weakest known mistake 6e-10."""


def lively(model: Any) -> Any:
    """Weights of unit gain, norms and biases off their defaults: a fresh model's are so small that they hide bugs."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                p.copy_(0.2 * noise + (0.0 if name.endswith("bias") else 1.0))
            elif "emb" in name or "wte" in name or "wpe" in name:
                p.copy_(noise)
            else:
                p.copy_(noise / (p.shape[0] if "c_" in name else p.shape[1]) ** 0.5)
    return model.eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, n_positions=128, attn_implementation="eager")
    return lively(GPT2LMHeadModel(config))


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        attn_implementation="eager",
    )
    return lively(LlamaForCausalLM(config))


MODELS = {"gpt2": gpt2, "llama": llama}


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    made: dict[str, tuple[Any, Path]] = {}
    for name, make in MODELS.items():
        model, folder = make(), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        made[name] = model, folder
    return made


@pytest.fixture
def llama_copy(layouts: dict[str, tuple[Any, Path]], tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with the llama's config and no weights, and the weights, to be spoilt."""
    folder, copy = layouts["llama"][1], tmp_path / "layout"
    copy.mkdir()
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    return copy, load_file(folder / "model.safetensors")


def ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def ran(answer: EngineResult | EngineFailure) -> EngineResult:
    assert isinstance(answer, EngineResult), answer
    return answer


def worst_nmse(model: Any, scenario: Scenario, result: ScenarioResult) -> float:
    """The worst request's error, after every row's position and token were checked."""
    stored, worst = load_file(result.file), 0.0
    for request, span in zip(scenario.requests, result.spans(), strict=True):
        tokens = request.ids + request.forced
        assert stored["positions"][span].tolist() == list(range(len(tokens)))
        assert stored["input_ids"][span].tolist() == list(tokens)
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0].double()
        error = (stored["logits"][span].double() - expected).square().sum()
        worst = max(worst, float(error / (expected - expected.mean(-1, keepdim=True)).square().sum()))
    return worst


PROBE = Scenario("probe", (Request(ids(5, 0)),))


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_position_equal_the_eager_models(
    engine: Engine, layouts: dict[str, tuple[Any, Path]], name: str, tmp_path: Path
) -> None:
    """Both models in one process: whole prompts, then a decode that is forced along block boundaries."""
    model, folder = layouts[name]
    prefill = Scenario("prefill", tuple(Request(ids(n, n)) for n in (1, 31, 32, 33, 100)))
    decode = Scenario("decode", tuple(Request(ids(n, n), forced=ids(20, 50 + n)) for n in (1, 20, 32, 64)))

    result = ran(engine.run(folder, [prefill, decode], scratch=tmp_path, block_size=32))

    assert [s.name for s in result.scenarios] == ["prefill", "decode"]
    assert worst_nmse(model, prefill, result.scenarios[0]) < CEILING
    assert worst_nmse(model, decode, result.scenarios[1]) < CEILING
    assert [r.qlens for r in result.scenarios[0].requests] == [(1,), (31,), (32,), (33,), (100,)]
    assert [r.qlens for r in result.scenarios[1].requests] == [(n, *[1] * 20) for n in (1, 20, 32, 64)]
    assert [r.generated[:20] for r in result.scenarios[1].requests] == [r.forced for r in decode.requests]
    assert result.model_class.endswith(type(model).__name__)
    assert (result.device, result.dtype) == ("cpu", "float32")
    assert result.attention
    assert result.coverage.audited
    assert not result.coverage.unchecked
    clean = replace(result.coverage, stored=0, audited=True, pulled=0)
    assert clean == type(clean)(0, {}, (), (), (), (), (), True)
    assert result.coverage.stored == len(load_file(folder / "model.safetensors"))
    assert result.coverage.pulled == result.coverage.stored


def test_chunked_prefill_and_free_generation(
    engine: Engine, layouts: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = layouts["llama"]
    chunked = Scenario("chunked", (Request(ids(100, 1)), Request(ids(40, 2))))
    free = Scenario("free", (Request(ids(10, 3), max_tokens=6),))

    result = ran(engine.run(folder, [chunked, free], scratch=tmp_path, max_num_batched_tokens=16, max_num_seqs=4))

    assert worst_nmse(model, chunked, result.scenarios[0]) < CEILING
    assert max(result.scenarios[0].requests[0].qlens) <= 16
    tokens = list(free.requests[0].ids)
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert result.scenarios[1].requests[0].generated == tuple(tokens[10:])


def test_what_the_files_lack_is_named(
    engine: Engine, llama_copy: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """vLLM itself loads this without a word: a whole matrix, and a third of a fused one, are missing."""
    folder, weights = llama_copy
    del weights["model.layers.0.self_attn.o_proj.weight"], weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    coverage = ran(engine.run(folder, [PROBE], scratch=tmp_path)).coverage

    assert coverage.unloaded == {
        "model.layers.0.self_attn.o_proj.weight": (128 * 128, 128 * 128),
        "model.layers.1.self_attn.qkv_proj.weight": (64 * 128, 256 * 128),
    }
    assert coverage.unconsumed == ()


def test_what_the_loader_throws_away_is_named(
    engine: Engine, llama_copy: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, weights = llama_copy
    weights["model.layers.0.mlp.down_proj.bias"] = torch.full((128,), 100.0)
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.full((128,), 100.0)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    coverage = ran(engine.run(folder, [PROBE], scratch=tmp_path)).coverage

    assert coverage.unconsumed == ("model.layers.0.mlp.down_proj.bias", "model.layers.1.self_attn.q_proj.bias")
    assert coverage.stored_nan == ("model.layers.1.mlp.up_proj.weight",)
    assert coverage.unloaded == {"model.layers.1.mlp.gate_up_proj.weight": (1, 2 * 176 * 128)}


def test_a_layout_that_vllm_refuses_is_a_failure_and_not_a_missing_machine(
    engine: Engine, llama_copy: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, weights = llama_copy
    weights["model.layers.1.foo.weight"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    answer = engine.run(folder, [PROBE], scratch=tmp_path)

    assert isinstance(answer, EngineFailure)
    assert answer.phase == "load"
    assert "no module or parameter named 'layers.1.foo'" in answer.message


def test_results_stay_in_the_scratch_folder(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(MdlError, match="not a scenario") as caught:
        engine.run(tmp_path, [replace(PROBE, name="../probe")], scratch=tmp_path / "scratch")
    assert caught.value.kind is Kind.USAGE
    with pytest.raises(MdlError, match="scratch folder") as caught:
        engine.run(tmp_path, [PROBE], scratch=tmp_path)
    assert caught.value.kind is Kind.USAGE


@pytest.mark.parametrize(
    ("kill", "says", "do"), [(signal.SIGKILL, "SIGKILL", "memory"), (signal.SIGILL, "SIGILL", "cpu")]
)
def test_a_process_that_dies_is_the_machines_fault(tmp_path: Path, kill: signal.Signals, says: str, do: str) -> None:
    """A process of its own, killed while it still imports, so the shared one lives on."""
    with Engine(timeout=60) as doomed:
        os.kill(doomed.pid, kill)
        with pytest.raises(MdlError, match=says) as caught:
            doomed.run(tmp_path / "layout", [PROBE], scratch=tmp_path)

    assert caught.value.kind is Kind.MACHINE
    assert do in caught.value.problems[0].do


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    with Engine(timeout=0.1) as slow:
        pid = slow.pid
        with pytest.raises(MdlError, match="did not answer within") as caught:
            slow.run(tmp_path / "layout", [PROBE], scratch=tmp_path)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    assert caught.value.kind is Kind.MACHINE


def test_a_machine_without_vllm_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MdlError) as caught:
        Engine()
    assert caught.value.kind is Kind.MACHINE
    assert caught.value.problems[0].do == INSTALL

"""torchtitan's Llama 3 under all its names: recognise, ask, convert and back; against torchtitan's own class, vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert.export import export
from mdl.convert.prepare import Options, Prepared, prepare
from mdl.convert.run import convert
from mdl.errors import MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import verify

from .. import checkpoints as make
from .. import servable, upstream
from ..checkpoints_llamas import titan, titan_fused, titan_names
from ..converted import nmse, with_dims
from ..torchtune_cases import IDS, LIMIT

CONTEXT = 256
FREQS = torch.polar(torch.ones(CONTEXT, 16), torch.outer(torch.arange(CONTEXT), torch.linspace(1, 0, 16)))


@dataclass(frozen=True)
class Case:
    """Names of one time, and what the user has to say beside the context."""

    state: make.State
    given: dict[str, str]
    scaled: bool


def case(name: str) -> Case:
    """A case by its name."""
    heads = {"heads": "4"}
    return {
        "v0.1": lambda: Case({"freqs_cis": FREQS, **servable.llama_state()}, {}, scaled=False),
        "v0.1, exported": lambda: Case(servable.llama_state(), {**heads, "rope_scaling": "none"}, scaled=False),
        "v0.2": lambda: Case(servable.llama_state(), {**heads, "rope_scaling": "llama3"}, scaled=True),
        "v0.3": lambda: Case(titan_names(), heads, scaled=True),
        "v0.3, tied": lambda: Case(titan_names(tied=True), heads, scaled=True),
        "fused": lambda: Case(titan_fused(titan_names()), heads, scaled=True),
    }[name]()


CASES = ("v0.1", "v0.1, exported", "v0.2", "v0.3", "v0.3, tied", "fused")
META = ("v0.1", "v0.1, exported", "v0.2")
"""Their names are Meta's, so that mdl asks."""


def options(name: str, **more: str) -> Options:
    """What the user says of a case."""
    given = {**case(name).given, **({} if name == "v0.1" else {"context": str(CONTEXT)}), **more}
    return Options(arch="torchtitan" if name in META else None, given=given)


def prepared(name: str, path: Path, **more: str) -> Prepared:
    """Recognised and planned, without problems."""
    made = prepare(path, options(name, **more))
    made.plan.refuse()
    return made


def eager_logits(made: Prepared, state: make.State, **changed: Any) -> torch.Tensor:
    """Our forward's logits [T, V], with some of the dims changed."""
    left = {"freqs_cis", *(("lm_head.weight",) if made.dims["tied"] else ())}
    return with_dims(made, {name: t for name, t in state.items() if name not in left}, IDS, **changed)


@pytest.mark.parametrize("name", CASES)
def test_from_the_folder_to_the_layout_and_back(name: str, tmp_path: Path) -> None:
    state = case(name).state
    made = prepared(name, titan(tmp_path / "step-10", state))

    assert made.arch.name == "torchtitan"
    assert (made.dims["heads"], made.dims["kv_heads"], made.dims["context"]) == (4, 2, CONTEXT)
    assert made.config["rope_parameters"]["rope_type"] == ("llama3" if case(name).scaled else "default")
    convert(made, tmp_path / "out", tokenizer="none")
    make.same(make.saved(tmp_path / "out"), make.llama_of(servable.llama_state(tied="tied" in name), 4, 2))

    export(tmp_path / "out", tmp_path / "back.pt")
    make.same(torch.load(tmp_path / "back.pt"), {key: t for key, t in state.items() if key != "freqs_cis"})


def test_what_no_tensor_tells_is_asked_for(tmp_path: Path) -> None:
    new, old = titan(tmp_path / "new", case("v0.3").state), titan(tmp_path / "old", case("v0.2").state)

    with pytest.raises(MdlError) as caught:
        prepare(new)
    assert all(
        text in str(caught.value) for text in ("--set n_heads=", "24 for 3B", "--set seq_len=", "training.seq_len")
    )
    with pytest.raises(MdlError, match="could be any of llama2c, llama_meta, mistral_inference, torchtitan"):
        prepare(old)
    with pytest.raises(MdlError, match=r"since October 2025 \(v0.2.0\).*--set rope_scaling="):
        prepare(old, Options(arch="torchtitan", given={"heads": "4", "context": "64"}))
    with pytest.raises(MdlError, match=r"3 heads do not fit layers.0.attention.qkv_linear.wq.weight"):
        prepare(new, Options(given={"heads": "3", "context": "64"}))
    with pytest.raises(MdlError, match="6 heads do not fit wqkv with 256 rows and wo with 128 columns"):
        prepare(titan(tmp_path / "fused", titan_fused(titan_names())), Options(given={"heads": "6", "context": "64"}))


def test_the_table_of_angles_tells_what_nothing_else_does(tmp_path: Path) -> None:
    dims = prepared("v0.1", titan(tmp_path / "step-10", case("v0.1").state)).dims

    assert dims.entries["heads"].because == "128 columns of wo / 2 x 16 columns of freqs_cis"
    assert dims.entries["context"].because == "rows of freqs_cis"
    with pytest.raises(MdlError, match="heads is 4 by the tensors"):
        prepared("v0.1", tmp_path / "step-10", heads="8")


def test_the_factor_of_llama_3_2_is_said_out_loud(tmp_path: Path) -> None:
    wide = {128: 2048}  # the width of 1B
    shapes = {name: [wide.get(n, n) for n in t.shape] for name, t in titan_names().items()}
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    deep = {name.replace("layers.0.", f"layers.{i}."): t for i in range(16) for name, t in state.items()}
    torch.save(deep, tmp_path / "x.pt")

    made = prepare(tmp_path / "x.pt", Options(given={"heads": "64", "context": "64"}))

    assert made.dims["rope_factor"] == 8.0
    assert "Meta trained Llama 3.2 1B with 32" in made.dims.entries["rope_factor"].because


def test_a_mixture_of_experts_is_called_one(tmp_path: Path) -> None:
    torch.save({**titan_names(), "layers.1.moe.router.gate.weight": torch.ones(4, 128)}, tmp_path / "x.pt")

    with pytest.raises(MdlError, match=r"a mixture of experts.*convert_to_hf\.py"):
        prepare(tmp_path / "x.pt", options("v0.3"))


@pytest.mark.parametrize("name", CASES)
def test_our_forward_is_that_of_torchtitan(name: str, tmp_path: Path) -> None:
    now = case(name)
    model = upstream.torchtitan(context=CONTEXT, scaled=now.scaled, tied="tied" in name)
    split = titan_names(tied="tied" in name)
    model.load_state_dict(split)
    with torch.no_grad():
        theirs = model(IDS[None])[0]
    torch.save(now.state, tmp_path / "x.pt")

    made = prepared(name, tmp_path / "x.pt")

    assert {key: t.shape for key, t in model.state_dict().items()} == {key: t.shape for key, t in split.items()}
    on_disk = "layers.1.attention.qkv_linear.wqkv.weight"
    assert make.bits(dict(model.named_parameters())[on_disk]) == make.bits(titan_fused(titan_names())[on_disk])
    assert nmse(eager_logits(made, now.state), theirs) < LIMIT
    assert nmse(eager_logits(made, now.state, rope_theta=10_000.0), theirs) > 1e-3
    assert nmse(eager_logits(made, now.state, norm_eps=1e-3), theirs) > 1e-8
    sabotage = {"rope_factor": 32.0} if now.scaled else {"rope_scaling": "llama3", "rope_factor": 8.0}
    fixed = {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_context": 8192}
    assert nmse(eager_logits(made, now.state, **fixed, **sabotage), theirs) > 1e-8


@pytest.mark.engine
def test_vllm_computes_the_same(tmp_path: Path, engine: Engine) -> None:
    made = prepared("fused", titan(tmp_path / "step-10", case("fused").state))
    convert(made, tmp_path / "out", tokenizer="none")

    report = verify(tmp_path / "out", engine=engine)

    assert report.ok, report
    assert report.versions["model class"].endswith("LlamaForCausalLM")

"""Megatron-LM from its grid of files to the layout: ranks, stages, runs of layers, and the classes it can be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.archs.registry import load_arch, mapping_path
from mdl.convert.export import export
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.errors import Kind, MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import Settings, verify

from .. import checkpoints as make
from .. import gpts_checks as checks
from .. import megatron

FORMS = {"ranks and stages": (2, 2, 1), "runs of layers": (1, 2, 2), "all three": (2, 2, 2), "one file": (1, 1, 1)}


@pytest.mark.parametrize("row", megatron.ROWS)
@pytest.mark.parametrize("form", ["torch_dist", "grid"])
def test_the_layout_computes_what_the_checkpoint_did(row: str, form: str, tmp_path: Path) -> None:
    if form == "grid":
        source = megatron.grid(tmp_path / "in", row, ranks=2, stages=2)
    else:
        source = megatron.dist(tmp_path / "in", row, stacked=False)

    prepared = checks.layout(source, tmp_path / "out")

    assert (prepared.arch.name, prepared.target) == ("megatron", megatron.TARGETS[row])
    assert prepared.dims["tied"] is (not megatron.arguments(row)["untie_embeddings_and_output_weights"])
    assert megatron.error(tmp_path / "out", prepared) < 1e-11  # its norms and tables are in float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("row", ["qwen3_pairs", "gpt2", "llama_bias"])
def test_every_cut_becomes_the_same_layout_and_comes_back(row: str, form: str, tmp_path: Path) -> None:
    ranks, stages, runs = FORMS[form]
    source = megatron.grid(tmp_path / "in", row, ranks, stages, runs)
    checks.layout(source, tmp_path / "out")
    checks.layout(megatron.grid(tmp_path / "whole", row), tmp_path / "whole.out")
    make.same(make.saved(tmp_path / "out"), make.saved(tmp_path / "whole.out"))

    alone = ranks * stages == 1
    export(tmp_path / "out", tmp_path / ("back.pt" if alone else "back"))

    for file in sorted(source.rglob("model_optim_rng.pt")):
        raw = megatron.load(file)
        place = tmp_path / ("back.pt" if alone else f"back/{file.parent.name}/{file.name}")
        back = torch.load(place, weights_only=True)
        for key in [key for key in raw if key.startswith("model")]:
            assert list(back[key]) == list(raw[key])
            make.same(back[key], raw[key])


@pytest.mark.parametrize("row", ["llama_pairs", "gpt2_exact"])
def test_a_torch_dist_folder_comes_back_as_one_file(row: str, tmp_path: Path) -> None:
    checks.layout(megatron.dist(tmp_path / "in", row, stacked=False), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back.pt")

    make.same(torch.load(tmp_path / "back.pt", weights_only=True), megatron.state(row, fused=True))


def test_transformer_engine_s_names_and_states(tmp_path: Path) -> None:
    source = megatron.grid(tmp_path / "in", "llama", ranks=2, fused=True)
    for file in source.rglob("model_optim_rng.pt"):
        held = megatron.load(file)
        held["model"]["decoder.layers.1.mlp.linear_fc1._extra_state"] = torch.zeros(4, dtype=torch.uint8)
        held["model"]["decoder.layers.2.mlp.linear_fc1._extra_state"] = None
        megatron.save(file, held)

    prepared = checks.layout(source, tmp_path / "out")

    assert prepared.dims["fused_norms"] is True
    assert [step.reason for step in prepared.plan.steps if step.kind == "drop"] == [
        "scales of Transformer Engine, not weights"
    ]
    assert megatron.error(tmp_path / "out", prepared) < 1e-11


def test_what_is_given_may_be_the_run_a_save_a_rank_or_a_file(tmp_path: Path) -> None:
    root = megatron.grid(tmp_path / "in", "llama", ranks=2, stages=2)
    file = root / "iter_0000005/mp_rank_01_001/model_optim_rng.pt"

    plans = [prepare(path) for path in (root, root / "iter_0000005", file.parent, file)]

    assert {plan.inventory.ranks for plan in plans} == {2}
    assert {plan.plan.problems for plan in plans} == {()}
    assert "iter_0000005 is the last save of this folder" in plans[0].inventory.notes
    assert "is a part of mp_rank_*: all of its 4 files were read" in plans[3].inventory.notes[0]
    assert plans[0].match.because[1] == "2 tensor-parallel ranks of 2 runs of layers each"
    assert plans[0].inventory.extras["args"]["attention_backend"] in (5, "auto")  # by the Python that pickled it


def _without(root: Path, folder: str) -> None:
    shutil.rmtree(root / "iter_0000005" / folder)


def _renumbered(root: Path, add: int) -> None:
    for file in root.rglob("mp_rank_*_001/model_optim_rng.pt"):
        held = megatron.load(file)
        moved = {}
        for name, tensor in held["model"].items():
            number = name.split(".")[2] if name.startswith("decoder.layers.") else ""
            moved[name.replace(f".{number}.", f".{int(number) + add}.", 1) if number else name] = tensor
        megatron.save(file, held | {"model": moved})


def _without_rank(root: Path) -> None:
    _without(root, "mp_rank_01_001")


def _without_stage(root: Path) -> None:
    for rank in range(2):
        _without(root, f"mp_rank_{rank:02d}_001")


def _another_save(root: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text("6")


def _no_number(root: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text("last")


def _hole(root: Path) -> None:
    _renumbered(root, 1)


def _experts(root: Path) -> None:
    (root / "iter_0000005/mp_rank_00_000").rename(root / "iter_0000005/mp_rank_00_000_000")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a rank": (_without_rank, "files are missing: rank 1 of part 1"),
    "a stage": (_without_stage, "pipeline_model_parallel_size is 2 in args, but there are files of 1"),
    "the save": (_another_save, "names iter_0000006, which is not there"),
    "the number": (_no_number, "holds 'last', neither a number nor 'release'"),
    "numbers": (_hole, r"its layers are numbered \[1, 2\], neither from 0 nor from 2"),
    "kinds": (_experts, "folders of ranks with a stage's number and without"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_grid_that_is_not_whole_is_refused(case: str, tmp_path: Path) -> None:
    spoil, phrase = BROKEN[case]
    root = megatron.grid(tmp_path / "in", "llama", ranks=2, stages=2)
    spoil(root)

    with pytest.raises(MdlError, match=phrase) as caught:
        prepare(root).plan.refuse()

    assert caught.value.kind is Kind.INPUT


def test_stages_that_count_on_are_not_counted_twice(tmp_path: Path) -> None:
    root = megatron.grid(tmp_path / "in", "llama", ranks=2, stages=2)
    _renumbered(root, 2)

    checks.layout(root, tmp_path / "out")

    checks.layout(megatron.grid(tmp_path / "whole", "llama"), tmp_path / "whole.out")
    make.same(make.saved(tmp_path / "out"), make.saved(tmp_path / "whole.out"))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": ("llama", {"num_experts": 8}, "args.num_experts is 8: experts"),
    "MLA": ("llama", {"multi_latent_attention": True}, "multi-head latent attention"),
    "norms less 1": ("llama", {"apply_layernorm_1p": True}, "norms whose weights are stored less 1"),
    "part of a head": ("llama", {"rotary_percent": 0.5}, "Llama describes it but for this: rotary_percent 0.5"),
    "no positions": ("llama", {"position_embedding_type": "none"}, "none positions with RMSNorm"),
    "pairs": ("neox", {"rotary_interleaved": True}, "a rotation of neighbouring pairs"),
    "a window": ("llama", {"window_size": [128, 0]}, "a sliding window"),
    "two scalings": ("llama_31", {"rotary_seq_len_interpolation_factor": 2}, "no class of vLLM's has both"),
    "heads": ("llama", {"num_attention_heads": 3}, "3 heads do not fit linear_proj with 128 columns"),
    "another model": ("llama", {"num_layers": 8}, "layers is 4 by the tensors"),
    "a gate": ("gpt2", {"swiglu": True}, "gated is False by the tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(case: str, tmp_path: Path) -> None:
    row, changed, phrase = REFUSED[case]
    root = megatron.grid(tmp_path / "in", row, **changed)

    with pytest.raises(MdlError, match=phrase) as caught:
        prepare(root).plan.refuse()

    assert caught.value.kind is Kind.INPUT


def test_without_arguments_it_asks(tmp_path: Path) -> None:
    root = megatron.grid(tmp_path / "in", "gpt2_exact")
    file = root / "iter_0000005/mp_rank_00/model_optim_rng.pt"
    megatron.save(file, {"model": megatron.load(file)["model"]})

    with pytest.raises(MdlError, match="Megatron-LM saves it under args, which this checkpoint lacks") as caught:
        prepare(root)

    assert "activation is neither in the checkpoint" in str(caught.value)
    given = {"num_attention_heads": "4", "activation": "gelu", "norm_epsilon": "1e-5"}
    prepared = checks.layout(root, tmp_path / "out", given)
    assert megatron.error(tmp_path / "out", prepared) < 1e-11


CHANGED: dict[str, tuple[str, dict[str, str]]] = {
    "the form of GELU": ("gpt2", {"activation": "gelu"}),
    "rotary base": ("llama", {"rotary_base": "500000"}),
    "rotary pairs": ("llama_pairs", {"rotary_interleaved": "false"}),
    "rotary scaling": ("llama_linear", {"rope_scaling": "none"}),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_value_that_is_wrong_shows(what: str, tmp_path: Path) -> None:
    row, given = CHANGED[what]
    source = megatron.grid(tmp_path / "in", row)
    checks.layout(source, tmp_path / "out", given)

    assert megatron.error(tmp_path / "out", prepare(source)) > 1e-9


# --- with vLLM ---------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_vllm_computes_what_megatron_computes(tmp_path: Path, engine: Engine) -> None:
    checks.layout(megatron.grid(tmp_path / "in", "qwen3", ranks=2, stages=2), tmp_path / "out")

    checks.is_green(tmp_path / "out", engine)


@pytest.mark.engine
def test_pairs_that_are_taken_for_halves_are_noticed(tmp_path: Path, engine: Engine) -> None:
    """Whoever overlooks --rotary-interleaved: the layout says halves, Megatron's forward turned pairs."""
    (tmp_path / "model.py").write_text(
        "from mdl.archs.eager.megatron import build as right\n\n\n"
        "def build(dims):\n    return right({**dims, 'interleaved': True})\n"
    )
    (tmp_path / "wrong.py").write_text(
        "from msgspec.structs import replace\n\nfrom mdl.archs.megatron import ARCH as RIGHT\n\n"
        "ARCH = replace(RIGHT, name='wrong', eager='model:build')\n"
    )
    shutil.copy(mapping_path(load_arch("megatron")), tmp_path / "wrong.yaml")
    options = Options(arch=str(tmp_path / "wrong.py"), given={"rotary_interleaved": "false"})
    source = megatron.grid(tmp_path / "in", "llama_pairs", ranks=2)
    convert(prepare(source, options), tmp_path / "out", tokenizer="none")

    report = verify(tmp_path / "out", Settings(arch=str(tmp_path / "wrong.py"), locate=False), engine=engine)

    assert {check.name: check.ok for check in report.checks}["prefill"] is False

"""Megatron-LM with experts: every form and every cut of them becomes one layout, comes back, and is what vLLM runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

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
from .. import megatron, megatron_moe

CUTS: dict[str, tuple[tuple[int, int, int], bool]] = {
    "one file": ((1, 1, 1), False),
    "ranks": ((2, 1, 1), False),
    "parts": ((1, 1, 2), False),
    "ranks and parts": ((2, 1, 2), False),
    "ranks, stages, parts": ((2, 2, 2), False),
    "whole experts": ((2, 1, 4), True),
    "whole experts, stages": ((2, 2, 2), True),
}


@pytest.mark.parametrize("row", megatron_moe.ROWS)
@pytest.mark.parametrize("form", ["grid", "torch_dist", "stacked"])
def test_the_layout_computes_what_the_checkpoint_did(row: str, form: str, tmp_path: Path) -> None:
    made = megatron_moe.ROWS[row]
    if form == "stacked" and made.frequency != 1:
        pytest.skip("layers that are not alike are not stacked")
    if form == "grid":
        source = megatron_moe.grid(tmp_path / "in", row, cut=(2, 2, 2))
    else:
        source = megatron_moe.dist(tmp_path / "in", row, stacked=form == "stacked")

    prepared = checks.layout(source, tmp_path / "out")

    assert (prepared.arch.name, prepared.target) == ("megatron_moe", made.target)
    assert megatron.error(tmp_path / "out", prepared) < 1e-11  # its norms and tables are in float32


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("form", megatron_moe.FORMS)
def test_every_form_and_cut_becomes_the_same_layout_and_comes_back(form: str, cut: str, tmp_path: Path) -> None:
    parts, whole = CUTS[cut]
    source = megatron_moe.grid(tmp_path / "in", "qwen3_moe_share", form, parts, whole=whole, norms="te")
    prepared = checks.layout(source, tmp_path / "out")
    checks.layout(megatron_moe.grid(tmp_path / "plain", "qwen3_moe_share"), tmp_path / "plain.out")
    make.same(make.saved(tmp_path / "out"), make.saved(tmp_path / "plain.out"))
    assert megatron.error(tmp_path / "out", prepared) < 1e-11

    alone = cut == "one file"
    done = export(tmp_path / "out", tmp_path / ("back.pt" if alone else "back"))

    assert not [lost for lost in done.lost if "what lay beside" not in lost.what]
    for file in sorted(source.rglob("model_optim_rng.pt")):
        raw = megatron.load(file)["model"]
        place = tmp_path / ("back.pt" if alone else f"back/{file.parent.name}/{file.name}")
        back = torch.load(place, weights_only=True)["model"]
        assert list(back) == list(raw)
        make.same(back, raw)


@pytest.mark.parametrize("row", ["mixtral_pairs", "qwen3_moe_first", "qwen3_moe_every"])
@pytest.mark.parametrize("norms", ["te", "dist"])
def test_a_torch_dist_folder_comes_back_as_one_file(row: str, norms: str, tmp_path: Path) -> None:
    checks.layout(megatron_moe.dist(tmp_path / "in", row, stacked=False, norms=norms), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back.pt")

    want = megatron_moe.packed(megatron_moe.state(row, norms), "stacked")
    make.same(torch.load(tmp_path / "back.pt", weights_only=True), want)


def test_stacked_layers_come_back(tmp_path: Path) -> None:
    source = megatron_moe.dist(tmp_path / "in", "qwen3_moe_share", stacked=True)
    checks.layout(source, tmp_path / "out")
    checks.layout(megatron_moe.grid(tmp_path / "plain", "qwen3_moe_share"), tmp_path / "plain.out")
    make.same(make.saved(tmp_path / "out"), make.saved(tmp_path / "plain.out"))
    export(tmp_path / "out", tmp_path / "back.pt")

    back = torch.load(tmp_path / "back.pt", weights_only=True)
    for name, tensor in megatron_moe.packed(megatron_moe.state("qwen3_moe_share", "dist"), "stacked").items():
        number = name.split(".")[2] if name.startswith("decoder.layers.") else ""
        held = back[name.replace(f".{number}.", ".", 1)][int(number)] if number else back[name]
        assert make.bits(held) == make.bits(tensor), name


def test_what_is_said_of_the_experts(tmp_path: Path) -> None:
    prepared = prepare(megatron_moe.grid(tmp_path / "in", "qwen3_moe_first", "numbered", (2, 1, 2), norms="te"))

    assert prepared.match.because[1:4] == (
        "mlp.experts are TEGroupedMLP's: the experts' matrices are numbered",
        "2 tensor-parallel ranks of 1 runs of layers each",
        "2 expert-parallel parts of the experts",
    )
    assert prepared.config["mlp_only_layers"] == [0]
    assert (prepared.config["moe_intermediate_size"], prepared.config["intermediate_size"]) == (96, 160)
    assert (prepared.config["num_experts"], prepared.config["norm_topk_prob"]) == (4, False)


def test_files_without_arguments_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    source = megatron_moe.grid(tmp_path / "in", "mixtral", cut=(1, 1, 2))
    for file in source.rglob("model_optim_rng.pt"):
        megatron.save(file, {"model": megatron.load(file)["model"]})
    given = {"num_attention_heads": "4", "norm_epsilon": "1e-5", "context": "128", "position": "rope"}
    given |= {"rotary_base": "10000", "rotary_percent": "1", "rotary_interleaved": "false", "rope_scaling": "none"}
    given |= {"moe_router_topk": "2"}

    with pytest.raises(MdlError, match="does a softmax over all experts come before the choice"):
        prepare(source, Options(given=given))
    checks.layout(source, tmp_path / "out", given | {"moe_router_pre_softmax": "false"})

    checks.layout(megatron_moe.grid(tmp_path / "plain", "mixtral"), tmp_path / "plain.out")
    make.same(make.saved(tmp_path / "out"), make.saved(tmp_path / "plain.out"))


@pytest.mark.parametrize("gone", ["mp_rank_00_001_001", "mp_rank_01_000_000"])
def test_a_grid_that_is_not_whole_is_refused(gone: str, tmp_path: Path) -> None:
    root = megatron_moe.grid(tmp_path / "in", "mixtral", cut=(2, 2, 2))
    shutil.rmtree(root / "iter_0000005" / gone)
    rank, part, expert = (int(number) for number in gone.removeprefix("mp_rank_").split("_"))

    with pytest.raises(MdlError, match=f"files are missing: rank {rank} of part {part}, experts {expert}") as caught:
        prepare(root)

    assert caught.value.kind is Kind.INPUT


def test_parts_of_the_experts_that_are_all_missing_are_noticed(tmp_path: Path) -> None:
    root = megatron_moe.grid(tmp_path / "in", "mixtral", cut=(1, 1, 2))
    shutil.rmtree(root / "iter_0000005/mp_rank_00_001")

    with pytest.raises(MdlError, match="expert_model_parallel_size is 2 in args, but there are files of 1"):
        prepare(root)


def test_copies_that_differ_are_an_error(tmp_path: Path) -> None:
    root = megatron_moe.grid(tmp_path / "in", "mixtral", cut=(1, 1, 2))
    file = root / "iter_0000005/mp_rank_00_001/model_optim_rng.pt"
    held = megatron.load(file)
    held["model"]["decoder.layers.1.mlp.router.weight"][0, 0] += 1
    megatron.save(file, held)

    with pytest.raises(MdlError, match=r"layers.1.mlp.router.weight should be the same in every copy file"):
        checks.layout(root, tmp_path / "out")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "sigmoid": ("qwen3_moe", {"moe_router_score_function": "sigmoid"}, "a router whose scores are no softmax"),
    "groups": ("qwen3_moe", {"moe_router_group_topk": 2}, "a choice within groups of experts"),
    "scaled": ("qwen3_moe", {"moe_router_topk_scaling_factor": 2.5}, "experts' weights that are scaled"),
    "sinkhorn": ("mixtral", {"moe_router_load_balancing_type": ["sinkhorn"]}, "is sinkhorn: a router of another kind"),
    "biased": ("mixtral", {"moe_router_force_biased": 0.5}, "random biases in the choice of experts"),
    "quantiles": ("mixtral", {"moe_router_load_balancing_type": "quantile_balancing"}, "a router of another kind"),
    "alternating": ("mixtral", {"moe_mlp_glu_interleave_size": 32}, "gates and values in alternating blocks"),
    "scaled as µP": ("mixtral", {"use_mup": True}, "µP's multipliers"),
    "shared": ("mixtral", {"moe_shared_expert_intermediate_size": 96}, "shared_ffn is 0 by the tensors"),
    "gate": ("no_gate", {"moe_shared_expert_gate": True}, "shared_gate is False by the tensors"),
    "shared, normed": ("shared_normed", {}, "an expert that all tokens go to, with normed q and k"),
    "MLA": ("mixtral", {"multi_latent_attention": True}, "multi-head latent attention"),
    "share": ("mixtral", {"moe_router_pre_softmax": True}, "moe_router_pre_softmax, but no normed q and k"),
    "too many": ("mixtral", {"moe_router_topk": 5}, "experts_per_token is 5, of 4 experts"),
    "another model": ("mixtral", {"num_experts": 8}, "experts is 4 by the tensors"),
    "another size": ("mixtral", {"moe_ffn_hidden_size": 64}, "expert_ffn is 96 by the tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(case: str, tmp_path: Path) -> None:
    row, changed, phrase = REFUSED[case]

    with pytest.raises(MdlError, match=phrase) as caught:
        prepare(megatron_moe.grid(tmp_path / "in", row, **changed)).plan.refuse()

    assert caught.value.kind is Kind.INPUT
    assert all(problem.do for problem in caught.value.problems)


@pytest.mark.parametrize("key", ["moe_expert_capacity_factor", "moe_expert_rank_capacity_factor"])
def test_experts_that_leave_tokens_out_are_told_of(key: str, tmp_path: Path) -> None:
    said: dict[str, Any] = {key: 1.25}
    prepared = prepare(megatron_moe.grid(tmp_path / "in", "mixtral", **said))
    prepared.plan.refuse()
    assert any(f"args.{key} is 1.25" in said for said in prepared.dims.deviations)


@pytest.mark.parametrize("extra", ["router.expert_bias", "shared_experts.gate_weight"])
def test_tensors_that_no_class_has_are_refused(extra: str, tmp_path: Path) -> None:
    root = megatron_moe.grid(tmp_path / "in", "mixtral")
    file = root / "iter_0000005/mp_rank_00/model_optim_rng.pt"
    held = megatron.load(file)
    held["model"][f"decoder.layers.0.mlp.{extra}"] = torch.zeros(4)
    megatron.save(file, held)

    with pytest.raises(MdlError, match=extra.partition(".")[0]):
        prepare(root).plan.refuse()


def _router(tensors: megatron.State) -> None:
    for name in tensors:
        if name.endswith("router.weight"):
            tensors[name] = tensors[name].flip(0)


def _halves(tensors: megatron.State) -> None:
    for name in tensors:
        if name.endswith("shared_experts.linear_fc1.weight"):
            tensors[name] = tensors[name].roll(len(tensors[name]) // 2, 0)


def _gate(tensors: megatron.State) -> None:
    for name in tensors:
        if name.endswith("shared_experts.gate_weight"):
            tensors[name] = torch.zeros_like(tensors[name])


def _swapped(tensors: megatron.State) -> None:
    for name in [name for name in tensors if ".local_experts.0." in name]:
        other = name.replace(".0.linear", ".2.linear")
        tensors[name], tensors[other] = tensors[other], tensors[name]


SABOTAGED = {"router": _router, "experts": _swapped, "shared": _halves, "gate": _gate}


@pytest.mark.parametrize("what", SABOTAGED)
def test_what_lies_elsewhere_or_is_forgotten_shows(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts or the router's rows in another order, gate and value of the shared expert swapped, or no gate for it."""
    row = "qwen2_moe" if what in ("shared", "gate") else "qwen3_moe"
    right = prepare(megatron_moe.grid(tmp_path / "right", row, cut=(1, 1, 2)))
    tensors = megatron_moe.state(row)
    SABOTAGED[what](tensors)
    monkeypatch.setattr(megatron_moe, "state", mock.Mock(return_value=tensors))
    checks.layout(megatron_moe.grid(tmp_path / "wrong", row, cut=(1, 1, 2)), tmp_path / "out")

    assert megatron.error(tmp_path / "out", right) > 1e-4


def test_the_place_of_the_softmax_shows(tmp_path: Path) -> None:
    source = megatron_moe.grid(tmp_path / "in", "qwen3_moe_share")
    checks.layout(source, tmp_path / "out", {"moe_router_pre_softmax": "false"})

    assert megatron.error(tmp_path / "out", prepare(source)) > 1e-4


# --- with vLLM ---------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_vllm_computes_what_megatron_computes(tmp_path: Path, engine: Engine) -> None:
    """With layers of every kind, and an expert for all tokens; the other rows are among those of tests/cases.py."""
    checks.layout(megatron_moe.grid(tmp_path / "in", "no_gate", "numbered", (2, 1, 2)), tmp_path / "out")

    checks.is_green(tmp_path / "out", engine)


@pytest.mark.engine
def test_a_wrong_mixture_fails(tmp_path: Path, engine: Engine) -> None:
    """The softmax before the choice, where the run had it behind; wrong orders of experts are above."""
    (tmp_path / "wrong_softmax.py").write_text(
        "from mdl.archs.eager.megatron_moe import build as right\n\n\n"
        "def build(dims):\n    return right({**dims, 'pre_softmax': True})\n"
    )
    (tmp_path / "wrong.py").write_text(
        "from msgspec.structs import replace\n\nfrom mdl.archs.megatron_moe import ARCH as RIGHT\n\n"
        "ARCH = replace(RIGHT, name='wrong', eager='wrong_softmax:build')\n"
    )
    (tmp_path / "wrong.yaml").write_text(mapping_path(load_arch("megatron_moe")).read_text())
    options = Options(arch=str(tmp_path / "wrong.py"))
    source = megatron_moe.grid(tmp_path / "in", "qwen3_moe", cut=(1, 1, 2))
    convert(prepare(source, options), tmp_path / "out", tokenizer="none")

    report = verify(tmp_path / "out", Settings(arch=str(tmp_path / "wrong.py"), locate=False), engine=engine)

    assert {check.name: check.ok for check in report.checks}["prefill"] is False

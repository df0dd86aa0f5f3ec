"""Megatron-LM before megatron-core: every release's names and order become the core's own layout, and come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert.export import export
from mdl.convert.prepare import Options, prepare
from mdl.errors import Kind, MdlError
from mdl.validate.client import Engine

from .. import checkpoints as make
from .. import gpts_checks as checks
from .. import megatron, megatron_legacy

ROWS = ("gpt2", "gpt2_exact", "llama", "llama_pairs", "llama_bias", "llama_tied", "qwen2_pairs", "neox")


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("release", ["v2.0", "v2.5", "core_v0.8"])
def test_the_layout_is_that_of_the_core_s_names(row: str, release: str, tmp_path: Path) -> None:
    prepared = checks.layout(megatron_legacy.grid(tmp_path / "in", row, release, 2, 2), tmp_path / "out")

    assert (prepared.arch.name, prepared.target) == ("megatron_legacy", megatron.TARGETS[row])
    checks.layout(megatron.grid(tmp_path / "core", row), tmp_path / "core.out")
    make.same(make.saved(tmp_path / "out"), make.saved(tmp_path / "core.out"))
    assert megatron.error(tmp_path / "out", prepared) < 1e-11  # its norms and tables are in float32


@pytest.mark.parametrize("release", ["v1.0", "of 2020"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_older_orders_of_q_k_and_v(release: str, ranks: int, tmp_path: Path) -> None:
    prepared = checks.layout(megatron_legacy.grid(tmp_path / "in", "gpt2", release, ranks), tmp_path / "out")

    checks.layout(megatron.grid(tmp_path / "core", "gpt2"), tmp_path / "core.out")
    make.same(make.saved(tmp_path / "out"), make.saved(tmp_path / "core.out"))
    assert megatron.error(tmp_path / "out", prepared) < 1e-11


@pytest.mark.parametrize("release", megatron_legacy.RELEASES)
@pytest.mark.parametrize("cut", [(1, 1), (2, 2)])
def test_the_tables_come_back(release: str, cut: tuple[int, int], tmp_path: Path) -> None:
    source = megatron_legacy.grid(tmp_path / "in", "gpt2", release, *cut)
    checks.layout(source, tmp_path / "out")

    alone = cut == (1, 1)
    export(tmp_path / "out", tmp_path / ("back.pt" if alone else "back"))

    for file in sorted(source.rglob("model_optim_rng.pt")):
        raw = megatron_legacy.flat(megatron.load(file)["model"])
        place = tmp_path / ("back.pt" if alone else f"back/{file.parent.name}/{file.name}")
        back = megatron_legacy.flat(torch.load(place, weights_only=True)["model"])
        assert list(back) == list(raw)
        make.same(back, raw)


def test_a_release_without_arguments_asks(tmp_path: Path) -> None:
    root = megatron_legacy.grid(tmp_path / "in", "gpt2", "v1.0")
    file = root / "iter_0000005/mp_rank_00/model_optim_rng.pt"
    megatron.save(file, {"model": megatron.load(file)["model"], "iteration": 5})

    with pytest.raises(MdlError, match="activation is neither in the checkpoint"):
        prepare(root)

    given = {"num_attention_heads": "4", "activation": "gelu_new", "norm_epsilon": "1e-5"}
    prepared = checks.layout(root, tmp_path / "out", given)
    assert prepared.dims["qkv_order"] == "q, k, v"
    assert megatron.error(tmp_path / "out", prepared) < 1e-11


def test_weights_alone_do_not_tell_the_order(tmp_path: Path) -> None:
    """Without what Megatron-LM saves beside them, a missing checkpoint_version says nothing."""
    root = megatron_legacy.grid(tmp_path / "in", "gpt2", "v2.5")
    model = megatron.load(root / "iter_0000005/mp_rank_00/model_optim_rng.pt")["model"]
    path = tmp_path / "weights.pt"
    megatron.save(path, {"model": model})
    given = {"num_attention_heads": "4", "activation": "gelu_new", "norm_epsilon": "1e-5"}

    with pytest.raises(MdlError, match=r"checkpoint_version is neither .* 0 \(q, k, v\), 1 \(channels\), or 3"):
        prepare(path, Options(given=given))
    prepared = checks.layout(path, tmp_path / "out", given | {"checkpoint_version": "3"})
    assert megatron.error(tmp_path / "out", prepared) < 1e-11


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "rotary": ("llama", "of 2020", {}, "checkpoint_version 1.0 with rotary positions"),
    "experts": ("gpt2", "v2.5", {"num_experts": 8}, "args.num_experts is 8: experts"),
    "norms less 1": ("llama", "core_v0.8", {"apply_layernorm_1p": True}, "norms whose weights are stored less 1"),
    "heads": ("gpt2", "v2.5", {"num_attention_heads": 3}, "3 heads do not fit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(case: str, tmp_path: Path) -> None:
    row, release, changed, phrase = REFUSED[case]
    if row == "llama" and release == "of 2020":
        root = megatron_legacy.grid(tmp_path / "in", row, "v2.5")
        file = root / "iter_0000005/mp_rank_00/model_optim_rng.pt"
        megatron.save(file, megatron.load(file) | {"checkpoint_version": 1.0})
    else:
        root = megatron_legacy.grid(tmp_path / "in", row, release, **changed)

    with pytest.raises(MdlError, match=phrase) as caught:
        prepare(root).plan.refuse()

    assert caught.value.kind is Kind.INPUT


@pytest.mark.parametrize("wrong", ["0", "1"])
def test_a_wrong_order_shows(wrong: str, tmp_path: Path) -> None:
    source = megatron_legacy.grid(tmp_path / "in", "gpt2")
    checks.layout(source, tmp_path / "out", {"checkpoint_version": wrong})

    assert megatron.error(tmp_path / "out", prepare(source)) > 1e-4


@pytest.mark.engine
def test_vllm_computes_what_megatron_computed(tmp_path: Path, engine: Engine) -> None:
    checks.layout(megatron_legacy.grid(tmp_path / "in", "gpt2", "v1.0", 2), tmp_path / "out")

    checks.is_green(tmp_path / "out", engine)

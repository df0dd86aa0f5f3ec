"""Weights that torch saved in parts, put together: held against torch's own modules, and caught when done wrongly."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from mdl.convert import composed
from mdl.convert.export import export
from mdl.convert.inventory import take_inventory
from mdl.convert.manifest import read_manifest
from mdl.convert.open import open_checkpoint
from mdl.convert.prepare import Prepared, prepare
from mdl.convert.stored import Files
from mdl.errors import MdlError
from mdl.mappings.lazy import Lazy
from mdl.mappings.products import Product
from mdl.mappings.tensors import Made
from mdl.validate.client import Engine
from mdl.validate.reference import builtin_reference
from mdl.validate.verify import verify
from mdl.validate.wholes import rounded, whole_weight

from . import checkpoints as make
from . import converted, servable
from .converted import IDS, by_transformers, nmse


def _quiet(function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch would rather have the newer of its two ways
        return function(*arguments, **more)


def _pruned(module: nn.Module) -> nn.Module:
    prune.random_unstructured(module, "bias", 0.3)
    return prune.random_unstructured(module, "weight", 0.5)


FORMS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm by rows": lambda: _quiet(weight_norm, nn.Linear(8, 12)),
    "weight_norm by columns": lambda: _quiet(weight_norm, nn.Linear(8, 12), dim=1),
    "weight_norm of the whole": lambda: _quiet(weight_norm, nn.Linear(8, 12), dim=None),
    "weight_norm of a kernel": lambda: _quiet(weight_norm, nn.Conv1d(4, 6, 3)),
    "weight_norm of a table": lambda: _quiet(weight_norm, nn.Embedding(20, 8), dim=1),
    "parametrized by rows": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "parametrized by columns": lambda: parametrizations.weight_norm(nn.Linear(8, 8), dim=1),
    "spectral_norm": lambda: spectral_norm(nn.Linear(8, 12)),
    "parametrized spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "pruned": lambda: _pruned(nn.Linear(8, 12)),
}


def _made(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    module = FORMS[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module.to(dtype).eval()


def _shown(module: nn.Module) -> dict[str, Tensor]:
    """The weights that the module computes with."""
    inputs = {nn.Embedding: torch.zeros(1, dtype=torch.long), nn.Conv1d: torch.zeros(1, 4, 3)}
    given = next((x for cls, x in inputs.items() if isinstance(module, cls)), torch.zeros(1, 8))
    module(given.to(next(module.parameters()).dtype) if given.is_floating_point() else given)  # hooks run before it
    return {name: getattr(module, name).detach() for name in ("weight", "bias") if hasattr(module, name)}


@pytest.mark.parametrize("name", FORMS)
def test_torch_s_own_module_has_these_very_weights(name: str, tmp_path: Path) -> None:
    """From float32 and 16 bits bit for bit what its float64 gives, rounded once."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        module = _made(name, dtype)
        torch.save({"model": {f"lin.{key}": tensor for key, tensor in module.state_dict().items()}}, tmp_path / "x.pt")

        inventory = take_inventory(open_checkpoint(tmp_path / "x.pt"))

        wanted = _shown(module.double())
        assert set(inventory.tensors) == {f"lin.{key}" for key in wanted}
        with Files() as files:
            for key, tensor in wanted.items():
                (info,) = inventory.tensors[f"lin.{key}"]
                made = torch.from_numpy(np.array(files.tensor(info).cast("float64").read()))
                assert info.raw == f"model/lin.{key}"
                for other in (rounded(tensor, info.dtype), whole_weight(info, files)):
                    if dtype == torch.float64:  # sums in another order
                        torch.testing.assert_close(made, other, rtol=1e-14, atol=0)
                    else:
                        assert torch.equal(made, other), (key, dtype)


def test_what_torch_computes_in_float32_is_a_bit_off(tmp_path: Path) -> None:
    module = _made("weight_norm by rows", torch.float32)
    torch.save(module.state_dict(), tmp_path / "x.pt")

    inventory = take_inventory(open_checkpoint(tmp_path / "x.pt"))

    with Files() as files:
        made = torch.from_numpy(np.array(files.tensor(inventory.tensors["weight"][0]).read()))
    torch.testing.assert_close(made, _shown(module)["weight"], rtol=3e-7, atol=0)
    assert inventory.remarks == (
        "put together weight: v · g / ‖v‖ of torch.nn.utils.weight_norm, in float64, rounded once",
    )


def test_rounding_once_is_not_rounding_twice() -> None:
    """Just above the middle of two bfloat16s, float32 has the middle itself."""
    value = 1 + 2.0**-8 + 2.0**-40
    once = composed._once(Lazy.of(np.array([value]), "float64"), Lazy.of(np.zeros(1), "float64"), "bfloat16", np.add)

    assert float(once.cast("float64").read()[0]) == 1 + 2.0**-7
    assert float(rounded(torch.tensor([value], dtype=torch.float64), "bfloat16")[0]) == 1 + 2.0**-7
    assert float(torch.tensor([value], dtype=torch.float64).to(torch.bfloat16)[0]) == 1  # twice


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_both_roundings_agree_at_every_size(dtype: str) -> None:
    rng = np.random.default_rng(3)
    sizes = rng.standard_normal(100_000) * np.exp(30 * rng.standard_normal(100_000))
    values = np.concatenate([sizes, [0.0, -0.0, np.inf, 65519.0, 65520.0, 1e39, 1e-46, 3e-8, 3.39e38, 3.5e38]])

    once = composed._once(Lazy.of(values, "float64"), Lazy.of(np.zeros(len(values)), "float64"), dtype, np.add)

    assert np.array_equal(once.cast("float64").read(), rounded(torch.from_numpy(values), dtype).numpy())


def test_a_product_is_the_same_bits_in_any_order_and_any_blocks() -> None:
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((3, 12)), rng.standard_normal((3, 10))
    whole = Lazy(Product.of(left, right), (1, 1), "float64")
    plain = whole.read()

    np.testing.assert_allclose(plain, left.T @ right, rtol=1e-12, atol=1e-14)
    turned = whole.unflatten(0, (3, 4)).transpose(1, 2, 0).slice(1, 2, 9)
    assert np.array_equal(turned.read(), plain.reshape(3, 4, 10).transpose(1, 2, 0)[:, 2:9])
    assert np.array_equal(np.concatenate([b.reshape(-1) for b in turned.blocks(64)]), turned.read().reshape(-1))


# --- in a checkpoint ----------------------------------------------------------------------------------------------


def in_parts(state: dict[str, Tensor], end: str = "weight") -> dict[str, Tensor]:
    """A nanoGPT of whose blocks every matrix lies in direction and length."""
    rng = torch.Generator().manual_seed(9)
    g, v = ("weight_g", "weight_v") if end == "weight" else ("parametrizations.weight.original0", end)
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or ".h." not in name or tensor.dim() != 2:
            made[name] = tensor
            continue
        stretched = 0.2 + 3 * torch.rand(len(tensor), 1, generator=rng, dtype=torch.float64)
        made[f"{module}.{g}"] = tensor.norm(dim=1, keepdim=True)
        made[f"{module}.{v}"] = (tensor.double() * stretched).to(tensor.dtype)
    return made


@pytest.mark.parametrize("end", ["weight", "parametrizations.weight.original1"])
def test_a_nanogpt_in_parts_is_the_nanogpt(end: str, tmp_path: Path) -> None:
    state = servable.nanogpt_state(dtype=torch.float64)
    whole = converted.layout(make.nanogpt(tmp_path / "whole.pt", state), tmp_path / "whole")
    path = make.trained(tmp_path / "parts.pt", in_parts(state, end), make.nanogpt_args(state))

    parts = converted.layout(path, tmp_path / "parts")

    wanted = builtin_reference(whole.arch, whole.dims, whole.plan).logits(IDS, "float64")
    assert nmse(builtin_reference(parts.arch, parts.dims, parts.plan).logits(IDS, "float64"), wanted) < 1e-24
    assert nmse(by_transformers(tmp_path / "parts"), wanted) < 1e-24
    assert "put together 8 weights" in " ".join(read_manifest(tmp_path / "parts").notes)
    assert {step.made for step in parts.plan.steps if step.made} == {("weight_norm",)}


def test_export_brings_wholes_back_and_says_so(tmp_path: Path) -> None:
    state = servable.nanogpt_state()
    path = make.trained(tmp_path / "parts.pt", in_parts(state), make.nanogpt_args(state))
    converted.layout(path, tmp_path / "out")

    done = export(tmp_path / "out", tmp_path / "back.pt")

    (lost,) = done.lost
    assert "8 tensors come back as wholes, whose parts a layout does not hold: weight_norm, such as" in lost.what
    assert "transformer.h.0.attn.c_attn.weight_g" in lost.what
    back = torch.load(tmp_path / "back.pt", weights_only=False)["model"]
    assert set(back) == set(state)
    torch.testing.assert_close(back, state)


def test_what_can_t_be_folded_is_refused_by_name(tmp_path: Path) -> None:
    """An orthogonal matrix; a second function on top; parts of another shape."""
    twice = parametrizations.weight_norm(nn.Linear(8, 8))
    nn.utils.parametrize.register_parametrization(twice, "weight", nn.Tanh())
    states = [parametrizations.orthogonal(nn.Linear(8, 8)).state_dict(), twice.state_dict()]
    states[1] |= {"more.weight_g": torch.ones(3, 3), "more.weight_v": torch.ones(8, 8)}
    for k, state in enumerate(states):
        torch.save({f"lin.{key}": tensor for key, tensor in state.items()}, tmp_path / f"{k}.pt")

    with pytest.raises(MdlError, match=r"orthogonal matrix.*remove_parametrizations"):
        prepare(tmp_path / "0.pt")
    names = set(take_inventory(open_checkpoint(tmp_path / "1.pt")).tensors)
    assert "lin.more.weight_g" in names
    with pytest.raises(MdlError, match=r"which is not so of these"):
        prepare(tmp_path / "1.pt")


# --- sabotage -----------------------------------------------------------------------------------------------------


def _over_the_other_dimension(made: Made, parts: list[Lazy], dtype: str) -> Lazy:
    v, g = parts
    square = v.shape[0] == v.shape[1]
    return composed._weight_norm(made, [v, g.transpose(1, 0)] if square else parts, dtype)


def _without_length(made: Made, parts: list[Lazy], dtype: str) -> Lazy:
    return parts[0].cast(dtype)


def _swapped_norm(made: Made, parts: list[Lazy], dtype: str) -> Lazy:
    v, g = parts
    length = g.cast("float64").read() * 1.001
    return composed._weight_norm(made, [v, Lazy.of(length, "float64")], dtype)


SABOTAGE = {"g over the other dimension": _over_the_other_dimension, "v alone": _without_length, "0.1 %": _swapped_norm}


def _sabotaged(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    state = servable.nanogpt_state()
    path = make.trained(tmp_path / "parts.pt", in_parts(state), make.nanogpt_args(state))
    monkeypatch.setitem(composed._RECIPES, composed.WEIGHT_NORM, SABOTAGE[name])
    return converted.layout(path, tmp_path / "out")


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_reference_does_not_follow_a_wrong_fold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = _sabotaged(name, tmp_path, monkeypatch)

    mine = builtin_reference(wrong.arch, wrong.dims, wrong.plan).logits(IDS, "float64")

    whole = prepare(servable.nanogpt(tmp_path / "whole.pt"))
    wanted = builtin_reference(whole.arch, whole.dims, whole.plan).logits(IDS, "float64")
    assert nmse(mine, wanted) < 1e-12  # v and g are float32's
    assert nmse(by_transformers(tmp_path / "out"), wanted) > 1e-8


@pytest.mark.engine
def test_vllm_computes_a_nanogpt_in_parts(tmp_path: Path, engine: Engine) -> None:
    state = servable.nanogpt_state()
    path = make.trained(tmp_path / "parts.pt", in_parts(state), make.nanogpt_args(state))
    converted.layout(path, tmp_path / "out")

    report = verify(tmp_path / "out", engine=engine)

    assert report.ok, [check for check in report.checks if check.ok is not True]


@pytest.mark.engine
def test_verify_finds_a_wrong_fold(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    _sabotaged("0.1 %", tmp_path, monkeypatch)

    report = verify(tmp_path / "out", engine=engine)

    assert [check.ok for check in report.checks if check.name in ("layout", "prefill")] == [True, False]

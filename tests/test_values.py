"""Broken values are refused with their count and place, strange ones are told; looking is exact for every type."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdl.archs import targets
from mdl.convert.check import check_layout
from mdl.convert.manifest import read_manifest
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.convert.values_judged import Allow, told_in_words
from mdl.convert.values_seen import Seen
from mdl.errors import Kind, MdlError
from mdl.mappings.lazy import Array, Lazy, Rounding, raw_dtype

from . import checkpoints as make
from .family import stub_target, write_family
from .test_cli import mdl  # noqa: F401 - a fixture

FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


def raw(tensor: torch.Tensor) -> Array:
    """A tensor's values as the copy loop sees them."""
    dtype = raw_dtype(str(tensor.dtype).removeprefix("torch."))
    return np.frombuffer(bytearray(make.bits(tensor)), dtype)


def seen(tensor: torch.Tensor, size: int = 7) -> Any:
    """What is seen of a tensor that comes in blocks of ``size`` values."""
    look = Seen(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    values = raw(tensor)
    for start in range(0, len(values), size):
        look.feed(values[start : start + size])
    return look.result()


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_bit_pattern_is_counted_as_torch_counts_it(dtype: str) -> None:
    """All patterns of 8 and 16 bits; for wider types those that the upper 16 bits give."""
    kind = getattr(torch, dtype)
    bits = np.arange(1 << (8 if "8_" in dtype else 16))
    width = kind.itemsize
    wide = bits.astype(f"u{width}") << np.uint64(max(0, 8 * width - 16)).astype(f"u{width}")
    tensor = torch.from_numpy(wide.view(f"i{width}")).view(kind)
    exact = tensor.double()

    found = seen(tensor, size=1000)

    assert (found.nan, found.inf) == (int(exact.isnan().sum()), int(exact.isinf().sum()))
    assert found.first == (int((~exact.isfinite()).nonzero()[0]),)
    assert found.constant is None


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (5, 4)], ids=str)
def test_one_bad_value_is_placed(dtype: str, bad: float, place: tuple[int, int]) -> None:
    tensor = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    assert seen(tensor).first is None
    if dtype == "float8_e4m3fn":
        bad = math.nan  # it has no infinity
    tensor[place] = bad

    found = seen(tensor)

    assert (found.nan, found.inf, found.first) == (int(bad != bad), int(bad == bad), place)


def test_blocks_in_any_order() -> None:
    tensor = torch.ones(4, 6)
    tensor[1, 2] = tensor[3, 0] = math.nan
    values = raw(tensor)
    look = Seen((4, 6), "float32")
    for start in (18, 0, 6, 12):
        look.feed(values[start : start + 6], at=start)

    assert (look.result().nan, look.result().first, look.result().count) == (2, (1, 2), 24)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("values", "constant"),
    [
        ([0.0] * 20, 0.0),
        ([0.0, -0.0] * 10, 0.0),
        ([-0.0] * 20, 0.0),
        ([1.5] * 20, 1.5),
        ([-2.0] * 20, -2.0),
        ([1.0] * 19 + [2.0], None),
        ([1.0] * 19 + [0.5], None),
        ([2.0] + [1.0] * 19, None),
        ([0.0] * 19 + [-1.0], None),
        ([0.0] * 19 + [1.0], None),
        ([-0.0] * 19 + [1.0], None),
    ],
)
def test_constants(values: list[float], constant: float | None, dtype: str) -> None:
    tensor = torch.tensor(values).to(getattr(torch, dtype))

    assert [seen(tensor, size).constant for size in (7, 20, 1)] == [constant] * 3


@pytest.mark.parametrize(
    ("source", "target", "values", "overflowed", "flushed"),
    [
        ("float32", "float16", [1e5, -7e4, 65504.0, 65519.0, 65520.0, 1e-8, -1e-9, 0.0, -0.0, 6e-8], 3, 2),
        ("bfloat16", "float16", [1e5, 1e-8, 1.0, 0.0, math.inf, math.nan], 1, 1),
        ("float64", "float32", [1e300, -1e39, 1e-50, 1.0, -0.0], 2, 1),
        ("float32", "bfloat16", [3.39e38, 1e-41, 5e-41, 1.0, 3.4028e38], 1, 1),
        ("float32", "float8_e4m3fn", [500.0, -449.0, 1e-4, 1.0], 1, 1),
        ("float16", "bfloat16", [6e-8, 65504.0, 0.0], 0, 0),
        ("float16", "float32", [6e-8, 65504.0, 0.0], 0, 0),
        ("bfloat16", "float64", [1e-38, 3e38], 0, 0),
    ],
)
def test_what_rounding_loses(source: str, target: str, values: list[float], overflowed: int, flushed: int) -> None:
    before = torch.tensor(values, dtype=torch.float64).to(getattr(torch, source))
    after = before.to(getattr(torch, target))
    look = Seen((len(values),), target)
    lazy = Lazy.of(raw(before), source).cast(target).watched(look.rounded)
    for block in lazy.blocks(16):
        look.feed(block)

    found = look.result()

    wanted = before.double().isfinite() & ~after.double().isfinite()
    if target != "float8_e4m3fn":  # torch saturates there, numpy's types say NaN
        assert found.overflowed == int(wanted.sum())
    assert (found.overflowed, found.flushed) == (overflowed, flushed)


def test_a_rounding_is_watched_wherever_it_stands() -> None:
    """In a join, behind a view, and after arithmetic."""
    look = Seen((4, 2), "float16")
    big = Lazy.of(np.full((2, 2), 1e6, "float32"), "float32").cast("float16")
    doubled = Lazy.of(np.full((2, 2), 40000.0, "float16"), "float16").scaled(2.0)
    for block in big.concat([doubled], 0).transpose(1, 0).watched(look.rounded).blocks():
        look.feed(block)

    assert (look.result().inf, look.result().overflowed) == (8, 8)
    assert Rounding("float32", "float16")(np.float32([1e6]))[0] == np.inf  # no note, no harm


def broken(path: Path, changes: dict[str, tuple[tuple[int, ...], float]], **sizes: Any) -> Path:
    state = make.nanogpt_state(**sizes)
    for name, (place, value) in changes.items():
        state[name][place] = value
    return make.nanogpt(path, state)


FC = "transformer.h.1.mlp.c_fc.weight"
WPE = "transformer.wpe.weight"


def converted(path: Path, out: Path, dtype: str | None = None, **more: Any) -> Any:
    options = Options(dtype=dtype)
    return convert(prepare(path, options), out, tokenizer="none", **more)


def refused(path: Path, out: Path, dtype: str | None = None, **more: Any) -> tuple[str, ...]:
    with pytest.raises(MdlError) as caught:
        converted(path, out, dtype, **more)
    assert caught.value.kind is Kind.INPUT
    assert sorted(p.name for p in out.parent.iterdir()) == [path.name]
    return tuple(f"{p.what} | {Path(p.where).name} | {p.do}" for p in caught.value.problems)


def test_all_broken_tensors_are_named_at_once_and_nothing_is_left(tmp_path: Path) -> None:
    """The place is that of the value in the layout: c_fc is transposed on its way."""
    path = broken(tmp_path / "x.pt", {FC: ((60, 3), math.nan), WPE: ((2, 5), -math.inf)})

    one, other = refused(path, tmp_path / "out", max_shard_size=5000)

    assert one.startswith(f"{WPE} holds 1 Inf among 192 values, the first at [2, 5] | x.pt: {WPE} | ")
    assert other.startswith(f"{FC} holds 1 NaN among 1,024 values, the first at [3, 60] | x.pt: {FC} | ")
    assert "--allow-nonfinite" in one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_looked_at_without_conversion(dtype: torch.dtype, tmp_path: Path) -> None:
    (what,) = refused(broken(tmp_path / "x.pt", {WPE: ((11, 15), math.nan)}, dtype=dtype), tmp_path / "out")

    assert what.startswith(f"{WPE} holds 1 NaN among 192 values, the first at [11, 15]")


def test_what_is_allowed_is_written_and_told(tmp_path: Path) -> None:
    path = broken(tmp_path / "x.pt", {FC: ((60, 3), math.nan), WPE: ((2, 5), -math.inf)})

    done = converted(path, tmp_path / "out", allow=Allow(nonfinite=True))

    manifest = read_manifest(tmp_path / "out")
    assert manifest.values["nonfinite"] == {
        WPE: {"nan": 0, "inf": 1, "of": 192, "first": [2, 5]},
        FC: {"nan": 1, "inf": 0, "of": 1024, "first": [3, 60]},
    }
    assert check_layout(tmp_path / "out", manifest) == []
    assert told_in_words(done.manifest.values)[0] == (WPE, "holds 0 NaN and 1 Inf among 192 values (allowed)")
    assert make.saved(tmp_path / "out")[FC][3, 60].isnan()


def test_overflow_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    path = broken(tmp_path / "x.pt", {WPE: ((0, 0), 1e6)})
    everything = Allow(nonfinite=True, flush=True)

    (what,) = refused(path, tmp_path / "out", "float16", allow=everything)

    assert what.startswith(f"{WPE}: 1 of 192 values are too large for float16 | ")
    assert "--dtype bfloat16" in what
    assert not converted(path, tmp_path / "out", "bfloat16").manifest.values["nonfinite"]


def test_overflow_beside_infinity_is_two_problems(tmp_path: Path) -> None:
    path = broken(tmp_path / "x.pt", {WPE: ((0, 0), 1e6)})
    state = torch.load(path)
    state["model"][WPE][3, 3] = math.inf
    torch.save(state, path)

    too_large, infinite = refused(path, tmp_path / "out", "float16")

    assert "1 of 192 values are too large" in too_large
    assert "1 more that were NaN or Inf before" in infinite


def test_what_becomes_zero_is_refused_unless_allowed(tmp_path: Path) -> None:
    path = broken(tmp_path / "x.pt", {WPE: ((0, 0), 1e-9)})

    (what,) = refused(path, tmp_path / "out", "float16")
    assert what.startswith(f"{WPE}: 1 of 192 values become 0 in float16 | ")
    assert "--dtype bfloat16 keeps them, --allow-flush" in what

    done = converted(path, tmp_path / "out", "float16", allow=Allow(flush=True))
    assert done.manifest.values["flushed"] == {WPE: {"count": 1, "of": 192, "from": "float32", "to": "float16"}}


def test_a_cast_of_the_mapping_is_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.tensor([[1e300, 1e-300, 1.0]], dtype=torch.float64)}, tmp_path / "x.pt")
    monkeypatch.setattr(targets, "_spec", {"MadeUp": stub_target({"w": (1, 3)})}.get)
    rule = "\n    transform:\n      - {from: w, ops: [{cast: {dtype: float32}}]}\n"
    options = Options(arch=str(write_family(tmp_path / "family", rule)))

    with pytest.raises(MdlError) as caught:
        convert(prepare(tmp_path / "x.pt", options), tmp_path / "out", tokenizer="none")

    assert [p.what for p in caught.value.problems] == [
        "w: 1 of 3 values are too large for float32", "w: 1 of 3 values become 0 in float32"
    ]  # fmt: skip


def test_suspicious_is_what_does_not_look_like_training(tmp_path: Path) -> None:
    """Vectors of zeros and ones are how biases and norms begin; filled biases are ours; matrices must differ."""
    state = make.nanogpt_state(bias=False)
    state[FC][:] = 0
    state[WPE][:] = 0.5
    state["transformer.h.0.ln_1.weight"][:] = 1
    state["transformer.h.0.ln_2.weight"][:] = 0
    state["transformer.h.1.ln_1.weight"][:] = 3

    done = converted(make.nanogpt(tmp_path / "x.pt", state), tmp_path / "out")

    assert done.manifest.values == {
        "nonfinite": {},
        "flushed": {},
        "suspicious": {
            WPE: "all 192 values are 0.5",
            "transformer.h.1.ln_1.weight": "all 16 values are 3",
            FC: "all 1,024 values are 0",
        },
    }


def test_the_command_line_says_it_all(mdl: Any, tmp_path: Path) -> None:  # noqa: F811 - the fixture
    path = broken(tmp_path / "x.pt", {FC: ((60, 3), math.nan), WPE: ((0, 0), 1e-9)})

    plain = mdl("convert", path, tmp_path / "out", "--tokenizer", "none")
    half = mdl("convert", path, tmp_path / "out", "--dtype", "float16", "--allow-nonfinite")
    assert (plain.code, half.code) == (3, 3)
    assert "holds 1 NaN among 1,024 values, the first at [3, 60]" in plain.err
    assert "1 of 192 values become 0 in float16" in half.err
    assert "NaN" not in half.err

    flags = ("--dtype", "float16", "--allow-nonfinite", "--allow-flush", "--json")
    done = mdl("convert", path, tmp_path / "out", *flags)
    assert done.code == 0
    assert list(done.json["manifest"]["values"]["nonfinite"]) == [FC]
    written = json.loads((tmp_path / "out/mdl.json").read_text())
    assert written["values"] == done.json["manifest"]["values"]


def test_people_see_layers_on_one_line(mdl: Any, tmp_path: Path) -> None:  # noqa: F811 - the fixture
    state = make.nanogpt_state()
    assert "values" not in mdl("convert", make.nanogpt(tmp_path / "a.pt", state), tmp_path / "a").out
    for layer in range(2):
        state[f"transformer.h.{layer}.mlp.c_fc.weight"][:] = 0

    done = mdl("convert", make.nanogpt(tmp_path / "x.pt", state), tmp_path / "out")

    assert "transformer.h.{0..1}.mlp.c_fc.weight: suspicious: all 1,024 values are 0" in done.out

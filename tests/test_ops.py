"""Operations: what apply does to integers that spell the answer, that inverse undoes it, that shape tells the truth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl.convert.manifest import describe_op, revive_op
from mdl.mappings import moves, quantised, values
from mdl.mappings.lazy import Array, Lazy, raw_dtype, value_dtype
from mdl.mappings.ops import Op, OpError, Single, invert, trace
from mdl.mappings.parts import Parts, without


def numbered(*shape: int) -> Array:
    """Integers 0, 1, 2 … in C order, so that each value names the place it came from."""
    return np.arange(math.prod(shape), dtype="float32").reshape(shape)


def run(op: Op, *arrays: Array) -> list[Array]:
    out = op.apply([Lazy.of(a, str(a.dtype)) for a in arrays])
    assert [x.shape for x in out] == op.shape([a.shape for a in arrays])
    return [x.read() for x in out]


def rows(op: Op, *arrays: Array) -> list[int]:
    """Where each row of the first output came from, for arrays whose rows are constant."""
    return [int(r) for r in run(op, *arrays)[0].reshape(-1, arrays[0].shape[-1])[:, 0]]


def tall(count: int, width: int = 3) -> Array:
    return np.repeat(np.arange(count, dtype="float32"), width).reshape(count, width)


def test_permute_rope_puts_even_rows_before_odd_ones_in_each_head() -> None:
    assert rows(moves.PermuteRope(heads=2), tall(8)) == [0, 2, 1, 3, 4, 6, 5, 7]


def test_permute_rope_leaves_the_unrotated_rows_of_each_head() -> None:
    assert rows(moves.PermuteRope(heads=2, rotary=4), tall(12)) == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]


def test_permute_rope_works_on_biases() -> None:
    assert run(moves.PermuteRope(heads=1), numbered(6))[0].tolist() == [0, 2, 4, 1, 3, 5]


def test_negate_half_flips_the_upper_half_of_each_head() -> None:
    got = run(moves.NegateHalf(heads=2), np.ones((8, 1), "float32"))[0].ravel().tolist()
    assert got == [1, 1, -1, -1, 1, 1, -1, -1]


def test_deinterleave_qkv_gathers_groups() -> None:
    # two groups of two query heads, one key, one value, one row each: q0 q1 k0 v0 q2 q3 k1 v1
    assert rows(moves.DeinterleaveQkv(heads=4, kv_heads=2), tall(8)) == [0, 1, 4, 5, 2, 6, 3, 7]


def test_reorder_heads_brings_strided_groups_together() -> None:
    # heads 0..5 in strided groups of 2 (head h reads key h mod 2): 0 2 4 | 1 3 5
    assert rows(moves.ReorderHeads(heads=6, groups=2), tall(6)) == [0, 2, 4, 1, 3, 5]


def test_stack_counts_runs() -> None:
    a, b, c, d = (np.full((2, 2), k, "float32") for k in range(4))
    first, second = run(moves.Stack(axis=0, count=2), a, b, c, d)
    assert first.shape == (2, 2, 2)
    assert [first[0, 0, 0], first[1, 0, 0], second[0, 0, 0], second[1, 0, 0]] == [0, 1, 2, 3]


def test_split_and_concat_along_columns() -> None:
    left, right = run(moves.Split(axis=1, sizes=(1, 2)), numbered(2, 3))
    assert left.tolist() == [[0], [3]]
    assert right.tolist() == [[1, 2], [4, 5]]
    assert run(moves.Concat(axis=1), left, right)[0].tolist() == numbered(2, 3).tolist()


def test_pad_and_slice() -> None:
    assert run(values.Pad(axis=0, to=3), numbered(2, 2))[0].tolist() == [[0, 1], [2, 3], [0, 0]]
    assert run(values.Slice(axis=1, stop=1), numbered(2, 2))[0].tolist() == [[0], [2]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_add_computes_in_float32_and_rounds_once(dtype: str) -> None:
    stored = np.array([0.5, -1.0, 3.0e-3, 100.0]).astype(value_dtype(dtype))
    out = values.Add(1.0).apply([Lazy.of(stored.view(raw_dtype(dtype)), dtype)])[0]
    want = (stored.astype("float64" if dtype == "float64" else "float32") + 1).astype(value_dtype(dtype))
    assert out.dtype == dtype
    assert out.read().view(value_dtype(dtype)).tolist() == want.tolist()


def test_cast_rounds_to_nearest_even_like_torch() -> None:
    import torch

    x = np.random.default_rng(0).standard_normal(4096).astype("float32") * np.float32(1e3)
    ours = values.Cast("bfloat16").apply([Lazy.of(x, "float32")])[0].read()
    assert np.array_equal(ours, torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy())


def test_mean_and_sum_of_ranks() -> None:
    a, b = numbered(2, 2), numbered(2, 2) * 3
    lazy = Lazy.of(a, "float32")
    assert lazy.summed([Lazy.of(b, "float32")], mean=True).read().tolist() == (a * 2).tolist()
    assert lazy.summed([Lazy.of(b, "float32")], mean=False).read().tolist() == (a * 4).tolist()


@pytest.mark.parametrize("shape", [(256, 384), (300, 130), (1, 1), (576, 64)], ids=str)
@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("to", ["bfloat16", "float32"])
def test_dequantize_is_a_product_rounded_once(shape: tuple[int, int], stored: str, to: str) -> None:
    """In blocks as small as they come; torch does the same by itself, with the factors written out."""
    import torch

    rng = torch.Generator().manual_seed(1)
    matrix = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
    factors = torch.rand(*(-(-n // 128) for n in shape), generator=rng) * 1e-3
    spread = factors.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    wanted = (matrix.view(getattr(torch, stored)).float() * spread).to(getattr(torch, to))

    op = quantised.Dequantize(128, to)
    lazy = op.apply([Lazy.of(matrix.numpy(), stored), Lazy.of(factors.numpy(), "float32")])[0]

    assert (lazy.shape, lazy.dtype, op.dtype(stored)) == (shape, to, to)
    got = torch.from_numpy(np.concatenate([block.reshape(-1) for block in lazy.blocks(1 << 10)]).copy())
    got = got.view(getattr(torch, to)).reshape(shape)
    assert got.isnan().equal(wanted.isnan())
    assert got.nan_to_num().equal(wanted.nan_to_num())
    assert revive_op(json.loads(json.dumps(describe_op(op)))) == op


@pytest.mark.parametrize(
    ("shapes", "dtypes", "says"),
    [
        ([(256, 256)], ("float8_e4m3fn",), "takes a matrix and its blocks' factors, got 1"),
        ([(256, 257), (2, 2)], ("float8_e4m3fn", "float32"), r"\[2, 2\] factors do not fit a matrix of \[256, 257\]"),
        ([(256,), (2,)], ("float8_e4m3fn", "float32"), r"\[2\] factors do not fit a matrix of \[256\]"),
        ([(256, 256), (2, 2)], ("int8", "float32"), "int8 is no type of eight bits with factors"),
        ([(256, 256), (2, 2)], ("float8_e4m3fn", "float16"), "takes factors of float32"),
    ],
)
def test_what_does_not_fit_dequantize(shapes: list[tuple[int, ...]], dtypes: tuple[str, ...], says: str) -> None:
    op = quantised.Dequantize(128)
    with pytest.raises(OpError, match=says):
        trace((op,), shapes, op.taken(dtypes))


HEADS = st.sampled_from([1, 2, 3, 4])


@st.composite
def reversible(draw: st.DrawFn) -> tuple[Op, list[tuple[int, ...]]]:
    """An operation with shapes that fit it."""
    heads, half, width = draw(HEADS), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    tail = draw(st.sampled_from([(), (width,)]))
    makers: list[Callable[[], tuple[Op, list[tuple[int, ...]]]]] = [
        lambda: (moves.Transpose(), [(heads, width)]),
        lambda: (moves.PermuteRope(heads), [(heads * half * 2, *tail)]),
        lambda: (moves.PermuteRope(heads, rotary=2), [(heads * (half + 2), *tail)]),
        lambda: (moves.NegateHalf(heads), [(heads * half * 2, *tail)]),
        lambda: (moves.Reshape((width, heads, half)), [(heads * half, width)]),
        lambda: (moves.Split(0, (heads, half)), [(heads + half, *tail)]),
        lambda: (moves.Concat(0), [(heads, *tail), (half, *tail)]),
        lambda: (moves.DeinterleaveQkv(heads * half, heads), [((heads * half + 2 * heads) * 2, *tail)]),
        lambda: (moves.ReorderHeads(heads * half, heads), [(heads * half * 2, *tail)]),
        lambda: (moves.ReorderHeads(heads * half, half, axis=1), [(width, heads * half * 3)]),
        lambda: (moves.Stack(0, 2), [(heads, *tail)] * 4),
        lambda: (moves.Unstack(0, heads), [(heads, *tail), (heads, *tail)]),
        lambda: (values.Pad(0, heads + half), [(heads, *tail)]),
        lambda: (values.Scale(0.25), [(heads, *tail)]),
    ]
    return draw(st.sampled_from(makers))()


@st.composite
def parts_of(draw: st.DrawFn) -> tuple[Op, list[tuple[int, ...]]]:
    """Parts of one to three tensors, each with a pipeline of none to three operations on one tensor that fit it."""
    lists: list[tuple[Op, ...]] = []
    shapes: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(1, 3))):
        heads, half, width = draw(HEADS), draw(st.integers(1, 3)), draw(st.integers(1, 4))
        rows = 2 * heads * half
        cut: tuple[Op, ...] = (moves.Split(0, (heads, rows - heads)), moves.Concat(0))
        nested: tuple[Op, ...] = (cut[0], Parts(((values.Scale(2.0),), ())), cut[1])
        rope, sign = moves.PermuteRope(heads), moves.NegateHalf(heads)
        choices: list[tuple[Op, ...]] = [(), (rope,), (rope, sign, moves.Transpose()), cut, nested]
        lists.append(draw(st.sampled_from(choices)))
        shapes.append((rows, width))
    return Parts(tuple(lists)), shapes


@settings(max_examples=400, deadline=None)
@given(st.one_of(reversible(), parts_of()), st.sampled_from(["float32", "bfloat16"]), st.integers(0, 3))
def test_inverse_undoes_apply(case: tuple[Op, list[tuple[int, ...]]], dtype: str, ranks: int) -> None:
    op, shapes = case
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(s).astype(value_dtype(dtype)).view(raw_dtype(dtype)) for s in shapes]
    lazies = [joined(a, dtype, ranks) for a in arrays]
    out = op.apply(lazies)
    assert [x.shape for x in out] == op.shape(shapes)
    again = [Lazy.of(streamed(x), dtype) for x in out]
    back = op.inverse(shapes).apply(again)
    assert [x.shape for x in back] == shapes
    for x, a in zip(back, arrays, strict=True):
        assert np.array_equal(streamed(x), a)


def joined(array: Array, dtype: str, ranks: int) -> Lazy:
    """The same values as several pieces, as rank files hold them."""
    if ranks < 2 or array.shape[0] < ranks:
        return Lazy.of(array, dtype)
    cut = [Lazy.of(a, dtype) for a in np.array_split(array, ranks)]
    return cut[0].concat(cut[1:], 0)


def streamed(x: Lazy) -> Array:
    """The values as the writer sees them: tiny blocks, in order."""
    raw = b"".join(block.tobytes() for block in x.blocks(16))
    return np.frombuffer(raw, raw_dtype(x.dtype)).reshape(x.shape)


def test_pipelines_invert_in_reverse_order() -> None:
    ops = (moves.PermuteRope(heads=2), moves.Transpose(), moves.Split(1, (4, 4)))
    x = numbered(8, 3)
    out = [Lazy.of(x, "float32")]
    for op in ops:
        out = op.apply(out)
    for op in invert(ops, [x.shape], "float32"):
        out = op.apply(out)
    assert out[0].read().tolist() == x.tolist()


@pytest.mark.parametrize("op", [values.Slice(0, 1), values.Add(1.0), values.Cast("bfloat16"), values.Scale(0.3)])
def test_one_way_operations_stop_a_reversal(op: Op) -> None:
    with pytest.raises(OpError, match="cannot be undone"):
        invert((op,), [(2, 2)], "float32")


def test_factors_that_are_gone_stop_a_reversal() -> None:
    with pytest.raises(OpError, match="dequantize cannot be undone"):
        invert((quantised.Dequantize(128),), [(256, 2), (2, 1)], "float8_e4m3fn")


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (moves.Transpose(), (3,)),
        (moves.PermuteRope(heads=3), (8, 2)),
        (moves.PermuteRope(heads=2, rotary=3), (8, 2)),
        (moves.NegateHalf(heads=4), (4,)),
        (moves.Reshape((4, 4)), (3, 5)),
        (moves.Split(0, (1, 2)), (4, 2)),
        (moves.DeinterleaveQkv(4, 2), (9, 2)),
        (moves.DeinterleaveQkv(3, 2), (7, 2)),
        (moves.ReorderHeads(6, 4), (6, 2)),
        (moves.Unstack(0, 3), (2, 2)),
        (values.Slice(0, 5), (4,)),
        (values.Pad(0, 3), (4,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(op: Op, shape: tuple[int, ...]) -> None:
    with pytest.raises(OpError):
        trace((op,), [shape], "float32")


def test_each_part_gets_its_own_operations() -> None:
    fused = tall(14)  # q: two heads of four rows, k: one, v: two rows
    ops = (moves.Split(0, (8, 4, 2)), Parts(((moves.PermuteRope(2),), (moves.PermuteRope(1),), ())))

    q, k, v = (run_all(ops, fused)[i][:, 0].tolist() for i in range(3))

    assert q == [0, 2, 1, 3, 4, 6, 5, 7]
    assert k == [8, 10, 9, 11]
    assert v == [12, 13]
    back = invert(ops, [fused.shape])
    assert back[0] == Parts(((moves.PermuteRope(2, back=True),), (moves.PermuteRope(1, back=True),), ()))
    assert back[1] == moves.Concat(0)


def run_all(ops: tuple[Op, ...], *arrays: Array) -> list[Array]:
    out = [Lazy.of(a, str(a.dtype)) for a in arrays]
    for op in ops:
        out = op.apply(out)
    return [x.read() for x in out]


@pytest.mark.parametrize(
    "op",
    [
        moves.PermuteRope(1), moves.NegateHalf(1), moves.Reshape((-1,)), moves.DeinterleaveQkv(2, 1),
        moves.ReorderHeads(4, 2), values.Slice(0, 1), values.Pad(0, 8), values.Add(1.0), values.Scale(2.0),
        values.Cast("float16"),
    ],
)  # fmt: skip
def test_an_operation_with_arguments_is_never_spread_over_several_tensors(op: Op) -> None:
    assert isinstance(op, Single)
    with pytest.raises(OpError, match=f"{op.name} takes one tensor, got 2: give each its own operations with parts"):
        trace((op,), [(4, 2), (4, 2)])
    assert len(trace((Parts(((op,), ())),), [(4, 2), (4, 2)], "float32" if op.name != "cast" else "").shapes[-1]) == 2


def test_an_operation_without_arguments_goes_to_each() -> None:
    assert trace((moves.Transpose(),), [(4, 2), (3, 2)]).shapes[-1] == [(2, 4), (2, 3)]


def test_parts_that_do_not_fit_are_refused_and_told() -> None:
    half = Parts(((values.Cast("float16"),), ()))
    for ops, says in (
        (Parts(((),)), "parts: 1 lists of operations for 2 tensors"),
        (Parts(((), (moves.PermuteRope(3),))), r"parts: in list 2, permute_rope: \[4, 2\] does not split into 3 heads"),
        (Parts(((), (moves.Split(0, (1, 3)),))), "parts: list 2 makes 2 tensors of one"),
        (half, "parts: one comes out as float16, another as float32"),
    ):
        with pytest.raises(OpError, match=says):
            trace((ops,), [(4, 2), (4, 2)], "float32")
    lossy = Parts(((values.Add(1.0),), (values.Scale(0.3), values.Add(2.0))))
    with pytest.raises(OpError, match=r"^add, scale cannot be undone exactly"):
        invert((lossy,), [(4, 2), (4, 2)])


def test_parts_are_described_and_revived() -> None:
    inner = (moves.Split(0, (1, 3)), Parts(((values.Scale(0.5),), ())), moves.Concat(0))
    op = Parts(((moves.PermuteRope(2, 4),), inner, ()))

    told = json.loads(json.dumps(describe_op(op)))

    assert told["parts"][0] == [{"op": "permute_rope", "heads": 2, "rotary": 4, "back": False}]
    assert revive_op(told) == op


def test_kinds_are_taken_out_of_parts_too() -> None:
    rope = moves.PermuteRope(2)
    assert without((values.Add(1.0), Parts(((rope, values.Scale(2.0)), ()))), values.Add, values.Scale) == (
        Parts(((rope,), ())),
    )


def test_a_large_transpose_is_read_in_bounded_blocks() -> None:
    x = Lazy.of(numbered(512, 512), "float32").transpose(1, 0)
    sizes = [block.nbytes for block in x.blocks(1 << 14)]
    assert max(sizes) <= 1 << 14
    assert sum(sizes) == x.nbytes

"""Turned copies hold what numpy's own copies hold, whatever the shape, the order and the width of the values."""

from __future__ import annotations

import math
import random
import threading
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl.mappings import turning
from mdl.mappings.turning import Array, copy_turned

WIDTHS = ["uint8", "uint16", "float32", "float64"]


def filled(shape: tuple[int, ...], dtype: str) -> Array:
    """Random bytes, so that NaN of every kind are among them."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    return np.random.default_rng(0).integers(0, 256, nbytes, "uint8").view(dtype).reshape(shape)


def same(view: Array) -> bool:
    out = filled(view.shape, str(view.dtype))
    copy_turned(view, out)
    return out.tobytes() == np.ascontiguousarray(view).tobytes()


@st.composite
def views(draw: st.DrawFn) -> Array:
    """A permuted cut of an array, perhaps with every second value left out, perhaps repeated."""
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 13]), max_size=5)))
    array = filled(shape, draw(st.sampled_from(WIDTHS)))
    cut = array[tuple(slice(draw(st.integers(0, 1)), None, draw(st.integers(1, 2))) for _ in shape)]
    if draw(st.booleans()):
        cut = np.broadcast_to(cut[..., None], (*cut.shape, draw(st.integers(0, 3))))
    return cut.transpose(draw(st.permutations(range(cut.ndim))))


@settings(max_examples=600, deadline=None)
@given(views(), st.integers(1, 5))
def test_any_view_in_many_small_tiles(view: Array, edge: int) -> None:
    with mock.patch.multiple(turning, TILE=edge**2, WIDE=edge, _SMALL=0):
        assert same(view)


@settings(max_examples=300, deadline=None)
@given(views(), st.randoms(), st.integers(1, 5))
def test_into_part_of_a_larger_array_in_any_order(view: Array, rng: random.Random, edge: int) -> None:
    order = rng.sample(range(view.ndim), view.ndim)
    whole = filled(tuple(view.shape[k] + 2 for k in order), str(view.dtype))
    before = whole.copy()
    inside = (slice(1, -1),) * view.ndim
    with mock.patch.multiple(turning, TILE=edge**2, WIDE=edge, _SMALL=0):
        copy_turned(view, whole[inside].transpose(np.argsort(order).tolist()) if order else whole[()].reshape(()))
    before[inside] = view.transpose(order)
    assert view.ndim == 0 or whole.tobytes() == before.tobytes()


@settings(max_examples=200, deadline=None)
@given(views())
def test_any_view_as_it_comes(view: Array) -> None:
    assert same(view)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("shape", [(600, 1030), (1030, 600), (1024, 1024), (3, 70_001), (70_001, 3)], ids=str)
def test_matrices_of_several_tiles(shape: tuple[int, int], dtype: str) -> None:
    array = filled(shape, dtype)
    assert same(array.T)
    assert same(array[1:, 1:-1].T)
    assert same(array)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_rotary_pairs_of_a_transposed_matrix(dtype: str) -> None:
    """Rows of q in pairs, turned into halves and back, on a matrix that is stored the other way round."""
    array = filled((300, 3 * 128), dtype)
    heads = array.T.reshape(3, 64, 2, 300)
    assert same(heads.transpose(0, 2, 1, 3))
    assert same(array.reshape(300, 3, 64, 2).transpose(0, 1, 3, 2))
    assert same(array.reshape(300, 3, 64, 2).transpose(1, 2, 0, 3))  # pairs stay together


def test_values_at_odd_addresses() -> None:
    array = np.frombuffer(filled((400 * 300 * 4 + 1,), "uint8"), "float32", offset=1).reshape(400, 300)
    assert same(array.T)
    assert same(array.reshape(400, 150, 2).transpose(1, 0, 2))


def test_what_does_not_fit_is_refused() -> None:
    view = filled((4, 6), "float32").T
    for out in (np.empty((4, 6), "float32"), np.empty((6, 4), "uint32")):
        with pytest.raises(ValueError, match="can't take"):
            copy_turned(view, out)


def test_threads_have_buffers_of_their_own() -> None:
    array = filled((700, 900), "float32")
    told: list[bool] = []
    threads = [threading.Thread(target=lambda: told.extend(same(array.T) for _ in range(5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [True] * 20

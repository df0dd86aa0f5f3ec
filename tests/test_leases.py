"""A file that is mapped can't be cut meanwhile, and nobody waits for us for long."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from mdl.convert.leases import Lease
from mdl.convert.stored import Files
from mdl.errors import MdlError
from mdl.mappings.tensors import TensorInfo

VALUES = np.arange(300 * 500, dtype=np.float32).reshape(300, 500)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"head" * 1500 + VALUES.tobytes())
    return path


def stored(path: Path) -> TensorInfo:
    return TensorInfo("w", VALUES.shape, "float32", str(path), 6000, (500, 1), "w")


@pytest.fixture
def lease(weights: Path) -> Lease:
    lease = Lease(os.open(weights, os.O_RDONLY))
    with lease.mapped(0, 4) as held:
        if held is None:
            pytest.skip("this file system gives no leases")
    return lease


def test_the_bytes_are_those_of_the_place(lease: Lease) -> None:
    for row in (0, 7, 299):
        with lease.mapped(6000 + row * 2000, 2000) as held:
            assert held is not None
            assert bytes(held) == VALUES[row].tobytes()


def test_no_map_of_what_the_file_does_not_hold(lease: Lease) -> None:
    with lease.mapped(6000, VALUES.nbytes) as held:
        assert held is not None
    with lease.mapped(6000, VALUES.nbytes + 1) as held:
        assert held is None


def test_no_map_of_a_file_that_is_being_written(weights: Path, lease: Lease) -> None:
    with weights.open("r+b"), lease.mapped(0, 4) as held:
        assert held is None


def test_whoever_cuts_the_file_waits_for_the_block_and_the_next_is_not_mapped(weights: Path, lease: Lease) -> None:
    cutter = threading.Thread(target=os.truncate, args=(weights, 6000))
    with lease.mapped(6000, VALUES.nbytes) as held:
        assert held is not None
        cutter.start()
        cutter.join(0.3)
        assert cutter.is_alive()
        with lease.mapped(6000, VALUES.nbytes) as second:
            assert second is None
        assert bytes(held[-2000:]) == VALUES[-1].tobytes()
    cutter.join(10)
    assert not cutter.is_alive()
    assert weights.stat().st_size == 6000


def test_threads_hold_it_together(weights: Path, lease: Lease) -> None:
    inside, leave = threading.Barrier(3), threading.Event()

    def hold() -> None:
        with lease.mapped(6000, VALUES.nbytes) as held:
            assert held is not None
            inside.wait(10)
            leave.wait(10)

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    with pytest.raises(BlockingIOError):
        os.open(weights, os.O_RDWR | os.O_NONBLOCK)
    leave.set()
    for thread in threads:
        thread.join(10)
    os.close(os.open(weights, os.O_RDWR | os.O_NONBLOCK))


@pytest.mark.parametrize("given", [True, False], ids=["leased", "read"])
def test_a_matrix_is_turned_to_the_same_values(weights: Path, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not given:
        monkeypatch.setattr(fcntl, "F_RDLCK", -1)
    with Files() as files:
        turned = files.tensor(stored(weights)).transpose(1, 0)
        assert np.array_equal(turned.read(), VALUES.T)
        assert np.array_equal(turned.slice(0, 3, 90).read(), VALUES.T[3:90])


def test_a_matrix_that_was_cut_is_refused(weights: Path) -> None:
    with Files() as files:
        turned = files.tensor(stored(weights)).transpose(1, 0)
        assert np.array_equal(turned.read(), VALUES.T)
        os.truncate(weights, 7000)
        with pytest.raises(MdlError, match="became shorter"):
            turned.read()

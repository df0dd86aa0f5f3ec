"""Small working memory that is used again and again: fresh memory costs a page fault for every 4 KiB."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Scratch(threading.local):
    """Buffers by name, a set of its own for every thread. What one holds is valid until its name is asked for again."""

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}

    def take(self, name: str, count: int, dtype: str | np.dtype[Any]) -> Array:
        """``count`` values of ``dtype``, one dimension, holding whatever was there before."""
        nbytes = count * np.dtype(dtype).itemsize
        if name not in self._held or self._held[name].size < nbytes:
            self._held.pop(name, None)  # first, or both would take memory; by doubling, or many would be left behind
            self._held[name] = np.empty(1 << max(nbytes - 1, 0).bit_length(), "uint8")
        return self._held[name][:nbytes].view(dtype)

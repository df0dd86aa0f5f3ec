"""pytest's side of mdl: fixtures to prove layouts in a test suite. Importing it loads nothing but pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .client import Engine
    from .report import Report


@pytest.fixture(scope="session")
def mdl_engine() -> Iterator[Engine]:
    """One vLLM process for the whole session. Without vLLM the tests that ask for it end in an error."""
    from .client import Engine

    with Engine() as engine:
        yield engine


@pytest.fixture
def assert_parity(mdl_engine: Engine) -> Callable[..., Report]:
    """:func:`mdl.validate.assert_parity` on the session's engine: ``assert_parity(layout, reference=…)``."""
    from . import assert_parity

    return partial(assert_parity, engine=mdl_engine)

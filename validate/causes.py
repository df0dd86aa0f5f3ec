"""What stopped a worker of vLLM. vLLM itself says that one failed, and to look for the root cause in its log.

The process that starts the workers names a file in an environment variable, which they inherit; who fails writes there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

CAUSE = "MDL_CAUSE"
"""The environment variable."""


class WorkerError(Exception):
    """What ended a worker, with the type that it had there."""


@contextmanager
def causes() -> Generator[None]:
    """Around the start of workers: raises what one of them left, in place of vLLM's remark that there was something."""
    with tempfile.NamedTemporaryFile(prefix="mdl-cause-") as file:
        os.environ[CAUSE] = file.name
        try:
            yield
        except Exception as error:
            cause = Path(file.name).read_text(encoding="utf-8")
            if "root cause" not in str(error) or not cause:
                raise
            raise WorkerError(cause) from error
        finally:
            del os.environ[CAUSE]


@contextmanager
def left() -> Generator[None]:
    """Around what a worker does: leaves the exception for :func:`causes`."""
    try:
        yield
    except Exception as error:
        if CAUSE in os.environ:
            Path(os.environ[CAUSE]).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise

"""mdl in other people's test suites: ``assert_parity`` and the pytest plugin that lends it one engine."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mdl.errors import Kind, MdlError
from mdl.validate import assert_parity
from mdl.validate.client import Engine

from . import servable as make

ROOT = Path(__file__).parent.parent

SUITE = """
from pathlib import Path

def test_right(assert_parity):
    assert assert_parity({good!r}).ok

def test_wrong(assert_parity):
    assert_parity({bad!r}, seed=3)

def test_one_engine_for_all(mdl_engine, assert_parity):
    assert mdl_engine.pid == mdl_engine.ping()["pid"]
    assert assert_parity.keywords["engine"] is mdl_engine
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right layout of a nanoGPT checkpoint."""
    folder = tmp_path_factory.mktemp("good")
    return make.layout(make.nanogpt(folder / "ckpt.pt"), folder / "out")


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with one bias changed."""
    folder = tmp_path_factory.mktemp("bad")
    out = make.layout(make.nanogpt(folder / "ckpt.pt"), folder / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.bias"] *= 1.5
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_the_entry_point_names_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plugin = import_module(project["entry-points"]["pytest11"]["mdl"])

    assert {"mdl_engine", "assert_parity"} <= vars(plugin).keys()


def test_the_page_template_is_in_the_wheel() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "*.html" in data["mdl.validate"]


def test_importing_the_plugin_costs_nothing() -> None:
    code = "import sys, pytest; before = set(sys.modules); import mdl.validate.plugin\n"
    code += "print(sorted(n for n in set(sys.modules) - before if not n.startswith('mdl')))\n"
    code += "print(sorted(n for n in sys.modules if n.startswith('mdl')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new, ours = done.stdout.splitlines()

    assert new == "[]"
    assert ours == "['mdl', 'mdl.validate', 'mdl.validate.plugin']"


@pytest.mark.engine
def test_a_right_layout_gives_its_report(good: Path, engine: Engine) -> None:
    report = assert_parity(good, engine=engine, seed=2)

    assert report.ok
    assert report.seed == 2


@pytest.mark.engine
def test_a_wrong_layout_fails_with_the_table(bad: Path, engine: Engine) -> None:
    with pytest.raises(AssertionError, match="NOT the same model") as caught:
        assert_parity(str(bad), engine=engine)

    assert "prefill" in str(caught.value)
    assert "FAIL" in str(caught.value)


def test_what_can_not_be_verified_is_no_failed_assertion(tmp_path: Path, good: Path) -> None:
    with pytest.raises(MdlError) as caught:
        assert_parity(tmp_path)
    assert caught.value.kind is Kind.INPUT


@pytest.mark.engine
def test_the_fixtures_work_in_a_suite_of_its_own(good: Path, bad: Path, tmp_path: Path, engine: Engine) -> None:
    engine.ping()  # skips where there is no vLLM
    (tmp_path / "test_layouts.py").write_text(SUITE.format(good=str(good), bad=str(bad)))
    # Loaded by name and not by entry point, so that the test holds in an environment installed before it existed.
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "mdl.validate.plugin", "-q", "--tb=short", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "AssertionError: NOT the same model" in done.stdout

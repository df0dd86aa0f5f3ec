"""Mistakes in a user's own family: told of their file and line, as errors of the input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdl.archs import targets
from mdl.archs.registry import load_arch
from mdl.convert.prepare import Options, Prepared, prepare
from mdl.errors import Kind, MdlError
from mdl.validate.reference import builtin_reference

from . import checkpoints as make
from .family import stub_target, write_family


@pytest.fixture(autouse=True)
def target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_spec", {"MadeUp": stub_target({"b": (2, 3)})}.get)


def family(folder: Path, *changes: tuple[str, str]) -> Path:
    path = write_family(folder, "rename: {a: b}\n")
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def prepared(folder: Path, *changes: tuple[str, str]) -> Prepared:
    torch.save({"a": torch.ones(2, 3)}, folder / "x.pt")
    return prepare(folder / "x.pt", Options(arch=str(family(folder, *changes))))


def refusal(folder: Path, *changes: tuple[str, str]) -> str:
    with pytest.raises(MdlError) as caught:
        prepared(folder, *changes)
    assert caught.value.kind is Kind.INPUT
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "says", "line"),
    [
        (("def dims(m):", "def dims():"), "dims(measure) raised TypeError", 5),
        (("    m.set(\"heads\"", "    m.inventory.nothing\n    m.set(\"heads\""), "raised AttributeError", 7),
        (("detect=lambda inv:", "detect=lambda:"), "detect(inventory) raised TypeError", 15),
        (("detect=lambda inv: ['w']", "detect=lambda inv: 'w'"), "detect returned str", 0),
        (("d[\"tied\"]", "d[\"tide\"]"), "hf_config(dims) raised KeyError: 'tide'", 18),
        (("\"architectures\"", "\"classes\""), "hf_config returned no dict with architectures", 0),
        (("def dims(m):", "def dims(m)"), "raised SyntaxError", 5),
    ],
)  # fmt: skip
def test_a_mistake_is_told_of_the_users_file_and_line(
    change: tuple[str, str], says: str, line: int, tmp_path: Path
) -> None:
    message = refusal(tmp_path, change)

    assert says in message
    assert str(tmp_path / "made_up.py") + (f":{line}" if line else "") in message


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (None, "raised ModuleNotFoundError"),
        ("other = 1\n", "raised AttributeError"),
        ("import torch\ndef build(path):\n    return torch.load(path)\n", "build(dims)"),
        ("def build(dims):\n    return 3\n", "returned int"),
        ("import torch\ndef build(dims):\n    return torch.nn.Linear(2, 3)\n", "its state_dict must have"),
    ],
)
def test_an_eager_module_that_does_not_fit_is_the_users_too(code: str | None, says: str, tmp_path: Path) -> None:
    name = f"eager_{abs(hash(code))}"
    if code is not None:
        (tmp_path / f"{name}.py").write_text(code)
    p = prepared(tmp_path, ('eager=""', f'eager="{name}:build"'))

    with pytest.raises(MdlError) as caught:
        builtin_reference(p.arch, p.dims, p.plan)

    assert caught.value.kind is Kind.INPUT
    assert says in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    if "torch.load" in (code or ""):
        assert f"{name}.py:3" in str(caught.value)


def test_a_users_reference_goes_by_the_name_of_its_module(tmp_path: Path) -> None:
    (tmp_path / "named_eager.py").write_text(
        "import torch\n"
        "class M(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.a = torch.nn.Parameter(torch.zeros(2, 3))\n"
        "def build(dims):\n    return M()\n"
    )
    p = prepared(tmp_path, ('eager=""', 'eager="named_eager:build"'))

    assert builtin_reference(p.arch, p.dims, p.plan).name == "named_eager:build of made_up.py"
    with pytest.raises(MdlError, match="dims settle no context"):
        p.dims.integer("context")


def test_no_config_json_is_called_so(tmp_path: Path) -> None:
    torch.save(make.nanogpt_state(), tmp_path / "x.pt")
    with pytest.raises(MdlError, match=r"no config\.json with architectures") as caught:
        prepare(tmp_path / "x.pt", Options(arch="huggingface"))
    assert caught.value.kind is Kind.INPUT
    assert "KeyError" not in str(caught.value)


def test_mdls_own_families_are_not_wrapped() -> None:
    assert load_arch("nanogpt").file == ""

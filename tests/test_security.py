"""SECURITY.md, held to: where in the package code could run that a file names, and why each such place is harmless."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdl.convert import (
    beside,
    dcp,
    dcp_metadata,
    inert,
    inventory,
    pickle_globals,
    pieces,
    plain,
    safetensors_file,
    unpickle,
    vet,
)
from mdl.mappings.tensors import MAX_DIMS

ROOT = Path(__file__).parent.parent
ROOMS = ("archs", "convert", "drafting", "mappings", "validate")

# What can run code that comes from outside; a name that ends in a dot or a star stands for all that begin so.
DANGEROUS = (
    "eval", "exec", "compile", "__import__", "code.", "codeop.", "runpy.", "marshal.", "shelve.", "joblib.", "dill.",
    "pickle.load*", "pickle.Unpickler", "pickle._Unpickler", "_pickle.", "cloudpickle.", "torch.load", "torch.jit.",
    "torch.hub.", "torch.package.", "numpy.load", "yaml.load*", "yaml.full_load*", "yaml.unsafe_load*", "yaml.Loader",
    "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader", "os.system", "os.popen", "os.exec*", "os.spawn*",
    "os.posix_spawn*", "os.fork*", "pty.", "ctypes.", "subprocess.", "multiprocessing.", "importlib.import_module",
    "importlib.reload", "importlib.metadata.entry_points", "importlib.util.spec_from_file_location",
    "importlib.util.module_from_spec", "exec_module", "trust_remote_code",
)  # fmt: skip

CLOSED = "a subclass whose find_class is a closed table"
CHILD = "a program of ours or of the machine, with a list of arguments that no checkpoint fills"
NAMED = "runs a file that the user named on the command line"
OURS = "imports a module of the package, or one that an arch file names as its forward"
INSTALLED = "installed packages that declare an entry point of mdl"

ALLOWED = {
    ("convert/unpickle.py", "pickle.Unpickler"): CLOSED,
    ("convert/unpickle.py", "pickle._Unpickler"): CLOSED,
    ("convert/tok_char.py", "pickle.Unpickler"): CLOSED,
    ("archs/registry.py", "importlib.import_module"): f"{OURS}; {INSTALLED}",
    ("archs/installed.py", "importlib.metadata.entry_points"): INSTALLED,
    ("archs/own_file.py", "importlib.import_module"): f"--arch PACKAGE/FILE.py: {NAMED}",
    ("archs/own_file.py", "importlib.util.spec_from_file_location"): f"--arch FILE.py: {NAMED}",
    ("archs/own_file.py", "importlib.util.module_from_spec"): f"--arch FILE.py: {NAMED}",
    ("archs/own_file.py", "exec_module"): f"--arch FILE.py: {NAMED}",
    ("archs/guard.py", "importlib.import_module"): OURS,
    ("watched.py", "os.fork*"): "this program goes on in a child of its own",
    ("watched.py", "ctypes."): "asks Linux to end that child with its parent",
    ("validate/record.py", "importlib.util.spec_from_file_location"): f"--reference: {NAMED}",
    ("validate/record.py", "importlib.util.module_from_spec"): f"--reference: {NAMED}",
    ("validate/record.py", "exec_module"): f"--reference: {NAMED}",
    ("validate/record.py", "ctypes."): "the memory of a tensor of ours, written to a file without a copy",
    ("validate/golden.py", "subprocess."): f"--reference-python: {NAMED}",
    ("validate/child.py", "subprocess."): CHILD,
    ("validate/doctor.py", "subprocess."): CHILD,
    ("validate/doctor.py", "importlib.metadata.entry_points"): "lists names only",
    ("validate/doctor_own.py", "subprocess."): CHILD,
    ("serve.py", "subprocess."): CHILD,
}


def found_in(source: str) -> set[str]:
    """The dangerous names that a module uses, under whatever alias; each as DANGEROUS spells it."""
    tree = ast.parse(source)
    alias = dict(pair for node in ast.walk(tree) for pair in _imported(node))
    used = {*alias.values(), *(name for node in ast.walk(tree) for name in _used(node, alias))}
    return {danger for danger in DANGEROUS for name in used if _is(name, danger)}


def _is(name: str, danger: str) -> bool:
    prefix = danger.removesuffix("*")
    return name.startswith(prefix) if prefix != danger or danger.endswith(".") else name == danger


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Each local name that an import makes, and what it stands for."""
    if isinstance(node, ast.Import):
        for name in node.names:
            yield (name.asname, name.name) if name.asname else (name.name.partition(".")[0],) * 2
    elif isinstance(node, ast.ImportFrom) and not node.level:
        for name in node.names:
            yield name.asname or name.name, f"{node.module}.{name.name}"


def _used(node: ast.AST, alias: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield alias.get(node.id, node.id)
    elif isinstance(node, ast.Attribute):
        yield _dotted(node, alias)
        if node.attr in ("exec_module", "trust_remote_code"):  # of whatever object
            yield node.attr
    elif isinstance(node, ast.keyword) and node.arg:
        yield node.arg
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "trust" in node.value:
        yield node.value.replace("-", "_").strip("_")  # a key, or an option of a command


def _dotted(node: ast.expr, alias: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, alias)}.{node.attr}"
    return alias.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def sources() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])


def test_code_can_run_only_where_it_is_known_to_and_why() -> None:
    found = {(str(path.relative_to(ROOT)), name) for path in sources() for name in found_in(path.read_text())}

    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\ntorch.load(p)", "torch.load"),
        ("import torch as t\nt.load(p, weights_only=False)", "torch.load"),
        ("from torch import load\nload(p)", "torch.load"),
        ("import pickle\npickle.load(f)", "pickle.load*"),
        ("from pickle import loads as read", "pickle.load*"),
        ("import yaml\nyaml.load(f, yaml.SafeLoader)", "yaml.load*"),
        ("from yaml import unsafe_load", "yaml.unsafe_load*"),
        ("eval(text)", "eval"),
        ("f = exec", "exec"),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", "numpy.load"),
        ("import os\nos.system(c)", "os.system"),
        ("import os\nos.execvp(c, [])", "os.exec*"),
        ("LLM(model, trust_remote_code=True)", "trust_remote_code"),
        ("['--trust-remote-code']", "trust_remote_code"),
        ("{'trust_remote_code': True}", "trust_remote_code"),
        ("import importlib\nimportlib.import_module(n)", "importlib.import_module"),
        ("spec.loader.exec_module(m)", "exec_module"),
    ],
)
def test_the_search_finds(source: str, name: str) -> None:
    assert name in found_in(source)


def test_the_search_does_not_cry_wolf() -> None:
    assert not found_in("model.eval()\nimport re\nre.compile(x)\nimport yaml\nyaml.safe_load(t)\nself.load(p)")


def test_the_bounds_are_those_in_the_page() -> None:
    page = " ".join((ROOT / "SECURITY.md").read_text().split())
    for bound in (
        f"{unpickle.MAX_PICKLE >> 30} GiB of pickle",
        f"{vet.MAX_HASHED:,} values in a key",
        f"{vet.MAX_HASHED_ALL:,} in all keys together",
        f"{pickle_globals.MAX_KEY:,} where a function makes the table",
        f"{vet.MAX_INT:,} bytes for one number",
        f"{vet.MAX_SETS:,} sets",
        f"{unpickle.MAX_GLOBALS:,} names of classes",
        f"{inert.MAX_ARGS:,} arguments of a function",
        f"{unpickle.SPARE >> 20} MiB and {unpickle.FACTOR} times the pickle",
        f"{safetensors_file.MAX_HEADER // 1_000_000} MB of safetensors header",
        f"{MAX_DIMS} dimensions",
        f"{inventory.MAX_NESTED} tables of tensors within each other",
        f"{inventory.MAX_VISITED:,} entries in them",
        f"{inventory.MAX_NAME:,} characters of a tensor's name",
        f"{plain.MAX_VALUES:,} values in a setting, {plain.MAX_DEPTH} of them within each other",
        f"straight cuts within each other up to {pieces.MAX_CUTS} deep, {dcp_metadata.MAX_PATH} tables around a tensor",
        f"{dcp.MAX_OBJECT >> 20} MiB for an object that is no tensor",
        f"{beside.MAX_JSON >> 20} MiB of JSON",
        f"{beside.MAX_YAML >> 10} KiB of YAML",
    ):
        assert bound in page, bound


def test_the_readme_leads_to_the_page() -> None:
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text()

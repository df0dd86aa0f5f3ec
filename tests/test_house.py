"""The rules of the house that a program can check. A rule without a test is a wish."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from mdl.archs.registry import all_archs, mapping_path

ROOT = Path(__file__).parent.parent
ROOMS = ["errors", "mappings", "archs", "convert", "drafting", "validate", "serve", "cli"]
BESIDE = {
    "render": {"errors", "mappings"},
    "views": {"errors", "mappings", "archs", "convert", "validate", "render"},
    "inspecting": {"errors", "mappings", "archs", "convert", "render"},
    "options": {"errors", "convert"},
    "verifying": {"errors", "convert", "validate", "program", "render", "views"},
    "new": {"drafting", "render"},
    "program": {"errors", "render"},
    "watched": {"errors"},
}
LONGER = {"record.py": 450}  # works as one copied file on a cluster, so it can't be split
HEAVY = ["torch", "transformers", "vllm"]


def sources() -> list[Path]:
    tops = [p for p in ROOT.glob("*.py") if p.name != "__init__.py"]
    rooms = [
        p for room in ("mappings", "archs", "convert", "drafting", "validate") for p in (ROOT / room).rglob("*.py")
    ]
    return sorted(tops + rooms)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports from, by its relative imports at whatever depth."""
    depth = len(path.relative_to(ROOT).parts) - 1
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        if node.level == depth + 1:  # reaches the root package
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            found |= set(names)
    return found - {room_of(path), "__version__"}  # the package's own, for everybody


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_left_never_imports_right(path: Path) -> None:
    room = room_of(path)
    if room in BESIDE:
        allowed = BESIDE[room]
    elif room == "cli":
        allowed = {*ROOMS, *BESIDE}
    else:
        allowed = set(ROOMS[: ROOMS.index(room)])
    assert imported_rooms(path) <= allowed


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_engine_its_adapters_and_served_models_import_vllm(path: Path) -> None:
    named = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    uses = any(name.split(".")[0] == "vllm" for name in named)
    allowed = path.parent == ROOT / "validate" and path.name in ("engine.py", "adapt.py")
    assert not uses or allowed or (ROOT / "archs" / "served") in path.parents


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGER.get(path.name, 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is longer than 60 lines"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_exception_to_a_lint_rule_gives_its_reason(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        comment = re.search(r"#\s*(noqa|type: ignore|pyright:)", line)
        if comment:
            assert re.search(r"#\s*(noqa: [A-Z0-9, ]+|type: ignore\[[\w-]+\]|pyright: \S+)\s*(#|\(|-|–)\s*\w", line), (
                f"line {number}: {line.strip()}"
            )


def test_root_package_holds_a_docstring_and_the_version_only() -> None:
    what, version = ast.parse((ROOT / "__init__.py").read_text()).body
    assert isinstance(what, ast.Expr)
    assert isinstance(version, ast.Assign)
    assert isinstance(version.value, ast.Constant)
    assert version.value.value == metadata.version("mdl")


def test_every_package_folder_is_in_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {
        ".".join(["mdl", *p.parent.relative_to(ROOT).parts])
        for room in ("mappings", "archs", "convert", "drafting", "validate")
        for p in (ROOT / room).rglob("__init__.py")
    }
    assert listed == folders | {"mdl"}


@pytest.mark.parametrize("argument", ["--help", "archs"])
def test_light_commands_load_nothing_heavy(argument: str) -> None:
    code = f"""
import sys
sys.argv = ["mdl", {argument!r}]
from mdl.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_mapping_one_arch_one_test_per_family() -> None:
    mappings = {p.stem for p in (ROOT / "mappings").glob("*.yaml")}
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests" / "archs").glob("test_*.py")}
    archs = all_archs()
    assert mappings == set(archs) == tests
    for name, arch in archs.items():
        assert arch.name == name
        assert mapping_path(arch).is_file()


def test_readme_lists_the_architectures_as_mdl_archs_does() -> None:
    readme = (ROOT / "README.md").read_text()
    for arch in all_archs().values():
        assert f"| `{arch.name}` | {arch.title} | {arch.source} | {arch.target} |" in readme


def test_every_command_and_option_has_help_and_every_command_is_in_the_readme() -> None:
    import typer

    from mdl.cli import app

    readme = (ROOT / "README.md").read_text()
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]  # a group, by construction
        assert command.help, name
        assert f"mdl {name}" in readme, f"mdl {name} is not in the README"
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert getattr(parameter, "help", None), f"mdl {name} {parameter.name} has no help"


COMMANDS = {
    "inspect": {"checkpoint", "--arch", "--set", "--config", "--weights", "--merge-lora", "--json"},
    "plan": {
        "checkpoint", "--arch", "--set", "--config", "--weights", "--dtype", "--merge-lora", "--reverse", "--json",
    },
    "convert": {
        "checkpoint", "out", "--arch", "--set", "--config", "--weights", "--dtype", "--merge-lora", "--tokenizer",
        "--max-shard-size",
        "--force", "--allow-nonfinite", "--allow-flush", "--workers", "--fsync", "--part", "--ray", "--benchmark",
        "--json",
    },
    "verify": {
        "layout", "--against", "--arch", "--config", "--merge-lora", "--reference", "--reference-python",
        "--reference-timeout", "--golden", "--decide", "--set", "--weights",
        "--prompt", "--seed", "--dtype", "--tensor-parallel-size", "--pipeline-parallel-size", "--attention-backend",
        "--mutate",
        "--locate", "--junit", "--html", "--json",
    },
    "record": {
        "checkpoint", "--reference", "--out", "--reference-python", "--reference-timeout", "--arch", "--set",
        "--config", "--weights", "--dtype", "--merge-lora", "--seed", "--force", "--json",
    },
    "serve": {
        "layout", "--host", "--port", "--prompt", "--max-tokens", "--unverified", "--arch", "--set", "--config",
        "--weights", "--dtype", "--merge-lora", "--tokenizer", "--json",
    },
    "export": {"layout", "out", "--force", "--json"},
    "check": {"layout", "--json"},
    "new": {"name", "--from", "--reference", "--target", "--weights", "--force", "--json"},
    "archs": {"--json"},
    "doctor": {"name", "--json"},
}  # fmt: skip


def test_the_command_line_grows_only_on_purpose() -> None:
    import typer

    from mdl.cli import app

    group = typer.main.get_command(app)
    found = {
        name: {p.opts[0] if p.param_type_name == "option" else p.name for p in command.params} - {"--help"}
        for name, command in group.commands.items()  # type: ignore[attr-defined]  # a group, by construction
    }
    assert found == COMMANDS


def test_no_machine_paths_or_hosts_in_what_is_published() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not listed:
        pytest.skip("not a git checkout, so it is not known which files are published")
    forbidden = re.compile(r"(/root/|/work/|/tmp/w/|/opt/wheels|(?<!\.)pypi\.org|pythonhosted|registry\.npmjs)")
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".in", ".sh", ".yml", ""} and path.is_file():
            if path == Path(__file__) or path.stat().st_size > 500_000:
                continue
            found = forbidden.search(path.read_text(errors="ignore"))
            assert not found, f"{name}: {found and found[0]}"

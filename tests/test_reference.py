"""References from anywhere: whatever shape the user's forward has, in this Python, in another one, or in a file."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mdl.convert.prepare import Prepared, prepare
from mdl.errors import Kind, MdlError
from mdl.validate import record
from mdl.validate.compare import distance
from mdl.validate.golden import foreign_reference, golden_reference, record_golden
from mdl.validate.inputs import Input, Inputs, make_inputs
from mdl.validate.record import continuation
from mdl.validate.reference import Reference, builtin_reference, user_reference

from . import servable as make

VOCAB, CONTEXT = 11, 8
IDS = [3, 1, 4, 1, 5]

MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    '''A causal toy: the running mean of embeddings, through a hidden layer.'''
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.drop = nn.Dropout(0.5)

    def body(self, ids):
        if ids.shape[-1] > 8:
            raise IndexError("too long for the context")
        x = self.embed(ids)
        counts = torch.arange(1, ids.shape[-1] + 1, dtype=x.dtype)[:, None]
        x = self.drop(torch.tanh(self.hidden(x.cumsum(-2) / counts)))
        return self.head(x)
"""


def written(folder: Path, rest: str) -> str:
    """A model.py whose ``build`` is in ``rest``; the spec to name it."""
    (folder / "model.py").write_text(MODEL + rest)
    return f"{folder / 'model.py'}:build"


def exact(folder: Path) -> torch.Tensor:
    """The toy's logits of IDS in float64."""
    spec = written(folder, "def build(c):\n m = Model()\n m.forward = m.body\n return m\n")
    return user_reference(spec, Path("unused")).logits(IDS, "float64")


FORMS = {
    "a tensor": "def forward(self, ids): return self.body(ids)",
    "a tuple": "def forward(self, ids): return self.body(ids), None",
    "the loss first": "def forward(self, ids): return torch.tensor(0.0), self.body(ids)",
    "a dict": "def forward(self, ids): return {'logits': self.body(ids), 'loss': None}",
    "an object": "def forward(self, ids): return type('Out', (), {'logits': self.body(ids)})()",
    "[T, V] of a batch": "def forward(self, ids): return self.body(ids)[0]",
    "one sequence": "def forward(self, ids):\n  assert ids.dim() == 1\n  return self.body(ids)",
    "all with targets": "def forward(self, idx, targets=None):\n"
    "  x = self.body(idx)\n  return (x, 0.0) if targets is not None else (x[:, [-1]], None)",
    "labels are required": "def forward(self, ids, labels): return self.body(ids)",
    "flat with targets": "def forward(self, ids, targets=None):\n  return self.body(ids).view(-1, 11), 0.0",
    "targets give the loss": "def forward(self, ids, targets=None):\n"
    "  return self.body(ids) if targets is None else torch.tensor(1.0)",
    "the last position": "def forward(self, ids): return self.body(ids)[:, -1]",
    "the last position of one": "def forward(self, ids):\n  assert ids.dim() == 1\n  return self.body(ids)[-1]",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_forward_gives_the_same_logits(form: str, tmp_path: Path) -> None:
    body = "\n".join("    " + line for line in FORMS[form].splitlines())
    spec = written(tmp_path, f"\nclass Mine(Model):\n{body}\n\ndef build(checkpoint): return Mine()\n")
    reference = user_reference(spec, tmp_path)

    assert reference.exact
    assert reference.module is not None
    assert not reference.module.training
    got = reference.logits(IDS, "float64")
    assert got.dtype == torch.float64
    assert torch.allclose(got, exact(tmp_path), rtol=1e-12, atol=0)
    assert any("last position" in note for note in reference.notes) == ("last" in form)
    assert reference.logits([2], "float32").shape == (1, VOCAB)


def test_rounded_precisions_start_from_the_original_weights(tmp_path: Path) -> None:
    spec = written(tmp_path, "def build(c):\n m = Model()\n m.forward = m.body\n return m\n")
    reference = user_reference(spec, tmp_path)
    first = {dtype: reference.logits(IDS, dtype) for dtype in ("float32", "float64")}
    for dtype in ("bfloat16", "float16", "bfloat16"):
        rounded = reference.logits(IDS, dtype)
        assert rounded.dtype == getattr(torch, dtype)
        assert 1e-8 < reference.floor(IDS, dtype, first["float64"]).nmse < 1e-3

    for dtype, logits in first.items():
        assert torch.equal(reference.logits(IDS, dtype), logits)


def test_weights_go_through_the_type_that_the_conversion_rounded_to(tmp_path: Path) -> None:
    spec = written(tmp_path, "def build(c):\n m = Model()\n m.forward = m.body\n return m\n")
    rounded = user_reference(spec, tmp_path, rounded="bfloat16")

    assert rounded.module is not None
    rounded.logits(IDS, "float32")
    for parameter in rounded.module.parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())
    assert "rounded to bfloat16" in rounded.notes[0]


def test_a_bound_method_and_a_function_are_understood(tmp_path: Path) -> None:
    method = user_reference(written(tmp_path, "def build(c): return Model().body\n"), tmp_path)
    assert method.exact
    assert torch.allclose(method.logits(IDS, "float64"), exact(tmp_path), rtol=1e-12)

    plain = user_reference(
        written(tmp_path, "def build(c):\n m = Model().eval()\n return lambda ids: m.body(ids)\n"), tmp_path
    )
    assert not plain.exact
    assert plain.dtypes == ("float32",)
    assert "absolute ceiling" in plain.notes[-1]
    with pytest.raises(MdlError, match="can't run in bfloat16"):
        plain.logits(IDS, "bfloat16")


@pytest.mark.parametrize(
    ("body", "phrase"),
    [
        ("self.embed(ids) @ torch.ones(6, 11)", "does not run in float64: its forward on 3 tokens raised RuntimeError"),
        ("(self.embed(ids).float() @ self.head.weight.T.float())", "computes in float32 whatever"),
    ],
)
def test_without_a_float64_run_only_the_ceiling_applies_and_the_notes_say_why(
    body: str, phrase: str, tmp_path: Path
) -> None:
    spec = written(
        tmp_path, f"\nclass Mine(Model):\n    def forward(self, ids): return {body}\n\nbuild = lambda c: Mine()"
    )
    reference = user_reference(spec, tmp_path)

    assert not reference.exact
    assert "float64" not in reference.dtypes
    assert phrase in reference.notes[0]
    assert "only the absolute ceiling applies" in reference.notes[-1]
    assert reference.logits(IDS, "float32").shape == (5, VOCAB)


REFUSED = {
    "def build(c): return 3": "return a torch.nn.Module or a callable",
    "def build(c): return lambda ids: ids.float()": "shaped [B, T, V]",
    "def build(c): return lambda ids: ids": "returns torch.int64, not logits",
    "def build(c): return lambda ids: {'out': 1}": "returns NoneType, not logits",
    "def build(c): return lambda ids: torch.zeros(len(ids), 4, 11)": "returns [1, 4, 11] for 2 tokens",
    "def build(c): raise KeyError('x')": "raised KeyError",
    "def build(c): raise SystemExit(1)": "raised SystemExit",
    "import nothing_of_that_name": "raised ModuleNotFoundError",
    "x = 1": "defines no function 'build'",
    "def build(c):\n m = Model().train()\n return lambda ids: m.body(ids)": "call .eval() on every module",
    "def build(c):\n m = Model().eval()\n return lambda ids: m.body(ids).flip(-2)": "has to be causal",
    "def build(c):\n m = Model().eval()\n return lambda ids: 1 / 0": 'model.py", line',
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_can_not_be_used_says_what_to_write(body: str, tmp_path: Path) -> None:
    with pytest.raises(MdlError) as caught:
        user_reference(written(tmp_path, body + "\n"), tmp_path)

    assert caught.value.kind is Kind.INPUT
    assert REFUSED[body] in str(caught.value)


def test_a_lack_of_memory_is_the_machines_fault(tmp_path: Path) -> None:
    for error in ("MemoryError()", 'RuntimeError("DefaultCPUAllocator: can\'t allocate memory")'):
        with pytest.raises(MdlError) as caught:
            user_reference(written(tmp_path, f"def build(c): raise {error}\n"), tmp_path)
        assert caught.value.kind is Kind.MACHINE


def test_a_sequence_that_is_too_long_for_the_users_code_is_the_inputs_fault(tmp_path: Path) -> None:
    reference = user_reference(written(tmp_path, "def build(c): return Model().body\n"), tmp_path)
    with pytest.raises(MdlError, match="on 9 tokens raised IndexError: too long for the context"):
        reference.logits([0] * 9, "float32")


# --- recorded ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "context", "seed"), [(11, 8, 0), (1000, 2048, 7), (128_256, 131_072, 3), (5, 1, 1)])
def test_the_recorder_deals_what_mdl_deals(vocab: int, context: int, seed: int) -> None:
    dealt = record.deal(vocab, context, seed)
    assert [(one["kind"], tuple(one["ids"])) for one in dealt] == [
        (one.kind, one.ids) for one in make_inputs(vocab, context, seed=seed).sequences
    ]


def test_the_recorder_needs_an_old_python_and_torch_only() -> None:
    tree = ast.parse(Path(record.__file__).read_text(), feature_version=(3, 9))
    roots: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add((node.module or "").split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch"}


BARE = """
import runpy, sys
for name in ("mdl", "safetensors", "numpy", "xxhash"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def recorded(folder: Path, *arguments: str, build: str = "def build(c): return Model().body\n") -> Path:
    """Run a copy of record.py where there is nothing but torch."""
    spec = written(folder, build)
    (folder / "ckpt.bin").write_bytes(b"weights")
    script = folder / "elsewhere" / "copied.py"
    script.parent.mkdir()
    script.write_text(Path(record.__file__).read_text())
    out = folder / "golden.safetensors"
    command = [sys.executable, "-c", BARE, str(script), str(folder / "ckpt.bin"), "--reference", spec, "-o", str(out)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def assert_greedy(greedy: Input, long: tuple[int, ...], live: Reference) -> None:
    """A prompt from the long sequence, and what the reference itself finds likeliest after it."""
    prompt, count = continuation(len(long))
    assert greedy.kind == "greedy"
    assert greedy.ids[:prompt] == long[:prompt]
    assert len(greedy.ids) == prompt + count
    best = live.logits(list(greedy.ids[:-1]), "float64").argmax(-1).tolist()
    assert tuple(best[prompt - 1 :]) == greedy.ids[prompt:]


def test_one_copied_file_records_all_that_the_gate_needs(tmp_path: Path) -> None:
    out = recorded(tmp_path, "--vocab", str(VOCAB), "--context", str(CONTEXT), "--seed", "4")
    golden = golden_reference(out, files=[tmp_path / "ckpt.bin"])
    live = user_reference(str(tmp_path / "model.py") + ":build", tmp_path)

    assert golden.inputs is not None
    *dealt, greedy = golden.inputs.sequences
    assert tuple(dealt) == make_inputs(VOCAB, CONTEXT, seed=4).sequences
    assert_greedy(greedy, dealt[-1].ids, live)
    assert golden.exact
    assert not golden.free
    assert golden.notes == ()
    assert set(golden.dtypes) == {"float64", "float32", "bfloat16", "float16"}
    for one in golden.inputs.sequences:
        ids = list(one.ids)
        wide = live.logits(ids, "float64")
        assert torch.allclose(golden.logits(ids, "float64"), wide, rtol=1e-12)
        for dtype in ("float32", "bfloat16", "float16"):
            here, there = distance(live.logits(ids, dtype), wide), golden.floor(ids, dtype, wide)
            assert len(there.error) == len(ids)
            assert math.isclose(here.nmse, there.nmse, rel_tol=0.2 if dtype == "float32" else 1e-3)
            assert there.scale == pytest.approx(here.scale)
    assert list(load_file(out)) != []
    assert not out.with_name(out.name + ".partial").exists()


def test_a_recording_without_float64_holds_float32(tmp_path: Path) -> None:
    build = "def build(c):\n m = Model().eval()\n return lambda ids: m.body(ids)\n"
    golden = golden_reference(recorded(tmp_path, "--vocab", "11", "--context", "8", build=build))

    assert not golden.exact
    assert golden.dtypes == ("float32",)
    assert golden.inputs is not None
    ids = list(golden.inputs.sequences[0].ids)
    assert golden.logits(ids, "float32").dtype == torch.float32
    assert "plain callable" in golden.notes[0]


def test_a_golden_file_answers_for_its_own_tokens_only(tmp_path: Path) -> None:
    golden = golden_reference(recorded(tmp_path, "--vocab", "11", "--context", "8"))
    assert golden.inputs is not None
    with pytest.raises(MdlError, match="holds no logits of these 2 tokens"):
        golden.logits([9, 9], "float64")
    with pytest.raises(MdlError, match="holds no float32 logits"):
        golden.logits(list(golden.inputs.sequences[0].ids), "float32")


def test_other_checkpoints_and_other_files_are_noticed(tmp_path: Path) -> None:
    out = recorded(tmp_path, "--vocab", "11", "--context", "8")
    other = tmp_path / "other.bin"
    other.write_bytes(b"weightz")
    assert golden_reference(out, files=[other]).notes == (
        "the golden file was recorded from other files than other.bin",
    )

    for damage in (
        lambda data: data[:-9],
        lambda _: b"nothing",
        lambda data: data.replace(b"mdl-golden/1", b"mdl-golden/9"),
    ):
        bad = tmp_path / "bad.safetensors"
        bad.write_bytes(damage(out.read_bytes()))
        with pytest.raises(MdlError) as caught:
            golden_reference(bad)
        assert caught.value.kind is Kind.INPUT
    with pytest.raises(MdlError, match="make it with `mdl record`"):
        golden_reference(tmp_path / "none")


# --- in another Python -------------------------------------------------------------------------------------------


def golden_of(folder: Path, build: str, *, python: str | None = None, timeout: float = 120) -> dict[str, Any]:
    spec = written(folder, build)
    inputs = Inputs((Input("prompt", tuple(IDS)),), VOCAB, 0)
    return record_golden(folder / "model.py", spec, folder / "g.safetensors", inputs, python=python, timeout=timeout)


def python_that(folder: Path, does: str) -> str:
    """A stand-in for the other environment's Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("does", "phrase"),
    [
        ("kill -KILL $$", "was killed by SIGKILL"),
        ("echo some last words >&2; exit 7", "ended with 7\nsome last words"),
        ("sleep 60", "did not finish within 1 s"),
        (f'PYTHONPATH= exec {sys.executable} -S "$@"', "torch can't be imported"),
    ],
)
def test_what_happens_to_the_other_python_is_the_machines_fault(does: str, phrase: str, tmp_path: Path) -> None:
    with pytest.raises(MdlError) as caught:
        golden_of(tmp_path, "build = 1", python=python_that(tmp_path, does), timeout=1 if "sleep" in does else 60)

    assert caught.value.kind is Kind.MACHINE
    assert phrase in str(caught.value)


def test_errors_of_the_users_code_there_are_the_inputs_fault(tmp_path: Path) -> None:
    with pytest.raises(MdlError) as caught:
        golden_of(tmp_path, "def build(c):\n    print('{}')\n    raise ValueError('no such size')\n")

    assert caught.value.kind is Kind.INPUT
    assert "raised ValueError: no such size" in str(caught.value)
    assert "raise ValueError('no such size')" in str(caught.value)
    assert not (tmp_path / "g.safetensors").exists()


def test_a_crash_there_is_not_a_crash_here(tmp_path: Path) -> None:
    with pytest.raises(MdlError, match="killed by SIGSEGV") as caught:
        golden_of(tmp_path, "import os, signal\ndef build(c): os.kill(os.getpid(), signal.SIGSEGV)\n")
    assert caught.value.kind is Kind.MACHINE


def test_a_program_that_is_not_there_is_a_matter_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(MdlError, match="no such program") as caught:
        golden_of(tmp_path, "build = 1", python=str(tmp_path / "nowhere"))
    assert caught.value.kind is Kind.USAGE


def test_an_existing_golden_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "g.safetensors").write_text("mine")
    with pytest.raises(MdlError, match="exists already"):
        golden_of(tmp_path, "build = 1")
    assert (tmp_path / "g.safetensors").read_text() == "mine"


OURS = """
import torch
from mdl.archs.eager.llama_meta import build as eager
DIMS = dict(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=160, vocab=96, context=64, norm_eps=1e-5,
            rope_theta=10000.0, rope_scaling="none", tied=False)

def build(checkpoint):
    model = eager(DIMS)
    state = torch.load(checkpoint, weights_only=False)["model"]
    model.load_state_dict(state, assign=True)
    return model
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A llama2.c checkpoint, recognised and planned."""
    return prepare(make.llama2c(tmp_path_factory.mktemp("prepared") / "ckpt.pt"))


def test_another_python_gives_the_reference_that_this_one_gives(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(OURS)
    checkpoint, spec = Path(prepared.inventory.path), f"{tmp_path / 'model.py'}:build"
    prompts = [[1, 2, 3]]
    foreign = foreign_reference(spec, checkpoint, sys.executable, prepared, 5, prompts=prompts)
    ours = builtin_reference(prepared.arch, prepared.dims, prepared.plan)

    assert foreign.inputs is not None
    *dealt, greedy = foreign.inputs.sequences
    assert tuple(dealt) == make_inputs(96, 64, seed=5, prompts=prompts).sequences
    assert_greedy(greedy, dealt[-2].ids, ours)
    assert foreign.name == f"{spec}, run by {sys.executable}"
    for one in foreign.inputs.sequences:
        ids = list(one.ids)
        assert torch.allclose(foreign.logits(ids, "float64"), ours.logits(ids, "float64"), rtol=1e-9, atol=1e-12)


def test_mdls_own_errors_pass_through_as_they_are(prepared: Prepared) -> None:
    ours = builtin_reference(prepared.arch, prepared.dims, prepared.plan)
    with pytest.raises(MdlError, match="65 tokens do not fit a context of 64"):
        ours.logits([0] * 65, "float32")

"""A vLLM class of one's own: beside an arch file, where every process of vLLM is told of it, and in a package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mdl.archs.registry import load_arch
from mdl.archs.served.own import VARIABLE, own_of
from mdl.convert.config import read_config
from mdl.convert.prepare import Options, prepare
from mdl.drafting.draft import draft
from mdl.errors import Kind, MdlError
from mdl.serve import own_class
from mdl.validate.client import Engine
from mdl.validate.doctor_own import examined
from mdl.validate.ready import ready_layout
from mdl.validate.verify import Settings, verify

from . import servable

ROOT = Path(__file__).parent.parent

MODEL = '''
from vllm.model_executor.models.llama import LlamaForCausalLM


class LoomForCausalLM(LlamaForCausalLM):
    """A Llama whose logits are multiplied, as Loom's author multiplies them."""

    def compute_logits(self, hidden_states):
        logits = super().compute_logits(hidden_states)
        return None if logits is None else logits * self.config.logit_factor
'''

SCALED = """
import torch
from model import build as unscaled


class Scaled(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(ids) * 3.0


def build(checkpoint):
    return Scaled(unscaled(checkpoint))
"""


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example with a class, a model type and a config field of its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "model", raising=False)
    folder = tmp_path / "own"
    shutil.copytree(ROOT / "examples" / "own_family", folder)
    subprocess.run([sys.executable, "make.py"], cwd=folder, check=True, capture_output=True, timeout=120)
    arch = folder / "loom.py"
    text = arch.read_text().replace('["LlamaForCausalLM"]', '["LoomForCausalLM"]')
    text = text.replace('"model_type": "llama",', '"model_type": "loom_own",\n        "logit_factor": 3.0,')
    text = text.replace('target="LlamaForCausalLM"', 'target="LoomForCausalLM"')
    text = text.replace(
        'eager="loom_eager:build",',
        'eager="", reference="scaled.py:build", served="loom_vllm:LoomForCausalLM", tensors="LlamaForCausalLM",',
    )
    arch.write_text(text)
    (folder / "loom_vllm.py").write_text(MODEL)
    (folder / "scaled.py").write_text(SCALED)
    return folder


def options(family: Path) -> Options:
    return Options(arch=str(family / "loom.py"))


def refusal(kind: Kind, call: Any, *args: Any, **more: Any) -> str:
    with pytest.raises(MdlError) as caught:
        call(*args, **more)
    assert caught.value.kind is kind
    return str(caught.value)


def test_what_it_holds_is_said_by_the_arch_file(family: Path) -> None:
    checkpoint, arch = family / "ckpt.pt", family / "loom.py"
    assert not prepare(checkpoint, options(family)).plan.problems

    text = arch.read_text()
    arch.write_text(text.replace('tensors="LlamaForCausalLM"', "tensors=None"))
    said = refusal(Kind.INPUT, prepare, checkpoint, options(family))
    assert "loom does not say what its own class loom_vllm:LoomForCausalLM holds" in said
    assert "tensors=" in said

    own = "tensors=lambda d: {'model.norm.weight': (d['hidden'],), 'model.extra': (3,)}"
    arch.write_text(text.replace('tensors="LlamaForCausalLM"', own))
    problems = "\n".join(problem.what for problem in prepare(checkpoint, options(family)).plan.problems)
    assert "nothing makes model.extra [3], which the target class needs" in problems
    assert "makes lm_head.weight, which the target class does not have" in problems

    arch.write_text(text.replace('tensors="LlamaForCausalLM"', "tensors=lambda d: d['nowhere']"))
    assert "tensors(dims) raised KeyError" in refusal(Kind.INPUT, prepare, checkpoint, options(family))


def test_every_process_is_told_by_its_environment(family: Path) -> None:
    own = own_of(load_arch(str(family / "loom.py")), {"architectures": ["LoomForCausalLM"], "model_type": "loom_own"})

    assert own is not None
    told = json.loads(own.environment()[VARIABLE])
    assert (told["architecture"], told["model"]) == ("LoomForCausalLM", "loom_vllm:LoomForCausalLM")
    assert told["folder"] == str(family)
    assert own.environment()["PYTHONPATH"].split(os.pathsep)[0] == str(family)
    assert own_of(load_arch("llama_meta"), {"architectures": ["LlamaForCausalLM"]}) is None
    (family / "loom_vllm.py").write_text(MODEL + "\n# edited\n")
    again = own_of(load_arch(str(family / "loom.py")), {"architectures": ["LoomForCausalLM"], "model_type": "loom_own"})
    assert again != own  # so a process that has imported the class is not asked again


def test_serve_takes_the_file_for_a_layout_and_nothing_else(family: Path, tmp_path: Path) -> None:
    out = servable.layout(family / "ckpt.pt", tmp_path / "out", arch=str(family / "loom.py"))

    said = options(family)
    assert ready_layout(out, unverified=True, say=lambda _: None, options=said) == out
    found = own_class(out, said.arch)
    assert found is not None
    assert found.model_type == read_config(out)["model_type"] == "loom_own"
    for wrong in (Options(arch="llama_meta"), Options(arch=said.arch, dtype="bfloat16")):
        assert "this is a layout" in refusal(
            Kind.USAGE, ready_layout, out, unverified=True, say=lambda _: None, options=wrong
        )


@pytest.mark.engine
def test_it_is_verified_and_a_class_that_computes_something_else_is_caught(
    family: Path, tmp_path: Path, engine: Engine
) -> None:
    arch = str(family / "loom.py")
    out = servable.layout(family / "ckpt.pt", tmp_path / "out", arch=arch)

    report: Any = verify(out, Settings(arch=arch), engine=engine)

    assert report.ok, report
    assert report.versions["model class"] == "loom_vllm.LoomForCausalLM"
    (family / "loom_vllm.py").write_text(MODEL.replace("* self.config.logit_factor", "* 2.0"))
    report = verify(out, Settings(arch=arch, locate=False), engine=engine)
    assert [check.name for check in report.checks if check.ok is False][:2] == ["prefill", "decode"]
    engine.teach(None)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a drafted package with a class of its own where new processes look, and nowhere else."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("needs uv to install a package into a folder of its own")
    monkeypatch.setattr(sys, "path", list(sys.path))
    checkpoint = servable.llama2c(tmp_path / "ckpt.pt")
    draft(tmp_path / "warp", checkpoint, target="own", reference=None)
    package = tmp_path / "warp"
    (package / "warp" / "model.py").write_text(MODEL.replace("LoomForCausalLM", "WarpForCausalLM"))

    def install(edit: Any = None) -> None:
        if edit:
            edit(package)
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--offline"]
        command += ["--python", sys.executable, "--target", str(tmp_path / "site"), "--reinstall", str(package)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        others = os.environ.get("PYTHONPATH", "")
        if str(tmp_path / "site") not in others:
            monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path / "site"), others])))

    return install


def test_the_config_of_an_own_model_type_goes_from_process_to_process(family: Path) -> None:
    own = own_of(load_arch(str(family / "loom.py")), {"architectures": ["LoomForCausalLM"], "model_type": "loom_own"})
    assert own is not None
    program = "import pickle, sys; from mdl.archs.served.own_config import OwnConfig\n"
    send = program + "sys.stdout.buffer.write(pickle.dumps(OwnConfig(logit_factor=3.0)))"
    take = "import pickle, sys; c = pickle.load(sys.stdin.buffer); print(c.model_type, c.logit_factor)"
    env = {**os.environ, **own.environment()}
    sent = subprocess.run([sys.executable, "-c", send], env=env, capture_output=True, check=True, timeout=120)
    taken = subprocess.run(
        [sys.executable, "-c", take], env=env, input=sent.stdout, capture_output=True, check=True, timeout=120
    )
    assert taken.stdout.split() == [b"loom_own", b"3.0"]


def test_a_new_process_finds_no_package_that_is_not_installed() -> None:
    finding = examined("warp")[0]

    assert finding.state == "fail"
    assert "no installed package has this entry point in mdl.archs" in finding.found
    assert "pip install -e" in finding.do


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_an_installed_package_is_seen_by_a_new_process_with_its_class(installed: Any) -> None:
    pytest.importorskip("vllm", exc_type=ImportError)
    installed()
    family, served = examined("warp")
    assert family.state == "ok", family
    assert family.found.endswith("site/warp/arch.py")
    assert (served.state, served.found.rpartition(" ")[2]) == ("ok", "warp.model.WarpForCausalLM")

    def without_plugin(package: Path) -> None:
        text = (package / "pyproject.toml").read_text()
        (package / "pyproject.toml").write_text(text.replace('"vllm.general_plugins"', '"vllm.other_plugins"'))

    installed(without_plugin)
    family, served = examined("warp")
    assert (family.state, served.state) == ("ok", "fail")
    assert "no plugin in vllm.general_plugins registers it" in served.found

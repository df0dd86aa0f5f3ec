"""The invented models that docs/your-own-model.md takes from model.py to vLLM: a draft, answered, says what the
example's own arch file says, and what vLLM computes from it is what model.py computes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mdl.archs.decoder.schema import decoder_of
from mdl.convert.prepare import Options, Prepared, prepare
from mdl.convert.run import convert
from mdl.drafting.draft import draft
from mdl.validate.client import Engine
from mdl.validate.verify import Settings, verify

from . import checkpoints as make
from . import homemade as home

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Own:
    """One example: its folder and family; what its author answers a draft; where the tensors go that the draft did not
    know; what the author changes in the draft's hf_config; wrong choices for the example's arch file."""

    folder: str
    name: str
    answers: dict[str, str]
    places: dict[str, str]
    config: dict[str, str]
    wrong: dict[str, str]


KILN = Own(
    "dense_odd",
    "kiln",
    {
        "qkv_by_head": "False",
        "norm_eps": "1e-5",
        "activation": '"relu2"',
        "norm_place": '"sandwich"',
        "positions": '"rope"',
        "rope_theta": "5000.0",
        "rotary_style": '"interleaved"',
        "parallel": "False",
        "qk_norm_kind": '"rms"',
        "qk_norm_after_rotary": "True",
    },
    {
        "blocks.{i}.behind1.weight": "model.layers.{i}.attn_out_norm.weight",
        "blocks.{i}.behind1.bias": "model.layers.{i}.attn_out_norm.bias",
        "blocks.{i}.behind2.weight": "model.layers.{i}.mlp_out_norm.weight",
        "blocks.{i}.behind2.bias": "model.layers.{i}.mlp_out_norm.bias",
        "blocks.{i}.attn.valve.weight": "model.layers.{i}.self_attn.gate_proj.weight",
    },
    {
        '"style": d["rotary_style"]': '"style": d["rotary_style"], "rotary_dim": 16',
        '"kind": d["qk_norm_kind"], "eps": d["norm_eps"]': '"kind": "rms", "eps": 1e-6',
        '"attention": {"bias": False': '"attention": {"gate": "head", "bias": False',
        '"head_bias": False,': '"head_bias": False, "logit_softcap": 30.0,',
    },
    {'"after_rotary": d["qk_norm_after_rotary"]': '"after_rotary": False', 'softcap": 30.0': 'softcap": 60.0'},
)
FLOCK = Own(
    "moe_sigmoid",
    "flock",
    {
        "gate_first": "True",
        "norm_eps": "1e-6",
        "activation": '"silu"',
        "norm_kind": '"rms"',
        "norm_place": '"pre"',
        "positions": '"rope"',
        "rotary_style": '"half"',
        "parallel": "False",
        "scoring": '"sigmoid"',
        "normalised": "True",
        "routed_scaling": "2.5",
    },
    {"blocks.{j+1}.moe.balance": "model.layers.{j+1}.mlp.selection_bias"},
    {'"selection_bias": False': '"selection_bias": True'},
    {'"scoring": d["scoring"]': '"scoring": "softmax"'},
)
EVERY = pytest.mark.parametrize("own", [KILN, FLOCK], ids=lambda own: own.name)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arch files are imported from their folders, whose model.py is not the other example's."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def example(own: Own, tmp_path: Path) -> Path:
    """A copy of the example with its checkpoint."""
    folder = tmp_path / own.folder
    shutil.copytree(ROOT / "examples" / own.folder, folder)
    subprocess.run([sys.executable, "make.py"], cwd=folder, check=True, capture_output=True, timeout=120)
    return folder


def prepared(folder: Path, arch: Path) -> Prepared:
    ready = prepare(folder / "ckpt.pt", Options(arch=str(arch)))
    ready.plan.refuse()
    return ready


@EVERY
def test_the_draft_answered_is_the_example_s_own_family(own: Own, tmp_path: Path) -> None:
    folder = example(own, tmp_path)
    made = draft(tmp_path / own.name, folder / "ckpt.pt", reference=f"{folder / 'model.py'}:build")
    asked = "\n".join(problem.what for problem in made.open)
    assert all(f"{name} is neither" in asked for name in own.answers)
    assert all(f"left to decide: {name} [" in asked for name in own.places)

    answered(tmp_path / own.name, own)

    drafted = prepared(folder, Path(made.arch))
    finished = prepared(folder, folder / f"{own.name}.py")
    assert decoder_of(dict(drafted.config)) == decoder_of(dict(finished.config))
    convert(drafted, tmp_path / "drafted", tokenizer="none")
    convert(finished, tmp_path / "finished", tokenizer="none")
    make.same(make.saved(tmp_path / "drafted"), make.saved(tmp_path / "finished"))


def answered(package: Path, own: Own) -> None:
    """Work off the draft."""
    home.answer(package, own.answers, rules=dict.fromkeys(own.places, ""))
    places = "".join(f"  {source}: {target}\n" for source, target in own.places.items())
    edited(package / own.name / f"{own.name}.yaml", {"rename:\n": f"rename:\n{places}"})
    edited(package / own.name / "arch.py", own.config)


def edited(file: Path, changes: dict[str, str]) -> None:
    text = file.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file.write_text(text)


def layout(folder: Path, arch: Path, out: Path) -> Path:
    convert(prepared(folder, arch), out, tokenizer="none")
    return out


@pytest.mark.engine
@EVERY
def test_vllm_computes_what_model_py_computes(own: Own, tmp_path: Path, engine: Engine) -> None:
    folder = example(own, tmp_path)
    arch = folder / f"{own.name}.py"
    settings = Settings(arch=str(arch), reference=f"{folder / 'model.py'}:build", locate=False)

    report: Any = verify(layout(folder, arch, tmp_path / "out"), settings, engine=engine)

    assert report.ok, report
    assert report.reference.endswith("model.py:build")
    for k, (old, new) in enumerate(own.wrong.items()):
        edited(arch, {old: new})
        report = verify(layout(folder, arch, tmp_path / f"wrong{k}"), settings, engine=engine)
        assert [check.name for check in report.checks if not check.ok][:1] == ["prefill"], report
        edited(arch, {new: old})

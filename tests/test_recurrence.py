"""Recurrences in the place of attention: what config.json may say of them, their twin by other formulas, and vLLM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from mdl.archs.decoder.reading import checked, config_of
from mdl.archs.decoder.recurrence import Gated, LinearAttention, Mamba2
from mdl.archs.decoder.schema import decoder_of
from mdl.archs.decoder.tensors import target_of
from mdl.archs.eager.decoder import assemble
from mdl.archs.eager.decoder_recurrent import GatedMixer, LinearAttentionMixer
from mdl.convert.prepare import prepare
from mdl.errors import MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import Settings, verify

from . import checkpoints as make
from . import servable
from .converted import nmse
from .decoders import recurrent, saved

ROOT = Path(__file__).parent.parent
TABLES = (Gated, LinearAttention, Mamba2)
KINDS = ("gated", "linear_attention", "mamba2")


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """The module with float64 weights of unit gain."""
    torch.manual_seed(0)
    for name, old in list(module.named_parameters()):
        where, _, last = name.rpartition(".")
        drawn = torch.randn(old.shape, dtype=torch.float64) / (old.shape[-1] ** 0.5 if old.dim() > 1 else 1)
        drawn = torch.sigmoid(drawn) if last == "decay_floor" else drawn
        setattr(module.get_submodule(where), last, torch.nn.Parameter(drawn, requires_grad=False))
    return module


# --- what config.json may say ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_has_the_tensors_that_are_listed(kind: str) -> None:
    for seed in range(12):
        d = decoder_of(recurrent(seed, kind))
        twin = assemble(d)
        assert {name: tuple(t.shape) for name, t in twin.state_dict().items()} == dict(target_of(d).shapes)


def test_the_class_says_whether_there_are_states() -> None:
    config = recurrent(0, "gated")
    assert config["architectures"] == ["MdlHybridForCausalLM"]
    with pytest.raises(MdlError, match=r"MdlDecoderForCausalLM.* with recurrence: .*MdlHybridForCausalLM"):
        checked({**config, "architectures": ["MdlDecoderForCausalLM"]})
    plain = {key: value for key, value in config.items() if key not in ("recurrence", "architectures", "model_type")}
    with pytest.raises(MdlError, match=r"MdlHybridForCausalLM.* without recurrence"):
        checked({**config_of(plain), "architectures": ["MdlHybridForCausalLM"]})


def test_the_size_of_chunks_stands_where_vllm_looks_for_it() -> None:
    assert recurrent(0, "mamba2")["mamba_chunk_size"] == 256


def test_the_page_names_every_field() -> None:
    page = (ROOT / "docs" / "recurrence.md").read_text(encoding="utf-8")
    missing = [f"{cls.__name__}.{name}" for cls in TABLES for name in cls.model_fields if f"`{name}`" not in page]

    assert missing == []


GATED: dict[str, Any] = {"kind": "gated", "layers": [0], "width": 32, "decay": "forget"}
LINEAR: dict[str, Any] = {"kind": "linear_attention", "layers": [0], "heads": 2, "key_size": 8, "value_size": 8}
MAMBA2: dict[str, Any] = {"kind": "mamba2", "layers": [0], "heads": 4, "head_size": 8, "state": 8, "norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("recurrence", "more", "said"),
    [
        ({**GATED, "decay": "power"}, {}, "decay power needs it"),
        ({**GATED, "power": 8.0}, {}, "nothing else has one"),
        ({**GATED, "decay": "power", "power": 8.0, "decay_floor": True}, {}, "decay_floor: decay power has none"),
        ({**GATED, "conv_bias": True}, {}, "there is no convolution"),
        ({**GATED, "conv": 1}, {}, "greater than 1"),
        ({**GATED, "layers": [2]}, {}, "layers are 0 to 1"),
        ({**GATED, "layers": []}, {}, "leave the table out"),
        ({**GATED, "heads": 2}, {}, "Extra inputs are not permitted"),
        ({**GATED, "kind": "delta"}, {}, "'gated', 'linear_attention', 'mamba2'"),
        ({**LINEAR, "decay": "fixed"}, {}, "decay fixed needs them"),
        ({**LINEAR, "decay": "fixed", "rates": [0.5]}, {}, "1 of them for 2 heads"),
        ({**LINEAR, "decay": "fixed", "rates": [0.5, 0.0]}, {}, "greater than 0"),
        ({**LINEAR, "decay": "head", "rates": [0.5, 0.9]}, {}, "nothing else has any"),
        ({**LINEAR, "decay": "fixed", "rates": [0.5, 0.9], "decay_bias": True}, {}, "decay fixed has none"),
        ({**MAMBA2, "groups": 3}, {}, "4 heads can't share 3 groups"),
        (GATED, {"attention": {"value_residual": True}}, "only layers with attention have values"),
        (GATED, {"positions": {"kind": "rope", "theta": 1e4, "layers": [0]}}, "positions.layers names layer 0"),
        (GATED, {"attention": {"window": 8, "sliding_layers": [0, 1]}}, "sliding_layers names layer 0"),
        ({**GATED, "layers": None}, {"positions": {"kind": "alibi"}}, "no layer has attention"),
        ({**GATED, "layers": None}, {"attention": {"bias": True}}, "attention: no layer has any"),
    ],
)
def test_what_cannot_be_served_is_refused(recurrence: dict[str, Any], more: dict[str, Any], said: str) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tables = {"norm": {"eps": 1e-5}, "positions": {"kind": "none"}, "mlp": {"gated": False, "activation": "relu"}}
    config = {**sizes, **tables, "tie_word_embeddings": False, "recurrence": recurrence, **more}
    with pytest.raises(MdlError, match=said):
        config_of(config)


# --- the twin by other formulas, in float64 ------------------------------------------------------------------------


def test_a_gated_recurrence_is_a_weighted_sum_over_the_past() -> None:
    """h_t = sum over s of (a_(s+1) … a_t) b_s, with the products from a table; Griffin's gates, written out."""
    r = Gated(kind="gated", width=24, decay="power", power=8.0, input_gate=True, input_scale="root", conv=3)
    mixer, x = filled(GatedMixer(r, 16)), torch.randn(2, 30, 16, dtype=torch.float64)
    w = dict(mixer.named_parameters())

    v = x @ w["value_proj.weight"].T
    v = sum(functional.pad(v, (0, 0, 2 - k, 0))[:, :30] * w["conv.weight"][:, 0, k] for k in range(3))
    log = -8 * torch.sigmoid(x @ w["decay_proj.weight"].T) * torch.log1p(w["decay_rate"].exp())
    new = torch.sqrt(-torch.expm1(2 * log)) * torch.sigmoid(x @ w["input_proj.weight"].T) * v
    sums = log.cumsum(1)
    spans = (sums[:, :, None] - sums[:, None]).exp() * torch.ones(30, 30).tril()[..., None]
    wanted = torch.einsum("btsw,bsw->btw", spans, new) @ w["o_proj.weight"].T

    assert nmse(mixer(x), wanted) < 1e-24


def test_mingru_is_its_papers_log_space_form() -> None:
    """arXiv 2410.01201, appendix B: with -softplus(k) and log g(h), without a gate that is not in there."""
    r = Gated(kind="gated", width=24, decay="update", value_activation="mingru")
    mixer, x = filled(GatedMixer(r, 16)), torch.randn(2, 30, 16, dtype=torch.float64)
    w = dict(mixer.named_parameters())

    k, h = x @ w["decay_proj.weight"].T, x @ w["value_proj.weight"].T
    coefficients, updates = -functional.softplus(k), -functional.softplus(-k)
    log_g = torch.where(h >= 0, (functional.relu(h) + 0.5).log(), -functional.softplus(-h))
    sums = coefficients.cumsum(1)
    wanted = (sums + torch.logcumsumexp(updates + log_g - sums, 1)).exp() @ w["o_proj.weight"].T

    assert nmse(mixer(x), wanted) < 1e-22


@pytest.mark.parametrize("decay", ["fixed", "head", "channel"])
def test_linear_attention_is_attention_with_decayed_scores(decay: str) -> None:
    given: dict[str, Any] = {"rates": [0.5, 0.9]} if decay == "fixed" else {"temperature": 16.0}
    r = LinearAttention.model_validate({**LINEAR, "decay": decay, **given, "value_size": 12})
    mixer, x = filled(LinearAttentionMixer(r, 16)), torch.randn(2, 30, 16, dtype=torch.float64)
    w = dict(mixer.named_parameters())

    q, k, v = ((x @ w[f"{name}_proj.weight"].T).unflatten(-1, (2, -1)) for name in "qkv")
    if decay == "fixed":
        log = torch.tensor([0.5, 0.9], dtype=torch.float64).log().view(1, 1, 2, 1).expand(2, 30, 2, 1)
    else:
        log = functional.logsigmoid(x @ w["decay_proj.weight"].T).unflatten(-1, (2, -1)) / 16
    sums = log.cumsum(1)
    kept = (sums[:, :, None] - sums[:, None]).exp() * torch.ones(30, 30).tril()[..., None, None]
    scores = (q[:, :, None] * kept * k[:, None]).sum(-1) * 8**-0.5
    wanted = torch.einsum("btsh,bshv->bthv", scores, v).flatten(2) @ w["o_proj.weight"].T

    assert nmse(mixer(x), wanted) < 1e-24


# --- under vLLM ----------------------------------------------------------------------------------------------------


def laid_out(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A layout of random weights."""
    return servable.layout(saved(folder / "source", seed, config), folder / "layout")


def failed(report: Any) -> set[str]:
    return {check.name for check in report.checks if check.ok is False}


@pytest.mark.engine
@pytest.mark.parametrize("everywhere", [False, True], ids=["beside attention", "alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_computes_it(kind: str, everywhere: bool, tmp_path: Path, engine: Engine) -> None:
    """Prefill, decoding, chunks, batches, preemption, and prefixes from the cache, which states are in too."""
    report: Any = verify(laid_out(tmp_path, recurrent(1, kind, everywhere=everywhere)), engine=engine)

    assert report.ok, report
    figures = next(check.figures for check in report.checks if check.name == "decode")
    assert min(figures[name] for name in ("steps", "chunks", "again", "spared")) > 0


@pytest.mark.engine
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gated", {"decay": "update"}),
        ("gated", {"input_scale": "root"}),
        ("linear_attention", {"rates": [0.5, 0.875, 0.97]}),
        ("linear_attention", {"scale": 1.0}),
    ],
)
def test_another_recurrence_fails(kind: str, change: dict[str, Any], tmp_path: Path, engine: Engine) -> None:
    """The served config says another one than the checkpoint's: nothing but the logits tells."""
    layout = laid_out(tmp_path, recurrent(1, kind, everywhere=True))
    config = json.loads((layout / "config.json").read_text())
    old = {name: config["recurrence"].get(name) for name in change}
    assert old != change
    (layout / "config.json").write_text(json.dumps({**config, "recurrence": {**config["recurrence"], **change}}))

    report = verify(layout, Settings(locate=False), engine=engine)

    assert failed(report) >= {"prefill", "decode"}, report


FORGETFUL = """
import torch

def register():
    from mdl.archs.served import state

    def load(self, cache, shape):
        return torch.zeros(len(self.starts) - 1, *shape)

    state.Batch.load = load
"""


@pytest.mark.engine
def test_a_state_that_is_not_carried_on_fails(tmp_path: Path) -> None:
    """vLLM with a plugin in which every step starts from nothing: right within one chunk, wrong from the next on."""
    info = tmp_path / "plugin" / "forgetful-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: forgetful\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nforgetful = forgetful:register\n")
    (info.parent / "forgetful.py").write_text(FORGETFUL)
    path = os.pathsep.join([str(info.parent), os.environ.get("PYTHONPATH", "")])

    with Engine(timeout=300, env={"PYTHONPATH": path}) as forgetful:
        for kind in KINDS[:2]:
            layout = laid_out(tmp_path / kind, recurrent(1, kind, everywhere=True))
            report = verify(layout, Settings(locate=False), engine=forgetful)
            assert "decode" in failed(report), report


# --- the worked example --------------------------------------------------------------------------------------------


@pytest.fixture
def tide(tmp_path: Path) -> Path:
    """A copy of the example with its checkpoint."""
    folder = tmp_path / "recurrence"
    shutil.copytree(ROOT / "examples" / "recurrence", folder)
    subprocess.run([sys.executable, "make.py"], cwd=folder, check=True, capture_output=True, timeout=120)
    return folder


def test_the_example_goes_there_and_back(tide: Path) -> None:
    from mdl.convert.export import export

    out = servable.layout(tide / "ckpt.pt", tide / "out", arch=str(tide / "tide.py"))
    export(out, tide / "back.pt")

    before, after = (torch.load(tide / name) for name in ("ckpt.pt", "back.pt"))
    make.same(after["weights"], before["weights"])
    assert json.loads((out / "config.json").read_text())["recurrence"]["layers"] == [0, 1, 3, 4]


def test_the_example_says_where_a_glance_is_missing(tide: Path) -> None:
    from mdl.convert.prepare import Options

    before = torch.load(tide / "ckpt.pt")
    weights = {name: t for name, t in before["weights"].items() if not name.startswith("blocks.5.glance")}
    torch.save({**before, "weights": weights}, tide / "ckpt.pt")
    with pytest.raises(MdlError, match=r"of 6 blocks, \[2\] have a glance"):
        prepare(tide / "ckpt.pt", Options(arch=str(tide / "tide.py")))


@pytest.mark.engine
def test_the_example_is_verified_by_dims_and_by_its_own_code(
    tide: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model", "tide_eager"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # other tests have models too
    monkeypatch.setattr(sys, "path", list(sys.path))
    out, arch = servable.layout(tide / "ckpt.pt", tide / "out", arch=str(tide / "tide.py")), str(tide / "tide.py")

    for settings in (Settings(arch=arch), Settings(arch=arch, reference=f"{tide / 'model.py'}:build")):
        report: Any = verify(out, settings, engine=engine)
        assert report.ok, report

    for name in ("model", "tide_eager"):
        monkeypatch.delitem(sys.modules, name, raising=False)

"""Mamba 2 from mamba_ssm's folder to the layout and back; its maths by the dual form, one group and several.

mamba_ssm at e9594ce needs a GPU as it stands. By hand, with its own ssd_minimal_discrete and rms_norm_ref in the place
of its kernels, it gave mdl's logits: NMSE 1.5e-13 to 3.4e-13 in float32, for 1, 2 and 4 groups.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert.export import export
from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import verify

from .. import checkpoints as make
from .. import mambas
from ..converted import nmse
from ..gpts_checks import eager, is_green, layout


def checkpoint(folder: Path, groups: int = 1, **given: Any) -> Path:
    """A folder as save_pretrained writes it, whose ssm_cfg says what is not Mamba 2's default."""
    ssm = {"layer": "Mamba2", "headdim": 32, "d_state": mambas.STATE, **({"ngroups": groups} if groups > 1 else {})}
    return mambas.saved(folder, mambas.state(2, groups=groups, **given), ssm, tie_embeddings=given.get("tied", True))


@pytest.mark.parametrize(("tied", "biases"), [(True, False), (False, True)], ids=["released", "biases, own head"])
def test_there_and_back(tied: bool, biases: bool, tmp_path: Path) -> None:
    prepared = layout(checkpoint(tmp_path / "raw", 2, tied=tied, biases=biases), tmp_path / "out")

    sizes = {key: prepared.config[key] for key in ("num_heads", "head_dim", "n_groups", "state_size", "vocab_size")}
    assert prepared.arch.name == "mamba2"
    assert sizes == {"num_heads": 4, "head_dim": 32, "n_groups": 2, "state_size": 16, "vocab_size": 96}
    assert (prepared.config["tie_word_embeddings"], prepared.config["use_bias"]) == (tied, biases)
    state = mambas.state(2, groups=2, tied=tied, biases=biases)
    make.same(make.saved(tmp_path / "out"), mambas.target_of(state))
    export(tmp_path / "out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt")
    make.same(back, state)
    assert list(back) == list(state)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_it_computes_the_dual_form(groups: int, biases: bool, tmp_path: Path) -> None:
    raw = checkpoint(tmp_path / "raw", groups, biases=biases)

    wanted = mambas.forward(mambas.state(2, groups=groups, biases=biases), groups)
    assert nmse(eager(raw, ids=mambas.IDS), wanted) < 1e-24


def test_wrong_groups_show(tmp_path: Path) -> None:
    raw = mambas.saved(tmp_path / "raw", mambas.state(2, groups=2))

    wanted = mambas.forward(mambas.state(2, groups=2), 2)
    assert nmse(eager(raw, {"ngroups": "2"}, ids=mambas.IDS), wanted) < 1e-24
    assert nmse(eager(raw, {"ngroups": "1"}, ids=mambas.IDS), wanted) > 1e-3


def test_groups_are_asked_for_where_nothing_says_them(tmp_path: Path) -> None:
    raw = mambas.saved(tmp_path / "raw", mambas.state(2, groups=2))
    with pytest.raises(MdlError, match=r"32 channels for B, which groups x d_state must be.*--set ngroups=VALUE"):
        prepare(raw)


@pytest.mark.parametrize(
    ("ssm", "config", "said"),
    [
        ({"norm_before_gate": True}, {}, "norm before they gate"),
        ({"dt_limit": [0.0, 0.1]}, {}, "time steps are clamped"),
        ({"d_state": 128}, {}, "state is 16 by the tensors"),
        ({"ngroups": 3}, {}, "3 groups divide neither 16 channels"),
        ({}, {"attn_layer_idx": [1]}, r"config.attn_layer_idx is \[1\]: some of its layers are attention"),
        ({}, {"vocab_size": 50277}, "rounded up to a multiple of 8, is not the 96 rows here"),
    ],
)
def test_what_vllm_does_not_compute_is_refused(
    ssm: dict[str, Any], config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    raw = mambas.saved(tmp_path / "raw", mambas.state(2), {"layer": "Mamba2", **ssm}, **config)
    with pytest.raises(MdlError, match=said):
        prepare(raw)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("mixer.norm.weight", None, "rmsnorm=False"),
        ("mixer.D", (128,), "D_has_hdim"),
        ("mixer.norm.weight", (96,), "d_ssm leaves some of them to an MLP"),
        ("norm.bias", (64,), "layers whose norm has a bias: LayerNorm: 0"),
        ("mlp.fc1.weight", (64, 64), "layers with an MLP beside the mixer: 0"),
    ],
)
def test_other_mixers_are_told_by_their_shapes(
    name: str, shape: tuple[int, ...] | None, said: str, tmp_path: Path
) -> None:
    state = mambas.state(2)
    state.pop(f"backbone.layers.0.{name}", None)
    raw = mambas.saved(tmp_path / "raw", state | ({f"backbone.layers.0.{name}": torch.ones(shape)} if shape else {}))
    with pytest.raises(MdlError, match=said):
        prepare(raw, Options(given={"ngroups": "1"}))


def test_codestral_mamba_has_params_json(tmp_path: Path) -> None:
    """mistral-inference writes the same names below ``model``, and its own settings."""
    raw = tmp_path / "raw"
    raw.mkdir()
    torch.save({f"model.{name}": t for name, t in mambas.state(2, groups=2, tied=False).items()}, raw / "w.pth")
    params = {"dim": 64, "n_layers": 2, "vocab_size": 96, "n_groups": 2, "pad_vocab_size_multiple": 1}
    (raw / "params.json").write_text(json.dumps({**params, "model_type": "mamba", "tie_embeddings": False}))

    prepared = prepare(raw)

    prepared.plan.refuse()
    assert (prepared.arch.name, prepared.dims["groups"], prepared.dims["state"]) == ("mamba2", 2, 16)


@pytest.mark.engine
def test_vllm_computes_it(tmp_path: Path, engine: Engine) -> None:
    layout(checkpoint(tmp_path / "raw", 2), tmp_path / "out")
    is_green(tmp_path / "out", engine)


@pytest.mark.engine
def test_a_wrong_number_of_groups_fails(tmp_path: Path, engine: Engine) -> None:
    """One group of 32 has the same shapes as two of 16, so nothing but the logits tells."""
    layout(checkpoint(tmp_path / "raw", 2, tied=False), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**config, "n_groups": 1, "state_size": 32}))

    report = verify(tmp_path / "out", engine=engine)

    assert {check.name for check in report.checks if check.ok is False} >= {"prefill", "decode"}

"""OLMo-core from the folder of a step to the layout and back, against OLMo-core, transformers and vLLM."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.archs.eager.huggingface import Lifted
from mdl.convert.export import export
from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import Settings, verify

from .. import checkpoints as make
from .. import checkpoints_olmo as olmo
from .. import upstream
from ..converted import IDS, by_transformers, exact, layout, nmse

CLASSES = {"olmo2": "Olmo2", "olmo3": "Olmo3", "llama": "Llama", "qwen3": "Qwen3"}


def target(case: str) -> str:
    return f"{CLASSES[case.partition('_')[0]]}ForCausalLM"


@pytest.mark.parametrize("case", olmo.CORE)
def test_the_layout_computes_what_the_checkpoint_did_and_comes_back(case: str, tmp_path: Path) -> None:
    step = olmo.core(tmp_path / "step10", case)

    prepared = layout(step, tmp_path / "out")

    assert (prepared.arch.name, prepared.target, prepared.config["max_position_embeddings"]) == (
        "olmo_core",
        target(case),
        256,
    )
    assert prepared.config["tie_word_embeddings"] is (case == "olmo2_tied")
    assert nmse(by_transformers(tmp_path / "out"), exact(prepared)) < 1e-11  # its norms and tables are in float32
    export(tmp_path / "out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert list(back) == list(olmo.core_state(case))
    make.same(back, olmo.core_state(case))


def test_the_folder_of_the_weights_alone_finds_the_settings_above_it(tmp_path: Path) -> None:
    step = olmo.core(tmp_path / "step10", "olmo3")
    whole, inner = prepare(step), prepare(step / "model_and_optim")

    assert whole.config == inner.config
    assert "the weights are those of the folder model_and_optim" in whole.inventory.notes
    assert "settings are from the folder above: config.json in step10" in inner.inventory.remarks
    assert whole.config["layer_types"] == [f"{'full' if i in (3, 5) else 'sliding'}_attention" for i in range(6)]
    assert whole.config["sliding_window"] == 24


def test_one_file_without_settings_asks_for_what_they_say(tmp_path: Path) -> None:
    torch.save(olmo.core_state("olmo3"), tmp_path / "model.pt")
    with pytest.raises(MdlError) as caught:
        prepare(tmp_path / "model.pt")
    said = str(caught.value)
    assert all(f"--set {name}=" in said for name in ("n_heads", "name", "norm_eps", "sliding_window"))
    assert "in the folder above model_and_optim: put that beside the weights" in said

    given = {"n_heads": "4", "block": "reordered_norm", "norm_eps": "1e-6", "sliding_window": "24"}
    prepared = prepare(tmp_path / "model.pt", Options(given={**given, "rope_theta": "500000", "context": "256"}))
    assert prepared.config == prepare(olmo.core(tmp_path / "step", "olmo3")).config


@pytest.mark.parametrize(
    ("case", "given"),
    [
        ("olmo2", {"rope_theta": "10000"}),
        ("olmo2", {"norm_eps": "1e-3"}),
        ("olmo3", {"windows": "[25, 25, 25, 0, 25, 0]"}),
        ("olmo3", {"windows": "[24, 24, 24, 24, 24, 0]"}),
        ("llama_31", {"rope": '{"rope_type": "default", "rope_theta": 500000.0}'}),
    ],
)
def test_a_value_that_is_wrong_shows(case: str, given: dict[str, str], tmp_path: Path) -> None:
    step = olmo.core(tmp_path / "step", case)
    layout(step, tmp_path / "out", **given)

    assert nmse(by_transformers(tmp_path / "out"), exact(prepare(step))) > 1e-8


def _set(config: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for key in above:
        config = config[key]
    config[last] = value


REFUSED = {
    "block.sequence_mixer.rope": (None, "a model without rotary positions"),
    "block.sequence_mixer.rope.name": ("complex", "block.sequence_mixer.rope.name is 'complex'"),
    "block.sequence_mixer.clip_qkv": (8.0, "clip_qkv is 8.0"),
    "block.sequence_mixer.gate": ({"granularity": "headwise"}, "gate is"),
    "block.sequence_mixer.n_heads": (3, "3 heads do not fit"),
    "block.layer_norm.eps": (1e-3, "norms have different eps"),
    "block.name": ("default", "norms before each half, q and k normed as a whole, windows: no class"),
    "block.sequence_mixer.sliding_window": ({"pattern": [8, 16]}, "windows of different sizes"),
    "embed_scale": (11.3, "embed_scale is 11.3"),
    "n_layers": (7, "layers is 4 by the tensors"),
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_no_class_has_is_refused_by_the_name_of_its_field(path: str, tmp_path: Path) -> None:
    value, phrase = REFUSED[path]
    torch.save(olmo.core_state("olmo3_first"), tmp_path / "model.pt")
    config = json.loads(json.dumps(olmo.core_config("olmo3_first")))
    _set(config, path, value)
    (tmp_path / "config.json").write_text(json.dumps({"model": config, "dataset": {"sequence_length": 256}}))

    with pytest.raises(MdlError, match=phrase):
        prepare(tmp_path / "model.pt")


def test_q_k_and_v_in_one_matrix_are_refused(tmp_path: Path) -> None:
    tensors = olmo.core_state("llama")
    for i in range(2):
        parts = [tensors.pop(f"blocks.{i}.attention.w_{x}.weight") for x in "qkv"]
        tensors[f"blocks.{i}.attention.w_qkv.weight"] = torch.cat(parts)

    with pytest.raises(MdlError, match="w_qkv holds q, k and v in one matrix") as caught:
        prepare(olmo.core(tmp_path / "step", "llama", tensors))
    assert "vLLM fuses them itself" in str(caught.value)


@pytest.mark.parametrize("case", olmo.CORE)
def test_our_forward_is_that_of_olmo_core(case: str, tmp_path: Path) -> None:
    """On a folder that OLMo-core's own code saved, with the record of places that is a class of its own."""
    core = upstream.olmo_core()
    config = core.config.from_dict(olmo.core_config(case))
    model = config.build().eval()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert list(shapes.items()) == list(olmo.core_shapes(case).items())
    model.load_state_dict(olmo.core_state(case))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        core.save(tmp_path / "step1/model_and_optim", {"model": model.state_dict(), "optim": {"x": torch.ones(2)}})
    saved = {"model": config.as_config_dict(), "dataset": {"sequence_length": 256}}
    (tmp_path / "step1/config.json").write_text(json.dumps(saved))

    found = exact(prepare(tmp_path / "step1"))

    with torch.inference_mode():
        model(torch.tensor([IDS]))  # it computes its rotary tables in float32 here, and keeps them
    with torch.inference_mode(), Lifted():  # its norms and rotations are in float32, whatever the weights
        theirs = model.double()(torch.tensor([IDS]))[0]
    assert nmse(found, theirs) < 1e-24


@pytest.mark.engine
def test_vllm_computes_the_same(tmp_path: Path, engine: Engine) -> None:
    layout(olmo.core(tmp_path / "step", "olmo3_yarn"), tmp_path / "out")

    report = verify(tmp_path / "out", Settings(), engine=engine)

    assert report.ok, [check for check in report.checks if check.ok is not True]

"""OLMo from the folder to the layout and back, against OLMo's own code, transformers and vLLM."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.archs.eager.huggingface import Lifted
from mdl.archs.registry import load_arch, mapping_path
from mdl.convert.export import export
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.errors import MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import Settings, verify

from .. import checkpoints as make
from .. import checkpoints_olmo as olmo
from .. import upstream
from ..converted import IDS, by_transformers, exact, layout, nmse

CLASSES = {
    "olmo1": "OlmoForCausalLM",
    "olmo1_clipped": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "rms": "LlamaForCausalLM",
}


@pytest.mark.parametrize("case", olmo.OLD)
def test_the_layout_computes_what_the_checkpoint_did_and_comes_back(case: str, tmp_path: Path) -> None:
    folder = olmo.old(tmp_path / "step10-unsharded", case)

    prepared = layout(folder / "model.pt", tmp_path / "out")

    assert (prepared.arch.name, prepared.target) == ("olmo", CLASSES[case])
    assert prepared.config["tie_word_embeddings"] is (case == "olmo1")
    assert nmse(by_transformers(tmp_path / "out"), exact(prepared)) < 1e-11  # its norms and tables are in float32
    export(tmp_path / "out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(back) == list(olmo.old_state(case))
    make.same(back, olmo.old_state(case))


def test_the_trainer_s_other_files_are_passed_by(tmp_path: Path) -> None:
    folder = olmo.old(tmp_path / "step10-unsharded", "olmo2")

    prepared = prepare(folder, Options())

    assert prepared.target == "Olmo2ForCausalLM"


def test_what_old_releases_did_not_write_are_the_defaults_of_their_code(tmp_path: Path) -> None:
    folder = olmo.old(tmp_path / "x", "olmo1", rope_theta=None)

    entry = prepare(folder / "model.pt").dims.entries["rope_theta"]

    assert (entry.value, entry.because) == (10000.0, "config.yaml has no rope_theta: the default of OLMo's ModelConfig")


def test_without_config_yaml_it_asks(tmp_path: Path) -> None:
    torch.save(olmo.old_state("olmo2"), tmp_path / "model.pt")
    with pytest.raises(MdlError) as caught:
        prepare(tmp_path / "model.pt")
    asked = ("n_heads", "layer_norm_type", "norm_after", "layer_norm_eps", "rope", "rope_theta", "max_sequence_length")
    assert all(f"--set {name}=" in str(caught.value) for name in asked)
    assert "config.yaml, which does not lie beside the weights: put it there" in str(caught.value)

    given = {"n_heads": "4", "layer_norm_type": "rms", "norm_after": "true", "layer_norm_eps": "1e-6", "rope": "true"}
    given |= {"rope_theta": "500000", "max_sequence_length": "256", "clip_qkv": "0"}
    prepared = prepare(tmp_path / "model.pt", Options(given=given))
    assert prepared.config == prepare(olmo.old(tmp_path / "x", "olmo2") / "model.pt").config


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another block": ("olmo1", {"block_type": "llama"}, "block_type is 'llama'"),
    "another activation": ("olmo1", {"activation_type": "gelu"}, "another activation than SwiGLU"),
    "ALiBi": ("olmo1", {"alibi": True, "rope": False}, "ALiBi in the place of rotary positions"),
    "learned positions": ("olmo1", {"rope": None}, "rope is false: learned positions, or none"),
    "scaled logits": ("olmo2", {"scale_logits": True}, "scaled logits"),
    "another eps": ("olmo1", {"layer_norm_eps": 1e-6}, "OlmoForCausalLM has 1e-5 hard-wired"),
    "norms before and on q and k": ("olmo2", {"norm_after": False}, "norm_after false, normed q and k: no class"),
    "clipped": ("olmo2", {"clip_qkv": 8.0}, "clip_qkv 8.0: no class"),
    "LayerNorm with weights": ("rms", {"layer_norm_type": "default"}, "layer_norm_type default, with weights"),
    "heads that do not fit": ("olmo1", {"n_heads": 3}, "3 heads do not fit a width of 128"),
    "another size": ("olmo1", {"embedding_size": 128}, "vocab is 96 by the tensors"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_and_why(what: str, tmp_path: Path) -> None:
    case, changed, phrase = REFUSED[what]
    with pytest.raises(MdlError, match=phrase):
        prepare(olmo.old(tmp_path / "x", case, **changed) / "model.pt")


def test_biases_are_refused(tmp_path: Path) -> None:
    torch.save(olmo.old_state("rms") | {"transformer.blocks.0.att_proj.bias": torch.ones(256)}, tmp_path / "model.pt")
    with pytest.raises(MdlError, match="there are biases"):
        prepare(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("case", "given"),
    [
        ("olmo1", {"rope_theta": "500000"}),
        ("olmo1_clipped", {"clip_qkv": "0"}),
        ("olmo2", {"layer_norm_eps": "1e-3"}),
        ("olmo2", {"n_heads": "8"}),
    ],
)
def test_a_value_that_is_wrong_shows(case: str, given: dict[str, str], tmp_path: Path) -> None:
    source = olmo.old(tmp_path / "x", case, **({"n_kv_heads": None} if "n_heads" in given else {})) / "model.pt"
    layout(source, tmp_path / "out", **given)

    assert nmse(by_transformers(tmp_path / "out"), exact(prepare(source))) > 1e-8


def test_value_and_gate_in_the_wrong_order_show(tmp_path: Path) -> None:
    """The order of most other code bases."""
    mapping = Path(mapping_path(load_arch("olmo"))).read_text()
    up, gate = (f"      - model.layers.{{i}}.mlp.{name}_proj.weight\n" for name in ("up", "gate"))
    assert up + gate in mapping
    (tmp_path / "wrong.yaml").write_text(mapping.replace(up + gate, gate + up))
    (tmp_path / "wrong.py").write_text(
        "from msgspec.structs import replace\n\nfrom mdl.archs.olmo import ARCH as RIGHT\n\n"
        'ARCH = replace(RIGHT, name="wrong")\n'
    )
    source = olmo.old(tmp_path / "x", "olmo2") / "model.pt"
    options = Options(arch=str(tmp_path / "wrong.py"))
    convert(prepare(source, options), tmp_path / "out", tokenizer="none")

    assert nmse(by_transformers(tmp_path / "out"), exact(prepare(source))) > 1e-2


@pytest.mark.parametrize("case", olmo.OLD)
def test_our_forward_is_that_of_olmo(case: str, tmp_path: Path) -> None:
    """On a file that OLMo's own module saved."""
    code = upstream.olmo()
    config = importlib.import_module("olmo.config").ModelConfig(**olmo.old_config(case), init_device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so narrow a model is slow
        model = code.OLMo(config).eval()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert list(shapes.items()) == list(olmo.old_shapes(case).items())
    model.load_state_dict(olmo.old_state(case))
    folder = olmo.old(tmp_path / "x", case)
    torch.save(model.state_dict(), folder / "model.pt")

    found = exact(prepare(folder / "model.pt"))

    with torch.inference_mode(), Lifted():  # its norms and rotations are in float32, whatever the weights
        theirs = model.double()(torch.tensor([IDS])).logits[0]
    assert nmse(found, theirs) < 1e-24


@pytest.mark.engine
def test_vllm_computes_the_same(tmp_path: Path, engine: Engine) -> None:
    layout(olmo.old(tmp_path / "x", "olmo1_clipped") / "model.pt", tmp_path / "out")

    report = verify(tmp_path / "out", Settings(), engine=engine)

    assert report.ok, [check for check in report.checks if check.ok is not True]

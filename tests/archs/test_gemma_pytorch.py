"""gemma_pytorch from the checkpoint to the layout and back: three generations, the published sizes and others.

gemma_pytorch is on no package index. That the eager forward computes what its own model.py does was held by hand at
commit 014acb7; here it is held to transformers' class on the converted layout, which shares no code with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.archs.base import Inventory, Measure
from mdl.archs.gemma_pytorch import ARCH
from mdl.convert.export import export
from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError
from mdl.mappings.tensors import TensorInfo
from mdl.validate.client import Engine
from mdl.validate.verify import Settings, verify

from .. import checkpoints as make
from ..checkpoints_gemma import GIVEN, checkpoint, shapes, state, without_tables
from ..converted import IDS, by_transformers, exact, layout, nmse

CLASSES = {1: "GemmaForCausalLM", 2: "Gemma2ForCausalLM", 3: "Gemma3ForCausalLM"}


@pytest.mark.parametrize("generation", CLASSES)
def test_the_layout_computes_what_the_checkpoint_did_and_comes_back(generation: int, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "gemma.ckpt", generation)

    prepared = layout(source, tmp_path / "out", **GIVEN[generation])

    assert (prepared.arch.name, prepared.target) == ("gemma_pytorch", CLASSES[generation])
    assert nmse(by_transformers(tmp_path / "out"), exact(prepared)) < 1e-11  # its norms and tables are in float32
    lost = export(tmp_path / "out", tmp_path / "back.ckpt").lost
    assert all("rotary table" in problem.what for problem in lost)
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["model_state_dict"]
    assert list(back) == list(without_tables(state(generation)))
    make.same(back, without_tables(state(generation)))


@pytest.mark.parametrize(
    ("generation", "changed"),
    [
        (1, {"num_attention_heads": "2"}),
        (1, {"rms_norm_eps": "1e-3"}),
        (2, {"sliding_window_size": "25"}),
        (2, {"query_pre_attn_scalar": "32"}),
        (2, {"full_every": "3"}),
        (2, {"attn_logit_softcapping": "50"}),
        (2, {"final_logit_softcapping": "30"}),
        (3, {"rope_scaling_factor": "1"}),
        (3, {"rope_local_theta": "1000000"}),
        (3, {"full_every": "3"}),
    ],
)
def test_a_value_that_is_wrong_shows(generation: int, changed: dict[str, str], tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "gemma.ckpt", generation, state(generation, layers=6 if generation == 3 else 2))
    given = GIVEN[generation] | {"full_every": str({1: 0, 2: 2, 3: 6}[generation])}

    layout(source, tmp_path / "out", **(given | changed))

    assert nmse(by_transformers(tmp_path / "out"), exact(prepare(source, Options(given=given)))) > 1e-8


def published(generation: int, hidden: int, layers: int, rows: int, columns: int, ffn: int) -> dict[str, Any]:
    """The dims that a checkpoint of these sizes gets without a word of the user's, and their reasons."""
    head = 128 if hidden == 5376 else 256
    made: dict[str, tuple[int, ...]] = {"embedder.weight": (1000, hidden)}
    for i in range(layers):
        made |= {name.replace(".0.", f".{i}."): (1,) for name in shapes(generation) if ".layers.0." in name}
    made |= {
        "model.layers.0.self_attn.qkv_proj.weight": (rows, hidden),
        "model.layers.0.self_attn.o_proj.weight": (hidden, columns),
        "model.layers.0.mlp.gate_proj.weight": (ffn, hidden),
    }
    if generation == 3:
        made["model.layers.0.self_attn.query_norm.weight"] = (head,)
    tensors = {
        name: (TensorInfo(name, shape, "bfloat16", "x", 0, (1,) * len(shape), "0"),) for name, shape in made.items()
    }
    inventory = Inventory("x", tensors)
    assert ARCH.detect(inventory)
    measure = Measure(inventory, {})
    ARCH.dims(measure)
    dims = measure.done()
    return {**dims, "why": {name: dim.because for name, dim in dims.entries.items()}}


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ((1, 2048, 18, 2560, 2048, 16384), (8, 1, 256, 256, 0, 8192)),
        ((1, 3072, 28, 12288, 4096, 24576), (16, 16, 256, 256, 0, 8192)),
        ((2, 2304, 26, 4096, 2048, 9216), (8, 4, 256, 256, 4096, 8192)),
        ((2, 3584, 42, 8192, 4096, 14336), (16, 8, 256, 256, 4096, 8192)),
        ((2, 4608, 46, 8192, 4096, 36864), (32, 16, 128, 144, 4096, 8192)),
        ((3, 1152, 26, 1536, 1024, 6912), (4, 1, 256, 256, 512, 32768)),
        ((3, 2560, 34, 4096, 2048, 10240), (8, 4, 256, 256, 1024, 131072)),
        ((3, 3840, 48, 8192, 4096, 15360), (16, 8, 256, 256, 1024, 131072)),
        ((3, 5376, 62, 8192, 4096, 21504), (32, 16, 128, 168, 1024, 131072)),
    ],
)
def test_the_published_models_are_known_by_their_sizes(sizes: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    found = published(*sizes)

    names = ("heads", "kv_heads", "head_dim", "attention_scalar", "sliding_window", "context")
    assert tuple(found[name] for name in names) == wanted
    assert found["rope_theta"] == (1e6 if sizes[0] == 3 else 1e4)
    assert (found["attention_softcap"], found["logit_softcap"]) == ((50.0, 30.0) if sizes[0] == 2 else (0.0, 0.0))
    if sizes[0] == 3:
        assert found["rope_factor"] == (1.0 if sizes[1] == 1152 else 8.0)
        assert ("text-only class leaves it out" in found["why"]["rope_factor"]) is (sizes[1] != 1152)


def test_sizes_of_ones_own_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(MdlError) as caught:
        prepare(checkpoint(tmp_path / "gemma.ckpt", 2))

    asked = ("num_attention_heads", "sliding_window_size", "query_pre_attn_scalar", "max_position_embeddings")
    assert all(f"--set {name}=" in str(caught.value) for name in asked)
    assert "not the sizes of a published model" in str(caught.value)
    with pytest.raises(MdlError, match="3 heads do not fit o_proj with 128 columns"):
        prepare(tmp_path / "gemma.ckpt", Options(given=GIVEN[2] | {"num_attention_heads": "3"}))


def test_what_sees_images_and_what_is_quantised_is_refused(tmp_path: Path) -> None:
    tensors = state(3)
    tensors["text_token_embedder.weight"] = tensors.pop("embedder.weight")
    tensors |= {"siglip_vision_model.final_norm.weight": torch.ones(8), "mm_input_projection.weight": torch.ones(96, 8)}
    with pytest.raises(MdlError, match=r"sees images too") as caught:
        prepare(checkpoint(tmp_path / "images.ckpt", 3, tensors))
    assert "save the embedder under the name embedder.weight" in str(caught.value)

    tensors = state(1)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors |= {name: tensors[name].to(torch.int8), f"{name}_scaler": torch.ones(160)}
    with pytest.raises(MdlError, match=r"8-bit integers with a weight_scaler per row"):
        prepare(checkpoint(tmp_path / "quant.ckpt", 1, tensors))


@pytest.mark.engine
@pytest.mark.parametrize("generation", [3])  # the others are rows of tests/cases.py
def test_vllm_computes_the_same(generation: int, tmp_path: Path, engine: Engine) -> None:
    source = checkpoint(tmp_path / "gemma.ckpt", generation, state(generation, layers=6 if generation == 3 else 2))
    layout(source, tmp_path / "out", **GIVEN[generation])

    report = verify(tmp_path / "out", Settings(), engine=engine)

    assert report.ok, [check for check in report.checks if check.ok is not True]
    assert report.versions["model class"].endswith(CLASSES[generation])
    assert len(IDS) > 24  # the windows end inside the prompts

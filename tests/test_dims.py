"""Every size and constant with its provenance; what contradicts is a problem, what is unknown is asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.archs import llama2c, llama_meta, nanogpt
from mdl.archs.base import Arch, Dims, Inventory, Measure, boolean
from mdl.convert.inventory import take_inventory
from mdl.convert.open import open_checkpoint
from mdl.convert.prepare import Options, recognise
from mdl.errors import Kind, MdlError
from mdl.mappings.tensors import TensorInfo, dense

from . import checkpoints as make


def measured(arch: Arch, path: Path, **given: str) -> Dims:
    measure = Measure(take_inventory(open_checkpoint(path)), given)
    arch.dims(measure)
    return measure.done()


def refusals(arch: Arch, path: Path, **given: str) -> list[tuple[str, str]]:
    with pytest.raises(MdlError) as caught:
        measured(arch, path, **given)
    assert caught.value.kind is Kind.INPUT
    return [(p.what, p.do) for p in caught.value.problems]


def test_provenance(tied: Path) -> None:
    dims = measured(nanogpt.ARCH, tied, n_head="4", norm_eps="1e-6")

    assert {name: (d.value, d.source) for name, d in dims.entries.items()} == {
        "layers": (2, "shapes"),
        "hidden": (16, "shapes"),
        "vocab": (24, "shapes"),
        "context": (12, "shapes"),
        "ffn": (64, "shapes"),
        "bias": (True, "shapes"),
        "heads": (4, "user"),
        "norm_eps": (1e-6, "user"),
        "activation": ("gelu", "default"),
    }
    assert dims.entries["heads"].because == "--set n_head=4"
    assert dims.entries["vocab"].because == "rows of transformer.wte.weight"
    assert dims.sizes().keys() == {"layers", "hidden", "vocab", "context", "ffn", "heads"}
    assert dims.flags() == {"bias": True}
    assert measured(nanogpt.ARCH, tied).entries["heads"].because == "model_args.n_head"


def test_shapes_overrule_nobody_and_nobody_overrules_shapes(tmp_path: Path) -> None:
    state = make.nanogpt_state()
    path = make.trained(tmp_path / "x.pt", state, {**make.nanogpt_args(state), "n_layer": 3, "vocab_size": 50304})

    found = refusals(nanogpt.ARCH, path, n_embd="32")

    assert [what for what, _ in found] == [
        "layers is 2 by the tensors (blocks transformer.h.0 … with a ln_1) but 3 by model_args.n_layer",
        "hidden is 16 by the tensors (columns of transformer.wte.weight) but 32 by --set n_embd=32",
        "vocab is 24 by the tensors (rows of transformer.wte.weight) but 50304 by model_args.vocab_size",
    ]


@pytest.mark.parametrize(
    ("given", "what", "do"),
    [
        ({"n_heads": "4"}, "--set n_heads=…: this family has no such value", "it has: "),
        ({"n_head": "four"}, "--set n_head=four: not a value for heads", "expected an integer"),
        ({"norm_eps": "small"}, "--set norm_eps=small: not a value for norm_eps", "expected a number"),
        ({"norm_eps": "nan"}, "--set norm_eps=nan: not a value for norm_eps", "expected a number"),
        ({"bias": "perhaps"}, "--set bias=perhaps: not a value for bias", "expected true or false"),
        ({"activation": "relu"}, "activation is 'relu'", "it must be one of: gelu, gelu_new"),
        ({"n_head": "3"}, "3 heads do not divide the width 16", "pass --set n_head=N with the right number"),
        ({"n_head": "2", "heads": "4"}, "--set heads=4 and --set n_head=2", "both are heads: give one of them"),
    ],
)
def test_what_the_user_may_not_say(given: dict[str, str], what: str, do: str, tied: Path) -> None:
    ((got, remedy),) = refusals(nanogpt.ARCH, tied, **given)

    assert got == what
    assert remedy.startswith(do)


def test_what_is_nowhere_is_asked_for_with_its_flag(tmp_path: Path) -> None:
    torch.save(make.nanogpt_state(), tmp_path / "nano.pt")
    torch.save(make.llama_state(), tmp_path / "llama.pt")

    assert [do for _, do in refusals(nanogpt.ARCH, tmp_path / "nano.pt")] == [
        "pass --set n_head=VALUE",
        "pass --set activation=VALUE, or let your own code decide: "
        "mdl verify CKPT --reference FILE.py:FUNCTION --decide activation=gelu,gelu_new",
    ]
    # what can't be settled before the heads are known is a name all the same
    asked = refusals(llama2c.ARCH, tmp_path / "llama.pt", n_kv_heads="2", head_dim="8")
    assert [do for _, do in asked] == ["pass --set n_heads=VALUE", "pass --set max_seq_len=VALUE"]
    assert asked[0][0] == "heads is neither in the checkpoint nor in its shapes: wq is square, so no shape tells"
    dims = measured(nanogpt.ARCH, tmp_path / "nano.pt", n_head="2", activation="gelu_new")
    assert (dims["heads"], dims["activation"]) == (2, "gelu_new")


def test_tied_can_be_said_but_not_against_the_bits(tied: Path, untied: Path) -> None:
    assert recognise(tied).dims.entries["tied"].value is True
    assert recognise(tied, Options(given={"tied": "false"})).dims.entries["tied"].source == "user"
    assert recognise(untied).dims.entries["tied"].because == "lm_head.weight and transformer.wte.weight differ"
    with pytest.raises(MdlError, match=r"--set tied=true, but lm_head\.weight and transformer\.wte\.weight differ"):
        recognise(untied, Options(given={"tied": "true"}))
    with pytest.raises(MdlError, match="expected true or false"):
        recognise(untied, Options(given={"tied": "so-so"}))


@pytest.mark.parametrize(("bias", "wanted"), [(True, "gelu"), (None, "gelu_new")], ids=["bias key", "no bias key"])
def test_the_age_of_nanogpt_tells_its_gelu(
    bias: bool | None, wanted: str, tied: Path, old_without_bias_key: Path
) -> None:
    dims = measured(nanogpt.ARCH, tied if bias else old_without_bias_key)

    assert (dims["activation"], dims.entries["activation"].source) == (wanted, "default")


def meta_dims(tmp_path: Path, given: dict[str, str] | None = None, drop: str = "", **more: Any) -> Dims:
    state = make.llama_state()
    settings = make.params(state, **more)
    settings.pop(drop, None)
    return measured(llama_meta.ARCH, make.meta(tmp_path / "raw", state, settings), **given or {})


def test_llama_2_does_not_say_its_vocabulary(tmp_path: Path) -> None:
    dims = meta_dims(tmp_path, vocab_size=-1)

    assert (dims["vocab"], dims.entries["vocab"].source) == (40, "shapes")
    assert (dims["rope_theta"], dims["context"], dims["rope_scaling"]) == (10_000.0, 4096, "none")
    with pytest.raises(MdlError, match=r"vocab is 40 by the tensors .* but 41 by params.vocab_size"):
        meta_dims(tmp_path, vocab_size=41)


@pytest.mark.parametrize(
    ("more", "context"),
    [
        ({"norm_eps": 1e-6}, 2048),
        ({"rope_theta": 1e6}, 16_384),
        ({"rope_theta": 1_000_000}, 16_384),
        ({"use_scaled_rope": True}, 131_072),
        ({"max_seq_len": 777}, 777),
    ],
)
def test_context_is_that_of_the_release(more: dict[str, Any], context: int, tmp_path: Path) -> None:
    assert meta_dims(tmp_path, **more)["context"] == context


def test_params_json_may_be_wrapped(tmp_path: Path) -> None:
    state = make.llama_state()
    raw = make.meta(tmp_path / "raw", state, {"model": make.params(state, norm_eps=3e-5)})

    dims = measured(llama_meta.ARCH, raw)

    assert (dims["norm_eps"], dims.entries["norm_eps"].because) == (3e-5, "params.model.norm_eps")


def llama32(hidden: int, layers: int, heads: int) -> Inventory:
    """The shapes of a Llama 3.2 release, without a file."""
    shapes = {
        "tok_embeddings.weight": (128256, hidden),
        "norm.weight": (hidden,),
        "layers.0.attention.wq.weight": (hidden, hidden),
        "layers.0.attention.wk.weight": (8 * (hidden // heads), hidden),
        "layers.0.feed_forward.w1.weight": (8192, hidden),
    } | {f"layers.{i}.attention_norm.weight": (hidden,) for i in range(layers)}
    infos = {n: (TensorInfo(n, s, "bfloat16", "x", 0, dense(s), n),) for n, s in shapes.items()}
    params = {"dim": hidden, "n_layers": layers, "n_heads": heads, "n_kv_heads": 8, "vocab_size": 128256}
    return Inventory("llama-3.2", infos, {"params": {**params, "rope_theta": 5e5, "use_scaled_rope": True}})


@pytest.mark.parametrize(
    ("sizes", "factor"), [((2048, 16, 32), 32.0), ((3072, 28, 24), 32.0), ((4096, 32, 32), 8.0)], ids=["1B", "3B", "8B"]
)
def test_the_factor_of_llama_32_is_not_in_its_file(sizes: tuple[int, int, int], factor: float) -> None:
    measure = Measure(llama32(*sizes), {})
    llama_meta.dims(measure)
    dims = measure.done()

    assert (dims["rope_factor"], dims.entries["rope_factor"].source) == (factor, "default")
    assert (dims["context"], dims["rope_theta"], dims["rope_original_context"]) == (131_072, 500_000.0, 8192)
    asked = Measure(llama32(*sizes), {"rope_scaling_factor": "4"})
    llama_meta.dims(asked)
    assert asked.done()["rope_factor"] == 4.0


@pytest.mark.parametrize(
    ("heads", "says"),
    [
        (5, "5 heads do not fit wq with 32 rows"),
        (1, "1 heads of 32 channels do not fit wk with 16 rows"),
        (0, "0 heads do not fit wq with 32 rows"),
        (16, "kv_heads is 8 by the tensors (16 rows of wk / head_dim 2) but 2 by params.n_kv_heads"),
    ],
)
def test_a_number_of_heads_that_does_not_fit(heads: int, says: str, tmp_path: Path) -> None:
    with pytest.raises(MdlError, match=re.escape(says)):
        meta_dims(tmp_path, heads=heads)


def test_rank_files_whose_embedding_is_cut_either_way(two_ranks: Path, tmp_path: Path) -> None:
    assert measured(llama_meta.ARCH, two_ranks)["embedding_by_columns"] is True
    state = make.llama_state()
    raw = make.meta(tmp_path / "raw", state, make.params(state), ranks=2, by_columns=False)
    dims = measured(llama_meta.ARCH, raw)

    assert (dims["embedding_by_columns"], dims["vocab"], dims["ffn"], dims["kv_heads"]) == (False, 40, 48, 2)


@pytest.mark.parametrize("value", ["NaN", '"4"', "4.5", "true", "null"])
def test_values_of_the_wrong_kind_in_a_file(value: str, tmp_path: Path) -> None:
    raw = make.meta(tmp_path / "raw", make.llama_state(), make.params(make.llama_state()))
    text = (raw / "params.json").read_text().replace('"n_heads": 4', f'"n_heads": {value}')
    (raw / "params.json").write_text(text)
    assert json.loads(text)["n_heads"] != 4

    says = [what for what, _ in refusals(llama_meta.ARCH, raw)]

    assert any("n_heads" in what or "heads is neither" in what for what in says)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("Yes", True), ("0", False), ("FALSE", False)])
def test_booleans(text: str, value: bool) -> None:
    assert boolean(text) is value

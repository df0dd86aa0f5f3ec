"""Locate: each mutation of a layout is found in its module and explained by its cause.

``TABLE`` is also the table in docs/locate.md (``python benchmarks/locate_table.py``). The suite runs the rows marked
``suite``, one load of vLLM each; the benchmark runs all of them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdl.archs.registry import all_archs, mapping_path
from mdl.convert.plan import Plan, Source, Step
from mdl.convert.prepare import Options, prepare
from mdl.mappings.moves import Split
from mdl.mappings.tensors import TensorInfo
from mdl.validate import hypothesis
from mdl.validate.client import Engine
from mdl.validate.golden import foreign_reference, golden_reference, record_checkpoint
from mdl.validate.inputs import make_inputs
from mdl.validate.locate import locate
from mdl.validate.reference import Reference, builtin_reference, user_reference
from mdl.validate.report import Located
from mdl.validate.signature import describe, heads, ranges

from . import servable as make

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class Mutation:
    """What is done to a layout, the module that must be named, and what cause and signature must say."""

    name: str
    family: str
    change: Callable[[Tensors, Config], None]
    module: str
    cause: str
    signature: str = ""
    suite: bool = False


def layer(i: int, part: str) -> str:
    return f"model.layers.{i}.{part}.weight"


def unpermuted(name: str, count: int) -> Callable[[Tensors, Config], None]:
    def change(t: Tensors, _: Config) -> None:
        rows, width = t[name].shape
        t[name] = t[name].view(count, 2, rows // count // 2, width).transpose(1, 2).reshape(rows, width)

    return change


def exchanged(a: str, b: str) -> Callable[[Tensors, Config], None]:
    def change(t: Tensors, _: Config) -> None:
        t[a], t[b] = t[b], t[a]

    return change


def edited(name: str, make_new: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors, Config], None]:
    def change(t: Tensors, _: Config) -> None:
        t[name] = make_new(t[name].clone())

    return change


def configured(**fields: Any) -> Callable[[Tensors, Config], None]:
    def change(_: Tensors, config: Config) -> None:
        config |= fields

    return change


def row(k: int, factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(w: torch.Tensor) -> torch.Tensor:
        w[k] *= factor
        return w

    return change


def layers_exchanged(t: Tensors, _: Config) -> None:
    for name in [name for name in t if name.startswith("model.layers.1.")]:
        other = name.replace("layers.1.", "layers.2.")
        t[name], t[other] = t[other], t[name]


def head_is_the_embedding(t: Tensors, _: Config) -> None:
    t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()


def rounded(t: Tensors, _: Config) -> None:
    for name, tensor in t.items():
        t[name] = tensor.bfloat16().float()


SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EMBEDDING, FINAL, ROTARY = "model.embed_tokens.weight", "model.norm.weight", "nothing at position 0"
LN, FC = "transformer.h.0.ln_1", "transformer.h.1.mlp.c_fc"

TABLE = [
    Mutation(
        "q left in rotary pairs",
        "llama2c",
        unpermuted(layer(1, "self_attn.q_proj"), 4),
        "layers.1.attention.wq",
        "permute_rope was forgotten",
        suite=True,
    ),
    Mutation(
        "k left in rotary pairs",
        "llama2c",
        unpermuted(layer(2, "self_attn.k_proj"), 2),
        "layers.2.attention.wk",
        "permute_rope was forgotten",
    ),
    Mutation(
        "gate and up exchanged",
        "llama2c",
        exchanged(layer(0, "mlp.gate_proj"), layer(0, "mlp.up_proj")),
        "layers.0.feed_forward.w1",
        "holds what belongs into model.layers.0.mlp.up_proj.weight",
        suite=True,
    ),
    Mutation(
        "k and v exchanged",
        "llama2c",
        exchanged(layer(1, "self_attn.k_proj"), layer(1, "self_attn.v_proj")),
        "layers.1.attention.wk",
        "holds what belongs into model.layers.1.self_attn.v_proj.weight",
    ),
    Mutation(
        "key heads in another order",
        "llama2c",
        edited(layer(0, "self_attn.k_proj"), lambda w: w.view(2, 32, -1).flip(0).reshape(64, -1)),
        "layers.0.attention.wk",
        "heads in another order: 0 holds 1, 1 holds 0 .of 2.",
    ),
    Mutation(
        "o_proj's heads in another order",
        "llama2c",
        edited(layer(1, "self_attn.o_proj"), lambda w: w.view(-1, 4, 32)[:, [1, 0, 2, 3]].reshape(128, 128)),
        "layers.1.attention.wo",
        "heads in another order: 0 holds 1, 1 holds 0 .of 4.",
        suite=True,
    ),
    Mutation(
        "one row of o_proj zeroed",
        "llama2c",
        edited(layer(1, "self_attn.o_proj"), row(5, 0.0)),
        "layers.1.attention.wo",
        "row 5 of 128, zero there",
        "only in channel 5 of 128",
    ),
    Mutation(
        "one row of q times 1.5",
        "llama2c",
        edited(layer(2, "self_attn.q_proj"), row(3, 1.5)),
        "layers.2.attention.wq",
        "row 3 of 128, where it is 1.5 times what it should be",
        "only in channel 3 of 128",
    ),
    Mutation(
        "o_proj transposed",
        "llama2c",
        edited(layer(1, "self_attn.o_proj"), lambda w: w.T),
        "layers.1.attention.wo",
        "is transposed",
    ),
    Mutation(
        "one embedding row zeroed",
        "llama2c",
        edited(EMBEDDING, row(17, 0.0)),
        "tok_embeddings",
        "row 17 of 96, zero there",
        "only at token id 17",
        suite=True,
    ),
    Mutation(
        "final norm left at one",
        "llama2c",
        edited(FINAL, torch.ones_like),
        "norm",
        "model.norm.weight is all ones",
    ),
    Mutation(
        "a norm's weight with 1 added",
        "llama2c",
        edited(layer(2, "post_attention_layernorm"), lambda w: w + 1),
        "layers.2.ffn_norm",
        "is larger by 1 throughout",
    ),
    Mutation(
        "layers 1 and 2 exchanged",
        "llama2c",
        layers_exchanged,
        "layers.1.attention_norm",
        "holds what belongs into model.layers.2.input_layernorm.weight.*differ too: 17",
        suite=True,
    ),
    Mutation(
        "head overwritten by the embedding",
        "llama2c",
        head_is_the_embedding,
        "output",
        "holds what belongs into model.embed_tokens.weight",
    ),
    Mutation(
        "everything rounded to bfloat16",
        "llama2c",
        rounded,
        "tok_embeddings",
        "rounded to bfloat16.*differ too: 29",
    ),
    Mutation(
        "rms_norm_eps 1e-6 for 1e-5",
        "llama2c",
        configured(rms_norm_eps=1e-6),
        "layers.0.attention_norm",
        "config.json: rms_norm_eps.*falls from",
        "proportional to 1/rms²",
        suite=True,
    ),
    Mutation(
        "rope_theta 11000 for 10000",
        "llama2c",
        configured(rope_parameters={"rope_type": "default", "rope_theta": 11000.0}),
        "layers.0.attention",
        "config.json: rope_parameters.rope_theta.*falls from",
        ROTARY,
        suite=True,
    ),
    Mutation(
        "rotary scaling of Llama 3.1",
        "llama2c",
        configured(rope_parameters=SCALED),
        "layers.0.attention",
        "config.json: rope_parameters.*falls from",
        ROTARY,
    ),
    Mutation(
        "half as many heads, twice as wide",
        "llama2c",
        configured(num_attention_heads=2, num_key_value_heads=1, head_dim=64),
        "layers.0.attention",
        "so the config decides: num_attention_heads is 2 for 4",
    ),
    Mutation(
        "positions shifted by one",
        "nanogpt",
        edited("transformer.wpe.weight", lambda w: w.roll(1, 0)),
        "transformer.wpe",
        "is shifted by 1 row down",
        suite=True,
    ),
    Mutation(
        "gelu_new for gelu",
        "nanogpt",
        configured(activation_function="gelu_new"),
        "transformer.h.0.mlp",
        "config.json: activation_function.*falls from",
        suite=True,
    ),
    Mutation(
        "layer_norm_epsilon 1e-6 for 1e-5",
        "nanogpt",
        configured(layer_norm_epsilon=1e-6),
        LN,
        "config.json: layer_norm_epsilon.*falls from",
        suite=True,
    ),
    Mutation(
        "a bias zeroed",
        "nanogpt",
        edited(f"{FC}.bias", torch.zeros_like),
        FC,
        f"{FC}.bias is all zeros",
        "a bias",
        suite=True,
    ),
    Mutation(
        "c_proj not transposed",
        "nanogpt",
        edited("transformer.h.0.attn.c_proj.weight", lambda w: w.T),
        "transformer.h.0.attn.c_proj",
        "is transposed",
    ),
    Mutation(
        "k and v exchanged inside c_attn",
        "nanogpt",
        edited("transformer.h.1.attn.c_attn.weight", lambda w: w[:, [*range(64), *range(128, 192), *range(64, 128)]]),
        "transformer.h.1.attn.c_attn",
        "columns 64-191 of 192",
        "only in channels 64-191 of 192",
    ),
    Mutation(
        "rank files of wo joined in the wrong order",
        "llama_meta",
        edited(layer(0, "self_attn.o_proj"), lambda w: torch.cat([w[:, 64:], w[:, :64]], 1)),
        "layers.0.attention.wo",
        "heads in another order: 0 holds 1, 1 holds 0 .of 2.",
        suite=True,
    ),
    Mutation(
        "Llama 3.1's rotary scaling left out",
        "llama_meta",
        configured(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        "layers.0.attention",
        "config.json: rope_parameters.*falls from",
        ROTARY,
    ),
]
"""Every mutation, with what has to be said about it."""


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "llama2c": lambda folder: make.llama2c(folder / "ckpt.pt", layers=3),
    "nanogpt": lambda folder: make.nanogpt(folder / "ckpt.pt"),
    "llama_meta": lambda folder: make.meta(
        folder / "release", ranks=2, dtype=torch.float32, rope_theta=500000.0, use_scaled_rope=True, vocab_size=96
    ),
}


def checkpoint(family: str, folder: Path) -> Path:
    """The checkpoint that a family's mutations start from."""
    return CHECKPOINTS[family](folder)


def mutated(good: Path, out: Path, change: Callable[[Tensors, Config], None]) -> Path:
    """A copy of a layout, changed behind the manifest's back."""
    out.mkdir(parents=True)
    tensors, config = load_file(good / "model.safetensors"), json.loads((good / "config.json").read_text())
    change(tensors, config)
    save_file({k: t.contiguous() for k, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    (out / "mdl.json").write_text((good / "mdl.json").read_text())
    return out


def find(
    source: Path, layout: Path, engine: Engine, scratch: Path, reference: Reference | None = None, **options: Any
) -> Located | None:
    """Locate on the sequence that covers the vocabulary."""
    prepared = prepare(source, Options(**options))
    chosen = reference or builtin_reference(prepared.arch, prepared.dims, prepared.plan)
    ids = make_inputs(prepared.dims.integer("vocab"), prepared.dims.integer("context")).sequences
    covering = next(one for one in ids if 17 in one.ids)
    scratch.mkdir(exist_ok=True)
    return locate(layout, prepared, chosen, engine, scratch, ids=list(covering.ids))


def misses(mutation: Mutation, found: Located | None) -> list[str]:
    """What the report of a mutation lacks."""
    if found is None:
        return ["nothing was located"]
    said = f"{found.governed_by} :: {found.hypothesis}"
    wrong = [] if found.module == mutation.module else [f"{found.module} named, not {mutation.module}"]
    wrong += [] if re.search(mutation.cause, said) else [f"no {mutation.cause!r} in: {said}"]
    wrong += [] if mutation.signature in found.signature else [f"no {mutation.signature!r} in: {found.signature}"]
    return wrong


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A checkpoint and its layout, per family."""
    made: dict[str, tuple[Path, Path]] = {}
    for family in CHECKPOINTS:
        folder = tmp_path_factory.mktemp(family)
        source = checkpoint(family, folder)
        made[family] = source, make.layout(source, folder / "out")
    return made


@pytest.mark.engine
@pytest.mark.parametrize("mutation", [m for m in TABLE if m.suite], ids=lambda m: m.name)
def test_names_the_module_and_the_cause(
    mutation: Mutation, good: dict[str, tuple[Path, Path]], tmp_path: Path, engine: Engine
) -> None:
    source, layout = good[mutation.family]
    found = find(source, mutated(layout, tmp_path / "out", mutation.change), engine, tmp_path / "scratch")

    assert misses(mutation, found) == []
    assert found is not None
    assert found.local_error > 16 * found.floor
    assert len(found.layers) > 10


@pytest.mark.engine
@pytest.mark.parametrize("family", ["llama2c", "nanogpt"])
def test_a_right_layout_has_no_faulty_module(
    family: str, good: dict[str, tuple[Path, Path]], tmp_path: Path, engine: Engine
) -> None:
    assert find(*good[family], engine, tmp_path / "scratch") is None


def forgetful(folder: Path, change: Callable[[str], str]) -> str:
    """llama2.c with a changed mapping, as a file for ``--arch``."""
    text = mapping_path(all_archs()["llama2c"]).read_text()
    (folder / "forgetful.yaml").write_text(change(text))
    (folder / "forgetful.py").write_text("from mdl.archs.llama2c import ARCH\n")
    return str(folder / "forgetful.py")


def without_rotary(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if "permute_rope" not in line)


def gate_for_up(text: str) -> str:
    return text.replace("gate_proj", "?").replace("up_proj", "gate_proj").replace("?", "up_proj")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("change", "module", "signature", "cause"),
    [
        (without_rotary, "layers.0.attention", ROTARY, "not moved from rotary pairs to rotary halves: so changed"),
        (
            gate_for_up,
            "layers.0.feed_forward",
            "at every position alike",
            "with layers.0.feed_forward.w1.weight and layers.0.feed_forward.w3.weight exchanged: so changed",
        ),
    ],
)
def test_a_wrong_mapping_is_found_by_trial(
    change: Callable[[str], str], module: str, signature: str, cause: str, tmp_path: Path, engine: Engine
) -> None:
    """The layout is what the plan makes, so the weights can't tell: the changed reference does."""
    arch = forgetful(tmp_path, change)
    source = make.llama2c(tmp_path / "ckpt.pt")
    found = find(source, make.layout(source, tmp_path / "out", arch=arch), engine, tmp_path / "scratch", arch=arch)

    assert found is not None
    assert found.module == module
    assert found.signature.startswith(signature)
    assert cause in found.hypothesis
    assert "forgetful.yaml:" in found.governed_by


def test_parts_that_a_rule_splits_are_tried_in_each_other_s_place() -> None:
    info = TensorInfo("ff.gate_up", (6, 2), "float32", "", 0, (2, 1), "")
    step = Step(
        "transform",
        ("mlp.gate.weight", "mlp.up.weight", "mlp.rest.weight"),
        ((2, 2),) * 3,
        "float32",
        (Source("ff.gate_up", (info,), (6, 2), None),),
        (Split(0, (2, 2, 2)),),
        rule="foo.yaml:7:3",
    )
    prepared: Any = SimpleNamespace(plan=Plan((step,), (), "float32", 1))
    state = {"ff.gate_up": torch.arange(12.0).view(6, 2)}

    first, *rest = hypothesis.exchanged(prepared, {"ff.gate_up": ("mlp.gate.weight", "foo.yaml:7:3")})

    assert first.words == "with the parts of ff.gate_up that become gate and up exchanged"
    assert first.governed_by == "mapping: foo.yaml:7:3"
    assert first.edit is not None
    assert first.edit(state)["ff.gate_up"][:, 0].tolist() == [4, 6, 0, 2, 8, 10]
    assert len(rest) == 2


def test_a_value_that_no_dim_decides_is_laid_to_who_wrote_it() -> None:
    """rope_theta is 10000 by the dims, but this family writes what it likes."""

    def hf_config(dims: Config) -> Config:
        return {"hidden_size": dims["hidden"], "limit": 500_000, "rope_theta": 500_000.0, "bias": False}

    prepared: Any = SimpleNamespace(arch=SimpleNamespace(hf_config=hf_config), dims={"hidden": 64, "rope_theta": 1e4})

    assert hypothesis.field_of(prepared, {"hidden": 65}) == "config.json: hidden_size"
    theta = hypothesis.field_of(prepared, {"rope_theta": 5e5})
    assert theta == "config.json: rope_theta, written by test_locate.py's hf_config"
    base = hypothesis.field_of(prepared, {"rotary_base": 5e5})
    assert base == "config.json: limit, rope_theta, written by test_locate.py's hf_config"
    other = hypothesis.field_of(prepared, {"rope_theta": 1e6})
    assert other == theta  # it holds neither value, but the name is the dim's own
    assert hypothesis.field_of(prepared, {"activation": "gelu"}) == "config.json: a value that it does not hold"


USERS = """
import torch
from mdl.archs.eager.llama_meta import build as eager

DIMS = dict(layers=3, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=160, vocab=96, context=64, norm_eps=1e-6,
            rope_theta=10000.0, rope_scaling="none", tied=False)

class Model(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, ids):
        return self.inner(ids)

def build(checkpoint):
    inner = eager(DIMS)
    inner.load_state_dict(torch.load(checkpoint)["model"], assign=True)
    return {returned}
"""


@pytest.mark.engine
@pytest.mark.parametrize("returned", ["Model(inner)", "lambda ids: inner(ids)"])
def test_a_users_reference_is_looked_into_where_its_names_match(
    returned: str, good: dict[str, tuple[Path, Path]], tmp_path: Path, engine: Engine
) -> None:
    source, layout = good["llama2c"]
    file = tmp_path / "model.py"
    file.write_text(USERS.replace("{returned}", returned))
    reference = user_reference(f"{file}:build", source)
    found = find(source, layout, engine, tmp_path / "scratch", reference)

    assert found is not None
    if returned.startswith("Model"):
        assert found.module == "layers.0.attention_norm"
        assert found.governed_by == "the reference's own code"
    else:
        assert found.module == ""
        assert "return from build a torch.nn.Module" in found.hypothesis


def elsewhere(file: Path, source: Path, folder: Path) -> Reference:
    """The user's code in another process, on the layout's own checkpoint."""
    return foreign_reference(f"{file}:build", source, sys.executable, prepare(source), 0, dtypes=())


def of_another(file: Path, source: Path, folder: Path) -> Reference:
    """A recording of it, of another checkpoint."""
    other = make.llama2c(folder / "other.pt", layers=3, seed=9)
    record_checkpoint(other, f"{file}:build", folder / "golden.safetensors", Options())
    return golden_reference(folder / "golden.safetensors", files=[source])


@pytest.mark.engine
@pytest.mark.parametrize(
    ("made", "cause", "why"),
    [
        (elsewhere, "the reference's own code", f"model.py:build, run by {sys.executable} ran in another process"),
        (of_another, "the golden file was recorded from other files than", "is a recording of logits"),
    ],
)
def test_what_cannot_be_looked_into_says_why(
    made: Callable[[Path, Path, Path], Reference],
    cause: str,
    why: str,
    good: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    engine: Engine,
) -> None:
    """The user's code did return a module, so to return one is no advice."""
    source, layout = good["llama2c"]
    file = tmp_path / "model.py"
    file.write_text(USERS.replace("{returned}", "Model(inner)"))
    found = find(source, layout, engine, tmp_path / "scratch", made(file, source, tmp_path))

    assert found is not None
    assert found.governed_by.startswith(cause)
    assert why in found.hypothesis
    assert "verify with --reference FILE.py:FUNCTION" in found.hypothesis
    assert "return from build" not in found.hypothesis


def test_a_signature_is_read_from_positions_tokens_and_scales() -> None:
    exact = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = [*range(20), *range(20)]
    one = exact.clone()
    one[[3, 23]] = 0
    growing = exact * (1 + 0.01 * torch.arange(40.0)[:, None])

    assert describe(one, exact, None, ids, 1e-15).startswith("only at token id 3")
    assert describe(growing, exact, None, ids, 1e-15).startswith("nothing at position 0, grows with the position")
    assert "1.5 times" in describe(1.5 * exact, exact, None, ids, 1e-15)
    lost = exact.clone()
    lost[[3, 23], 5] = torch.nan
    assert describe(exact / 0, exact, None, ids, 1e-15) == "not numbers at 40 of 40 positions, positions 0-39"
    assert describe(lost, exact, None, ids, 1e-15) == "not numbers at 2 of 40 positions, positions 3, 23"


def test_no_heads_are_solved_for_where_an_error_is_no_number() -> None:
    """LAPACK refuses NaN, and the rest of the report would be lost."""
    wrong = torch.ones(5, 16)
    wrong[2, 3] = torch.nan

    assert heads(wrong, torch.eye(16), 4) == ()
    assert heads(wrong / 0, torch.eye(16), 4) == ()


def test_heads_are_solved_for_through_the_output_projection() -> None:
    rng = torch.Generator().manual_seed(0)
    projection = torch.randn(16, 16, generator=rng, dtype=torch.float64)
    mixed = torch.zeros(5, 16, dtype=torch.float64)
    mixed[:, 4:8] = 1

    assert heads(mixed @ projection.T, projection, 4) == (1,)
    assert ranges("head", [1]) == "head 1"
    assert ranges("row", [1, 2, 3, 7]) == "rows 1-3, 7"


def test_rows_of_q_and_k_are_found_inside_a_fused_tensor() -> None:
    info = TensorInfo("mix.wqkv", (16, 2), "float32", "", 0, (2, 1), "")
    targets = tuple(f"attn.{part}_proj.weight" for part in "qkv")
    source = Source("mix.wqkv", (info,), (16, 2), None)
    ops = (Split(0, (8, 4, 4)),)
    step = Step("transform", targets, ((8, 2), (4, 2), (4, 2)), "float32", (source,), ops, rule="foo.yaml:7:3")
    prepared: Any = SimpleNamespace(plan=Plan((step,), (), "float32", 1), dims={"head_dim": 4, "kv_heads": 1})
    state = {"mix.wqkv": torch.arange(32.0).view(16, 2)}

    back, forth, *_, flat = hypothesis.reordered(prepared, {"mix.wqkv": (targets[0], "foo.yaml:7:3")})

    assert back.edit is not None
    assert forth.edit is not None
    assert flat.edit is not None
    rows = (forth.edit(state)["mix.wqkv"][:, 0] / 2).tolist()
    assert rows == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 13, 14, 15]  # two heads of q, one of k; v stays
    assert torch.equal(back.edit(forth.edit(state))["mix.wqkv"], state["mix.wqkv"].double())
    assert torch.equal(flat.edit(state)["mix.wqkv"][8:], state["mix.wqkv"][8:].double())  # a scale is q's alone

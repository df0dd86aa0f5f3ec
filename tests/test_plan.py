"""Plans from metadata alone: what becomes of every tensor, and every way in which a mapping and a file disagree."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mdl.archs import llama_meta
from mdl.archs.base import Inventory, Measure
from mdl.archs.registry import mapping_path
from mdl.convert.expected import expected_tensors
from mdl.convert.manifest import describe_step
from mdl.convert.plan import Plan
from mdl.convert.planner import _Planner, make_plan
from mdl.convert.prepare import Options, prepare
from mdl.errors import Kind, MdlError
from mdl.mappings import moves
from mdl.mappings.expand import expand
from mdl.mappings.jsonable import _line, _quick_line
from mdl.mappings.parse import load_mapping, parse_mapping
from mdl.mappings.tensors import Shape, Target, TensorInfo, dense

from . import checkpoints as make
from .cases import CASES, WRITTEN, Case, placed


def stored(name: str, shape: Shape, dtype: str = "float32", rank: int = 0) -> TensorInfo:
    return TensorInfo(name, shape, dtype, f"rank{rank}.pt", 0, dense(shape), f"{rank}/{name}", rank, name)


def plan(
    body: str,
    have: Mapping[str, Any],
    want: Mapping[str, Shape],
    *,
    ranks: int = 1,
    tied: bool = False,
    dtype: str | None = None,
) -> Plan:
    """A plan for a made-up mapping; ``have`` maps a name to a shape, a (shape, dtype) or a list with one per rank."""

    def infos(name: str, value: Any) -> tuple[TensorInfo, ...]:
        several = value if isinstance(value, list) else [value] * ranks
        full = [v if v and isinstance(v[0], tuple) else (v, "float32") for v in several]
        return tuple(stored(name, shape, kind, rank) for rank, (shape, kind) in enumerate(full))

    inventory = Inventory("ckpt.pt", {name: infos(name, value) for name, value in have.items()}, ranks=ranks)
    mapping = parse_mapping("format: 1\ntitle: t\nranges: {i: layers}\n" + body, "m.yaml")
    expanded = expand(mapping, {"layers": 2, "heads": 2}, {"bias": True})
    return make_plan(expanded, inventory, want, tied=tied, dtype=dtype)


def problem(*args: Any, **options: Any) -> str:
    found = plan(*args, **options)
    assert len(found.problems) == 1, found.problems
    with pytest.raises(MdlError) as caught:
        found.refuse()
    assert caught.value.kind is Kind.INPUT
    return str(found.problems[0].what)


def test_a_plan_without_problems() -> None:
    got = plan(
        "keep: [n]\ntransform: [{from: w, to: W, ops: [transpose]}]\nfill: {zeros: [b]}\ndrop: {m: a mask}\n"
        "tie: {head: w}\n",
        {"m": (9,), "head": (4, 6), "w": (4, 6), "n": (4,)},
        {"W": (6, 4), "b": (6,), "n": (4,)},
        tied=True,
    )

    got.refuse()
    assert [(s.kind, s.targets, s.shapes) for s in got.steps] == [
        ("transform", ("W",), ((6, 4),)),
        ("fill", ("b",), ((6,),)),
        ("keep", ("n",), ((4,),)),
        ("tie", (), ()),
        ("drop", (), ()),
    ]
    assert (got.dtype, got.nbytes, len(got.writes)) == ("float32", 4 * (24 + 6 + 4), 3)
    assert [s.rule for s in got.steps] == ["m.yaml:5:13", "m.yaml:6:16", "m.yaml:4:8", "m.yaml:8:7", "m.yaml:7:8"]
    assert (got.steps[3].reason, got.steps[4].reason) == ("equal to w", "a mask")


@pytest.mark.parametrize(
    ("body", "have", "want", "says"),
    [
        ("keep: [a, b]", {"a": (2,)}, {"a": (2,), "b": (2,)}, "b is missing"),
        ("keep: [a]", {"a": (2,), "b": (3, 4)}, {"a": (2,)}, "b [3, 4] is in the checkpoint, but no rule claims it"),
        ("keep: [a]", {"a": (2,)}, {"a": (2,), "b": (3,)}, "nothing makes b [3], which the target class needs"),
        ("keep: [a, b]", {"a": (2,), "b": (3,)}, {"a": (2,)}, "makes b, which the target class does not have"),
        ("keep: [a]", {"a": (2,)}, {"a": (3,)}, "a would be [2], the target class has [3]"),
        ("keep: [a]", {"a": ((2,), "int64")}, {"a": (2,)}, "a would be int64: a weight must be a floating type"),
        ("keep: [a]", {"a": ((2,), "complex64")}, {"a": (2,)}, "a would be complex64"),
        ("keep: [a]\nrename: {a: b}", {"a": (2,)}, {"a": (2,), "b": (2,)}, "a is claimed twice"),
        ("keep: [a]\ndrop: {a: no}", {"a": (2,)}, {"a": (2,)}, "a is claimed twice"),
        ("keep: [a]\nrename: {b: a}", {"a": (2,), "b": (2,)}, {"a": (2,)}, "a is made twice"),
        ("keep: [a]\nfill: {zeros: [a]}", {"a": (2,)}, {"a": (2,)}, "a is made twice"),
        ("keep: [a]\nfill: {zeros: [z]}", {"a": (2,)}, {"a": (2,)}, "fill makes z, which the target class does not"),
        ("keep: [a]\ntie: {b: a}", {"a": (2,), "b": (2,)}, {"a": (2,)}, "b differs from a, which it should equal"),
        ("transform: [{from: a, ops: [transpose]}]", {"a": (2,)}, {"a": (2,)}, "a: transpose takes a matrix, got [2]"),
        (
            "transform: [{from: [a, b], to: c, ops: [concat]}]",
            {"a": (2,), "b": ((2,), "float16")},
            {"c": (4,)},
            "a, b: they are of different types: float16, float32",
        ),
        (
            "transform: [{from: a, to: [b, c], ops: [transpose]}]",
            {"a": (2, 3)},
            {"b": (3, 2), "c": (3, 2)},
            "1 tensors come out for 2 targets",
        ),
        (
            "transform: [{from: a, ops: [{permute_rope: {heads: heads - 2}}]}]",
            {"a": (4, 3)},
            {"a": (4, 3)},
            "a: permute_rope: [4, 3] does not split into 0 heads",
        ),
    ],
)  # fmt: skip
def test_problems(body: str, have: dict[str, Any], want: dict[str, Shape], says: str) -> None:
    assert says in problem(body, have, want)


@pytest.mark.parametrize(
    ("shards", "have", "says"),
    [
        ("", [(2, 3), (2, 3)], "a is in 2 rank files, but no shards rule joins it"),
        ("shards: {cat0: [a]}", [(2, 3)], "a is in 1 of 2 rank files, which 'cat' does not allow"),
        ("shards: {disjoint: [a]}", [(4, 3), (4, 3)], "a is in 2 of 2 rank files, which 'disjoint' does not allow"),
        ("shards: {cat0: [a]}", [(2, 3), (2, 4)], "a: rank files [[2, 3], [2, 4]] do not join along dimension 0"),
        ("shards: {equal: [a]}", [(4, 3), (4, 2)], "a: rank files have different shapes"),
        ("shards: {sum: [a]}", [(4, 3), (2, 3)], "a: rank files have different shapes"),
        ("shards: {blocks: [{names: [a], sizes: [2, 4]}]}", [(2, 3), (2, 3)], "a: blocks [2, 4] do not fit 2 rank"),
        ("shards: {blocks: [{names: [a], sizes: [1, 3]}]}", [(2, 3), (2, 3)], "a: blocks [1, 3] do not fit 2 rank"),
        ("shards: {blocks: [{names: [a], axis: 2, sizes: [4]}]}", [(2, 3), (2, 3)], "do not join along dimension 2"),
        ("shards: {cat0: [a]}", [((2, 3), "float16"), (2, 3)], "a: they are of different types: float16, float32"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit(shards: str, have: list[Any], says: str) -> None:
    found = plan(f"keep: [a]\n{shards}", {"a": have}, {"a": (4, 3)}, ranks=2).problems

    assert any(says in p.what for p in found), found


def test_ranks_of_unequal_size_join_if_the_sum_is_right() -> None:
    plan("keep: [a]\nshards: {cat0: [a]}", {"a": [(1, 3), (3, 3)]}, {"a": (4, 3)}, ranks=2).refuse()


def test_every_problem_is_told_at_once(extra_tensor: Path, missing_tensor: Path) -> None:
    found = plan("keep: [a, b, 'c.{k}']\nwhen: {x: {}}", {"a": (2,), "d": (1,)}, {"a": (3,), "e": (4,)}).problems
    assert len(found) == 7

    assert [p.what for p in prepare(extra_tensor).plan.problems] == [
        "transformer.h.0.adapter.weight [3] is in the checkpoint, but no rule claims it"
    ]
    (missing,) = prepare(missing_tensor).plan.problems
    assert (missing.what, missing.where) == ("transformer.h.1.mlp.c_proj.weight is missing", str(missing_tensor))
    assert missing.do.startswith("the mapping needs it (nanogpt.yaml:")


def test_dtype_is_that_of_most_bytes_written() -> None:
    body = "keep: [a, b, n]\nfill: {zeros: [z]}\ndrop: {mask: a buffer}"
    have = {"a": ((8, 8), "bfloat16"), "b": (2, 2), "n": (9,), "mask": (99, 99)}
    want = {"a": (8, 8), "b": (2, 2), "n": (9,), "z": (3,)}

    kept, cast = plan(body, have, want), plan(body, have, want, dtype="float16")

    assert (kept.dtype, [s.dtype for s in kept.writes]) == ("bfloat16", ["bfloat16", "float32", "float32", "bfloat16"])
    assert (cast.dtype, {s.dtype for s in cast.writes}) == ("float16", {"float16"})


def test_a_tie_whose_twin_is_missing(tmp_path: Path) -> None:
    state = make.llama_state()
    args = make.llama2c_args(state)
    del state["tok_embeddings.weight"]
    path = make.trained(tmp_path / "x.pt", state, args)

    got = prepare(path, Options(arch="llama2c"))

    assert got.dims.entries["tied"].because == "there is output.weight, but no tok_embeddings.weight"
    assert "tok_embeddings.weight is missing" in {p.what for p in got.plan.problems}


def seventy() -> Inventory:
    """Llama 2 70B as released: 80 layers, 8 ranks, no file at all."""
    hidden, ffn, ranks = 8192, 28672, 8
    parts = {
        "attention.wq": (hidden // ranks, hidden),
        "attention.wk": (1024 // ranks, hidden),
        "attention.wv": (1024 // ranks, hidden),
        "attention.wo": (hidden, hidden // ranks),
        "feed_forward.w1": (ffn // ranks, hidden),
        "feed_forward.w2": (hidden, ffn // ranks),
        "feed_forward.w3": (ffn // ranks, hidden),
        "attention_norm": (hidden,),
        "ffn_norm": (hidden,),
    }
    shapes: dict[str, Shape] = {"tok_embeddings.weight": (32000, hidden // ranks), "norm.weight": (hidden,)}
    shapes |= {"output.weight": (32000 // ranks, hidden), "rope.freqs": (64,)}
    shapes |= {f"layers.{i}.{part}.weight": shape for i in range(80) for part, shape in parts.items()}
    infos = {n: tuple(stored(n, s, "bfloat16", rank) for rank in range(ranks)) for n, s in shapes.items()}
    params = {"dim": hidden, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "norm_eps": 1e-5, "vocab_size": -1}
    return Inventory("llama-2-70b", infos, {"params": params}, ranks=ranks)


def test_a_plan_of_real_size_takes_no_time() -> None:
    inventory = seventy()
    begin = time.process_time()
    measure = Measure(inventory, {})
    llama_meta.dims(measure)
    dims = measure.done()
    expanded = expand(load_mapping(mapping_path(llama_meta.ARCH)), dims.sizes(), dims.flags())
    expected = expected_tensors(llama_meta.hf_config(dims.having("tied", dims.entries["embedding_by_columns"])) | {
        "tie_word_embeddings": False
    })  # fmt: skip
    got = make_plan(expanded, inventory, expected, tied=False)
    seconds = time.process_time() - begin

    got.refuse()
    assert seconds < 2
    assert (len(got.writes), got.dtype, got.nbytes) == (80 * 9 + 3, "bfloat16", 2 * 68_976_648_192)
    steps = {step.targets[0]: step for step in got.writes}
    query = steps["model.layers.79.self_attn.q_proj.weight"]
    assert (query.shapes, query.ops) == (((8192, 8192),), (moves.PermuteRope(64),))
    key = steps["model.layers.0.self_attn.k_proj.weight"]
    assert (key.shapes, key.ops) == (((1024, 8192),), (moves.PermuteRope(8),))
    joins = {name: step.sources[0].join for name, step in steps.items()}
    assert [(j.how, j.axis) for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
            "model.layers.5.mlp.down_proj.weight") if (j := joins[name])] == [
        ("cat", 1), ("cat", 0), ("equal", 0), ("cat", 1)
    ]  # fmt: skip
    assert [s.sources[0].name for s in got.steps if s.kind == "drop"] == ["rope.freqs"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rules_taken_together_make_the_steps_that_they_make_one_by_one(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = placed(case, WRITTEN, tmp_path)
    together = prepare(path, options).plan
    monkeypatch.setattr(_Planner, "_take_all", lambda *_: False)

    assert together.steps
    assert prepare(path, options).plan == together
    described = [describe_step(step) for step in together.steps]
    assert [*map(_quick_line, described)] == [*map(_line, described)]


def test_what_is_alike_but_does_not_fit_is_a_problem() -> None:
    """The layers before were fine, and of the same shapes."""
    body = "transform: [{from: 'h.{i}.w', to: 'l.{i}.w', ops: [transpose]}]\n"
    have = {"h.0.w": (4, 6), "h.1.w": (4, 6)}

    assert plan(body, have, {"l.0.w": (6, 4), "l.1.w": (6, 4)}).problems == ()
    assert problem(body, have, {"l.0.w": (6, 4), "l.1.w": (6, 5)}).startswith("l.1.w would be [6, 4]")
    assert len(plan(body, have, {"l.0.w": (6, 4)}).problems) == 1


def test_what_the_class_of_config_json_lacks_is_not_the_mappings_doing() -> None:
    mapping = parse_mapping("format: 1\ntitle: t\nkeep: ['{target}']\n", "m.yaml")
    want = {"a": (2,), "b": (2,)}
    inventory = Inventory("ckpt.pt", {"a": (stored("a", (2,)),)})
    (lacks,) = make_plan(expand(mapping, {}, {}, Target(want)), inventory, want, tied=False).problems

    assert lacks.what == "b is missing"
    assert "config.json" in lacks.do
    assert "m.yaml" not in lacks.do


def test_alike_tensors_of_other_types_keep_them() -> None:
    body, want = "rename: {'h.{i}.w': 'l.{i}.w'}\n", {"l.0.w": (4, 6), "l.1.w": (4, 6)}
    have = {"h.0.w": ((4, 6), "float32"), "h.1.w": ((4, 6), "bfloat16")}
    got = plan(body, have, want)

    assert [step.dtype for step in got.steps] == ["float32", "bfloat16"]
    assert [step.source_dtype for step in got.steps] == ["float32", "bfloat16"]
    assert (
        problem(body, have | {"h.1.w": ((4, 6), "int32")}, want)
        == "l.1.w would be int32: a weight must be a floating type"
    )

"""The verifier: green on right conversions of every family, red on each sabotage, and honest about what it can't do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from mdl.archs.registry import all_archs, mapping_path
from mdl.convert.prepare import Options
from mdl.errors import Kind, MdlError
from mdl.validate.client import Engine
from mdl.validate.compare import CEILING, RATIO, distance, judge
from mdl.validate.golden import record_checkpoint
from mdl.validate.inputs import make_inputs
from mdl.validate.report import Check, Report, green_report, save_report
from mdl.validate.verify import Settings, verify

from . import servable as make

pytestmark = pytest.mark.engine

RIGHT: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "nanogpt": (lambda p: make.nanogpt(p / "ckpt.pt"), {}),
    "nanogpt without biases, untied": (lambda p: make.nanogpt(p / "ckpt.pt", bias=False, tied=False), {}),
    "nanogpt with the old GELU": (lambda p: make.nanogpt(p / "ckpt.pt"), {"given": {"activation": "gelu_new"}}),
    "nanogpt rounded to bfloat16": (lambda p: make.nanogpt(p / "ckpt.pt"), {"dtype": "bfloat16"}),
    "llama2c, tied": (lambda p: make.llama2c(p / "ckpt.pt", tied=True), {}),
    "meta, two ranks, bfloat16": (
        lambda p: make.meta(p / "release", ranks=2, dtype=torch.bfloat16),
        {"given": {"context": "256"}},
    ),
    "meta, scaled rotary": (
        lambda p: make.meta(p / "release", dtype=torch.float32, use_scaled_rope=True, rope_theta=5e5),
        {"given": {"context": "256"}},
    ),
}


ALL = ("layout", "coverage", "prefill", "decode", "generate")


def verdicts(report: Report) -> dict[str, bool | None]:
    return {one.name: one.ok for one in report.checks}


def check(report: Report, name: str) -> Check:
    return next(one for one in report.checks if one.name == name)


def dtype_verdict(report: Report) -> dict[str, bool | None]:
    """A layout that is served in 16 bits has one more check, which must pass too."""
    return {} if report.dtype == "float32" else {f"dtype {report.dtype}": True}


@pytest.mark.parametrize("name", RIGHT)
def test_right_conversions_are_green(name: str, tmp_path: Path, engine: Engine) -> None:
    checkpoint, options = RIGHT[name][0](tmp_path), RIGHT[name][1]
    report = verify(make.layout(checkpoint, tmp_path / "out", **options), engine=engine)

    assert verdicts(report) == {**dict.fromkeys(ALL, True), **dtype_verdict(report)}
    assert report.ok
    for name in ("prefill", "decode"):
        figures = check(report, name).figures
        assert 0 < figures["nmse"] < CEILING
        assert figures["ratio"] < RATIO
    assert report.versions["model class"].endswith(report.target)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout of a llama2.c checkpoint, whose checkpoint stays beside it."""
    folder = tmp_path_factory.mktemp("good")
    return make.layout(make.llama2c(folder / "ckpt.pt"), folder / "out")


def edited(good: Path, out: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    """A copy of a layout whose tensors or config were changed behind the manifest's back."""
    out.mkdir()
    tensors, config = load_file(good / "model.safetensors"), json.loads((good / "config.json").read_text())
    change(tensors, config)
    save_file({k: t.contiguous() for k, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    for name in ("mdl.json", "generation_config.json"):
        (out / name).write_text((good / name).read_text())
    return out


Q = "model.layers.1.self_attn.q_proj.weight"
GATE, UP = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))


def unpermute(t: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
    t[Q] = t[Q].view(4, 2, 16, 128).transpose(1, 2).reshape(128, 128)


def swap_gate_up(t: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
    t[GATE], t[UP] = t[UP], t[GATE]


def swap_heads(t: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
    k = "model.layers.0.self_attn.k_proj.weight"
    t[k] = t[k].view(2, 32, 128).flip(0).reshape(64, 128)


def zero_row(t: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
    t["model.embed_tokens.weight"][17] = 0


def final_norm_at_one(t: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
    t["model.norm.weight"].fill_(1)


def eps(_: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["rms_norm_eps"] = 1e-6


def theta(_: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["rope_parameters"]["rope_theta"] = 11_000.0


UNLOCATED = Settings(locate=False)
"""Where a fault begins is what test_locate asks."""
SABOTAGE = [unpermute, swap_gate_up, swap_heads, zero_row, final_norm_at_one, eps, theta]


@pytest.mark.parametrize("change", SABOTAGE, ids=lambda f: f.__name__)
def test_each_sabotage_fails_both_the_hashes_and_the_logits(
    change: Callable[..., None], good: Path, tmp_path: Path, engine: Engine
) -> None:
    report = verify(edited(good, tmp_path / "out", change), UNLOCATED, engine=engine)

    assert not report.ok
    assert not check(report, "layout").ok
    assert check(report, "coverage").ok
    assert check(report, "prefill").ok is False
    if change is not zero_row:  # the decoded sequence need not hold that one token; the vocabulary's does
        assert check(report, "decode").ok is False


def test_a_missing_projection_that_vllm_would_load_is_found(good: Path, tmp_path: Path, engine: Engine) -> None:
    def drop(t: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        del t["model.layers.1.self_attn.o_proj.weight"]

    report = verify(edited(good, tmp_path / "out", drop), UNLOCATED, engine=engine)

    assert [check(report, name).ok for name in ALL[:4]] == [False] * 4
    assert any("model.layers.1.self_attn.o_proj" in line for line in check(report, "coverage").detail)


def test_a_bias_that_vllm_would_ignore_is_found(good: Path, tmp_path: Path, engine: Engine) -> None:
    def add(t: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        t["model.layers.0.self_attn.o_proj.bias"] = torch.full((128,), 3.0)

    report = verify(edited(good, tmp_path / "out", add), UNLOCATED, engine=engine)

    coverage = check(report, "coverage")
    assert coverage.ok is False
    assert any("model.layers.0.self_attn.o_proj.bias" in line for line in coverage.detail)


def test_a_layout_that_vllm_cannot_load_fails_without_ending_the_engine(
    good: Path, tmp_path: Path, engine: Engine
) -> None:
    def narrow(t: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        t[UP] = t[UP][:-16]

    report = verify(edited(good, tmp_path / "out", narrow), UNLOCATED, engine=engine)

    assert not report.ok
    assert check(report, "coverage").ok is False
    assert check(report, "prefill").ok is None
    assert verify(good, engine=engine).ok


def test_a_wrong_mapping_is_caught_by_the_logits_alone(tmp_path: Path, engine: Engine) -> None:
    """Everything about this layout is consistent; only the model is another one."""
    text = mapping_path(all_archs()["llama2c"]).read_text()
    (tmp_path / "forgetful.yaml").write_text("\n".join(x for x in text.splitlines() if "permute_rope" not in x))
    (tmp_path / "forgetful.py").write_text("from mdl.archs.llama2c import ARCH\n")
    checkpoint = make.llama2c(tmp_path / "ckpt.pt")
    arch = str(tmp_path / "forgetful.py")
    out = make.layout(checkpoint, tmp_path / "out", arch=arch)

    report = verify(out, Settings(arch=arch, locate=False), engine=engine)

    assert [check(report, name).ok for name in ALL[:4]] == [True, True, False, False]


REFERENCE = """
import torch
from msgspec.structs import replace
from pathlib import Path
from mdl.archs.eager.llama_meta import build as eager

DIMS = dict(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=160, vocab=96, context=64, norm_eps={eps},
            rope_theta=10000.0, rope_scaling="none", tied=False)

class Model(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, ids{more}):
        logits = self.inner(ids)
        return {returns}

def build(checkpoint: Path):
    inner = eager(DIMS)
    inner.load_state_dict(torch.load(checkpoint)["model"], assign=True)
    return Model(inner)
"""


@pytest.mark.parametrize(
    ("more", "returns"),
    [
        ("", "logits"),
        ("", "(logits, None)"),
        ("", "dict(logits=logits)"),
        (", targets=None", "logits if targets is not None else logits[:, -1:]"),
    ],
)
def test_a_users_own_forward_is_believed(more: str, returns: str, good: Path, tmp_path: Path, engine: Engine) -> None:
    file = tmp_path / "model.py"
    file.write_text(REFERENCE.format(eps=1e-5, more=more, returns=returns))
    report = verify(good, Settings(reference=f"{file}:build"), engine=engine)

    assert report.ok
    assert report.reference == f"{file}:build"
    assert report.trusted == ()


def test_a_users_own_forward_overrules_ours(good: Path, tmp_path: Path, engine: Engine) -> None:
    file = tmp_path / "model.py"
    file.write_text(REFERENCE.format(eps=1e-6, more="", returns="logits"))

    assert not verify(good, Settings(reference=f"{file}:build"), engine=engine).ok


@pytest.mark.parametrize(
    ("body", "phrase"),
    [
        ("def build(c): return 3", "return a torch.nn.Module or a callable"),
        ("def build(c): return lambda ids: ids.float()", "shaped [B, T, V]"),
        ("def build(c): raise KeyError('x')", "raised KeyError"),
        ("import nothing_of_that_name", "raised ModuleNotFoundError"),
        ("x = 1", "defines no function 'build'"),
    ],
)
def test_a_reference_that_can_not_be_used_says_what_to_write(
    body: str, phrase: str, good: Path, tmp_path: Path, engine: Engine
) -> None:
    file = tmp_path / "model.py"
    file.write_text(body)
    with pytest.raises(MdlError) as caught:
        verify(good, Settings(reference=f"{file}:build"), engine=engine)

    assert caught.value.kind is Kind.INPUT
    assert phrase in str(caught.value)


def test_another_checkpoint_is_refused(good: Path, tmp_path: Path, engine: Engine) -> None:
    other = make.llama2c(tmp_path / "other.pt", seed=9)
    with pytest.raises(MdlError, match="not the checkpoint that this layout was made from"):
        verify(good, Settings(against=other), engine=engine)


def test_two_runs_with_one_seed_agree(good: Path, engine: Engine) -> None:
    first, second = (verify(good, Settings(seed=3), engine=engine) for _ in range(2))

    assert [c.figures for c in first.checks] == [c.figures for c in second.checks]
    assert first.inputs == second.inputs


def test_a_report_is_green_only_for_the_layout_it_is_about(good: Path, tmp_path: Path, engine: Engine) -> None:
    out = edited(good, tmp_path / "out", lambda _t, _c: None)
    assert green_report(out) == (False, "it was never verified")
    report = verify(good, engine=engine)
    save_report(report, out)
    assert green_report(out)[0]
    (out / "mdl.json").write_text((out / "mdl.json").read_text() + "\n")
    assert green_report(out) == (False, "it was converted again after its last verification")
    save_report(replace(report, ok=False, manifest=""), out)
    assert not green_report(out)[0]


def test_decoding_takes_every_path(tmp_path: Path, engine: Engine) -> None:
    """One-token steps, chunks, preemption and cache hits must really have happened, or the check proves nothing."""
    release = make.meta(tmp_path / "release", dtype=torch.float32)
    report = verify(make.layout(release, tmp_path / "out", given={"context": "512"}), engine=engine)

    figures = check(report, "decode").figures
    assert report.ok
    assert figures["steps"] > 100
    assert figures["chunks"] >= 1
    assert figures["again"] > 0
    assert figures["spared"] >= 32


def test_inputs_use_every_token_once_and_reach_far() -> None:
    inputs = make_inputs(1000, 2048, seed=1)
    dealt = [token for one in inputs.sequences if one.kind == "vocabulary" for token in one.ids]
    assert sorted(dealt) == list(range(1000))
    assert max(len(one.ids) for one in inputs.sequences) == 512
    assert inputs.covered == 1000


def test_large_vocabularies_are_covered_as_far_as_the_budget_goes() -> None:
    inputs = make_inputs(128_256, 131_072, seed=1)
    assert inputs.tokens < 2048
    assert 1024 <= inputs.covered < 2048


def test_nan_never_passes() -> None:
    exact = torch.randn(3, 7, dtype=torch.float64)
    floor = distance((exact + 1e-6).float(), exact)
    wrong = exact.float()
    wrong[1, 2] = float("nan")

    assert judge([floor], [floor]).ok
    assert not judge([distance(wrong, exact)], [floor]).ok


def test_one_bad_position_is_not_averaged_away() -> None:
    exact = torch.randn(512, 50, dtype=torch.float64)
    noise = exact * (1 + 1e-7 * torch.randn(512, 50, dtype=torch.float64))
    wrong = noise.clone()
    wrong[100] += 3e-6 * torch.randn(50, dtype=torch.float64)
    floor = distance(noise, exact)
    verdict = judge([distance(wrong, exact)], [floor])

    assert verdict.ratio < RATIO
    assert not verdict.ok
    assert verdict.position == 100


def test_the_ceiling_leaves_room_for_the_reference_s_own_rounding_and_no_more() -> None:
    exact = torch.randn(64, 50, dtype=torch.float64)
    noise, other = (1e-4 * torch.randn(64, 50, dtype=torch.float64) for _ in range(2))
    floor = distance(exact + noise, exact)

    verdict = judge([distance(exact + 1.5 * other, exact)], [floor])
    assert verdict.floor > CEILING
    assert verdict.ok

    worse = judge([distance(exact + 3 * other, exact)], [floor])
    assert worse.ratio < RATIO
    assert not worse.ok


# --- a recording in place of a reference --------------------------------------------------------------------------

OURS = """
from mdl.convert.prepare import prepare
from mdl.validate.reference import builtin_reference


def build(checkpoint):
    p = prepare(checkpoint)
    return builtin_reference(p.arch, p.dims, p.plan).module
"""


def recorded(checkpoint: Path, folder: Path, seed: int = 0) -> Path:
    (folder / "model.py").write_text(OURS)
    out = folder / f"golden-{seed}.safetensors"
    record_checkpoint(checkpoint, f"{folder / 'model.py'}:build", out, Options(), seed=seed)
    return out


def test_a_recording_proves_what_the_reference_would(good: Path, tmp_path: Path, engine: Engine) -> None:
    golden = recorded(good.parent / "ckpt.pt", tmp_path, seed=3)

    report = verify(good, Settings(golden=golden), engine=engine)

    assert verdicts(report) == dict.fromkeys(ALL, True)
    assert report.seed == 3
    assert check(report, "generate").measured == "32 greedy tokens equal"

    broken = edited(good, tmp_path / "broken", swap_gate_up)
    found = verdicts(verify(broken, Settings(golden=golden, locate=False), engine=engine))
    assert (found["prefill"], found["decode"], found["generate"]) == (False, False, False)


def test_a_recording_of_something_else_is_refused(good: Path, tmp_path: Path, engine: Engine) -> None:
    golden = recorded(good.parent / "ckpt.pt", tmp_path)
    with pytest.raises(MdlError, match="--seed 5, but the golden file's inputs are those of seed 0") as caught:
        verify(good, Settings(golden=golden, seed=5), engine=engine)
    assert caught.value.kind is Kind.USAGE

    other = tmp_path / "other"
    other.mkdir()
    foreign = recorded(make.llama2c(other / "ckpt.pt", vocab=64), other)
    with pytest.raises(MdlError, match="gives 64 logits per position, the checkpoint has 96 rows") as caught:
        verify(good, Settings(golden=foreign), engine=engine)
    assert caught.value.kind is Kind.INPUT

"""`--decide`: the user's own forward settles what no tensor tells, and settles nothing where it can't."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
import torch

from mdl import cli
from mdl.convert.prepare import Options
from mdl.errors import Kind, MdlError
from mdl.validate.candidates import parse_decide
from mdl.validate.client import Engine
from mdl.validate.decide import SEPARATION, decide_checkpoint
from mdl.validate.decision import Decision
from mdl.validate.golden import record_checkpoint
from mdl.validate.html import to_html
from mdl.validate.junit import to_junit
from mdl.validate.verify import Settings, verify

from . import adapters, checkpoints, deciding, megatron, torchtune_cases
from . import servable as make

GELU = "activation=gelu,gelu_new"
EPS = "norm_eps=1e-5,1e-6"
THETA = "rope_theta=10000,500000"
SCALING = "rope_scaling=none,llama3"
PAIRS = "interleaved=true,false"


def decided(checkpoint: Path, reference: str | Path, *asked: str, **given: str) -> Decision:
    """What is decided for a raw checkpoint by FILE.py:FUNCTION, or by a golden file."""
    spec, golden = (None, reference) if isinstance(reference, Path) else (reference, None)
    settings = Settings(reference=spec, golden=golden, decide=parse_decide(asked))
    return decide_checkpoint(checkpoint, Options(given=given), settings, " ".join)


@pytest.fixture
def gpt(tmp_path: Path) -> Path:
    """nanoGPT's weights alone: neither heads nor the form of GELU are told."""
    torch.save(make.nanogpt_state(), tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Meta release in float32."""
    return make.meta(tmp_path / "release", dtype=torch.float32)


def dead() -> checkpoints.State:
    """nanoGPT's weights with MLPs of which nothing comes out but their last bias."""
    state = make.nanogpt_state()
    return {name: torch.zeros_like(x) if name.endswith("mlp.c_proj.weight") else x for name, x in state.items()}


@pytest.mark.parametrize(("form", "value"), [("exact", "gelu"), ("approximate", "gelu_new")])
def test_the_form_of_gelu(form: str, value: str, gpt: Path, tmp_path: Path) -> None:
    found = decided(gpt, deciding.gpt(tmp_path, activation=form), GELU, n_head="2")

    assert found.ok
    assert found.values == {"activation": value}
    assert found.candidates[0].values == {"activation": value}
    assert found.candidates[0].nmse < 1e-28
    assert found.candidates[1].nmse > 1e-9


@pytest.mark.parametrize("eps", ["1e-5", "1e-6"])
def test_an_epsilon_that_hardly_shows(eps: str, gpt: Path, tmp_path: Path) -> None:
    found = decided(gpt, deciding.gpt(tmp_path, eps=float(eps)), EPS, n_head="2", activation="gelu_new")

    assert found.values == {"norm_eps": eps}
    assert found.candidates[1].nmse < 1e4 * found.floor  # in float32 it would be near rounding


@pytest.mark.parametrize("eps", ["1e-5", "1e-6"])
def test_an_epsilon_below_what_float32_can_tell(eps: str, tmp_path: Path) -> None:
    """Float64 on both sides tells it all the same; a plain callable, which has none, does not."""
    state = make.nanogpt_state()
    state["transformer.wte.weight"] *= 30
    torch.save(state, tmp_path / "loud.pt")
    spec = deciding.gpt(tmp_path, eps=float(eps))
    given = {"n_head": "2", "activation": "gelu_new"}

    found = decided(tmp_path / "loud.pt", spec, EPS, **given)
    assert found.values == {"norm_eps": eps}
    assert found.candidates[1].nmse < 16 * found.floor

    blurred = decided(tmp_path / "loud.pt", spec.replace(":build", ":alone"), EPS, **given)
    assert not blurred.ok
    assert not blurred.contradicted
    assert "can't be told apart" in blurred.answers[0].why


@pytest.mark.parametrize("islands", [False, True], ids=["float64 throughout", "norms in float32"])
@pytest.mark.parametrize(
    ("theta", "eps", "scaled"),
    [(10000, "1e-5", False), (500000, "1e-6", False), (500000, "1e-5", True), (10000, "1e-6", True)],
)
def test_theta_scaling_and_epsilon_at_once(
    theta: int, eps: str, *, scaled: bool, islands: bool, llama: Path, tmp_path: Path
) -> None:
    spec = deciding.llama(tmp_path, theta=float(theta), eps=float(eps), scaled=scaled, islands=islands)
    found = decided(llama, spec, THETA, EPS, SCALING, context="512")

    want = {"rope_theta": str(theta), "norm_eps": eps, "rope_scaling": "llama3" if scaled else "none"}
    assert found.values == want
    assert len(found.candidates) == 8
    assert found.candidates[0].nmse < 16 * found.floor
    assert all(answer.ratio > SEPARATION for answer in found.answers)


@pytest.mark.parametrize("halves", [True, False])
def test_the_style_of_rotary_in_torchtune(tmp_path: Path, *, halves: bool) -> None:
    torch.save(torchtune_cases.state(torchtune_cases.CASES["llama3"]), tmp_path / "tune.pt")
    spec = deciding.llama(tmp_path, theta=5e5, halves=halves)
    given = {"builder": "llama3", "heads": "4"}

    found = decided(tmp_path / "tune.pt", spec, PAIRS, **given)
    assert found.values == {"interleaved": "false" if halves else "true"}

    both = decided(tmp_path / "tune.pt", spec, PAIRS, THETA, **given)
    assert both.values == {"interleaved": "false" if halves else "true", "rope_theta": "500000"}


@pytest.mark.parametrize("halves", [True, False])
def test_the_style_of_rotary_in_megatron_whatever_its_arguments_say(tmp_path: Path, *, halves: bool) -> None:
    run = megatron.grid(tmp_path / "run", "llama", rotary_interleaved=halves)  # the other one
    with megatron.importable():
        found = decided(run, deciding.llama(tmp_path, halves=halves, whole=False), PAIRS)

    assert found.values == {"interleaved": "false" if halves else "true"}


@pytest.mark.parametrize("form", ["quick", "torch.relu", "F.silu", "lambda x: exact(x) * 1.001"])
def test_a_gelu_that_is_none_of_the_candidates(form: str, gpt: Path, tmp_path: Path) -> None:
    found = decided(gpt, deciding.gpt(tmp_path, activation=form), GELU, n_head="2")

    assert not found.ok
    assert found.contradicted
    assert found.command == ""
    assert "none of the candidates" in found.answers[0].why
    assert "is the nearest, at NMSE" in found.answers[0].why


@pytest.mark.parametrize("eps", [2e-6, 1.1e-6, 1.001e-6, 9e-7, 3e-6])
def test_the_nearest_epsilon_is_not_taken_for_the_right_one(eps: float, gpt: Path, tmp_path: Path) -> None:
    """These lie below what the float32 gate would notice."""
    found = decided(gpt, deciding.gpt(tmp_path, eps=eps), EPS, n_head="2", activation="gelu_new")

    assert found.contradicted
    assert found.values == {}
    assert "of the way from 1e-6 to 1e-5" in found.answers[0].why or "is the nearest" in found.answers[0].why


@pytest.mark.parametrize(
    "other", [{"theta": 20000.0}, {"theta": 10001.0}, {"theta": 499000.0}, {"halves": True}, {"scaled": True}]
)
def test_a_rotation_that_is_none_of_the_candidates(other: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    found = decided(llama, deciding.llama(tmp_path, **other), THETA, context="512")

    assert found.contradicted
    assert found.values == {}


def test_a_list_without_the_truth_in_another_value_decides_nothing(gpt: Path, tmp_path: Path) -> None:
    """The candidates are right, but the heads that were set are not."""
    found = decided(gpt, deciding.gpt(tmp_path), GELU, n_head="1")

    assert found.contradicted
    assert found.values == {}


def test_a_value_that_makes_no_numbers_is_no_rival(tmp_path: Path) -> None:
    """Here an epsilon ten times too large passes the gate; beside NaN there is no step towards another to be seen."""
    state = make.nanogpt_state()
    state["transformer.wte.weight"] *= 30
    torch.save(state, tmp_path / "loud.pt")
    spec = deciding.gpt(tmp_path, eps=1e-6)

    found = decided(tmp_path / "loud.pt", spec, "norm_eps=1e-5,-1e9", n_head="2", activation="gelu_new")

    assert found.candidates[0].fits
    assert found.candidates[1].nmse == float("inf")
    assert not found.ok
    assert "nothing finite comes out to hold it against" in found.reasons[0]


def test_one_token_tells_no_theta(llama: Path, tmp_path: Path) -> None:
    found = decided(llama, deciding.llama(tmp_path), THETA, EPS, context="2")

    assert not found.ok
    assert not found.contradicted
    assert found.values == {"norm_eps": "1e-5"}
    assert "10000 and 500000 can't be told apart" in found.answers[0].why
    assert found.command == ""


def test_weights_that_pass_nothing_through_the_activation_tell_nothing_of_it(tmp_path: Path) -> None:
    torch.save(dead(), tmp_path / "dead.pt")
    for form in ("exact", "quick"):
        found = decided(tmp_path / "dead.pt", deciding.gpt(tmp_path, activation=form), GELU, n_head="2")

        assert not found.ok
        assert not found.contradicted
        assert found.measured == "activation not decided"


def test_a_recording_and_another_python_decide_too(gpt: Path, tmp_path: Path) -> None:
    spec, given = deciding.gpt(tmp_path), {"n_head": "2"}
    golden = tmp_path / "golden.safetensors"
    record_checkpoint(gpt, spec, golden, Options(given={**given, "activation": "gelu"}), seed=4)

    found = decided(gpt, golden, GELU, **given)
    assert found.values == {"activation": "gelu_new"}
    assert found.seed == 4
    assert 1e-15 < found.floor < 1e-12

    settings = Settings(reference=spec, reference_python=sys.executable, decide=parse_decide([GELU]))
    elsewhere = decide_checkpoint(gpt, Options(given=given), settings, " ".join)
    assert elsewhere.values == {"activation": "gelu_new"}


def test_a_combination_that_can_not_be_is_listed(tmp_path: Path) -> None:
    """Four heads of 32 channels and two of 64 are as wide; the other pairs are not."""
    torch.save(torchtune_cases.state(torchtune_cases.CASES["llama3"]), tmp_path / "tune.pt")
    spec = deciding.llama(tmp_path, theta=5e5)
    found = decided(tmp_path / "tune.pt", spec, "heads=2,4", "head_dim=32,64", builder="llama3")
    refused = [one for one in found.candidates if one.refused]

    assert found.values == {"heads": "4", "head_dim": "32"}
    assert [one.text for one in refused] == ["heads=2 head_dim=32", "heads=4 head_dim=64"]
    assert all(one.nmse == float("inf") and "head_dim is" in one.refused for one in refused)
    assert [row[0] for row in found.rows()] == [one.text for one in found.candidates]


@pytest.mark.parametrize(
    ("asked", "kind", "what"),
    [
        (["activation"], Kind.USAGE, "expected NAME=A,B"),
        (["=gelu,gelu_new"], Kind.USAGE, "expected NAME=A,B"),
        (["activation=gelu"], Kind.USAGE, "two candidates or more"),
        (["activation=gelu,"], Kind.USAGE, "two candidates or more"),
        (["activation=gelu,gelu"], Kind.USAGE, "gelu is there twice"),
        ([GELU, GELU], Kind.USAGE, "--decide activation is there twice"),
        (["norm_eps=1e-5,0.00001"], Kind.USAGE, "1e-5 and 0.00001 are the same value"),
        ([f"{n}=1,2,3,4,5" for n in ("a", "b", "c")], Kind.USAGE, "5 x 5 x 5 = 125 combinations, and 64"),
        (["activation=gelu,gelu_nwe"], Kind.INPUT, "activation is 'gelu_nwe'"),
        (["norm_eps=1e-5,small"], Kind.INPUT, "not a value for norm_eps"),
        (["n_head=2,3"], Kind.INPUT, "3 heads do not divide the width 64"),
        (["vocab=96,97"], Kind.INPUT, "vocab is 96 by the tensors"),
        (["theta=1,2"], Kind.INPUT, "it has: activation, bias"),
    ],
)
def test_what_can_not_be_asked(asked: list[str], kind: Kind, what: str, gpt: Path, tmp_path: Path) -> None:
    with pytest.raises(MdlError) as caught:
        decided(gpt, deciding.gpt(tmp_path), *asked, n_head="2", activation="gelu")

    assert caught.value.kind is kind
    assert what in str(caught.value)
    if kind is Kind.INPUT:
        assert f"with --decide {asked[0]}" in str(caught.value)


def test_commas_inside_a_value_do_not_part_candidates() -> None:
    found = parse_decide(['rope={"a":[1,2],"b":"x,]"},null', "list=[1,2],[3]"])

    assert found == {"rope": ('{"a":[1,2],"b":"x,]"}', "null"), "list": ("[1,2]", "[3]")}


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def mdl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run the program in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mdl", *map(str, arguments)])
        cli.state.json = cli.state.debug = cli.state.quiet = False
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def next_command(out: str) -> list[str]:
    """The arguments of the command that a table says to run."""
    line = next(line for line in out.splitlines() if line.startswith("next"))
    return shlex.split(line.removeprefix("next"))[1:]


def test_from_the_refusal_to_a_layout(mdl: Any, gpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    deciding.gpt(tmp_path)
    code, _, err = mdl("convert", "ckpt.pt", "out", "--set", "n_head=2")
    assert code == 3
    assert "mdl verify CKPT --reference FILE.py:FUNCTION --decide activation=gelu,gelu_new" in " ".join(err.split())

    asked = ("--reference", "model.py:build", "--decide", GELU, "--decide", "n_head=1,2,4")
    code, out, _ = mdl("verify", "ckpt.pt", *asked)
    assert code == 0
    assert "activation=gelu_new n_head=2" in out
    words = next_command(out)
    assert words == ["convert", "ckpt.pt", "OUT", "--set", "activation=gelu_new", "--set", "n_head=2"]
    assert mdl(*words)[0] == 0
    assert json.loads((tmp_path / "OUT" / "config.json").read_text())["activation_function"] == "gelu_new"

    code, out, _ = mdl("verify", "ckpt.pt", *asked, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["ok"]
    assert document["answers"][0]["value"] == "gelu_new"
    assert len(document["candidates"]) == 6


def test_the_command_to_run_merges_the_adapter_too(
    mdl: Any, gpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose second matrix is zero, so that the plain forward stays right."""
    monkeypatch.chdir(tmp_path)
    held = adapters.tensors(make.nanogpt_state(), ("transformer.h.0.attn.c_attn",))
    zero = {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in held.items()}
    adapters.saved(tmp_path / "lora", zero)
    asked = ("--reference", deciding.gpt(tmp_path), "--decide", GELU, "--set", "n_head=2", "--merge-lora", "lora")

    code, out, _ = mdl("verify", "ckpt.pt", *asked)
    assert code == 0
    words = next_command(out)
    assert words[words.index("--merge-lora") :][:2] == ["--merge-lora", "lora"]
    assert mdl(*words)[0] == 0


def test_what_is_not_decided_is_exit_code_1(mdl: Any, gpt: Path, tmp_path: Path) -> None:
    spec = deciding.gpt(tmp_path, activation="quick")
    code, out, _ = mdl("verify", gpt, "--reference", spec, "--decide", GELU, "--set", "n_head=2")

    assert code == 1
    assert "activation not decided" in out
    assert "\nnext" not in out


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--decide", GELU], "--decide needs a forward pass that knows"),
        (["--set", "n_head=2"], "--set and --weights are for a raw checkpoint with --decide"),
        (["--reference", "MODEL", "--decide", GELU, "--junit", "x.xml"], "there is no layout to report on yet"),
        (["--reference", "MODEL", "--decide", GELU, "--mutate"], "leave --mutate out"),
        (["--reference", "MODEL", "--decide", GELU, "--tensor-parallel-size", "2"], "leave --tensor-parallel-size out"),
    ],
)
def test_options_that_make_no_sense_together(more: list[str], what: str, mdl: Any, gpt: Path, tmp_path: Path) -> None:
    spec = deciding.gpt(tmp_path)
    code, _, err = mdl("verify", gpt, *(spec if word == "MODEL" else word for word in more))

    assert code == 2
    assert what in err


# --- a layout -----------------------------------------------------------------------------------------------------


def asking(spec: str, *asked: str) -> Settings:
    return Settings(reference=spec, decide=parse_decide(asked), locate=False)


def test_a_layout_with_another_value_fails_with_the_command_to_run(
    mdl: Any, gpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No vLLM is asked: it is known what it would say."""
    monkeypatch.chdir(tmp_path)
    out = make.layout(gpt, Path("out"), given={"n_head": "2", "activation": "gelu"})
    before = (out / "config.json").read_bytes()
    settings = asking(deciding.gpt(tmp_path), "n_head=1,2", GELU)

    report = verify(out, settings)

    assert not report.ok
    assert report.verdict == "NOT proven: n_head = 2, activation = gelu_new, but the layout has activation=gelu"
    assert [check.ok for check in report.checks] == [False, *[None] * 5]
    command = "mdl convert ckpt.pt out --tokenizer none --set n_head=2 --set activation=gelu_new --force"
    assert report.checks[0].detail[0] == f"convert it again: {command}"
    assert (out / "config.json").read_bytes() == before
    suite = Xml.fromstring(to_junit(report))  # noqa: S314 - our own text
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert command in (failure.text or "")
    for form in (report.to_json(), to_html(report), to_junit(report)):
        assert "activation=gelu_new" in form
    assert "The values that were tried" in to_html(report)

    assert mdl(*shlex.split(command)[1:])[0] == 0
    assert json.loads((out / "config.json").read_text())["activation_function"] == "gelu_new"


@pytest.mark.engine
def test_decide_convert_verify(mdl: Any, gpt: Path, tmp_path: Path, engine: Engine) -> None:
    spec = deciding.gpt(tmp_path)
    code, out, _ = mdl("verify", gpt, "--reference", spec, "--decide", GELU, "--decide", "n_head=1,2")
    assert code == 0
    words = [str(tmp_path / "out") if word == "OUT" else word for word in next_command(out)]
    assert mdl(*words)[0] == 0

    report = verify(tmp_path / "out", asking(spec, GELU), engine=engine)
    assert report.ok
    assert [check.name for check in report.checks] == ["decide", "layout", "coverage", "prefill", "decode", "generate"]
    assert report.checks[0].measured == "activation = gelu_new"
    assert report.decision is not None
    assert report.verdict == f"vLLM computes what {spec} computes"

    # another forward than any of the candidates fails, although no value of the layout is called wrong
    other = verify(tmp_path / "out", asking(deciding.gpt(tmp_path, activation="quick"), GELU), engine=engine)
    assert [check.ok for check in other.checks[:4]] == [False, True, True, False]


@pytest.mark.engine
def test_what_can_not_be_told_apart_is_no_failure_and_no_proof(tmp_path: Path, engine: Engine) -> None:
    torch.save(dead(), tmp_path / "dead.pt")
    out = make.layout(tmp_path / "dead.pt", tmp_path / "out", given={"n_head": "2", "activation": "gelu"})
    report = verify(out, asking(deciding.gpt(tmp_path), GELU, EPS), engine=engine)

    assert report.ok
    assert report.checks[0].ok is None
    assert report.checks[0].measured == "activation not decided, norm_eps = 1e-5"
    assert "skipped" in to_junit(report)


@pytest.mark.engine
def test_the_right_value_is_none_of_the_candidates(llama: Path, tmp_path: Path, engine: Engine) -> None:
    out = make.layout(llama, tmp_path / "out", given={"context": "64"})
    report = verify(out, asking(deciding.llama(tmp_path), "rope_theta=20000,500000"), engine=engine)

    assert not report.ok
    assert [check.ok for check in report.checks] == [False, *[True] * 5]
    assert report.verdict == "NOT proven: rope_theta not decided"


def test_every_name_a_checkpoint_is_given_by_means_the_same(tmp_path: Path) -> None:
    """The dim's own name, where the layout was made with the family's other one."""
    state = make.nanogpt_state()
    path = checkpoints.nanogpt(tmp_path / "ckpt.pt", state)
    out = make.layout(path, tmp_path / "out", given={"activation": "gelu", "n_head": "2"})
    report = verify(out, asking(deciding.gpt(tmp_path), "heads=1,2", GELU))

    assert "the layout has activation=gelu" in report.verdict

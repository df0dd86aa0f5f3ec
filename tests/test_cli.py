"""The command line: exit codes, messages a newcomer can act on, JSON for programs, and nothing written on failure."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl import cli, render
from mdl.errors import Problem
from mdl.mappings.jsonable import plain
from mdl.render import collapse, size

from . import checkpoints as make


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def mdl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the program in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["mdl", *map(str, arguments)])
        cli.state.json = cli.state.debug = cli.state.quiet = False
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return Result(int(end.value.code or 0), out, err)

    return run


def test_inspect_says_what_and_why(mdl: Any, tied: Path) -> None:
    done = mdl("inspect", tied)

    assert done.code == 0
    assert "nanogpt: nanoGPT (karpathy/nanoGPT, build-nanogpt) → GPT2LMHeadModel" in done.out
    assert "[3C, C] as nn.Linear stores it" in done.out
    assert "model_args.n_head" in done.out
    assert done.err == ""


def test_inspect_json_is_one_document_with_every_tensor(mdl: Any, two_ranks: Path) -> None:
    found = mdl("inspect", two_ranks, "--json").json

    assert found["arch"] == "llama_meta"
    assert found["ranks"] == 2
    assert found["dims"]["kv_heads"]["source"] == "shapes"
    assert len([t for t in found["tensors"] if t["name"] == "norm.weight"]) == 2


def test_plan_collapses_layers_and_names_the_rule(mdl: Any, tied: Path) -> None:
    done = mdl("plan", tied)

    assert done.code == 0
    assert "transformer.h.{0..1}.attn.c_attn.weight" in done.out
    assert "transpose" in done.out
    assert "nanogpt.yaml:" in done.out


def test_plan_reverse_shows_one_way_rules_as_such(mdl: Any, tied: Path, half: Path) -> None:
    assert "ONE WAY" not in mdl("plan", tied, "--reverse").out
    assert mdl("plan", half, "--json").json["dtype"] == "bfloat16"


def test_plan_json_lists_problems_and_exits_3(mdl: Any, extra_tensor: Path) -> None:
    done = mdl("plan", extra_tensor, "--json")

    assert done.code == 3
    assert ["transformer.h.0.adapter.weight" in p["what"] for p in done.json["problems"]] == [True]


def test_convert_writes_a_layout_and_says_what_to_do_next(mdl: Any, tied: Path, tmp_path: Path) -> None:
    done = mdl("convert", tied, tmp_path / "out")

    assert done.code == 0
    assert f"mdl verify {tmp_path / 'out'}" in done.out
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"config.json", "model.safetensors", "mdl.json"}


@pytest.mark.parametrize("fixture", ["missing_tensor", "extra_tensor", "truncated_file"])
def test_wrong_input_exits_3_and_writes_nothing(
    fixture: str, mdl: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    done = mdl("convert", request.getfixturevalue(fixture), tmp_path / "out")

    assert done.code == 3
    assert done.out == ""
    assert "error: " in done.err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out*"))


def test_wrong_head_count_says_what_to_pass(mdl: Any, tied: Path, tmp_path: Path) -> None:
    done = mdl("convert", tied, tmp_path / "out", "--set", "n_head=3")

    assert done.code == 3
    assert "3 heads do not divide the width 16" in done.err
    assert "--set n_head=N" in done.err


def test_two_candidate_families_are_a_question(mdl: Any, tmp_path: Path) -> None:
    from . import checkpoints as make

    torch.save(make.llama_state(), tmp_path / "bare.pt")
    done = mdl("inspect", tmp_path / "bare.pt")

    assert done.code == 3
    assert "llama2c" in done.err
    assert "llama_meta" in done.err
    assert "--arch NAME" in done.err


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"hello, this is no checkpoint", "text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"", "empty"),
    ],
)
def test_files_that_are_no_checkpoints_are_named_for_what_they_are(
    content: bytes, phrase: str, mdl: Any, tmp_path: Path
) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    done = mdl("inspect", tmp_path / "x.pt")

    assert done.code == 3
    assert phrase in done.err.lower()


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "CKPT"),
        ("frobnicate",),
        ("inspect", "CKPT", "--no-such-option"),
        ("inspect", "CKPT", "--set", "n_head"),
        ("inspect", "CKPT", "--set", "n_haed=4"),
        ("inspect", "CKPT", "--arch", "gpt5"),
        ("convert", "CKPT", "OUT", "--dtype", "int8"),
        ("convert", "CKPT", "OUT", "--max-shard-size", "-3"),
        ("convert", "CKPT", "OUT", "--max-shard-size", "lots"),
    ],
)
def test_usage_mistakes(arguments: tuple[str, ...], mdl: Any, tied: Path, tmp_path: Path) -> None:
    words = [{"CKPT": str(tied), "OUT": str(tmp_path / "out")}.get(word, word) for word in arguments]
    done = mdl(*words)

    assert done.code in (2, 3)
    assert done.err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_refused_before_any_work(mdl: Any, tied: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    done = mdl("convert", tied, tmp_path / "out")
    forced = mdl("convert", tied, tmp_path / "out", "--force")

    assert (done.code, forced.code) == (2, 2)
    assert "exists already" in done.err
    assert "holds no mdl.json" in forced.err
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_errors_as_json(mdl: Any, missing_tensor: Path, tmp_path: Path) -> None:
    done = mdl("convert", missing_tensor, tmp_path / "out", "--json")

    assert done.code == 3
    assert done.json["ok"] is False
    assert done.json["kind"] == "input"
    assert any("transformer.h.1.mlp.c_proj.weight" in p["what"] for p in done.json["problems"])


def test_export_gives_the_bytes_back(mdl: Any, tied: Path, tmp_path: Path) -> None:
    assert mdl("convert", tied, tmp_path / "out").code == 0
    assert mdl("export", tmp_path / "out", tmp_path / "back.pt").code == 0
    before, after = (torch.load(p, weights_only=True)["model"] for p in (tied, tmp_path / "back.pt"))

    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_check_finds_a_flipped_bit(mdl: Any, tied: Path, tmp_path: Path) -> None:
    assert mdl("convert", tied, tmp_path / "out").code == 0
    assert mdl("check", tmp_path / "out").code == 0
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = mdl("check", tmp_path / "out")

    assert done.code == 3
    assert "not those that were written" in done.out


def test_serve_refuses_what_was_never_verified(mdl: Any, tied: Path, tmp_path: Path) -> None:
    assert mdl("convert", tied, tmp_path / "out").code == 0
    done = mdl("serve", tmp_path / "out")

    assert done.code == 2
    assert f"mdl verify {tmp_path / 'out'}" in done.err
    assert "--unverified" in done.err


def test_archs_and_doctor_answer_in_both_forms(mdl: Any) -> None:
    assert "nanogpt" in mdl("archs").out
    assert {a["name"] for a in mdl("archs", "--json").json} >= {"nanogpt", "llama2c", "llama_meta"}
    assert {f["state"] for f in mdl("doctor", "--json").json} <= {"ok", "warn", "fail"}


def test_an_unforeseen_failure_is_not_a_traceback(mdl: Any, tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("mdl.convert.prepare.recognise", burst)
    done = mdl("inspect", tied)

    assert done.code == 3
    assert "ZeroDivisionError: oops" in done.err
    assert "Traceback" not in done.err


def test_the_installed_program_runs() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("mdl"), "--version"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0
    assert done.stdout.startswith("mdl ")


def test_collapse_joins_names_that_differ_in_numbers() -> None:
    assert collapse(["h.0.a", "h.1.a", "h.2.a", "x"]) == ["h.{0..2}.a", "x"]
    assert collapse(["h.0.a", "h.2.a"]) == ["h.{0,2}.a"]
    assert collapse(["l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1"]) == ["l.{0..1}.e.{0..1}"]


@pytest.mark.parametrize(
    "names",
    [
        ["h.0.a", "h.1.a"], ["h.0.a"], [], ["h.0.a", "h..a"], ["h.0.a", "h.x.a"], ["h.0.a", "h.0.b"], ["0.a", "1.a"],
        ["h.0", "h.1"], ["h.0.a", "h.10.a", "h.2.a"], ["h.0.a", "h.²..a"], ["h.0.a", "h.1.2.a"], ["h.1.2.a", "h.0.a"],
        ["h.0.a", "h.1"], ["t/0/a", "t/1/a"], ["a.b", "a.b"], ["h.1x.a", "h.2x.a"], ["a.٣.b", "a.0.b"], ["h.0.a.h.0.a"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_names_alike_are_collapsed_as_others_are(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = collapse(names)
    monkeypatch.setattr(render, "_of_one_number", lambda _: "")

    assert collapse(names) == found


def test_numbers_that_json_lacks_become_text_and_come_back(mdl: Any, tmp_path: Path) -> None:
    state = make.nanogpt_state()
    saved = {"model": state, "model_args": make.nanogpt_args(state), "best_val_loss": math.inf, "lr": math.nan}
    torch.save(saved, tmp_path / "ckpt.pt")

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    for command, *more in (["inspect"], ["plan"], ["convert", tmp_path / "out", "--tokenizer", "none"]):
        done = mdl(command, tmp_path / "ckpt.pt", *more, "--json")
        assert done.code == 0
        json.loads(done.out, parse_constant=refuse)
    manifest = json.loads((tmp_path / "out/mdl.json").read_text(), parse_constant=refuse)
    assert (manifest["source"]["extras"]["best_val_loss"], manifest["source"]["extras"]["lr"]) == ("inf", "nan")

    assert mdl("export", tmp_path / "out", tmp_path / "back.pt").code == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert (back["best_val_loss"], str(back["lr"])) == (math.inf, "nan")


def test_sizes_and_plain_values() -> None:
    assert [size(n) for n in (12, 2_590_000, 6e9)] == ["12 B", "2.59 MB", "6 GB"]
    assert plain({"a": (Problem("x"), float("inf"))}) == {"a": [{"what": "x", "where": "", "do": ""}, "inf"]}

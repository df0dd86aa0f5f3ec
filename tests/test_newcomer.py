"""Mistakes of a first day: told before anything runs, with the right exit code, and nothing of the user's is lost."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import force_setattr
from safetensors.torch import load_file, save_file

from mdl import views
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.errors import Kind, MdlError
from mdl.program import Interrupted
from mdl.validate import choose, record
from mdl.validate import verify as verifying
from mdl.validate.choose import mapping_note, source_of
from mdl.validate.golden import record_checkpoint
from mdl.validate.ready import ready_layout
from mdl.validate.reference import check_spec, user_reference
from mdl.validate.report import Report
from mdl.validate.verify import Settings, verify

from . import adapters, lit, servable
from . import checkpoints as make
from .test_cli import mdl as mdl_fixture

mdl = mdl_fixture


@pytest.fixture
def layout(tied: Path, tmp_path: Path) -> Path:
    convert(prepare(tied), tmp_path / "out", tokenizer="none")
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(verifying, "Engine", refuse)


REFERENCE = """
from mdl.convert.prepare import prepare
from mdl.validate.reference import builtin_reference
def build(checkpoint):
    p = prepare(checkpoint)
    return builtin_reference(p.arch, p.dims, p.plan).module
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "model.py").write_text(REFERENCE)
    return f"{tmp_path / 'model.py'}:build"


def test_record_says_what_it_recorded_and_replaces_only_its_own(
    mdl: Any, tied: Path, spec: str, tmp_path: Path
) -> None:
    code, before = tmp_path / "model.py", tied.read_bytes()
    for precious in (tied, code):
        done = mdl("record", tied, "--reference", spec, "-o", precious, "--force")
        assert done.code == 2
        assert "--force only replaces what this command wrote" in done.err
    assert (tied.read_bytes(), code.read_text()) == (before, REFERENCE)

    golden = tmp_path / "g.safetensors"
    done = mdl("record", tied, "--reference", spec, "-o", golden)
    assert done.code == 0
    assert re.search(r"holds +\d+ sequences, \d+ positions, vocabulary \d+", done.out)
    assert "ok" not in done.out.split()
    assert " kB" in done.out.splitlines()[0]
    assert mdl("record", tied, "--reference", spec, "-o", golden).code == 2
    again = mdl("record", tied, "--reference", spec, "-o", golden, "--force", "--json").json
    assert again["bytes"] == golden.stat().st_size
    assert {"sequences", "positions", "vocab"} <= set(again)


@pytest.mark.parametrize("place", ["no/such/file", "."])
def test_a_place_that_is_none_is_told_before_any_work(
    place: str, mdl: Any, tied: Path, layout: Path, spec: str, tmp_path: Path
) -> None:
    told = "this is a folder" if place == "." else "does not exist"
    for words in (
        ("record", tied, "--reference", spec, "-o", tmp_path / place),
        ("verify", layout, "--junit", tmp_path / place),
        ("verify", layout, "--html", tmp_path / place),
    ):
        done = mdl(*words)
        assert done.code == 2, done.err
        assert told in done.err
    assert not (tmp_path / "no").exists()


def test_a_report_that_cant_be_written_is_a_note_and_not_a_crash(layout: Path, tmp_path: Path) -> None:
    report = Report(
        str(layout), "", "", "", "", "float32", True, (), "", 0, (), (), {}, "", "", {}
    )  # fmt: skip
    problems = views.write_reports(report, tmp_path, tmp_path / "fine.html")

    assert [p.where for p in problems] == [str(tmp_path)]
    assert (tmp_path / "fine.html").is_file()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--dtype", "bf16"), 2, "one of: float32, bfloat16, float16"),
        (("--reference", "model.py"), 2, "FILE.py:FUNCTION"),
        (("--reference", "nofile.py:build"), 2, "there is no such file"),
        (("--against", "nope.pt"), 2, "--against: there is no such file or folder"),
        (("--reference-timeout", "5"), 2, "--reference-python"),
        (("--golden", "."), 3, "this is a folder, not a golden file"),
    ],
)
def test_what_is_mistyped_is_told_before_anything_runs(
    words: tuple[str, ...], code: int, says: str, mdl: Any, layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code == 3:
        with pytest.raises(MdlError, match=says):
            choose.choose_reference(prepare(layout.parent / "tied.pt"), Settings(golden=Path()))
        return
    monkeypatch.setattr(verifying, "read_manifest", None)
    done = mdl("verify", layout, *words)

    assert done.code == code
    assert says in done.err


def test_a_reference_that_is_not_python_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("import torch\ndef build(c)\n    return c\n")
    spec = f"{tmp_path / 'model.py'}:build"

    with pytest.raises(MdlError) as caught:
        check_spec(spec)
    assert caught.value.kind is Kind.INPUT
    assert "def build(c)" in str(caught.value)
    assert f"{tmp_path / 'model.py'}:2" in str(caught.value)
    with pytest.raises(MdlError) as there:
        user_reference(spec, tmp_path)
    assert "importlib" not in str(there.value)
    assert "line 2" in str(there.value)


def test_nan_of_a_reference_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\ndef build(c):\n"
        " def f(ids):\n  x = torch.ones(*ids.shape, 5)\n  x[..., 1:, 2] = float('nan')\n  return x\n"
        " return f\n"
    )
    with pytest.raises(MdlError, match="gives NaN logits at position 1 of 2 tokens"):
        user_reference(f"{tmp_path / 'model.py'}:build", tmp_path)


def test_a_reference_that_hangs_ends_after_its_time(tied: Path, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("import time\ndef build(c): time.sleep(600)\n")
    with pytest.raises(MdlError, match="did not finish within 3 s") as caught:
        record_checkpoint(
            tied, f"{tmp_path / 'model.py'}:build", tmp_path / "g", Options(), python=sys.executable, timeout=3
        )
    assert caught.value.kind is Kind.MACHINE
    assert "--reference-timeout" in str(caught.value)


@pytest.mark.parametrize("there", [True, False])
def test_a_family_s_file_runs_only_where_it_is_named(there: bool, layout: Path, tmp_path: Path) -> None:
    """What a layout says of itself runs nothing, and may be somebody else's path."""
    (tmp_path / ("gone.py" if there else "other.py")).write_text("raise SystemExit('this ran')")
    manifest = verifying.read_manifest(layout)
    force_setattr(manifest, "options", {**manifest.options, "arch": str(tmp_path / "gone.py")})

    with pytest.raises(MdlError, match=r"was made with the architecture file .*gone\.py") as caught:
        source_of(manifest, Settings())
    assert caught.value.kind is Kind.USAGE
    assert ("is not there any more" in str(caught.value)) is not there
    assert "mdl verify LAYOUT --arch FILE.py" in str(caught.value)
    prepared = source_of(manifest, Settings(arch="nanogpt"))
    assert mapping_note(manifest, prepared) == ()
    force_setattr(manifest, "mapping", {"file": "nanogpt.yaml", "sha256": "0"})
    assert "is not the mapping that this layout was made with" in mapping_note(manifest, prepared)[0]


@pytest.mark.parametrize("command", ["verify", "check"])
def test_what_is_no_layout_is_called_what_it_is(command: str, mdl: Any, tied: Path, tmp_path: Path) -> None:
    file, missing, empty = mdl(command, tied), mdl(command, tmp_path / "nope"), mdl(command, tmp_path)

    assert (file.code, missing.code, empty.code) == (3, 3, 3)
    assert "this is a file, not a layout" in file.err
    assert "there is no such folder" in missing.err
    assert "holds no mdl.json" in empty.err
    for done in (file, missing, empty):
        assert "give the folder that mdl convert wrote" in done.err


def test_a_safetensors_file_that_ends_in_its_header_is_told_so(mdl: Any, tmp_path: Path) -> None:
    save_file({f"layer.{k}.weight": torch.ones(2) for k in range(50)}, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    for name in ("cut.safetensors", "cut.pt"):
        (tmp_path / name).write_bytes(data[:700])
        done = mdl("inspect", tmp_path / name)
        assert done.code == 3
        assert "ends inside its header" in done.err
        assert "the whole file 700" in done.err


def test_serve_takes_what_a_raw_checkpoint_needs_and_a_layout_has(
    mdl: Any, layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save(make.llama_state(), tmp_path / "bare.pt")
    say: list[str] = []
    bare = tmp_path / "bare.pt"
    with pytest.raises(MdlError, match="--arch NAME"):
        ready_layout(bare, unverified=True, say=say.append)
    given = {"n_heads": "4", "max_seq_len": "64"}

    first = ready_layout(bare, unverified=True, say=say.append, options=Options("llama2c", given), tokenizer="none")
    other = {**given, "max_seq_len": "32"}
    second = ready_layout(bare, unverified=True, say=say.append, options=Options("llama2c", other), tokenizer="none")

    assert verifying.read_manifest(first).dim_values()["context"] == 64
    assert verifying.read_manifest(second).dim_values()["context"] == 32
    done = mdl("serve", layout, "--arch", "nanogpt", "--unverified")
    assert done.code == 2
    assert "this is a layout" in done.err


def test_record_alone_refuses_a_place_that_is_none(spec: str, tied: Path, tmp_path: Path) -> None:
    command = [sys.executable, record.__file__, tied, "--reference", spec, "--vocab", "24", "--context", "12"]
    done = subprocess.run([*command, "-o", tmp_path / "no" / "g"], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "give a file name in a folder that exists" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_verification_does_not_wait_for_the_engine(
    layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[object] = []

    class Stub:
        def __init__(self, **_: Any) -> None:
            pass

        def __enter__(self) -> Stub:
            return self

        def __exit__(self, kind: object, *_: object) -> None:
            ended.append(kind)

    def interrupt(*_: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(verifying, "Engine", Stub)
    monkeypatch.setattr(verifying, "reference_side", interrupt)
    with pytest.raises(Interrupted):
        verify(layout)

    assert ended == [Interrupted]  # Engine kills its process for an exception, and asks it to end otherwise


def test_a_file_of_an_optimizer_alone_is_told_as_such(mdl: Any, tmp_path: Path) -> None:
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    torch.save({"optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "b.pt")
    torch.save({"opt": optimizer.state_dict(), "mine": {"net": layer.state_dict()}}, tmp_path / "c.pt")

    for name, where in (("a.pt", ""), ("b.pt", " under optimizer")):
        done = mdl("convert", tmp_path / name, tmp_path / "out")
        assert done.code == 3
        assert f"this holds the state of an optimizer (state and param_groups{where}), and no weights" in done.err
        assert "--weights" not in done.err
    done = mdl("convert", tmp_path / "c.pt", tmp_path / "out")
    assert "choose one: --weights mine/net (2 tensors)" in done.err
    assert "the state of an optimizer" not in done.err


def test_a_tensor_that_is_left_over_says_what_can_be_done(mdl: Any, tied: Path, tmp_path: Path) -> None:
    tree = torch.load(tied, weights_only=True)
    tree["model"] |= {"seen": torch.tensor(5), "transformer.h.0.gate": torch.ones(3)}
    torch.save(tree, tmp_path / "more.pt")

    done = mdl("convert", tmp_path / "more.pt", tmp_path / "out")

    assert done.code == 3
    assert "seen [] is in the checkpoint, but no rule claims it" in done.err
    assert done.err.count("save without it") == 1


def test_litgpt_leaves_its_adapter_beside_what_it_was_merged_into(mdl: Any, tmp_path: Path) -> None:
    folder = lit.checkpoint(tmp_path / "final", "llama")
    (folder / "lit_model.pth").rename(tmp_path / "kept")
    torch.save({"model": {"transformer.h.0.attn.qkv.lora_A": torch.ones(4, 4)}}, folder / "lit_model.pth.lora")
    alone = mdl("convert", folder, tmp_path / "out", "--tokenizer", "none")
    assert alone.code == 3
    assert "LoRA, not merged" in alone.err
    assert "litgpt merge_lora FOLDER" in alone.err

    (tmp_path / "kept").rename(folder / "lit_model.pth")
    done = mdl("convert", folder, tmp_path / "out", "--tokenizer", "none")
    assert done.code == 0
    assert "lit_model.pth.lora: not read; litgpt merge_lora writes lit_model.pth beside it" in done.out

    shown = mdl("inspect", folder).out
    assert re.search(r"switches +5 of 2\d +file +what litgpt.yaml does for Llama: qkv_rows, llama_like", shown)
    assert "norms_around" not in shown
    assert "norms_around" in mdl("inspect", folder, "--json").out
    torch.save({}, folder / "other.pth.lora")
    assert mdl("inspect", folder).code == 3  # some other adapter is never left out in silence


def test_serve_merges_an_adapter_into_a_raw_checkpoint_and_tells_two_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = servable.nanogpt(tmp_path / "ckpt.pt")
    held = adapters.tensors(servable.nanogpt_state(), ("transformer.h.0.attn.c_attn",))
    twice = {name: tensor * 2 for name, tensor in held.items()}
    given = (None, str(adapters.saved(tmp_path / "a", held)), str(adapters.saved(tmp_path / "b", twice)))

    made = [
        ready_layout(source, unverified=True, say=lambda _: None, options=Options(merge_lora=lora), tokenizer="none")
        for lora in given
    ]

    assert len(set(made)) == 3
    weights = [load_file(out / "model.safetensors")["transformer.h.0.attn.c_attn.weight"] for out in made]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    with pytest.raises(MdlError, match="--merge-lora"):
        ready_layout(made[1], unverified=True, say=lambda _: None, options=Options(merge_lora=given[1]))

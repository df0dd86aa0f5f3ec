"""`mdl new`: a package drafted from a checkpoint's names and shapes. What is certain stands, what is not is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.drafting.choose import names_of_targets
from mdl.drafting.draft import Draft, draft
from mdl.drafting.names import grouped
from mdl.drafting.together import roles_of
from mdl.errors import Kind, MdlError
from mdl.validate.client import Engine
from mdl.validate.decide import decide_checkpoint
from mdl.validate.verify import Settings, verify

from . import checkpoints as make
from . import homemade as home


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are imported from their folders."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def drafted(folder: Path, state: home.State, name: str, beside: dict[str, Any], **options: Any) -> tuple[Path, Draft]:
    checkpoint = home.saved(folder / "ckpt.pt", state, **beside)
    return checkpoint, draft(folder / name, checkpoint, **options)


def options_of(made: Draft) -> Options:
    return Options(arch=str(Path(made.arch).resolve()))


def whats(made: Draft) -> str:
    return "\n".join(problem.what for problem in made.open)


def planned(checkpoint: Path, made: Draft) -> Any:
    plan = prepare(checkpoint, options_of(made)).plan
    plan.refuse()
    return plan


def layout(checkpoint: Path, made: Draft, out: Path) -> Path:
    convert(prepare(checkpoint, options_of(made)), out, tokenizer="none")
    return out


def refusal(kind: Kind, call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(MdlError) as caught:
        call(*args, **options)
    assert caught.value.kind is kind
    return str(caught.value)


def test_like_gpt2(tmp_path: Path) -> None:
    state = home.lantern()
    checkpoint, made = drafted(tmp_path, state, "lantern", {})

    assert (made.target, made.doubtful) == ("GPT2LMHeadModel", 0)
    assert all(name in whats(made) for name in ("heads is", "norm_eps is", "activation is", "qkv_by_head is"))
    home.answer(tmp_path / "lantern", {**home.ANSWERS, "activation": '"gelu"'})
    planned(checkpoint, made)
    tensors = make.saved(layout(checkpoint, made, tmp_path / "out"))
    assert torch.equal(tensors["transformer.h.1.attn.c_attn.weight"], state["layers.1.attn.qkv.weight"].T)
    assert torch.equal(tensors["transformer.h.0.mlp.c_proj.bias"], state["layers.0.ffn.fc2.bias"])
    assert torch.equal(tensors["transformer.h.0.ln_2.weight"], state["layers.0.ln2.weight"])


def test_rows_head_by_head_are_put_in_order(tmp_path: Path) -> None:
    state = home.lantern()
    checkpoint, made = drafted(tmp_path, state, "lantern_heads", {})
    home.answer(tmp_path / "lantern_heads", {**home.ANSWERS, "activation": '"gelu"', "qkv_by_head": "True"})
    planned(checkpoint, made)

    tensors = make.saved(layout(checkpoint, made, tmp_path / "out"))

    raw = state["layers.1.attn.qkv.weight"].view(2, 3, 32, 64).transpose(0, 1).reshape(192, 64)
    assert torch.equal(tensors["transformer.h.1.attn.c_attn.weight"], raw.T)


def test_like_llama_under_other_names(tmp_path: Path) -> None:
    state = home.heddle()
    beside = {"n_head": 4, "max_seq_len": 128, "eps": 1e-6}
    checkpoint, made = drafted(tmp_path, state, "heddle", beside)

    assert made.target == "LlamaForCausalLM"
    assert "heads is" not in whats(made)  # hp.n_head says it
    assert {"rotary_pairs", "rope_theta"} == set(made.decide)
    home.answer(tmp_path / "heddle", home.ANSWERS)
    planned(checkpoint, made)
    config = prepare(checkpoint, options_of(made)).config
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]) == (4, 2, 1e-6)
    tensors = make.saved(layout(checkpoint, made, tmp_path / "out"))
    assert torch.equal(tensors["model.layers.1.self_attn.k_proj.weight"], state["stack.1.att.key.weight"])
    assert torch.equal(tensors["lm_head.weight"], state["readout.weight"])


def test_a_mixture_goes_into_the_composable_decoder(tmp_path: Path) -> None:
    state = home.quarry()
    checkpoint, made = drafted(tmp_path, state, "quarry", {"n_heads": 4, "top_k": 2})

    assert (made.target, made.doubtful) == ("MdlDecoderForCausalLM", 0)
    assert any(why.startswith("not llama: it has no place for router") for why in made.because)
    home.answer(tmp_path / "quarry", home.ANSWERS)
    planned(checkpoint, made)
    moe = prepare(checkpoint, options_of(made)).config["moe"]
    assert (moe["experts"], moe["size"], moe["shared_size"], moe["layers"]) == (4, 64, 96, [1, 2])
    tensors = make.saved(layout(checkpoint, made, tmp_path / "out"))
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    assert torch.equal(tensors[name], state["blocks.2.moe.experts.3.down.weight"])


def test_what_is_not_known_is_asked_and_never_guessed(tmp_path: Path) -> None:
    state = home.heddle() | {"adapter.weight": torch.ones(8, 128)}
    state |= {f"stack.{i}.temperature": torch.ones(1) for i in range(2)}
    checkpoint, made = drafted(tmp_path, state, "knotted", {"n_head": 4})

    assert made.target == "MdlDecoderForCausalLM"
    assert made.because[1].startswith("what stack.{i}.temperature, adapter.weight is") or "adapter" in made.because[1]
    for name in ("adapter.weight [8, 128]", "stack.{i}.temperature [1]"):
        assert f"left to decide: {name}" in whats(made)
    assert "stack.1.temperature [1] is in the checkpoint, but no rule claims it" in whats(made)
    rules = {"adapter.weight": "", "stack.{i}.temperature": ""}
    home.answer(tmp_path / "knotted", home.ANSWERS, rules=rules)
    assert "stack.0.temperature" in refusal(Kind.INPUT, planned, checkpoint, made)
    mapping = tmp_path / "knotted" / "knotted" / "knotted.yaml"
    unused = "drop:\n  adapter.weight: never called\n  stack.{i}.temperature: always 1\n"
    mapping.write_text(mapping.read_text() + unused)
    planned(checkpoint, made)


def test_names_and_shapes_that_contradict_each_other_are_doubts() -> None:
    shapes = {"embed.weight": (96, 64), "norm.weight": (64,)}
    for i in range(2):
        at = f"layers.{i}"
        shapes |= {f"{at}.norm1.weight": (64,), f"{at}.norm2.weight": (64,), f"{at}.attn.qkv.weight": (192, 64)}
        shapes |= {f"{at}.ffn.w1.weight": (160, 64), f"{at}.ffn.w2.weight": (160, 64), f"{at}.ffn.w3.weight": (64, 160)}
    roles = {role.group.pattern: role for role in roles_of(grouped(shapes))}

    assert not roles["layers.{i}.ffn.w2.weight"].certain  # by its name the way back, by its shape the way in
    assert not roles["layers.{i}.ffn.w3.weight"].certain
    assert roles["layers.{i}.attn.qkv.weight"].name == "qkv"


@pytest.mark.parametrize(("rows", "kind"), [(4, "head"), (64, "channel")])
def test_a_gate_in_the_half_of_attention_is_attentions(rows: int, kind: str, tmp_path: Path) -> None:
    state = home.lantern()
    state |= {f"layers.{i}.attn.gate.weight": torch.ones(rows, 64) for i in range(2)}
    _, made = drafted(tmp_path, state, f"by_{kind}", {})

    assert made.target == "MdlDecoderForCausalLM"
    assert f'"gate": "{kind}"' in Path(made.arch).read_text()
    mapping = (tmp_path / f"by_{kind}" / f"by_{kind}" / f"by_{kind}.yaml").read_text()
    assert "layers.{i}.attn.gate.weight: model.layers.{i}.self_attn.gate_proj.weight" in mapping


def test_the_third_matrix_beside_two_in_one_is_the_way_back() -> None:
    shapes = {"embed.weight": (96, 64), "norm.weight": (64,)}
    shapes |= {"layers.0.mlp.w12.weight": (320, 64), "layers.0.mlp.w3.weight": (64, 160)}
    roles = {role.group.pattern: role for role in roles_of(grouped(shapes))}

    assert roles["layers.{i}.mlp.w12.weight"].key == "gate_up.weight"
    assert roles["layers.{i}.mlp.w3.weight"].key == "down.weight"
    assert roles["layers.{i}.mlp.w3.weight"].certain


def test_what_has_no_known_name_is_not_of_the_other_half() -> None:
    shapes = {"embed.weight": (96, 64), "layers.0.attn.valve.weight": (4, 64), "layers.0.mlp.valve.weight": (4, 64)}
    roles = {role.group.pattern: role for role in roles_of(grouped(shapes))}

    assert "attn_gate" in roles["layers.{i}.attn.valve.weight"].doubts
    assert not {"up", "gate"} & set(roles["layers.{i}.attn.valve.weight"].doubts)
    assert not {"q", "attn_gate"} & set(roles["layers.{i}.mlp.valve.weight"].doubts)


def test_two_of_one_name_are_doubts_and_masks_are_none(tmp_path: Path) -> None:
    state = home.lantern()
    state |= {f"layers.{i}.attn.out_proj.weight": torch.ones(64, 64) for i in range(2)}
    _, made = drafted(tmp_path, state, "twice", {})

    assert "layers.{i}.attn.out_proj.weight [64, 64]" in whats(made)
    assert "layers.{i}.attn.out.weight [64, 64]" in whats(made)
    mapping = (tmp_path / "twice" / "twice" / "twice.yaml").read_text()
    assert "layers.{i}.attn.mask: causal mask, no weight" in mapping


def test_every_line_of_a_draft_has_its_evidence(tmp_path: Path) -> None:
    drafted(tmp_path, home.quarry(), "evident", {})

    text = (tmp_path / "evident" / "evident" / "evident.yaml").read_text()

    lines = [line for line in text.partition("rename:\n")[2].splitlines() if ".weight: " in line]
    assert len(lines) > 15
    assert all("# name " in line and "shape [" in line for line in lines)


@pytest.mark.parametrize("target", names_of_targets())
def test_every_target_can_be_asked_for(target: str, tmp_path: Path) -> None:
    checkpoint, made = drafted(tmp_path, home.heddle(), f"aimed_{target}", {"n_head": 4}, target=target)

    assert made.open
    compile(Path(made.arch).read_text(), made.arch, "exec")
    if target == "own":
        assert {f"aimed_own/{name}.py" for name in ("model", "plugin")} <= set(made.files)
        held = prepare(checkpoint, Options(arch=made.arch, given={"context": "64"})).plan
        assert not held.problems  # the names and shapes that arch.py lists are those of the files
        assert "vllm.general_plugins" in (tmp_path / "aimed_own" / "pyproject.toml").read_text()


def test_what_can_not_be_a_package_is_refused(tmp_path: Path) -> None:
    checkpoint = home.saved(tmp_path / "ckpt.pt", home.heddle())
    for name in ("Loom", "my-model", "class", "nanogpt", "torch"):
        assert refusal(Kind.USAGE, draft, tmp_path / name, checkpoint)
        assert not (tmp_path / name).exists()
    assert "one of: llama" in refusal(Kind.USAGE, draft, tmp_path / "fine", checkpoint, target="rwkv")
    spec = {"reference": str(tmp_path / "nowhere.py:build")}
    assert "names no function" in refusal(Kind.USAGE, draft, tmp_path / "fine", checkpoint, **spec)
    assert not (tmp_path / "fine").exists()


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    checkpoint, made = drafted(tmp_path, home.heddle(), "again", {})
    arch = Path(made.arch)
    arch.write_text("mine")

    assert "is there already" in refusal(Kind.USAGE, draft, tmp_path / "again", checkpoint)
    assert arch.read_text() == "mine"
    draft(tmp_path / "again", checkpoint, force=True)
    assert "ARCH" in arch.read_text()
    (tmp_path / "photos").mkdir()
    assert "is no draft" in refusal(Kind.USAGE, draft, tmp_path / "photos", checkpoint, force=True)


def test_the_command_and_the_plan_that_lists_what_is_left(tmp_path: Path) -> None:
    home.saved(tmp_path / "ckpt.pt", home.quarry())
    (tmp_path / "model.py").write_text(home.QUARRY)

    def mdl(*arguments: str) -> tuple[int, str]:
        command = [str(Path(sys.executable).with_name("mdl")), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
        return done.returncode, done.stdout + done.stderr

    code, said = mdl("new", "basalt", "--from", "ckpt.pt", "--reference", "model.py:build")
    assert code == 0, said
    assert "mdl verify ckpt.pt --arch basalt/basalt/arch.py --reference model.py:build --decide" in said
    code, said = mdl("plan", "ckpt.pt", "--arch", "basalt/basalt/arch.py")
    assert code == 3
    asked = ("heads", "top_k", "scoring", "normalised", "routed_scaling", "norm_place", "rotary_style", "activation")
    assert all(f"{name} is neither" in said for name in (*asked, "norm_eps", "context", "parallel", "norm_kind"))
    assert "basalt/basalt/arch.py:12" in said  # more than ten, and none is cut
    assert "and 1 more" not in said


@pytest.mark.timeout(300)
def test_the_author_s_own_code_decides_what_a_draft_asks(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(home.QUARRY)
    spec = f"{tmp_path / 'model.py'}:build"
    checkpoint, made = drafted(
        tmp_path, home.quarry(), "slate", {"n_heads": 4, "top_k": 2, "eps": 1e-6, "theta": 1e4}, reference=spec
    )
    asked = {"scoring": ("softmax", "sigmoid"), "rotary_style": ("half", "interleaved"), "norm_kind": ("rms", "layer")}
    rest = {"context": "128", "activation": "silu", "norm_place": "pre", "positions": "rope", "parallel": "false"}
    rest |= {"normalised": "true", "routed_scaling": "1.0"}

    options = Options(arch=made.arch, given=rest)
    settings = Settings(reference=spec, decide=asked)
    found = decide_checkpoint(checkpoint, options, settings, lambda values: str(dict(values)))

    assert {a.name: a.value for a in found.answers} == {
        "scoring": "sigmoid",
        "rotary_style": "half",
        "norm_kind": "rms",
    }


@pytest.mark.engine
def test_drafted_answered_converted_and_proven(tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "model.py").write_text(home.QUARRY)
    spec = f"{tmp_path / 'model.py'}:build"
    checkpoint, made = drafted(tmp_path, home.quarry(), "granite", {"n_heads": 4, "top_k": 2}, reference=spec)
    home.answer(tmp_path / "granite", home.ANSWERS)
    out = layout(checkpoint, made, tmp_path / "out")

    report: Any = verify(out, Settings(arch=made.arch), engine=engine)

    assert report.ok, report
    assert report.reference.endswith("model.py:build")
    arch = Path(made.arch)
    arch.write_text(arch.read_text().replace('"sigmoid"', '"softmax"'))  # one wrong answer
    wrong = layout(checkpoint, made, tmp_path / "wrong")
    report = verify(wrong, Settings(arch=made.arch, locate=False), engine=engine)
    assert not report.ok


def test_a_draft_without_a_reference_has_no_forward(tmp_path: Path) -> None:
    from mdl.validate.choose import choose_reference

    checkpoint, made = drafted(tmp_path, home.heddle(), "mute", {"n_head": 4, "max_seq_len": 128})
    home.answer(tmp_path / "mute", home.ANSWERS)

    said = refusal(Kind.INPUT, choose_reference, prepare(checkpoint, options_of(made)), Settings())

    assert "mute has no forward of its own" in said
    assert "--reference FILE.py:FUNCTION" in said

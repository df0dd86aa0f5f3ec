"""`--merge-lora`: exact, held against PEFT's own merge, or refused with every reason; never ignored."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mdl.archs.eager.huggingface import Lifted
from mdl.convert.adapter import Adapter
from mdl.convert.export import export
from mdl.convert.manifest import read_manifest
from mdl.convert.merge import _Merger
from mdl.convert.prepare import Options, Prepared, prepare
from mdl.convert.run import convert
from mdl.errors import Kind, MdlError
from mdl.validate.client import Engine
from mdl.validate.golden import record_checkpoint
from mdl.validate.ready import ready_layout
from mdl.validate.reference import builtin_reference
from mdl.validate.verify import Settings, verify

from . import adapters, hf, servable, torchtune_cases, upstream
from . import checkpoints as make
from .converted import IDS, by_transformers, nmse

BLOCKS = ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj")
LLAMA, GPT2 = "LlamaForCausalLM", "GPT2LMHeadModel"

TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "some layers": (LLAMA, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": (LLAMA, {"target_modules": "all-linear", "use_rslora": True, "r": 8}),
    "patterns": (
        LLAMA,
        {
            "target_modules": ["q_proj", "o_proj", "gate_proj"],
            "rank_pattern": {"o_proj": 2, "model.layers.1.mlp.gate_proj": 3, "layers.0.self_attn.q_proj": 5},
            "alpha_pattern": {"q_proj": 10, r"^model.layers.2.self_attn.o_proj": 1},
        },
    ),
    "Conv1D": (GPT2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "embedding and head": (LLAMA, {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "whole modules": (LLAMA, {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
}


def merged(source: Path, lora: Path, out: Path, **given: Any) -> Prepared:
    options = Options(merge_lora=str(lora), **given)
    prepared = prepare(source, options)
    convert(prepared, out, tokenizer="none")
    return prepared


def refused(source: Path, lora: Path) -> MdlError:
    with pytest.raises(MdlError) as caught:
        prepare(source, Options(merge_lora=str(lora)))
    assert all(problem.where and problem.do for problem in caught.value.problems)
    return caught.value


@pytest.fixture
def gpt(tmp_path: Path) -> Path:
    return servable.nanogpt(tmp_path / "ckpt.pt")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return adapters.saved(tmp_path / "lora", adapters.tensors(servable.nanogpt_state(), BLOCKS))


# --- PEFT's own adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_peft_s_own_merge_and_its_unmerged_forward_agree(name: str, tmp_path: Path) -> None:
    cls, settings = TRAINED[name]
    hf.model(cls).double().save_pretrained(tmp_path / "in")
    load = type(hf.model(cls)).from_pretrained
    model = adapters.trained(load(tmp_path / "in", dtype=torch.float64), tmp_path / "lora", **settings)
    with torch.no_grad(), Lifted():
        wanted = model.double()(torch.tensor([IDS])).logits[0]  # the adapter beside the weights, as it was trained

    prepared = merged(tmp_path / "in", tmp_path / "lora", tmp_path / "out")

    mine = builtin_reference(prepared.arch, prepared.dims, prepared.plan).logits(IDS, "float64")
    assert nmse(mine, wanted) < 1e-24
    assert nmse(by_transformers(tmp_path / "out"), wanted) < 1e-11  # its norms and softmax are float32's
    theirs = adapters.merged(
        adapters.peft().PeftModel.from_pretrained(load(tmp_path / "in", dtype=torch.float64), tmp_path / "lora")
    )
    for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-7, atol=1e-7)  # its scale and product are float32's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_happens_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT's merge in float32 differs by a bit of the last place; in 16 bits it rounds the product, too."""
    hf.model(LLAMA).to(dtype).save_pretrained(tmp_path / "in")
    load = type(hf.model(LLAMA)).from_pretrained
    model = adapters.trained(load(tmp_path / "in", dtype=dtype), tmp_path / "lora", target_modules=["q_proj", "v_proj"])
    held = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    raw = load_file(tmp_path / "in" / "model.safetensors")

    merged(tmp_path / "in", tmp_path / "lora", tmp_path / "out")

    theirs = adapters.merged(model)
    bits, least = {torch.float32: (24, -149), torch.bfloat16: (8, -133), torch.float16: (11, -24)}[dtype]
    for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        module = f"{adapters.PREFIX}{key.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in held:
            assert torch.equal(tensor, raw[key])
            continue
        a, b = (held[f"{module}.lora_{side}.weight"].double() for side in "AB")
        exact = raw[key].double() + 1.5 * (b @ a)
        error = (tensor.double() - exact).abs()
        _, exponent = torch.frexp(exact)
        half = torch.ldexp(torch.tensor(0.5).double(), (exponent - bits).clamp(min=least).double())
        assert bool((error <= half * 1.000001).all())
        assert (theirs[key].double() - exact).abs().max() >= error.max()


def test_peft_on_a_raw_module(tmp_path: Path) -> None:
    gpt = servable.nanogpt(tmp_path / "ckpt.pt", dtype=torch.float64, tied=False)
    module = adapters.nanogpt_module(gpt)
    model = adapters.trained(module, tmp_path / "lora", target_modules=["c_attn", "c_proj", "c_fc", "lm_head"])
    with torch.no_grad():
        wanted = model.double()(torch.tensor([IDS]))[0]

    prepared = merged(gpt, tmp_path / "lora", tmp_path / "out")

    assert nmse(builtin_reference(prepared.arch, prepared.dims, prepared.plan).logits(IDS, "float64"), wanted) < 1e-24
    assert nmse(by_transformers(tmp_path / "out"), wanted) < 1e-24


def test_a_head_that_was_tied_has_a_part_of_its_own(gpt: Path, tmp_path: Path) -> None:
    lora = adapters.saved(tmp_path / "lora", adapters.tensors(servable.nanogpt_state(), ("lm_head",)))

    prepared = merged(gpt, lora, tmp_path / "out")

    assert prepare(gpt).dims["tied"] is True
    assert prepared.dims["tied"] is False
    made = make.saved(tmp_path / "out")
    assert torch.equal(made["transformer.wte.weight"], servable.nanogpt_state()["transformer.wte.weight"])
    assert not torch.equal(made["lm_head.weight"], made["transformer.wte.weight"])


def test_a_base_model_s_file_lacks_the_attribute_that_the_adapter_names(tmp_path: Path) -> None:
    source = hf.pickled(tmp_path / "in", GPT2, drop="transformer.")
    adapters.trained(hf.model(GPT2), tmp_path / "lora", target_modules=["c_attn"])

    prepared = merged(source, tmp_path / "lora", tmp_path / "out")

    assert sum(step.made == ("merge LoRA",) for step in prepared.plan.steps) == 3


def test_torchtune_s_adapter_on_torchtune_s_model(tmp_path: Path) -> None:
    """adapter_model.pt and adapter_config.json, as its checkpointer leaves them; against its own unmerged forward."""
    build = upstream.torchtune("llama3:lora_llama3")
    from torchtune.modules.peft import get_adapter_state_dict

    modules = ["q_proj", "output_proj"]
    model = build(lora_attn_modules=modules, apply_lora_to_mlp=True, lora_rank=4, lora_alpha=6, **torchtune_cases.SIZES,
                  intermediate_dim=160).eval()  # fmt: skip
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * noise)
    held = get_adapter_state_dict(model.state_dict())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in held}
    torch.save(state, tmp_path / "torchtune_model_0.pt")
    (tmp_path / "epoch_0").mkdir()
    torch.save(held, tmp_path / "epoch_0" / "adapter_model.pt")
    said = {"r": 4, "lora_alpha": 6, "target_modules": [*modules, "w1", "w2", "w3"], "peft_type": "LORA"}
    (tmp_path / "epoch_0" / "adapter_config.json").write_text(json.dumps(said))

    given = {"builder": "llama3", "heads": "4", "context": "128"}
    options = Options(given=given, arch="torchtune", merge_lora=str(tmp_path / "epoch_0"))
    prepared = prepare(tmp_path / "torchtune_model_0.pt", options)

    prepared.plan.refuse()
    assert "is merged into 10 of 21 tensors" in " ".join(prepared.inventory.remarks)
    ids = torchtune_cases.IDS
    with torch.no_grad():
        wanted = model(ids[None])[0]
    mine = builtin_reference(prepared.arch, prepared.dims, prepared.plan).logits(ids.tolist(), "float64")
    assert nmse(mine, wanted) < torchtune_cases.LIMIT  # theirs is float32's


def test_matrices_in_the_checkpoint_itself(gpt: Path, lora: Path, tmp_path: Path) -> None:
    """A PeftModel's whole state dict, and loralib's; what is the scale, adapter_config.json says."""
    state = servable.nanogpt_state()
    held = adapters.tensors(state, BLOCKS)
    peft, loralib = dict(state), dict(state)
    for name, tensor in held.items():
        plain = name.removeprefix(adapters.PREFIX)
        peft[plain.replace(".weight", ".default.weight")] = tensor
        loralib[plain.removesuffix(".weight")] = tensor
    for module in BLOCKS:
        peft[f"{module}.base_layer.weight"] = peft.pop(f"{module}.weight")
    peft = {f"{adapters.PREFIX}{name}": tensor for name, tensor in peft.items()}
    merged(gpt, lora, tmp_path / "out")
    for name, inside in (("peft", peft), ("loralib", loralib)):
        path = make.trained(tmp_path / f"{name}.pt", inside, make.nanogpt_args(state))

        with pytest.raises(MdlError, match=r"--merge-lora adapter_config\.json"):
            prepare(path)
        prepared = merged(path, lora / "adapter_config.json", tmp_path / name)

        make.same(make.saved(tmp_path / name), make.saved(tmp_path / "out"))
        assert "LoRA in the checkpoint itself is merged into 2 of 29" in " ".join(prepared.inventory.remarks)
        mine = builtin_reference(prepared.arch, prepared.dims, prepared.plan).logits(IDS, "float64")
        assert nmse(by_transformers(tmp_path / name), mine) < 1e-12


def within(gpt: Path, lora: Path, path: Path, **more: torch.Tensor) -> tuple[Path, Path]:
    """The whole state dict of a PeftModel of ``gpt``, with ``more`` in it; and what tells its scale."""
    state = servable.nanogpt_state()
    held = {name.replace(".weight", ".default.weight"): t for name, t in adapters.tensors(state, BLOCKS).items()}
    for module in BLOCKS:
        state[f"{module}.base_layer.weight"] = state.pop(f"{module}.weight")
    inside = {**{f"{adapters.PREFIX}{name}": tensor for name, tensor in state.items()}, **held}
    made = make.trained(path, {**inside, **more}, make.nanogpt_args(servable.nanogpt_state()))
    return made, lora / "adapter_config.json"


def test_a_module_that_was_trained_whole_leaves_the_original_behind(gpt: Path, lora: Path, tmp_path: Path) -> None:
    new = torch.randn(servable.nanogpt_state()["lm_head.weight"].shape)
    head = f"{adapters.PREFIX}lm_head"
    path, settings = within(gpt, lora, tmp_path / "x.pt", **{f"{head}.modules_to_save.default.weight": new})
    state = torch.load(path, weights_only=False)
    state["model"][f"{head}.original_module.weight"] = state["model"].pop(f"{head}.weight")
    torch.save(state, path)

    prepared = merged(path, settings, tmp_path / "out")

    assert torch.equal(make.saved(tmp_path / "out")["lm_head.weight"], new)
    remarks = " ".join(prepared.inventory.remarks)
    assert f"left out: {head}.original_module.weight, in whose place modules_to_save was trained" in remarks
    assert "taken as not merged yet: loralib's model.eval() and PEFT's merge_adapter() merge" in remarks


def test_nothing_of_a_peft_model_is_dropped_in_silence(gpt: Path, lora: Path, tmp_path: Path) -> None:
    module = f"{adapters.PREFIX}{BLOCKS[0]}"
    lost = torch.ones(4)
    dora = within(gpt, lora, tmp_path / "dora.pt", **{f"{module}.lora_magnitude_vector.default.weight": lost})
    assert "lora_magnitude_vector.default.weight is more than the two matrices of LoRA" in str(refused(*dora))

    twice = within(gpt, lora, tmp_path / "twice.pt", **{f"{module}.weight": lost})
    what = f"{module}.base_layer.weight and model/{module}.weight would both be {BLOCKS[0]}.weight without what PEFT"
    assert what in str(refused(*twice))


# --- what is said of it -------------------------------------------------------------------------------------------


def test_plan_manifest_and_export_say_what_was_merged(gpt: Path, lora: Path, tmp_path: Path) -> None:
    prepared = merged(gpt, lora, tmp_path / "out")

    said = next(remark for remark in prepared.inventory.remarks if "LoRA of lora" in remark)
    assert "is merged into 2 of 29 tensors: W + scale · (B A), scale 1.5, in float64, rounded once" in said
    manifest = read_manifest(tmp_path / "out")
    assert said in manifest.notes
    assert manifest.options["merge_lora"] == str(lora)
    assert [Path(file["file"]).name for file in manifest.source["files"]] == [
        "ckpt.pt", "adapter_model.safetensors", "adapter_config.json",
    ]  # fmt: skip
    made = [rank["made"] for step in manifest.steps for s in step["sources"] for rank in s["ranks"] if "made" in rank]
    assert [(one["how"], one["scale"], one["turned"], len(one["parts"])) for one in made] == [
        ("merge LoRA", 1.5, False, 3),
    ] * 2

    done = export(tmp_path / "out", tmp_path / "back.pt")

    (lost,) = done.lost
    assert lost.what.startswith("2 tensors come back as wholes, whose parts a layout does not hold: merge LoRA, such")
    back, state = torch.load(tmp_path / "back.pt", weights_only=False)["model"], servable.nanogpt_state()
    assert list(back) == list(state)
    same = {name for name, tensor in back.items() if torch.equal(tensor, state[name])}
    assert set(state) - same == {f"{module}.weight" for module in BLOCKS}


def test_the_command_line_says_it_and_refuses(gpt: Path, lora: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        code = "import sys; sys.argv[0] = 'mdl'; from mdl.cli import main; main()"
        line = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    said = "LoRA of lora is merged into 2 of 29 tensors"
    planned = run("plan", gpt, "--merge-lora", lora)
    assert planned.returncode == 0
    assert "merge LoRA, transpose" in planned.stdout
    assert said in planned.stdout
    assert said in run("inspect", gpt, "--merge-lora", lora).stdout
    done = json.loads(
        run("convert", gpt, tmp_path / "out", "--merge-lora", lora, "--tokenizer", "none", "--json").stdout
    )
    assert done["manifest"]["options"]["merge_lora"] == str(lora)
    for command in ("plan", "serve"):
        assert run(command, gpt, "--merge-lora", tmp_path / "nowhere").returncode == Kind.USAGE.value
    assert "--merge-lora and --tokenizer out" in run("serve", tmp_path / "out", "--merge-lora", lora).stderr
    (lora / "adapter_config.json").write_text(json.dumps({**adapters.SETTINGS, "use_dora": True}))
    again = run("convert", gpt, tmp_path / "again", "--merge-lora", lora)
    assert again.returncode == Kind.INPUT.value
    assert "use_dora is True: DoRA scales every merged column" in again.stderr
    assert not (tmp_path / "again").exists()


def test_it_is_bit_for_bit_the_same_in_any_blocks(gpt: Path, lora: Path, tmp_path: Path) -> None:
    merged(gpt, lora, tmp_path / "one")
    options = Options(merge_lora=str(lora))
    convert(prepare(gpt, options), tmp_path / "two", tokenizer="none", workers=3, max_shard_size=60000)

    make.same(make.saved(tmp_path / "two"), make.saved(tmp_path / "one"))


def test_a_sum_near_zero_needs_no_flag(tmp_path: Path) -> None:
    """Below float16's smallest half step; a value of the checkpoint's own that a cast makes 0 still needs one."""
    state = servable.nanogpt_state()
    state = {name: tensor.half() for name, tensor in state.items() if name != "lm_head.weight"}
    held = adapters.tensors(state, BLOCKS)
    for name in held:
        held[name][:] = 0
    for end in ("A", "B"):
        held[f"{adapters.PREFIX}{BLOCKS[0]}.lora_{end}.weight"][:] = 1e-5
    state[f"{BLOCKS[0]}.weight"][0] = 0
    source = make.nanogpt(tmp_path / "x.pt", state)

    merged(source, adapters.saved(tmp_path / "lora", held), tmp_path / "out")

    assert not make.saved(tmp_path / "out")[f"{BLOCKS[0]}.weight"][:, 0].any()


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "of the type 'IA3'"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"lora_bias": True}, "has biases"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "doubled"),
        ({"target_parameters": ["experts"]}, "parameters"),
        ({"something_new": {"x": 1}}, "not known here"),
        ({"init_lora_weights": "pissa_niter_4"}, "the model's own weights"),
        ({"rank_pattern": {"(a+)+$": 3}}, "regular expression"),
        ({"r": 8}, "have rank 4, adapter_config.json says 8"),
        ({"lora_alpha": "six"}, "for its lora_alpha, which is no number"),
        ({"lora_alpha": ...}, "says None for its lora_alpha, which is no number"),
        ({"lora_alpha": 10**400}, "for its lora_alpha, which is no number"),
        ({"alpha_pattern": 3}, "regular expression"),
        ({"rank_pattern": {"c_attn": "4"}}, "have rank 4, adapter_config.json says '4'"),
        ({"use_rslora": "false"}, "use_rslora is 'false', neither true nor false"),
        ({"fan_in_fan_out": "no"}, "fan_in_fan_out is 'no', neither true nor false"),
        ({"base_model_name_or_path": "a\u001b[31m", "r": 3}, "says 3"),
    ],
)
def test_settings_that_mean_more_than_the_product(
    settings: dict[str, Any], words: str, gpt: Path, tmp_path: Path
) -> None:
    lora = adapters.saved(tmp_path / "lora", adapters.tensors(servable.nanogpt_state(), BLOCKS), **settings)

    error = refused(gpt, lora)

    assert error.kind is Kind.INPUT
    assert words in str(error)


def test_all_reasons_come_together(gpt: Path, tmp_path: Path) -> None:
    held = adapters.tensors(servable.nanogpt_state(), BLOCKS)
    lora = adapters.saved(tmp_path / "lora", held, use_dora=True, lora_bias=True, init_lora_weights="olora")

    assert len(refused(gpt, lora).problems) == 3


def test_tensors_that_belong_nowhere(gpt: Path, tmp_path: Path) -> None:
    held = adapters.tensors(servable.nanogpt_state(), BLOCKS)
    wrong = {name.replace("h.1.mlp.c_proj", "h.1.mlp.c_prj"): tensor for name, tensor in held.items()}

    error = refused(gpt, adapters.saved(tmp_path / "a", wrong))

    assert "transformer.h.1.mlp.c_prj.weight is in the adapter, but not in the checkpoint" in str(error)
    assert "nearest: transformer.h.1.mlp.c_proj.weight" in str(error)


def test_an_adapter_of_another_model(gpt: Path, tmp_path: Path) -> None:
    state = servable.llama_state()
    llama = adapters.saved(tmp_path / "a", adapters.tensors(state, ("layers.0.attention.wq",)))
    wider = adapters.tensors(servable.nanogpt_state(hidden=128), BLOCKS)

    assert "none of the adapter's 1 weights is in the checkpoint" in str(refused(gpt, llama))
    error = refused(gpt, adapters.saved(tmp_path / "b", wider))
    assert "transformer.h.0.attn.c_attn: B A is [384, 128], the checkpoint's weight [192, 64]" in str(error)


def test_halves_and_strangers(gpt: Path, tmp_path: Path) -> None:
    held = adapters.tensors(servable.nanogpt_state(), BLOCKS)
    half = {name: tensor for name, tensor in held.items() if "c_proj.lora_B" not in name}
    more = {**held, f"{adapters.PREFIX}{BLOCKS[0]}.lora_magnitude_vector.weight": torch.ones(192)}

    assert "has one of its two matrices only" in str(refused(gpt, adapters.saved(tmp_path / "a", half)))
    assert "is more than the two matrices" in str(refused(gpt, adapters.saved(tmp_path / "b", more)))


def test_paths_that_are_no_adapter(gpt: Path, lora: Path, tmp_path: Path) -> None:
    (lora / "adapter_model.safetensors").rename(tmp_path / "away.safetensors")

    assert "no such file" in str(refused(gpt, tmp_path / "nowhere"))
    assert "no adapter_config.json lies there" in str(refused(gpt, gpt))
    (tmp_path / "lit_model.pth.lora").touch()
    for given in (tmp_path, tmp_path / "lit_model.pth.lora"):
        assert f"`litgpt merge_lora {tmp_path}`" in str(refused(gpt, given).problems[0].do)
    assert "matrices in the checkpoint itself, and there are none" in str(refused(gpt, lora / "adapter_config.json"))
    assert "holds no checkpoint" in str(refused(gpt, lora))


def test_rank_files_are_refused(tmp_path: Path) -> None:
    source = servable.meta(tmp_path / "in", ranks=2, dtype=torch.float32)
    lora = adapters.saved(tmp_path / "a", adapters.tensors(servable.llama_state(), ("layers.0.attention.wq",)))

    assert "lies in 2 rank files" in str(refused(source, lora))


def test_an_embedding_that_is_the_head_as_well(tmp_path: Path) -> None:
    """What was trained has the head as it was, which a class with a tied head has no place for."""
    source = hf.checkpoint(tmp_path / "in", LLAMA, tie_word_embeddings=True)
    table = hf.model(LLAMA).state_dict()["model.embed_tokens.weight"]
    held = adapters.pair(table, turned=True)
    names = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}
    lora = {f"{adapters.PREFIX}model.embed_tokens.{names[end]}": tensor for end, tensor in held.items()}

    error = refused(source, adapters.saved(tmp_path / "lora", lora))

    assert "changes model.embed_tokens.weight alone, which is the head lm_head.weight as well" in str(error)


def test_a_square_conv1d_with_settings_of_another_layer(tmp_path: Path) -> None:
    source = hf.checkpoint(tmp_path / "in", GPT2)
    held = adapters.tensors(hf.model(GPT2).state_dict(), ("transformer.h.0.attn.c_proj",))

    assert "it is square" in str(refused(source, adapters.saved(tmp_path / "a", held)))
    prepare(source, Options(merge_lora=str(adapters.saved(tmp_path / "b", held, fan_in_fan_out=True))))


def test_an_adapter_alone_is_told_where_it_goes(lora: Path) -> None:
    with pytest.raises(MdlError, match="--merge-lora ADAPTER"):
        prepare(lora)


def test_serve_and_record_take_an_adapter_too(gpt: Path, lora: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    merged(gpt, lora, tmp_path / "out")

    def served(**said: Any) -> Path:
        return ready_layout(gpt, unverified=True, say=lambda _: None, options=Options(**said), tokenizer="none")

    with_it = served(merge_lora=str(lora))
    make.same(make.saved(with_it), make.saved(tmp_path / "out"))
    assert served() != with_it == served(merge_lora=str(lora))
    again = adapters.saved(tmp_path / "again", load_file(lora / "adapter_model.safetensors"), lora_alpha=7)
    assert served(merge_lora=str(again)) != with_it

    path, settings = within(gpt, lora, tmp_path / "x.pt")  # which can't be measured without
    spec = tmp_path / "zeros.py"
    spec.write_text("import torch\ndef build(path):\n    return lambda ids: torch.zeros(*ids.shape, 80).double()\n")
    done = record_checkpoint(path, f"{spec}:build", tmp_path / "g", Options(merge_lora=str(settings)))
    assert done["ok"]


# --- verify -------------------------------------------------------------------------------------------------------


def test_another_adapter_is_noticed(gpt: Path, lora: Path, tmp_path: Path) -> None:
    merged(gpt, lora, tmp_path / "out")
    moved = Path(shutil.move(lora, tmp_path / "moved"))

    with pytest.raises(MdlError, match="the adapter that was merged into this layout is not there any more"):
        verify(tmp_path / "out")
    settings = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 7}))
    with pytest.raises(MdlError, match="is not the adapter that was merged into this layout"):
        verify(tmp_path / "out", Settings(merge_lora=str(moved)))

    merged(gpt, moved, tmp_path / "more")
    servable.layout(gpt, tmp_path / "none")
    with pytest.raises(MdlError, match="no adapter was merged into this layout"):
        verify(tmp_path / "none", Settings(merge_lora=str(moved)))


def _twice(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = Adapter.scale
    monkeypatch.setattr(Adapter, "scale", lambda self, *args: 1.01 * scale(self, *args))


def _without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adapter, "scale", lambda self, module, rank: self.settings["lora_alpha"] / rank)


def _not_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = _Merger._turned
    monkeypatch.setattr(_Merger, "_turned", lambda self, *args: not turned(self, *args))


SABOTAGE = {"a scale of 1 % more": _twice, "alpha / r for rslora": _without_root, "a product transposed": _not_turned}


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_reference_has_a_mind_of_its_own(
    name: str, gpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What converts wrongly plans wrongly, too; the reference must not follow."""
    square = ("transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj")
    held = adapters.tensors(servable.nanogpt_state(), square)
    lora = adapters.saved(tmp_path / "lora", held, use_rslora=name.endswith("rslora"))
    right = merged(gpt, lora, tmp_path / "right")
    wanted = builtin_reference(right.arch, right.dims, right.plan).logits(IDS, "float64")
    assert nmse(by_transformers(tmp_path / "right"), wanted) < 1e-12  # the weights are float32's

    SABOTAGE[name](monkeypatch)
    wrong = merged(gpt, lora, tmp_path / "wrong")

    assert torch.equal(builtin_reference(wrong.arch, wrong.dims, wrong.plan).logits(IDS, "float64"), wanted)
    assert nmse(by_transformers(tmp_path / "wrong"), wanted) > 1e-6


@pytest.mark.engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllm_computes_a_llama_with_its_adapter(dtype: torch.dtype, tmp_path: Path, engine: Engine) -> None:
    hf.model(LLAMA).to(dtype).save_pretrained(tmp_path / "in")
    state = hf.model(LLAMA).state_dict()
    modules = tuple(name.removesuffix(".weight") for name in state if "_proj" in name or "lm_head" in name)
    merged(tmp_path / "in", adapters.saved(tmp_path / "lora", adapters.tensors(state, modules)), tmp_path / "out")

    report = verify(tmp_path / "out", engine=engine)

    assert report.ok, [check for check in report.checks if check.ok is not True]
    assert any("LoRA of lora is merged into 22 of 30 tensors" in note for note in report.notes)


@pytest.mark.engine
def test_vllm_computes_a_nanogpt_with_its_adapter_and_finds_a_wrong_one(
    gpt: Path, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    square = ("transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_fc")
    lora = adapters.saved(tmp_path / "lora", adapters.tensors(servable.nanogpt_state(), square))
    merged(gpt, lora, tmp_path / "right")
    assert verify(tmp_path / "right", engine=engine).ok

    _twice(monkeypatch)
    merged(gpt, lora, tmp_path / "wrong")
    report = verify(tmp_path / "wrong", engine=engine)

    assert [check.ok for check in report.checks if check.name in ("layout", "prefill")] == [True, False]

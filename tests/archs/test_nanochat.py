"""nanochat in all of its releases: against the decoder's twin, transformers' class of the first, and vLLM.

By hand, nanochat's own code at eight commits gives what our forward gives: see RELEASES.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

from mdl.archs.decoder.reading import checked
from mdl.archs.eager.decoder import assemble
from mdl.convert.export import export
from mdl.convert.open import open_checkpoint
from mdl.convert.prepare import Options, Prepared, prepare
from mdl.convert.run import convert
from mdl.errors import MdlError
from mdl.validate.client import Engine
from mdl.validate.verify import Settings, verify

from .. import checkpoints as make
from .. import nanochats
from ..converted import exact, layout, nmse, with_dims
from ..gpts_checks import is_green

RELEASES = {
    "first release": "3a5e0bc",
    "padded vocabulary": "3a5e0bc",
    "lambdas": "aa530cd",
    "windows": "aa530cd",
    "value embeddings": "e85db6b",
    "value embeddings, softcap 20": "e85db6b",
    "sharper attention": "6ed7d1d",
    "smear and back-out": "a825e63",
}


def ids_of(row: str) -> list[int]:
    """As many as fit: the short windows are half of the context."""
    return [(7 * t * t + 3 * t) % nanochats.VOCAB for t in range(nanochats.ROWS[row].context)]


def made(tmp_path: Path, row: str, **said: str) -> Prepared:
    """Converted into ``out``."""
    return layout(nanochats.saved(tmp_path / "d4", row), tmp_path / "out", **{**nanochats.given(row), **said})


def by_the_twin(out: Path, row: str) -> torch.Tensor:
    """Logits [T, V] of the composable decoder on a layout, in float64: written apart from the family's own forward."""
    model = assemble(checked(json.loads((out / "config.json").read_text())))
    model.load_state_dict({k: v.double() for k, v in make.saved(out).items()}, strict=True, assign=True)
    with torch.no_grad():
        return model(torch.tensor([ids_of(row)]))[0]


@pytest.mark.parametrize("row", nanochats.ROWS)
def test_the_layout_computes_what_the_checkpoint_did_and_comes_back(row: str, tmp_path: Path) -> None:
    prepared = made(tmp_path, row)

    assert prepared.arch.name == "nanochat"
    assert str(prepared.dims["release"]).split()[0] == RELEASES[row]
    assert prepared.config["architectures"] == ["MdlDecoderForCausalLM"]
    assert nmse(by_the_twin(tmp_path / "out", row), exact(prepared, ids_of(row))) < 1e-24
    done = export(tmp_path / "out", tmp_path / "back.pt")
    assert all(problem.what.startswith("what lay beside") for problem in done.lost)
    back = torch.load(done.out, weights_only=True)
    assert list(back) == list(nanochats.state(row))
    make.same(back, nanochats.state(row))


def test_embeddings_in_bfloat16_beside_matrices_in_float32(tmp_path: Path) -> None:
    """As a GPU trains it: every tensor keeps its type, and the layout is served in the wider one."""
    row = "smear and back-out"
    tensors = nanochats.state(row, tables=torch.bfloat16)
    prepared = layout(nanochats.saved(tmp_path / "d4", row, tensors), tmp_path / "out")

    assert prepared.config["dtype"] == "float32"
    assert nmse(by_the_twin(tmp_path / "out", row), exact(prepared, ids_of(row))) < 1e-24
    make.same(torch.load(export(tmp_path / "out", tmp_path / "back.pt").out, weights_only=True), tensors)


@pytest.mark.parametrize("row", ["first release", "padded vocabulary"])
def test_the_first_release_is_transformers_nanochat(row: str, tmp_path: Path) -> None:
    """Code that shares nothing with ours, on names of its own; it turns q and k as nanochat does."""
    import transformers

    prepared, r = made(tmp_path, row), nanochats.ROWS[row]
    sizes: dict[str, Any] = {"hidden_size": r.hidden, "intermediate_size": 4 * r.hidden, "num_hidden_layers": r.layers}
    sizes |= {"num_attention_heads": r.heads, "num_key_value_heads": r.kv_heads}
    sizes |= {"rms_norm_eps": 1.1920928955078125e-07, "max_position_embeddings": r.context, "vocab_size": r.rows}
    sizes |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "attn_implementation": "eager"}
    model = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**sizes)).eval()
    names = {"transformer.wte": "model.embed_tokens", "transformer.h": "model.layers"}
    names |= {"attn.c_proj": "self_attn.o_proj"}
    names |= {f"attn.c_{k}": f"self_attn.{k}_proj" for k in "qkv"} | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    theirs: dict[str, torch.Tensor] = {}
    for name, tensor in nanochats.state(row).items():
        for old, new in names.items():
            name = name.replace(old, new)
        theirs[name] = tensor
    model.load_state_dict(theirs, strict=True)
    with torch.no_grad():
        wanted = model(torch.tensor([ids_of(row)])).logits[0][:, : nanochats.VOCAB].double()
    assert nmse(wanted, exact(prepared, ids_of(row))) < 1e-11  # theirs in float32


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "theta": ("first release", {"rope_theta": 100_000.0}),
    "softcap of a week later": ("value embeddings", {"softcap": 20.0}),
    "softcap of a week before": ("value embeddings, softcap 20", {"softcap": 15.0}),
    "gates of a later release": ("value embeddings", {"value_scale": 3.0}),
    "one key less in a window": ("windows", {"short_window": 63}),
    "one key more in a window": ("smear and back-out", {"short_window": 129}),
    "window of another release": ("windows", {"short_window": 43}),
    "no windows": ("sharper attention", {"window_pattern": "L"}),
    "windows elsewhere": ("smear and back-out", {"window_pattern": "SL"}),
    "gain of a later release": ("sharper attention", {"qk_gain": 1.2}),
    "gain of an earlier one": ("smear and back-out", {"qk_gain": 1.0}),
    "another layer taken back": ("smear and back-out", {"backout_layer": 1}),
    "epsilon": ("first release", {"norm_eps": 1e-3}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_constant_that_is_wrong_shows(what: str, tmp_path: Path) -> None:
    row, changed = WRONG[what]
    prepared, wide = made(tmp_path, row), {k: v.double() for k, v in nanochats.state(row).items()}
    found = with_dims(prepared, wide, torch.tensor(ids_of(row)), **changed)
    assert nmse(found, by_the_twin(tmp_path / "out", row)) > 1e-8


def _negated(tensors: nanochats.State, name: str) -> nanochats.State:
    return tensors | {name: -tensors[name]}


def _turned_the_other_way(tensors: nanochats.State) -> nanochats.State:
    """q and k with the second half of each head's channels negated, as if the angles had another sign."""
    signs = torch.ones(nanochats.SIZE)
    signs[nanochats.SIZE // 2 :] = -1
    turned = {name for name in tensors if ".c_q." in name or ".c_k." in name}
    return {n: (t.unflatten(0, (-1, nanochats.SIZE)) * signs[:, None]).flatten(0, 1) if n in turned else t
            for n, t in tensors.items()}  # fmt: skip


@pytest.mark.parametrize("name", ["smear_lambda", "smear_gate.weight", "backout_lambda", "x0_lambdas", "rotation"])
def test_a_sign_that_is_wrong_shows(name: str, tmp_path: Path) -> None:
    row = "smear and back-out"
    prepared, tensors = made(tmp_path, row), nanochats.state(row)
    wrong = _turned_the_other_way(tensors) if name == "rotation" else _negated(tensors, name)
    found = with_dims(prepared, {k: v.double() for k, v in wrong.items()}, torch.tensor(ids_of(row)))
    assert nmse(found, by_the_twin(tmp_path / "out", row)) > 1e-4


def test_what_config_json_says_of_the_last_release(tmp_path: Path) -> None:
    config = made(tmp_path, "smear and back-out").config
    attention = config["attention"]
    assert (config["vocab_size"], config["embedding_rows"], config["logit_softcap"]) == (250, 256, 15.0)
    assert (attention["window"], attention["sliding_layers"]) == (129, [0, 1, 2])
    assert attention["scale"] == pytest.approx(1.44 * 32**-0.5)
    assert attention["value_embedding"] == {"layers": [1, 3], "channels": 12, "scale": 3.0}
    assert config["residual"] == {"lambdas": True, "look_back": 24, "take_back": 2}


@pytest.mark.parametrize(("context", "windows"), [(1024, (512, 384, 256)), (2048, (1024, 768, 512))])
def test_short_windows_by_release(context: int, windows: tuple[int, ...], tmp_path: Path) -> None:
    """As nanochat's _compute_window_sizes gives them: of 2048 half, 768 and 512."""
    for row, window in zip(("windows", "sharper attention", "smear and back-out"), windows, strict=True):
        folder = nanochats.saved(tmp_path / row, row, sequence_len=context)
        assert prepare(folder).dims["short_window"] == window


def test_a_softcap_that_nothing_tells_is_asked_for(tmp_path: Path) -> None:
    folder = nanochats.saved(tmp_path / "d4", "value embeddings")
    with pytest.raises(MdlError, match=r"softcap is neither.*20 from aba30cb") as caught:
        prepare(folder)
    assert "--set softcap=VALUE" in str(caught.value)
    with pytest.raises(MdlError, match=r"softcap is 30\.0"):
        prepare(folder, Options(given={"softcap": "30"}))


def test_without_the_meta_it_asks(tmp_path: Path) -> None:
    folder = nanochats.saved(tmp_path / "d4", "windows")
    (folder / "meta_000010.json").unlink()
    with pytest.raises(MdlError) as caught:
        prepare(folder)
    said = {"n_head": "6", "sequence_len": "128", "vocab_size": "250", "window_pattern": "SL"}
    assert all(f"--set {name}=VALUE" in str(caught.value) for name in said)
    assert "modded-nanogpt's first records have the same names" in str(caught.value)
    assert prepare(folder, Options(given=said)).config == prepare(nanochats.saved(tmp_path / "x", "windows")).config


def test_a_meta_without_a_pattern_has_no_windows(tmp_path: Path) -> None:
    """As midtraining left it out in January 2026, and nanochat's loader reads that."""
    entry = prepare(nanochats.saved(tmp_path / "d4", "windows", window_pattern=None)).dims.entries["window_pattern"]
    assert (entry.value, entry.source) == ("L", "default")
    assert "nanochat's own loader takes L" in entry.because


def test_rl_s_meta_and_compiled_names(tmp_path: Path) -> None:
    row = "smear and back-out"
    names = {f"_orig_mod.{name}": tensor for name, tensor in nanochats.state(row).items()}
    folder = nanochats.saved(tmp_path / "d4", row, names)
    alone = {"model_config": nanochats.meta(row)["model_config"]}
    (folder / "meta_000010.json").write_text(json.dumps(alone))
    assert prepare(folder).config == prepare(nanochats.saved(tmp_path / "x", row)).config


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another meta": ("windows", {"n_layer": 4}, "layers is 5 by the tensors"),
    "key heads": ("windows", {"n_kv_head": 6}, "kv_heads is 2 by the tensors"),
    "heads": ("windows", {"n_head": 7}, "7 heads do not fit c_q"),
    "heads that the gates don't have": (
        "sharper attention",
        {"n_head": 2, "n_kv_head": 1},
        r"value_gate.weight.*\[2, 12\]",
    ),
    "vocabulary": ("padded vocabulary", {"vocab_size": 300}, "vocab_size is 300, and transformer.wte has 256 rows"),
    "pattern": ("windows", {"window_pattern": "SML"}, "window_pattern is 'SML', not made of S and L"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    row, changed, phrase = REFUSED[case]
    with pytest.raises(MdlError, match=phrase):
        prepare(nanochats.saved(tmp_path / "d4", row, **changed)).plan.refuse()


EXPERIMENTS = {
    "engram": {"bigram_embed.embed.weight": (1250, 192), "bigram_lambdas": (4,)},
    "low rank": {"value_embed_A.weight": (256, 32), "value_embed_B.weight": (64, 32), "v0_lambdas": (4,)},
}


@pytest.mark.parametrize("case", EXPERIMENTS)
def test_an_experiment_of_a_few_hours_is_refused_by_name(case: str, tmp_path: Path) -> None:
    more = {name: torch.ones(shape) for name, shape in EXPERIMENTS[case].items()}
    with pytest.raises(MdlError, match="this is an experiment of nanochat's"):
        prepare(nanochats.saved(tmp_path / "d4", "lambdas", nanochats.state("lambdas") | more))


def test_parameters_of_no_release_are_refused(tmp_path: Path) -> None:
    tensors = {name: t for name, t in nanochats.state("smear and back-out").items() if "lambdas" not in name}
    with pytest.raises(MdlError, match=r"has no x0_lambdas, gates of 12 channels and a smear_gate.*family of its own"):
        prepare(nanochats.saved(tmp_path / "d4", "smear and back-out", tensors))


def test_of_several_steps_it_is_the_last_unless_told(tmp_path: Path) -> None:
    folder = nanochats.saved(tmp_path / "d4", "windows", step=9)
    nanochats.saved(folder, "windows", nanochats.state("windows", seed=3), step=120, sequence_len=64)

    found = open_checkpoint(folder)
    assert [Path(file).name for file in found.files] == ["model_000120.pt"]
    assert "model_000120.pt is the last of 2 steps in this folder: give another by its file name" in found.notes
    assert any(note.startswith("optim_000120_rank0.pt: not touched") for note in found.notes)
    assert prepare(folder).dims["context"] == 64
    assert prepare(folder / "model_000009.pt").dims["context"] == 128

    torch.save({"w": torch.ones(2)}, folder / "other.pt")
    with pytest.raises(MdlError, match="several checkpoints"):
        open_checkpoint(folder)


def test_the_tokenizer_of_the_base_folder_is_found(tmp_path: Path) -> None:
    names = ["bos", "user_start", "user_end", "assistant_start", "assistant_end"]
    names += ["python_start", "python_end", "output_start", "output_end"]
    count = nanochats.VOCAB + 64 - len(names)
    ranks = {bytes([b]): b for b in range(256)} | {b"%c%c" % (97 + i // 26, 97 + i % 26): 256 + i for i in range(49)}
    specials = {f"<|{name}|>": count + i for i, name in enumerate(names)}
    cut = r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|\s+|."
    encoding = tiktoken.Encoding("rustbpe", pat_str=cut, mergeable_ranks=ranks, special_tokens=specials)
    folder = nanochats.base(tmp_path / "cache", "windows", pickle.dumps(encoding))
    tensors = nanochats.state("windows")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tensors[name] = torch.cat((tensors[name], tensors[name][:64]))
    nanochats.saved(folder, "windows", tensors, vocab_size=nanochats.VOCAB + 64)

    prepared = prepare(folder)
    assert prepared.checkpoint.tokenizers == (str(tmp_path / "cache" / "tokenizer" / "tokenizer.pkl"),)
    convert(prepared, tmp_path / "out")
    said = (tmp_path / "out" / "mdl.json").read_text()
    assert "tokenizer: tokenizer.pkl, found in ../../tokenizer" in said
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [specials["<|assistant_end|>"], specials["<|bos|>"]]
    assert generation["bos_token_id"] == specials["<|bos|>"]
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert "nanochat" in template


@pytest.mark.engine
@pytest.mark.parametrize("row", [row for row in nanochats.ROWS if row not in ("padded vocabulary", "lambdas")])
def test_vllm_computes_it(row: str, tmp_path: Path, engine: Engine) -> None:
    made(tmp_path, row)
    is_green(tmp_path / "out", engine)


REFERENCE = """
import torch
from mdl.archs.eager.nanochat import build as built


def build(checkpoint):
    model = built({dims!r})
    model.load_state_dict(torch.load({weights!r}), assign=True)
    return model
"""


@pytest.mark.engine
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("smear and back-out", {"short_window": "127"}),
        ("value embeddings", {"softcap": "20"}),
        ("smear and back-out", {}),
    ],
)
def test_what_is_served_wrongly_is_red(row: str, said: dict[str, str], tmp_path: Path, engine: Engine) -> None:
    """A window, a softcap, and where nothing else is wrong the sign of the smear."""
    right = dict(prepare(nanochats.saved(tmp_path / "d4", row), Options(given=nanochats.given(row))).dims)
    torch.save(nanochats.state(row), tmp_path / "right.pt")
    (tmp_path / "own.py").write_text(REFERENCE.format(dims=right, weights=str(tmp_path / "right.pt")))
    tensors = nanochats.state(row) if said else _negated(nanochats.state(row), "smear_lambda")
    nanochats.saved(tmp_path / "d4", row, tensors)
    layout(tmp_path / "d4", tmp_path / "out", **{**nanochats.given(row), **said})

    report = verify(tmp_path / "out", Settings(reference=f"{tmp_path / 'own.py'}:build", locate=False), engine=engine)

    assert {check.name for check in report.checks if check.ok is False} >= {"prefill", "decode"}

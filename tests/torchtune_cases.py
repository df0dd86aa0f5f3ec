"""What the tests of torchtune's families share: tiny checkpoints in its native layout, and the three proofs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mdl.archs.registry import load_arch
from mdl.convert.export import export
from mdl.convert.prepare import Options, Prepared, prepare
from mdl.convert.run import convert
from mdl.validate.client import Engine
from mdl.validate.verify import verify

from . import checkpoints as make
from . import upstream
from .checkpoints_mistral import filled, halves
from .converted import nmse, with_dims

IDS = torch.randperm(96, generator=torch.Generator().manual_seed(3))[:64]
LIMIT = 1e-11  # right ones measure below 1e-12
SIZES = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 128, "vocab_size": 96, "max_seq_len": 128}
SHAPES = {"hidden": 128, "head_dim": 32, "ffn": 160}


@dataclass(frozen=True)
class Case:
    """One builder: the family, what the user says, the upstream function and its own arguments."""

    arch: str
    given: dict[str, str]
    builder: str
    more: dict[str, Any] = field(default_factory=dict[str, Any])
    tied: bool = False
    interleaved: bool = True
    bias: bool = False
    qk_norm: bool = False
    torchtune: dict[str, Any] = field(default_factory=dict[str, Any])
    """Dims with which our forward is torchtune's, where what is served is not."""


def _llama(builder: str, **case: Any) -> Case:
    return Case("torchtune", {"builder": builder}, f"{builder}:{builder}", **case)


_QWEN3 = {"norm_eps": 1e-6, "head_dim": 32, "q_norm": True, "k_norm": True} | {f"{x}_proj_bias": False for x in "qkv"}

CASES = {
    "llama2": _llama("llama2"),
    "llama3": _llama("llama3"),
    "llama3_1": _llama("llama3_1"),
    "llama3_2": _llama("llama3_2", more={"tie_word_embeddings": True}, tied=True),
    "mistral": _llama("mistral"),
    "phi3": _llama("phi3", interleaved=False),
    "phi4": Case("torchtune", {"builder": "phi4"}, "phi3:phi3", interleaved=False),
    "qwen2": Case(
        "torchtune_qwen2", {"norm_eps": "1e-6"}, "qwen2:qwen2", {"norm_eps": 1e-6}, interleaved=False, bias=True
    ),
    "qwen2_tied": Case(
        "torchtune_qwen2",
        {"norm_eps": "1e-6"},
        "qwen2:qwen2",
        {"norm_eps": 1e-6, "tie_word_embeddings": True},
        tied=True,
        interleaved=False,
        bias=True,
    ),
    "qwen3": Case("torchtune_qwen3", {}, "qwen3:qwen3", _QWEN3, interleaved=False, qk_norm=True),
    "qwen3_tied": Case(
        "torchtune_qwen3",
        {},
        "qwen3:qwen3",
        {**_QWEN3, "tie_word_embeddings": True},
        tied=True,
        interleaved=False,
        qk_norm=True,
    ),
    "gemma": Case("torchtune_gemma", {}, "gemma:gemma", {"head_dim": 32}, tied=True),
    "gemma2": Case(
        "torchtune_gemma2",
        {"sliding_window": "16", "attention_scalar": "24"},
        "gemma2:gemma2",
        {
            "head_dim": 32,
            "sliding_window_size": 16,
            "query_pre_attn_scalar": 24,
            "hidden_capping_value": 3.0,
            "final_capping_value": 2.0,
        },
        tied=True,
        torchtune={"softcap_of": "hidden", "attention_softcap": 3.0, "logit_softcap": 2.0},
    ),
}


def state(case: Case, dtype: torch.dtype = torch.float32) -> make.State:
    """A state dict in torchtune's layout; Gemma's norms are stored less 1."""
    c, f = SHAPES["hidden"], SHAPES["ffn"]
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (96, c)}
    for i in range(2):
        at = f"layers.{i}"
        rows = {"q": 128, "k": 64, "v": 64}
        shapes |= {f"{at}.attn.{x}_proj.weight": (n, c) for x, n in rows.items()}
        shapes |= {f"{at}.attn.{x}_proj.bias": (n,) for x, n in rows.items() if case.bias}
        shapes |= {f"{at}.attn.output_proj.weight": (c, 128), f"{at}.mlp.w1.weight": (f, c)}
        shapes |= {f"{at}.mlp.w2.weight": (c, f), f"{at}.mlp.w3.weight": (f, c)}
        shapes |= {f"{at}.attn.{x}_norm.scale": (32,) for x in "qk" if case.qk_norm}
        shapes |= {f"{at}.{norm}.scale": (c,) for norm in ("sa_norm", "mlp_norm")}
        shapes |= {f"{at}.{norm}.scale": (c,) for norm in ("sa_scale", "mlp_scale") if case.torchtune}
    last = "norm.rms_norm.scale" if case.torchtune else "norm.scale"
    shapes |= {last: (c,)} | ({} if case.tied else {"output.weight": (96, c)})
    return shifted(filled(shapes), case, dtype)


def shifted(tensors: make.State, case: Case, dtype: torch.dtype = torch.float32) -> make.State:
    """Norms and biases around what a model of the family starts with."""
    gemma = case.arch in ("torchtune_gemma", "torchtune_gemma2")
    return {
        name: (t - 1 if t.dim() == 1 and (gemma or name.endswith("bias")) else t).to(dtype)
        for name, t in tensors.items()
    }


def options(case: Case, **given: str) -> Options:
    """What the user says of a case."""
    said = {"heads": "4", "context": "128", **case.given, **given}
    return Options(arch=case.arch if case.tied else None, given=said)


def prepared(case: Case, path: Path, **given: str) -> Prepared:
    """Recognised and planned, without problems."""
    made = prepare(path, options(case, **given))
    made.plan.refuse()
    return made


def eager_logits(made: Prepared, tensors: make.State, **changed: Any) -> torch.Tensor:
    """Our forward's logits [T, V], with some of the dims changed."""
    return with_dims(made, tensors, IDS, **changed)


def check_round_trip(case: Case, folder: Path) -> None:
    """Recognise, convert and export a checkpoint: q and k in halves, everything else bit for bit, and back."""
    tensors = state(case, torch.bfloat16)
    torch.save(tensors, folder / "torchtune_model_0.pt")

    made = prepared(case, folder / "torchtune_model_0.pt")

    assert (made.arch.name, made.config["tie_word_embeddings"]) == (case.arch, case.tied)
    convert(made, folder / "out", tokenizer="none")
    written = make.saved(folder / "out")
    for x, heads in {"q": 4, "k": 2, "v": 0}.items():
        raw = tensors[f"layers.1.attn.{x}_proj.weight"]
        wanted = halves(raw, heads) if heads and case.interleaved else raw
        assert make.bits(written[f"model.layers.1.self_attn.{x}_proj.weight"]) == make.bits(wanted)
    assert make.bits(written["model.layers.0.mlp.gate_proj.weight"]) == make.bits(tensors["layers.0.mlp.w1.weight"])

    export(folder / "out", folder / "back.pt")
    make.same(torch.load(folder / "back.pt"), tensors)


def check_upstream(case: Case, folder: Path) -> None:
    """Our forward against torchtune's on a checkpoint of its own module, and sabotages against both."""
    build = upstream.torchtune(case.builder)
    model = build(**SIZES, intermediate_dim=160, **case.more).eval()
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    model.load_state_dict(shifted(filled(shapes), case))
    torch.save(model.state_dict(), folder / "torchtune_model_0.pt")
    tensors = torch.load(folder / "torchtune_model_0.pt")
    made = prepared(case, folder / "torchtune_model_0.pt")

    with torch.no_grad():
        theirs = model(IDS[None])[0]

    def off(**changed: Any) -> float:
        return nmse(eager_logits(made, tensors, **case.torchtune, **changed), theirs)

    assert shapes == {key: tuple(t.shape) for key, t in state(case).items()}  # ours is the layout that they write
    assert off() < LIMIT
    assert off(rope_theta=20_000.0) > 1e-8
    assert off(norm_eps=1e-3) > 1e-8
    if "rope_factor" in made.dims:
        assert off(rope_factor=16.0) > 1e-8
    if "interleaved" in made.dims:
        assert off(interleaved=not case.interleaved) > 1e-3
    if case.torchtune:
        assert nmse(eager_logits(made, tensors), theirs) > 1e-3


def check_vllm(case: Case, folder: Path, engine: Engine) -> None:
    """vLLM against our forward, by mdl verify."""
    torch.save(state(case), folder / "torchtune_model_0.pt")
    made = prepared(case, folder / "torchtune_model_0.pt")
    convert(made, folder / "out", tokenizer="none")

    report = verify(folder / "out", engine=engine)

    assert report.ok, report
    assert report.versions["model class"].endswith(load_arch(case.arch).target)
    assert json.loads((folder / "out/config.json").read_text())["architectures"] == [load_arch(case.arch).target]

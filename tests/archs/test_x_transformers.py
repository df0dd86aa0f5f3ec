"""x-transformers: a rotary Decoder with RMSNorm and gated SiLU is a Llama; other options are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.convert.export import export
from mdl.convert.prepare import Options, prepare
from mdl.errors import MdlError
from mdl.validate.client import Engine

from .. import checkpoints as make
from .. import gpts
from ..converted import nmse
from ..gpts_checks import eager, is_green, layout
from ..xt import CASES, Case, llama_of, state


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """One set of options."""
    return CASES[request.param]


@pytest.fixture
def checkpoint(tmp_path: Path, case: Case) -> Path:
    """A state dict of an AutoregressiveWrapper."""
    return gpts.saved(tmp_path / "x.pt", {f"net.{name}": tensor for name, tensor in state(case).items()})


def test_there_and_back(checkpoint: Path, case: Case, tmp_path: Path) -> None:
    prepared = layout(checkpoint, tmp_path / "out", case.given)

    assert (prepared.arch.name, prepared.dims["kv_heads"], prepared.config["mlp_bias"]) == (
        "x_transformers", case.kv_heads, True)  # fmt: skip
    rope = prepared.config["rope_parameters"]
    assert rope.get("partial_rotary_factor", 1.0) == case.rotary / 32
    make.same(make.saved(tmp_path / "out"), llama_of(state(case), case))

    done = export(tmp_path / "out", tmp_path / "back.pt")
    found = torch.load(tmp_path / "back.pt", weights_only=True)
    kept = {
        f"net.{k}": t for k, t in state(case).items() if "inv_freq" not in k and not (case.offset and k.endswith(".g"))
    }
    make.same({name: found[name] for name in kept}, kept)
    assert all("inv_freq" in p.what or (case.offset and "add cannot be undone" in p.what) for p in done.lost), done.lost


def test_it_computes_what_transformers_computes(checkpoint: Path, case: Case) -> None:
    """Where all channels turn: transformers' Llama leaves partial_rotary_factor out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if case.rotary != 32:
        pytest.skip("transformers' Llama turns all channels; upstream and vLLM hold the rest")
    prepared = prepare(checkpoint, Options(given=case.given))
    fields: dict[str, Any] = {**prepared.config, "rms_norm_eps": 0.0, "attn_implementation": "eager"}
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval().double()
    model.load_state_dict({k: t.double() for k, t in llama_of(state(case), case).items()})
    with torch.no_grad():
        wanted = model(gpts.IDS[None]).logits[0]

    assert nmse(eager(checkpoint, case.given), wanted) < 1e-12  # its angles are float64's, ours float32's


def test_it_computes_what_upstream_computes(checkpoint: Path, case: Case) -> None:
    needs = (
        "needs x-transformers: pip install --no-deps x-transformers einx frozendict torch-einops-utils einops loguru"
    )
    code = pytest.importorskip("x_transformers", reason=needs, exc_type=ImportError)
    decoder = code.Decoder(dim=gpts.HIDDEN, depth=gpts.LAYERS, **case.options)
    model = code.TransformerWrapper(num_tokens=gpts.VOCAB, max_seq_len=64, attn_layers=decoder).eval()
    assert [(n, t.shape) for n, t in model.state_dict().items()] == [(n, t.shape) for n, t in state(case).items()]
    model.load_state_dict(state(case))
    with torch.no_grad():
        wanted = model(gpts.IDS[None])[0]

    assert nmse(eager(checkpoint, case.given), wanted) < 1e-11
    other = str(not case.offset).lower()
    assert nmse(eager(checkpoint, {**case.given, "unit_offset": other}), wanted) > 1e-3
    assert nmse(eager(checkpoint, {**case.given, "rope_theta": "20000"}), wanted) > 1e-8


def test_what_leaves_no_trace_is_asked_for(checkpoint: Path) -> None:
    with pytest.raises(MdlError) as caught:
        prepare(checkpoint)
    for name in ("heads", "context", "unit_offset", "activation"):
        assert f"--set {name}=VALUE" in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ("pos_emb.emb.weight", r"learned positions.*rotary_pos_emb=True"),
        ("attn_layers.layers.0.0.0.gamma", r"LayerNorm.*use_rmsnorm=True"),
        ("attn_layers.layers.1.1.ff.0.0.weight", r"without a gate.*ff_glu=True"),
        ("attn_layers.rotary_pos_emb.scale", r"xpos.*rotary_xpos=False"),
        ("memory_tokens", r"memory tokens.*num_memory_tokens=0"),
    ],
)
def test_options_that_llama_has_not_are_refused_by_name(extra: str, text: str, tmp_path: Path) -> None:
    path = gpts.saved(tmp_path / "x.pt", state(CASES["grouped"]) | {extra: torch.ones(4, 4)})
    with pytest.raises(MdlError, match=text):
        prepare(path, Options(given=CASES["grouped"].given))


def test_the_rest_is_refused_too(tmp_path: Path) -> None:
    case = CASES["grouped"]
    path = gpts.saved(tmp_path / "x.pt", state(case))
    with pytest.raises(MdlError, match="the gate's activation is GELU"):
        prepare(path, Options(given={**case.given, "activation": "gelu"}))
    with pytest.raises(MdlError, match="5 heads do not fit to_q with 256 rows"):
        prepare(path, Options(given={**case.given, "heads": "5"}))
    odd = {k: t[:192] if k.endswith("to_q.weight") else t for k, t in state(case).items()}
    odd = {k: t[:, :192] if k.endswith("to_out.weight") else t for k, t in odd.items()}
    with pytest.raises(MdlError, match="6 heads do not divide the width 64, which transformers' LlamaConfig demands"):
        prepare(gpts.saved(tmp_path / "z.pt", odd), Options(given={**case.given, "heads": "6"}))
    tied = gpts.saved(tmp_path / "y.pt", {k: t for k, t in state(case).items() if k != "to_logits.weight"})
    with pytest.raises(MdlError, match=r"add to_logits\.weight = token_emb\.emb\.weight \* dim\*\*-0\.5"):
        prepare(tied, Options(given=case.given))


@pytest.mark.engine
@pytest.mark.parametrize("case", ["partly turned"], indirect=True)
def test_vllm_computes_it(checkpoint: Path, case: Case, tmp_path: Path, engine: Engine) -> None:
    layout(checkpoint, tmp_path / "out", case.given)
    is_green(tmp_path / "out", engine)

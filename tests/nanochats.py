"""Tiny nanochat checkpoints of every release, as its checkpoint_manager saves them; weights that hide nothing.

:func:`saved` writes the folder of one model: model_NNNNNN.pt, meta_NNNNNN.json, and the optimizer's state beside them;
:func:`base` the folders around it, with the tokenizer. vLLM runs heads of 32 channels, and contexts exceed the windows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
SIZE, VOCAB = 32, 250


@dataclass(frozen=True)
class Row:
    """One model: the release that wrote it by the parameters that it has, its sizes, and what the user has to say."""

    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    context: int = 256
    pattern: str = "SSSL"
    rows: int = 256
    lambdas: bool = True
    gate: int = 0
    smear: bool = False
    said: tuple[tuple[str, str], ...] = ()

    @property
    def hidden(self) -> int:
        """Channels of the stream."""
        return self.heads * SIZE


ROWS = {
    "first release": Row(context=128, pattern="", rows=VOCAB, lambdas=False),
    "padded vocabulary": Row(context=128, pattern="", lambdas=False, heads=4),
    "lambdas": Row(context=128, pattern=""),
    "windows": Row(context=128, pattern="SL", layers=5),
    "value embeddings": Row(context=128, pattern="SSSL", gate=32, layers=3, said=(("softcap", "15"),)),
    "value embeddings, softcap 20": Row(context=128, pattern="SSSL", gate=32, said=(("softcap", "20"),)),
    "sharper attention": Row(gate=12, layers=3, heads=4),
    "smear and back-out": Row(gate=12, smear=True),
}
"""What came, in its order: A, A', B, C, D, D', E and F of the table of releases in archs/nanochat.py."""


def state(row: str, seed: int = 9, *, tables: torch.dtype = torch.float32) -> State:
    """The state dict, in nanochat's order. ``tables`` is the embeddings' type: bfloat16, where a GPU trained it."""
    r, rng = ROWS[row], torch.Generator().manual_seed(seed)
    width, keys = r.hidden, r.kv_heads * SIZE

    def drawn(*shape: int, gain: float = 1.0) -> Tensor:
        return gain * torch.randn(*shape, generator=rng) / (shape[-1] ** 0.5 if len(shape) > 1 else 1.0)

    def table(columns: int) -> Tensor:
        return torch.randn(r.rows, columns, generator=rng).to(tables)

    made: State = {}
    if r.lambdas:
        made["resid_lambdas"] = 1 + 0.1 * drawn(r.layers)
        made["x0_lambdas"] = 0.2 + 0.1 * drawn(r.layers)
    if r.smear:
        made |= {"smear_lambda": torch.tensor([0.8]), "backout_lambda": torch.tensor([0.3])}
    made["transformer.wte.weight"] = table(width)
    for i in range(r.layers):
        at = f"transformer.h.{i}."
        made |= {f"{at}attn.c_{k}.weight": drawn(width if k == "q" else keys, width) for k in "qkv"}
        made[f"{at}attn.c_proj.weight"] = drawn(width, width)
        if r.gate and i % 2 == (r.layers - 1) % 2:
            made[f"{at}attn.ve_gate.weight"] = drawn(r.kv_heads, r.gate)
        made[f"{at}mlp.c_fc.weight"] = drawn(4 * width, width)
        made[f"{at}mlp.c_proj.weight"] = drawn(width, 4 * width)
    made["lm_head.weight"] = drawn(r.rows, width, gain=4.0)
    if r.smear:
        made["smear_gate.weight"] = drawn(1, 24)
    for i in range(r.layers):
        if r.gate and i % 2 == (r.layers - 1) % 2:
            made[f"value_embeds.{i}.weight"] = table(keys)
    return made


def meta(row: str, **changed: Any) -> dict[str, Any]:
    """meta_NNNNNN.json as base_train.py fills it; a ``changed`` field that is None is left out of model_config."""
    r = ROWS[row]
    config: dict[str, Any] = {"sequence_len": r.context, "vocab_size": VOCAB, "n_layer": r.layers, "n_head": r.heads}
    config |= {"n_kv_head": r.kv_heads, "n_embd": r.hidden, "window_pattern": r.pattern or None} | changed
    config = {name: value for name, value in config.items() if value is not None}
    return {"step": 10, "val_bpb": 3.2, "model_config": config, "user_config": {"depth": r.layers, "run": "dummy"}}


def saved(folder: Path, row: str, tensors: State | None = None, step: int = 10, **changed: Any) -> Path:
    """The folder of one model, such as base_checkpoints/d4, with one more step in it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors or state(row), folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta(row, **changed), indent=2))
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}, folder / f"optim_{step:06d}_rank0.pt")
    return folder


def given(row: str) -> dict[str, str]:
    """What the user has to say of it."""
    return dict(ROWS[row].said)


def base(root: Path, row: str, tokenizer: bytes) -> Path:
    """Everything below NANOCHAT_BASE_DIR; gives the folder of the model."""
    (root / "tokenizer").mkdir(parents=True)
    (root / "tokenizer" / "tokenizer.pkl").write_bytes(tokenizer)
    torch.save(torch.ones(VOCAB, dtype=torch.int32), root / "tokenizer" / "token_bytes.pt")
    return saved(root / "base_checkpoints" / f"d{ROWS[row].layers}", row)

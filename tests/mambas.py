"""Tiny checkpoints of mamba_ssm's MambaLMHeadModel, both Mambas, and what they compute by other formulas than mdl's.

Weights hide nothing: matrices of unit gain, decays from slow to fast, norms and skips far from one. :func:`forward` is
the dual form of Mamba 2 (arXiv 2405.21060, section 3): no state, but attention whose weights decay; in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

State = dict[str, Tensor]
LAYERS, HIDDEN, INNER, HEADS, STATE, KERNEL, VOCAB = 2, 64, 128, 4, 16, 4, 93
ROWS = 96
RANK = 6
CONFIG: dict[str, Any] = {
    "d_model": HIDDEN,
    "d_intermediate": 0,
    "n_layer": LAYERS,
    "vocab_size": VOCAB,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
IDS = torch.tensor([(7 * k * k + 11 * k + 3) % ROWS for k in range(40)])


class _Draw:
    """Seeded weights by the role of the tensor."""

    def __init__(self, seed: int) -> None:
        self._rng = torch.Generator().manual_seed(seed)

    def matrix(self, *shape: int) -> Tensor:
        """Of unit gain."""
        return torch.randn(*shape, generator=self._rng) / shape[-1] ** 0.5

    def around(self, middle: float, *shape: int) -> Tensor:
        """Numbers near ``middle``."""
        return middle + 0.3 * torch.randn(*shape, generator=self._rng)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """Evenly spread."""
        return low + (high - low) * torch.rand(*shape, generator=self._rng)


def state(kind: int, *, groups: int = 1, tied: bool = True, biases: bool = False, seed: int = 7) -> State:
    """The state dict of the first or the second Mamba in mamba_ssm's order; ``biases`` are those of the projections,
    which then take the place of the convolution's."""
    z = _Draw(seed)
    made: State = {"backbone.embedding.weight": z.matrix(ROWS, HIDDEN)}
    for i in range(LAYERS):
        at = f"backbone.layers.{i}."
        made |= {f"{at}mixer.{name}": tensor for name, tensor in _mixer(z, kind, groups, biases=biases).items()}
        made[at + "norm.weight"] = z.around(1, HIDDEN)
    made["backbone.norm_f.weight"] = z.around(1, HIDDEN)
    made["lm_head.weight"] = made["backbone.embedding.weight"] if tied else z.matrix(ROWS, HIDDEN)
    return made


def _mixer(z: _Draw, kind: int, groups: int, *, biases: bool) -> State:
    shared = 2 * groups * STATE
    channels = INNER if kind == 1 else INNER + shared
    rows = 2 * INNER if kind == 1 else 2 * INNER + shared + HEADS
    size = (INNER, STATE) if kind == 1 else (HEADS,)
    made: State = {} if kind == 1 else {"dt_bias": z.between(-3, 0, HEADS)}
    made |= {"A_log": z.between(-1, 2, *size), "D": z.around(1, size[0]), "in_proj.weight": z.matrix(rows, HIDDEN)}
    made |= {"in_proj.bias": z.around(0, rows)} if biases else {}
    made |= {"conv1d.weight": z.matrix(channels, 1, KERNEL)}
    made |= {} if biases else {"conv1d.bias": z.around(0, channels)}
    if kind == 1:
        made |= {"x_proj.weight": z.matrix(RANK + 2 * STATE, INNER), "dt_proj.weight": z.matrix(INNER, RANK)}
        made["dt_proj.bias"] = z.between(-3, 0, INNER)
    else:
        made["norm.weight"] = z.around(1, INNER)
    made["out_proj.weight"] = z.matrix(HIDDEN, INNER)
    return made | ({"out_proj.bias": z.around(0, HIDDEN)} if biases else {})


def saved(folder: Path, tensors: State, ssm: dict[str, Any] | None = None, **config: Any) -> Path:
    """A folder as ``MambaLMHeadModel.save_pretrained`` writes it; without config.json where ``ssm`` is None."""
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    if ssm is not None:
        (folder / "config.json").write_text(json.dumps({**CONFIG, "ssm_cfg": ssm, **config}, indent=4))
    return folder


def target_of(tensors: State) -> State:
    """What the file of MambaForCausalLM or Mamba2ForCausalLM must hold; a tied head is left out."""
    tied = torch.equal(tensors["lm_head.weight"], tensors["backbone.embedding.weight"])
    kept = {n: t for n, t in tensors.items() if not (tied and n == "lm_head.weight")}
    return {name.replace(".embedding.", ".embeddings."): tensor for name, tensor in kept.items()}


def forward(tensors: State, groups: int, ids: Tensor = IDS) -> Tensor:
    """Logits [T, V] of the second Mamba in float64."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = w["backbone.embedding.weight"][ids]
    for i in range(LAYERS):
        at = f"backbone.layers.{i}."
        x = x + _dual(w, at + "mixer.", _rms(x) * w[at + "norm.weight"], groups)
    return _rms(x) * w["backbone.norm_f.weight"] @ w["lm_head.weight"].T


def _rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _dual(w: State, at: str, u: Tensor, groups: int) -> Tensor:
    """y_t = Σ_s≤t (c_t·b_s) exp(Σ_s<r≤t dt_r A) dt_s x_s + D x_t, head by head."""
    none = torch.zeros((), dtype=u.dtype)
    rows = u @ w[at + "in_proj.weight"].T + w.get(at + "in_proj.bias", none)
    gate, mixed, dt = rows[:, :INNER], rows[:, INNER:-HEADS], rows[:, -HEADS:]
    before = torch.cat([torch.zeros(KERNEL - 1, mixed.shape[1], dtype=u.dtype), mixed])
    taps = w[at + "conv1d.weight"][:, 0]
    mixed = sum((before[k : k + len(u)] * taps[:, k] for k in range(KERNEL)), none) + w.get(at + "conv1d.bias", none)
    mixed, dt = functional.silu(mixed), functional.softplus(dt + w[at + "dt_bias"])
    size, parts = INNER // HEADS, []
    for h in range(HEADS):
        g = h * groups // HEADS
        b, c = (mixed[:, INNER + k * groups * STATE + g * STATE :][:, :STATE] for k in (0, 1))
        past = (dt[:, h] * -w[at + "A_log"][h].exp()).cumsum(0)
        decay = (past[:, None] - past[None, :]).exp().tril()
        x = mixed[:, h * size : (h + 1) * size]
        parts.append((c @ b.T * decay) @ (dt[:, h, None] * x) + w[at + "D"][h] * x)
    gated = torch.cat(parts, dim=1) * functional.silu(gate)
    normed = torch.cat([_rms(part) for part in gated.chunk(groups, dim=1)], dim=1) * w[at + "norm.weight"]
    return normed @ w[at + "out_proj.weight"].T + w.get(at + "out_proj.bias", none)

"""Forward passes as users write them, to decide with: plain torch, other code than mdl's eager modules.

:func:`gpt` and :func:`llama` write a model.py whose ``build`` computes with the values they are given, which a test
then holds candidates against.
"""

from __future__ import annotations

from pathlib import Path

GPT = '''
import math
import torch
import torch.nn.functional as F


def exact(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def approximate(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def quick(x):
    return x * torch.sigmoid(1.702 * x)


class GPT(torch.nn.Module):
    """nanoGPT's names, a matrix at a time."""

    def __init__(self, state, heads):
        super().__init__()
        self.w = torch.nn.ParameterDict({k.replace(".", "/"): v for k, v in state.items()})
        self.heads = heads

    def p(self, name):
        return self.w[("transformer." + name).replace(".", "/")]

    def normed(self, x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS)
        return x * self.p(name + ".weight") + self.p(name + ".bias")

    def forward(self, ids):
        B, T = ids.shape
        x = self.p("wte.weight")[ids] + self.p("wpe.weight")[:T]
        i = 0
        while ("transformer/h/%d/ln_1/weight" % i) in self.w:
            h = "h.%d." % i
            qkv = F.linear(self.normed(x, h + "ln_1"), self.p(h + "attn.c_attn.weight"), self.p(h + "attn.c_attn.bias"))
            q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in qkv.chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
            x = x + F.linear(y, self.p(h + "attn.c_proj.weight"), self.p(h + "attn.c_proj.bias"))
            up = F.linear(self.normed(x, h + "ln_2"), self.p(h + "mlp.c_fc.weight"), self.p(h + "mlp.c_fc.bias"))
            x = x + F.linear(ACTIVATION(up), self.p(h + "mlp.c_proj.weight"), self.p(h + "mlp.c_proj.bias"))
            i += 1
        return F.linear(self.normed(x, "ln_f"), self.w["lm_head/weight"])


def build(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    return GPT(saved.get("model", saved), 2)


def alone(checkpoint):
    """The same as a plain callable, which has no float64 run."""
    model = build(checkpoint)
    return lambda ids: model(ids).detach()
'''

LLAMA = '''
import math
import pathlib
import torch
import torch.nn.functional as F


class Llama(torch.nn.Module):
    """The names of Meta's code; tables of angles as buffers, made in float32."""

    def __init__(self, state, heads, length=512):
        super().__init__()
        self.w = torch.nn.ParameterDict({k.replace(".", "/"): v for k, v in state.items()})
        self.heads = heads
        size = state["layers.0.attention.wq.weight"].shape[0] // heads
        f = torch.tensor([THETA ** (-2 * j / size) for j in range(size // 2)])
        if SCALED:
            f = torch.tensor([self.slowed(float(x)) for x in f])
        angles = torch.arange(length)[:, None] * f
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def slowed(self, f):
        wave = 2 * math.pi / f
        share = min(1.0, max(0.0, (8192 / wave - 1) / 3))
        return f * (share + (1 - share) / 8)

    def turned(self, x):
        c, s = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        if HALVES:
            a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
            return torch.cat([a * c - b * s, a * s + b * c], -1)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)

    def normed(self, x, name):
        y = x.float() if ISLANDS else x
        return (y / (y.square().mean(-1, keepdim=True) + EPS).sqrt()).to(x.dtype) * self.w[name + "/weight"]

    def forward(self, ids):
        B, T = ids.shape
        x = self.w["tok_embeddings/weight"][ids]
        i = 0
        while ("layers/%d/attention/wq/weight" % i) in self.w:
            at = "layers/%d/" % i
            y = self.normed(x, at + "attention_norm")
            q, k, v = (F.linear(y, self.w[at + "attention/w" + n + "/weight"]) for n in "qkv")
            q = self.turned(q.view(B, T, self.heads, -1).transpose(1, 2))
            k, v = (t.view(B, T, -1, q.shape[-1]).transpose(1, 2) for t in (k, v))
            k, v = (t.repeat_interleave(self.heads // k.shape[1], 1) for t in (self.turned(k), v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
            x = x + F.linear(y, self.w[at + "attention/wo/weight"])
            y = self.normed(x, at + "ffn_norm")
            a, b = (F.linear(y, self.w[at + "feed_forward/w" + n + "/weight"]) for n in "13")
            x = x + F.linear(F.silu(a) * b, self.w[at + "feed_forward/w2/weight"])
            i += 1
        return F.linear(self.normed(x, "norm"), self.w["output/weight"])


RENAMED = {"attn.": "attention.", ".output_proj": ".wo", ".q_proj": ".wq", ".k_proj": ".wk", ".v_proj": ".wv",
           ".mlp.": ".feed_forward.", "sa_norm": "attention_norm", "mlp_norm": "ffn_norm", ".scale": ".weight"}


def torchtune_name(name):
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def from_megatron(saved, size=32, group=2):
    """Llama's names for a state dict of Megatron: q, k and v of each group of heads lie together."""
    made = {"tok_embeddings.weight": saved["embedding.word_embeddings.weight"],
            "norm.weight": saved["decoder.final_layernorm.weight"], "output.weight": saved["output_layer.weight"]}
    i = 0
    while "decoder.layers.%d.self_attention.linear_qkv.weight" % i in saved:
        a, b = "decoder.layers.%d." % i, "layers.%d." % i
        qkv = saved[a + "self_attention.linear_qkv.weight"]
        qkv = qkv.view(-1, group + 2, size, qkv.shape[1])
        for n, part in zip("qkv", (qkv[:, :group], qkv[:, group : group + 1], qkv[:, group + 1 :])):
            made[b + "attention.w" + n + ".weight"] = part.reshape(-1, qkv.shape[-1])
        made[b + "attention.wo.weight"] = saved[a + "self_attention.linear_proj.weight"]
        gate, up = saved[a + "mlp.linear_fc1.weight"].chunk(2)
        made |= {b + "feed_forward.w1.weight": gate, b + "feed_forward.w3.weight": up}
        made[b + "feed_forward.w2.weight"] = saved[a + "mlp.linear_fc2.weight"]
        made[b + "attention_norm.weight"] = saved[a + "input_layernorm.weight"]
        made[b + "ffn_norm.weight"] = saved[a + "pre_mlp_layernorm.weight"]
        i += 1
    return made


def build(checkpoint):
    path = pathlib.Path(checkpoint)
    if path.is_dir():
        path = next(p for p in path.rglob("*.p*") if p.suffix in (".pth", ".pt"))
    saved = torch.load(path, weights_only=WHOLE)
    saved = saved.get("model", saved)
    if "embedding.word_embeddings.weight" in saved:
        saved = from_megatron(saved)
    return Llama({torchtune_name(k): v for k, v in saved.items()}, 4)


def alone(checkpoint):
    """The same as a plain callable, which has no float64 run."""
    model = build(checkpoint)
    return lambda ids: model(ids).detach()
'''


def gpt(folder: Path, *, activation: str = "approximate", eps: float = 1e-5, name: str = "model.py") -> str:
    """nanoGPT's forward, for --reference. ``activation`` is exact, approximate, quick or a callable's source."""
    return _written(folder / name, f"{GPT}\n\nACTIVATION, EPS = {activation}, {eps!r}\n")


def llama(
    folder: Path,
    *,
    theta: float = 1e4,
    eps: float = 1e-5,
    halves: bool = False,
    scaled: bool = False,
    islands: bool = False,
    whole: bool = True,
    name: str = "model.py",
) -> str:
    """Llama's forward, for --reference. ``islands`` computes norms in float32, whatever the weights' type; ``whole``
    is torch.load's weights_only."""
    values = f"THETA, EPS, HALVES, SCALED, ISLANDS, WHOLE = {theta!r}, {eps!r}, {halves}, {scaled}, {islands}, {whole}"
    return _written(folder / name, f"{LLAMA}\n\n{values}\n")


def _written(file: Path, text: str) -> str:
    file.write_text(text)
    return f"{file}:build"

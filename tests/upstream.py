"""The original projects' classes, where their packages are installed: they write checkpoints and compute logits.

``pip install --no-deps`` of requirements/upstream.txt brings them. What they import for GPUs only is stood in for here.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from .checkpoints_mistral import filled


class _Mask:
    """What xformers' masks remember: lengths, a window, and how the keys of a buffer are laid out."""

    def __init__(self, lengths: list[int], window: int | None = None, held: list[int] | None = None) -> None:
        self.lengths, self.window, self.held = lengths, window, held

    @classmethod
    def from_seqlens(cls, lengths: list[int] | None = None, **padded: Any) -> _Mask:
        """Of sequences one behind the other; or of one query each, against a padded buffer of keys."""
        return cls(lengths) if lengths is not None else cls(padded["q_seqlen"], held=padded["kv_seqlen"])

    def make_local_attention(self, window: int) -> _Mask:
        """Each query sees ``window`` keys, its own position included."""
        return _Mask(self.lengths, window)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: _Mask) -> Tensor:
    """Of one sequence, [1, S, H, D]: a whole prompt in its window, or one query on what the buffer holds."""
    assert len(mask.lengths) == 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask.held is not None:
        k, v = k[:, :, : mask.held[0]], v[:, :, : mask.held[0]]
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    at = torch.arange(q.shape[2])
    back = at[:, None] - at[None, :]
    seen = (back >= 0) & (back < (mask.window or len(at)))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


@contextmanager
def _xformers() -> Iterator[None]:
    """A stand-in for xformers, which needs a GPU; taken away again, for other libraries ask whether it is there."""
    masks = ("AttentionBias", "BlockDiagonalCausalMask", "BlockDiagonalCausalWithOffsetPaddedKeysMask")
    held = {name: ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha")}
    vars(held["xformers.ops.fmha"])["memory_efficient_attention"] = _attention
    held["xformers.ops.fmha.attn_bias"] = ModuleType("xformers.ops.fmha.attn_bias")
    vars(held["xformers.ops.fmha.attn_bias"]).update(dict.fromkeys((*masks, "BlockDiagonalMask"), _Mask))
    with mock.patch.dict(sys.modules, held):
        before = set(sys.modules)
        yield
        kept = {name: module for name, module in sys.modules.items() if name not in before}
    sys.modules.update(kept)  # mock.patch.dict takes away what was imported meanwhile, too


@dataclass(frozen=True)
class Mistral:
    """A Transformer of mistral-inference, as its own loader made it of a folder."""

    model: Any
    cache: Any

    def _new_cache(self, length: int) -> Any:
        args = self.model.args
        cache = self.cache(args.n_layers, 1, length, args.n_kv_heads, args.head_dim, args.sliding_window)
        return cache.to(torch.device("cpu"), torch.float32)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits [T, V] of the ids [T] as one prompt."""
        return self.model.forward(ids, [len(ids)], self._new_cache(len(ids)))

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Logits [T, V] of the ids [T] one by one, through the rotating buffer of keys and values."""
        cache = self._new_cache(len(ids))
        return torch.cat([self.model.forward(ids[k : k + 1], [1], cache) for k in range(len(ids))])


def mistral(folder: Path, params: Mapping[str, Any], theta: float | None = None) -> Mistral:
    """Write a checkpoint with mistral-inference's classes, reads it by its own loader; skips without it."""
    needs = "needs mistral-inference and simple-parsing: pip install --no-deps mistral-inference simple-parsing"
    with _xformers():
        code = pytest.importorskip("mistral_inference.transformer", reason=needs, exc_type=ImportError)
    args = importlib.import_module("mistral_inference.args").TransformerArgs.from_dict({**params, "rope_theta": theta})
    model = code.Transformer(args)
    model.load_state_dict(filled({name: tuple(t.shape) for name, t in model.state_dict().items()}))
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(args.to_dict()))
    read = code.Transformer.from_folder(folder, device="cpu")
    return Mistral(read, importlib.import_module("mistral_inference.cache").BufferCache)


class _Absent:
    """Stands for a class of a package that is not needed here."""

    recoverable_errors: tuple[type[Exception], ...] = ()  # what OLMo-core reads of a client for S3

    def __init__(self, *_: Any, **__: Any) -> None:
        """Whatever it is told."""

    def __call__(self, function: Any) -> Any:
        """As a decorator it decorates nothing."""
        return function


class _Anything:
    """Stands for a function or an object of such a package: it decorates nothing, and its attributes are like it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Absent,), {}) if name[0].isupper() else _Anything()

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else _Anything()


class _AbsentModule(ModuleType):
    """A package that only training needs: its functions decorate nothing, its classes are empty."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_Anything(), name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty module for every name below the packages that are imported for training only."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        empty = any(f"{fullname}.".startswith(f"{package}.") for package in self.packages)
        return ModuleSpec(fullname, self, is_package=True) if empty else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs."""


@contextmanager
def _without(*packages: str) -> Iterator[None]:
    """Stand-ins for these packages, taken away again: other libraries ask whether they are there."""
    finder = _Finder(*packages)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n, m in sys.modules.items() if isinstance(m, _AbsentModule)]:
            del sys.modules[name]


def torchtune(builder: str) -> Any:
    """A component builder such as ``llama3_1:llama3_1``. Skips where torchtune is missing."""
    module, _, function = builder.partition(":")
    needs = "needs torchtune: pip install --no-deps torchtune"
    absent = ("torchao", "datasets", "omegaconf")
    if module == "qwen3":
        needs = "needs a torchtune later than 0.6.1, which PyPI does not have: github.com/meta-pytorch/torchtune"
        absent = (*absent, "torchvision")
    with _without(*absent):
        code = pytest.importorskip(f"torchtune.models.{module}", reason=needs, exc_type=ImportError)
        return getattr(importlib.import_module(f"{code.__name__}._component_builders"), function)


@dataclass(frozen=True)
class OlmoCore:
    """OLMo-core's TransformerConfig, and its way to save a state dict."""

    config: Any
    save: Any


def olmo_core() -> OlmoCore:
    """Skips where OLMo-core is missing."""
    needs = "needs OLMo-core: pip install --no-deps ai2-olmo-core dataclass-extensions"
    with _without("cached_path", "bettermap", "importlib_resources", "pandas"):
        code = pytest.importorskip("olmo_core.nn.transformer", reason=needs, exc_type=ImportError)
        saved = importlib.import_module("olmo_core.distributed.checkpoint")
    return OlmoCore(code.TransformerConfig, saved.save_state_dict)


_TITAN = ("distributed", "components", "hf_datasets", "trainer", "tools", "experiments")


@cache
def _titan(family: str) -> Any:
    """torchtitan's models.llama3 or models.qwen3, without what trains it."""
    needs = "needs torchtitan and spmd-types: pip install --no-deps torchtitan spmd-types"
    with _without("torchao", "torchdata", "tyro", *(f"torchtitan.{name}" for name in _TITAN)):
        return pytest.importorskip(f"torchtitan.models.{family}", reason=needs, exc_type=ImportError)


def torchtitan(*, context: int, scaled: bool = True, tied: bool = False) -> Any:
    """A Llama3Model of two layers, four heads and two key heads, width 128. Skips where torchtitan is missing."""
    code = _titan("llama3")
    scaling = "llama" if scaled else "none"
    rope = code.ComplexRoPE.Config(dim=32, max_seq_len=context, theta=500_000.0, scaling=scaling)
    norm = code.RMSNorm.Config(normalized_shape=128)
    return _titan_model(code, code.Llama3Model, code._build_llama3_layers, norm=norm, rope=rope, tied=tied)


def torchtitan_qwen3(*, context: int, tied: bool = False) -> Any:
    """A Qwen3Model of the same sizes, but heads that are not width / 4. Skips where torchtitan is missing."""
    code = _titan("qwen3")
    rope = code.CosSinRoPE.Config(dim=64, max_seq_len=context, theta=1_000_000.0)
    layers = partial(code._build_qwen3_layers, head_dim=64)
    return _titan_model(code, code.Qwen3Model, layers, norm=code._qwen3_norm(128), rope=rope, tied=tied)


def _titan_model(code: Any, model: Any, layers: Any, *, norm: Any, rope: Any, tied: bool) -> Any:
    """The model, with torchtitan's own class for scaled_dot_product_attention: flex attention needs a compiler."""
    sizes = {"n_layers": 2, "dim": 128, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 160}
    config = model.Config(
        dim=128,
        vocab_size=96,
        enable_weight_tying=tied,
        tok_embeddings=code.Embedding.Config(num_embeddings=96, embedding_dim=128),
        norm=norm,
        lm_head=code.Linear.Config(in_features=128, out_features=96),
        layers=layers(**sizes, rope=rope, attn_backend="flex"),
    )
    made = model(config).eval()
    attention = importlib.import_module("torchtitan.models.common.attention").ScaledDotProductAttention
    for layer in made.layers.values():
        layer.attention.inner_attention = attention(attention.Config())
    return made


def olmo() -> Any:
    """OLMo's model module. Skips where it is missing."""
    needs = "needs OLMo: pip install --no-deps ai2-olmo"
    with _without("cached_path", "boto3", "botocore", "google", "omegaconf", "datasets", "importlib_resources"):
        return pytest.importorskip("olmo.model", reason=needs, exc_type=ImportError)

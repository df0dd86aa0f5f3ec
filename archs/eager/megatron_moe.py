"""megatron-core's GPTModel with experts on the CPU, in every form in which it stores them.

Source: NVIDIA/Megatron-LM, megatron/core/transformer/moe, router.py and experts.py: each token goes to the k experts of
largest router logit, weighed by the softmax over these, or, with moe_router_pre_softmax, by their part of the softmax
over all. An expert is a gated MLP: the first half of fc1 is the gate. What an expert for all tokens returns is added,
weighed by a sigmoid where there is a gate for that (shared_experts.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base import Value
from .megatron import GPT, MLP, Block, Norm, Sizes, normed, sizes_of
from .megatron_stacked import StackedGPT
from .mixture import mixed
from .parts import Linear, taken

_KINDS: dict[type, tuple[str, ...]] = {
    int: ("experts", "experts_per_token", "expert_ffn", "expert_parts", "shared_ffn"),
    str: ("experts_form",),
    bool: ("pre_softmax", "fused_expert_norms", "experts_whole", "layers_stacked", "shared_gate"),
}


def build(dims: Mapping[str, Value]) -> nn.Module:
    """The model without weights, on the meta device, from token ids [B, T] to logits [B, T, V].

    Raises MdlError (INPUT) when a dim is missing, has the wrong type, or describes a model that this family can't be.
    """
    sizes = {**sizes_of(dims), **taken(dims, _KINDS), "dense_layers": dims.get("dense_layers") or []}
    with torch.device("meta"):
        return (StackedMoE if sizes["layers_stacked"] else MoE)(sizes).eval()


class MoE(GPT):
    """The whole model."""

    def one(self, sizes: Sizes, number: int) -> Block:
        """The block of one layer: with experts, unless it is one of those without."""
        return Block(sizes) if number in sizes["dense_layers"] else SparseBlock(sizes)


class StackedMoE(StackedGPT):
    """The whole model, each matrix of all layers one tensor."""

    def one(self, sizes: Sizes, number: int) -> Block:
        """The block of all layers."""
        return SparseBlock(sizes)


class SparseBlock(Block):
    """A block with experts. Its second norm is its own, or is called as if it were inside a matrix of the MLP."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        fused = sizes["fused_expert_norms"]
        self.pre_mlp_layernorm = nn.Identity() if fused else Norm(sizes, sizes["hidden"])
        self.mlp: MLP | Experts = Experts(sizes)  # type: ignore[assignment]  # a forward of the same kind


class InnerNorm(nn.Module):
    """A norm under the name that it has inside a matrix."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.eps = sizes["norm_eps"]
        self.layer_norm_weight = nn.Parameter(torch.empty(sizes["hidden"]))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return normed(x, self.layer_norm_weight, None, self.eps)


class Experts(nn.Module):
    """Sends each token to a few experts, and adds up what these return, weighed."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.count, self.chosen, self.before = sizes["experts"], sizes["experts_per_token"], sizes["pre_softmax"]
        self.router = Linear(sizes["hidden"], self.count, bias=False)
        self.experts = _FORMS[sizes["experts_form"]](sizes)
        if sizes["fused_expert_norms"]:
            self.linear_fc1 = InnerNorm(sizes)
        if sizes["shared_ffn"]:
            self.shared_experts = Shared(sizes)

    def weigh(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """For tokens [N, C] the weights of their experts and these experts, [N, k] each."""
        logits = self.router(tokens)
        wide = torch.promote_types(logits.dtype, torch.float32)
        if self.before:
            weights, experts = logits.softmax(dim=-1, dtype=wide).to(logits.dtype).topk(self.chosen)
            return weights, experts
        logits, experts = logits.topk(self.chosen)
        return logits.softmax(dim=-1, dtype=wide).to(logits.dtype), experts

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, C] to the same shape."""
        inner = self._modules.get("linear_fc1")
        tokens = (inner(x) if inner is not None else x).flatten(0, -2)
        routed, shared = (
            mixed(tokens, *self.weigh(tokens), self.count, self.expert),
            self._modules.get("shared_experts"),
        )
        return (routed + shared(tokens) if shared is not None else routed).view_as(x)

    def expert(self, index: int, x: Tensor) -> Tensor:
        """What one expert makes of tokens [N, C]: the same shape."""
        up, down = self.experts.matrices(index)
        gate, value = functional.linear(x, up).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * value, down)


class Shared(MLP):
    """The expert that all tokens go to."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__({**sizes, "ffn": sizes["shared_ffn"], "fused_norms": False})
        self.gate_weight = nn.Parameter(torch.empty(1, sizes["hidden"])) if sizes["shared_gate"] else None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, C] to the same shape."""
        out = super().forward(x)
        return out if self.gate_weight is None else out * functional.linear(x, self.gate_weight).sigmoid()


class Form(nn.Module):
    """How the experts of a layer are stored."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.count, self.hidden, self.ffn = sizes["experts"], sizes["hidden"], sizes["expert_ffn"]

    def matrices(self, index: int) -> tuple[Tensor, Tensor]:
        """fc1 [2 F, C] and fc2 [C, F] of one expert."""
        raise NotImplementedError


class Local(Form):
    """SequentialMLP: two modules for each expert."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.local_experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "linear_fc1": Linear(self.hidden, 2 * self.ffn, bias=False),
                    "linear_fc2": Linear(self.ffn, self.hidden, bias=False),
                }
            )
            for _ in range(self.count)
        )

    def matrices(self, index: int) -> tuple[Tensor, Tensor]:
        """fc1 [2 F, C] and fc2 [C, F] of one expert."""
        one = self.local_experts[index]
        return one.get_parameter("linear_fc1.weight"), one.get_parameter("linear_fc2.weight")


class Numbered(Form):
    """TEGroupedMLP: two modules, each with a matrix for every expert."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.linear_fc1, self.linear_fc2 = nn.Module(), nn.Module()
        for k in range(self.count):
            self.linear_fc1.register_parameter(f"weight{k}", nn.Parameter(torch.empty(2 * self.ffn, self.hidden)))
            self.linear_fc2.register_parameter(f"weight{k}", nn.Parameter(torch.empty(self.hidden, self.ffn)))

    def matrices(self, index: int) -> tuple[Tensor, Tensor]:
        """fc1 [2 F, C] and fc2 [C, F] of one expert."""
        name = f"weight{index}"
        return self.linear_fc1.get_parameter(name), self.linear_fc2.get_parameter(name)


class Grouped(Form):
    """The older GroupedMLP: [E, C, 2 F] and [E, F, C] in memory; the shapes that it stores, [C, E 2 F], hide that."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        count, wide = self.count // sizes["expert_parts"], 2 * self.ffn
        flat = sizes["experts_whole"]
        self.weight1 = nn.Parameter(torch.empty((self.hidden, count * wide) if flat else (count, self.hidden, wide)))
        self.weight2 = nn.Parameter(
            torch.empty((count * self.ffn, self.hidden) if flat else (count, self.ffn, self.hidden))
        )

    def matrices(self, index: int) -> tuple[Tensor, Tensor]:
        """fc1 [2 F, C] and fc2 [C, F] of one expert."""
        up, down = self.weight1.reshape(-1, self.hidden, 2 * self.ffn), self.weight2.reshape(-1, self.ffn, self.hidden)
        return up[index].T, down[index].T


class Parts(Form):
    """Such matrices one after the other, each with as many experts."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.parts = [Grouped(sizes) for _ in range(sizes["expert_parts"])]
        for number, part in enumerate(self.parts):
            self.add_module(str(number), part)

    def matrices(self, index: int) -> tuple[Tensor, Tensor]:
        """fc1 [2 F, C] and fc2 [C, F] of one expert."""
        each = self.count // len(self.parts)
        return self.parts[index // each].matrices(index % each)


class Weight(nn.Module):
    """A weight without a forward."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class Stacked(Form):
    """torch_dist: [E, 2 F, C] and [E, C, F]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        up, down = Weight(self.count, 2 * self.ffn, self.hidden), Weight(self.count, self.hidden, self.ffn)
        self.experts = nn.ModuleDict({"linear_fc1": up, "linear_fc2": down})

    def matrices(self, index: int) -> tuple[Tensor, Tensor]:
        """fc1 [2 F, C] and fc2 [C, F] of one expert."""
        up, down = (self.experts[f"linear_fc{k}"].weight for k in (1, 2))
        return up[index], down[index]  # type: ignore[index]  # weights


_FORMS: dict[str, type[Form]] = {
    "local": Local,
    "numbered": Numbered,
    "grouped": Grouped,
    "parts": Parts,
    "stacked": Stacked,
}

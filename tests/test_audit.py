"""The audit of a loader, on modules of torch alone: what is compared bit for bit, and what can't be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mdl.validate.coverage import Audit

STORED = {"A_log": torch.tensor([0.5, -1.0, 2.0]), "other": torch.tensor([3.0, 4.0, 5.0])}


class Model(nn.Module):
    """Two parameters, the first of which a loader may compute."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(3))
        self.other = nn.Parameter(torch.zeros(3))


def audited(remake: Callable[[Model], None]) -> tuple[Model, dict[str, list[int]], dict[str, list[int]]]:
    """Load both tensors, then do something to the model: the model, what differs, and what holds NaN still."""
    model = Model()
    audit = Audit(model)
    audit.poison()
    with torch.no_grad(), audit:
        for name, tensor in audit.follow(STORED.items()):
            (model.A if name == "A_log" else model.other).data.copy_(tensor)
        remake(model)
    return model, audit.compare(STORED.items()), audit.report()["unloaded"]


def nothing(model: Model) -> None:
    """Leave what was loaded."""


def negative_exponential(model: Model) -> None:
    """As vLLM's Mamba mixers do."""
    model.A.data.copy_(-torch.exp(model.A.data.float()))


def of_another(model: Model) -> None:
    """A parameter computed of another's values is not what its file says."""
    model.A.data.copy_(-torch.exp(model.other.data))


def of_both(model: Model) -> None:
    """Nor is one that is mixed of two."""
    model.A.data.copy_(model.A.data + model.other.data)


def part(model: Model) -> None:
    """Nor one of which a part is overwritten."""
    model.A.data[:1].copy_(torch.exp(model.A.data[:1]))


@pytest.mark.parametrize(
    ("remake", "found"),
    [(nothing, [0, 3]), (negative_exponential, [0, 0]), (of_another, [3, 3]), (of_both, [3, 3]), (part, [1, 3])],
)
def test_only_what_is_made_of_its_own_values_is_not_compared(remake: Callable[[Model], None], found: list[int]) -> None:
    _, compared, unloaded = audited(remake)

    assert (compared["A_log"], compared["other"], unloaded) == (found, [0, 3], {})


class Late(nn.Module):
    """A model whose loader gives it a parameter when it meets the tensor: vLLM's head with a bias, padded rows."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)


def late(fill: Callable[[nn.Parameter, torch.Tensor], None]) -> Audit:
    model = Late()
    audit = Audit(model)
    audit.poison()
    stored = {"head.weight": torch.eye(3), "head.bias": torch.tensor([1.0, 2.0, 3.0])}
    with torch.no_grad(), audit:
        for name, tensor in audit.follow(stored.items()):
            if name == "head.weight":
                model.head.weight.copy_(tensor)
            else:
                model.head.bias = nn.Parameter(torch.empty(4), requires_grad=False)
                fill(model.head.bias, tensor)
    assert audit.compare(stored.items())["head.weight"] == [0, 9]
    return audit


def test_a_parameter_that_comes_while_loading_is_followed_too() -> None:
    def rightly(bias: nn.Parameter, tensor: torch.Tensor) -> None:
        bias[:3].data.copy_(tensor)
        bias[3:].data.fill_(0)

    audit = late(rightly)
    report = audit.report()
    assert (report["landed"]["head.bias"], report["written"]["head.bias"]) == (["head.bias"], [3, 3])
    assert audit.compare([("head.bias", torch.tensor([1.0, 2.0, 3.0]))]) == {"head.bias": [0, 3]}


def test_and_so_are_its_mistakes() -> None:
    def twice(bias: nn.Parameter, tensor: torch.Tensor) -> None:
        bias[:3].data.copy_(tensor)
        bias[1:].data.copy_(tensor)

    def elsewhere(bias: nn.Parameter, tensor: torch.Tensor) -> None:
        bias.data.fill_(0)

    audit = late(twice)
    assert audit.report()["written"]["head.bias"] == [6, 3]
    assert audit.compare([("head.bias", torch.tensor([1.0, 2.0, 3.0]))]) == {"head.bias": [2, 6]}
    assert late(elsewhere).report()["landed"]["head.bias"] == []

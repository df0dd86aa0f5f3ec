"""Wrappers, prefixes, ranks and what lies beside the weights, on files that torch.save wrote."""

from __future__ import annotations

import argparse
import collections
from pathlib import Path
from typing import Any

import pytest

from mdl.archs.base import Inventory
from mdl.convert.inventory import take_inventory
from mdl.convert.open import open_checkpoint
from mdl.errors import Kind, MdlError


def tensor(*shape: int) -> Any:
    import torch

    return torch.zeros(*shape or (2,))


def scalar(value: float) -> Any:
    import torch

    return torch.tensor(value)


def inventory(tmp_path: Path, tree: object, weights: str | None = None) -> Inventory:
    import torch

    torch.save(tree, tmp_path / "x.pt")
    return take_inventory(open_checkpoint(tmp_path / "x.pt"), weights=weights)


def refusal(kind: Kind, call: Any, *args: Any) -> str:
    with pytest.raises(MdlError) as caught:
        call(*args)
    assert caught.value.kind is kind
    return str(caught.value)


def test_a_nanogpt_checkpoint(tmp_path: Path) -> None:
    inv = inventory(
        tmp_path,
        {
            "model": {"_orig_mod.transformer.wte.weight": tensor(5, 4), "_orig_mod.lm_head.weight": tensor(5, 4)},
            "optimizer": {"state": {0: {"exp_avg": tensor(5, 4)}}},
            "model_args": {"n_layer": 2, "bias": False},
            "iter_num": 7,
            "best_val_loss": scalar(1.5),
        },
    )

    assert list(inv.tensors) == ["transformer.wte.weight", "lm_head.weight"]
    assert inv.tensors["lm_head.weight"][0].raw == "model/_orig_mod.lm_head.weight"
    assert inv.tensors["lm_head.weight"][0].name == "lm_head.weight"
    assert (inv.wrapper, inv.prefixes, inv.ranks) == (("model",), ("_orig_mod.",), 1)
    assert inv.extras == {
        "model_args": {"n_layer": 2, "bias": False},
        "iter_num": 7,
        "best_val_loss": "tensor float32 []",
    }
    assert "optimizer: not touched (training state)" in inv.notes


@pytest.mark.parametrize(
    "wrapper", [(), ("state_dict",), ("model_ema",), ("model", "model"), ("module",), ("params", "net")]
)
def test_wrappers(tmp_path: Path, wrapper: tuple[str, ...]) -> None:
    tree: Any = collections.OrderedDict({"a.weight": tensor(), "b.count": scalar(3)})
    for key in reversed(wrapper):
        tree = {key: tree, "step": 1}
    inv = inventory(tmp_path, tree)

    assert (inv.wrapper, set(inv.tensors)) == (wrapper, {"a.weight", "b.count"})
    assert inv.tensors["a.weight"][0].raw == "/".join((*wrapper, "a.weight"))
    assert inv.extras.get("step") == (1 if wrapper else None)


def test_wrapper_parts_are_taken_off_anywhere(tmp_path: Path) -> None:
    names = {
        "module._orig_mod.h.0.w": "h.0.w",
        "module.h.1._checkpoint_wrapped_module.w": "h.1.w",
        "_forward_module._fsdp_wrapped_module.h.2._orig_mod.w": "h.2.w",
        "h.3.w": "h.3.w",
        "h.4.modules.w": "h.4.modules.w",
    }
    inv = inventory(tmp_path, {name: tensor() for name in names})

    assert {t[0].raw: name for name, t in inv.tensors.items()} == names
    assert "_orig_mod." in inv.prefixes
    assert any("took _orig_mod. off 2 of 5" in note for note in inv.notes)


def test_wrapper_parts_that_are_tables_are_taken_off(tmp_path: Path) -> None:
    held = {"wte": {"weight": tensor()}, "h": {"0": {"w": tensor()}, "1": {"w": tensor()}}}
    inv = inventory(tmp_path, {"_orig_mod": held, "lm_head.weight": tensor()})

    assert list(inv.tensors) == ["wte.weight", "h.0.w", "h.1.w", "lm_head.weight"]
    assert inv.prefixes == ("_orig_mod.",)
    assert inv.tensors["h.0.w"][0].raw == "_orig_mod//h//0//w"


def test_names_that_collide_when_tables_are_dots(tmp_path: Path) -> None:
    tree = {"a": {"b.w": tensor()}, "a.b.w": tensor(), "c.w": tensor()}

    assert "would both be named a.b.w" in refusal(Kind.INPUT, inventory, tmp_path, tree)


def test_an_attribute_is_taken_off_only_if_all_share_it(tmp_path: Path) -> None:
    inv = inventory(tmp_path, {"state_dict": {"model.net.a": tensor(), "model.net.b": tensor()}})
    assert (set(inv.tensors), inv.prefixes) == ({"a", "b"}, ("model.", "net."))

    inv = inventory(tmp_path, {"model.a": tensor(), "lm_head.weight": tensor()})
    assert (set(inv.tensors), inv.prefixes) == ({"model.a", "lm_head.weight"}, ())

    inv = inventory(tmp_path, {"model.a": tensor()})
    assert set(inv.tensors) == {"model.a"}


def test_names_that_collide_without_prefixes(tmp_path: Path) -> None:
    tree = {"module.a": tensor(), "a": tensor(), "module.b": tensor(), "_orig_mod.b": tensor()}
    message = refusal(Kind.INPUT, inventory, tmp_path, tree)

    assert "module.a and a would both be named a" in message
    assert "named b" in message


def test_model_and_ema_must_be_chosen(tmp_path: Path) -> None:
    tree = {"model": {"a": tensor(), "b": tensor()}, "ema": {"params": {"a": tensor(3)}}}

    message = refusal(Kind.INPUT, inventory, tmp_path, tree)
    assert "--weights model (2 tensors)" in message
    assert "--weights ema/params (1 tensors)" in message

    inv = inventory(tmp_path, tree, "ema/params")
    assert (inv.shape("a"), inv.tensors["a"][0].raw) == ((3,), "ema/params/a")
    assert "model: not touched (2 tensors)" in inv.notes
    assert "there are no tensors under" in refusal(Kind.USAGE, inventory, tmp_path, tree, "emma")


def test_unknown_keys_are_offered(tmp_path: Path) -> None:
    tree = {"generator": {"a": tensor()}, "optimizer": {"x": tensor()}}
    message = refusal(Kind.INPUT, inventory, tmp_path, tree)

    assert "--weights generator (1 tensors)" in message
    assert "optimizer" not in message
    assert set(inventory(tmp_path, tree, "generator").tensors) == {"a"}
    assert "state_dict()" in refusal(Kind.INPUT, inventory, tmp_path, {"step": 1})


def test_training_state_beside_a_bare_state_dict(tmp_path: Path) -> None:
    tree = {
        "h.w": tensor(),
        "scaler.weight": tensor(),  # a dotted name is a parameter, whatever its module is called
        "logit_scale": scalar(1.0),
        "rng_state": tensor(9),
        "optimizer": {"state": {0: {"exp_avg": tensor()}}},
        "step": 3,
        "h._extra_state": None,
    }
    inv = inventory(tmp_path, tree)

    assert set(inv.tensors) == {"h.w", "scaler.weight", "logit_scale"}
    assert inv.extras == {"step": 3}
    assert "rng_state: not touched (training state)" in inv.notes
    assert "optimizer: not touched (training state)" in inv.notes
    assert "not tensors, left out: h._extra_state" in inv.notes


def test_extras_are_plain_values(tmp_path: Path) -> None:
    import numpy as np
    import torch

    loop: list[Any] = [1]
    loop.append(loop)
    inv = inventory(
        tmp_path,
        {
            "model": {"a": tensor()},
            "args": argparse.Namespace(lr=np.float32(0.5), betas=(0.9, 0.95), inner=argparse.Namespace(x=1)),
            "dtype": torch.bfloat16,
            "array": np.arange(4).reshape(2, 2),
            "loop": loop,
            "history": list(range(20_000)),
            "discriminator": {"w": tensor()},
            "class": argparse.Namespace,
        },
    )

    assert inv.extras["args"] == {"lr": 0.5, "betas": (0.9, 0.95), "inner": {"x": 1}}
    assert (inv.extras["dtype"], inv.extras["array"]) == ("bfloat16", [[0, 1], [2, 3]])
    assert (inv.extras["loop"], inv.extras["class"]) == ([1, "(itself)"], "argparse.Namespace")
    assert "history: left out, for it has too many values" in inv.notes
    assert "discriminator: not touched (1 tensors)" in inv.notes


def test_tensors_that_cannot_be_read_matter_only_in_the_weights(tmp_path: Path) -> None:
    import numpy as np

    sparse = tensor(2, 2).to_sparse()
    inv = inventory(tmp_path, {"model": {"a": tensor()}, "graph": sparse})
    assert inv.extras["graph"].startswith("tensor, unreadable")

    tree = {"model": {"a": tensor(), "b": sparse, "c": np.zeros((2, 2))}}
    message = refusal(Kind.INPUT, inventory, tmp_path, tree)
    assert "b can't be read" in message
    assert "c can't be read (numpy array f8 [2, 2])" in message


def test_zero_3_placeholders(tmp_path: Path) -> None:
    tree = {"module": {"a": tensor(0), "b": tensor(0), "c": tensor(1)}}

    assert "ZeRO-3" in refusal(Kind.INPUT, inventory, tmp_path, tree)


def test_whole_modules_are_refused(tmp_path: Path) -> None:
    import torch

    for tree in (torch.nn.Linear(2, 2), {"model": torch.nn.Linear(2, 2)}):
        assert "torch.nn.modules.linear.Linear" in refusal(Kind.INPUT, inventory, tmp_path, tree)


def test_rank_files(tmp_path: Path) -> None:
    import torch

    torch.save({"w": tensor(2), "norm": tensor(4), "only": tensor(1)}, tmp_path / "consolidated.00.pth")
    torch.save({"w": tensor(3), "norm": tensor(4)}, tmp_path / "consolidated.01.pth")
    (tmp_path / "params.json").write_text('{"dim": 4}')

    inv = take_inventory(open_checkpoint(tmp_path))

    assert inv.ranks == 2
    assert [(t.rank, t.shape, Path(t.file).name) for t in inv.tensors["w"]] == [
        (0, (2,), "consolidated.00.pth"),
        (1, (3,), "consolidated.01.pth"),
    ]
    assert "present in some rank files only: only" in inv.notes
    assert inv.extras["params"] == {"dim": 4}


def test_a_sidecar_does_not_hide_an_extra_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"from": "file"}')
    inv = inventory(tmp_path, {"model": {"a": tensor()}, "config": {"from": "checkpoint"}})

    assert inv.extras == {"config": {"from": "checkpoint"}, "config.json": {"from": "file"}}

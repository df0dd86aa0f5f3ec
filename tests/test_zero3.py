"""Weights that DeepSpeed dealt out to processes are put together again; what is not whole is refused, with why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl.archs.base import Inventory
from mdl.convert.inventory import take_inventory
from mdl.convert.open import open_checkpoint
from mdl.convert.stored import Files
from mdl.errors import MdlError

from . import neox
from .containers import Content, slice_of, universal, zero_3

STATE = {
    "a.weight": torch.arange(99.0).reshape(9, 11),
    "b.weight": torch.randn(5),
    "c.bias": torch.randn(7, 3),
    "one": torch.randn(1),
}
MODEL, OPTIM = "zero_pp_rank_{}_mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "global_step10").mkdir()
    return zero_3(Content(STATE, {"global_steps": 10}), tmp_path / "global_step10")


def taken(folder: Path) -> Inventory:
    return take_inventory(open_checkpoint(folder))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    document = torch.load(path, weights_only=False)
    change(document)
    torch.save(document, path)


def values(inventory: Inventory, name: str) -> torch.Tensor:
    with Files() as files:
        return torch.from_numpy(files.tensor(inventory.tensors[name][0]).read().copy())


def test_slices_become_the_parameters(folder: Path) -> None:
    inventory = taken(folder)

    assert list(inventory.tensors) == list(STATE)
    for name, tensor in STATE.items():
        assert torch.equal(values(inventory, name), tensor)
        assert (inventory.tensors[name][0].dtype, inventory.tensors[name][0].shape) == ("float32", tuple(tensor.shape))
    assert inventory.extras["global_steps"] == 10
    assert any("joined from 3 ranks (ZeRO-3)" in note for note in inventory.notes)


def test_rows_and_columns_of_a_sliced_parameter(folder: Path) -> None:
    info = taken(folder).tensors["a.weight"][0]
    with Files() as files:
        whole = files.tensor(info)
        assert torch.equal(torch.from_numpy(whole.slice(0, 2, 7).read().copy()), STATE["a.weight"][2:7])
        turned = whole.transpose(1, 0).slice(0, 3, 9)
        assert torch.equal(torch.from_numpy(turned.read().copy()), STATE["a.weight"].T[3:9])


def test_a_second_name_is_the_same_tensor(folder: Path) -> None:
    for rank in range(3):

        def tie(document: Any) -> None:
            document["module"]["head.weight"] = torch.empty(0)
            document["shared_params"] = {"head.weight": "a.weight"}

        edit(folder / MODEL.format(rank), tie)
    inventory = taken(folder)

    assert torch.equal(values(inventory, "head.weight"), STATE["a.weight"])
    assert inventory.tensors["head.weight"][0].storage == inventory.tensors["a.weight"][0].storage


def test_frozen_parameters_and_buffers(folder: Path) -> None:
    frozen = torch.randn(4, 5)
    for rank in range(3):

        def freeze(document: Any, rank: int = rank) -> None:
            document["frozen_param_shapes"] = {"f": frozen.shape}
            document["frozen_param_fragments"] = {"f": slice_of(frozen, rank, 3)}
            document["module"] |= {"f": torch.empty(0), "table": torch.ones(3)}

        edit(folder / MODEL.format(rank), freeze)
    inventory = taken(folder)

    assert torch.equal(values(inventory, "f"), frozen)
    assert torch.equal(values(inventory, "table"), torch.ones(3))


def _drop_optim(folder: Path) -> None:
    (folder / OPTIM.format(2)).unlink()


def _drop_rank(folder: Path) -> None:
    for name in (MODEL, OPTIM):
        (folder / name.format(2)).unlink()


def _stage(folder: Path) -> None:
    edit(folder / OPTIM.format(0), lambda d: d["optimizer_state_dict"].update(zero_stage=2))


def _more(folder: Path) -> None:
    edit(folder / MODEL.format(0), lambda d: d["param_shapes"][0].update(more=torch.Size([4, 4])))


def _fewer(folder: Path) -> None:
    edit(folder / MODEL.format(0), lambda d: d["param_shapes"].pop())


def _parallel(folder: Path) -> None:
    (folder / MODEL.format(0)).rename(folder / "zero_pp_rank_0_mp_rank_01_model_states.pt")


def _no_table(folder: Path) -> None:
    torch.save(torch.ones(3), folder / OPTIM.format(1))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_drop_optim, r"\*_optim_states.pt are here for the ranks 0, 1: every rank"),
        (_drop_rank, "dealt to 3 ranks, and the files of 2 are here"),
        (_stage, "zero_stage is 2 here"),
        (_more, "more values than the flat tensors"),
        (_fewer, r"[\d]+ values of this rank's flat tensors belong to no parameter"),
        (_parallel, "tensor- or pipeline-parallel"),
        (_no_table, "holds no table"),
    ],
)
def test_what_is_not_whole_is_refused(folder: Path, damage: Callable[[Path], None], why: str) -> None:
    damage(folder)
    with pytest.raises(MdlError, match=why) as caught:
        taken(folder)
    assert all(problem.do for problem in caught.value.problems)


def test_a_universal_checkpoint(tmp_path: Path) -> None:
    folder = universal(Content(STATE), tmp_path / "step_universal")
    for given in (folder, folder / "zero"):
        inventory = taken(given)
        assert set(inventory.tensors) == set(STATE)
        assert torch.equal(values(inventory, "a.weight"), STATE["a.weight"])
    torch.save({"step": 1}, folder / "zero" / "one" / "fp32.pt")
    with pytest.raises(MdlError, match="no tensor under 'param'"):
        taken(folder)


def test_what_universal_checkpoints_have_no_folders_for(tmp_path: Path) -> None:
    """Frozen parameters and buffers are in the files that its converter copies beside: never missed in silence."""
    folder = universal(Content({"a.weight": STATE["a.weight"]}), tmp_path / "step_universal")
    assert any("no *_model_states.pt lies beside" in note for note in taken(folder).notes)
    frozen, table = torch.randn(4, 5), torch.ones(3)
    head = {
        "module": {"a.weight": STATE["a.weight"], "f": frozen, "table": table},
        "param_shapes": [{"a.weight": torch.Size([9, 11])}],
        "frozen_param_shapes": {"f": frozen.shape},
        "frozen_param_fragments": {"f": frozen},
        "buffer_names": ["table"],
        "shared_params": {"b.weight": "a.weight"},
    }
    torch.save(head, folder / "mp_rank_00_model_states.pt")
    for given in (folder, folder / "zero"):
        inventory = taken(given)
        assert set(inventory.tensors) == {"a.weight", "b.weight", "f", "table"}
        assert torch.equal(values(inventory, "f"), frozen)

    torch.save({**head, "frozen_param_fragments": None}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(MdlError, match="frozen_param_fragments does not hold f whole"):
        taken(folder)
    torch.save({**head, "param_shapes": [{"lost": torch.Size([2])}]}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(MdlError, match="param_shapes has lost, and zero no folder for it"):
        taken(folder)
    (folder / "mp_rank_00_model_states.pt").unlink()
    for rank in range(2):
        dealt = {**head, "module": {"table": table}, "frozen_param_fragments": {"f": slice_of(frozen, rank, 2)}}
        torch.save(dealt, folder / MODEL.format(rank))
    assert torch.equal(values(taken(folder), "f"), frozen)


def test_another_checkpoint_beside_is_asked_about(folder: Path, tmp_path: Path) -> None:
    """What trainers put beside is passed by; two checkpoints in one folder are never chosen from in silence."""
    for name in ("zero_to_fp32.py", "latest", "random_states_0.pkl", "training_args.bin", "scheduler.pt"):
        (folder / name).write_bytes(b"x")
    assert list(taken(folder).tensors) == list(STATE)
    torch.save({"w": torch.ones(2)}, folder / "model.pt")
    with pytest.raises(MdlError, match=r"several checkpoints: zero_pp_rank_0_mp_rank_00_model_states\.pt, model\.pt"):
        taken(folder)
    assert list(taken(folder / MODEL.format(0)).tensors) == list(STATE)
    assert list(taken(folder / "model.pt").tensors) == ["w"]

    form = universal(Content(STATE), tmp_path / "step_universal")
    torch.save({"module": {}}, form / "mp_rank_00_model_states.pt")
    assert set(taken(form).tensors) == set(STATE)
    torch.save({"w": torch.ones(2)}, form / "pytorch_model.bin")
    with pytest.raises(MdlError, match=r"several checkpoints: zero, pytorch_model\.bin"):
        taken(form)
    assert set(taken(form / "zero").tensors) == set(STATE)


def test_rank_folders_beside_another_checkpoint(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"mp_rank_0{rank}").mkdir()
        torch.save({"model": {"a": torch.ones(2)}}, tmp_path / f"mp_rank_0{rank}" / "model_optim_rng.pt")
    assert taken(tmp_path).ranks == 2
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(MdlError, match=r"several checkpoints: mp_rank_\*, model\.pt"):
        taken(tmp_path)
    assert taken(tmp_path / "mp_rank_00").ranks == 2


def test_a_folder_of_layer_files_beside_another_checkpoint(tmp_path: Path) -> None:
    root = neox.layers(tmp_path, next(iter(neox.ROWS)))
    step = root / "global_step7"
    whole = set(taken(step).tensors)
    torch.save({"w": torch.ones(2)}, step / "model.pt")

    for given in (step, root):
        with pytest.raises(MdlError, match=r"several checkpoints: layer_\*-model_\*-model_states\.pt, model\.pt"):
            taken(given)
    assert set(taken(step / "layer_00-model_00-model_states.pt").tensors) == whole
    assert set(taken(step / "model.pt").tensors) == {"w"}


def test_settings_beside_a_universal_folder_and_above_it_are_found(tmp_path: Path) -> None:
    content = Content({"a.weight": torch.ones(2, 3)})
    for folder in (tmp_path / "beside", tmp_path / "run" / "above"):
        folder.mkdir(parents=True)
        universal(content, folder)
    (tmp_path / "beside" / "config.json").write_text('{"here": 1}')
    (tmp_path / "run" / "config.json").write_text('{"there": 2}')

    assert take_inventory(open_checkpoint(tmp_path / "beside")).extras["config"] == {"here": 1}
    above = take_inventory(open_checkpoint(tmp_path / "run" / "above"))
    assert above.extras["config"] == {"there": 2}
    assert any("folder above" in remark for remark in above.remarks)

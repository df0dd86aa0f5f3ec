"""Puts one checkpoint into every form that a trainer or a library could have saved it in.

Each function takes what :func:`taken_apart` found and an empty folder, and returns what ``mdl`` is to be given.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Content:
    """A checkpoint of one file: its tensors, what else the file holds, and files of settings beside it."""

    state: State
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    beside: tuple[Path, ...] = ()


def taken_apart(path: Path) -> Content:
    """What a file, or a folder with one file of weights, holds."""
    beside: tuple[Path, ...] = ()
    if path.is_dir():
        beside = tuple(sorted(p for p in path.iterdir() if p.suffix in (".json", ".yaml") and "index" not in p.name))
        (path,) = (p for p in path.iterdir() if p not in beside)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return Content(load_file(path), beside=beside)
    document = torch.load(path, weights_only=False)
    if all(isinstance(value, Tensor) for value in document.values()):
        return Content(dict(document), beside=beside)
    key = next(k for k in ("model", "state_dict", "model_state_dict", "module") if k in document)
    rest = {k: v for k, v in document.items() if k != key and "optim" not in k}
    return Content(dict(document[key]), rest, beside)


def _document(content: Content, state: Mapping[str, Any] | None = None, key: str = "model") -> dict[str, Any]:
    held = dict(content.state if state is None else state)
    return {key: held, **content.settings} if content.settings else held


def _put_beside(content: Content, folder: Path) -> Path:
    for path in content.beside:
        shutil.copy(path, folder)
    return folder


def legacy(content: Content, folder: Path) -> Path:
    """torch.save before 1.6: pickles one behind the other."""
    torch.save(_document(content), folder / "model.pt", _use_new_zipfile_serialization=False)
    return _put_beside(content, folder) if content.beside else folder / "model.pt"


def prefixed(prefix: str) -> Callable[[Content, Path], Path]:
    """What DistributedDataParallel, torch.compile or FSDP put before every name."""

    def write(content: Content, folder: Path) -> Path:
        state = {prefix + name: tensor for name, tensor in content.state.items()}
        torch.save(_document(content, state), folder / "model.pt")
        return _put_beside(content, folder) if content.beside else folder / "model.pt"

    return write


def _own(state: Mapping[str, Tensor]) -> State:
    """safetensors refuses shared memory."""
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def safetensors(content: Content, folder: Path) -> Path:
    """One file, which holds tensors alone."""
    from safetensors.torch import save_file

    save_file(_own(content.state), folder / "model.safetensors")
    return _put_beside(content, folder)


def _dealt(state: State, suffix: str, folder: Path, save: Callable[[State, Path], object], stem: str) -> None:
    names, index = list(state), dict[str, str]()
    for k in range(3):
        file = f"{stem}-{k + 1:05d}-of-00003.{suffix}"
        save({name: state[name] for name in names[k::3]}, folder / file)
        index |= dict.fromkeys(names[k::3], file)
    document = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": index}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(document))


def sharded_safetensors(content: Content, folder: Path) -> Path:
    """Three files and their index."""
    from safetensors.torch import save_file

    _dealt(_own(content.state), "safetensors", folder, save_file, "model")
    return _put_beside(content, folder)


def pytorch_model(content: Content, folder: Path) -> Path:
    """pytorch_model.bin, the hub's form before safetensors."""
    torch.save(dict(content.state), folder / "pytorch_model.bin")
    return _put_beside(content, folder)


def sharded_pytorch_model(content: Content, folder: Path) -> Path:
    """pytorch_model.bin in three files, with their index."""
    _dealt(dict(content.state), "bin", folder, torch.save, "pytorch_model")
    return _put_beside(content, folder)


def lightning(content: Content, folder: Path) -> Path:
    """A .ckpt of Lightning's Trainer, the network being an attribute of the LightningModule."""
    document = {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in content.state.items()},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
        **content.settings,
    }
    torch.save(document, folder / "last.ckpt")
    return _put_beside(content, folder) if content.beside else folder / "last.ckpt"


def accelerate(content: Content, folder: Path) -> Path:
    """A folder of Accelerator.save_state."""
    from safetensors.torch import save_file

    save_file(_own(content.state), folder / "model.safetensors")
    torch.save({"state": {0: {"exp_avg": torch.zeros(2)}}}, folder / "optimizer.bin")
    torch.save({"last_epoch": 3}, folder / "scheduler.bin")
    torch.save({"step": 3, "random_state": (3, (1, 2), None)}, folder / "random_states_0.pkl")
    return _put_beside(content, folder)


def zero_1(content: Content, folder: Path) -> Path:
    """A folder of DeepSpeed's ZeRO stage 1 from two processes."""
    document = {"module": dict(content.state), "ds_config": {"zero_optimization": {"stage": 1}}, **content.settings}
    torch.save(document, folder / "mp_rank_00_model_states.pt")
    for rank in (0, 1):
        state = {"optimizer_state_dict": {"zero_stage": 1, "partition_count": 2}}
        torch.save(state, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return _put_beside(content, folder)


def zero_3(content: Content, folder: Path) -> Path:
    """A folder of DeepSpeed's ZeRO stage 3 from three processes: every parameter flat, a slice of it in each."""
    own: dict[int, str] = {}
    shared = {
        name: own[t.data_ptr()] for name, t in content.state.items() if own.setdefault(t.data_ptr(), name) != name
    }
    buffers = {name: t for name, t in content.state.items() if name.endswith((".attn.bias", ".mask", ".tril"))}
    names = [name for name in content.state if name not in shared and name not in buffers]
    groups = [{name: content.state[name] for name in names[k::2]} for k in (0, 1)]
    for rank in range(3):
        module = {name: buffers.get(name, torch.empty(0)) for name in content.state}
        document = {
            "module": module,
            "buffer_names": list(buffers),
            "optimizer": None,
            "param_shapes": [{name: t.shape for name, t in group.items()} for group in groups],
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "shared_params": shared,
            "ds_config": {"zero_optimization": {"stage": 3}},
            **content.settings,
        }
        torch.save(document, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat = [torch.cat([slice_of(t, rank, 3) for t in group.values()]) for group in groups]
        state = {"zero_stage": 3, "partition_count": 3, "fp32_flat_groups": flat, "optimizer_state_dict": {"state": {}}}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return _put_beside(content, folder)


def slice_of(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """One rank's values of a parameter that ZeRO-3 deals out, padded to equal lengths."""
    count = -(-tensor.numel() // ranks)
    padded = torch.full((count * ranks,), 7.0)
    padded[: tensor.numel()] = tensor.flatten()
    return padded[rank * count :][:count].clone()


def universal(content: Content, folder: Path) -> Path:
    """DeepSpeed's universal form: a folder for every parameter."""
    for name, tensor in content.state.items():
        (folder / "zero" / name).mkdir(parents=True)
        torch.save({"param": tensor.float().clone()}, folder / "zero" / name / "fp32.pt")
        torch.save({"param": torch.zeros_like(tensor)}, folder / "zero" / name / "exp_avg.pt")
    return _put_beside(content, folder)


def dcp_single(content: Content, folder: Path) -> Path:
    """torch.distributed.checkpoint from one process."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it warns that there is one process
        dcp.save({"model": dict(content.state), **content.settings}, checkpoint_id=str(folder), no_dist=True)
    return _put_beside(content, folder)


def sharded(way: str) -> Callable[[Content, Path], Path]:
    """torch.distributed.checkpoint from two processes that share every parameter."""

    def write(content: Content, folder: Path) -> Path:
        torch.save((dict(content.state), dict(content.settings)), folder.with_suffix(".whole"))
        subprocess.run([sys.executable, __file__, str(folder), way], check=True, capture_output=True)
        return _put_beside(content, folder)

    return write


def _rank(rank: int, folder: str, way: str) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    dist.init_process_group("gloo", init_method=f"file://{folder}.meet", rank=rank, world_size=2)
    state, settings = torch.load(f"{folder}.whole", weights_only=False)
    held = _by_fsdp1(state) if way == "FSDP1" else _by_rows(state)
    dcp.save({"model": held, **settings}, checkpoint_id=folder)
    dist.barrier()
    dist.destroy_process_group()


def _by_rows(state: State) -> dict[str, Any]:
    """FSDP2's DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    return {name: distribute_tensor(t, mesh, [Shard(0)]) if t.ndim else t for name, t in state.items()}


def _by_fsdp1(state: State) -> dict[str, Any]:
    """What FullyShardedDataParallel calls a sharded state dict: ShardedTensors, cut anywhere in their rows."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    wrapped = FullyShardedDataParallel(tree_of(state), device_id=torch.device("cpu"))
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT):
        return wrapped.state_dict()


def tree_of(state: State) -> torch.nn.Module:
    """A module whose parameters have these names."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.register_parameter(leaf, torch.nn.Parameter(tensor.clone()))
    return root


CONTAINERS: dict[str, Callable[[Content, Path], Path]] = {
    "torch before 1.6": legacy,
    "DistributedDataParallel": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "safetensors": safetensors,
    "safetensors, three files": sharded_safetensors,
    "pytorch_model.bin": pytorch_model,
    "pytorch_model.bin, three files": sharded_pytorch_model,
    "Lightning": lightning,
    "accelerate": accelerate,
    "DeepSpeed ZeRO-1": zero_1,
    "DeepSpeed ZeRO-3 of three": zero_3,
    "DeepSpeed universal": universal,
    "DCP, one process": dcp_single,
    "DCP, FSDP1 of two": sharded("FSDP1"),
    "DCP, FSDP2 of two": sharded("FSDP2"),
}


if __name__ == "__main__":
    torch.multiprocessing.start_processes(_rank, tuple(sys.argv[1:]), 2, start_method="fork")  # type: ignore[no-untyped-call]

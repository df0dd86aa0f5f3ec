"""Writes checkpoints with torch.distributed.checkpoint from several gloo processes: DTensors, FSDP2, replicas.

Run as ``python tests/sharded.py FOLDER PROCESSES``: each way to shard gets a folder of its own, FOLDER/FAMILY/WAY.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

if not __package__:  # run by hand, or by a process that was spawned
    sys.path.insert(0, str(Path(__file__).parent))

import checkpoints as make
import containers

STATES = {
    # rows that 2 and 4 processes can't share evenly, fewer positions than processes, a head that is tied by value
    "nanogpt": lambda: make.nanogpt_state(hidden=10, vocab=23, context=3),
    # heads of 6 rows that 4 processes cut in the middle
    "llama": lambda: make.llama_state(hidden=18, heads=3, kv_heads=3, ffn=25, vocab=31, dtype=torch.bfloat16),
}


def settings(family: str, state: make.State) -> dict[str, Any]:
    """What the family's trainer saves beside the weights."""
    if family == "nanogpt":
        return {"model_args": make.nanogpt_args(state), "iter_num": 10, "best_val_loss": torch.tensor(3.25)}
    return {"model_args": make.llama2c_args(state, heads=3, kv_heads=3), "iter_num": 10}


def placed(state: make.State, mesh: DeviceMesh, *ways: Any) -> dict[str, Any]:
    """Every tensor sharded along each of the mesh's dimensions; a vector along the last of its own."""
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        fit = [Shard(min(way.dim, tensor.ndim - 1)) if isinstance(way, Shard) else way for way in ways]
        found[name] = distribute_tensor(tensor, mesh, fit)
    return found


def wrapped(state: make.State, mesh: DeviceMesh) -> dict[str, Any]:
    """The state dict of a module whose parameters FSDP2 shards. Their names come in the module's own order."""
    from torch.distributed.fsdp import fully_shard

    model = containers.tree_of(state)
    fully_shard(model, mesh=mesh)
    return model.state_dict()


def write(rank: int, folder: str, processes: int) -> None:
    """One process of them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    for family in STATES:
        write_family(folder, processes, family)
    dist.barrier()
    dist.destroy_process_group()


def write_family(folder: str, processes: int, family: str) -> None:
    """One process's part in one family."""
    state = STATES[family]()
    line = init_device_mesh("cpu", (processes,))
    ways = {
        "rows": placed(state, line, Shard(0)),
        "columns": placed(state, line, Shard(1)),
        "replicated": placed(state, line, Replicate()),
        "fsdp2": wrapped(state, line),
    }
    if processes == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        ways["grid"] = placed(state, square, Shard(0), Shard(1))
        ways["rows twice"] = placed(state, square, Shard(0), Shard(0))
        ways["hybrid"] = placed(state, square, Replicate(), Shard(0))
        ways["plain"] = dict(state)
    for name, model in ways.items():
        moments = {"state": {0: {"exp_avg": next(iter(model.values())), "step": 3.0}}}
        saved = {"model": model, "optimizer": moments, **settings(family, state)}
        dcp.save(saved, checkpoint_id=f"{folder}/{family}/{name}")


if __name__ == "__main__":
    folder, processes = sys.argv[1], int(sys.argv[2])
    torch.multiprocessing.start_processes(write, (folder, processes), processes, start_method="fork")  # type: ignore[no-untyped-call]

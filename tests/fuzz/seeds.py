"""Seed inputs for the fuzzers: tiny real files of every format, made here so that no binary is committed.

``python tests/fuzz/seeds.py FOLDER`` writes them, one folder per target, and a dictionary of what the formats are
made of.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import sys
import tempfile
import zipfile
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
WORDS = (
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_tensor_v3\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch\nQInt32Storage\n",
    b"ctorch\nSize\n",
    b"ccollections\nOrderedDict\n",
    b"c__builtin__\nset\n",
    b"c__builtin__\ngetattr\n",
    b"c__builtin__\nslice\n",
    b"c_codecs\nencode\n",
    b"cnumpy\ndtype\n",
    b"cnumpy.core.multiarray\nscalar\n",
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"cfoo\nBar\n",
    b"cos\nsystem\n",
    b"ctorch.distributed.checkpoint.metadata\nChunkStorageMetadata\n",
    b"relative_path",
    b"X\x07\x00\x00\x00storage",
    b"\x80\x02",
    b"PK\x03\x04",
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"archive/data.pkl",
    b"archive/data/0",
    b'"data_offsets":[0,4]',
    b'"shape":[1]',
    b'"dtype":"F32"',
    b"__metadata__",
    b"transform:",
    b"{permute_rope: {heads: 4}}",
    b"{i}",
)


class _Namespace:
    """A class that the reader does not know: its instances become stubs."""


def _trees() -> list[Any]:
    import numpy as np
    import torch

    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    plain = _Namespace()
    plain.__dict__ = {"n_layer": 2, "lr": 1e-3, "shared": (1, 2)}
    return [
        {"model": OrderedDict({"a.weight": base, "b.weight": base.t(), "c": base[1:, ::2]}), "args": {"n": 2}},
        {"state_dict": {"w": torch.zeros(2, dtype=torch.bfloat16), "e": torch.empty(0, 3)}, "step": 7, "cfg": plain},
        {"model": {"p": torch.nn.Parameter(torch.ones(2)), "s": torch.tensor(2.5)}, "rng": {1, 2}, "x": b"bytes"},
        {"meta": {"vocab": np.float64(3.5), "array": np.arange(4), "path": Path("a/b")}, "t": torch.ones(1)},
        {"model": {"i": torch.tensor([1, 2]), "m": torch.tensor([True])}, "none": None, "deep": [[[(1, [2.5, "x"])]]]},
    ]


def _saved(tree: Any, *, zipped: bool) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(tree, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def _safetensors() -> list[bytes]:
    import torch
    from safetensors.torch import save

    two = {"a": torch.ones(2, 3), "b": torch.arange(4, dtype=torch.int64), "s": torch.tensor(1.0, dtype=torch.float16)}
    return [save(two, metadata={"format": "pt"}), save({"model.w": torch.zeros(0, 4)}), save({"x": torch.ones(1)})]


def _metadata() -> list[bytes]:
    """Lists of torch.distributed.checkpoint: a whole tensor, one in four pieces, an object, and keys."""
    import torch
    from torch.distributed.checkpoint import filesystem, metadata

    size = torch.Size
    boxes = [(size((0, 0)), size((2, 2))), (size((2, 0)), size((1, 2))), (size((0, 2)), size((3, 1)))]
    kind = metadata.TensorProperties(dtype=torch.bfloat16)
    whole = metadata.TensorStorageMetadata(kind, size((2,)), [metadata.ChunkStorageMetadata(size((0,)), size((2,)))])
    cut = metadata.TensorStorageMetadata(kind, size((3, 3)), [metadata.ChunkStorageMetadata(*box) for box in boxes])
    listed = {"model.a": whole, "model.b": cut, "step": metadata.BytesStorageMetadata()}
    keys = [("model.a", size((0,))), *(("model.b", at) for at, _ in boxes), ("step", None)]
    places = {
        metadata.MetadataIndex(*key): filesystem._StorageInfo("__0_0.distcp", 900 * k, 900)
        for k, key in enumerate(keys)
    }
    paths = {"model.a": ("model", "a"), "model.b": ("model", "b"), "step": ("step",)}
    made = [metadata.Metadata(listed, paths, places), metadata.Metadata(listed, None, places, version="1.0.0")]
    return [pickle.dumps(one, protocol) for one in made for protocol in (2, 4)]


def _data_pkl(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.read(next(name for name in opened.namelist() if name.endswith("/data.pkl")))


@lru_cache(maxsize=1)
def seeds() -> dict[str, list[bytes]]:
    """Real inputs by target. Takes torch and safetensors."""
    archives = [_saved(tree, zipped=True) for tree in _trees()]
    streams = [_saved(tree, zipped=False) for tree in _trees()]
    pickles = [_data_pkl(archive) for archive in archives]
    pickles += [pickle.dumps({"a": [1, (2.5, "x")], b"k": {3}}, protocol) for protocol in range(6)]
    files = _safetensors()
    mappings = [*(TESTS.parent / "mappings").glob("*.yaml"), *(TESTS / "bad_mappings").glob("*.yaml")]
    return {
        "unpickle": pickles,
        "torch_zip": archives,
        "legacy": streams,
        "safetensors": files,
        "mapping": [path.read_bytes() for path in sorted(mappings)],
        "dcp_metadata": _metadata(),
        "inventory": archives + streams + files,
    }


def write(folder: Path) -> Path:
    """Write every seed as ``folder/TARGET/HASH``, and ``folder/words``, the dictionary. Returns the folder."""
    for target, inputs in seeds().items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for data in inputs:
            (folder / target / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in WORDS)
    (folder / "words").write_text("".join(f'"{word}"\n' for word in escaped))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the fuzzers' seed inputs.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(tempfile.gettempdir()) / "mdl-fuzz")
    sys.stdout.write(f"{write(parser.parse_args().folder)}\n")

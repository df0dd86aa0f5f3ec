"""The attack corpus against the readers: nothing runs, nothing hangs, each case ends as it must."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mdl.convert import vet
from mdl.convert.inventory import take_inventory
from mdl.convert.open import open_checkpoint
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.convert.stored import Files
from mdl.convert.tok_char import read_meta
from mdl.convert.whole_tensors import WEIGHT
from mdl.errors import Kind, MdlError

from .attacks import ops
from .attacks.case import MARK, Case, nanogpt, nanogpt_args, zipped
from .attacks.corpus import all_cases
from .attacks.odd import settings

ROOT = Path(__file__).parent.parent
SECONDS = 5.0
CASES = all_cases()


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases opened in one process of limited memory, in a folder of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    command = [sys.executable, "-m", "mdl.tests.attacks.judge", str(folder)]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{lines[-1] if lines else ''}\n{done.stderr[-2000:]}"
    return {"folder": folder, **{line["name"]: line for line in lines if "name" in line}}


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser may read everything")
    path = ops.write(tmp_path / "x.pt", ops.zipped(ops.pickled(ops.table({"w": ops.tensor()}))))
    path.chmod(0)
    for given in (path, tmp_path):
        with pytest.raises(MdlError, match="permissions") as caught:
            open_checkpoint(given)
        assert caught.value.kind is Kind.INPUT


def test_an_unreadable_character_table_hangs_nobody(tmp_path: Path) -> None:
    laughs = b")r\0\0\0\0" + b"".join(
        b"0(j%bj%btr%b" % (n.to_bytes(4, "little"), n.to_bytes(4, "little"), (n + 1).to_bytes(4, "little"))
        for n in range(40)
    )
    path = ops.write(tmp_path / "meta.pkl", b"\x80\x02" + laughs + b"}2j\x28\0\0\0Ns.")
    with pytest.raises(MdlError, match="hang the program"):
        read_meta(path)


def test_norms_in_float64_are_written_as_they_are_and_cast_if_asked(tmp_path: Path) -> None:
    norms = {name: "F64" for name in nanogpt() if "ln_" in name}
    path = ops.write(tmp_path / "x.pt", zipped(nanogpt(), nanogpt_args(), norms))
    for dtype, wanted in ((None, {"F32", "F64"}), ("float32", {"F32"})):
        out = tmp_path / f"out {dtype}"
        options = Options(dtype=dtype)
        convert(prepare(path, options), out, tokenizer="none")
        with (out / "model.safetensors").open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == wanted
        assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("write", [ops.zipped, ops.legacy], ids=["zip", "legacy"])
def test_settings_of_unknown_classes_are_read_and_their_classes_never_called(tmp_path: Path, write: Any) -> None:
    extras = take_inventory(open_checkpoint(ops.write(tmp_path / "x.pt", write(settings())))).extras

    assert extras["args"] == extras["config"] == {"n_layer": 2, "lr": 0.1}  # argparse.Namespace, a dataclass
    assert extras["cfg"] == {"dim": 8}  # omegaconf
    assert extras["kind"] == 3  # an enum
    assert extras["partial"] == "os.system"  # told by its name


def test_a_view_is_read_where_its_strides_say(tmp_path: Path) -> None:
    body = ops.table({"w": ops.tensor("0", (2, 3), stride=(1, 2), offset=1, numel=8)})
    path = ops.write(tmp_path / "x.pt", ops.zipped(ops.pickled(body), {"0": struct.pack("<8f", *range(8))}))
    (info,) = take_inventory(open_checkpoint(path)).tensors["w"]
    with Files() as files:
        assert files.tensor(info).read().tolist() == [[1, 3, 5], [2, 4, 6]]


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_walk_over_whole_tensors_agrees_with_the_one_by_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    import torch

    tensors = {f"h.{n}.w": torch.zeros([2] * (n % 4)) for n in range(400)}
    settings = {"betas": (0.9, 0.95), "again": (0.9, (1, 2)), 0: "0", "1": "a"}
    torch.save({"model": tensors, "args": settings}, tmp_path / "x.pt", pickle_protocol=protocol)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        data = archive.read("x/data.pkl")
    fast = vet._Walk(data, len(data))
    assert fast.run(0) == len(data)
    never = re.compile(rb"(?!)")
    for whole in ("NAMED", "TENSOR", "TENSOR4"):
        monkeypatch.setattr(vet, whole, never)
    slow = vet._Walk(data, len(data))
    assert slow.run(0) == len(data)

    assert fast.stack == slow.stack == [0]
    assert fast.memo.keys() <= slow.memo.keys()
    assert all(fast.memo.get(slot, WEIGHT) >= weight for slot, weight in slow.memo.items())
    assert max(weight for slot, weight in slow.memo.items() if slot not in fast.memo or protocol == 4) <= WEIGHT
    assert (protocol == 4) == (fast.memo.keys() == slow.memo.keys())


def test_the_corpus_is_large_and_nothing_of_it_ran(verdicts: dict[str, Any]) -> None:
    assert len(CASES) >= 200
    assert not list(verdicts["folder"].rglob(MARK))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_case_ends_as_it_must(case: Case, verdicts: dict[str, Any]) -> None:
    found = verdicts[case.name]
    assert found["seconds"] < SECONDS
    assert "MemoryError" not in found.get("message", "")
    if case.refused:
        assert found.get("kind") == "INPUT", found
        assert [phrase for phrase in case.refused if phrase not in found["message"]] == [], found["message"][:500]
    else:
        assert "kind" not in found, found
        assert [name for name in case.tensors if name not in found["tensors"]] == []

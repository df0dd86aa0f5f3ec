"""Folders of torch.distributed.checkpoint, against what torch's own code makes of them, bit for bit."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mdl.archs.base import Inventory
from mdl.convert.export import export
from mdl.convert.finish import choose_tokenizer
from mdl.convert.inventory import take_inventory
from mdl.convert.open import open_checkpoint
from mdl.convert.pieces import Cut, PiecesError, arrange, box_of
from mdl.convert.prepare import Options, prepare
from mdl.convert.run import convert
from mdl.convert.sources import Maps
from mdl.convert.stored import Files
from mdl.errors import Kind, MdlError
from mdl.mappings.lazy import Joined, Lazy

from . import checkpoints as make

FAMILIES = ("nanogpt", "llama")
WAYS = [(2, way) for way in ("rows", "columns", "replicated", "fsdp2")]
WAYS += [(4, way) for way in ("rows", "columns", "replicated", "fsdp2", "grid", "rows twice", "hybrid", "plain")]


def saved(tree: dict[str, Any], folder: Path, **options: Any) -> Path:
    """One process saves, without a group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.save(tree, storage_writer=torch_dcp.FileSystemWriter(folder, **options), no_dist=True)
    return folder


def inventory(path: Path, **more: Any) -> Inventory:
    return take_inventory(open_checkpoint(path), **more)


def refusal(path: Path) -> str:
    with pytest.raises(MdlError) as caught:
        inventory(path)
    assert caught.value.kind is Kind.INPUT
    return str(caught.value)


def one_file(folder: Path, file: Path) -> Any:
    """The same checkpoint as torch's own tool makes one file of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, file)
    return torch.load(file, weights_only=False)


def same_values(found: Inventory, wanted: dict[str, torch.Tensor]) -> None:
    assert found.tensors.keys() == wanted.keys()
    for reader in (Files(), Maps()):
        with reader:
            for name, tensor in wanted.items():
                (info,) = found.tensors[name]
                values = np.ascontiguousarray(reader.tensor(info).read())
                assert (info.shape, info.dtype) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
                assert values.tobytes() == make.bits(tensor), name


def layout(path: Path, out: Path) -> dict[str, torch.Tensor]:
    convert(prepare(path, Options()), out, tokenizer="none")
    return make.saved(out)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives the folder that so many processes wrote; each is written once."""
    written: dict[int, Path] = {}

    def get(family: str, processes: int) -> Path:
        if processes not in written:
            folder = written[processes] = tmp_path_factory.mktemp(f"sharded-{processes}")
            script = Path(__file__).with_name("sharded.py")
            done = subprocess.run(
                [sys.executable, str(script), str(folder), str(processes)],
                capture_output=True, text=True, check=False, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            (folder / "said").write_text(done.stderr)
            # gloo can abort while its processes part; what counts is that each save came to its end, the list
            ends = [(folder / f / way / ".metadata").exists() for f in FAMILIES for n, way in WAYS if n == processes]
            assert all(ends) or not any(ends), done.stderr
        if not (written[processes] / family).exists():
            said = (written[processes] / "said").read_text()[-2000:]
            pytest.skip(f"gloo does not work here, so NO SHARDED FOLDER WAS TESTED: {said}")
        return written[processes] / family

    return get


@pytest.mark.parametrize(("processes", "way"), WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_are_what_torch_makes_of_them(
    family: str, processes: int, way: str, sharded: Any, tmp_path: Path
) -> None:
    folder = sharded(family, processes) / way
    truth = one_file(folder, tmp_path / "whole.pt")
    found = inventory(folder)

    same_values(found, truth["model"])
    assert "optimizer: not touched (training state)" in found.notes
    assert found.extras["iter_num"] == 10
    assert found.extras["model_args"] == truth["model_args"]
    make.same(layout(folder, tmp_path / "sharded"), layout(tmp_path / "whole.pt", tmp_path / "whole"))
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "sharded" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


def test_shards_are_in_pieces_of_uneven_sizes_and_some_ranks_have_none(sharded: Any) -> None:
    tensors = inventory(sharded("nanogpt", 4) / "rows").tensors
    (table,), (position,) = tensors["transformer.wte.weight"], tensors["transformer.wpe.weight"]
    assert [piece.info.shape[0] for piece in table.pieces] == [6, 6, 6, 5]
    assert [piece.info.shape[0] for piece in position.pieces] == [1, 1, 1]
    assert len({piece.info.file for piece in table.pieces}) == 4
    grid = inventory(sharded("nanogpt", 4) / "grid").tensors["transformer.wte.weight"][0]
    assert {piece.at for piece in grid.pieces} == {(0, 0), (0, 5), (12, 0), (12, 5)}


def test_heads_that_a_shard_cuts_in_the_middle_become_rotary_halves(sharded: Any, tmp_path: Path) -> None:
    state = make.llama_state(hidden=18, heads=3, kv_heads=3, ffn=25, vocab=31, dtype=torch.bfloat16)
    make.same(layout(sharded("llama", 4) / "rows", tmp_path / "out"), make.llama_of(state, 3, 3))


def test_a_sharded_checkpoint_is_exported_as_one_file(sharded: Any, tmp_path: Path) -> None:
    folder = sharded("nanogpt", 2) / "fsdp2"
    truth = one_file(folder, tmp_path / "whole.pt")
    layout(folder, tmp_path / "out")
    done = export(tmp_path / "out", tmp_path / "back.pt")

    back = torch.load(tmp_path / "back.pt", weights_only=False)
    make.same(back["model"], truth["model"])
    assert done.files == (str(tmp_path / "back.pt"),)
    assert back["model_args"] == truth["model_args"]


def test_one_process(tmp_path: Path) -> None:
    state = make.nanogpt_state()
    tree = {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "iter_num": 3}
    folder = saved({**tree, "model_args": make.nanogpt_args(state)}, tmp_path / "x")
    (folder / "config.json").write_text('{"seen": 1}')

    checkpoint = open_checkpoint(folder)
    assert (checkpoint.format, checkpoint.path) == ("torch DCP", str(folder))
    assert checkpoint.files == (str(folder / ".metadata"), str(folder / "__0_0.distcp"))
    assert checkpoint.sidecars == {"config": {"seen": 1}}
    same_values(inventory(folder), one_file(folder, tmp_path / "whole.pt")["model"])
    make.same(layout(folder, tmp_path / "out"), make.gpt2_of(state))
    for file in (".metadata", "__0_0.distcp"):
        assert inventory(folder / file).tensors.keys() == state.keys()


def test_several_files_of_one_process(tmp_path: Path) -> None:
    state = make.nanogpt_state(bias=False)
    folder = saved({"model": state}, tmp_path / "x", thread_count=3)
    assert len(open_checkpoint(folder).files) == 4
    same_values(inventory(folder), state)


def test_every_type_and_form_of_a_tensor(tmp_path: Path) -> None:
    state = {f"a.{dtype}": torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)) for dtype in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int8", "uint8", "bool",
        "complex64")}  # fmt: skip
    state |= {"b.none": torch.zeros(0, 4), "b.scalar": torch.tensor(2.5), "b.turned": torch.randn(3, 4).t()}
    state |= {"b.view": torch.randn(8, 8)[2:5, 1:4], "b.parameter": torch.nn.Parameter(torch.randn(2))}
    same_values(inventory(saved({"model": state}, tmp_path / "x")), {k: v.detach() for k, v in state.items()})


def test_flat_names_and_their_optimizer(tmp_path: Path) -> None:
    """torchtitan's: the weights at the top without a prefix, other state under keys or flat names beside them."""
    state = {"tok_embeddings.weight": torch.randn(4, 2), "norm.weight": torch.randn(2)}
    more = {"optimizer": {"state.norm.weight.exp_avg": torch.zeros(2)}, "lr_scheduler": {"step": 3}, "train_state": 7}
    found = inventory(saved({**state, **more}, tmp_path / "titan"))
    same_values(found, state)
    assert found.extras == {"train_state": 7}
    assert {"optimizer: not touched (training state)", "lr_scheduler: not touched (training state)"} <= {*found.notes}

    flat = {f"model.{name}": tensor for name, tensor in state.items()}
    found = inventory(saved({**flat, "optim.state.norm.weight.exp_avg": torch.zeros(2)}, tmp_path / "flat"))
    same_values(found, state)
    assert found.prefixes == ("model.",)
    assert "optim: not touched (training state)" in found.notes


def test_the_optimizer_is_never_opened(tmp_path: Path) -> None:
    """The folder lacks the file that holds it."""
    tree = {"model": {"a.w": torch.ones(2)}, "optimizer": {"m": torch.ones(2)}}
    folder = saved(tree, tmp_path / "x", single_file_per_rank=False)
    (left,) = (file for file in folder.glob("*.distcp") if str(file) not in open_checkpoint(folder).files)
    left.unlink()
    same_values(inventory(folder), tree["model"])


def test_several_sets_of_weights_are_a_question(tmp_path: Path) -> None:
    tree = {"model": {"a.w": torch.ones(2)}, "ema": {"a.w": torch.zeros(2)}}
    folder = saved(tree, tmp_path / "x")
    assert "choose one: --weights model (1 tensors); --weights ema (1 tensors)" in refusal(folder)
    same_values(inventory(folder, weights="ema"), tree["ema"])
    app = saved({"app": {"model": {"a.w": torch.ones(2)}, "optim": {"m": torch.ones(2)}}}, tmp_path / "app")
    assert "--weights app/model (1 tensors)" in refusal(app)
    same_values(inventory(app, weights="app/model"), {"a.w": torch.ones(2)})


def test_a_large_object_is_left_out_with_a_note(tmp_path: Path) -> None:
    tree = {"model": {"a.w": torch.ones(2)}, "log": "x" * (2 << 20), "n": {"k": [1, 2]}}
    found = inventory(saved(tree, tmp_path / "x"))
    assert found.extras == {"n": {"k": [1, 2]}}
    assert any(note.startswith("log: left out, for it has 2,") for note in found.notes)


def test_lightning_puts_settings_into_a_file_beside(tmp_path: Path) -> None:
    folder = saved(
        {"model": {"lm.a.w": torch.ones(2), "lm.b.w": torch.ones(3)}, "optimizer_0": {"x": torch.ones(2)}},
        tmp_path / "x.ckpt",
    )
    torch.save({"hyper_parameters": {"n_layer": 2}, "epoch": 3, "lr_schedulers": []}, folder / "meta.pt")
    found = inventory(folder)
    assert found.extras == {"hyper_parameters": {"n_layer": 2}, "epoch": 3}
    assert found.tensors.keys() == {"a.w", "b.w"}


def test_the_folder_around_one_gives_its_settings(tmp_path: Path) -> None:
    """As trainers save: the weights in a folder of their own, the optimizer in another, settings above both."""
    above = tmp_path / "checkpoint-10"
    saved({"model": {"a.w": torch.ones(2)}}, above / "weights_0")
    saved({"a.w": torch.zeros(2)}, above / "optimizer_0")
    (above / "config.json").write_text('{"seen": 1}')
    (above / "tokenizer.json").write_text("{}")

    for given in (above, above / "weights_0", above / "weights_0/.metadata"):
        found = open_checkpoint(given)
        assert (found.sidecars, found.tokenizers) == ({"config": {"seen": 1}}, (str(above / "tokenizer.json"),))
    assert "the weights are those of the folder weights_0" in open_checkpoint(above).notes
    same_values(inventory(above), {"a.w": torch.ones(2)})

    (above / "weights_0/config.json").write_text('{"seen": 2}')
    assert open_checkpoint(above).sidecars == {"config": {"seen": 2}}
    saved({"model": {"a.w": torch.ones(2)}}, above / "more")
    assert "it has the folders more, optimizer_0, weights_0" in refusal(above)


def test_a_tokenizer_above_needs_no_settings_beside_it(tmp_path: Path) -> None:
    """One in the folder itself comes first; a file has no folder above it."""
    above = tmp_path / "run"
    saved({"model": {"a.w": torch.ones(2)}}, above / "weights")
    (above / "tokenizer.model").write_bytes(b"\n")

    found = open_checkpoint(above / "weights")
    assert found.tokenizers == (str(above / "tokenizer.model"),)
    assert "tokenizer.model, found in the folder above the checkpoint" in str(choose_tokenizer(found, None))
    assert "tokenizer.model, found beside the checkpoint" in str(choose_tokenizer(open_checkpoint(above), None))
    (above / "weights/tokenizer.json").write_text("{}")
    assert open_checkpoint(above / "weights").tokenizers == (str(above / "weights/tokenizer.json"),)
    (above / "deeper").mkdir()
    torch.save({"a.w": torch.ones(2)}, above / "deeper/one.pt")
    assert open_checkpoint(above / "deeper/one.pt").tokenizers == ()


def test_the_folder_above_stops_nothing_and_is_named(tmp_path: Path) -> None:
    """It may hold a broken file, or what belongs to something else in it; what is read from there is said."""
    above = tmp_path / "run"
    saved({"model": {"a.w": torch.ones(2)}}, above / "weights")
    (above / "config.yaml").write_text("a: [")
    (above / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    found = inventory(above / "weights")
    assert found.extras == {}
    (remark,) = found.remarks
    assert remark.startswith("not read, in the folder above (run): config.yaml can't be parsed")

    (above / "params.json").write_text('{"dim": 2}')
    found = inventory(above / "weights")
    assert found.extras == {"params": {"dim": 2}}
    assert found.remarks[0] == "settings are from the folder above: params.json in run"
    (above / "weights/config.yaml").write_text("a: [")
    assert "config.yaml can't be parsed" in refusal(above / "weights")


def test_a_half_copied_folder_says_what_is_missing(tmp_path: Path) -> None:
    folder = saved({"model": make.nanogpt_state()}, tmp_path / "x")
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[:-9])
    assert "the file at" in refusal(folder)
    (folder / "__0_0.distcp").unlink()
    assert "the file '__0_0.distcp' is missing" in refusal(folder)
    (folder / "__0_0.distcp").write_bytes(data)
    (folder / ".metadata").unlink()
    assert "names that begin with a dot" in refusal(folder)


def test_arrange() -> None:
    halves = [box_of((2, 0), (2, 3)), box_of((0, 0), (2, 3))]
    assert arrange((4, 3), halves) == Cut(0, (1, 0))
    assert arrange((), [box_of((), ())]) == 0
    with pytest.raises(PiecesError, match="missing"):
        arrange((), [])
    with pytest.raises(PiecesError, match="overlap"):
        arrange((), [box_of((), ())] * 2)


def test_records_with_equal_pickles_are_read_where_they_lie(tmp_path: Path) -> None:
    """Also where a later one has no room for its storage, and where one process has more files than descriptors."""
    state = {f"h.{k}.w": torch.full((3, 2), float(k)) for k in range(30)}
    folder = saved({"model": state}, tmp_path / "x", single_file_per_rank=False)
    assert len(list(folder.glob("*.distcp"))) == 30
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 9, limits[1]))
    try:
        same_values(inventory(folder), state)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    file = Path(inventory(folder).tensors["h.9.w"][0].file)
    data = file.read_bytes()
    at = data.rindex(b"archive/data/0") - 46 + 20  # of the directory's entry: the sizes
    file.write_bytes(data[:at] + bytes([20, 0, 0, 0, 20, 0, 0, 0]) + data[at + 8 :])
    assert "model.h.9.w: storage 0 has 20 bytes in the archive, but 24 by its description" in refusal(folder)


def test_a_split_across_a_boundary_copies_the_block_with_the_boundary_alone() -> None:
    whole = np.arange(48.0, dtype=np.float32).reshape(12, 4)
    above, below = Lazy.of(whole[:6], "float32"), Lazy.of(whole[6:], "float32")
    split = above.concat([below], 0).unflatten(0, (3, 4))
    assert np.array_equal(split.read(), whole.reshape(3, 4, 4))
    assert isinstance(split.node, Joined)
    views = [np.shares_memory(part.read(), whole) for part in split.node.parts]
    assert views == [True, False, True]
    assert np.array_equal(split.transpose(1, 0, 2).slice(0, 1, 3).read(), whole.reshape(3, 4, 4).swapaxes(0, 1)[1:3])

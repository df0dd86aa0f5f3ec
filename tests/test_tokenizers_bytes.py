"""Byte-level tokenizers (tiktoken rank files, GPT-2's two files): written, loaded, and held to tiktoken's ids."""

from __future__ import annotations

import base64
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mdl.convert import tok_gpt2, tok_schemes, tok_tiktoken
from mdl.convert.tok_base import byte_letters, unspell
from mdl.convert.tok_texts import random_texts
from mdl.convert.tokenizer import check_tokenizer
from mdl.errors import Kind, MdlError

from .tokens import ids, write

TEXT = "the whale swam under a quiet sea and that white whale sank the ship while sailors sang aloud"


def corpus() -> list[str]:
    rng = random.Random(3)  # noqa: S311 - a corpus, not a secret
    words = TEXT.split()
    return [" ".join(rng.choice(words) for _ in range(rng.randint(3, 12))) for _ in range(400)]


# tiktoken ranks


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    """Bytes in order, then merges learnt from a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=list(byte_letters()), show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {unspell(text): i for text, i in by_id}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    return path


@pytest.mark.parametrize(
    ("params", "name_of_5", "pad"),
    [(None, "step_id", 4), ({"use_scaled_rope": True}, "step_id", 4), ({"dim": 1}, "reserved_special_token_3", None)],
)
def test_llama3_ranks(
    params: dict[str, Any] | None, name_of_5: str, pad: int | None, ranks: dict[bytes, int], tmp_path: Path
) -> None:
    source = write_ranks(tmp_path / "tokenizer.model", ranks)
    if params is not None:
        (tmp_path / "params.json").write_text(json.dumps(params))
    n, out = len(ranks), tmp_path / "out"
    info = write(tmp_path, out, n + 256)
    assert (info.kind, info.vocab_size, info.bos, info.eos) == ("tiktoken", n + 256, n, n + 1)
    assert info.pad == (None if pad is None else n + pad)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.id_to_token(n + 5) == f"<|{name_of_5}|>"
    assert [tokenizer.id_to_token(n + i) for i in (6, 7, 9)] == [
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    assert tokenizer.encode("<|eot_id|>\n\nthe").ids[:2] == [n, n + 9]
    assert len({tokenizer.id_to_token(n + i) for i in range(256)}) == 256
    assert check_tokenizer(out, source) == []


def test_ranks_agree_with_tiktoken_on_the_written_file(ranks: dict[bytes, int], tmp_path: Path) -> None:
    source = write_ranks(tmp_path / "tokenizer.model", ranks)
    write(source, tmp_path / "out", len(ranks) + 256)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    scheme = tok_tiktoken.find_scheme(source, ranks, len(ranks) + 256)
    truth = tiktoken.Encoding("tiny", pat_str=scheme.cut, mergeable_ranks=ranks, special_tokens=dict(scheme.specials))
    for text in random_texts(tokenizer, 100, 5):
        assert tokenizer.encode(text, add_special_tokens=False).ids == truth.encode(text, allowed_special="all")
        pieces = [text.encode()] if len(text) < 30 else []
        assert all(tok_tiktoken.encode(ranks, p) == truth._encode_single_piece(p) for p in pieces)


def test_the_check_of_ranks_needs_no_tiktoken(
    ranks: dict[bytes, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_ranks(tmp_path / "tokenizer.model", ranks)
    write(source, tmp_path / "out", len(ranks) + 256)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert check_tokenizer(tmp_path / "out", source, samples=100) == []


def test_other_ranks_need_their_scheme_beside_them(ranks: dict[bytes, int], tmp_path: Path) -> None:
    source = write_ranks(tmp_path / "own.tiktoken", ranks)
    with pytest.raises(MdlError, match=r"own\.tiktoken\.json beside"):
        write(source, tmp_path / "out", 600)
    scheme = {
        "pat_str": r"\p{N}{1,2}| ?\p{L}++|\s+|[^\s\p{L}\p{N}]+",
        "special_tokens": {"<|bos|>": 500},
        "bos": "<|bos|>",
    }
    beside = tmp_path / "own.tiktoken.json"
    beside.write_text(json.dumps(scheme))
    info = write(source, tmp_path / "out", 600)
    assert (info.vocab_size, info.bos, info.eos) == (501, 500, None)
    assert any("ids below 500 have no token" in note for note in info.notes)
    assert check_tokenizer(tmp_path / "out", source) == []
    beside.write_text(json.dumps({**scheme, "pat_str": r"\p{N}{1,3}+| ?\p{L}++|[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s"}))
    write(source, tmp_path / "tiktokens", 600)
    assert check_tokenizer(tmp_path / "tiktokens", source, samples=2000) == []
    beside.write_text(json.dumps({**scheme, "pat_str": r"(?:\p{N}){1,3}+|."}))
    with pytest.raises(MdlError, match="repeats a group possessively"):
        write(source, tmp_path / "out", 600)
    beside.write_text(json.dumps({**scheme, "pat_str": r"\p{Nonsense}+"}))
    with pytest.raises(MdlError, match="can't read"):
        write(source, tmp_path / "out", 600)
    beside.write_text(json.dumps({**scheme, "special_tokens": {"<|bos|>": 5}}))
    with pytest.raises(MdlError, match="share ids"):
        write(source, tmp_path / "out", 600)


@pytest.mark.parametrize(
    ("lines", "words"),
    [(b"YQ== 0\nYQ== 1\n", "listed before"), (b"YQ== 0\n%% 1\n", "no rank file"), (b"YQ== 0\n", "255 of the 256")],
)
def test_broken_rank_files_are_refused(lines: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(lines)
    with pytest.raises(MdlError, match=words):
        write(tmp_path, tmp_path / "out", 600)


# GPT-2's two files


@pytest.fixture
def gpt2_files(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=350, initial_alphabet=list(byte_letters()), show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    directory = tmp_path / "gpt2files"
    directory.mkdir()
    tokenizer.model.save(str(directory))
    vocab = json.loads((directory / "vocab.json").read_text())
    (directory / "vocab.json").write_text(json.dumps({**vocab, tok_gpt2.END: len(vocab)}))
    return directory


def test_gpt2_files(gpt2_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    info = write(gpt2_files, out, 384)
    vocab = json.loads((gpt2_files / "vocab.json").read_text())
    end = vocab[tok_gpt2.END]
    assert (info.kind, info.vocab_size, info.bos, info.eos) == ("gpt2", end + 1, end, end)
    ranks = {unspell(t): i for t, i in vocab.items() if t != tok_gpt2.END}
    truth = tiktoken.Encoding(
        "tiny", pat_str=tok_schemes.GPT2_CUT, mergeable_ranks=ranks, special_tokens={tok_gpt2.END: end}
    )
    for text in [
        *random_texts(Tokenizer.from_file(str(out / "tokenizer.json")), 100, 1),
        "a<|endoftext|>b",
        " \n\n x ",
    ]:
        assert ids(out, text) == truth.encode(text, allowed_special="all")
    assert check_tokenizer(out, gpt2_files) == []


def test_half_a_pair_is_refused(gpt2_files: Path, tmp_path: Path) -> None:
    (gpt2_files / "merges.txt").unlink()
    with pytest.raises(MdlError, match=r"vocab\.json needs merges\.txt"):
        write(gpt2_files / "vocab.json", tmp_path / "out", 384)


def test_merges_of_another_model_are_refused(gpt2_files: Path, tmp_path: Path) -> None:
    with (gpt2_files / "merges.txt").open("a") as file:
        file.write("zq zq\n")
    with pytest.raises(MdlError, match="different models"):
        write(gpt2_files, tmp_path / "out", 384)


def test_the_name_gpt2_uses_what_lies_on_the_machine(
    gpt2_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tik"))
    with pytest.raises(MdlError, match=r"vocab\.json and merges\.txt") as caught:
        write("gpt2", tmp_path / "out", 384)
    assert caught.value.kind is Kind.MACHINE
    shutil.copytree(gpt2_files, tmp_path / "hub" / "models--gpt2" / "snapshots" / "abc")
    assert write("gpt2", tmp_path / "out", 384).kind == "gpt2"


def test_check_sees_a_lost_merge(ranks: dict[bytes, int], tmp_path: Path) -> None:
    source = write_ranks(tmp_path / "tokenizer.model", ranks)
    write(source, tmp_path / "out", len(ranks) + 256)
    file = tmp_path / "out" / "tokenizer.json"
    state = json.loads(file.read_text())
    state["model"]["merges"] = state["model"]["merges"][1:]
    file.write_text(json.dumps(state))
    assert any("other ids" in problem.what for problem in check_tokenizer(tmp_path / "out", source))

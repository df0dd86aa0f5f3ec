"""Character tables, SentencePiece models and ready files: written, loaded, and held to the source's own ids."""

from __future__ import annotations

import io
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from mdl.convert import tok_find
from mdl.convert.tok_spm_proto import CONTROL, USER_DEFINED, read_model
from mdl.convert.tokenizer import check_tokenizer, find_beside, write_tokenizer
from mdl.errors import Kind, MdlError

from .tokens import ids, write

TEXT = "the whale swam under a quiet sea and that white whale sank the ship while sailors sang aloud"


def corpus() -> list[str]:
    rng = random.Random(3)  # noqa: S311 - a corpus, not a secret
    words = TEXT.split()
    return [" ".join(rng.choice(words) for _ in range(rng.randint(3, 12))) for _ in range(400)]


def settings(layout: Path) -> dict[str, Any]:
    return json.loads((layout / "tokenizer_config.json").read_text())


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


# characters


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    chars = sorted(set("\n !abcdefgh,.é日▁😀"))
    table = {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {c: i for i, c in enumerate(chars)},
    }
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(table))
    return path


def test_characters_encode_as_their_table(meta: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    info = write(meta, out, 20)
    stoi = pickle.loads(meta.read_bytes())["stoi"]
    assert (info.kind, info.vocab_size, info.bos, info.eos) == ("characters", len(stoi), None, None)
    text = "  a bad\n\n cafe, é日😀▁"
    text = "".join(c for c in text if c in stoi)
    assert ids(out, text) == [stoi[c] for c in text]
    assert settings(out)["model_max_length"] == 64
    assert any(f"{20 - len(stoi)} rows of the embedding" in note for note in info.notes)
    assert check_tokenizer(out, meta) == []


def test_an_unknown_character_is_refused_and_not_skipped(meta: Path, tmp_path: Path) -> None:
    write(meta, tmp_path / "out", 20)
    with pytest.raises(Exception, match="UNK"):
        ids(tmp_path / "out", "abZ")


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil-was-here"),))


def test_a_pickle_that_names_code_is_refused_unrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({"stoi": Evil()}))
    with pytest.raises(MdlError, match="only plain values are read") as caught:
        write(path, tmp_path / "out", 10)
    assert caught.value.kind is Kind.INPUT
    assert str(path) in str(caught.value)
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"stoi": {"a": 0}, "itos": {0: "b"}}, "not the inverse"),
        ({"stoi": {"a": 0, "b": 0}, "itos": {0: "b"}}, "not the inverse"),
        ({"stoi": {"a": 0, "b": 1}, "itos": {0: "a", 1: "b"}, "vocab_size": 1}, "does not cover"),
        ({"stoi": {"a": "0"}, "itos": {0: "a"}}, "not a text to an id"),
        ({"stoi": {"\ud83d": 0}, "itos": {0: "\ud83d"}}, "surrogate"),
        ({"stoi": {}, "itos": {}}, "does not cover"),
        ({"itos": {}}, "no table 'stoi'"),
        ([1, 2], "not a dict"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, table: object, words: str) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(table))
    with pytest.raises(MdlError, match=words):
        write(path, tmp_path / "out", 10)


def test_a_truncated_pickle_is_refused(meta: Path, tmp_path: Path) -> None:
    meta.write_bytes(meta.read_bytes()[:20])
    with pytest.raises(MdlError, match="no readable pickle"):
        write(meta, tmp_path / "out", 20)


# SentencePiece


def train(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, **{**settings, **options}
    )
    path.write_bytes(model.getvalue())
    return path


SPM_TRAITS: dict[str, dict[str, Any]] = {
    "bpe": {},
    "bpe_without_prefix": {"add_dummy_prefix": False},
    "bpe_without_bytes": {"byte_fallback": False, "vocab_size": 120},
    "bpe_squeezing_spaces": {"remove_extra_whitespaces": True},
    "bpe_nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "bpe_user_pieces": {"user_defined_symbols": ["[ONE]", "whi", "  ", "▁▁▁", "\n"]},
    "bpe_user_pieces_without_prefix": {"user_defined_symbols": ["[ONE]", "whi", "\n\n"], "add_dummy_prefix": False},
    "unigram": {"model_type": "unigram", "vocab_size": 330},
    "unigram_without_prefix": {"model_type": "unigram", "vocab_size": 330, "add_dummy_prefix": False},
    "unigram_trainer_defaults": {
        "model_type": "unigram",
        "vocab_size": 60,
        "byte_fallback": False,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
}


@pytest.mark.parametrize("trait", SPM_TRAITS)
def test_sentencepiece_gives_the_ids_of_sentencepiece(trait: str, tmp_path: Path) -> None:
    source = train(tmp_path / "tokenizer.model", **SPM_TRAITS[trait])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(source))
    out = tmp_path / "out"
    info = write(source, out, 512)
    assert (info.kind, info.bos, info.eos, info.pad) == ("sentencepiece", 1, 2, None)
    assert info.vocab_size == processor.vocab_size()
    assert ids(out, "the whale")[0] == 1
    assert ids(out, "the whale")[1:] == processor.encode("the whale")
    assert check_tokenizer(out, source) == []
    assert check_tokenizer(out, None) == []


def test_control_pieces_in_text_are_read_as_control_pieces(tmp_path: Path) -> None:
    source = train(tmp_path / "tokenizer.model", control_symbols=["<turn>"], pad_id=3)
    info = write(source, tmp_path / "out", 512)
    turn = read_model(source).texts(CONTROL).index("<turn>")
    assert info.pad == 3
    assert settings(tmp_path / "out").items() >= {"pad_token": "<pad>", "eos_token": "</s>"}.items()
    encoded = ids(tmp_path / "out", "the</s>ship")
    assert encoded[0] == 1
    assert 2 in encoded
    assert turn > 0


def test_our_reader_of_the_model_agrees_with_sentencepiece(tmp_path: Path) -> None:
    source = train(tmp_path / "tokenizer.model", user_defined_symbols=["[ONE]"])
    model = read_model(source)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(source))
    assert [p.text for p in model.pieces] == [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    assert [p.score for p in model.pieces] == [processor.get_score(i) for i in range(processor.vocab_size())]
    assert model.texts(USER_DEFINED) == ["[ONE]"]
    assert (model.dummy_prefix, model.squeeze, model.byte_fallback, model.charsmap) == (True, False, True, b"")


@pytest.mark.parametrize("options", [{"model_type": "char"}, {"treat_whitespace_as_suffix": True}])
def test_what_cannot_be_expressed_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    source = train(tmp_path / "tokenizer.model", **options)
    with pytest.raises(MdlError, match="same ids"):
        write(source, tmp_path / "out", 512)


@pytest.mark.parametrize(
    "data", [b"\n", b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\n\x05abc", b"\n\x01a\x13"]
)
def test_a_broken_model_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(MdlError, match="no SentencePiece model"):
        write(tmp_path, tmp_path / "out", 512)


# an existing tokenizer.json


@pytest.fixture
def ready(meta: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "ready"
    write_tokenizer(train(tmp_path / "spm.model"), directory, model_vocab=512, context=None)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": {"content": "<s>"}, "auto_map": {"a": "b"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def test_a_tokenizer_json_is_copied_and_its_class_is_not(ready: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    info = write(ready, out, 512, context=None)
    assert info.kind == "tokenizer.json"
    assert (info.bos, info.eos) == (1, 2)
    assert set(info.files) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    assert all((out / name).is_file() for name in info.files)
    assert (out / "tokenizer.json").read_bytes() == (ready / "tokenizer.json").read_bytes()
    assert settings(out)["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in settings(out)
    assert "model_max_length" not in settings(out)
    assert any("LlamaTokenizer becomes" in note for note in info.notes)
    assert check_tokenizer(out, ready) == []


def test_a_special_token_that_the_file_lacks_is_refused(ready: Path, tmp_path: Path) -> None:
    (ready / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    with pytest.raises(MdlError, match=r"no eos_token '<\|im_end\|>'"):
        write(ready, tmp_path / "out", 512)


# finding


def test_none_writes_nothing(tmp_path: Path) -> None:
    info = write_tokenizer("none", tmp_path / "out", model_vocab=5, context=None)
    assert (info.kind, info.files, info.vocab_size) == ("none", (), 0)
    assert check_tokenizer(tmp_path / "out", "none") == []


def test_a_tokenizer_larger_than_the_model_is_refused(meta: Path, tmp_path: Path) -> None:
    with pytest.raises(MdlError, match="the model has 5 rows") as caught:
        write_tokenizer(meta, tmp_path / "out", model_vocab=5, context=None)
    assert caught.value.kind is Kind.INPUT
    assert not (tmp_path / "out").exists()


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.model").write_bytes(b"PK\x03\x04")
    for source in (tmp_path, tmp_path / "weights.model", tmp_path / "absent"):
        with pytest.raises(MdlError, match="--tokenizer PATH"):
            tok_find.find_source(source)
    assert find_beside(tmp_path / "ckpt.pt") is None


def test_two_tokenizers_are_not_chosen_between(meta: Path) -> None:
    found = find_beside(meta.parent / "ckpt.pt")
    assert found is not None
    assert found.files == (meta,)
    (meta.parent / "tokenizer.model").write_bytes(b"YQ== 0\n")
    with pytest.raises(MdlError, match=r"meta\.pkl, tokenizer\.model"):
        tok_find.find_source(meta.parent)


def test_transformers_loads_what_was_written(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    write(train(tmp_path / "tokenizer.model"), tmp_path / "out", 512)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    for text in ["  the whale", "a  ship\n"]:
        assert loaded.encode(text) == ids(tmp_path / "out", text)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.model_max_length) == (1, 2, 64)


# the check must be able to fail

METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
"""How transformers' own conversion marks spaces: wrong for texts that begin with a space."""


@pytest.fixture
def spm_layout(tmp_path: Path) -> tuple[Path, Path]:
    source = train(tmp_path / "tokenizer.model")
    write(source, tmp_path / "out", 512)
    return source, tmp_path / "out"


def test_check_sees_a_broken_file(spm_layout: tuple[Path, Path]) -> None:
    source, out = spm_layout
    (out / "tokenizer.json").write_text("{")
    assert "can't be loaded" in check_tokenizer(out, source)[0].what


def test_check_sees_a_rebuilding_class(spm_layout: tuple[Path, Path]) -> None:
    source, out = spm_layout
    edit(out / "tokenizer_config.json", "PreTrainedTokenizerFast", "LlamaTokenizer")
    assert "may rebuild" in check_tokenizer(out, source)[0].what


def test_check_sees_a_special_token_that_is_none(spm_layout: tuple[Path, Path]) -> None:
    source, out = spm_layout
    edit(out / "tokenizer_config.json", '"</s>"', '"<|eot|>"')
    assert "eos_token '<|eot|>' is no token" in check_tokenizer(out, source)[0].what


def test_check_sees_a_model_with_too_few_rows(spm_layout: tuple[Path, Path]) -> None:
    source, out = spm_layout
    (out / "config.json").write_text('{"vocab_size": 300}')
    assert "config.json's vocab_size is 300" in check_tokenizer(out, source)[0].what


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}, "other ids"),
        ({"normalizer": None, "pre_tokenizer": METASPACE}, "other ids"),
        ({"decoder": {"type": "Fuse"}}, "do not come back"),
    ],
)
def test_check_sees_a_changed_part(spm_layout: tuple[Path, Path], parts: dict[str, object], words: str) -> None:
    source, out = spm_layout
    state = json.loads((out / "tokenizer.json").read_text())
    state.update(parts)
    (out / "tokenizer.json").write_text(json.dumps(state))
    assert any(words in problem.what for problem in check_tokenizer(out, source))


def test_check_sees_swapped_characters(meta: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(meta, out, 20)
    state = json.loads((out / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (out / "tokenizer.json").write_text(json.dumps(state))
    assert any("other ids" in problem.what for problem in check_tokenizer(out, meta))


def test_check_sees_a_changed_copy(ready: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(ready, out, 512)
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text() + " ")
    assert "should be a copy" in check_tokenizer(out, ready)[0].what

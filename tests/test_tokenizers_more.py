"""tekken.json, nanochat's pickle, o200k and Llama 4, tokens that are bytes: held to their sources on 10,000 texts."""

from __future__ import annotations

import base64
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mdl.convert import tok_schemes, tok_tekken, tok_tiktoken, tok_truth
from mdl.convert.tok_base import byte_letters, unspell
from mdl.convert.tok_check import SAMPLES, examine_tokenizer
from mdl.convert.tok_texts import random_texts
from mdl.convert.tokenizer import check_tokenizer, write_tokenizer
from mdl.errors import Kind, MdlError

from .tokens import ids, write

WORDS = "the whale's sank 1234 SHIPS and 'LL don't while sailors sang aloud, été Ночь 日本語"

NANOCHAT_CUT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
NANOCHAT = ["bos", "user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end",
            "output_start", "output_end"]  # fmt: skip


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    """The bytes in order, as tiktoken's and Mistral's files have them, then merges learnt from a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=460, initial_alphabet=list(byte_letters()), show_progress=False)
    tokenizer.train_from_iterator([WORDS, *WORDS.split(), WORDS.upper()] * 20, trainer)
    learnt = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for text, _ in learnt if len(token := unspell(text)) > 1]
    return {token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), *tokens])}


# tekken


def tekken_file(path: Path, ranks: dict[bytes, int], *, version: str = "v3", **more: Any) -> Path:
    vocab = [{"rank": r, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for t, r in ranks.items()]
    config = {
        "pattern": tok_schemes.O200K_CUT,
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(vocab) - 10 + 30,
        "default_num_special_tokens": 30,
        "version": version,
    }
    path.write_text(json.dumps({"config": config, "vocab": vocab, **more}))
    return path


def test_tekken_shifts_ids_and_counts_the_first_ranks_only(ranks: dict[bytes, int], tmp_path: Path) -> None:
    source = tekken_file(tmp_path / "tekken.json", ranks)
    out, rows = tmp_path / "out", len(ranks) - 10 + 30
    info = write(tmp_path, out, rows)
    assert (info.kind, info.vocab_size, info.bos, info.eos, info.pad) == ("tekken", rows, 1, 2, 11)
    assert ids(out, "A[INST]</s>") == [1, ord("A") + 30, 3, 2]
    assert any(f"the first {len(ranks) - 10} count" in note for note in info.notes)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings.items() >= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}.items()
    assert not (out / "tekken.json").exists()  # vLLM would take it in place of tokenizer.json
    assert check_tokenizer(out, source, samples=2000) == []


def test_a_listed_special_token_goes_before_the_unlisted_ones(ranks: dict[bytes, int], tmp_path: Path) -> None:
    listed = [
        {"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(("<unk>", "<s>", "</s>", "[THINK]"))
    ]
    source = tekken_file(tmp_path / "tekken.json", ranks, version="v13", special_tokens=listed)
    info = write(source, tmp_path / "out", 1000)
    assert (info.bos, info.eos, info.pad) == (1, 2, None)
    assert ids(tmp_path / "out", "[THINK]<SPECIAL_29>") == [1, 3, 29]
    assert examine_tokenizer(tmp_path / "out", source, samples=1000).problems == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "v11"}, "lists its special tokens"),
        ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, "out of order"),
        ({"special_tokens": [{"rank": 0, "token_str": "a"}, {"rank": 1, "token_str": "a"}]}, "listed twice"),
        ({"vocab": []}, "lists 0 tokens"),
        ({"vocab": [{"rank": 0, "token_bytes": "YQ=="}] * 1000}, "out of order"),
        ({"config": {}}, "no tekken file"),
    ],
)
def test_broken_tekken_files_are_refused(
    change: dict[str, Any], words: str, ranks: dict[bytes, int], tmp_path: Path
) -> None:
    source = tekken_file(tmp_path / "tekken.json", ranks, **change)
    with pytest.raises(MdlError, match=words) as caught:
        tok_tekken.build(source)
    assert caught.value.kind is Kind.INPUT


def mistral_files() -> Path:
    package = pytest.importorskip("mistral_common", reason="Mistral's own tokenizers: pip install mistral_common")
    return Path(package.__file__).parent / "data"


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("mistral_instruct_tokenizer_240323.model.v3", 32_768),
        ("tekken_240911.json", 131_072),
    ],
)
def test_mistrals_own_files_give_the_ids_of_mistrals_own_code(name: str, rows: int, tmp_path: Path) -> None:
    source = mistral_files() / name
    write(source, tmp_path, rows)
    checked = examine_tokenizer(tmp_path, source)
    assert checked.problems == []
    (note,) = checked.notes
    assert f"{SAMPLES:,} random texts" in note
    assert ("mistral_common" if "tekken" in name else "sentencepiece") in note


def test_runs_of_spaces_of_one_score_are_merged_from_the_left(tmp_path: Path) -> None:
    """Mistral's and Llama 2's pieces of 2 to 16 spaces all have one score; a run of 17 shows who grows first."""
    import sentencepiece

    source = mistral_files() / "tokenizer.model.v1"
    write(source, tmp_path, 32_000)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(source))
    written = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [f"a{' ' * n}b\n{' ' * (n // 2)}" for n in range(120)]:
        assert written.encode(text).ids[1:] == truth.encode(text)


# tiktoken's own schemes


def test_published_schemes_are_tiktokens(ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Special tokens as tiktoken defines them, and text cut in the same places, on a small table of ranks."""
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, expected_hash: {**ranks, b"": expected_hash})
    ours = {**tok_schemes.PUBLISHED, "harmony": tok_schemes.harmony()}
    seen = set[str]()
    for name in ("r50k_base", "p50k_base", "cl100k_base", "o200k_base", "o200k_harmony"):
        theirs = openai_public.ENCODING_CONSTRUCTORS[name]()
        digest = theirs["mergeable_ranks"].pop(b"")
        scheme = ours["harmony" if name == "o200k_harmony" else digest]
        seen.add(scheme.title)
        twice = {"<|reserved_200018|>"} if name == "o200k_harmony" else set()  # a second name of <|endofprompt|>
        assert {t: i for t, i in theirs["special_tokens"].items() if t not in twice} == scheme.specials
        truth = tiktoken.Encoding(name, pat_str=theirs["pat_str"], mergeable_ranks=ranks, special_tokens={})
        for cut in (scheme.cut, tok_schemes.for_oniguruma(theirs["pat_str"], "")):
            built = tok_tiktoken.byte_level(ranks, cut, {})
            for text in random_texts(built, 1000, 7):
                assert built.encode(text).ids == truth.encode_ordinary(text)
    assert len(seen) == 5


def test_llama4(ranks: dict[bytes, int], tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.model"
    source.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    n, out = len(ranks), tmp_path / "out"
    info = write(source, out, n + 2048)
    names = tok_schemes.llama4_names()
    assert len(set(names)) == len(names) == 2048
    # 200000 ranks in the released file: the ids of its special tokens, as Meta's code and the released config have them
    released = {"begin_of_text": 0, "end_of_text": 1, "header_start": 5, "eom": 7, "eot": 8, "finetune_right_pad": 18}
    released |= {"image_start": 80, "image": 90, "patch": 92, "vision_reserved_special_token_1047": 1133}
    assert all(names[i] == f"<|{name}|>" for name, i in released.items())
    assert (info.bos, info.eos, info.pad) == (n, n + 1, n + 18)
    assert ids(out, "<|eot|>") == [n, n + 8]
    assert check_tokenizer(out, source, samples=2000) == []


# nanochat


def nanochat_file(path: Path, ranks: dict[bytes, int], names: list[str]) -> tuple[Path, tiktoken.Encoding]:
    specials = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
    encoding = tiktoken.Encoding("rustbpe", pat_str=NANOCHAT_CUT, mergeable_ranks=ranks, special_tokens=specials)
    path.write_bytes(pickle.dumps(encoding))
    return path, encoding


def test_nanochats_pickle_is_read_and_not_run(
    ranks: dict[bytes, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, truth = nanochat_file(tmp_path / "tokenizer.pkl", ranks, NANOCHAT)
    out, n = tmp_path / "out", len(ranks)
    with monkeypatch.context() as patch:
        patch.setattr(tiktoken.Encoding, "__setstate__", lambda *_: pytest.fail("tiktoken's code was run"))
        info = write(tmp_path, out, n + 16)
    assert (info.kind, info.bos, info.eos, info.stops) == ("tiktoken-pickle", n, n + 4, (n + 4, n))
    text = "the whale's 12345 ships\r\n\r\n'LL  sank"
    assert ids(out, text) == [n, *truth.encode_ordinary(text)]
    assert ids(out, "<|user_start|>hi") == [n, n + 1, *truth.encode_ordinary("hi")]
    assert examine_tokenizer(out, source).problems == []


def test_generation_stops_where_nanochats_engine_stops(ranks: dict[bytes, int], tmp_path: Path) -> None:
    from mdl.convert.config import write_configs

    source, _ = nanochat_file(tmp_path / "tokenizer.pkl", ranks, NANOCHAT)
    info = write_tokenizer(source, tmp_path / "out", model_vocab=1000, context=None)
    config = {"architectures": ["X"], "model_type": "x", "vocab_size": 1000, "tie_word_embeddings": False}
    write_configs(tmp_path / "out", config, info)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [len(ranks) + 4, len(ranks)]
    write_configs(tmp_path / "out", config, info, {"eos_token_id": 7})  # what came with the checkpoint knows better
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 7


def test_another_encoding_has_no_end_of_its_own(ranks: dict[bytes, int], tmp_path: Path) -> None:
    source, _ = nanochat_file(tmp_path / "tokenizer.pkl", ranks, ["start", "stop"])
    info = write(source, tmp_path / "out", 1000)
    assert (info.bos, info.eos, info.stops) == (None, None, ())
    assert any("does not say which special tokens" in note for note in info.notes)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil-was-here"),))


def test_wrong_pickles_are_refused(ranks: dict[bytes, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tokenizer.pkl"
    _, encoding = nanochat_file(path, ranks, NANOCHAT)
    state = encoding.__getstate__()

    def pickled(state: object) -> bytes:
        made = object.__new__(tiktoken.Encoding)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiktoken.Encoding, "__getstate__", lambda _: state)
            return pickle.dumps(made)

    for wrong, words in [
        ("gpt2", "only the name of a published encoding"),
        ({**state, "mergeable_ranks": {b"a": 1}}, "lacks 255 of the 256"),
        ({**state, "mergeable_ranks": {**ranks, b"zz": "1"}}, "no byte string with an id"),
        ({**state, "special_tokens": {"<|a|>": 3}}, "one id to several"),
        ({**state, "special_tokens": Evil()}, "would run code"),
        ({"name": "x"}, "no tiktoken.Encoding"),
    ]:
        path.write_bytes(pickled(wrong))
        with pytest.raises(MdlError, match=words):
            write(path, tmp_path / "out", 1000)
    assert not (tmp_path / "evil-was-here").exists()


# bytes


def test_every_byte_is_a_token(tmp_path: Path) -> None:
    info = write("bytes:bos=256,eos=257", tmp_path, 258)
    assert (info.kind, info.source, info.bos, info.eos) == ("bytes", "bytes:bos=256,eos=257", 256, 257)
    assert ids(tmp_path, "été\0😀") == [256, *"été\0😀".encode()]
    assert examine_tokenizer(tmp_path, info.source).problems == []


def test_bytes_alone_have_no_special_tokens_and_say_so(tmp_path: Path) -> None:
    info = write("bytes", tmp_path, 258)
    assert (info.vocab_size, info.bos, info.eos) == (256, None, None)
    assert any("2 rows are no byte" in note for note in info.notes)
    assert ids(tmp_path, "ab") == [97, 98]
    assert ids_of_offset(tmp_path) == [100, 101]


def ids_of_offset(folder: Path) -> list[int]:
    write("bytes:offset=3,pad=0,eos=1", folder / "byt5", 259)
    return ids(folder / "byt5", "ab")


@pytest.mark.parametrize("said", ["bytes:eos", "bytes:eos=-1", "bytes:end=3", "bytes:eos=97", "bytes:eos=256,bos=256"])
def test_what_cannot_be_read_is_refused(said: str, tmp_path: Path) -> None:
    with pytest.raises(MdlError, match="--tokenizer bytes") as caught:
        write(said, tmp_path, 300)
    assert caught.value.kind is Kind.USAGE


# the check must be able to fail, and says what it compared with


def sabotaged(layout: Path, change: Any) -> None:
    file = layout / "tokenizer.json"
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))


def one_token_unmerged(state: dict[str, Any]) -> None:
    model = state["model"]
    lost = "".join(model["merges"][0])
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) != lost]


def other_digits(state: dict[str, Any]) -> None:
    pattern = state["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    assert r"\p{N}{1,2}" in pattern["Regex"]
    pattern["Regex"] = pattern["Regex"].replace(r"\p{N}{1,2}", r"\p{N}{1,3}")


def special_unparsed(state: dict[str, Any]) -> None:
    state["added_tokens"] = state["added_tokens"][:-1]


@pytest.mark.parametrize("change", [one_token_unmerged, other_digits, special_unparsed])
@pytest.mark.parametrize("installed", [True, False])
def test_check_sees_a_changed_file(
    change: Any, installed: bool, ranks: dict[bytes, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = nanochat_file(tmp_path / "tokenizer.pkl", ranks, NANOCHAT)
    out = tmp_path / "out"
    write(source, out, 1000)
    if not installed:
        monkeypatch.setitem(sys.modules, "tiktoken", None)
    whole = examine_tokenizer(out, source, samples=2000)
    assert whole.problems == []
    assert ("tiktoken is not installed" in whole.notes[0]) is not installed
    sabotaged(out, change)
    assert any("other ids" in problem.what for problem in examine_tokenizer(out, source, samples=2000).problems)


def test_without_mistral_common_the_report_says_so(
    ranks: dict[bytes, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tekken_file(tmp_path / "tekken.json", ranks)
    write(source, tmp_path / "out", 1000)
    for name in ("mistral_common.tokens.tokenizers.tekken", "mistral_common"):
        monkeypatch.setitem(sys.modules, name, None)
    checked = examine_tokenizer(tmp_path / "out", source, samples=500)
    assert checked.problems == []
    assert "mistral_common is not installed" in checked.notes[0]


def test_a_source_that_is_gone_is_said(ranks: dict[bytes, int], tmp_path: Path) -> None:
    source, _ = nanochat_file(tmp_path / "tokenizer.pkl", ranks, NANOCHAT)
    write(source, tmp_path / "out", 1000)
    checked = examine_tokenizer(tmp_path / "out", None, samples=200)
    assert (checked.problems, checked.notes) == ([], ("its source is gone: ids were compared with nothing",))


def test_special_tokens_in_a_text_are_told_apart_from_it() -> None:
    assert tok_truth.split_at("a<s><s>b<|x|>", ["<s>", "<|x|>", "<|x|>>"]) == ["a", "<s>", "<s>", "b", "<|x|>"]
    assert tok_truth.split_at("<|x|>>", ["<|x|>", "<|x|>>"]) == ["<|x|>>"]


def test_texts_are_the_same_for_the_same_seed(ranks: dict[bytes, int]) -> None:
    built = tok_tiktoken.byte_level(ranks, tok_schemes.GPT2_CUT, {})
    first, again, other = (random_texts(built, 300, seed, specials=["<|x|>"]) for seed in (0, 0, 1))
    assert first == again != other
    together = "".join(first)
    assert "<|x|>" in together
    assert all(any(c in text for text in first) for c in ("\0", "\u3000", "  ", "\u200d", "\U0001f469"))
    together.encode()  # no surrogates


# which one lies beside a checkpoint


def test_a_ready_file_goes_before_what_it_was_made_from(ranks: dict[bytes, int], tmp_path: Path) -> None:
    from mdl.convert.finish import choose_tokenizer
    from mdl.convert.open import open_checkpoint

    from . import checkpoints as make

    checkpoint = make.nanogpt(tmp_path / "ckpt.pt")
    nanochat_file(tmp_path / "tokenizer.pkl", ranks, NANOCHAT)
    (tmp_path / "tokenizer.json").write_text("{}")
    chosen, (note,) = choose_tokenizer(open_checkpoint(checkpoint), None)
    assert chosen == str(tmp_path / "tokenizer.json")
    assert "tokenizer.pkl beside it was not read" in note
    (tmp_path / "tokenizer.json").unlink()
    tekken_file(tmp_path / "tekken.json", ranks)
    with pytest.raises(MdlError, match="several tokenizers lie beside"):
        choose_tokenizer(open_checkpoint(checkpoint), None)
    for name in ("tokenizer.pkl", "tekken.json"):
        (tmp_path / name).unlink()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    assert choose_tokenizer(open_checkpoint(checkpoint), None)[0] == str(tmp_path / "vocab.json")


def test_special_tokens_are_cut_out_from_the_left_the_longest_first() -> None:
    tokens = ("<a>", "<a>b", "[x]", "<", "a+")
    assert tok_truth.split_at("<a>bc<a>[x]<a a+.[x", tokens) == ["<a>b", "c", "<a>", "[x]", "<", "a ", "a+", ".[x"]
    assert tok_truth.split_at("abc", ()) == ["abc"]
    assert tok_truth.split_at("", tokens) == []

"""The source's own encoding: its library where that is installed, else mdl's plain reading of the same file.

Nothing here looks at the layout: a truth that was derived from what it judges would agree with every mistake.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from . import tok_bytes, tok_char, tok_find, tok_gpt2, tok_pickle, tok_sentencepiece, tok_tekken, tok_tiktoken
from .tok_base import unspell
from .tok_schemes import GPT2_CUT
from .tok_sentencepiece import BYTE_PIECE, MARK
from .tok_spm_proto import CONTROL, UNIGRAM, UNKNOWN, read_model

Encode = Callable[[list[str]], list[list[int]]]
Decode = Callable[[list[list[int]]], list[str]]


class Truth(Struct, frozen=True):
    """What ``by`` makes of texts that hold no special tokens, which ``specials`` gives the ids of.

    ``lossy`` knows the texts that the layout is known, and said, to encode differently.
    """

    by: str
    encode_plain: Encode
    decode: Decode | None = None
    specials: Mapping[str, int] = field(default_factory=dict[str, int])
    lossy: Callable[[str], bool] = lambda _: False

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text: special tokens as such, what stands between them as the source reads it."""
        cut = [split_at(text, self.specials) for text in texts]
        plain = iter(self.encode_plain([part for parts in cut for part in parts if part not in self.specials]))
        return [
            [i for p in parts for i in ([self.specials[p]] if p in self.specials else next(plain))] for parts in cut
        ]


def split_at(text: str, specials: Iterable[str]) -> list[str]:
    """The special tokens in a text and what stands between them; of two that begin at one place, the longer one."""
    known = tuple(specials)
    return [part for part in _cutter(known).split(text) if part] if known else [text] * bool(text)


@lru_cache(maxsize=8)
def _cutter(specials: tuple[str, ...]) -> re.Pattern[str]:
    """What finds the tokens, the longer ones first: tekken has 1,000, and each is looked for in every text."""
    return re.compile(f"({'|'.join(re.escape(token) for token in sorted(specials, key=len, reverse=True) if token)})")


def find_truth(source: str | Path, rows: int) -> Truth | None:
    """The truth about a source; None where the layout holds a copy of it. ``rows`` are those of the embedding.

    Raises MdlError (INPUT) where the source can't be read any more.
    """
    found = tok_find.find_source(source)
    if found.kind == tok_bytes.KIND:
        return _bytes_truth(found.said)
    path = found.files[0]
    match found.kind:
        case tok_char.KIND:
            return _char_truth(path)
        case tok_sentencepiece.KIND:
            return _sentencepiece_truth(path)
        case tok_gpt2.KIND:
            return _gpt2_truth(path, found.files[1])
        case tok_tekken.KIND:
            return _tekken_truth(path)
        case tok_pickle.KIND:
            ranks, scheme = tok_pickle.read_encoding(path)
            return _ranks_truth(ranks, scheme.pattern, scheme.cut, scheme.specials)
        case tok_tiktoken.KIND:
            ranks = tok_tiktoken.read_ranks(path)
            scheme = tok_tiktoken.find_scheme(path, ranks, rows)
            return _ranks_truth(ranks, scheme.pattern or scheme.cut, scheme.cut, scheme.specials)
        case _:
            return None


def _char_truth(path: Path) -> Truth:
    stoi = tok_char.read_meta(path)
    itos = {i: text for text, i in stoi.items()}
    return Truth(
        f"the table in {path.name}",
        lambda texts: [tok_char.encode(stoi, text) for text in texts],
        lambda ids: ["".join(itos[i] for i in one) for one in ids],
    )


def _bytes_truth(said: str) -> Truth:
    ids, scheme = tok_bytes.parse(said)
    first = ids[b"\0"]
    return Truth("UTF-8 itself", lambda texts: [[b + first for b in t.encode()] for t in texts], None, scheme.specials)


def _sentencepiece_truth(path: Path) -> Truth:
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor(model_file=str(path))
    model = read_model(path)
    specials = {p.text: i for i, p in enumerate(model.pieces) if p.type in (UNKNOWN, CONTROL)}
    alone = set(tok_sentencepiece.findable(model)) if model.dummy_prefix else set[str]()
    spelled = model.model_type == UNIGRAM and model.byte_fallback

    def lossy(text: str) -> bool:
        parts = [part.replace(" ", MARK) for part in split_at(text, specials)]
        if model.charsmap and tok_sentencepiece.joins(text):
            return True
        return any(part in alone for part in parts) or (spelled and BYTE_PIECE.search(text) is not None)

    return Truth(f"sentencepiece {_version('sentencepiece')}", processor.encode, processor.decode, specials, lossy)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _tekken_truth(path: Path) -> Truth:
    tekken = tok_tekken.read_tekken(path)
    try:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer  # pyright: ignore[reportMissingImports] # optional
    except ImportError:
        cut = tok_tekken.scheme_of(tekken, path).cut
        truth = _ranks_truth(tekken.ids, tekken.pattern, cut, tekken.specials)
        return Truth(f"{truth.by} (mistral_common is not installed)", truth.encode_plain, truth.decode, tekken.specials)
    tokenizer: Any = Tekkenizer.from_file(path)

    def encode(texts: list[str]) -> list[list[int]]:
        return [tokenizer.encode(text, bos=False, eos=False) for text in texts]

    named = {entry["token_str"]: entry["rank"] for entry in tokenizer._all_special_tokens}
    by = f"mistral_common {_version('mistral_common')}"
    return Truth(by, encode, lambda ids: [tokenizer.decode(one) for one in ids], named)


def _ranks_truth(ids: Mapping[bytes, int], pattern: str, cut: str, specials: Mapping[str, int]) -> Truth:
    """tiktoken on the file's ranks and pattern, or else the plain reading of the ranks on text that ``cut`` cuts."""
    try:
        import tiktoken
    except ImportError:
        pieces = _plain(cut, lambda piece: tok_tiktoken.encode(ids, piece))
        return Truth("mdl's plain reading of the ranks (tiktoken is not installed)", pieces, None, specials)
    encoding = tiktoken.Encoding("source", pat_str=pattern, mergeable_ranks=dict(ids), special_tokens={})
    return Truth(f"tiktoken {_version('tiktoken')}", encoding.encode_ordinary_batch, encoding.decode_batch, specials)


def _gpt2_truth(vocab_file: Path, merges_file: Path) -> Truth:
    vocab, merges = tok_gpt2.read_pair(vocab_file, merges_file)
    order = {pair: i for i, pair in enumerate(merges)}
    encode = _plain(GPT2_CUT, lambda piece: tok_gpt2.encode(vocab, order, piece))
    specials = {text: vocab[text] for text in tok_gpt2.marked(vocab, merges)}
    return Truth("mdl's plain reading of the merges", encode, None, specials)


def _plain(cut: str, encode: Callable[[bytes], list[int]]) -> Encode:
    """An encoding written in Python, piece by piece, each piece once."""
    from tokenizers import Regex, pre_tokenizers

    split: Any = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(cut), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )

    @cache
    def once(piece: str) -> list[int]:
        return encode(unspell(piece))

    return lambda texts: [[i for piece, _ in split.pre_tokenize_str(text) for i in once(piece)] for text in texts]

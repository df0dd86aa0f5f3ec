"""Whether a written tokenizer does what its source does: on seeded random texts, id by id."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MdlError, Problem, input_error
from . import tok_char, tok_find, tok_ready, tok_sentencepiece, tok_tiktoken
from .tok_base import byte_letters, read_json_object, unspell

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHOWN = 3
"""How many failing texts a problem quotes."""

_WIDE = (
    "   \n\n\t.,;:!?'\"()[]{}<>|/\\@#$%&*+-=_~^`0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    "àéîõüßñçøžłğÆŒſİΩλжщяאבעلمनमகไทย中文字漢かなカナ한국어😀👍🏽👩\u200d🚀e\u0301\u00a0\u2028\u3000\ufeff"
)


@dataclass(frozen=True)
class Truth:
    """The source's own encoding, and its decoding where it has one."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str] | None = None


def check_tokenizer(layout: Path, source: str | Path | None, *, samples: int = 300, seed: int = 0) -> list[Problem]:
    """What is wrong with the tokenizer in ``layout``; nothing, if it is right.

    It must load, keep its ids below the model's vocabulary, put back together what it takes apart, and, where
    ``source`` is given and can be run here, encode ``samples`` random texts to the source's own ids. Texts are made
    of the vocabulary's own pieces and, for tokenizers that know every byte, of many scripts.
    """
    if source == tok_find.NONE:
        return []
    try:
        tokenizer, rows, problems = _load(layout)
        truth = _truth(source, tokenizer, rows) if source is not None else None
    except MdlError as e:
        return list(e.problems)
    texts = random_texts(tokenizer, samples, seed)
    where = str(layout / "tokenizer.json")
    problems += _not_restored(tokenizer, texts, where)
    if truth is not None:
        problems += _not_as_source(tokenizer, truth, texts, where)
    if source is not None:
        problems += _not_copied(layout, source)
    return problems


def random_texts(tokenizer: Tokenizer, samples: int, seed: int) -> list[str]:
    """Seeded texts of up to 40 parts, each a token of the vocabulary or, where every byte is known, any character."""
    rng = random.Random(seed)  # noqa: S311 - test inputs must be repeatable, not secret
    ids = sorted(tokenizer.get_vocab(with_added_tokens=False).values())
    picked = rng.sample(ids, min(len(ids), 2000))
    parts = sorted({p for p in (tokenizer.decode([i]) for i in picked) if p and "\ufffd" not in p})
    parts = [p for p in parts if _knows(tokenizer, p)] or [" "]
    wide = _WIDE if knows_every_byte(tokenizer) else "".join(c for c in _WIDE if _knows(tokenizer, c))
    wide = wide or "".join(parts)
    draw: list[Callable[[], str]] = [lambda: rng.choice(parts), lambda: rng.choice(wide)]
    return ["".join(rng.choice(draw)() for _ in range(rng.randint(1, 40))) for _ in range(samples)]


def knows_every_byte(tokenizer: Tokenizer) -> bool:
    """Whether any text can be encoded without an unknown token."""
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    if all(f"<0x{b:02X}>" in vocab for b in range(256)):
        return True
    return "ByteLevel" in _types(tokenizer, "decoder") and all(letter in vocab for letter in byte_letters())


def _load(layout: Path) -> tuple[Tokenizer, int, list[Problem]]:
    """The tokenizer in a layout, the model's rows, and what is wrong with either or with the class beside it."""
    from tokenizers import Tokenizer

    file = layout / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises plain Exception
        raise input_error(f"tokenizer.json can't be loaded: {e}", str(file), "convert again") from e
    problems: list[Problem] = []
    rows = read_json_object(layout / "config.json").get("vocab_size")
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if type(rows) is not int or highest >= rows:
        what = f"the tokenizer's highest id is {highest}, config.json's vocab_size is {rows!r}"
        problems.append(Problem(what, str(file), "convert again with the tokenizer of this model"))
    config = layout / "tokenizer_config.json"
    named = read_json_object(config)
    if named.get("tokenizer_class") not in tok_ready.PLAIN_CLASSES:
        what = f"tokenizer_class {named.get('tokenizer_class')!r} may rebuild parts of tokenizer.json"
        problems.append(Problem(what, str(config), f"set it to {tok_ready.PLAIN_CLASSES[0]}"))
    for name in tok_ready.NAMES:
        text = tok_ready.token_text(named.get(name))
        if text is not None and tokenizer.token_to_id(text) is None:
            problems.append(Problem(f"{name} {text!r} is no token of tokenizer.json", str(config), "convert again"))
    return tokenizer, rows if type(rows) is int else highest + 1, problems


def _truth(source: str | Path, tokenizer: Tokenizer, rows: int) -> Truth | None:
    """The source's own code where it can be run here, else None."""
    found = tok_find.find_source(source)
    if found.kind == tok_char.KIND:
        stoi = tok_char.read_meta(found.files[0])
        itos = {i: text for text, i in stoi.items()}
        return Truth(lambda text: tok_char.encode(stoi, text), lambda ids: "".join(itos[i] for i in ids))
    if found.kind == tok_sentencepiece.KIND:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(found.files[0]))
        return Truth(processor.encode, processor.decode)
    if found.kind == tok_tiktoken.KIND:
        return _tiktoken_truth(found.files[0], tokenizer, rows)
    return None


def _tiktoken_truth(path: Path, tokenizer: Tokenizer, rows: int) -> Truth:
    ranks = tok_tiktoken.read_ranks(path)
    scheme = tok_tiktoken.find_scheme(path, ranks, rows)
    try:
        import tiktoken
    except ImportError:
        cut = tokenizer.pre_tokenizer

        def encode(text: str) -> list[int]:
            pieces = [unspell(piece) for piece, _ in cut.pre_tokenize_str(text)]
            return [i for piece in pieces for i in tok_tiktoken.encode(ranks, piece)]

        return Truth(encode)
    encoding = tiktoken.Encoding(
        path.name, pat_str=scheme.cut, mergeable_ranks=ranks, special_tokens=dict(scheme.specials)
    )
    return Truth(lambda text: encoding.encode(text, allowed_special="all"))


def _not_restored(tokenizer: Tokenizer, texts: list[str], where: str) -> list[Problem]:
    """Texts that can't be encoded, or that decoding does not give back though nothing in the tokenizer alters them."""
    gives_back = _types(tokenizer, "pre_tokenizer") <= {"Sequence", "Split", "ByteLevel", "Digits"}
    bad: list[str] = []
    for text in texts:
        try:
            back = tokenizer.decode(_ids(tokenizer, text))
        except Exception as e:  # the library raises plain Exception
            return [Problem(f"encoding {text!r} fails: {e}", where, "convert again")]
        if gives_back and back != text and _is_kept(tokenizer, text):
            bad.append(text)
    return _problem(bad, len(texts), "do not come back when encoded and decoded", where)


def _not_as_source(tokenizer: Tokenizer, truth: Truth, texts: list[str], where: str) -> list[Problem]:
    ids = [truth.encode(text) for text in texts]
    bad = [text for text, right in zip(texts, ids, strict=True) if _ids(tokenizer, text) != right]
    problems = _problem(bad, len(texts), "get other ids than from the source tokenizer", where)
    if truth.decode is not None:
        decode = truth.decode
        bad = [t for t, right in zip(texts, ids, strict=True) if tokenizer.decode(right) != decode(right)]
        problems += _problem(bad, len(texts), "are decoded to other text than by the source tokenizer", where)
    return problems


def _not_copied(layout: Path, source: str | Path) -> list[Problem]:
    found = tok_find.find_source(source)
    copy = layout / "tokenizer.json"
    if found.kind != tok_ready.KIND or found.files[0].read_bytes() == copy.read_bytes():
        return []
    return [Problem(f"it differs from {found.files[0]}, of which it should be a copy", str(copy), "convert again")]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _knows(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text can be encoded and decoded without loss."""
    try:
        return tokenizer.decode(_ids(tokenizer, text)) == text
    except Exception:  # the library raises plain Exception for a character that it does not know
        return False


def _is_kept(tokenizer: Tokenizer, text: str) -> bool:
    """Whether normalisation does no more to a text than to mark its spaces and to put one in front."""
    normalizer = tokenizer.normalizer
    if normalizer is None:
        return True
    prefix = normalizer.normalize_str("a").removesuffix("a")
    marked = (prefix + text).replace(" ", tok_sentencepiece.MARK)
    return normalizer.normalize_str(text).replace(" ", tok_sentencepiece.MARK) == marked


def _types(tokenizer: Tokenizer, part: str) -> set[str]:
    """The types that a part of a tokenizer is made of; ``Prefix`` stands for a space put before the first word."""
    found: set[str] = set()
    queue: list[Any] = [json.loads(tokenizer.to_str())[part]]
    while queue:
        node = queue.pop()
        if node is None:
            continue
        found.add(node["type"])
        if node.get("add_prefix_space"):
            found.add("Prefix")
        for key in ("pretokenizers", "decoders", "normalizers"):
            queue += node.get(key, [])
    return found


def _problem(bad: list[str], count: int, what: str, where: str) -> list[Problem]:
    if not bad:
        return []
    seen = ", ".join(repr(text[:60]) for text in islice(bad, SHOWN))
    do = "convert again; if it persists, report it with the tokenizer file"
    return [Problem(f"{len(bad)} of {count} random texts {what}: {seen}", where, do)]

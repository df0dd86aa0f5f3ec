"""Whether a written tokenizer does what its source does: on seeded random texts, id by id."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from ..errors import MdlError, Problem, input_error
from . import tok_find, tok_ready, tok_sentencepiece
from .tok_base import read_json_object
from .tok_texts import random_texts, types_of
from .tok_truth import Decode, Truth, find_truth

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLES = 10_000
"""How many random texts a layout's tokenizer is held to."""
RESTORED = 1000
"""How many of them it must give back."""
SHOWN = 3
"""How many failing texts a problem quotes."""


class Checked(Struct, frozen=True):
    """What is wrong with a tokenizer, and in ``notes`` what it was compared with, and what it could not be."""

    problems: Sequence[Problem] = ()
    notes: tuple[str, ...] = ()


def check_tokenizer(layout: Path, source: str | Path | None, *, samples: int = 300, seed: int = 0) -> list[Problem]:
    """What is wrong with the tokenizer in ``layout``; nothing, if it is right. See :func:`examine_tokenizer`."""
    return list(examine_tokenizer(layout, source, samples=samples, seed=seed).problems)


def examine_tokenizer(layout: Path, source: str | Path | None, *, samples: int = SAMPLES, seed: int = 0) -> Checked:
    """Hold the tokenizer in ``layout`` to its source.

    It must load, keep its ids below the model's vocabulary, put back together what it takes apart, and, where
    ``source`` is given, encode ``samples`` random texts to the source's own ids. Texts are made of the vocabulary's own
    pieces and, for tokenizers that know every byte, of any character.
    """
    if source == tok_find.NONE:
        return Checked()
    try:
        tokenizer, rows, problems = _load(layout)
        truth = find_truth(source, rows) if source is not None else None
        if source is not None:
            problems += _not_copied(layout, source)
    except MdlError as e:
        return Checked(e.problems)
    where = str(layout / "tokenizer.json")
    if truth is None:
        texts = random_texts(tokenizer, samples, seed)
    else:
        texts = random_texts(tokenizer, samples, seed, specials=truth.specials, lossy=truth.lossy)
    problems += _not_restored(tokenizer, texts[:RESTORED], where)
    if truth is None:
        note = "the tokenizer is a copy" if source is not None else "its source is gone: ids were compared with nothing"
        return Checked(problems, (note,))
    wrong = _not_as_source(tokenizer, truth, texts, where)
    note = f"the tokenizer gives {len(texts):,} random texts the ids of {truth.by}"
    return Checked(problems + wrong, () if wrong else (note,))


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


def _not_restored(tokenizer: Tokenizer, texts: list[str], where: str) -> list[Problem]:
    """Texts that can't be encoded, or that decoding does not give back though nothing in the tokenizer alters them."""
    gives_back = types_of(tokenizer, "pre_tokenizer") <= {"Sequence", "Split", "ByteLevel", "Digits"}
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    bad: list[str] = []
    for text in texts:
        try:
            back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as e:  # the library raises plain Exception
            return [Problem(f"encoding {text!r} fails: {e}", where, "convert again")]
        if gives_back and back != text and _is_kept(tokenizer, text) and not any(token in text for token in added):
            bad.append(text)
    return _problem(bad, len(texts), "do not come back when encoded and decoded", where)


def _not_as_source(tokenizer: Tokenizer, truth: Truth, texts: list[str], where: str) -> list[Problem]:
    right = truth.encode(texts)
    try:
        got = [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as e:  # the library raises plain Exception
        return [Problem(f"encoding random texts fails: {e}", where, "convert again")]
    bad = _different(texts, got, right)
    problems = _problem(bad, len(texts), f"get other ids than from {truth.by}", where)
    if truth.decode is not None:
        bad = _different(texts, tokenizer.decode_batch(right), _decoded(truth, truth.decode, right))
        problems += _problem(bad, len(texts), f"are decoded to other text than by {truth.by}", where)
    return problems


def _decoded(truth: Truth, decode: Decode, ids: list[list[int]]) -> list[str]:
    """What the source makes of ids; the layout leaves special tokens out of text, so they are not asked for."""
    special = set(truth.specials.values())
    return decode([[i for i in one if i not in special] for one in ids])


def _different(texts: list[str], got: Sequence[object], right: Sequence[object]) -> list[str]:
    return [text for text, one, other in zip(texts, got, right, strict=True) if one != other]


def _not_copied(layout: Path, source: str | Path) -> list[Problem]:
    found = tok_find.find_source(source)
    copy = layout / "tokenizer.json"
    if found.kind != tok_ready.KIND or found.files[0].read_bytes() == copy.read_bytes():
        return []
    return [Problem(f"it differs from {found.files[0]}, of which it should be a copy", str(copy), "convert again")]


def _is_kept(tokenizer: Tokenizer, text: str) -> bool:
    """Whether normalisation does no more to a text than to mark its spaces and to put one in front."""
    normalizer = tokenizer.normalizer
    if normalizer is None:
        return True
    mark = tok_sentencepiece.MARK
    if mark in text or tok_sentencepiece.BYTE_PIECE.search(text):
        return False
    prefix = normalizer.normalize_str("a").removesuffix("a")
    return normalizer.normalize_str(text).replace(" ", mark) == (prefix + text).replace(" ", mark)


def _problem(bad: list[str], count: int, what: str, where: str) -> list[Problem]:
    if not bad:
        return []
    seen = ", ".join(repr(text[:60]) for text in islice(bad, SHOWN))
    do = "convert again; if it persists, report it with the tokenizer file"
    return [Problem(f"{len(bad)} of {count} random texts {what}: {seen}", where, do)]

"""Rank files in tiktoken's text format ("base64 rank" per line): Llama 3, OpenAI's published ones, any other.

Such a file holds the merged byte strings only. How text is cut before merging (a regular expression) and the
special tokens are code in the projects that use it, so they come from what is known about the file: from its
checksum, from its place in a Llama-3 checkpoint, or from a JSON file beside it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import input_error
from .tok_base import Built, every_split, prepend_bos, read_json_object, special, spell
from .tok_schemes import (
    HARMONY_ROWS,
    LLAMA3_SPECIALS,
    LLAMA4_SPECIALS,
    O200K_SHA256,
    PUBLISHED,
    Scheme,
    for_oniguruma,
    harmony,
    llama3,
    llama4,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KIND = "tiktoken"
LLAMA3_RANKS = 128_000
LLAMA4_RANKS = 200_000


def looks_like_ranks(head: bytes) -> bool:
    """Whether the first bytes of a file are a line of this format."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)", head) is not None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Byte string → rank.

    Raises:
        MdlError: INPUT when a line is malformed, a rank or a token occurs twice, or a single byte is missing.
    """
    again = "fetch the file again and compare its checksum"
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            if token in ranks or not token or int(rank) < 0:
                raise ValueError(f"the token {token!r} is empty, listed before, or of a negative rank")
            ranks[token] = int(rank)
        except (ValueError, binascii.Error) as e:
            raise input_error(f"{path.name} is no rank file: {e}", f"{path}:{number}", again) from e
    if len(set(ranks.values())) != len(ranks):
        raise input_error(f"{path.name} gives one rank to several tokens", str(path), again)
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        what = f"{path.name} has no token for {len(missing)} of the 256 bytes (first: {missing[0]:#04x})"
        raise input_error(what, str(path), "text with these bytes could not be encoded; bring the complete file")
    return ranks


def build(path: Path, *, model_vocab: int) -> Built:
    """The byte-level tokenizer of a rank file. ``model_vocab`` (rows of the embedding) helps to know Llama 3.

    Raises:
        MdlError: INPUT when the file is malformed, or when nothing tells how it cuts text.
    """
    ranks = read_ranks(path)
    scheme = find_scheme(path, ranks, model_vocab)
    taken = set(ranks.values()) & set(scheme.specials.values())
    if taken or len(set(scheme.specials.values())) != len(scheme.specials):
        what = f"special tokens share ids with each other or with ranks: {sorted(taken)[:5]}"
        raise input_error(what, str(path), "correct the ids in the JSON file beside it")
    return built_by(KIND, ranks, scheme)


def built_by(kind: str, ids: Mapping[bytes, int], scheme: Scheme) -> Built:
    """The tokenizer that a scheme makes of byte strings and their ids."""
    tokenizer = byte_level(ids, scheme.cut, scheme.specials)
    if scheme.prepend and scheme.bos:
        prepend_bos(tokenizer, scheme.bos)
    notes = (f"taken for {scheme.title}", *scheme.notes)
    return Built(kind, tokenizer, scheme.bos, scheme.eos, scheme.pad, None, notes, scheme.stops, scheme.chat)


def byte_level(ranks: Mapping[bytes, int], cut: str, specials: Mapping[str, int]) -> Tokenizer:
    """A `tokenizers` BPE that merges as tiktoken does: whole pieces first, then neighbours by the rank of the union."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ids = {spell(token): rank for token, rank in ranks.items()}
    merges = every_split(ids, ids)
    tokenizer = Tokenizer(models.BPE({**ids, **specials}, merges, ignore_merges=True))
    try:
        expression = Regex(cut)
    except Exception as e:  # the library raises plain Exception
        what = f"text is cut by a regular expression that tokenizers can't read ({e}): {cut}"
        raise input_error(what, do="bring a tokenizer.json instead") from e
    steps: list[Any] = [
        pre_tokenizers.Split(expression, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = cast(Any, pre_tokenizers.Sequence(steps))
    tokenizer.decoder = cast(Any, decoders.ByteLevel())
    tokenizer.add_special_tokens(special(specials))
    return tokenizer


def encode(ranks: Mapping[bytes, int], piece: bytes) -> list[int]:
    """tiktoken's encoding of one piece of cut text, written plainly: the truth that the built tokenizer is held to."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        unions = [(ranks.get(a + b, 1 << 62), i) for i, (a, b) in enumerate(pairwise(parts))]
        best, at = min(unions, default=(1 << 62, 0))
        if best == 1 << 62:
            return [ranks[part] for part in parts]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def find_scheme(path: Path, ranks: Mapping[bytes, int], model_vocab: int) -> Scheme:
    """How this file cuts text, and its special tokens: stated beside it, known by checksum, or Llama 3's."""
    beside = path.with_name(path.name + ".json")
    if beside.is_file():
        return _stated(beside)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest in PUBLISHED:
        return harmony() if digest == O200K_SHA256 and model_vocab == HARMONY_ROWS else PUBLISHED[digest]
    count = len(ranks)
    of_meta = path.suffix == ".model"
    if count == LLAMA3_RANKS or (of_meta and model_vocab == count + LLAMA3_SPECIALS):
        return _llama3(path, count)
    if of_meta and (count == LLAMA4_RANKS or model_vocab == count + LLAMA4_SPECIALS):
        return llama4(count)
    what = f"{path.name} holds {count} ranks, but not how text is cut before merging nor the special tokens"
    do = (
        f"bring the tokenizer.json of this model, or write {beside.name} beside the file: "
        '{"pat_str": "…", "special_tokens": {"<|…|>": id}, "bos": null, "eos": "<|…|>", "pad": null}'
    )
    raise input_error(what, str(path), do)


def _stated(path: Path) -> Scheme:
    given = read_json_object(path)
    cut, specials = given.get("pat_str"), cast("dict[str, Any]", given.get("special_tokens", {}))
    if not isinstance(cut, str) or not all(type(i) is int for i in specials.values()):
        raise input_error("pat_str must be a text and special_tokens a map of texts to ids", str(path))
    names = {key: cast("str | None", given.get(key)) for key in ("bos", "eos", "pad")}
    wrong = [f"{key} {name!r}" for key, name in names.items() if name is not None and name not in specials]
    if wrong:
        raise input_error(f"not among special_tokens: {', '.join(wrong)}", str(path), "add them with their ids")
    title, plain = f"the scheme stated in {path.name}", for_oniguruma(cut, str(path))
    return Scheme(title, plain, specials, names["bos"], names["eos"], names["pad"], pattern=cut)


def _llama3(path: Path, first: int) -> Scheme:
    params = path.with_name("params.json")
    old = params.is_file() and not read_json_object(params).get("use_scaled_rope", False)
    why = (
        f"params.json {'does not scale' if old else 'scales'} rope" if params.is_file() else "no params.json beside it"
    )
    return llama3(first, old=old, why=why)

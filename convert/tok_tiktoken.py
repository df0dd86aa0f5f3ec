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
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import input_error
from .tok_base import Built, every_split, prepend_bos, read_json_object, special, spell

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KIND = "tiktoken"
LLAMA3_RANKS = 128_000
LLAMA4_RANKS = 200_000
LLAMA3_SPECIALS = 256

# These cut text as tiktoken's possessive patterns do. Oniguruma, which `tokenizers` uses, reads `{1,3}+` and `$`
# differently, so tiktoken's own spelling must not be copied.
GPT2_CUT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CL100K_SPECIALS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}


@dataclass(frozen=True)
class Scheme:
    """What a rank file does not say about itself."""

    title: str
    cut: str
    specials: Mapping[str, int]
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    prepend: bool = False
    notes: tuple[str, ...] = ()


_PUBLISHED = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": Scheme(
        "r50k_base (GPT-2)", GPT2_CUT, {"<|endoftext|>": 50256}, "<|endoftext|>", "<|endoftext|>"
    ),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": Scheme(
        "cl100k_base", _LLAMA3_CUT, _CL100K_SPECIALS, eos="<|endoftext|>"
    ),
}
"""By SHA-256 of the file."""


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
    tokenizer = byte_level(ranks, scheme.cut, scheme.specials)
    if scheme.prepend and scheme.bos:
        prepend_bos(tokenizer, scheme.bos)
    notes = (f"taken for {scheme.title}", *scheme.notes)
    return Built(KIND, tokenizer, scheme.bos, scheme.eos, scheme.pad, None, notes)


def byte_level(ranks: Mapping[bytes, int], cut: str, specials: Mapping[str, int]) -> Tokenizer:
    """A `tokenizers` BPE that merges as tiktoken does: whole pieces first, then neighbours by the rank of the union."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ids = {spell(token): rank for token, rank in ranks.items()}
    merges = every_split(ids, ids)
    tokenizer = Tokenizer(models.BPE({**ids, **specials}, merges, ignore_merges=True))
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(cut), "isolated"),
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
    known = _PUBLISHED.get(hashlib.sha256(path.read_bytes()).hexdigest())
    if known is not None:
        return known
    count = len(ranks)
    if count == LLAMA3_RANKS or (path.suffix == ".model" and model_vocab == count + LLAMA3_SPECIALS):
        return _llama3(path, count)
    what = f"{path.name} holds {count} ranks, but not how text is cut before merging nor the special tokens"
    if count == LLAMA4_RANKS:
        what = f"{path.name} looks like Llama 4's, whose special tokens are not known here"
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
    if re.search(r"\{\d*,?\d*\}\+|\$", cut):
        what = "pat_str uses `}+` or `$`, which mean something else to the regular expressions of tokenizers"
        raise input_error(what, str(path), r"write the plain form: {1,3} for {1,3}+, and leave out |\s++$")
    names = {key: cast("str | None", given.get(key)) for key in ("bos", "eos", "pad")}
    wrong = [f"{key} {name!r}" for key, name in names.items() if name is not None and name not in specials]
    if wrong:
        raise input_error(f"not among special_tokens: {', '.join(wrong)}", str(path), "add them with their ids")
    return Scheme(f"the scheme stated in {path.name}", cut, specials, names["bos"], names["eos"], names["pad"])


def _llama3(path: Path, first: int) -> Scheme:
    """Meta's scheme; both releases put the special tokens right after the ranks and differ only in a few names."""
    params = path.with_name("params.json")
    old = params.is_file() and not read_json_object(params).get("use_scaled_rope", False)
    why = (
        f"params.json {'does not scale' if old else 'scales'} rope" if params.is_file() else "no params.json beside it"
    )
    names = _llama3_names(old=old)
    pad = None if old else "<|finetune_right_pad_id|>"
    return Scheme(
        f"Llama {'3.0' if old else '3.1 or later'}",
        _LLAMA3_CUT,
        {name: first + i for i, name in enumerate(names)},
        "<|begin_of_text|>",
        "<|end_of_text|>",
        pad,
        prepend=True,
        notes=(
            f"special tokens are named as in {'3.0' if old else '3.1 and later'} ({why}); the releases differ in the "
            f"names of ids {first + 4}, {first + 5}, {first + 8} and from {first + 10} on, in no id of the others",
            "<|begin_of_text|> is put before every text, as Meta's encode(bos=True) does",
            f"the end of text is <|end_of_text|> ({first + 1}); an instruct model also stops at <|eot_id|> "
            f"({first + 9}), which nothing in the files tells: state it in generation_config.json",
            "special tokens spelled out in a text are read as such, so that chat templates work",
        ),
    )


def _llama3_names(*, old: bool) -> list[str]:
    """The 256 special tokens in the order of their ids (meta-llama/llama3 and meta-llama/llama-models)."""
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    if old:
        names += ["reserved_special_token_2", "reserved_special_token_3", "start_header_id", "end_header_id"]
        names += ["reserved_special_token_4", "eot_id"]
        reserved = 5
    else:
        names += ["finetune_right_pad_id", "step_id", "start_header_id", "end_header_id"]
        names += ["eom_id", "eot_id", "python_tag", "image"]
        reserved = 2
    spare = LLAMA3_SPECIALS - len(names)
    names += [f"reserved_special_token_{reserved + i}" for i in range(spare)]
    return [f"<|{name}|>" for name in names]

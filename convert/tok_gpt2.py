"""Byte-level BPE in two files, as GPT-2 was released: ``vocab.json`` and ``merges.txt``.

OpenAI's own names of the same files are ``encoder.json`` and ``vocab.bpe``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from ..errors import input_error, machine_error
from .tok_base import Built, byte_letters, read_json_object, special, spell

KIND = "gpt2"
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
END = "<|endoftext|>"
_JOINED = " "
"""Marks what was merged in this round; no letter of a byte-level vocabulary is a space."""

# tiktoken names a cached file by the SHA-1 of the address that it came from.
_CACHED_PAIR = ("6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
_CACHED_RANKS = "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"


def find_pair(directory: Path) -> tuple[Path, Path] | None:
    """The vocabulary and the merges in a directory, under either pair of names."""
    for vocab, merges in PAIRS:
        if (directory / vocab).is_file() and (directory / merges).is_file():
            return directory / vocab, directory / merges
    return None


def find_on_machine() -> tuple[Path, ...]:
    """GPT-2's files where tiktoken or transformers keep them: (vocabulary, merges) or (ranks,). No network is used.

    Raises:
        MdlError: MACHINE when neither has them.
    """
    for name in ("models--gpt2", "models--openai-community--gpt2"):
        for snapshot in sorted((_hub() / name / "snapshots").glob("*")):
            pair = find_pair(snapshot)
            if pair is not None:
                return pair
    cached = _tiktoken_cache()
    for names in (_CACHED_PAIR, (_CACHED_RANKS,)):
        files = tuple(cached / name for name in names)
        if all(f.is_file() for f in files):
            return files
    raise machine_error(
        "GPT-2's tokenizer is not on this machine",
        f"looked in {_hub()} and {cached}",
        "bring vocab.json and merges.txt of GPT-2 into one directory and name it: --tokenizer DIR",
    )


def build(vocab_file: Path, merges_file: Path) -> Built:
    """The tokenizer of the two files. Tokens that no merge makes become special tokens when they look like ones.

    Raises:
        MdlError: INPUT when the files are malformed or don't fit together.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = read_pair(vocab_file, merges_file)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = cast(Any, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    tokenizer.decoder = cast(Any, decoders.ByteLevel())
    loose, signs = _loose(vocab, merges), marked(vocab, merges)
    tokenizer.add_special_tokens(special(signs))
    notes = [f"special tokens, because no merge makes them: {', '.join(signs[:8])}"] if signs else []
    dead = [t for t in loose if t not in signs]
    if dead:
        notes.append(f"{len(dead)} entries that no text encodes to ({', '.join(map(repr, dead[:5]))}) can be decoded")
    end = END if END in signs else None
    if end is None:
        notes.append(f"there is no {END}: generation ends at max_tokens or at a stop string")
    return Built(KIND, tokenizer, bos=end, eos=end, notes=tuple(notes))


def read_pair(vocab_file: Path, merges_file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids and merges of two files that fit together, in the letters of byte-level vocabularies. Raises MdlError."""
    vocab, merges = _vocab(vocab_file), _merges(merges_file)
    _check(vocab, merges, vocab_file, merges_file)
    return vocab, merges


def marked(vocab: dict[str, int], merges: list[tuple[str, str]]) -> list[str]:
    """Tokens that no merge makes and that look like special ones."""
    return [t for t in _loose(vocab, merges) if (t[0], t[-1]) in {("<", ">"), ("[", "]")}]


def _loose(vocab: dict[str, int], merges: list[tuple[str, str]]) -> list[str]:
    return sorted(vocab.keys() - set(byte_letters()) - {a + b for a, b in merges}, key=lambda t: vocab[t])


def encode(vocab: dict[str, int], order: Mapping[tuple[str, str], int], piece: bytes) -> list[int]:
    """The original code's encoding of one piece of cut text, written plainly: the pair that was learnt first is merged
    everywhere, then the next. ``order`` numbers the merges."""
    parts = list(spell(piece))
    while len(parts) > 1:
        pair = min(pairwise(parts), key=lambda p: order.get(p, len(order)))
        if pair not in order:
            break
        made: list[str] = []
        for part in parts:
            if made and not made[-1].endswith(_JOINED) and (made[-1], part) == pair:
                made[-1] += part + _JOINED
            else:
                made.append(part)
        parts = [part.removesuffix(_JOINED) for part in made]
    return [vocab[part] for part in parts]


def _vocab(path: Path) -> dict[str, int]:
    vocab = read_json_object(path)
    if not all(type(i) is int and i >= 0 for i in vocab.values()) or len(set(vocab.values())) != len(vocab):
        raise input_error(f"{path.name} does not map tokens to different ids", str(path), "fetch the file again")
    return vocab


def _merges(path: Path) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            what = f"{path.name}: a merge is two tokens with a space between, not {line!r}"
            raise input_error(what, f"{path}:{number}", "fetch the file again")
        merges.append((parts[0], parts[1]))
    return merges


def _check(vocab: dict[str, int], merges: list[tuple[str, str]], vocab_file: Path, merges_file: Path) -> None:
    missing = [letter for letter in byte_letters() if letter not in vocab]
    if missing:
        what = f"{vocab_file.name} has no token for {len(missing)} of the 256 bytes, so it is not byte-level BPE"
        raise input_error(what, str(vocab_file), "bring a tokenizer.json instead")
    stray = [f"{a} {b}" for a, b in merges if not {a, b, a + b} <= vocab.keys()]
    if stray:
        what = f"{len(stray)} merges use tokens that {vocab_file.name} lacks (first: {stray[0]})"
        raise input_error(what, str(merges_file), "the two files belong to different models; bring a matching pair")


def _hub() -> Path:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def _tiktoken_cache() -> Path:
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    return Path(tempfile.gettempdir()) / "data-gym-cache"

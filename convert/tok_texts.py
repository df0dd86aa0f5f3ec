"""Seeded random texts that tokenizers are compared on: whatever is known to go wrong, and much that is not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .tok_base import byte_letters

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LETTERS = (
    "   \n\n\t.,;:!?'\"()[]{}<>|/\\@#$%&*+-=_~^`0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    "àéîõüßñçøžłğÆŒſİΩλжщяאבעلمनमகไทย中文字漢かなカナ한국어😀👍🏽👩\u200d🚀e\u0301\u00a0\u2028\u3000\ufeff"
)
_SPACES = " \t\n\r\x0b\x0c\x85\u00a0\u1680\u2003\u2028\u2029\u202f\u3000"
_CONTROLS = "".join(map(chr, [*range(32), *range(127, 160), 0xAD, *range(0x200B, 0x2010), 0x202E, 0x2060, 0xFFFD]))
_RUNS = (
    "'S", "'LL", "'ve", "don't", "I'M", "'\u017f", "CamelCaseWORDS", "1234567890", "3.14159", "٣٤٥", "½²Ⅷ",
    "a\u0301\u0323", "👩\u200d👩\u200d👧\u200d👦", "🇩🇪🇫🇷", "🏳\ufe0f\u200d🌈", "✌🏿", "#\ufe0f\u20e3", "ﬁ", "ＡＢ", "ǅ",
    "Русский", "עִבְרִית", "العربية", "हिन्दी", "ไทย", "日本語テキスト", "한국어", "𝔘𝔫𝔦", "𒀀𒁀",
    "</div>", "\r\n\r\n", "//**", "\\n",
)  # fmt: skip
_MARKED = ("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|eot_id|>", "[INST]", "[/INST]", "<bos>",
           "<|bos|>", "<start_of_turn>", "<0x41>", "\u2581")  # fmt: skip
_SURROGATES = range(0xD800, 0xE000)
_PLANES = ((0, 0x800), (0x800, 0x10000), (0x10000, 0x20000), (0x20000, 0x110000))


def random_texts(
    tokenizer: Tokenizer,
    samples: int,
    seed: int,
    *,
    specials: Iterable[str] = (),
    lossy: Callable[[str], bool] = lambda _: False,
) -> list[str]:
    """Texts of up to 40 parts: tokens of the vocabulary, characters of many scripts, runs of spaces, control
    characters, emoji, and what looks like a special token.

    For a tokenizer that knows every byte any character may occur; otherwise only those that it gives back. ``specials``
    are put in as they stand too. Texts that are ``lossy`` are left out, and replaced by others.
    """
    rng = random.Random(seed)  # noqa: S311 - test inputs must be repeatable, not secret
    draw = _drawers(tokenizer, rng, sorted(specials))
    texts: list[str] = []
    for _ in range(samples * 20):  # a bound, should nearly all be lossy
        if len(texts) == samples:
            break
        count = rng.randint(1, 6) if rng.random() < 0.5 else rng.randint(1, 40)
        text = "".join(rng.choice(draw)() for _ in range(count))
        if not lossy(text):
            texts.append(text)
    return texts


def _drawers(tokenizer: Tokenizer, rng: random.Random, specials: Sequence[str]) -> list[Callable[[], str]]:
    everything = knows_every_byte(tokenizer)

    def known(texts: Iterable[str]) -> list[str]:
        return list(texts) if everything else [text for text in texts if _knows(tokenizer, text)]

    parts = _pieces(tokenizer, rng) or [" "]
    letters = known(_LETTERS) or parts
    pools = [parts, letters, letters, known(_RUNS), known(_look_alikes(specials)), list(specials)]
    spaces, controls = known(_SPACES), known(_CONTROLS)
    draw: list[Callable[[], str]] = [partial(_pick, rng, pool, 1) for pool in (parts, parts, *pools, controls) if pool]
    # Longer runs of the plain space and its like: whole vocabularies of them are merged from the left.
    draw += [partial(_pick, rng, pool, most) for pool, most in ((spaces, 9), (spaces[:3], 80)) if pool]
    if everything:
        draw.append(partial(_any_character, rng))
    return draw


def _pick(rng: random.Random, pool: Sequence[str], most: int) -> str:
    return rng.choice(pool) * rng.randint(1, most)


def _pieces(tokenizer: Tokenizer, rng: random.Random) -> list[str]:
    """Up to 2000 tokens of the vocabulary as the text that encodes to them."""
    ids = sorted(tokenizer.get_vocab(with_added_tokens=False).values())
    picked = rng.sample(ids, min(len(ids), 2000))
    pieces = sorted({p for p in tokenizer.decode_batch([[i] for i in picked]) if p and "\ufffd" not in p})
    return [piece for piece in pieces if _knows(tokenizer, piece)]


def _any_character(rng: random.Random) -> str:
    """Any code point that UTF-8 can hold, assigned or not."""
    point = rng.randrange(*rng.choice(_PLANES))
    return chr(point) if point not in _SURROGATES else "\ud7ff"


def _look_alikes(specials: Sequence[str]) -> list[str]:
    """Texts that are nearly special tokens, and none of ``specials``."""
    near = set(_MARKED)
    for text in [*specials[:40], *_MARKED]:
        near |= {text[:-1], text[1:], text.upper(), text.replace("|", "| "), f"{text[:1]} {text[1:]}", text[:1] + text}
    return sorted(text for text in near if text and not any(token in text for token in specials))


def knows_every_byte(tokenizer: Tokenizer) -> bool:
    """Whether any text can be encoded without an unknown token."""
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    if all(f"<0x{b:02X}>" in vocab for b in range(256)):
        return True
    return "ByteLevel" in types_of(tokenizer, "decoder") and all(letter in vocab for letter in byte_letters())


def types_of(tokenizer: Tokenizer, part: str) -> set[str]:
    """The types that a part of a tokenizer is made of; ``Prefix`` stands for a space put before the first word."""
    found: set[str] = set()
    component: Any = getattr(tokenizer, part)
    queue: list[Any] = [component and json.loads(component.__getstate__())]  # the whole would be megabytes of JSON
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


def _knows(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text can be encoded and decoded without loss."""
    try:
        return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    except Exception:  # the library raises plain Exception for a character that it does not know
        return False

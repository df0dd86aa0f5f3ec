"""What a tiktoken rank file does not say about itself: how text is cut before merging, and the special tokens.

Facts of published tokenizers, told by a file's checksum or its place in a checkpoint, and the one translation between
the two libraries of regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain

from msgspec import Struct

from ..errors import input_error


class Scheme(Struct, frozen=True):
    """How a rank file is used. ``pattern`` is tiktoken's own spelling of ``cut`` where that differs.

    ``stops`` are the tokens at which the original code ends generation, where they are more than ``eos``; ``chat``
    names the template in the folder ``chat`` that writes dialogs as that code does.
    """

    title: str
    cut: str
    specials: Mapping[str, int]
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    prepend: bool = False
    notes: tuple[str, ...] = ()
    pattern: str = ""
    stops: tuple[str, ...] = ()
    chat: str = ""


# These cut text as tiktoken's possessive patterns do. Oniguruma, which `tokenizers` uses, reads `{1,3}+` and `$`
# differently, so tiktoken's own spelling must not be copied: see `for_oniguruma`.
GPT2_CUT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_CUT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_CL100K_SPECIALS = {_END: 100257, **dict(zip(_FIM, range(100258, 100261), strict=True)), "<|endofprompt|>": 100276}
_HARMONY = {"startoftext": 199998, "endoftext": 199999, "return": 200002, "constrain": 200003, "channel": 200005,
            "start": 200006, "end": 200007, "message": 200008, "call": 200012, "endofprompt": 200018}  # fmt: skip
HARMONY_ROWS = 201_088
O200K_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"

PUBLISHED = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": Scheme(
        "r50k_base (GPT-2)", GPT2_CUT, {_END: 50256}, _END, _END
    ),
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": Scheme(
        "p50k_base", GPT2_CUT, {_END: 50256}, eos=_END
    ),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": Scheme(
        "cl100k_base", CL100K_CUT, _CL100K_SPECIALS, eos=_END
    ),
    O200K_SHA256: Scheme("o200k_base", O200K_CUT, {_END: 199999, "<|endofprompt|>": 200018}, eos=_END),
}
"""By SHA-256 of the file."""


def harmony() -> Scheme:
    """What gpt-oss makes of the ranks of o200k: tokens for channels and calls, and reserved ones up to its rows."""
    named = {f"<|{name}|>": i for name, i in _HARMONY.items()}
    taken = set(named.values())
    spare = {f"<|reserved_{i}|>": i for i in range(200_000, HARMONY_ROWS) if i not in taken}
    # tiktoken also knows 200018 as <|reserved_200018|>; a tokenizer.json has one name for each id.
    why = f"the model has the {HARMONY_ROWS} rows of gpt-oss"
    return Scheme(
        "o200k_harmony", O200K_CUT, {**named, **spare}, "<|startoftext|>", "<|return|>", _END, notes=(why,),
        stops=("<|return|>", "<|call|>", _END),
    )  # fmt: skip


def llama3(first: int, *, old: bool, why: str) -> Scheme:
    """Meta's scheme for Llama 3; both releases put the special tokens right after the ranks (``first``) and differ
    only in a few names."""
    return Scheme(
        f"Llama {'3.0' if old else '3.1 or later'}",
        CL100K_CUT,
        {name: first + i for i, name in enumerate(llama3_names(old=old))},
        "<|begin_of_text|>",
        "<|end_of_text|>",
        None if old else "<|finetune_right_pad_id|>",
        prepend=True,
        notes=(
            f"special tokens are named as in {'3.0' if old else '3.1 and later'} ({why}); the releases differ in the "
            f"names of ids {first + 4}, {first + 5}, {first + 8} and from {first + 10} on, in no id of the others",
            *_metas_notes(f"<|eot_id|> ({first + 9})", first + 1),
        ),
        chat="llama3",
    )


def llama4(first: int) -> Scheme:
    """Meta's scheme for Llama 4: o200k's cut, and 2048 special tokens after the ranks."""
    return Scheme(
        "Llama 4",
        O200K_CUT,
        {name: first + i for i, name in enumerate(llama4_names())},
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|finetune_right_pad|>",
        prepend=True,
        notes=_metas_notes(f"<|eot|> ({first + 8}) and <|eom|> ({first + 7})", first + 1),
    )


def _metas_notes(stop: str, end: int) -> tuple[str, ...]:
    return (
        "<|begin_of_text|> is put before every text, as Meta's encode(bos=True) does",
        f"the end of text is <|end_of_text|> ({end}); an instruct model also stops at {stop}, which nothing in the "
        "files tells: state it in generation_config.json",
        "special tokens spelled out in a text are read as such, so that chat templates work",
    )


LLAMA3_SPECIALS = 256
LLAMA4_SPECIALS = 2048


def llama3_names(*, old: bool) -> list[str]:
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
    return _filled(names, "reserved_special_token_", reserved, LLAMA3_SPECIALS)


def llama4_names() -> list[str]:
    """The 2048 special tokens in the order of their ids (meta-llama/llama-models, models/llama4/tokenizer.py)."""
    text, vision = "text_post_train_reserved_special_token_", "vision_reserved_special_token_"
    names = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"]
    names += ["header_start", "header_end", "eom", "eot", "step", *(f"{text}{i}" for i in range(6))]
    names += ["python_start", "python_end", "finetune_right_pad", *(f"{text}{i}" for i in range(8, 69))]
    names += ["image_start", "image_end", f"{vision}0", f"{vision}1", "tile_x_separator", "tile_y_separator"]
    names += [*(f"{vision}{i}" for i in range(2, 6)), "image", f"{vision}6", "patch"]
    names += [f"{vision}{i}" for i in range(7, 1048)]
    names += [f"reasoning_reserved_special_token_{i}" for i in range(8)]
    names += ["reasoning_thinking_start", "reasoning_thinking_end"]
    return _filled(names, "reserved_special_token_", 0, LLAMA4_SPECIALS)


def _filled(names: list[str], spare: str, start: int, count: int) -> list[str]:
    more = [f"{spare}{start + i}" for i in range(count - len(names))]
    return [f"<|{name}|>" for name in chain(names, more)]


_ATOM = re.compile(r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", re.DOTALL)


def for_oniguruma(pattern: str, where: str) -> str:
    r"""tiktoken's regular expression as `tokenizers` must be given it: the same text is cut in the same places.

    ``$`` is the end of the text to tiktoken and the end of a line to Oniguruma; ``X{1,3}+`` never gives back what it
    took to tiktoken and is repeated to Oniguruma. Raises MdlError (INPUT) where such a part can't be turned over.
    """
    atoms = _ATOM.findall(pattern)
    made: list[str] = []
    for i, atom in enumerate(atoms):
        if atom == "$":
            made.append(r"\z")
        elif atom == "+" and i > 1 and len(atoms[i - 1]) > 2 and atoms[i - 1][0] == "{":
            if atoms[i - 2] == ")":
                what = f"the pattern repeats a group possessively ({pattern}), which can't be turned over"
                raise input_error(what, where, "bring a tokenizer.json instead")
            made[-2:] = [f"(?>{made[-2]}{made[-1]})"]
        else:
            made.append(atom)
    return "".join(made)

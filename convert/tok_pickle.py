"""A pickled ``tiktoken.Encoding``, as nanochat saves its tokenizer (``tokenizer.pkl``). Read without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn, cast

from ..errors import input_error
from .inert import Stub
from .tok_base import Built
from .tok_schemes import Scheme, for_oniguruma
from .tok_tiktoken import built_by
from .unpickle import unpickle

KIND = "tiktoken-pickle"
_CLASS = "tiktoken.core.Encoding"
_LIMIT = 256 << 20
_DO = "write it again with tiktoken's own pickle.dump(encoding, file), or bring a tokenizer.json"

# nanochat (karpathy/nanochat, nanochat/tokenizer.py and engine.py): every document begins with the one, and
# generation stops at either.
_NANOCHAT_BOS, _NANOCHAT_END = "<|bos|>", "<|assistant_end|>"
_NANOCHAT_TURNS = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>")
_NANOCHAT = (
    f"{_NANOCHAT_BOS} is put before every text, as nanochat's own sampling and evaluation do",
    f"generation ends at {_NANOCHAT_END} and at {_NANOCHAT_BOS}, as in nanochat's engine",
    "special tokens spelled out in a text are read as such, so that chat templates work; nanochat itself reads them "
    "as ordinary text",
)


def looks_like_encoding(head: bytes) -> bool:
    """Whether a pickle begins by naming tiktoken's class."""
    return b"tiktoken.core" in head[:64]


def read_encoding(path: Path) -> tuple[dict[bytes, int], Scheme]:
    """The ranks of a pickled encoding and its scheme; no code of the file or of tiktoken is run.

    Raises:
        MdlError: INPUT when the file holds something else, a reference to a published encoding, or wrong ids.
    """
    where = str(path.absolute())
    if path.stat().st_size > _LIMIT:
        raise input_error(f"{path.name} is too large for a tokenizer", where, "name the right file")
    content = unpickle(path.read_bytes(), where, _no_storage)
    state = content.state if isinstance(content, Stub) and content.qualname == _CLASS else None
    if state is not None and isinstance(name := state.get("state"), str):
        what = f"{path.name} holds only the name of a published encoding ({name})"
        raise input_error(what, where, "bring its rank file, or --tokenizer gpt2 for GPT-2's")
    if state is None or not {"pat_str", "mergeable_ranks", "special_tokens"} <= state.keys():
        raise input_error(f"{path.name} holds no tiktoken.Encoding", where, _DO)
    return _ranks(state, where), _scheme(state, where)


def build(path: Path) -> Built:
    """The tokenizer of a pickled encoding.

    Raises:
        MdlError: INPUT; see :func:`read_encoding`.
    """
    ranks, scheme = read_encoding(path)
    taken = [*ranks.values(), *scheme.specials.values()]
    if len(set(taken)) != len(taken):
        raise input_error(f"{path.name} gives one id to several tokens", str(path), _DO)
    return built_by(KIND, ranks, scheme)


def _ranks(state: dict[Any, Any], where: str) -> dict[bytes, int]:
    ranks = state["mergeable_ranks"]
    table = cast("dict[Any, Any]", ranks) if isinstance(ranks, dict) else {}
    wrong = [t for t, i in table.items() if type(t) is not bytes or not t or type(i) is not int or i < 0]
    missing = [b for b in range(256) if bytes([b]) not in table]
    if wrong or missing:
        seen = f"holds {repr(wrong[0])[:60]}, which is no byte string with an id" if wrong else ""
        raise input_error(f"its table of merges {seen or f'lacks {len(missing)} of the 256 bytes'}", where, _DO)
    return table


def _scheme(state: dict[Any, Any], where: str) -> Scheme:
    pattern, named = state["pat_str"], state["special_tokens"]
    table = cast("dict[Any, Any]", named) if isinstance(named, dict) else {None: None}
    if not isinstance(pattern, str) or not all(type(t) is str and t and type(i) is int for t, i in table.items()):
        raise input_error("its pattern or its special tokens are not of tiktoken's kind", where, _DO)
    specials = cast("dict[str, int]", table)
    cut = for_oniguruma(pattern, where)
    if {_NANOCHAT_BOS, _NANOCHAT_END} <= specials.keys():
        ends = (_NANOCHAT_END, _NANOCHAT_BOS)
        chat = "nanochat" if all(token in specials for token in _NANOCHAT_TURNS) else ""
        return Scheme(
            "nanochat's", cut, specials, _NANOCHAT_BOS, _NANOCHAT_END, None, True, _NANOCHAT, pattern, ends, chat
        )
    notes = ("the file does not say which special tokens begin and end a text: generation ends at max_tokens",)
    return Scheme("a pickled tiktoken encoding", cut, specials, notes=notes, pattern=pattern)


def _no_storage(key: str, nbytes: int, itemsize: int) -> NoReturn:
    raise input_error("the pickle holds tensors, which no tokenizer does", do="name the tokenizer's own file")

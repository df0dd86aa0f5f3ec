"""Which tokenizer a path holds, told by the files' names and first bytes, and its rebuilding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from ..errors import input_error
from . import tok_bytes, tok_char, tok_gpt2, tok_pickle, tok_ready, tok_sentencepiece, tok_tekken, tok_tiktoken
from .tok_base import Built

NONE = "none"
GPT2 = "gpt2"
_DO = (
    "name one with --tokenizer PATH: tokenizer.json; meta.pkl of nanoGPT; a SentencePiece .model; Llama's "
    "tokenizer.model or another tiktoken rank file; tekken.json; tokenizer.pkl of nanochat; a directory with "
    "vocab.json and merges.txt; --tokenizer bytes where every byte is a token; or --tokenizer none"
)


class Source(Struct, frozen=True):
    """A tokenizer that was found: its kind (as in ``TokenizerInfo``) and the files that make it, or what was said."""

    kind: str
    files: tuple[Path, ...]
    said: str = ""

    @property
    def directory(self) -> Path | None:
        """Where further files of the same tokenizer may lie."""
        return self.files[0].parent if self.files else None


def find_source(source: str | Path) -> Source:
    """The tokenizer at ``source``: a file, a directory with exactly one, or a name: ``none``, ``gpt2``, ``bytes``.

    A file or directory that bears such a name is meant by ``./none``, ``./gpt2`` or ``./bytes``.

    Raises:
        MdlError: INPUT when there is none or more than one; MACHINE when ``gpt2`` is not on this machine.
    """
    if source == NONE:
        return Source(NONE, ())
    if is_named(source):
        return Source(tok_bytes.KIND, (), str(source))
    if source == GPT2:
        files = tok_gpt2.find_on_machine()
        return Source(tok_gpt2.KIND if len(files) == 2 else tok_tiktoken.KIND, files)
    path = Path(source)
    if not path.exists():
        raise input_error("there is no such tokenizer file or directory", str(path), _DO)
    if not path.is_dir():
        found = _file(path)
        if found is None:
            raise input_error(f"{path.name} is no tokenizer that mdl reads", str(path), _DO)
        return found
    candidates = _in_directory(path)
    if not candidates:
        raise input_error("no tokenizer in this directory", str(path), _DO)
    if len(candidates) > 1 and candidates[0].kind != tok_ready.KIND:
        names = ", ".join(c.files[0].name for c in candidates)
        raise input_error(f"several tokenizers in this directory: {names}", str(path), "name one: --tokenizer FILE")
    return candidates[0]


def is_named(source: str | Path | None) -> bool:
    """Whether a source is ``bytes`` or ``bytes:bos=256,…``, which no file holds."""
    return isinstance(source, str) and source.partition(":")[0] == tok_bytes.KIND


def is_pair(files: Sequence[str]) -> bool:
    """Whether files are the two that make one tokenizer together."""
    return tuple(Path(file).name for file in files) in tok_gpt2.PAIRS


def find_beside(checkpoint: Path) -> Source | None:
    """The tokenizer that lies beside a checkpoint (in it, if it is a directory), or None if there is none.

    Raises:
        MdlError: INPUT when there are several and none is a tokenizer.json.
    """
    directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return find_source(directory) if _in_directory(directory) else None


def build(source: Source, model_vocab: int) -> Built:
    """The tokenizer of a found source other than ``none``; ``model_vocab`` is the rows of the model's embedding."""
    if source.kind == tok_bytes.KIND:
        return tok_bytes.build(source.said, model_vocab)
    first = source.files[0]
    match source.kind:
        case tok_tekken.KIND:
            return tok_tekken.build(first)
        case tok_pickle.KIND:
            return tok_pickle.build(first)
        case tok_ready.KIND:
            return tok_ready.build(first)
        case tok_char.KIND:
            return tok_char.build(first)
        case tok_sentencepiece.KIND:
            return tok_sentencepiece.build(first)
        case tok_gpt2.KIND:
            return tok_gpt2.build(first, source.files[1])
        case _:
            return tok_tiktoken.build(first, model_vocab=model_vocab)


def _in_directory(directory: Path) -> list[Source]:
    """Every tokenizer in a directory; a tokenizer.json comes first, because it is ready and says the most."""
    paths = [directory / name for name in ("tokenizer.json", "meta.pkl", "tokenizer.pkl", "tekken.json")]
    for pattern in ("*.model", "tokenizer.model.v*", "*.tiktoken"):
        paths += sorted(directory.glob(pattern))
    found = [s for s in (_file(p) for p in paths if p.is_file()) if s is not None]
    pair = tok_gpt2.find_pair(directory)
    if pair is not None:
        found.append(Source(tok_gpt2.KIND, pair))
    return found


def _file(path: Path) -> Source | None:
    with path.open("rb") as file:
        head = file.read(4096)
    if path.suffix == ".pkl":
        return Source(tok_pickle.KIND if tok_pickle.looks_like_encoding(head) else tok_char.KIND, (path,))
    if tok_tekken.looks_like_tekken(head):
        return Source(tok_tekken.KIND, (path,))
    if path.suffix == ".json" or path.name in ("merges.txt", "vocab.bpe"):
        return _json(path)
    if tok_tiktoken.looks_like_ranks(head):
        return Source(tok_tiktoken.KIND, (path,))
    # A SentencePiece model begins with its first piece: field 1, length-delimited.
    return Source(tok_sentencepiece.KIND, (path,)) if head[:1] == b"\n" else None


def _json(path: Path) -> Source | None:
    """A file of a pair names its whole pair; any other .json is taken for a tokenizer.json under another name."""
    if path.name not in {name for pair in tok_gpt2.PAIRS for name in pair}:
        return Source(tok_ready.KIND, (path,))
    pair = tok_gpt2.find_pair(path.parent)
    if pair is None:
        do = "put its partner beside it: vocab.json needs merges.txt, encoder.json needs vocab.bpe"
        raise input_error(f"{path.name} is half of a tokenizer", str(path), do)
    return Source(tok_gpt2.KIND, pair)

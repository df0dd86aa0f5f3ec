"""SentencePiece ``.model`` files, BPE and Unigram, rebuilt so that ids equal SentencePiece's own.

Three things differ from the usual conversions, and each is needed for equal ids: merges are all splits of every
piece, ordered by the score of the result; the space mark is set by normalisation, with no pre-tokenizer (so a
leading or a double space survives); and the tokenizer class written beside it never rebuilds these parts.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import input_error
from .tok_base import Built, every_split, prepend_bos, special
from .tok_spm_proto import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SpmModel,
    read_model,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KIND = "sentencepiece"
MARK = "\u2581"
"""U+2581, which SentencePiece writes for a space."""
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_JOINING = re.compile("[\u1100-\u11ff\ua960-\ua97c\ud7b0-\ud7fb\u200c\u200d\uff9e\uff9f\U0001f3fb-\U0001f3ff]")
"""Letters and signs, other than marks, that join the character before them."""


def build(path: Path) -> Built:
    """The tokenizer of a SentencePiece model, with its beginning-of-text piece put before every text.

    Raises:
        MdlError: INPUT for a model of another type, or with a setting that `tokenizers` can't express.
    """
    from tokenizers import Tokenizer

    model = read_model(path)
    _check_expressible(model, path)
    tokenizer = Tokenizer(_bpe(model) if model.model_type == BPE else _unigram(model))
    tokenizer.normalizer = _normalizer(model)
    tokenizer.decoder = _decoder(model)
    _add_pieces(tokenizer, model)
    bos = model.control(model.bos)
    if bos is not None:
        prepend_bos(tokenizer, bos)
    return Built(
        KIND,
        tokenizer,
        bos=bos,
        eos=model.control(model.eos),
        pad=model.control(model.pad),
        unk=model.texts(UNKNOWN)[0],
        notes=tuple(_notes(model, bos)),
    )


def _check_expressible(model: SpmModel, path: Path) -> None:
    faults = [
        (model.model_type not in (BPE, UNIGRAM), "its type is neither BPE nor Unigram"),
        (len(model.texts(UNKNOWN)) != 1, "it has no single unknown piece"),
        (bool(model.texts(UNUSED)), "it has pieces marked unused"),
        (model.suffix_space, "it marks spaces as suffixes (treat_whitespace_as_suffix)"),
        (not model.escape, "it leaves spaces unmarked (escape_whitespaces is off)"),
        (len({p.text for p in model.pieces}) != len(model.pieces), "it lists a piece twice"),
    ]
    reasons = [reason for wrong, reason in faults if wrong]
    if reasons:
        what = f"{path.name} can't be turned into a tokenizer.json with the same ids: {'; '.join(reasons)}"
        raise input_error(what, str(path), "bring a tokenizer.json, or serve token ids with --tokenizer none")


def _bpe(model: SpmModel) -> Any:
    from tokenizers import models

    vocab = {piece.text: index for index, piece in enumerate(model.pieces)}
    ordinary = [p for p in model.pieces if p.type in (NORMAL, USER_DEFINED)]
    return models.BPE(
        vocab,
        every_split({p.text: vocab[p.text] for p in ordinary}, {p.text: -p.score for p in ordinary}),
        unk_token=model.texts(UNKNOWN)[0],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _unigram(model: SpmModel) -> Any:
    from tokenizers import models

    scored = [(p.text, p.score) for p in model.pieces]
    unk = next(i for i, p in enumerate(model.pieces) if p.type == UNKNOWN)
    return models.Unigram(scored, unk, model.byte_fallback)


def _normalizer(model: SpmModel) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.squeeze:
        steps += [normalizers.Replace(Regex(p), "") for p in (r"\A +", rf"[ {MARK}]+\z")]
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.dummy_prefix:
        steps.append(_prefix(model))
    steps.append(normalizers.Replace(" ", MARK))
    return normalizers.Sequence(steps)


def _prefix(model: SpmModel) -> Any:
    """Puts the space mark before a text.

    User-defined pieces are looked for after normalisation, and `tokenizers` normalises their own spelling too; a
    text that is nothing but such a piece therefore stays without a prefix, or no piece would ever be found.
    """
    from tokenizers import Regex, normalizers

    whole = [re.escape(text) for text in findable(model)]
    if not whole:
        return normalizers.Prepend(MARK)
    return normalizers.Replace(Regex(rf"\A(?!(?:{'|'.join(whole)})?\z)"), MARK)


def _decoder(model: SpmModel) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.squeeze:  # SentencePiece then drops every leading space, not only the one it put there
        steps.append(decoders.Strip(" ", 1 << 16, 0))
    elif model.dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def joins(text: str) -> bool:
    """Whether a text holds characters made of several code points: marks, emoji with modifiers, Korean letters."""
    return _JOINING.search(text) is not None or any(unicodedata.category(c)[0] == "M" for c in text)


def _add_pieces(tokenizer: Tokenizer, model: SpmModel) -> None:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens(special(model.texts(UNKNOWN, CONTROL)))
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in findable(model)])


def findable(model: SpmModel) -> list[str]:
    """User-defined pieces that a text can hold. One with a plain space never matches, for spaces are marked before."""
    return [text for text in model.texts(USER_DEFINED) if " " not in text]


def _notes(model: SpmModel, bos: str | None) -> list[str]:
    notes = [
        "control pieces and the unknown piece, spelled out in a text, are read as those pieces, so that chat "
        "templates work; SentencePiece itself reads them as ordinary text"
    ]
    notes.append(f"{bos} is put before every text" if bos else "the model has no beginning-of-text piece: none is put")
    if model.dummy_prefix:
        notes.append("text after a control piece gets its own space prefix, as when each turn is encoded by itself")
    if model.dummy_prefix and findable(model):
        notes.append("a text that is exactly one user-defined piece is encoded without the space prefix")
    if not model.byte_fallback:
        notes.append("characters outside the vocabulary become the unknown piece, as in SentencePiece")
    if model.charsmap or model.squeeze:
        notes.append("the model normalises text (characters or spaces), so decoding need not give the same text back")
    if model.charsmap:
        notes.append(
            "where the model rewrites a letter that marks or modifiers follow, tokenizers leaves those out which "
            "SentencePiece keeps: such texts get other ids, and are not compared"
        )
    if model.model_type == UNIGRAM and model.texts(BYTE):
        notes.append("a text that spells out a byte piece, such as <0x0A>, is read as that byte")
    return notes

"""From whatever tokenizer a checkpoint came with to the files that vLLM reads.

The written class is always ``PreTrainedTokenizerFast``, which takes tokenizer.json as it is; model-specific classes
(LlamaTokenizer above all) rebuild parts of it and so change ids.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from msgspec import Struct

from ..errors import input_error
from . import tok_find, tok_ready
from .tok_base import Built
from .tok_check import Checked, check_tokenizer, examine_tokenizer
from .tok_find import Source, find_beside, is_named, is_pair
from .tok_ready import KIND as READY

__all__ = [
    "READY",
    "Checked",
    "TokenizerInfo",
    "check_tokenizer",
    "examine_tokenizer",
    "find_beside",
    "is_named",
    "is_pair",
    "write_tokenizer",
]


CHAT_TEMPLATE = "chat_template.jinja"


class TokenizerInfo(Struct, frozen=True):
    """What was written. ``vocab_size`` is the highest id plus one; ``files`` are relative to the output."""

    kind: str
    source: str
    vocab_size: int
    bos: int | None
    eos: int | None
    pad: int | None
    files: tuple[str, ...]
    notes: tuple[str, ...]
    stops: tuple[int, ...] = ()
    """Ids at which generation ends, where they are more than ``eos``."""


def write_tokenizer(source: str | Path, out: Path, *, model_vocab: int, context: int | None) -> TokenizerInfo:
    """Writes tokenizer.json, tokenizer_config.json and, where the source has one, chat_template.jinja into ``out``.

    Args:
        source: a file, a directory that holds one tokenizer, or a name: ``none`` (token ids only), ``gpt2``, or
            ``bytes`` (a token per byte; see :mod:`.tok_bytes`).
        out: a directory; made when it is missing.
        model_vocab: rows of the model's embedding.
        context: the longest sequence in tokens, or None when it is unknown.

    Raises:
        MdlError: INPUT when there is no readable tokenizer at ``source``, or when it has ids beyond the model's
            rows; MACHINE when ``gpt2`` is not on this machine.
    """
    found = tok_find.find_source(source)
    if found.kind == tok_find.NONE:
        note = "no tokenizer: prompts are token ids, and vLLM needs --skip-tokenizer-init"
        return TokenizerInfo(tok_find.NONE, str(source), 0, None, None, None, (), (note,))
    built = tok_find.build(found, model_vocab)
    used = sorted(built.tokenizer.get_vocab(with_added_tokens=True).values())
    where = str(found.files[0]) if found.files else found.said
    if not used or used[-1] >= model_vocab:
        what = f"the tokenizer has ids up to {used[-1] if used else -1}, but the model has {model_vocab} rows"
        raise input_error(what, where, "this tokenizer belongs to another model; name the right one: --tokenizer PATH")
    files = _write(found, built, out, context)
    return TokenizerInfo(
        kind=built.kind,
        source=where,
        vocab_size=used[-1] + 1,
        bos=_id(built, built.bos),
        eos=_id(built, built.eos),
        pad=_id(built, built.pad),
        files=files,
        notes=(*built.notes, *_chat_notes(built, files), *_rows_without_token(used, model_vocab)),
        stops=tuple(built.tokenizer.get_vocab()[text] for text in built.stops),
    )


def _write(found: Source, built: Built, out: Path, context: int | None) -> tuple[str, ...]:
    out.mkdir(parents=True, exist_ok=True)
    written = ["tokenizer.json", "tokenizer_config.json"]
    if built.kind == tok_ready.KIND:
        shutil.copyfile(found.files[0], out / "tokenizer.json")
        config, _ = tok_ready.settings(found.files[0])
        specials = found.files[0].with_name("special_tokens_map.json")
        if specials.is_file():
            shutil.copyfile(specials, out / specials.name)
            written.append(specials.name)
    else:
        (out / "tokenizer.json").write_text(built.tokenizer.to_str(pretty=False), encoding="utf-8")
        config = _config(built)
    if context is not None:
        config["model_max_length"] = context
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")
    if _write_chat_template(found, config, out) or _write_known_template(built, out):
        written.append(CHAT_TEMPLATE)
    return tuple(written)


def _config(built: Built) -> dict[str, Any]:
    names = {"bos_token": built.bos, "eos_token": built.eos, "pad_token": built.pad, "unk_token": built.unk}
    return {
        "tokenizer_class": tok_ready.PLAIN_CLASSES[0],
        **{name: text for name, text in names.items() if text is not None},
        # Some library versions delete spaces before punctuation unless told not to.
        "clean_up_tokenization_spaces": False,
    }


def _write_chat_template(found: Source, config: dict[str, Any], out: Path) -> bool:
    """Writes the template that lies beside the source; one that ``config`` carries already needs no file."""
    if found.directory is None:
        return False
    file = found.directory / CHAT_TEMPLATE
    if file.is_file():
        shutil.copyfile(file, out / file.name)
        return True
    beside = found.directory / "tokenizer_config.json"
    if "chat_template" in config or not beside.is_file():
        return False
    template = tok_ready.settings(found.files[0])[0].get("chat_template")
    if not isinstance(template, str):
        return False
    (out / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    return True


def _write_known_template(built: Built, out: Path) -> bool:
    """Writes the template of the code that made the tokenizer, if mdl has it."""
    if built.chat:
        shutil.copyfile(Path(__file__).parent / "chat" / f"{built.chat}.jinja", out / CHAT_TEMPLATE)
    return bool(built.chat)


def _chat_notes(built: Built, files: tuple[str, ...]) -> list[str]:
    if not built.chat or CHAT_TEMPLATE not in files:
        return []
    return [f"{CHAT_TEMPLATE} writes dialogs as {built.chat} does; whether the model saw any, no file tells"]


def _id(built: Built, text: str | None) -> int | None:
    return None if text is None else built.tokenizer.token_to_id(text)


def _rows_without_token(used: list[int], model_vocab: int) -> list[str]:
    """``used``: the tokenizer's ids, ascending."""
    notes: list[str] = []
    holes = used[-1] + 1 - len(set(used))
    if holes:
        notes.append(f"{holes} ids below {used[-1]} have no token; if the model samples one, its text is empty")
    if used[-1] + 1 < model_vocab:
        notes.append(
            f"{model_vocab - used[-1] - 1} rows of the embedding ({used[-1] + 1} to {model_vocab - 1}) have no token; "
            "if the model samples one, its text is empty"
        )
    return notes

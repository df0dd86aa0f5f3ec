"""Chat templates of mdl's own: the ids of a dialog are those of the code that made the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from jinja2 import TemplateError
from tokenizers import Tokenizer

from mdl.convert import tok_schemes
from mdl.convert.tok_texts import random_texts

from .test_tokenizers_bytes import write_ranks
from .test_tokenizers_more import NANOCHAT, mistral_files, nanochat_file, ranks, tekken_file
from .tokens import write

__all__ = ["ranks"]  # the fixture

Dialog = list[dict[str, str]]
Ids = Callable[..., list[int]]


def dialogs(out: Path) -> list[Dialog]:
    """Of one to three turns, with a system message and without, with texts that cut at every edge."""
    hard = ["hi", " two  words ", "\n\nlines\n", "été 日本語 🙂", "1234", "'s", "!?", "a\t"]
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    specials = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    drawn = random_texts(tokenizer, 300, 5)
    texts = hard + [text for text in drawn if text.strip() and not any(s in text for s in specials)][:120]
    found: list[Dialog] = []
    for k, (turns, system) in enumerate(product([1, 3, 5], [False, True] * 20)):
        take = [texts[(7 * k + 3 * j) % len(texts)] for j in range(turns + 1)]
        said = [{"role": ("user", "assistant")[j % 2], "content": take[j]} for j in range(turns)]
        found.append([{"role": "system", "content": take[-1]}, *said] if system else said)
    return found


def by_template(out: Path) -> Ids:
    """What vLLM's chat endpoint does: the template's text, encoded without what the tokenizer itself would add."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(out))

    def ids(dialog: Dialog) -> list[int]:
        text = tokenizer.apply_chat_template(dialog, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return ids


def test_llama_3(ranks: dict[bytes, int], tmp_path: Path) -> None:
    """Against a plain reading of Meta's ChatFormat, in which every part is encoded on its own."""
    source, rows = write_ranks(tmp_path / "tokenizer.model", ranks), len(ranks) + 256
    info = write(source, tmp_path / "out", rows)
    names = {name: len(ranks) + i for i, name in enumerate(tok_schemes.llama3_names(old=False))}
    plain = tiktoken.Encoding("m", pat_str=tok_schemes.CL100K_CUT, mergeable_ranks=ranks, special_tokens={})

    def header(role: str) -> list[int]:
        start, end = names["<|start_header_id|>"], names["<|end_header_id|>"]
        return [start, *plain.encode_ordinary(role), end, *plain.encode_ordinary("\n\n")]

    def wanted(dialog: Dialog) -> list[int]:
        made = [names["<|begin_of_text|>"]]
        for message in dialog:
            text = plain.encode_ordinary(message["content"].strip())
            made += [*header(message["role"]), *text, names["<|eot_id|>"]]
        return made + header("assistant")

    ids, drawn = by_template(tmp_path / "out"), dialogs(tmp_path / "out")
    assert [ids(d) for d in drawn] == [wanted(d) for d in drawn]
    assert "chat_template.jinja" in info.files
    assert any("as llama3 does" in note for note in info.notes)


def test_nanochat(ranks: dict[bytes, int], tmp_path: Path) -> None:
    """Against a plain reading of render_conversation, whose system message is the beginning of the first question."""
    source, plain = nanochat_file(tmp_path / "tokenizer.pkl", ranks, NANOCHAT)
    write(source, tmp_path / "out", len(ranks) + 16)
    bos, user, user_end, answer, answer_end = (len(ranks) + i for i in range(5))

    def wanted(dialog: Dialog) -> list[int]:
        said = [dict(message) for message in dialog]
        if said[0]["role"] == "system":
            said[1]["content"] = said[0]["content"] + "\n\n" + said[1]["content"]
            said = said[1:]
        made = [bos]
        for message in said:
            begin, end = (user, user_end) if message["role"] == "user" else (answer, answer_end)
            made += [begin, *plain.encode_ordinary(message["content"]), end]
        return [*made, answer]

    ids, drawn = by_template(tmp_path / "out"), dialogs(tmp_path / "out")
    assert [ids(d) for d in drawn] == [wanted(d) for d in drawn]


@pytest.mark.parametrize(("name", "rows"), [("tekken_240718.json", 131_072), ("tekken_240911.json", 131_072)])
def test_mistrals_own_files(name: str, rows: int, tmp_path: Path) -> None:
    """Against mistral_common's encoding of the same request."""
    held_to_mistral(mistral_files() / name, rows, tmp_path / "out")


@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13"])
def test_mistrals_versions(version: str, ranks: dict[bytes, int], tmp_path: Path) -> None:
    mistral_files()
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    listed = [dict(entry) for entry in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    more = [{"rank": 20 + i, "token_str": t, "is_control": True} for i, t in enumerate(("[ARGS]", "[CALL_ID]"))]
    given = {"special_tokens": [*listed, *more]} if version in ("v11", "v13") else {}
    source = tekken_file(tmp_path / "tekken.json", ranks, version=version, **given)
    held_to_mistral(source, len(ranks) + 20, tmp_path / "out")


def held_to_mistral(source: Path, rows: int, out: Path) -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    write(source, out, rows)
    truth = MistralTokenizer.from_file(str(source))

    def wanted(dialog: Dialog) -> list[int]:
        messages: Any = dialog
        return list(truth.encode_chat_completion(ChatCompletionRequest.from_openai(messages=messages)).tokens)

    ids, drawn = by_template(out), dialogs(out)
    assert [ids(d) for d in drawn] == [wanted(d) for d in drawn]


def test_a_version_that_nobody_described_has_none(ranks: dict[bytes, int], tmp_path: Path) -> None:
    listed = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(("<unk>", "<s>", "</s>", "[INST]"))]
    source = tekken_file(tmp_path / "tekken.json", ranks, version="v15", special_tokens=listed)
    assert "chat_template.jinja" not in write(source, tmp_path / "out", len(ranks) + 20).files


@pytest.mark.parametrize("kind", ["nanochat", "mistral_v3", "mistral_v7"])
def test_turns_out_of_order_are_refused(kind: str, ranks: dict[bytes, int], tmp_path: Path) -> None:
    if kind == "nanochat":
        source, _ = nanochat_file(tmp_path / "tokenizer.pkl", ranks, NANOCHAT)
    else:
        source = tekken_file(tmp_path / "tekken.json", ranks, version=kind.removeprefix("mistral_"))
    write(source, tmp_path / "out", len(ranks) + 20)
    wrong: list[Any] = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]

    with pytest.raises(TemplateError, match="alternate"):
        by_template(tmp_path / "out")(wrong)


def test_a_template_beside_the_tokenizer_comes_first(ranks: dict[bytes, int], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source, _ = nanochat_file(tmp_path / "in" / "tokenizer.pkl", ranks, NANOCHAT)
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    write(tmp_path / "in", tmp_path / "out", len(ranks) + 16)

    assert source.is_file()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"

"""A tiny layout over HTTP, and asked once; and what is refused before vLLM is started."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from mdl import serve as serving
from mdl.errors import Kind, MdlError
from mdl.validate.client import CPU_COMPILATION, Engine

LETTERS = "the quick brown fox jumps over the lazy dog " * 8


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers, and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [LETTERS], trainers.BpeTrainer(vocab_size=280, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)  # noqa: S106 - a token of text
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(3)  # its answer to "the quick" is plain letters, of which no byte is half a character
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def group(pid: int) -> list[int]:
    """The processes of a process group that still run."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        try:
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == pid and state != "Z":
            found.append(int(entry.name))
    return found


def children(pid: int) -> list[int]:
    return [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]


def post(url: str, body: dict[str, Any]) -> Any:
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:  # noqa: S310 - our own
        return json.load(answer)


@pytest.mark.engine
def test_it_answers_over_http_and_leaves_nobody_behind(layout: Path) -> None:
    program = "import sys; from pathlib import Path; from mdl.serve import serve\n"
    program += "sys.exit(serve(Path(sys.argv[1]), port=0, extra=['--max-model-len', '64'], served_name='toy'))"
    mdl = subprocess.Popen(
        [sys.executable, "-c", program, layout], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert mdl.stdout is not None
    try:
        ready, curl = mdl.stdout.readline(), mdl.stdout.readline()
        assert ready.startswith("ready: http://127.0.0.1:"), mdl.communicate()
        server = children(mdl.pid)[0]
        assert len(group(server)) > 1
        url, body = shlex.split(curl)[2], json.loads(shlex.split(curl)[-1])
        assert body["model"] == "toy"
        answer = post(url, body)
        assert answer["usage"]["completion_tokens"] <= 32
        assert answer["choices"][0]["text"]
        models = json.load(urllib.request.urlopen(url.replace("completions", "models"), timeout=9))  # noqa: S310 - our own
        assert models["data"][0]["max_model_len"] == 64  # the argument of ours came first and lost
    finally:
        mdl.send_signal(signal.SIGTERM)
        _, log = mdl.communicate(timeout=60)
    assert mdl.returncode == 0, log
    assert "vllm" in log.lower()
    for _ in range(20):
        if group(server) == []:
            break
        time.sleep(0.1)
    assert group(server) == []


@pytest.mark.engine
def test_it_answers_once(
    layout: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the session's process: a start of its own would only repeat what other tests show."""

    class Borrowed:
        def __init__(self, **_: Any) -> None: ...
        def __enter__(self) -> Engine:
            return engine

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(serving, "Engine", Borrowed)

    assert serving.serve(layout, prompt="the quick", max_tokens=5) == 0
    out, err = capsys.readouterr()
    assert len(out.strip()) >= 5
    assert err == ""

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(layout), AutoModelForCausalLM.from_pretrained(layout)
    ids = tokenizer("the quick", return_tensors="pt").input_ids
    tokens = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program plays vLLM, and fails over the same arguments sooner."""
    monkeypatch.setattr(serving, "SERVER", "json.tool")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: True)

    with pytest.raises(MdlError, match="ended with exit code 2") as caught:
        serving.serve(config(tmp_path), port=0, extra=["--no-such-argument"], quiet=True)

    assert caught.value.kind is Kind.MACHINE
    assert "usage: python -m json.tool" in caught.value.problems[0].what


def config(tmp_path: Path, **values: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_arguments_come_from_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "on_cpu", lambda: False)
    folder = config(tmp_path, dtype="float32")

    assert serving.server_arguments(folder, "n") == [
        *("--model", str(folder), "--served-model-name", "n", "--dtype", "float32"),
        "--skip-tokenizer-init",
    ]
    (folder / "tokenizer.json").touch()
    assert "--skip-tokenizer-init" not in serving.server_arguments(folder, "n")


def test_a_cpu_gets_a_small_cache_and_a_context_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 128}
    tiny = serving.cpu_arguments(sizes, "float32")
    assert tiny[0] == "--enforce-eager"
    assert json.loads(tiny[2]) == CPU_COMPILATION
    assert tiny[3:] == ["--max-model-len", "128", "--kv-cache-memory-bytes", str(64 << 20)]

    huge = {"num_hidden_layers": 80, "num_attention_heads": 64, "hidden_size": 8192, "max_position_embeddings": 1 << 24}
    arguments = serving.cpu_arguments(huge, "float32")
    length, cache = int(arguments[4]), int(arguments[6])
    assert 0 < length < 1 << 24
    assert length * 2 * 80 * 8192 * 4 <= cache <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    assert serving.cpu_arguments({}, "float32")[3:] == ["--kv-cache-memory-bytes", str(1 << 30)]


def test_refused_before_vllm_starts(tmp_path: Path) -> None:
    with pytest.raises(MdlError, match="no layout here") as caught:
        serving.serve(tmp_path)
    assert caught.value.kind is Kind.INPUT
    with pytest.raises(MdlError, match="has no tokenizer") as caught:
        serving.serve(config(tmp_path), prompt="hello")
    assert caught.value.kind is Kind.INPUT
    with pytest.raises(MdlError, match="--port=1") as caught:
        serving.serve(tmp_path, extra=["--port=1"])
    assert caught.value.kind is Kind.USAGE
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        with pytest.raises(MdlError, match="can't listen here") as caught:
            serving.serve(tmp_path, port=held.getsockname()[1])
    assert caught.value.kind is Kind.USAGE

"""What `mdl serve` and `mdl verify` look at before they start anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mdl.convert.prepare import prepare
from mdl.convert.run import convert
from mdl.errors import Kind, MdlError
from mdl.validate import ready
from mdl.validate import verify as verifying
from mdl.validate.ready import ready_layout
from mdl.validate.verify import verify


@pytest.fixture
def layout(tied: Path, tmp_path: Path) -> Path:
    convert(prepare(tied), tmp_path / "out", tokenizer="none", max_shard_size=6000)
    return tmp_path / "out"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def served(path: Path, said: list[str] | None = None) -> Path:
    return ready_layout(path, unverified=True, say=(said if said is not None else []).append)


def refusal(path: Path, said: list[str] | None = None) -> str:
    with pytest.raises(MdlError) as caught:
        served(path, said)
    assert caught.value.kind is Kind.INPUT
    return str(caught.value)


def test_serve_takes_what_is_whole(layout: Path) -> None:
    said: list[str] = []

    assert served(layout, said) == layout
    assert said == ["checking the layout's files", "checking every byte of the weights"]


def test_serve_reads_no_weights_where_a_glance_is_enough(layout: Path) -> None:
    (layout / "config.json").write_text("{}")
    said: list[str] = []

    assert "was changed after mdl convert wrote it" in refusal(layout, said)
    assert said == ["checking the layout's files"]


def test_serve_finds_a_flipped_bit(layout: Path) -> None:
    flip(next(layout.glob("*.safetensors")))

    assert "the bytes are not those that were written" in refusal(layout)


def test_serve_checks_what_lies_in_the_cache(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = served(tied)
    assert served(tied) == out
    flip(out / "model.safetensors")

    assert "the bytes are not those that were written" in refusal(tied)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("something was started")


@pytest.mark.parametrize("harm", ["cut", "missing", "manifest"])
def test_verify_starts_nothing_on_what_nothing_can_run_with(
    harm: str, layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "source_of", refuse)
    monkeypatch.setattr(verifying, "Engine", refuse)
    first = min(layout.glob("*.safetensors"))
    if harm == "cut":
        first.write_bytes(first.read_bytes()[:-1])
    elif harm == "missing":
        first.unlink()
    else:
        text = (layout / "mdl.json").read_text()
        (layout / "mdl.json").write_text(text.replace('"float32"', '"float16"'))

    with pytest.raises(MdlError) as caught:
        verify(layout)

    assert caught.value.kind is Kind.INPUT


def test_only_a_whole_layout_is_asked_for_its_report(layout: Path) -> None:
    with pytest.raises(MdlError, match="is not proven: it was never verified") as caught:
        ready.ready_layout(layout, unverified=False, say=lambda _: None)
    assert caught.value.kind is Kind.USAGE

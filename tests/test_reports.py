"""Reports for CI servers and for people: JUnit, one HTML file, plain text; the page is looked at in a browser."""

from __future__ import annotations

import math
import random
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as Xml

import msgspec
import pytest

from mdl.validate import charts, svg
from mdl.validate.compare import RATIO
from mdl.validate.html import SEQUENCES, to_html
from mdl.validate.junit import to_junit
from mdl.validate.report import Check, Evidence, Located, Report, keep_report
from mdl.validate.text import to_text

HOSTILE = '<script>alert(1)</script> & "quoted" $title \x00\x1b[31m'


def a_report(*, ok: bool, sequences: int = 2, wrong: float = 1e9) -> Report:
    """A report with everything in it: right, or with attention of layer 1 wrong."""
    rng = random.Random(0)  # noqa: S311 - made-up figures, not secrets
    kinds = ("vocabulary",) * sequences + ("long",)
    lengths = (90,) * sequences + (200,)
    floors = tuple(tuple(10 ** rng.gauss(-13, 0.2) for _ in range(n)) for n in lengths)
    factor = 1.0 if ok else wrong
    measured = tuple(tuple(f * factor * 10 ** rng.gauss(0, 0.2) for f in one) for one in floors)
    exact = [rng.gauss(0, 3) for _ in range(500)]
    pairs = tuple((x, x + rng.gauss(0, 1e-6 if ok else 0.3)) for x in exact)
    names = [f"layers.{i}.{part}" for i in range(30) for part in ("norm", "attention", "mlp")]
    layers = tuple((name, 1e-4 if name == "layers.1.attention" else 1e-14, 2e-14) for name in names)
    located = Located(
        "layers.1.attention", "model.layers.1.attn", 1e-4, 2e-14, "grows", "rope_theta", "falls to 1e-14", layers
    )
    figures = {"nmse": 1e-13 * factor, "floor": 1e-13, "ratio": factor, "worst_ratio": factor}
    checks = (
        Check("layout", True, "21 tensors", "0 faults"),
        Check("prefill", ok, f"NMSE {1e-13 * factor:.1e}", "16 x", (f"worst at 3 {HOSTILE}",), figures),
        Check("generate", None, "not run", ""),
    )
    return Report(
        layout="out",
        checkpoint="/data/ckpt.pt",
        arch="llama2c",
        target="LlamaForCausalLM",
        reference="model.py:build",
        dtype="float32",
        ok=ok,
        checks=checks,
        inputs="380 positions",
        seed=7,
        trusted=("context = 64",),
        notes=(HOSTILE,),
        versions={"torch": "2.13", "vllm": "0.32"},
        manifest="ab" * 32,
        command="mdl verify out --seed 7",
        seconds={"layout": 0.5, "vllm": 3.0},
        evidence=Evidence(kinds, measured, floors, pairs),
        located=None if ok else located,
    )


def suite_of(report: Report) -> Xml.Element:
    """The report as JUnit, read back."""
    return Xml.fromstring(to_junit(report).encode())  # noqa: S314 - our own text


def test_junit_has_one_case_per_check() -> None:
    suite = suite_of(a_report(ok=False))
    layout, prefill, generate = suite.findall("testcase")

    assert suite.attrib | {"tests": "3", "failures": "1", "skipped": "1", "errors": "0"} == suite.attrib
    assert layout.find("failure") is None
    assert layout.attrib["time"] == "0.5"
    failure = prefill.find("failure")
    assert failure is not None
    assert failure.attrib["message"] == "NMSE 1.0e-04 (limit 16 x)"
    assert "<script>" in (failure.text or "")
    assert "ratio = 1e+09" in (failure.text or "")
    assert "begins in layers.1.attention" in (failure.text or "")
    assert generate.find("skipped") is not None
    told = {p.attrib["name"]: p.attrib["value"] for p in suite.iter("property")}
    assert told["seed"] == "7"
    assert told["command"] == "mdl verify out --seed 7"
    assert told["manifest sha256"] == "ab" * 32


def test_junit_is_red_even_where_no_single_check_is() -> None:
    green = a_report(ok=True)
    assert suite_of(green).attrib["errors"] == "0"
    unproven = suite_of(msgspec.structs.replace(green, ok=False))

    assert unproven.attrib["errors"] == "1"
    assert unproven.findall("testcase")[-1].find("error") is not None


def test_the_text_names_every_check_and_where_it_begins() -> None:
    text = to_text(a_report(ok=False))

    assert text.splitlines()[0] == "NOT the same model: prefill failed"
    assert re.search(r"^prefill +FAIL +NMSE 1.0e-04 +16 x$", text, re.MULTILINE)
    assert "begins in: layers.1.attention" in text
    assert "seed 7" in text


class Page(HTMLParser):
    """Collects tags, and complains about ends without a start."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


@pytest.mark.parametrize("ok", [True, False])
def test_the_page_is_well_formed_and_needs_nothing_else(ok: bool) -> None:
    text = to_html(a_report(ok=ok))
    page = Page(text)

    assert page.links == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?:", text)
    assert "&lt;script&gt;" in text
    assert "prefers-color-scheme: dark" in text
    for words in ("mdl verify out --seed 7", "ab" * 32, "vllm 0.32", "seed 7", "context = 64"):
        assert words in text
    assert ("Where it begins" in text) == (not ok)
    assert page.tags.count("figure") == (6 if ok else 7)


def test_a_report_without_pictures_is_a_page_too() -> None:
    bare = msgspec.structs.replace(a_report(ok=True), evidence=None, checks=())
    assert Page(to_html(bare)).tags.count("figure") == 0


def test_many_sequences_and_modules_are_cut_and_the_page_says_so() -> None:
    text = to_html(a_report(ok=False, sequences=40))

    assert f"Shown are {SEQUENCES} of 41 sequences" in text
    assert f"({charts.MODULES} of 90 modules)" in text
    assert Page(text).tags.count("figure") == SEQUENCES + 4


def test_what_is_not_a_number_is_drawn_as_the_worst() -> None:
    report = a_report(ok=False)
    assert report.evidence is not None
    broken = tuple((math.nan, math.inf, 0.0, *one[3:]) for one in report.evidence.measured)
    pairs = ((1.0, math.nan), (2.0, math.inf), (3.0, 3.0))
    text = to_html(
        msgspec.structs.replace(report, evidence=msgspec.structs.replace(report.evidence, measured=broken, pairs=pairs))
    )

    assert not re.search(r'"(nan|inf|-inf)"', text)
    assert "M48 nan" not in text
    assert text.count('class="broken"') == len(broken)
    assert "position 0: nan" in text


def test_bars_beyond_the_limit_are_counted_and_marked() -> None:
    picture = charts.ratios([1.0, 2.0, RATIO * 100, math.nan], [1.0, 1.0, 1.0, 1.0])
    counts = {
        int(n): style
        for style, n in re.findall(r'class="(bar[ a-z]*)"[^>]*><title>(\d+) positions', picture)
        if n != "0"
    }
    assert sum(int(n) for n in re.findall(r"<title>(\d+) positions", picture)) == 4
    assert "bar bad" in counts.values()
    assert f"limit {RATIO:g} ×" in picture


def test_axes_place_values_and_label_round_numbers() -> None:
    log = svg.decades([3e-14, 2e-9], 100, 0)
    assert (log.low, log.high) == (1e-14, 1e-8)
    assert (log.at(1e-14), log.at(1e-8), log.at(1e-11)) == (100, 0, 50)
    assert (log.at(0), log.at(math.inf), log.at(math.nan)) == (100, 0, 0)
    assert log.ticks(3)[0][1] == "10⁻¹⁴"
    line = svg.spread([-1.0, 1.0], 0, 10)
    assert [label for _, label in line.ticks(4)] == ["-1", "0", "1"] or len(line.ticks(4)) <= 6
    assert line.at(0.0) == 5


def test_the_located_module_is_among_those_drawn() -> None:
    layers = [(f"m{k}", 1e-14, 1e-14) for k in range(300)]
    for name in ("m0", "m150", "m299"):
        shown = charts.around(layers, name)
        assert len(shown) == charts.MODULES
        assert name in [module for module, _, _ in shown]


# --- in a browser ------------------------------------------------------------------------------------------------

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=2000",
]  # fmt: skip


def browse(folder: Path, *arguments: str) -> str:
    """Run the browser once; what it prints."""
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def pixels(png: Path) -> tuple[int, int, set[tuple[int, ...]]]:
    """Width, height and the colours of an 8-bit PNG, each scanline's filter undone."""
    data, at, packed = png.read_bytes(), 8, b""
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert (depth, kind in (2, 6)) == (8, True)
    while at < len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        packed += data[at + 8 : at + 8 + size] if name == b"IDAT" else b""
        at += size + 12
    raw, step = zlib.decompress(packed), 3 if kind == 2 else 4
    stride = width * step
    above, colours = bytearray(stride), set[tuple[int, ...]]()
    for y in range(height):
        row = bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        unfilter(raw[y * (stride + 1)], row, above, step)
        colours |= {tuple(row[x : x + 3]) for x in range(0, stride, step)}
        above = row
    return width, height, colours


def unfilter(method: int, row: bytearray, above: bytearray, step: int) -> None:
    """PNG's five predictors, in place."""
    for x in range(len(row) if method else 0):
        left, up = (row[x - step], above[x - step]) if x >= step else (0, 0)
        over = above[x]
        guess = left + over - up
        paeth = min((left, over, up), key=lambda v: abs(guess - v))
        row[x] = (row[x] + (0, left, over, (left + over) // 2, paeth)[method]) & 255


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page was not looked at (apt-get install chromium)")
@pytest.mark.parametrize(("ok", "wide"), [(True, 1100), (False, 420)])
def test_a_browser_draws_the_page(ok: bool, wide: int, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    probe = (
        "<script>document.title=[document.documentElement.scrollWidth<=innerWidth,[...document.querySelectorAll('svg')]"
    )
    probe += ".every(s=>s.getBoundingClientRect().width>40),document.querySelectorAll('figure').length].join()</script>"
    page.write_text(to_html(a_report(ok=ok)) + probe, encoding="utf-8")
    drawn = browse(tmp_path, f"--window-size={max(wide, 500)},900", "--dump-dom", page.as_uri())
    title = re.search(r"<title>(.*?)</title>", drawn)

    assert title is not None
    assert title[1] == f"true,true,{6 if ok else 7}"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page was not looked at (apt-get install chromium)")
def test_red_and_green_and_blue_reach_the_screen(tmp_path: Path) -> None:
    for ok, seal in ((True, (0x14, 0x80, 0x5A)), (False, (0xC8, 0x32, 0x3F))):
        page, picture = tmp_path / "report.html", tmp_path / "report.png"
        page.write_text(to_html(a_report(ok=ok)), encoding="utf-8")
        browse(tmp_path, "--window-size=800,2400", f"--screenshot={picture}", page.as_uri())
        width, height, colours = pixels(picture)
        assert (width, height) == (800, 2400)
        # the fonts of the machine decide where a thin line falls between two pixels, and so how much of it each gets
        for wanted in (seal, (0x2F, 0x66, 0xD8)):
            assert min(max(abs(a - b) for a, b in zip(wanted, seen, strict=True)) for seen in colours) < 24


def test_a_report_that_cannot_be_saved_is_not_lost(tmp_path: Path) -> None:
    report = a_report(ok=True)

    assert keep_report(report, tmp_path) == report
    assert (tmp_path / "mdl-report.json").is_file()
    *others, note = keep_report(report, tmp_path / "none").notes
    assert others == list(report.notes)
    assert note.startswith("the report can't be saved in the layout (No such file or directory)")

"""The hostile corpus: every thing in it is refused, or handled, by name. `pytest -v` of this file reads as the list."""

import json
import os
import re
import subprocess
import sys
import time
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import corpus
import pytest
from corpus import BREAKS, CASES, SOUND, TEXTS

from shared.core.archives import ArchiveError
from shared.core.errors import UserError
from shared.data.images import PictureError
from shared.data.readers import karpathy_records, parquet_records

ROOT = Path(__file__).resolve().parents[2]
REFUSED = [name for name, case in CASES.items() if case.refused]
HANDLED = [name for name, case in CASES.items() if not case.refused]
BOMBS = [name for name, case in CASES.items() if case.bomb]


@pytest.mark.parametrize("name", SOUND)
def test_sound(name, tmp_path):
    case = SOUND[name]
    assert case.read(case.make(tmp_path)) == case.gives


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> the path of a case, made once."""
    places = {}

    def make(name):
        if name not in places:
            places[name] = (SOUND | CASES)[name].make(tmp_path_factory.mktemp("case"))
        return places[name]

    return make


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case, path = CASES[name], made(name)
    there = sorted(path.parent.rglob("*"))
    with pytest.raises((UserError, PictureError, ArchiveError), match=case.refused) as caught:
        case.read(path)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 1500
    if isinstance(caught.value, UserError):  # the others speak of one picture or one member, for their caller to name
        assert path.name in line or line.startswith(("thing: ", "set: ", "karpathy: "))
    assert sorted(path.parent.rglob("*")) == there and not list(tmp_path.iterdir())  # nothing ran, nothing was unpacked


@pytest.mark.parametrize("name", HANDLED)
def test_handled(name, made):
    case, path = CASES[name], made(name)
    there = sorted(path.parent.rglob("*"))
    assert case.read(path) == case.gives
    assert sorted(path.parent.rglob("*")) == there


@pytest.fixture(scope="module")
def peaks(made):
    """{bomb: megabytes that a fresh process grew by on reading it}; sound files of every reader went before."""
    places = {name: str(made(name)) for name in [*SOUND, *BOMBS]}
    done = subprocess.run(
        [sys.executable, corpus.__file__],
        input=json.dumps(places),
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux's /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_not_inflated(name, peaks):
    assert peaks[name] < 40  # megabytes; most promise 64 to many thousands


# --- texts


@pytest.fixture(scope="module")
def tokenizers():
    from shared.tokenizers.clip import ClipTokenizer
    from shared.tokenizers.small_bpe import SmallTokenizer

    clip, small = ClipTokenizer(), SmallTokenizer.train(["a photo of a cat", "the dog runs"] * 9, 300)
    clip.encode("caf\u00e9")  # its first text costs seconds of imports
    return clip, small


@pytest.mark.parametrize("name", TEXTS)
def test_tokenised(name, tokenizers):
    for tokenizer in tokenizers:
        started = time.process_time()
        ids = tokenizer([TEXTS[name]], 77)
        assert time.process_time() - started < 10
        assert ids.shape == (1, 77) and int(ids.min()) >= 0 and int(ids.max()) < tokenizer.vocab_size
        assert ids[0, 0] == tokenizer.start and (ids[0] == tokenizer.end).any()
        assert isinstance(tokenizer.decode(ids[0]), str)


def test_long_words_are_not_remembered(tokenizers):
    from shared.tokenizers.clip import _ids_of

    _ids_of.cache_clear()
    tokenizers[0].encode("cat " + "z" * 101 + " " + "z" * 5000)
    assert _ids_of.cache_info().currsize == 1
    _ids_of("cat")
    assert _ids_of.cache_info().hits == 1


@pytest.mark.parametrize("name", TEXTS)
def test_learnt_from(name):
    from shared.tokenizers.small_bpe import SmallTokenizer

    started = time.process_time()
    tokenizer = SmallTokenizer.train([TEXTS[name], "a photo of a cat"], 300)
    assert time.process_time() - started < 30
    assert tokenizer.vocab_size <= 300 and len(tokenizer.encode("a photo of a cat")) <= 16


@pytest.mark.parametrize("name", TEXTS)
def test_read_as_a_caption_and_as_a_label(name, tmp_path):
    text = TEXTS[name]
    root = corpus.captioned(sentences=[{"raw": text}])(tmp_path)
    (record,) = karpathy_records(root)["train"]
    assert record.captions == (" ".join(text.split()),)
    assert not set(BREAKS) & set(record.captions[0])
    if text.isascii() or text.encode("utf-8", "ignore").decode() == text:  # parquet holds no halves
        (labelled,) = parquet_records(corpus.parquet_row(b"", text)(tmp_path))
        assert not set(BREAKS) & set(labelled.label) and labelled.label.strip() == labelled.label


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes: what a browser acts on, without the texts."""

    def __init__(self, page):
        super().__init__()
        self.seen, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data):
        self.text.append(data)


def report_of(text):
    from shared.report.rows import Figure, Ranked, Report, Row, Sample

    png = corpus.drawn(form="PNG")
    account = {"name": text, "expected": 2, "read": 1, "dropped": {text: text}, "digest": text}
    rows = [
        Row("claims", "clip.a", text, text, 0.5, 0.1, 0.9, text, [1], "reproduced", text),
        Row("metrics", "clip.b", text, text, text, tolerance=text, verdict="match", source=text),
        Row("metrics", f"clip.{text}", text, text, verdict="not run", need=text, source=text),
    ]
    return Report(
        "clip", text, "mini", "abc", False, {"name": text, "coverage": [account], "note": text, "credits": [text]},
        {"cpu": text, "gpus": [text]}, 1.0, "2026-01-01", rows, [Figure(text, text, png)],
        [Sample(png, text, [Ranked(text, 0.5, True), Ranked(text, 0.4, False)])], f"make {text}",
    )  # fmt: skip


def shown(report):
    """{where: its text}"""
    from shared.report.html import page
    from shared.report.text import brief, markdown, terminal_table

    rows = [*report.rows, *brief(report)]
    return {"terminal": terminal_table(rows, 100), "Markdown": markdown(report), "page": page(report)}


@pytest.mark.parametrize("name", TEXTS)
def test_shown(name):
    started = time.process_time()
    plain, hostile = shown(report_of("plain")), shown(report_of(TEXTS[name]))
    assert time.process_time() - started < 10
    for place, text in hostile.items():
        unseen = {
            c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn")
        }
        assert not unseen, (place, unseen)
        assert text.splitlines() == text.split("\n")[:-1] or place == "page"
        assert len(text) < 400_000, place
    assert Tags(hostile["page"]).seen == Tags(plain["page"]).seen
    assert len(hostile["Markdown"].splitlines()) == len(plain["Markdown"].splitlines())
    assert cells(hostile["Markdown"]) == cells(plain["Markdown"])
    rendered = re.sub(
        r"^```$.*?^```$", "", hostile["Markdown"], flags=re.M | re.S
    )  # all but the command, which is code
    assert not re.search(r"(?<!\\)<", rendered)
    for line in hostile["terminal"].splitlines():
        assert sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in line) <= 130


def cells(markdown):
    """How many cells each row of its tables has."""
    return [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")]

"""What stands in the files of a report: complete, escaped, offline, rung by rung, and nothing filled in."""

import io
import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from shared.core.errors import UserError
from shared.metrics import stats
from shared.report import plots as figures
from shared.report import rows
from shared.report import text as as_text
from shared.report.rows import Figure, Ranked, Report, Row, Sample
from shared.report.text import terminal_table
from shared.report.write import compare, read_report, write

ROWS = [
    Row("structure", "params", "Parameters", 151277313, 151277313, tolerance=0, verdict="match", source="Table 20"),
    Row("structure", "tokens", "Image tokens", 50, 49, tolerance=0, verdict="mismatch", source="Sec. 2"),
    Row("parity", "forward", "Largest difference", None, 3.1e-7, tolerance=1e-5, seeds=3, verdict="match"),
    Row("claims", "a", "Contrast wins", "4x", 0.06, 0.04, 0.08, "effect > 0", [0, 1, 2], "reproduced", "Fig. 2"),
    Row("claims", "b", "Ensembles win", "+3.5", 0.01, -0.01, 0.03, "effect > 0", [0, 1, 2], "inconclusive", "Fig. 4"),
    Row("claims", "c", "Heat wins", None, -0.03, -0.05, -0.01, "effect > 0", [0, 1, 2], "contradicted", "Sec. 2.3"),
    Row("metrics", "d", "ImageNet top-1", 63.2, tolerance=0.1, source="Table 11", need="make reproduce SCALE=paper"),
]


def png():
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(content, "PNG")
    return content.getvalue()


def example(**changes):
    fields = {
        "paper": "clip",
        "title": "Learning Transferable Visual Models",
        "scale": "mini",
        "commit": "0123456789abcdef",
        "dirty": False,
        "data": {
            "name": "emoji",
            "digest": "sha256:00",
            "coverage": [{"split": "train", "declared": 10, "read": 9}],
            "credits": ["Noto Emoji, Apache-2.0"],
            "note": None,
        },
        "machine": {"cpu": "some cpu", "cores": 2, "gpus": [], "python": "3.11"},
        "seconds": 125.0,
        "started": "2026-01-01T00:00:00+00:00",
        "rows": ROWS,
        "figures": [Figure("Training curves", "Loss by step", png())],
        "samples": [Sample(png(), "Which caption?", [Ranked("a cat", 0.9, True), Ranked("a dog", 0.1, False)])],
        "command": "make reproduce PAPER=clip",
        "recipe": "seed: 0\n",
        "environment": "torch==2\n",
    }
    return Report(**fields | changes)


class Page(HTMLParser):
    """Tags with their attributes, and the text, section by section."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.sections, self._in = [], "", {}, None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._in = dict(attrs).get("id") or dict(attrs)["aria-labelledby"]

    def handle_endtag(self, tag):
        if tag == "section":
            self._in = None

    def handle_data(self, data):
        self.text += data
        if self._in:
            self.sections[self._in] = self.sections.get(self._in, "") + data


def page_of(content, folder):
    write(content, folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_every_file_is_there_and_no_half_written_one(tmp_path):
    assert write(example(), tmp_path / "run 1") == tmp_path / "run 1" / "report.json"
    found = {str(p.relative_to(tmp_path / "run 1")) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {
        "report.md",
        "report.html",
        "report.json",
        "recipe.yaml",
        "environment.txt",
        "figures/01-training-curves.png",
    }
    assert (tmp_path / "run 1" / "figures" / "01-training-curves.png").read_bytes() == png()
    assert (tmp_path / "run 1" / "recipe.yaml").read_text() == "seed: 0\n"


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    write(example(), tmp_path)
    before = (tmp_path / "report.json").read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        write(example(title="Another"), tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    assert not [p.name for p in tmp_path.rglob(".*")]


def test_the_json_has_exactly_the_keys_others_read(tmp_path):
    content = json.loads(write(example(), tmp_path).read_text(encoding="utf-8"))
    asked = {"paper", "scale", "commit", "data", "machine", "seconds", "rows"}
    assert set(content) == asked | {"title", "dirty", "started", "command", "figures"}
    row_keys = ["rung", "id", "what", "reported", "reproduced", "low", "high"]
    row_keys += ["tolerance", "seeds", "verdict", "source", "need"]
    assert [list(row) for row in content["rows"]] == [row_keys] * len(ROWS)
    assert content["rows"][3] == {
        "rung": "claims",
        "id": "a",
        "what": "Contrast wins",
        "reported": "4x",
        "reproduced": 0.06,
        "low": 0.04,
        "high": 0.08,
        "tolerance": "effect > 0",
        "seeds": [0, 1, 2],
        "verdict": "reproduced",
        "source": "Fig. 2",
        "need": "",
    }
    assert content["rows"][6]["reproduced"] is None and content["data"]["coverage"][0]["read"] == 9


def test_a_report_is_read_back_as_it_was_written(tmp_path):
    written = example()
    found = read_report(write(written, tmp_path))
    assert replace(found, figures=[], samples=[]) == replace(written, figures=[], samples=[])
    assert found.figures[0].image.read_bytes() == png()


def test_array_scalars_and_numbers_that_are_not_finite_make_valid_json(tmp_path):
    import numpy as np

    rows = [
        Row("parity", "x", "Difference", None, np.float32(0.5), tolerance=1e-5, seeds=np.int64(3), verdict="mismatch"),
        Row("parity", "y", "Difference", None, math.nan, tolerance=1e-5, verdict="mismatch"),
    ]
    text = write(example(rows=rows), tmp_path).read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [row["reproduced"] for row in strict["rows"]] == [0.5, "nan"]
    assert strict["rows"][0]["seeds"] == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"paper": "clip"}', '{"paper": 1, "rows": [{"rung": "rumour"}]}'])
def test_a_file_that_is_no_report_is_named(text, tmp_path):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "report.json"))):
        read_report(tmp_path / "report.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_report(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    "wrong",
    [
        {"rung": "rumour"},
        {"verdict": "match"},  # not a word of the claims rung
        {"verdict": "reproduced", "reproduced": None},
        {"verdict": "not run", "need": ""},
        {"verdict": "not run", "need": "data", "reproduced": 0.5},
        {"low": 0.1},
    ],
)
def test_a_row_that_contradicts_itself_is_refused(wrong):
    row = {"rung": "claims", "id": "a", "what": "x", "reproduced": 0.2, "verdict": "inconclusive"}
    with pytest.raises(ValueError):
        Row(**row | wrong)


def test_a_smoke_run_yields_no_verdict():
    with pytest.raises(ValueError, match="yields no verdict"):
        example(scale="smoke")
    assert example(scale="smoke", rows=[r for r in ROWS if r.rung in ("structure", "parity", "metrics")])


EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def evil_report():
    row = Row("claims", EVIL, EVIL, EVIL, EVIL, None, None, EVIL, None, "inconclusive", EVIL, "")
    waiting = Row("metrics", EVIL, EVIL, EVIL, source=EVIL, need=EVIL)
    listed = Row("parity", "x", "y", None, 0.1, 0.0, 0.2, seeds=[EVIL], verdict="match")
    return example(
        paper=EVIL,
        title=EVIL,
        scale=EVIL,
        commit=EVIL,
        dirty=True,
        started=EVIL,
        command=EVIL,
        recipe=EVIL,
        environment=EVIL,
        data={key: EVIL for key in ("name", "digest", "note")} | {"coverage": [{EVIL: EVIL}], "credits": [EVIL]},
        machine={"cpu": EVIL, "gpus": [EVIL], "cores": EVIL, "system": EVIL, "python": EVIL, "torch": EVIL},
        rows=[row, waiting, listed],
        figures=[Figure(EVIL, EVIL, png())],
        samples=[Sample(png(), EVIL, [Ranked(EVIL, 0.5, False)])],
    )


def test_no_text_from_outside_becomes_markup(tmp_path):
    _, page = page_of(evil_report(), tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in page.tags if tag == "img")
    # and it is shown, not dropped: every field arrives as text (the commit is cut short in the header)
    assert page.text.count(EVIL) >= 24
    plain = {(tag, tuple(attrs)) for tag, attrs in Page(page_of(example(), tmp_path / "plain")[0]).tags}
    assert {(tag, tuple(attrs)) for tag, attrs in page.tags} - plain == {
        ("p", ("class",)),
        ("span", ("title",)),
    } - plain


def test_markdown_and_terminal_hold_no_markup_and_no_control_characters(tmp_path):
    write(evil_report(), tmp_path)
    text = (tmp_path / "report.md").read_text()
    outside_fences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<script" not in outside_fences.replace("\\<script", "") and "\\<script" in outside_fences
    row = Row("parity", "x", "a|b\x1b[31m\nc", None, 0.1, verdict="match")
    assert "\x1b" not in terminal_table([row], 100, colour=False)
    line = next(line for line in as_text.markdown(example(rows=[row])).splitlines() if "a\\|b" in line)
    assert line.count("|") - line.count("\\|") == 9


def test_the_page_loads_nothing_and_forbids_it(tmp_path):
    html, page = page_of(example(title="see https://example.invalid/paper"), tmp_path)
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            if name in attrs:
                assert attrs[name].startswith(("data:", "#")), (tag, attrs)
    assert not {"link", "script", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert "url(" not in html and "@import" not in html
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert "default-src 'none'" in policy


def test_every_rung_has_its_own_section_and_only_its_own_rows(tmp_path):
    _, page = page_of(example(), tmp_path)
    for rung in rows.RUNGS:
        for row in ROWS:
            assert (row.what in page.sections[rung]) == (row.rung == rung), (rung, row.what)
        assert "prove" in page.sections[rung] or "tests the direction" in page.sections[rung]


def test_the_header_counts_verdicts_rung_by_rung(tmp_path):
    html, _ = page_of(example(), tmp_path)
    header = Page(html[html.index("<header>") : html.index("</header>")]).text
    for words in ("1 match", "1 mismatch", "1 reproduced", "1 inconclusive", "1 contradicted", "1 not run"):
        assert words in header
    assert example().counts("structure") == {"match": 1, "mismatch": 1}


def test_a_row_that_was_not_run_says_what_it_needs_everywhere(tmp_path):
    _, page = page_of(example(), tmp_path)
    assert "Needs: make reproduce SCALE=paper" in page.sections["metrics"]
    assert "Needs: make reproduce SCALE=paper" in (tmp_path / "report.md").read_text()
    assert "needs: make reproduce SCALE=paper" in terminal_table(ROWS, 100)


def test_the_interval_bar_puts_zero_and_the_interval_where_they_belong(tmp_path):
    html, page = page_of(example(), tmp_path)
    bars = re.findall(r'class="zero" x1="([\d.]+)".*?class="span" x1="([\d.]+)" x2="([\d.]+)".*?cx="([\d.]+)"', html)
    assert len(bars) == 3  # claims with an interval
    (won, open_, lost) = [tuple(map(float, bar)) for bar in bars]
    assert won[0] < won[1] < won[3] < won[2]
    assert open_[1] < open_[0] < open_[3] < open_[2]
    assert lost[1] < lost[3] < lost[2] < lost[0]
    assert any(a.get("aria-label") == "effect 0.06, 95 % interval 0.04 to 0.08" for t, a in page.tags if t == "svg")


def test_the_page_can_be_read_aloud(tmp_path):
    _, page = page_of(example(), tmp_path)
    tags = [tag for tag, _ in page.tags]
    assert {"header", "main", "nav", "footer"} <= set(tags) and tags.count("h1") == 1
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [a[key].lstrip("#") for _, a in page.tags for key in ("href", "aria-labelledby") if key in a]
    assert set(targets) <= set(ids)


def test_changed_sources_and_smoke_are_said_at_the_top(tmp_path):
    html, _ = page_of(example(dirty=True), tmp_path)
    assert "does not count as evidence" in html[: html.index("</header>")]
    smoke = example(scale="smoke", rows=ROWS[:3])
    html, _ = page_of(smoke, tmp_path)
    assert "yields no verdict" in html[: html.index("</header>")]
    assert "Nothing is declared on this rung" in html


def test_the_terminal_table_keeps_its_width_and_colours_only_a_terminal(capsys):
    for width in (60, 80, 120):
        plain = terminal_table(ROWS, width)
        assert max(map(len, plain.splitlines())) <= max(width, 85)
        assert "\x1b" not in plain
    headings = [line.split()[0] for line in plain.splitlines() if line[:3].isupper()]
    assert headings == ["STRUCTURE", "PARITY", "CLAIMS", "METRICS"]
    assert re.search(r"Contrast wins +\| 4x +\| \+0\.06 +\| \[\+0\.04, \+0\.08\] +\| reproduced", plain)
    coloured = terminal_table(ROWS, 120, colour=True)
    assert "\x1b[32mmatch" in coloured and re.sub(r"\x1b\[\d+m", "", coloured) == plain
    assert terminal_table([]) == "no rows\n"


def test_the_comparison_has_a_line_a_paper_and_scale_and_sums_nothing_across_rungs(tmp_path):
    paths = [
        write(example(paper=paper, scale=scale, dirty=dirty), tmp_path / paper / scale)
        for paper, scale, dirty in (("clip", "mini", True), ("blip", "mini", False), ("blip", "gpu", False))
    ]
    lines = compare(paths).splitlines()
    assert [line.split()[:2] for line in lines[2:5]] == [["blip", "gpu"], ["blip", "mini"], ["clip", "mini"]]
    assert "1 match, 1 mismatch" in lines[2] and "1 reproduced, 1 inconclusive, 1 contradicted" in lines[2]
    assert "0123456789+" in lines[4] and "0123456789+" not in lines[2] and lines[5].startswith("+ ")
    assert "make reproduce" in compare([])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (151277313, "151,277,313"),
        (0, "0"),
        (0.0, "0"),
        (88.0, "88.0"),
        (63.25, "63.25"),
        (1234.56, "1,234.6"),
        (3.1e-7, "3.1e-07"),
        (1.758e10, "1.758e+10"),
        (-0.031, "-0.031"),
        (math.nan, "nan"),
        ("n/a", "n/a"),
    ],
)
def test_numbers_are_shown_for_people(value, text):
    assert as_text.show(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(41.6, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (59.7, "1 min 0 s")]
)
def test_durations_are_shown_for_people(seconds, text):
    assert as_text.duration(seconds) == text


# figures


def drawn(figure):
    from PIL import Image

    picture = Image.open(io.BytesIO(figure.image))
    picture.load()
    assert picture.format == "PNG" and len(figure.image) < 300_000
    assert figure.name and figure.caption
    return picture


def test_curves_of_uneven_seeds_are_drawn():
    seeds = [[(0, 3.0), (10, 2.0), (20, 1.0)], [(0, 2.5), (15, 1.5)], [(5, math.nan)]]
    drawn(figures.curves({"$baseline": seeds, "one point": [[(0, 1.0)]]}, y_label="loss"))
    with pytest.raises(UserError, match="no points"):
        figures.curves({"baseline": [[]]})


def test_learning_curves_are_of_arms_whose_every_seed_recorded_them():
    point = {"curves": {"loss": [(0, 1.0), (1, 0.5)]}}
    seeds = [{"a": point, "b": point, "measured only": {"r1": 1.0}}, {"a": point, "b": {"curves": {}}}]
    [figure] = figures.learning_curves(seeds, "loss", name="Loss")
    assert (figure.name, figure.caption) == ("Loss", figures.SPREAD)
    assert figure.image == figures.curves({"a": [point["curves"]["loss"]] * 2}, name="Loss", x_label="pairs seen").image
    assert figures.learning_curves(seeds, "loss", name="Loss", arms=["b"]) == []
    assert figures.learning_curves(seeds, "r1", name="R@1") == []


def test_pictures_stand_over_their_texts_whatever_is_written(recwarn):
    import torch
    from PIL import Image

    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    texts = [("$x\x1b\n", True), ("word " * 50, False), ("字", None), ("", None)]
    drawn(figures.image_grid([(image, texts)] * 5 + [(Image.new("RGB", (4, 4)), [])], name="Grid", caption="c"))
    drawn(figures.image_grid([], name="Grid", caption="nothing to show"))
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]
    assert figures._wrapped("a " * 40, 20, 2).count("\n") == 1 and figures._wrapped("a " * 40, 20, 2).endswith("…")


def test_the_plane_centres_each_modality_and_says_so():
    import torch

    torch.manual_seed(0)
    words = torch.randn(4, 8)
    labels = torch.arange(40) % 4
    pictures = words[labels] + 0.1 * torch.randn(40, 8)
    centred = figures._centred(pictures.numpy() + 100.0)
    assert (centred.mean(0) ** 2).sum() < 0.2  # uncentred, the 100 drowns everything and this is 1
    figure = figures.embedding_plane(pictures, words, labels, ["a", "b_$x$", "c", "d"], most=30)
    drawn(figure)
    assert "30 pictures" in figure.caption and "centred" in figure.caption
    with pytest.raises(UserError, match="expected a label a picture"):
        figures.embedding_plane(pictures, words, labels, ["a"])


def test_confusion_scaling_and_effects_are_drawn():
    import numpy as np

    drawn(figures.confusion_matrix(np.eye(3) * 5, ["a", "b", "c"]))
    drawn(figures.confusion_matrix(np.zeros((25, 25)), [str(i) for i in range(25)]))
    x, y = [1e3, 1e4, 1e5], [0.9, 0.5, 0.3]
    figure = figures.log_log(x, y, stats.log_log_fit(x, y), x_label="pairs")
    drawn(figure)
    assert "pairs" in figure.caption
    drawn(
        figures.bars({"a": stats.interval([0.1, 0.2, 0.3]), "b": stats.interval([0.1]), "$c" * 40: (-0.1, -0.2, 0.0)})
    )
    with pytest.raises(UserError, match="matrix is"):
        figures.confusion_matrix(np.eye(3), ["a"])


def test_pictures_are_shown_with_their_best_texts_first_and_which_of_them_are_right():
    import torch

    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    scores = torch.arange(36.0).view(12, 3)[:, [1, 2, 0]] / 10
    found = figures.retrieval_examples(
        scores,
        images,
        [f"query {i}" for i in range(12)],
        ["a", "b", "c"],
        lambda row, text: row % 3 == text,
        examples=4,
        most=2,
    )
    assert [one.query for one in found] == ["query 0", "query 3", "query 6", "query 9"]
    assert found[1].image == figures.png(images[3])
    assert found[1].ranked == [rows.Ranked("b", 1.1, False), rows.Ranked("a", 1.0, True)]
    assert (
        len(figures.retrieval_examples(scores[:, :1], images, "q" * 12, ["a"], lambda row, text: True)[0].ranked) == 1
    )


def test_equal_data_give_equal_files():
    effects = {"a": (0.1, 0.0, 0.2)}
    assert figures.bars(effects).image == figures.bars(effects).image


@pytest.mark.parametrize("dropped", [[], ["7.jpg: cut", "9.jpg: no picture"], {}, {"7.jpg": "cut"}])
def test_the_account_of_a_published_set_can_be_shown(dropped):
    account = {"name": "cifar10 test", "expected": 10, "read": 8, "dropped": dropped, "digest": "ab"}
    shown = dict(as_text.data_lines({"name": "cifar10", "coverage": [account]}))
    lines = " ".join(str(value) for value in shown.values())
    assert "expected 10" in lines and "read 8" in lines
    assert ("7.jpg" in lines) == bool(dropped)

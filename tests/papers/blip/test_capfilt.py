"""CapFilt's decisions and the page that shows them; captions as BLIP writes them."""

import json
import re
from dataclasses import replace

import pytest
import torch

from papers.blip.config import SPECIALS, VARIANTS, with_tokenizer
from papers.blip.data import ExperimentData, RetrievalSet, Text
from papers.blip.encode import GenerationConfig, ending, match_probability, tokens_of, write
from papers.blip.evidence.capfilt import judged, kept_of, named
from papers.blip.evidence.capfilt_page import Decision, counts, read_lines, write_lines, write_page
from papers.blip.model import Blip
from shared.core.errors import UserError
from shared.data.dataset import DatasetBundle, Split
from shared.nn.generation import RELEASED_BEAMS
from shared.tokenizers.small_bpe import SmallTokenizer

WORDS = ["a picture of a red circle", "a picture of a blue square", "there is a green star in the picture"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return SmallTokenizer.train(WORDS, 300, SPECIALS)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return Blip(with_tokenizer(VARIANTS["blip-tiny"](), tokenizer)).eval()


def pictures(count):
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1)).byte()


def a_lab(tokenizer, captions, **train):
    images = pictures(len(captions))
    split = Split([f"p{i}" for i in range(len(captions))], images, captions, **train)
    dataset = DatasetBundle(name="toy", train=split, val=split, test=split, classes=["circle", "star"])
    config = with_tokenizer(VARIANTS["blip-tiny"](), tokenizer)
    return ExperimentData(dataset, tokenizer, config, [], [], RetrievalSet(images, ["x"], torch.tensor([0])))


# ---- decisions


DECISIONS = [
    Decision(0, "p0", "web", "a cat\u2028<script>alert(1)</script>", 0.2, False),
    Decision(0, "p0", "written", "a \x1b[31mred\u202e cat", 0.9, True),
    Decision(1, "p1", "web", "a dog", 0.5, False),
    Decision(1, "p1", "written", "", 0.0, None),
]


def test_a_text_is_kept_from_one_half_on_and_right_where_the_truth_says_so():
    assert [one.kept for one in DECISIONS] == [False, True, True, False]
    assert [one.right for one in DECISIONS] == [True, True, False, None]


def test_lines_come_back_as_they_were_written_whatever_is_in_them(tmp_path):
    path = tmp_path / "d.jsonl"
    write_lines(path, DECISIONS)
    assert read_lines(path) == DECISIONS
    first = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    assert first["kept"] is False and first["right"] is True


def test_counts_by_origin():
    assert counts(DECISIONS) == {
        "web": {"texts": 2, "dropped": 1, "known": 2, "false dropped": 1, "kept": 1, "false kept": 1},
        "written": {"texts": 2, "kept": 1, "known": 1, "true kept": 1, "dropped": 1},
    }


def test_the_page_is_whole_escaped_and_asks_the_network_for_nothing(tmp_path):
    path = tmp_path / "page.html"
    write_page(path, DECISIONS, pictures(2), "What <b>it</b> did", "a & b")
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text and "What &lt;b&gt;it" in text and "a &amp; b" in text
    assert "\x1b" not in text and "\u202e" not in text and "\u2028" not in text and "\\x1b[31mred" in text
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', text) and text.count("<img") == 2
    assert "web&#39;s text dropped, the written one kept: 1 pictures" in text
    assert "kept, wrongly, match 0.50" in text and "dropped, rightly, match 0.20" in text
    for tag in ("details", "article", "div", "main"):
        assert text.count(f"<{tag}") == text.count(f"</{tag}>")


def test_many_pictures_come_in_sections(tmp_path):
    decisions = [Decision(i, f"p{i}", "web", "x", 0.9) for i in range(120)]
    path = tmp_path / "page.html"
    write_page(path, decisions, pictures(120), "t", "n")
    text = path.read_text()
    assert re.findall(r"<summary>(.+?)</summary>", text) == ["1 to 50", "51 to 100", "101 to 120"]
    assert text.count("<img") == 120 and "unknown" not in text, "no column of what nobody knows"


def test_large_pictures_are_kept_small(tmp_path):
    path = tmp_path / "page.html"
    images = torch.randint(0, 256, (1, 3, 96, 96)).byte()
    write_page(path, [Decision(0, "p0", "web", "x", 0.9)], images, "t", "n")
    assert "data:image/jpeg" in path.read_text() and path.stat().st_size < 20_000


# ---- the filter


def test_the_filter_judges_each_text_beside_its_own_picture(model, tokenizer):
    data = a_lab(tokenizer, [["a"]] * 3)
    texts = [Text(2, "a red circle", True), Text(0, "a blue square in the picture", False)]
    found = judged(model, data, texts, "web")
    tokens = tokens_of(tokenizer, [text.text for text in texts], model.config)
    alone = [match_probability(model, tokens[[i]], data.dataset.train.images[[row]]) for i, row in enumerate((2, 0))]
    assert [one.match for one in found] == pytest.approx([float(p) for p in alone], abs=1e-4)
    assert [(one.picture, one.id, one.origin, one.true) for one in found] == [
        (2, "p2", "web", True), (0, "p0", "web", False)
    ]  # fmt: skip


def test_a_text_of_no_words_is_dropped(model, tokenizer):
    found = judged(model, a_lab(tokenizer, [["a"]]), [Text(0, " "), Text(0, "")], "written")
    assert [one.match for one in found] == [0.0, 0.0] and kept_of(found) == []


def test_a_written_text_is_true_if_it_names_the_one_thing_shown(tokenizer):
    labels, noisy = torch.tensor([0, 1, -1]), torch.zeros(3, dtype=torch.bool)
    dataset = a_lab(tokenizer, [["a"]] * 3, labels=labels, noisy=noisy).dataset
    assert (
        named(dataset, 0, "a red circle")
        and not named(dataset, 0, "some circles")
        and not named(dataset, 1, "a circle")
    )
    assert named(dataset, 2, "a circle") is None, "several things"
    assert named(a_lab(tokenizer, [["a"]], labels=labels[:1]).dataset, 0, "a circle") is None, "not a scene"


# ---- captions


def test_captions_come_without_the_prompt_and_within_their_lengths(model, tokenizer):
    for how in (
        GenerationConfig("a picture of", longest=9, shortest=7),
        GenerationConfig("a picture of", nucleus=0.9, longest=9),
    ):
        given = len(how.prompt_tokens(tokenizer))
        settings = how.settings(tokenizer)
        assert settings.max_new_tokens == 9 - given
        said = write(model, tokenizer, pictures(3), how)
        assert len(said) == 3 and all(len(tokenizer.encode(text)) <= 2 * (9 - given) for text in said)
    assert GenerationConfig("a picture of", shortest=7).settings(tokenizer).min_new_tokens == 7 - given


def test_sampling_is_what_the_official_call_comes_to(tokenizer):
    settings = GenerationConfig("a picture of", nucleus=0.9).settings(tokenizer)
    assert (settings.sample, settings.top_p, settings.top_k, settings.repetition_penalty) == (True, 0.9, 50, 1.1)
    beam = GenerationConfig("a picture of").settings(tokenizer)
    assert beam.repetition_penalty == 1.0 and beam == replace(beam, **RELEASED_BEAMS)


def test_nucleus_sampling_follows_from_seed_and_order_not_from_batches(model, tokenizer):
    how, images = GenerationConfig("", nucleus=0.9, seed=5, longest=10), pictures(5)
    whole = write(model, tokenizer, images, how)
    assert whole == write(model, tokenizer, images, how, batch=2)
    generator = torch.Generator().manual_seed(5)
    pieces = [write(model, tokenizer, some, how, generator=generator) for some in images.split(2)]
    assert whole == [text for piece in pieces for text in piece]
    assert whole != write(model, tokenizer, images, replace(how, seed=6))
    assert how.settings(tokenizer).repetition_penalty == 1.1, "as the official code has it"


def test_a_prompt_that_leaves_no_room_is_refused(tokenizer):
    with pytest.raises(UserError, match="no room for a caption"):
        GenerationConfig("a picture of a red circle", longest=4).settings(tokenizer)


def test_of_a_dialogue_that_is_too_long_the_end_stays(tokenizer):
    row = ending(tokenizer, "a red circle a blue square", 5)
    assert row[0] == tokenizer.start and row[-1] == tokenizer.end
    assert row[1:-1].tolist() == tokenizer.encode("a red circle a blue square")[-3:]
    short = ending(tokenizer, "a", 6)
    assert short.tolist()[-3:] == [tokenizer.pad] * 3

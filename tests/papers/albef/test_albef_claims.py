"""The effects of ALBEF's claims on measurements whose answer is known, what they are measured on, and bad input."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from papers.albef import data as data
from papers.albef.data import EvalSet, build_data, by_class, exchanged, load
from papers.albef.encode import Pictures, Texts, pools_score, reranked, tokens_of
from papers.albef.evidence import claims
from papers.albef.evidence.claims import CLAIMS, gain_slope, gains
from papers.albef.evidence.grounding import covers, located
from papers.albef.evidence.transfer import hypotheses, questions, sentences
from papers.albef.recipe import AlbefRecipe
from shared.core.errors import UserError
from shared.data.dataset import Split
from shared.data.synthetic.minimal_pairs import DETAILS, graph, minimal_pairs
from shared.data.synthetic.scenes import SceneOptions
from shared.data.synthetic.sprites import load_pack
from shared.tokenizers.small_bpe import SmallTokenizer

SMALL = AlbefRecipe(
    paper="albef", model="albef-tiny", data="shapes", pairs=64, test_pairs=48, classes=8, objects=2, batch=16, pool=16,
    full=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def made():
    return build_data(SMALL, 3)


# ---- effects


def arm(itm, wrong=0.0, **others):
    return {"itm": itm, "wrong_captions": wrong} | others


def test_the_dose_response_is_the_slope_of_the_gain_in_points_per_ten_percent():
    measured = {
        "hard": arm(40.0), "distilled": arm(41.0),
        "hard_wrong_25": arm(30.0, 0.25), "distilled_wrong_25": arm(32.0, 0.25),
        "hard_wrong_50": arm(20.0, 0.5), "distilled_wrong_50": arm(23.0, 0.5),
    }  # fmt: skip
    assert [gain for _, gain in gains(measured)] == [1.0, 2.0, 3.0]
    assert gain_slope(measured) == pytest.approx(0.4), "two points from none to half, so 0.4 a tenth"
    flat = {name: one | {"itm": 5.0} for name, one in measured.items()}
    assert gain_slope(flat) == 0


def test_every_effect_is_treatment_minus_baseline_as_the_card_declares_them():
    measured = {name: arm(10.0 + place, 0.1 * place, itc=3.0, pairs=100) for place, name in enumerate(claims.ARMS)}
    measured["fused"] = {"itm_all": 20.0, "wrong_captions": 0.0}
    measured["aligned"]["itm_all"] = 26.0
    measured["distilled_more"]["pairs"] = 350

    def effect(id):
        return CLAIMS[id].effect(measured)

    def minus(treatment, baseline):
        return measured[treatment]["itm"] - measured[baseline]["itm"]

    assert effect("albef.itc") == 6.0
    assert effect("albef.hard_negatives") == minus("hard", "aligned")
    assert effect("albef.mod_itc") == minus("distilled_itc_wrong_25", "hard_wrong_25")
    assert effect("albef.mod_mlm") == minus("distilled_wrong_25", "distilled_itc_wrong_25")
    assert effect("albef.itm_rerank") == measured["hard"]["itm"] - 3.0
    assert effect("albef.data_4m_14m") == minus("distilled_more", "distilled")


def test_more_data_is_no_claim_where_the_set_does_not_hold_more():
    measured = {"distilled": arm(10.0, pairs=100), "distilled_more": arm(12.0, pairs=150)}
    assert CLAIMS["albef.data_4m_14m"].effect(measured) is None and "times" in CLAIMS["albef.data_4m_14m"].need


def test_arms_differ_in_what_their_claim_compares_and_in_nothing_else():
    arms = claims.ARMS
    assert arms["fused"].objective.itc is False and arms["aligned"].objective.itc is True
    assert arms["fused"].objective.negatives == arms["aligned"].objective.negatives == "random"
    assert arms["hard"].objective.negatives == "hard"
    for plain, taught in claims.DOSES:
        assert arms[plain].wrong == arms[taught].wrong
        assert arms[plain].objective.alpha_itc == arms[plain].objective.alpha_mlm == 0
        assert arms[taught].objective.alpha_itc == arms[taught].objective.alpha_mlm == 0.4
    only_itc = arms["distilled_itc_wrong_25"]
    assert (only_itc.objective.alpha_itc, only_itc.objective.alpha_mlm, only_itc.wrong) == (0.4, 0, 0.25)


# ---- wrong captions


def test_wrong_captions_are_another_pictures_and_a_larger_share_holds_a_smaller_one(made):
    train = made.dataset.train
    some, more = exchanged(train, 0.25, 3), exchanged(train, 0.5, 3)
    first = {row for row in range(len(train)) if some[row] != train.captions[row]}
    second = {row for row in range(len(train)) if more[row] != train.captions[row]}
    assert 0 < len(first) < len(second) < len(train) and first <= second
    assert all(some[row] == more[row] for row in first)
    assert all(captions in train.captions for captions in more)
    assert exchanged(train, 0.0, 3) == train.captions


def test_classes_are_kept_apart_and_a_set_of_one_wording_is_refused():
    split = Split(list("abcd"), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [["x"], ["y"], ["z"], ["y"]])
    split.labels = torch.tensor([0, 1, 0, 1])
    changed = exchanged(split, 1.0, 0)
    assert all(new == ["y"] for new in changed[::2]) and all(new in (["x"], ["z"]) for new in changed[1::2])
    split.captions = [["x"]] * 4
    with pytest.raises(UserError, match="picture a: no other picture has other captions"):
        exchanged(split, 1.0, 0)


def test_more_pairs_keep_the_own_captions_clean(made):
    more = data.more_pairs(made, SMALL, 3, 3.0, 0.5)
    own = data.pairs_of(made, 0.0, 3)
    assert len(more.tokens) == 3 * len(own.tokens) and 0 < more.wrong < 0.5
    width = min(more.tokens.shape[1], own.tokens.shape[1])
    assert torch.equal(more.tokens[: len(own.tokens), :width], own.tokens[:, :width])
    assert torch.equal(more.images[: len(own.images)], own.images)


# ---- near-misses


def test_near_misses_differ_in_the_one_detail_that_they_are_told_to():
    pack = load_pack("shapes")
    found = minimal_pairs(pack, "test", 60, size=32, seed=1, options=SceneOptions((1, 2)))
    assert len(found) == 60 and set(found.details) == {"", *DETAILS}
    assert len(set(found.captions)) == 60 and len({graph(scene) for scene in found.scenes}) == 60
    for row, detail in enumerate(found.details):
        base = next(r for r in range(row, -1, -1) if not found.details[r])
        one, other = found.scenes[base], found.scenes[row]
        if detail in ("colour", "thing"):
            (was, now), *_ = [(a, b) for a, b in zip(one.things, other.things, strict=True) if a != b]
            kept = "name" if detail == "colour" else "colour"
            assert getattr(was, kept) == getattr(now, kept) and (was.cell, was.size) == (now.cell, now.size)
        if detail == "place":
            assert {(t.name, t.colour) for t in one.things} == {(t.name, t.colour) for t in other.things}
            assert all(t.x - t.side / 2 >= 0 and t.x + t.side / 2 <= 1 for t in other.things)
        if detail == "count":
            assert abs(len(one.things) - len(other.things)) == 1
        assert found.near(row) == [r for r in range(60) if r != row and found.groups[r] == found.groups[row]]


def test_too_few_classes_for_so_many_different_scenes_are_named():
    pack = load_pack("shapes").subset(1)
    with pytest.raises(UserError, match="raise classes"):
        minimal_pairs(pack, "test", 400, size=16, options=SceneOptions((1, 1), small=0.0))


def test_no_group_is_cut_by_the_border_of_a_pool(made):
    rows = torch.cat(made.test.pools)
    assert torch.equal(rows, torch.arange(len(made.test.captions)))
    groups = {scene.id.split("-")[1]: [] for scene in made.test.scenes}
    for number, pool in enumerate(made.test.pools):
        for row in pool.tolist():
            groups[made.test.scenes[row].id.split("-")[1]].append(number)
    assert all(len(set(numbers)) == 1 for numbers in groups.values()) and len(made.test.pools) > 1


def test_captions_worded_by_class_alone_are_tested_in_pools_of_one_picture_a_class():
    labels = torch.tensor([0, 1, 0, 1, 2, 2, 2])
    split = Split([str(i) for i in range(7)], torch.arange(7)[:, None, None, None].expand(7, 3, 8, 8).byte(), [])
    split.labels = labels
    eval_set = by_class(split, ["cat", "dog", "ant"])
    assert [len(pool) for pool in eval_set.pools] == [3, 3]
    assert eval_set.captions[:3] == ["a photo of a cat", "a photo of a dog", "a photo of an ant"]
    assert labels[eval_set.images[:3, 0, 0, 0].long()].tolist() == [0, 1, 2]


# ---- scoring, with a model that knows the answers


class Knows(torch.nn.Module):
    """ITC sees the tens of a number only, ITM the number itself."""

    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.ones(()))

    def match(self, states, attention_mask, tokens):
        right = (states[:, 0, 0] == tokens[:, 0, 0]).float()
        return torch.stack([1 - right, right], 1)


def numbers(count):
    tens = torch.nn.functional.one_hot(torch.arange(count) // 10, 1 + count // 10).float()
    exact = torch.arange(count).float()[:, None, None]
    return Pictures(tens, exact), Texts(tens, exact, torch.ones(count, 1, dtype=torch.bool))


def test_itm_tells_apart_what_itc_cannot_and_only_among_the_candidates():
    pictures, texts = numbers(20)
    pools = [torch.arange(20)]
    assert pools_score(Knows(), pictures, texts, pools, 10) == (0.0, 100.0), "ITC's ties count as wrong"
    found = reranked(Knows(), pictures, texts, 10)
    assert (found.image_to_text[0, 10:] == -100).all() and (found.image_to_text[0, :10] > -100).all()


def test_a_pools_rows_are_no_candidates_for_anothers():
    pictures, texts = numbers(20)
    alone = [torch.tensor([0, 10]), torch.tensor([1, 11])]
    assert pools_score(Knows(), pictures, texts, alone, 1).itc == 100.0


# ---- words, boxes, tasks


def test_a_words_tokens_spell_it_and_its_box_covers_its_middle(made):
    found = list(located(made))
    assert found
    for one in found:
        tokens = made.tokens([made.test.captions[one.row]])[0]
        assert made.tokenizer.decode(tokens[one.first : one.last]) == one.word
        assert covers(one.thing, one.thing.x, one.thing.y)
        assert not covers(one.thing, one.thing.x, one.thing.y + one.thing.side)


def test_hypotheses_are_true_false_or_open_as_their_scene_says(made):
    train, test = hypotheses(made, SMALL, 3)
    assert set(train.labels.tolist()) == {0, 1, 2} and len(test.tokens) == len(test.images)
    from shared.data.synthetic.tasks import hypothesis

    for i in range(40):
        one = hypothesis(made.pack, "x", i, size=16)
        again = hypothesis(made.pack, "x", i, size=16)
        assert (one.text, one.verdict) == (again.text, again.verdict)


def test_questions_are_answered_from_the_answers_of_training_alone(made):
    train, test = questions(made, SMALL, 3)
    assert train.answers == test.answers == sorted(set(train.answers))
    assert train.labels.max() < len(train.answers) and test.labels.max() <= len(train.answers)
    pairs, _ = sentences(made, SMALL, 3)
    assert pairs.images.shape[1:] == (2, 3, 32, 32) and set(pairs.labels.tolist()) == {0, 1}


# ---- bad input


def test_an_empty_text_is_named():
    words = SmallTokenizer.train(["a cat"], 300, specials=("mask",))
    with pytest.raises(UserError, match="text 2 of 2 is empty"):
        tokens_of(words, ["a cat", "  "], 8)


def test_a_long_text_keeps_its_end_token_and_an_open_one_has_none():
    words = SmallTokenizer.train(["a cat"], 300, specials=("mask",))
    closed = tokens_of(words, ["a cat on a mat in a hat", "a"], 5)
    assert closed.shape == (2, 5) and closed[0, -1] == words.end
    still_open = tokens_of(words, ["a cat on a mat in a hat", "a"], 5, closed=False)
    assert still_open.shape == (2, 5) and not (still_open == words.end).any()
    assert still_open[1].tolist() == [words.start, *words.encode("a"), *[words.pad] * (4 - len(words.encode("a")))]


def karpathy(folder, captions, size=(16, 16)):
    """Three splits of one picture a list of captions."""
    folder.mkdir()
    images = []
    for split in ("train", "val", "test"):
        for i, several in enumerate(captions):
            name = f"{split}{i}.png"
            pixels = np.random.default_rng(len(images)).integers(0, 256, (*size, 3), dtype=np.uint8)
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "PNG")
            (folder / name).write_bytes(content.getvalue())
            images.append({"filename": name, "split": split, "sentences": [{"raw": text} for text in several]})
    (folder / "dataset.json").write_text(json.dumps({"dataset": "tiny", "images": images}))
    return folder


def titled(folder, captions, **others):
    values = {"data": "karpathy", "data_root": str(folder), "pairs": 40, "batch": 4, "test_pairs": 40, "pool": 4}
    return AlbefRecipe(paper="albef", model="albef-tiny", **(values | others))


def test_a_picture_without_a_caption_is_left_out_counted_and_named(tmp_path):
    root = karpathy(tmp_path / "set", [[f"thing number {i}"] for i in range(9)] + [["   "]])
    with pytest.raises(UserError, match=r"1 of 10 pictures cannot be read .*no caption.*max_dropped"):
        load(titled(root, None), 0)
    dataset = load(titled(root, None, max_dropped=0.1), 0)
    assert len(dataset.train) == 9 and dataset.coverage[0].reasons == {"it has no caption": 1}
    assert len(build_data(titled(root, None, max_dropped=0.1), 0).test.captions) == 9


def test_a_picture_of_one_pixel_is_a_picture(tmp_path):
    root = karpathy(tmp_path / "set", [[f"thing number {i}"] for i in range(8)], size=(1, 1))
    made = build_data(titled(root, None), 0)
    assert made.dataset.train.images.shape == (8, 3, 32, 32) and isinstance(made.test, EvalSet)


def test_captions_longer_than_the_context_are_counted_in_the_note(tmp_path):
    root = karpathy(tmp_path / "set", [[f"thing {i} " + "and so on " * 40] for i in range(8)])
    assert "8 of 8 training captions are longer than 24 tokens and lose their tail" in load(titled(root, None), 0).note


def test_a_batch_that_the_set_does_not_fill_is_named(tmp_path):
    root = karpathy(tmp_path / "set", [[f"thing number {i}"] for i in range(3)])
    with pytest.raises(UserError, match="3 captions do not fill a batch of 4"):
        load(titled(root, None), 0)

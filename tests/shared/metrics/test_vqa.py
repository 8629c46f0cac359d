"""VQA accuracy against values worked out by hand from the released script's rules, its bugs among them."""

from itertools import combinations

import pytest

from shared.core.errors import UserError
from shared.metrics import exact_match, vqa_accuracy
from shared.metrics.vqa import CONTRACTIONS, normalise


def score(prediction, answers, protocol="official"):
    return vqa_accuracy([prediction], [answers], protocol)[f"vqa/acc@{protocol}"].score


# of n equal answers, n leave-one-outs see n - 1 of them and 10 - n see n
@pytest.mark.parametrize(("equal", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
@pytest.mark.parametrize("protocol", ["official", "always"])
def test_accuracy_leaves_each_of_the_ten_answers_out_in_turn(equal, expected, protocol):
    by_hand = [min(1, sum(others) / 3) for others in combinations([1] * equal + [0] * (10 - equal), 9)]
    assert sum(by_hand) / 10 == pytest.approx(expected)
    assert score("red", ["red"] * equal + ["blue"] * (10 - equal), protocol) == pytest.approx(expected)


def test_a_period_costs_everything_in_the_official_script_where_all_ten_agree():
    assert score("Stop.", ["stop"] * 10) == 0 and score("stop", ["stop"] * 10) == 1
    assert score("Stop.", ["stop"] * 10, "always") == 1
    assert score("Stop.", ["stop"] * 9 + ["go"]) == score("Stop.", ["stop"] * 9 + ["go"], "always") == 1


def test_white_space_is_removed_before_it_is_asked_whether_all_agree():
    assert score("two dogs", ["two dogs"] * 5 + ["two\tdogs\n"] * 5) == 1  # the same ten: nothing is normalised
    assert score("2 dogs", ["two dogs"] * 5 + ["two\tdogs\n"] * 5) == 0
    assert score("2 dogs", ["two dogs"] * 5 + ["two\tdogs\n"] * 5, "always") == 1


def test_ten_equal_answers_of_which_one_is_written_otherwise_are_normalised():
    assert score("The Dog", ["dog"] * 9 + ["a dog"]) == 1


def test_the_score_of_a_set_is_the_mean_of_its_samples():
    scored = vqa_accuracy(["a", "b"], [["a"] * 10, ["b"] + ["c"] * 9], "official")["vqa/acc@official"]
    # the second is normalised: "b" is one of ten
    assert scored.samples == pytest.approx([1, 0.3]) and scored.score == pytest.approx(0.65)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The  Red\tDog", "red dog"),
        ("an apple a day", "apple day"),
        ("two", "2"),
        ("Ten", "10"),
        ("none", "0"),
        ("twenty", "twenty"),
        ("dont", "don't"),
        ("whos", "who's"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("shes", "shes"),  # not in the official table
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("t-shirt -", "tshirt"),  # once it stands beside a space, a sign vanishes everywhere
        ("yes!", "yes"),
        ("3,000", "3000"),
        ("1,2 a/b", "12 ab"),  # a comma between digits: every sign vanishes
        ("3.5", "3.5"),
        ("p.m.", "pm"),
        ("10.", "10"),  # a digit before the period does not save it
        (".5", ".5"),
        ("a." * 40, "a" * 32 + "a." * 8),  # 32 periods are removed, no more
        ("don't", "don't"),
        ("$5 & 10%: #1", "$5 & 10%: #1"),
        ("", ""),
        ("a", ""),
    ],
)
def test_normalisation_is_the_official_one_with_its_bugs(answer, normal):
    assert normalise(answer) == normal


def test_every_contraction_restores_one_apostrophe_but_for_the_one_written_the_wrong_way_round():
    assert len(CONTRACTIONS) == 114
    for written, restored in CONTRACTIONS.items():
        short, long = sorted((written, restored), key=len)
        assert any(short == long[:i] + long[i + 1 :] for i, sign in enumerate(long) if sign == "'")
        assert (len(written) > len(restored)) is (written == "somebody'd")


def test_exact_match_asks_for_one_of_the_answers_whatever_the_case():
    scored = exact_match([" Red", "red.", "b"], [["blue", "red "], ["red"], ["B"]])["vqa/acc@exact"]
    assert scored.samples == [1, 0, 1] and scored.score == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("predictions", "answers", "problem"),
    [
        ([], [], "nothing to score, both lists are empty"),
        (["a"], [], "1 predictions, but references for 0"),
        (["a"], [["a"] * 9], "question 0 has 9 answers, it is defined for 10"),
        (["a", "b"], [["a"] * 10, "b" * 10], "question 1 has a string for its answers"),
    ],
)
def test_what_cannot_be_scored_is_named(predictions, answers, problem):
    with pytest.raises(UserError, match=problem):
        vqa_accuracy(predictions, answers, "official")


def test_there_is_no_accuracy_without_a_protocol():
    with pytest.raises(UserError, match="VQA protocol is 'vqa', use one of official, always"):
        vqa_accuracy(["a"], [["a"] * 10], "vqa")
    with pytest.raises(UserError, match="question 0 has 0 answers, give a list of at least one"):
        exact_match(["a"], [[]])

"""BLEU, ROUGE-L and CIDEr-D against values worked out by hand; pycocoevalcap is asked in tests/parity."""

import math
import sys

import pytest

from shared.core.errors import UserError
from shared.metrics import caption_scores
from shared.metrics.captioning import TOKENISATIONS, bleu, cider_d, rouge_l, tokenise

BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


def words(*texts):
    return [text.split() for text in texts]


# tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man, riding a horse.", "a man riding a horse"),
        ("a man riding a horse", "a man riding a horse"),
        ("Don't! It's the dog's ball; they'll cannot?", "do n't it 's the dog 's ball they 'll can not"),
        ('He said: "stop" -- and - well... left', "he said stop and well left"),
        ("a t-shirt, 3:30 and 1,000 (or so)", "a t-shirt 3:30 and 1,000 ( or so )"),
        ("In New York. Then home.", "in new york. then home"),  # the Java tokenizer drops this period
        ("", ""),
        ("...", ""),
        ("  ünïcödé\u00a0日本  ", "ünïcödé 日本"),
    ],
)
def test_tokens_are_treebanks_in_lower_case_without_the_punctuation_list(text, tokens):
    assert tokenise([text]) == [tokens.split()]


@pytest.mark.parametrize("sign", BREAKS, ids=ascii)
def test_a_line_break_of_any_kind_stays_within_its_caption(sign):
    texts = [f"a{sign}dog", "a cat", f"{sign}a bird{sign}", sign]
    assert tokenise(texts) == [["a", "dog"], ["a", "cat"], ["a", "bird"], []]


def test_no_line_break_that_python_knows_was_forgotten():
    every = {c for c in map(chr, range(sys.maxunicode + 1)) if len(f"a{c}b".splitlines()) == 2}
    assert every == {sign for sign in BREAKS if len(sign) == 1}


def test_case_and_a_final_period_move_the_score_only_without_the_tokenizer():
    references = [["A red dog runs.", "The dog is running."], ["Two cats on a sofa.", "A sofa with cats on it."]]
    plain, dressed = ["a red dog runs", "two cats on a sofa"], ["A red dog runs.", "Two cats on a sofa."]
    for way in TOKENISATIONS:
        a, b = (
            [scored.score for scored in caption_scores(said, references, way).values()] for said in (plain, dressed)
        )
        assert (a == b) is (way in ("treebank", "no-punctuation")), way


# BLEU


def test_bleu_of_the_two_cats_on_the_mat():
    scores = bleu(words("the cat sat on the mat"), [words("the cat is on the mat", "there is a cat on the mat")])
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples, 0 of 3; as long as the closest reference
    assert [s.score for s in scores[:3]] == pytest.approx([5 / 6, math.sqrt(5 / 6 * 3 / 5), (1 / 8) ** (1 / 3)])
    assert scores[3].score == pytest.approx((1 / 8 * 1e-15 / 3) ** 0.25)  # not quite 0, as pycocoevalcap's
    assert [s.samples for s in scores] == [[pytest.approx(s.score)] for s in scores]


def test_bleu_counts_a_word_no_more_often_than_one_reference_does():
    assert bleu(words("the the the"), [words("the cat", "the dog the")])[0].score == pytest.approx(2 / 3)


def test_bleu_punishes_a_caption_shorter_than_the_closest_reference():
    assert bleu(words("a cat"), [words("a cat sat")])[0].score == pytest.approx(math.exp(1 - 3 / 2))
    assert bleu(words("a cat sat"), [words("a cat", "a cat sat down")])[0].score == pytest.approx(
        1
    )  # of 2 and 4, the 2
    assert bleu(words("a cat sat"), [words("a cat sat down", "a cat")])[0].score == pytest.approx(1)


def test_bleu_of_a_corpus_pools_counts_and_lengths():
    scored = bleu(words("a b", "c d e f g h"), [words("a x"), words("c d e f")])[0]
    assert scored.score == pytest.approx((1 + 4) / (2 + 6))  # 8 words against 6: not short
    assert scored.samples == pytest.approx([1 / 2, 4 / 6])


# ROUGE-L


def test_rouge_l_weighs_recall_by_beta():
    scored = rouge_l(words("a b c d"), [words("a c d")])
    assert scored.score == pytest.approx((1 + 1.44) * 0.75 * 1 / (1 + 1.44 * 0.75))


def test_rouge_l_is_of_a_subsequence_not_of_a_set():
    one, three = (rouge_l(words("a b c"), [words(text)]).score for text in ("c b a", "a b c"))
    assert (one, three) == (pytest.approx(1 / 3), pytest.approx(1))


def test_rouge_l_takes_precision_and_recall_from_different_references():
    scored = rouge_l(words("a b c d"), [words("d", "a b x y z q r s")])  # 1/4 and 1 from one, 2/4 and 2/8 of the other
    assert scored.score == pytest.approx((1 + 1.44) * 0.5 * 1 / (1 + 1.44 * 0.5))


def test_rouge_l_of_a_set_is_the_mean_and_of_nothing_in_common_0():
    scored = rouge_l(words("a", "b"), [words("a"), words("c")])
    assert (scored.score, scored.samples) == (0.5, [1.0, 0.0])
    assert rouge_l([[]], [words("a")]).score == 0.0


# CIDEr-D

DOG_AND_CAT = [words("red dog"), words("blue cat")]  # every word and pair in one of two pictures: all as rare


def test_cider_d_of_the_reference_itself_and_of_half_of_it():
    scored = cider_d(words("red dog", "blue dog"), DOG_AND_CAT)
    # the reference: 1 for words, 1 for pairs, 0 for what two words do not have; one word of two: cosine 1/2
    assert scored.samples == pytest.approx([10 * (1 + 1 + 0 + 0) / 4, 10 * (1 / 2) / 4])
    assert scored.score == pytest.approx((5 + 1.25) / 2)


def test_cider_d_punishes_another_length_by_a_gaussian_over_the_number_of_pairs():
    scored = cider_d(words("red dog", "blue cat"), [words("red dog is here"), words("blue cat")])
    cosines = 1 / math.sqrt(2) + 1 / math.sqrt(3)  # 2 of 2 words against 4, 1 of 1 pairs against 3
    assert scored.samples[0] == pytest.approx(10 / 4 * cosines * math.exp(-((1 - 3) ** 2) / (2 * 36)))


def test_cider_d_gives_nothing_for_a_word_repeated():
    scored = cider_d(words("dog dog dog", "cat"), [words("dog"), words("cat")])
    assert scored.samples[0] == pytest.approx(10 / 4 * (1 / 3) * math.exp(-((2 - 0) ** 2) / (2 * 36)))


def test_cider_d_gives_nothing_for_what_every_picture_has():
    scored = cider_d(words("a dog", "a"), [words("a dog"), words("a cat")])
    assert scored.samples[1] == 0.0
    assert scored.samples[0] == pytest.approx(10 / 4 * 2)


def test_cider_d_averages_over_the_references_of_a_picture():
    scored = cider_d(words("red dog", "blue cat"), [words("red dog", "green bird"), words("blue cat")])
    assert scored.samples == pytest.approx([2.5, 5.0])


def test_cider_d_of_one_picture_is_0_and_of_a_subset_another_number():
    assert cider_d(words("red dog"), [words("red dog")]).score == 0.0
    said, references = (
        words("a red dog", "a blue cat", "a red cat"),
        [words("a red dog"), words("a cat"), words("red cat")],
    )
    assert cider_d(said[:2], references[:2]).samples != pytest.approx(cider_d(said, references).samples[:2])


# all of them


def test_every_score_is_named_by_its_tokens():
    scores = caption_scores(["a red dog", "two cats"], [["a dog"], ["two cats", "cats"]])
    assert set(scores) == {
        *(f"caption/bleu{order}@treebank" for order in (1, 2, 3, 4)),
        "caption/rouge_l@treebank",
        "caption/cider_d@treebank",
    }
    assert all(len(scored.samples) == 2 and scored.score > 0 for name, scored in scores.items() if "4" not in name)


def test_an_empty_caption_is_scored_and_spoils_nothing():
    scores = caption_scores(["", "two cats sleep"], [["a red dog"], ["two cats sleep"]])
    assert all(
        scored.samples[0] < 1e-3 and scored.samples[1] > 0.9 for name, scored in scores.items() if "u4" not in name
    )


@pytest.mark.parametrize(
    ("said", "references", "problem"),
    [
        ([], [], "nothing to score, both lists are empty"),
        (["a"], [], "1 predictions, but references for 0"),
        (["a"], [[]], r"references of prediction 0 are \[\], give a list of at least one"),
        (["a", "b"], [["a"], "b"], "references of prediction 1 are 'b', give a list"),
    ],
)
def test_what_cannot_be_scored_is_named(said, references, problem):
    with pytest.raises(UserError, match=problem):
        caption_scores(said, references)


def test_an_unknown_tokenisation_is_named_with_those_there_are():
    with pytest.raises(
        UserError, match="tokenisation is 'ptb', use one of treebank, no-punctuation, lower-split, raw-split"
    ):
        caption_scores(["a"], [["a"]], "ptb")

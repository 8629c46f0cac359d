"""How POPE's replies are read, and what is printed beside the accuracy."""

import pytest

from shared.core.errors import UserError
from shared.metrics import pope
from shared.metrics.pope import pope_accuracy, read_official, read_strict


@pytest.mark.parametrize(
    ("reply", "official", "strict"),
    [
        ("yes", "yes", "yes"),
        ("Yes.", "yes", "yes"),
        ("YES!", "yes", "yes"),
        ("no", "no", "no"),
        ("No, there is no dog.", "no", "no"),
        ("NO", "yes", "no"),  # the official scorer knows No, no and not
        ("No!", "yes", "no"),
        ("There isn't a dog.", "yes", None),
        ("I cannot see a dog", "yes", None),
        ("There is not a dog", "no", None),
        ("It is. No dog", "yes", None),  # of the first sentence only
        ("Yes. No dog", "yes", None),  # which of the two?
        ("Yes. There is no dog", "yes", "yes"),
        ("Yes, there is no doubt", "no", "yes"),
        ("", "yes", None),
        ("None", "yes", None),
        ("nothing", "yes", None),
        ("not sure", "no", None),
        ("yes or no", "no", None),  # both are offered
        ("no/yes", "yes", None),
        ("yes yes", "yes", "yes"),
        ("yesterday", "yes", None),
        ('"Yes"', "yes", "yes"),
        ("  no\n", "yes", "no"),
        ("**No**, it is red", "yes", "no"),
    ],
)
def test_a_reply_is_read_as_the_protocol_reads_it(reply, official, strict):
    assert (read_official(reply), read_strict(reply)) == (official, strict)


REPLIES = ["yes", "Yes.", "no", "NO", "I see none", "yes"]
LABELS = ["yes", "no", "no", "no", "no", "yes"]


def test_the_official_scorer_takes_what_it_cannot_read_for_a_yes():
    # read: yes yes no yes yes yes; 2 of 2 found, 3 false alarms, 1 right no
    assert pope(REPLIES, LABELS, "official") == pytest.approx(
        {
            "pope/acc@official": 3 / 6,
            "pope/precision@official": 2 / 5,
            "pope/recall@official": 1,
            "pope/f1@official": 4 / 7,
            "pope/yes_ratio@official": 5 / 6,
            "pope/parse_failures@official": 1 / 6,
        }
    )


def test_the_strict_reader_counts_what_it_cannot_read_as_wrong():
    # read: yes yes no no - yes
    assert pope(REPLIES, LABELS, "strict") == pytest.approx(
        {
            "pope/acc@strict": 4 / 6,
            "pope/precision@strict": 2 / 3,
            "pope/recall@strict": 1,
            "pope/f1@strict": 4 / 5,
            "pope/yes_ratio@strict": 3 / 6,
            "pope/parse_failures@strict": 1 / 6,
        }
    )
    assert pope_accuracy(REPLIES, LABELS, "strict").samples == [1, 0, 1, 1, 0, 1]


def test_a_model_that_never_says_yes_has_no_precision_but_a_number():
    found = pope(["no", "no"], ["yes", "no"])
    assert [found[f"pope/{name}@official"] for name in ("acc", "precision", "recall", "f1")] == [0.5, 0, 0, 0]
    assert pope(["yes"], ["no"])["pope/recall@official"] == 0


@pytest.mark.parametrize(
    ("replies", "labels", "protocol", "problem"),
    [
        (["yes"], ["yes", "no"], "official", "1 predictions, but references for 2"),  # all later ones would be shifted
        ([], [], "official", "nothing to score, both lists are empty"),
        (["yes"], ["Yes"], "strict", "label 0 is 'Yes', use yes or no"),
        (["yes"], ["yes"], "bare", "POPE protocol is 'bare', use one of official, strict"),
    ],
)
def test_what_cannot_be_scored_is_named(replies, labels, protocol, problem):
    with pytest.raises(UserError, match=problem):
        pope(replies, labels, protocol)

"""VQA accuracy (Antol et al. 2015), ten answers a question: the mean over the answers of min(1, equal others / 3).

Two protocols that differ by up to 22 points on one set of predictions:
`official`  GT-Vision-Lab/VQA's vqaEval.py at a013f00: answers are normalised unless all ten are the same, and its
            bugs are part of it (`normalise`);
`always`    the same, always normalised: the rule of lmms-eval, VLMEvalKit and M4C.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from shared.core.errors import UserError
from shared.metrics.names import Scored, check_paired, metric_name

ANSWERS = 10
PROTOCOLS = ("official", "always")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number)
    for number, word in enumerate("one two three four five six seven eight nine ten".split(), 1)  # noqa: SIM905
}
_ARTICLES = {"a", "an", "the"}
# What the official table restores. A word is written there once without each of its apostrophes.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTIONS for place, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the official table


def normalise(answer: str) -> str:
    """The official clean-up of an answer, bugs kept: lower case, numbers as digits, no articles, no punctuation.

    Kept: a period is removed though a digit stands before it (a look-behind mistyped), only the first 32 periods are
    (a flag given as a count), `none` is 0, one comma between digits anywhere makes every sign vanish rather than
    become a space.
    """
    return _digits_and_articles(_punctuation(_plain(answer)))


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]], protocol: str) -> dict[str, Scored]:
    """{`vqa/acc@<protocol>`: ...} in 0..1, `answers` holding the ten of each question; the official script rounds to
    two decimals of a percentage.

    Each of the ten is left out in turn, by position, also where two annotators' records are the same.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"VQA protocol is {protocol!r}, use one of {', '.join(PROTOCOLS)}")
    check_paired("VQA", predictions, answers)
    samples = []
    for place, (prediction, given) in enumerate(zip(predictions, answers, strict=True)):
        if isinstance(given, str) or len(given) != ANSWERS:
            raise UserError(f"VQA accuracy: question {place} has {_count(given)}, it is defined for {ANSWERS}")
        prediction, given = _plain(prediction), [_plain(answer) for answer in given]
        if protocol == "always" or len(set(given)) > 1:
            prediction, given = normalise(prediction), [normalise(answer) for answer in given]
        equal = given.count(prediction)
        # left out, an answer equal to the prediction is one match less
        samples.append(sum(min(1.0, (equal - (answer == prediction)) / 3) for answer in given) / ANSWERS)
    return {metric_name("vqa", "acc", protocol): Scored(sum(samples) / len(samples), samples)}


def exact_match(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, Scored]:
    """{`vqa/acc@exact`: ...}: share in 0..1 equal to one of its answers, white space at the ends and case aside."""
    check_paired("VQA", predictions, answers)
    samples = []
    for place, (prediction, given) in enumerate(zip(predictions, answers, strict=True)):
        if isinstance(given, str) or not len(given):
            raise UserError(f"exact match: question {place} has {_count(given)}, give a list of at least one")
        samples.append(float(prediction.strip().lower() in {answer.strip().lower() for answer in given}))
    return {metric_name("vqa", "acc", "exact"): Scored(sum(samples) / len(samples), samples)}


def _plain(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str) -> str:
    clean, number_with_comma = text, re.search(r"\d,\d", text)
    for sign in _PUNCTUATION:
        alone = f"{sign} " in text or f" {sign}" in text
        clean = clean.replace(sign, "" if alone or number_with_comma else " ")
    return re.sub(r"\.(?!\d)", "", clean, count=32)


def _digits_and_articles(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _count(given: Sequence[str]) -> str:
    return "a string for its answers" if isinstance(given, str) else f"{len(given)} answers"

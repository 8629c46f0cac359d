"""BLEU, ROUGE-L and CIDEr-D of captions, without Java: equal to pycocoevalcap's Python scorers on the same tokens.

Sources: BLEU Papineni et al. 2002, ROUGE-L Lin 2004, CIDEr-D Vedantam et al. 2015, with the constants of
pycocoevalcap 1.2. Tokens are those of NLTK's TreebankWordTokenizer in lower case, less the punctuation list of
pycocoevalcap's ptbtokenizer: the tokens of the Java tokenizer, but for "(" in place of "-lrb-", on each of the 1,000
captions of a COCO model that pycocoevalcap ships as its example. Web titles differ more (315 of 7,776 of Open
Clipart): the Java tokenizer knows addresses, entities and smileys, splits off a single quote that opens a word, and
drops a period that ends a sentence inside a text. METEOR and SPICE need Java and are not offered in its place.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from shared.core.errors import UserError
from shared.metrics.names import Scored, check_paired, metric_name

Tokens = Sequence[str]

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_SMALL, _TINY = 1e-9, 1e-15  # pycocoevalcap's guards of BLEU against a division by zero
_BETA = 1.2
_ORDERS = 4


def tokenise(texts: Sequence[str]) -> list[list[str]]:
    """One list of tokens a text. A line break of any kind, as `\\r` or U+2028, is white space within its text.

    Each text is cut on its own. The official tokenizer joins all captions with `\\n` and replaces only `\\n` within
    them: any other line break shifts every later caption by one.
    """
    treebank = _treebank()
    words = ([word.lower() for word in treebank.tokenize(one_line(text))] for text in texts)
    return [[word for word in caption if word not in PUNCTUATION] for caption in words]


def one_line(text: str) -> str:
    """Every line break that Unicode knows becomes a space."""
    return " ".join(text.splitlines())


_WITHOUT_SIGNS = str.maketrans("", "", string.punctuation)

# Ways to tokenise that are in use; all but the first are there to show what they do to a score (`rescore`).
TOKENISATIONS: dict[str, Callable[[Sequence[str]], list[list[str]]]] = {
    "treebank": tokenise,
    "no-punctuation": lambda texts: [text.lower().translate(_WITHOUT_SIGNS).split() for text in texts],
    "lower-split": lambda texts: [text.lower().split() for text in texts],
    "raw-split": lambda texts: [text.split() for text in texts],
}


def caption_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenisation: str = "treebank"
) -> dict[str, Scored]:
    """BLEU-1 to 4, ROUGE-L and CIDEr-D of one predicted caption a picture against its references.

    Named `caption/bleu4@treebank`, `caption/rouge_l@treebank`, `caption/cider_d@treebank`, ...; BLEU and ROUGE-L in
    0..1, CIDEr-D in 0..10 as pycocoevalcap prints it. Papers print each of them times 100.
    """
    if tokenisation not in TOKENISATIONS:
        raise UserError(f"tokenisation is {tokenisation!r}, use one of {', '.join(TOKENISATIONS)}")
    _check(predictions, references)
    candidates, right = tokenise_all(predictions, references, tokenisation)
    found = {f"bleu{order}": score for order, score in enumerate(bleu(candidates, right), start=1)}
    found |= {"rouge_l": rouge_l(candidates, right), "cider_d": cider_d(candidates, right)}
    return {metric_name("caption", metric, tokenisation): score for metric, score in found.items()}


def tokenise_all(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenisation: str = "treebank"
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Predictions and references in one call of the tokenizer, in the shape in which they came."""
    tokens = iter(TOKENISATIONS[tokenisation]([*predictions, *(text for texts in references for text in texts)]))
    candidates = [next(tokens) for _ in predictions]
    return candidates, [[next(tokens) for _ in texts] for texts in references]


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[Scored]:
    """Corpus BLEU-1 to BLEU-4 in 0..1; of the references' lengths the closest counts, of two as close the shorter.

    The samples are single captions' BLEU; the corpus score is not their mean.
    """
    _check(candidates, references)
    matched, possible, length, reference_length = [0] * _ORDERS, [0] * _ORDERS, 0, 0
    samples = []
    for candidate, texts in zip(candidates, references, strict=True):
        most: Counter = Counter()
        for text in texts:
            most |= _ngrams(text)
        hits = [0] * _ORDERS
        for ngram, count in _ngrams(candidate).items():
            hits[len(ngram) - 1] += min(most[ngram], count)
        guesses = [max(0, len(candidate) - order) for order in range(_ORDERS)]
        closest = min((abs(len(text) - len(candidate)), len(text)) for text in texts)[1]
        samples.append(_bleu(hits, guesses, len(candidate), closest))
        matched = [a + b for a, b in zip(matched, hits, strict=True)]
        possible = [a + b for a, b in zip(possible, guesses, strict=True)]
        length, reference_length = length + len(candidate), reference_length + closest
    corpus = _bleu(matched, possible, length, reference_length)
    return [Scored(corpus[order], [sample[order] for sample in samples]) for order in range(_ORDERS)]


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Scored:
    """Mean in 0..1 of an F measure (beta 1.2) of the longest common subsequence.

    As in pycocoevalcap, the best precision and the best recall may come from different references, and an empty caption
    is one empty word, so that it equals an empty reference.
    """
    _check(candidates, references)
    samples = []
    for candidate, texts in zip(candidates, references, strict=True):
        candidate = list(candidate) or [""]
        texts = [list(text) or [""] for text in texts]
        common = [_common_subsequence(text, candidate) for text in texts]
        precision = max(common) / len(candidate)
        recall = max(count / len(text) for count, text in zip(common, texts, strict=True))
        both = precision and recall
        samples.append((1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision) if both else 0.0)
    return Scored(math.fsum(samples) / len(samples), samples)


def cider_d(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], sigma: float = 6.0) -> Scored:
    """CIDEr-D in 0..10 (pycocoevalcap's `Cider`; papers print it times 100), of 1-grams to 4-grams.

    How rare an n-gram is, is taken from the references of the very set that is scored: a subset's score cannot be
    compared with that of the full set, and a set of one picture scores 0.
    """
    _check(candidates, references)
    counted = [[_ngrams(text) for text in texts] for texts in references]
    pictures: Counter = Counter()  # in how many pictures' references an n-gram occurs
    for texts in counted:
        pictures.update(set().union(*texts))
    unseen = math.log(len(candidates))  # as rare as what one picture has
    rarity = {ngram: unseen - math.log(count) for ngram, count in pictures.items()}

    def weigh(counts: Counter) -> tuple[list[dict], list[float], int]:
        vectors: list[dict] = [{} for _ in range(_ORDERS)]
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * rarity.get(ngram, unseen)
        norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
        # pycocoevalcap takes the number of 2-grams for the length
        return vectors, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    samples = []
    for candidate, texts in zip(candidates, counted, strict=True):
        vectors, norms, length = weigh(_ngrams(candidate))
        similarity = 0.0
        for text in texts:
            others, other_norms, other_length = weigh(text)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * sigma**2))
            for order in range(_ORDERS):
                other = others[order]
                product = sum(
                    min(weight, other[ngram]) * other[ngram]
                    for ngram, weight in vectors[order].items()
                    if ngram in other
                )
                if norms[order] and other_norms[order]:
                    product /= norms[order] * other_norms[order]
                similarity += product * penalty
        samples.append(10 * similarity / _ORDERS / len(texts))
    return Scored(math.fsum(samples) / len(samples), samples)


@lru_cache(maxsize=1)
def _treebank():
    from nltk.tokenize import TreebankWordTokenizer  # a second to import

    return TreebankWordTokenizer()


def _check(candidates: Sequence, references: Sequence[Sequence]) -> None:
    check_paired("captions", candidates, references)
    for place, texts in enumerate(references):
        if isinstance(texts, str) or not len(texts):
            raise UserError(f"captions: references of prediction {place} are {texts!r}, give a list of at least one")


def _ngrams(tokens: Tokens) -> Counter:
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, _ORDERS + 1)
        for start in range(len(tokens) - order + 1)
    )


def _bleu(matched: Sequence[int], possible: Sequence[int], length: int, reference_length: int) -> list[float]:
    scores, product = [], 1.0
    ratio = (length + _TINY) / (reference_length + _SMALL)
    for order in range(_ORDERS):
        product *= (matched[order] + _TINY) / (possible[order] + _SMALL)
        scores.append(product ** (1 / (order + 1)) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0))
    return scores


def _common_subsequence(a: Tokens, b: Tokens) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for place, other in enumerate(b):
            row.append(before[place] + 1 if word == other else max(before[place + 1], row[place]))
    return row[-1]

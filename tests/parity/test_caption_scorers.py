"""Caption scores against pycocoevalcap's Python scorers on the same tokens; where there is Java, the tokens too."""

import random
import shutil

import pytest

from shared.metrics.captioning import bleu, cider_d, rouge_l, tokenise

pytest.importorskip("pycocoevalcap")
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

CAPTIONS = [
    "A man riding a horse.",
    "two dogs, one cat and a bird - on the grass",
    "The dog's owner doesn't like it; they'll leave!",
    'a sign that says "stop" (in red) on a t-shirt',
    "Is it 3:30 pm? The clock says so...",
    "a woman in a black-and-white dress is holding 1,000 balloons",
    "it's a cat -- or: a small dog",
    "he'd run, she cannot: they're gonna",
    "the 'quoted' word and `another`",
]
OPENED = CAPTIONS[-1]  # Treebank leaves a single quote on the word that it opens, unlike the official tokenizer


def corpus(pictures, seed):
    """Few words, so that n-grams repeat; captions of 0 to 14 words, 1 to 6 references."""
    rng = random.Random(seed)
    vocabulary = "a a a the on of dog cat man red big runs sits with grass".split()  # noqa: SIM905

    def caption(shortest=0):
        return [rng.choice(vocabulary) for _ in range(rng.randint(shortest, 14))]

    references = [[caption() for _ in range(rng.randint(1, 6))] for _ in range(pictures)]
    candidates = [rng.choice([caption(), list(rng.choice(texts)), []]) for texts in references]
    return candidates, references


def theirs(scorer, candidates, references):
    """pycocoevalcap reads tokens joined by spaces, by picture."""
    references = {i: [" ".join(text) for text in texts] for i, texts in enumerate(references)}
    return scorer(references, {i: [" ".join(candidate)] for i, candidate in enumerate(candidates)})


def equal(ours, score, samples):
    assert f"{ours.score:.12f}" == f"{score:.12f}"  # it prints three digits
    assert ours.samples == pytest.approx(list(samples), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("pictures", "seed"), [(1, 0), (2, 1), (7, 2), (60, 3), (400, 4)])
def test_every_score_and_sample_is_that_of_pycocoevalcap(pictures, seed):
    candidates, references = corpus(pictures, seed)
    scores, samples = theirs(lambda *texts: Bleu(4).compute_score(*texts, verbose=0), candidates, references)
    for order, ours in enumerate(bleu(candidates, references)):
        equal(ours, scores[order], samples[order])
    equal(rouge_l(candidates, references), *theirs(Rouge().compute_score, candidates, references))
    equal(cider_d(candidates, references), *theirs(Cider().compute_score, candidates, references))


def test_captions_as_they_are_written_score_as_in_pycocoevalcap():
    tokens = tokenise(CAPTIONS)
    candidates, references = (
        tokens,
        [tokens[i - 1 : i] + tokens[i : i + 1] for i in range(1, len(tokens))] + [tokens[:3]],
    )
    equal(cider_d(candidates, references), *theirs(Cider().compute_score, candidates, references))
    equal(rouge_l(candidates, references), *theirs(Rouge().compute_score, candidates, references))


def test_the_punctuation_list_is_the_official_one():
    from shared.metrics.captioning import PUNCTUATION

    assert set(ptbtokenizer.PUNCTUATIONS) == PUNCTUATION


@pytest.mark.skipif(shutil.which("java") is None, reason="the official tokenizer needs Java")
def test_captions_get_the_tokens_of_the_official_tokenizer(tmp_path, monkeypatch):
    """It writes beside its archive, so a link to the archive in a folder of ours stands in for the package's."""
    archive = ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    folder = ptbtokenizer.os.path.dirname(ptbtokenizer.__file__)
    (tmp_path / archive).symlink_to(ptbtokenizer.os.path.join(folder, archive))
    monkeypatch.setattr(ptbtokenizer, "__file__", str(tmp_path / "ptbtokenizer.py"))
    found = ptbtokenizer.PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(CAPTIONS)})
    brackets = {"-lrb-": "(", "-rrb-": ")"}
    for i, tokens in enumerate(tokenise(CAPTIONS)):
        same = [brackets.get(word, word) for word in found[i][0].split()] == tokens
        assert same is (CAPTIONS[i] != OPENED), CAPTIONS[i]

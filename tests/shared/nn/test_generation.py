"""Generation on models small enough to search by hand: no batch, padding or neighbour may change a text."""

import itertools
import math

import pytest
import torch

from shared.core.errors import UserError
from shared.nn.bert import BertDecoding, BertEmbeddings, BertLayers, TokenHead
from shared.nn.generation import RELEASED_BEAMS, GenerationSettings, chances, draw, filtered, generate

STOP = 3


class Table:
    """Next-token logits hang on the last token and the context: (contexts, V, V). It notes how it is used."""

    def __init__(self, tables):
        self.tables, self.rows, self.contexts, self.steps = tables, None, list(range(len(tables))), []

    def prefill(self, tokens, attention_mask):
        self.rows = [row[real].tolist() for row, real in zip(tokens, attention_mask, strict=True)]
        return self.logits()

    def step(self, tokens):
        self.steps.append(len(self.rows))
        assert len(tokens) == len(self.rows)
        self.rows = [[*row, token] for row, token in zip(self.rows, tokens.tolist(), strict=True)]
        return self.logits()

    def select(self, rows, contexts=None):
        self.rows = [self.rows[row] for row in rows.tolist()]
        if contexts is not None:
            self.contexts = [self.contexts[place] for place in contexts.tolist()]

    def logits(self):
        assert len(self.rows) % len(self.contexts) == 0
        beams = len(self.rows) // len(self.contexts)
        return torch.stack([self.tables[self.contexts[i // beams], row[-1]] for i, row in enumerate(self.rows)])


def tables(contexts=4, vocabulary=12, seed=0, stop=1.0):
    made = 2 * torch.randn(contexts, vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))
    made[..., STOP] += stop
    return made


def log_probability(table, prompt, text):
    path = [*prompt, *text]
    return sum(float(table[a].log_softmax(0)[b]) for a, b in itertools.pairwise(path[len(prompt) - 1 :]))


PROMPTS = torch.tensor([[1, 7], [1, 4], [1, 9], [1, 7]])


def test_beams_may_choose_among_the_whole_vocabulary_and_no_more():
    assert all(generate(Table(tables()), PROMPTS, GenerationSettings((STOP,), 3, beams=6)).tokens)  # 12 candidates
    with pytest.raises(UserError, match="7 beams choose among 14 words, the vocabulary has 12"):
        generate(Table(tables()), PROMPTS, GenerationSettings((STOP,), 3, beams=7))


def test_greedy_takes_the_likeliest_word_until_a_stop_token():
    made = tables()
    found = generate(Table(made), PROMPTS, GenerationSettings((STOP,), 6))
    for table, prompt, text, score, stopped in zip(made, PROMPTS.tolist(), *found, strict=True):
        expected, last = [], prompt[-1]
        while len(expected) < 6:
            last = int(table[last].argmax())
            if last == STOP:
                break
            expected.append(last)
        assert text == expected and stopped == (last == STOP)
        assert score == pytest.approx(log_probability(table, prompt, text + [STOP] * stopped), abs=1e-4)
    assert set(found.stopped) == {True, False}


def test_beams_as_many_as_all_texts_find_the_best_of_all():
    """A vocabulary of 4 words besides the stop token, 3 new tokens: nothing is pruned, so the search is exhaustive."""
    made, prompt = tables(3, 70, seed=1), torch.tensor([[1, 2]] * 3)
    words = [0, 1, 2, 4]
    made[:, :, [token for token in range(70) if token not in [*words, STOP]]] = -torch.inf
    found = generate(Table(made), prompt, GenerationSettings((STOP,), 3, beams=32, length_penalty=0.7))
    for table, text, score in zip(made, found.tokens, found.scores, strict=True):
        texts = [t for n in range(3) for t in itertools.product(words, repeat=n)]
        full = [(log_probability(table, [2], [*t, STOP]) / (len(t) + 1) ** 0.7, list(t)) for t in texts]
        full += [(log_probability(table, [2], t) / 3**0.7, list(t)) for t in itertools.product(words, repeat=3)]
        best, best_text = max(full)
        assert text == best_text and score == pytest.approx(best, abs=1e-5)


def test_a_stop_token_counts_in_the_length_that_divides():
    made = torch.full((1, 8, 8), -20.0)
    made[0, 1, [4, 5]] = torch.tensor([2.0, 1.0])
    made[0, 4, STOP] = made[0, 5, STOP] = 3.0
    found = generate(Table(made), torch.tensor([[1]]), GenerationSettings((STOP,), 5, beams=2, length_penalty=1.5))
    assert found.tokens == [[4]] and found.stopped == [True]
    assert found.scores[0] == pytest.approx(log_probability(made[0], [1], [4, STOP]) / 2**1.5, abs=1e-5)


def test_a_rule_that_forbids_nothing_changes_no_score_of_beams():
    made, settings = tables(), {"stop": (STOP,), "max_new_tokens": 6, "beams": 3}
    plain, ruled = (generate(Table(made), PROMPTS, GenerationSettings(**settings, no_repeat_ngram=n)) for n in (0, 9))
    assert ruled.tokens == plain.tokens and ruled.scores == pytest.approx(plain.scores, abs=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_finished_texts_leave_the_batch(beams):
    made = tables(stop=4.0)
    made[1, :, STOP] = -9  # this one never stops
    table = Table(made)
    found = generate(table, PROMPTS, GenerationSettings((STOP,), 9, beams=beams, early_stopping=True))
    assert found.stopped == [True, False, True, True]
    assert table.steps[-1] == beams and table.contexts == [1]
    assert table.steps == sorted(table.steps, reverse=True) and table.steps[0] > beams


@pytest.mark.parametrize("beams", [1, 2])
def test_nothing_is_computed_after_the_last_token(beams):
    table = Table(tables(stop=-50.0))
    found = generate(table, PROMPTS, GenerationSettings((STOP,), 5, beams=beams))
    assert len(table.steps) == 4 and [len(text) for text in found.tokens] == [5] * 4
    assert not any(found.stopped)


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_the_minimum_length_bans_every_stop_token(beams):
    made = tables(stop=30.0)
    made[..., 5] += 29
    settings = GenerationSettings((STOP, 5), 8, min_new_tokens=3, beams=beams)
    found = generate(Table(made), PROMPTS, settings)
    assert [len(text) for text in found.tokens] == [3] * 4 and all(found.stopped)
    assert not {STOP, 5} & {token for text in found.tokens for token in text}


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("beams", [1, 3])
def test_no_ngram_of_prompt_and_text_comes_twice(beams, n):
    made, prompts = tables(stop=-50.0), torch.tensor([[1, 7, 7, 7]] * 4)
    made += 6 * torch.eye(12)  # every word asks for itself again
    free = generate(Table(made), prompts, GenerationSettings((STOP,), 6, beams=beams))
    bound = generate(Table(made), prompts, GenerationSettings((STOP,), 6, beams=beams, no_repeat_ngram=n))
    for text in bound.tokens:
        whole = [7, *text] if n == 1 else [1, 7, 7, 7, *text]  # the prompt's own repetitions are not undone
        grams = [tuple(whole[i : i + n]) for i in range(len(whole) - n + 1)]
        new = grams if n == 1 else grams[4 - n + 1 :]
        assert len(set(new)) == len(new) and not set(new) & set(grams[: len(grams) - len(new)])
    assert bound.tokens != free.tokens


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_once():
    made = torch.zeros(1, 6, 6)
    made[0, 2] = torch.tensor([0.0, -1.0, 3.0, -9.0, 2.4, -1.6])
    ask = {"prompts": torch.tensor([[1, 2, 2, 2]]), "attention_mask": torch.ones(1, 4)}
    for penalty, chosen in ((1.0, 2), (1.2, 2), (1.3, 4)):  # 3 / 1.2 = 2.5 beats 2.4, 3 / 1.3 does not
        settings = GenerationSettings((STOP,), 1, repetition_penalty=penalty)
        assert generate(Table(made), settings=settings, **ask).tokens == [[chosen]]
    made[0, 2] = torch.tensor([-9.0, -1.0, -9.0, -9.0, -9.0, -1.6])
    for penalty, chosen in ((1.5, 1), (1.7, 5)):
        settings = GenerationSettings((STOP,), 1, repetition_penalty=penalty)
        assert generate(Table(made), settings=settings, **ask).tokens == [[chosen]]


def test_filters_keep_the_likeliest_words_and_break_no_tie():
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.125, 0.25]]).log()

    def kept(**asked):
        settings = GenerationSettings((STOP,), 1, sample=True, **asked)
        return [row.nonzero()[:, 0].tolist() for row in filtered(scores, settings).isfinite()]

    assert kept() == kept(top_k=9) == [[0, 1, 2, 3]] * 2
    assert kept(top_k=2) == [[0, 1], [1, 3]]
    assert kept(top_k=3) == [[0, 1, 2, 3]] * 2  # the last two tie
    assert kept(top_p=0.01) == kept(top_p=0.499) == [[0], [1]]
    assert kept(top_p=0.51) == kept(top_p=0.74) == [[0, 1], [1, 3]]
    assert kept(top_k=2, top_p=0.6) == [[0], [1]]  # of the two that are left the first has two thirds
    assert kept(top_p=0.51, temperature=0.5) == [[0], [1]]
    settings = GenerationSettings((STOP,), 1, sample=True, temperature=2.0)
    assert torch.equal(filtered(scores, settings), scores / 2)


def test_draws_follow_the_distribution():
    scores = torch.tensor([2.0, -torch.inf, 0.0, 1.0, -1.0, -torch.inf])
    chance = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    drawn = draw(scores.expand(20000, -1), chance)
    share = drawn.bincount(minlength=6) / 20000
    torch.testing.assert_close(share, scores.softmax(0), atol=1e-4, rtol=0)
    ends = draw(scores.expand(2, -1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert ends.tolist() == [0, 4]  # never a word without probability


def test_chances_are_uniform_and_each_prompt_has_its_own():
    settings = GenerationSettings((STOP,), 50, sample=True)
    whole = chances(200, settings, torch.Generator().manual_seed(3))
    assert whole.min() >= 0 and whole.max() < 1
    assert float(whole.mean()) == pytest.approx(0.5, abs=0.02) and float(whole.var()) == pytest.approx(1 / 12, abs=0.01)
    assert len(whole.flatten().unique()) == whole.numel()
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(torch.cat([chances(n, settings, generator) for n in (1, 7, 192)]), whole)


SETTINGS = {
    "greedy": {},
    "greedy, penalised": {"repetition_penalty": 1.3, "no_repeat_ngram": 2, "min_new_tokens": 2},
    "beam 3": {"beams": 3},
    "beam 3, penalised": {"beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram": 2, "min_new_tokens": 2},
    "beam 2, early": {"beams": 2, "early_stopping": True, "length_penalty": 2.0},
    "nucleus": {"sample": True, "top_p": 0.9, "repetition_penalty": 1.1},
    "top k": {"sample": True, "top_k": 5, "temperature": 0.7},
}
LENGTHS = [4, 1, 6, 2, 3, 6, 1, 5]


@pytest.fixture(scope="module")
def decoder():
    """A tiny random BERT decoder, wide enough to say different things; contexts (8, 7, D), some of them padded."""
    torch.manual_seed(0)
    embeddings, head = BertEmbeddings(40, 24, 32), TokenHead(24, 40)
    layers = BertLayers.make(2, 24, 3, 50, context_width=10)
    for parameter in torch.nn.ModuleList([embeddings, layers, head]).parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    for module in (embeddings, layers, head):
        module.eval()
    contexts, seen = 2 * torch.randn(8, 7, 10), torch.arange(7) < torch.tensor([7, 2, 7, 5, 7, 7, 1, 3])[:, None]
    texts = [torch.randint(4, 40, (length,)) for length in LENGTHS]

    def start(rows=slice(None)):
        return BertDecoding(embeddings, layers, head, contexts[rows], seen[rows])

    return start, texts


def padded(texts, side, filler=0):
    """Texts of several lengths as one batch: tokens (B, T), attention_mask (B, T)."""
    prompts = torch.full((len(texts), max(map(len, texts))), filler)
    attention_mask = torch.zeros_like(prompts, dtype=torch.bool)
    for row, text in enumerate(texts):
        place = slice(-len(text), None) if side == "left" else slice(len(text))
        prompts[row, place], attention_mask[row, place] = text, True
    return prompts, attention_mask


@pytest.mark.parametrize("name", SETTINGS)
def test_no_batch_and_no_padding_changes_a_text(decoder, name):
    """Batches of 1, 2 and 8, padding left and right, whatever the padding tokens are: 0 of 8 texts flip."""
    start, texts = decoder
    settings = GenerationSettings((STOP, 16, 19), 10, **SETTINGS[name])  # words that these weights do say
    found = {}
    for size, side, filler in itertools.product((1, 2, 8), ("left", "right"), (0, 17)):
        generator, told = torch.Generator().manual_seed(5), []
        for first in range(0, 8, size):
            rows = slice(first, first + size)
            prompts, attention_mask = padded(texts[rows], side, filler)
            told.append(generate(start(rows), prompts, settings, attention_mask=attention_mask, generator=generator))
        tokens = [text for part in told for text in part.tokens]
        scores = [score for part in told for score in part.scores]
        found[size, side, filler] = tokens, scores
    expected, expected_scores = found[1, "left", 0]
    for tokens, scores in found.values():
        assert sum(a != b for a, b in zip(tokens, expected, strict=True)) == 0
        assert scores == pytest.approx(expected_scores, abs=1e-4)
    assert len({tuple(text) for text in expected}) > 4 and len({len(text) for text in expected}) > 1


def test_sampling_is_repeated_by_its_seed_and_changed_by_another(decoder):
    start, texts = decoder
    prompts, attention_mask = padded(texts, "right")
    settings = GenerationSettings((STOP,), 10, sample=True)

    def told(seed):
        return generate(
            start(), prompts, settings, attention_mask=attention_mask, generator=torch.Generator().manual_seed(seed)
        ).tokens

    assert told(1) == told(1) != told(2)
    torch.manual_seed(11)
    first = generate(start(), prompts, settings, attention_mask=attention_mask).tokens
    torch.manual_seed(11)
    assert generate(start(), prompts, settings, attention_mask=attention_mask).tokens == first


def test_sampled_words_have_the_models_frequencies():
    made = tables(1, 8, stop=0.0)
    prompts = torch.tensor([[1, 6]] * 4000)
    decoding = Table(made.expand(4000, -1, -1))
    found = generate(
        decoding, prompts, GenerationSettings((STOP,), 1, sample=True), generator=torch.Generator().manual_seed(0)
    )
    drawn = torch.tensor([text[0] if text else STOP for text in found.tokens])
    share = drawn.bincount(minlength=8) / 4000
    torch.testing.assert_close(share, made[0, 6].softmax(0), atol=4 * math.sqrt(0.25 / 4000), rtol=0)


def test_one_beam_is_greedy_and_an_empty_batch_is_nothing(decoder):
    start, texts = decoder
    prompts, attention_mask = padded(texts, "left")
    greedy = generate(start(), prompts, GenerationSettings((STOP,), 10), attention_mask=attention_mask)
    narrow = generate(
        start(), prompts, GenerationSettings((STOP,), 10, sample=True, top_k=1), attention_mask=attention_mask
    )
    assert greedy.tokens == narrow.tokens
    nothing = generate(start(slice(0, 0)), prompts[:0], GenerationSettings((STOP,), 10))
    assert nothing == ([], [], [])


def test_bad_requests_are_told_the_way_out(decoder):
    start, texts = decoder
    prompts, attention_mask = padded(texts, "right")
    attention_mask[2] = False
    with pytest.raises(UserError, match="prompt 2 of the batch is empty"):
        generate(start(), prompts, GenerationSettings((STOP,), 3), attention_mask=attention_mask)
    with pytest.raises(UserError, match="25 beams choose among 50 words, the vocabulary has 40"):
        generate(start(), prompts, GenerationSettings((STOP,), 3, beams=25))
    with pytest.raises(UserError, match="a text of 33 tokens, but it has 32 positions"):
        generate(start(), prompts, GenerationSettings((39,), 60, min_new_tokens=60))
    with pytest.raises(UserError, match="temperature is 0, must be above 0"):
        GenerationSettings((STOP,), 3, sample=True, temperature=0)
    with pytest.raises(UserError, match=r"min_new_tokens is 4, .*; top_p is 1.5, must be in \(0, 1\]"):
        GenerationSettings((STOP,), 3, min_new_tokens=4, top_p=1.5)
    with pytest.raises(UserError, match="sample is True, must be false with beams > 1"):
        GenerationSettings((STOP,), 3, sample=True, beams=2)


@pytest.mark.parametrize(("rule", "text"), [({}, [6, 7, 8]), (RELEASED_BEAMS, [5])], ids=["current", "released"])
def test_a_released_code_divides_by_the_tokens_of_prompt_and_text(rule, text):
    """Behind 4 tokens "5 stop" at -2.0 and "6 7 8 stop" at -3.6: -2.0 / 2 < -3.6 / 4, but -2.0 / 5 > -3.6 / 7."""
    made = torch.zeros(1, 400, 400)
    made[0, 1] = math.log((1 - math.exp(-2.0) - math.exp(-3.6)) / 398)
    made[0, 1, 5], made[0, 1, 6] = -2.0, -3.6
    for before, after in ((5, STOP), (6, 7), (7, 8), (8, STOP)):
        made[0, before, after] = 60.0
    found = generate(Table(made), torch.tensor([[2, 2, 2, 1]]), GenerationSettings((STOP,), 9, beams=3, **rule))
    assert found.tokens == [text]

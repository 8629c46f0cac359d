"""Generation against transformers' `generate` on the same tiny decoders: the same tokens and the same beam scores."""

import pytest
import torch
from berts import Ours, from_theirs
from references.released_beams import released_beams

from shared.nn.bert import BertDecoding
from shared.nn.generation import RELEASED_BEAMS, GenerationSettings, chances, draw, filtered, generate

pytest.importorskip("transformers")

VOCABULARY, WIDTH, CONTEXT, LAYERS, PROMPTS, NEW = 47, 24, 20, 2, 10, 9
STOP, OTHER_STOP = 5, 11


@pytest.fixture(scope="module", params=["bert", "blip"])
def decoders(request):
    """transformers' decoder and ours with the same random weights, wide enough to say different things.

    BERT reads its prompt alone (with cross-attention transformers' generate fails on it), BLIP a context too.
    """
    from transformers import BertConfig, BertLMHeadModel, BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 3,
        "intermediate_size": 50,
        "max_position_embeddings": 30,
        "initializer_range": 0.3,
        "is_decoder": True,
        "bos_token_id": 1,
        "sep_token_id": STOP,
        "eos_token_id": STOP,
        "pad_token_id": 0,
    }
    torch.manual_seed(3)
    if request.param == "blip":
        theirs, width = BlipTextLMHeadModel(BlipTextConfig(**common, encoder_hidden_size=CONTEXT)), CONTEXT
    else:
        theirs, width = BertLMHeadModel(BertConfig(**common, type_vocab_size=2)), None
    theirs.cls.predictions.bias.data.normal_(std=0.3)
    theirs.cls.predictions.bias.data[[STOP, OTHER_STOP]] += 1.5  # so that some texts end early
    types = 2 if request.param == "bert" else 0
    ours = Ours(vocabulary=VOCABULARY, width=WIDTH, heads=3, mlp_width=50, layers=LAYERS, positions=30,
                token_types=types, context_width=width)  # fmt: skip
    ours.load_state_dict(from_theirs(theirs.state_dict(), LAYERS))
    prompts = torch.randint(12, VOCABULARY, (PROMPTS, 3))
    return theirs.eval(), ours.eval(), prompts, 2 * torch.randn(PROMPTS, 7, width) if width else None


def by_theirs(decoders, **asked):
    """Token lists cut after the first stop token, which is left out, and the beam scores where there are any."""
    theirs, _, prompts, context = decoders
    stops = asked.setdefault("eos_token_id", [STOP])
    if context is not None:
        asked["encoder_hidden_states"] = context
        asked["encoder_attention_mask"] = torch.ones(context.shape[:2], dtype=torch.long)
    asked = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0} | asked
    out = theirs.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        return_dict_in_generate=True,
        output_scores=True,
        **asked,
    )
    texts = []
    for row in out.sequences[:, prompts.shape[1] :].tolist():
        ends = [place for place, token in enumerate(row) if token in stops]
        texts.append(row[: ends[0]] if ends else row)
    return texts, out.sequences_scores.tolist() if asked.get("num_beams", 1) > 1 else None


def by_ours(decoders, *, generator=None, **asked):
    _, ours, prompts, context = decoders
    settings = GenerationSettings(**({"stop": (STOP,), "max_new_tokens": NEW} | asked))
    decoding = BertDecoding(ours.embeddings, ours.layers, ours.head, context)
    return generate(decoding, prompts, settings, generator=generator)


def varied(found):
    """Texts of several lengths, so that agreement means something."""
    return len({len(text) for text in found.tokens}) > 1 and len({tuple(text) for text in found.tokens}) > 3


PENALTIES = {
    "plain": ({}, {}),
    "minimum length": ({"min_new_tokens": 4}, {"min_new_tokens": 4}),
    "no bigram twice": ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram": 2}),
    "no word twice": ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram": 1}),
    "no trigram twice": ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram": 3}),
    "repetition penalty": ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    "two stop tokens": ({"eos_token_id": [STOP, OTHER_STOP]}, {"stop": (STOP, OTHER_STOP)}),
    "all at once": (
        {"min_new_tokens": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.1, "eos_token_id": [STOP, OTHER_STOP]},
        {"min_new_tokens": 3, "no_repeat_ngram": 2, "repetition_penalty": 1.1, "stop": (STOP, OTHER_STOP)},
    ),
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_greedy_says_what_transformers_says(decoders, penalty):
    theirs, ours = PENALTIES[penalty]
    found = by_ours(decoders, **ours)
    assert found.tokens == by_theirs(decoders, **theirs)[0]
    assert varied(found)


@pytest.mark.parametrize("early", [False, True], ids=["", "early"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("beams", [2, 5])
def test_beam_search_finds_what_transformers_finds(decoders, beams, length_penalty, early):
    asked = {"length_penalty": length_penalty, "early_stopping": early}
    texts, scores = by_theirs(decoders, num_beams=beams, **asked)
    found = by_ours(decoders, beams=beams, **asked)
    assert found.tokens == texts
    assert found.scores == pytest.approx(scores, rel=1e-5, abs=1e-5)
    assert length_penalty in (2.0, -1.0) or varied(found)  # those favour one length


@pytest.mark.parametrize("penalty", [1.0, -1.0])
@pytest.mark.parametrize(("beams", "longest", "shortest"), [(3, 20, 5), (5, 30, 10)], ids=str)
def test_beam_search_finds_what_the_released_codes_find(decoders, beams, longest, shortest, penalty):
    """By the rule of the transformers that BLIP and ALBEF pin; lengths with the prompt, as these codes give them."""
    theirs, _, prompts, context = decoders
    before, expected = prompts.shape[1], []
    for place, prompt in enumerate(prompts.tolist()):
        seen = {} if context is None else {"encoder_hidden_states": context[place : place + 1]}

        @torch.inference_mode()
        def next_scores(tokens, seen=seen):
            return theirs(input_ids=torch.tensor([tokens]), **seen).logits[0, -1].log_softmax(0)

        expected.append(released_beams(next_scores, prompt, STOP, beams, longest, shortest, penalty))
    asked = {"beams": beams, "max_new_tokens": longest - before, "min_new_tokens": shortest - before}
    found = by_ours(decoders, length_penalty=penalty, **asked, **RELEASED_BEAMS)
    assert found.tokens == expected
    if penalty == 1:  # of the other a text of the greatest length is best by either rule
        assert by_ours(decoders, **asked).tokens != expected


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("beams", [2, 5])
def test_penalties_work_in_beam_search_as_in_transformers(decoders, beams, penalty):
    theirs, ours = PENALTIES[penalty]
    texts, scores = by_theirs(decoders, num_beams=beams, **theirs)
    found = by_ours(decoders, beams=beams, **ours)
    assert found.tokens == texts
    assert found.scores == pytest.approx(scores, rel=1e-5, abs=1e-5)


def test_the_settings_that_are_compared_lead_to_different_texts(decoders):
    """Or their agreement would show nothing."""
    told = [by_ours(decoders, **ours).tokens for _, ours in PENALTIES.values()]
    told += [by_ours(decoders, beams=beams).tokens for beams in (2, 3, 5)]
    told += [by_ours(decoders, beams=3, length_penalty=penalty).tokens for penalty in (0.0, 2.0, -1.0)]
    assert len({str(texts) for texts in told}) > len(told) / 2


FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.9},
    {"top_p": 0.2},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.7, "top_k": 60},
]


@pytest.mark.parametrize("asked", FILTERS, ids=str)
def test_filters_keep_what_transformers_keeps(asked):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList()
    for name, warper in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
    ):
        if name in asked:
            warpers.append(warper(asked[name]))
    torch.manual_seed(0)
    scores = 3 * torch.randn(50, 40)
    expected = warpers(None, scores.clone())
    found = filtered(scores, GenerationSettings((0,), 1, sample=True, **asked))
    assert torch.equal(found.isfinite(), expected.isfinite())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "asked", [{}, *FILTERS[1:], {"top_p": 0.9, "repetition_penalty": 1.1, "min_new_tokens": 2}], ids=str
)
def test_sampling_says_what_transformers_says_by_the_same_chance(decoders, asked, monkeypatch):
    """Their draw is replaced by ours on the probabilities that they have come to."""
    found = by_ours(decoders, sample=True, generator=torch.Generator().manual_seed(7), **asked)
    settings = GenerationSettings((STOP,), NEW, sample=True)
    chance = iter(chances(PROMPTS, settings, torch.Generator().manual_seed(7)).T)
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples: draw(p.log(), next(chance))[:, None])
    texts, _ = by_theirs(decoders, do_sample=True, **({"top_k": 0, "top_p": 1.0} | asked))
    assert found.tokens == texts
    assert varied(found)

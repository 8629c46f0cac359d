"""BLIP's captions and answers do not depend on what else is in the batch, nor on which side prompts are padded."""

import itertools
from dataclasses import replace

import pytest
import torch

from papers.blip.config import VARIANTS
from papers.blip.model import Blip
from papers.blip.tasks import BlipVqa
from shared.nn.generation import GenerationSettings, generate

TINY = replace(VARIANTS["blip-tiny"](), vocabulary=60, start_token=56, end_token=57, decode_token=58, encode_token=59)
SETTINGS = {
    "greedy": {"repetition_penalty": 1.3},
    "beam 3": {"beams": 3, "min_new_tokens": 2},
    "nucleus": {"sample": True, "top_p": 0.9, "repetition_penalty": 1.1},
}
STOP = (TINY.end_token, 3, 7, 11, 20)  # random weights hardly say the end token


def perturbed(module):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def padded(texts, side):
    """Texts of several lengths as one batch: tokens (B, T), attention_mask (B, T)."""
    tokens = torch.full((len(texts), max(map(len, texts))), TINY.pad_token)
    for row, text in enumerate(texts):
        tokens[row, slice(-len(text), None) if side == "left" else slice(len(text))] = torch.tensor(text)
    return tokens, tokens != TINY.pad_token


def pictures(rows):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (rows, 3, TINY.image_size, TINY.image_size), generator=generator).byte()


def sentences(rows, first):
    generator = torch.Generator().manual_seed(2)
    return [[first, *torch.randint(1, 50, (1 + 3 * row % 8,), generator=generator).tolist()] for row in range(rows)]


def flips(found):
    """Texts that differ from those of the first way, over all other ways."""
    expected, *others = found
    assert len({tuple(text) for text in expected}) > 4, "texts that are all alike could not flip"
    return sum(a != b for other in others for a, b in zip(expected, other, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_captions_flip_neither_with_the_batch_nor_with_the_side_of_the_padding(name):
    torch.manual_seed(0)
    model, images, prompts = perturbed(Blip(TINY)), pictures(8), sentences(8, TINY.decode_token)
    settings = GenerationSettings(STOP, 8, **SETTINGS[name])
    found = []
    for size, side in itertools.product((1, 2, 8), ("left", "right")):
        generator, texts = torch.Generator().manual_seed(5), []
        for start in range(0, 8, size):
            tokens, attention_mask = padded(prompts[start : start + size], side)
            with torch.inference_mode():
                decoding = model.decoding(model.encode_image(images[start : start + size]))
                texts += generate(decoding, tokens, settings, attention_mask=attention_mask, generator=generator).tokens
        found.append(texts)
    assert flips(found) == 0


@pytest.mark.parametrize("name", ["greedy", "beam 3"])
def test_answers_flip_neither_with_the_batch_nor_with_longer_questions_beside_them(name):
    torch.manual_seed(0)
    model, images = perturbed(BlipVqa(TINY)), pictures(8)
    asked = [[*words, TINY.end_token] for words in sentences(8, TINY.start_token)]
    settings = GenerationSettings(STOP, 8, **SETTINGS[name])
    found = []
    for size in (1, 2, 8):
        texts = []
        for start in range(0, 8, size):
            questions, _ = padded(asked[start : start + size], "right")
            first = torch.full((len(questions), 1), TINY.decode_token)
            with torch.inference_mode():
                states = model.ask(questions, model.encode_image(images[start : start + size]))
                texts += generate(model.decoding(states, questions), first, settings).tokens
        found.append(texts)
    assert flips(found) == 0

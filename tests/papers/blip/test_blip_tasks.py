"""BLIP's other tasks on tiny models: question answering, two pictures, dialogue, frames of a video."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_blip_model import TINY, moved, pictures, texts

from papers.blip.model import Blip, BlipPretraining, copied
from papers.blip.tasks import BlipDialogue, BlipNlvr, BlipVqa, PairAttention, frame_indices
from shared.core.errors import UserError
from shared.nn.generation import GenerationSettings, generate


def test_an_answers_loss_is_summed_weighed_and_divided_by_pictures():
    torch.manual_seed(0)
    model = moved(BlipVqa(TINY))
    images, questions, answers = pictures(2), texts(2), texts(3, length=8, seed=4)
    asked, weights = torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.3, 0.7])
    with torch.no_grad():
        states = model.ask(questions, model.encode_image(images))
        each = []
        for answer, question in zip(answers, asked, strict=True):
            row = slice(int(question), int(question) + 1)
            each.append(model.answer_losses(states[row], questions[row], answer[None])[0])
        found = model(images, questions, answers, asked, weights)
    assert float(found) == pytest.approx(float((torch.stack(each) * weights).sum() / 2), abs=1e-4)


def test_longer_answers_are_not_favoured_and_smoothing_counts():
    """The loss of an answer is the plain sum over its tokens, smoothed by 0.1."""
    torch.manual_seed(0)
    model = moved(BlipVqa(TINY))
    images, questions, answers = pictures(1), texts(1), texts(1, length=8, seed=4)
    with torch.no_grad():
        states = model.ask(questions, model.encode_image(images))
        tokens = answers.clone()
        tokens[:, 0] = TINY.decode_token
        logits = model.text_decoder.logits(model.text_decoder.states(tokens, states, questions != 0))[0].log_softmax(-1)
        wanted = 0.0
        for place in range(int((tokens != 0).sum()) - 1):
            row = logits[place]
            wanted -= 0.9 * row[tokens[0, place + 1]] + 0.1 * row.mean()
        found = model.answer_losses(states, questions, answers)
    assert float(found) == pytest.approx(float(wanted), abs=1e-4)


def test_an_answer_learned_by_heart_is_ranked_first_and_generated():
    torch.manual_seed(0)
    model = BlipVqa(replace(TINY, label_smoothing=0.0))
    images, questions = pictures(3), texts(3)
    answers = torch.tensor([[296, 5, 297, 0], [296, 6, 7, 297], [296, 8, 297, 0], [296, 6, 297, 0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(images, questions, answers[:3], torch.arange(3))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        states = model.ask(questions, model.encode_image(images))
        for candidates in (2, 4, 128):
            assert model.rank(states, questions, answers, candidates).tolist() == [0, 1, 2]
        start = torch.full((3, 1), TINY.decode_token)
        written = generate(model.decoding(states, questions), start, GenerationSettings((TINY.end_token,), 3, beams=3))
    said = [tokens if isinstance(tokens, list) else list(tokens) for tokens in written.tokens]
    assert [[int(t) for t in one if int(t) not in (TINY.end_token, 0)] for one in said] == [[5], [6, 7], [8]]


def test_ranking_does_not_depend_on_the_batch_or_on_padded_questions():
    torch.manual_seed(0)
    model = moved(BlipVqa(TINY))
    images, questions, answers = pictures(4), texts(4), texts(9, length=8, seed=4)
    with torch.no_grad():
        states = model.ask(questions, model.encode_image(images))
        together = model.rank(states, questions, answers, 5)
        for row in range(4):
            used = int((questions[row] != 0).sum())
            question = questions[row : row + 1, :used]
            alone = model.rank(model.ask(question, model.encode_image(images[row : row + 1])), question, answers, 5)
            assert int(alone) == int(together[row])


def test_an_empty_answer_list_is_a_clear_line():
    model = BlipVqa(TINY)
    questions = texts(1)
    with pytest.raises(UserError, match="list of answers is empty"):
        model.rank(torch.zeros(1, TINY.context, TINY.text_width), questions, torch.zeros(0, 4, dtype=torch.long))


def test_two_pictures_are_averaged_in_the_first_layers_and_merged_in_the_last():
    torch.manual_seed(0)
    model = moved(BlipNlvr(replace(TINY, text_layers=4)))
    kinds = [layer.cross_attention.merge is not None for layer in model.text_encoder.layers]
    assert kinds == [False, False, True, True]
    x, context = torch.randn(2, 5, TINY.text_width), torch.randn(2, 2, 7, TINY.vision_width)
    for merged in (False, True):
        pair = moved(PairAttention(TINY.text_width, TINY.text_heads, TINY.vision_width, 0.0, merged))
        one, other = pair.first(x, context[:, 0]), pair.second(x, context[:, 1])
        both = torch.cat([one, other], -1)
        wanted = both @ pair.merge.weight.T + pair.merge.bias if merged else (one + other) / 2
        torch.testing.assert_close(pair(x, context), wanted, atol=1e-5, rtol=0)


def test_a_network_of_two_pictures_starts_with_pretrained_weights_and_learns():
    torch.manual_seed(0)
    blip = moved(Blip(TINY))
    model = BlipNlvr.started_from(blip)
    layer, theirs = model.text_encoder.layers[0].cross_attention, blip.text_encoder.layers[0].cross_attention
    for side in (layer.first, layer.second):
        assert torch.equal(side.kv.weight, theirs.kv.weight) and side.kv.weight is not theirs.kv.weight
    images, tokens, true = pictures(8).view(4, 2, 3, 32, 32), texts(4), torch.tensor([1, 0, 0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(40):
        loss = model.loss(images, tokens, true)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = first or float(loss.detach())
    assert float(loss.detach()) < 0.2 * first
    with torch.no_grad():
        logits = model(images, tokens)
        assert logits.shape == (4, 2) and torch.equal(logits.argmax(1), true)
        # the two pictures have weights of their own by now, and their order tells
        assert not torch.allclose(model(images.flip(1), tokens), logits)


@pytest.mark.parametrize("task", [BlipVqa, BlipNlvr])
def test_fine_tuning_with_larger_pictures_starts_from_positions_interpolated_as_officially(task):
    torch.manual_seed(0)
    blip = moved(Blip(TINY))
    model = task.started_from(blip, replace(TINY, image_size=48))
    before, after = (one.vision_encoder.positions.position for one in (blip, model))
    grid = before[1:].T.reshape(1, TINY.vision_width, 4, 4)
    wanted = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(after, torch.cat([before[:1], wanted]))
    assert model.config.image_size == 48 and blip.config.image_size == 32


def test_retrieval_fine_tuning_goes_on_from_momentum_copies_and_queue_with_larger_pictures():
    torch.manual_seed(0)
    pretrained = moved(BlipPretraining(TINY))
    tuned = copied(pretrained, BlipPretraining(replace(TINY, image_size=48), decoder=False))
    for name, tensor in tuned.state_dict().items():
        if name.endswith("positions.position"):
            assert len(tensor) == 1 + 6 * 6
        else:
            assert torch.equal(tensor, pretrained.state_dict()[name])


def test_a_dialogue_looks_at_picture_and_caption_and_ranks_its_candidates():
    torch.manual_seed(0)
    model = moved(BlipDialogue.started_from(moved(Blip(TINY))))
    images, captions, dialogues = pictures(2), texts(2, seed=5), texts(6, seed=6).view(2, 3, -1)
    with torch.no_grad():
        logits = model(images, captions, dialogues)
        assert logits.shape == (2, 3, 2)
        torch.testing.assert_close(model.scores(images, captions, dialogues), logits.softmax(-1)[..., 1])
        for row in range(2):
            used = int((captions[row] != 0).sum())
            alone = model(images[row : row + 1], captions[row : row + 1, :used], dialogues[row : row + 1])
            torch.testing.assert_close(alone[0], logits[row], atol=1e-5, rtol=0)
        assert not torch.allclose(model(images.flip(0), captions, dialogues), logits)
        assert not torch.allclose(model(images, captions.flip(0), dialogues), logits)
        right = torch.tensor([[1, 0, 0], [0, 0, 1]])
        wanted = F.cross_entropy(logits.view(6, 2), right.view(6))
        assert float(model.loss(images, captions, dialogues, right)) == pytest.approx(float(wanted), abs=1e-5)


def test_a_dialogue_needs_pictures_as_wide_as_texts():
    with pytest.raises(UserError, match="equal widths"):
        BlipDialogue(replace(TINY, vision_width=48, vision_heads=3))


def test_frames_stand_at_equal_whole_steps_from_the_first_on():
    """numpy.arange(0, length, length / frames, dtype=int), whose step is a whole number too."""
    assert frame_indices(16, 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    for length, frames in ((10, 4), (2, 4), (31, 8), (300, 16)):
        theirs = np.arange(0, length, length / frames, dtype=int)
        assert frame_indices(length, frames) == theirs.tolist()
    with pytest.raises(UserError, match="at least one"):
        frame_indices(0, 8)

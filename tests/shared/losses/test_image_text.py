"""Losses of models that align and fuse, against naive loops; the draws against the distribution they promise."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from shared.core.errors import UserError
from shared.losses.image_text import (
    IGNORED,
    Similarities,
    contrastive_to_targets,
    distilled_targets,
    distilled_token_loss,
    hard_negatives,
    language_loss,
    mask_tokens,
    matching_loss,
    next_token_targets,
    own_pair_targets,
    random_negatives,
    same_picture_targets,
    similarities,
)

B, M, E, T, V = 4, 9, 5, 7, 11


def features(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(size, E, generator=generator), dim=-1) for size in sizes]


def naive_softmax(row):
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def test_each_modality_is_compared_with_the_keys_of_the_other():
    images, texts, image_keys, text_keys = features(B, B, M, M)
    found = similarities(images, texts, image_keys, text_keys, 0.07)
    for i in range(B):
        for j in range(M):
            assert float(found.image_to_text[i, j]) == pytest.approx(float(images[i] @ text_keys[j]) / 0.07, abs=1e-4)
            assert float(found.text_to_image[i, j]) == pytest.approx(float(texts[i] @ image_keys[j]) / 0.07, abs=1e-4)


def test_similarities_stay_in_full_precision_under_autocast_and_move_the_temperature():
    images, texts, image_keys, text_keys = features(B, B, M, M)
    temperature = torch.tensor(0.07, requires_grad=True)
    plain = similarities(images, texts, image_keys, text_keys, temperature)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = similarities(images, texts, image_keys, text_keys, temperature)
    assert_close(found.image_to_text, plain.image_to_text, atol=0, rtol=0)
    plain.image_to_text.sum().backward()
    assert float(temperature.grad) == pytest.approx(float(-(images @ text_keys.T).sum() / 0.07**2), rel=1e-4)


def test_targets_are_the_own_pair_or_all_of_the_same_picture():
    own = own_pair_targets(2, 5, torch.device("cpu"))
    assert own.tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    spread = same_picture_targets(torch.tensor([7, 3, 7]), torch.tensor([7, 3, 7, -1, 3, -1]))
    assert spread.tolist() == [[0.5, 0, 0.5, 0, 0, 0], [0, 0.5, 0, 0, 0.5, 0], [0.5, 0, 0.5, 0, 0, 0]]


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_contrast_with_a_teachers_targets_is_equation_6(alpha):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (Similarities(*(3 * torch.randn(2, B, M, generator=generator))) for _ in range(2))
    mixed = distilled_targets(own_pair_targets(B, M, torch.device("cpu")), teacher, alpha)
    expected = 0.0
    for side in range(2):
        for i in range(B):
            said, taught = naive_softmax(student[side][i].tolist()), naive_softmax(teacher[side][i].tolist())
            for j in range(M):
                target = (1 - alpha) * (i == j) + alpha * taught[j]
                expected -= target * math.log(said[j]) / B / 2
    assert float(contrastive_to_targets(student, mixed)) == pytest.approx(expected, abs=1e-5)
    if not alpha:
        hard = sum(F.cross_entropy(side, torch.arange(B)) for side in student) / 2
        assert_close(contrastive_to_targets(student, mixed), hard)


def test_targets_carry_no_gradient_into_the_teacher():
    teacher = Similarities(*(torch.randn(B, M, requires_grad=True) for _ in range(2)))
    mixed = distilled_targets(own_pair_targets(B, M, torch.device("cpu")), teacher, 0.4)
    assert not any(side.requires_grad for side in mixed)


def drawn(batch, times=4000, **asked):
    """How often each row was given each partner: for pictures and for texts, (B, B) shares."""
    torch.manual_seed(0)
    counts = [torch.zeros(len(batch.image_to_text), len(batch.image_to_text)) for _ in range(2)]
    for _ in range(times):
        for count, chosen in zip(counts, hard_negatives(batch, **asked), strict=True):
            count[torch.arange(len(chosen)), chosen] += 1
    return [count / times for count in counts]


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_hard_negatives_follow_the_softmax_and_are_never_the_own_partner(floor):
    generator = torch.Generator().manual_seed(2)
    batch = Similarities(*torch.randn(2, B, B, generator=generator))
    images, texts = drawn(batch, floor=floor)
    for share, side in ((images, batch.text_to_image), (texts, batch.image_to_text)):
        for i in range(B):
            weights = [x + floor for x in naive_softmax(side[i].tolist())]
            weights[i] = 0.0
            expected = torch.tensor([x / sum(weights) for x in weights])
            assert share[i, i] == 0
            assert_close(share[i], expected, atol=4 * math.sqrt(0.25 / 4000), rtol=0)


def test_pairs_of_the_same_picture_are_no_negatives():
    batch = Similarities(*torch.randn(2, B, B))
    ids = torch.tensor([5, 2, 5, 8])
    same = ids[:, None] == ids
    for share in drawn(batch, times=300, same=same):
        assert not share[same].any() and share[~same].all()


@pytest.mark.parametrize("gap", [50.0, 104.0, 2000.0])
def test_a_softmax_saturated_by_the_own_pair_still_draws_in_proportion(gap):
    """At temperature 0.001 the own pair may lead by 2000: fp32 leaves the others with nothing to be told apart by."""
    side = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [2.0, 1.0, 0.0]]) + gap * torch.eye(3)
    for share in drawn(Similarities(side, side)):
        for i in range(3):
            others = [j for j in range(3) if j != i]
            expected = naive_softmax([float(side[i, j]) for j in others])
            assert share[i, i] == 0
            assert_close(share[i, others], torch.tensor(expected), atol=0.04, rtol=0)


def test_another_pair_that_saturates_the_softmax_is_always_drawn():
    side = torch.tensor([[0.0, 500.0, 1.0], [0.0, 1.0, 500.0], [500.0, 0.0, 1.0]])
    assert hard_negatives(Similarities(side, side)).images.tolist() == [1, 2, 0]


@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_a_pair_alone_has_no_negatives(floor):
    alone = Similarities(torch.tensor([[3.0]]), torch.tensor([[3.0]]))
    with pytest.raises(UserError, match="one pair has no negatives"):
        hard_negatives(alone, floor=floor)
    twins = torch.ones(2, 2, dtype=torch.bool)
    batch = Similarities(torch.randn(2, 2), torch.randn(2, 2))
    assert all(x.shape == (2,) for x in hard_negatives(batch, same=twins, floor=floor))


def test_random_negatives_are_even_and_never_the_own_partner():
    torch.manual_seed(0)
    share = torch.zeros(B, B)
    for _ in range(2000):
        share[torch.arange(B), random_negatives(B, torch.device("cpu")).images] += 1 / 2000
    assert_close(share, (1 - torch.eye(B)) / (B - 1), atol=4 * math.sqrt(0.25 / 2000), rtol=0)


def test_matching_is_two_classes_over_true_and_false_pairs():
    generator = torch.Generator().manual_seed(3)
    positives, negatives = torch.randn(B, 2, generator=generator), torch.randn(2 * B, 2, generator=generator)
    expected = -sum(math.log(naive_softmax(row)[1]) for row in positives.tolist())
    expected -= sum(math.log(naive_softmax(row)[0]) for row in negatives.tolist())
    assert float(matching_loss(positives, negatives)) == pytest.approx(expected / (3 * B), abs=1e-5)


def test_masking_has_berts_shares_and_spares_what_it_must():
    torch.manual_seed(0)
    start, pad, mask, size = 1, 0, 3, 1000
    tokens = torch.randint(4, size, (400, 100))
    tokens[:, 0], tokens[:, 90:] = start, pad
    found = mask_tokens(tokens, probability=0.15, mask=mask, vocabulary=size, never=(start, pad))
    chosen, able = found.labels != IGNORED, torch.zeros_like(tokens, dtype=torch.bool)
    able[:, 1:90] = True
    assert not chosen[~able].any() and torch.equal(found.tokens[~chosen], tokens[~chosen])
    assert torch.equal(found.labels[chosen], tokens[chosen])
    n = int(chosen.sum())
    close = 4 * math.sqrt(0.25 / n)
    assert n / int(able.sum()) == pytest.approx(0.15, abs=0.01)
    masked = (found.tokens == mask)[chosen]
    changed = (found.tokens != tokens)[chosen] & ~masked
    assert float(masked.float().mean()) == pytest.approx(0.8, abs=close)
    assert float(changed.float().mean()) == pytest.approx(0.1, abs=close)
    words = found.tokens[chosen][changed]
    assert words.min() < 50 and words.max() > 950  # from the whole vocabulary
    assert float(words.float().mean()) == pytest.approx(size / 2, rel=0.1)


def test_masking_all_or_nothing():
    tokens = torch.tensor([[1, 5, 6, 2]])
    asked = {"mask": 3, "vocabulary": 9, "never": (1,)}
    everything = mask_tokens(tokens, probability=1.0, hidden=1.0, replaced=0.0, **asked)
    assert everything.tokens.tolist() == [[1, 3, 3, 3]] and everything.labels.tolist() == [[IGNORED, 5, 6, 2]]
    nothing = mask_tokens(tokens, probability=0.0, **asked)
    assert torch.equal(nothing.tokens, tokens) and (nothing.labels == IGNORED).all()


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_distilled_token_loss_is_equation_7(alpha):
    generator = torch.Generator().manual_seed(4)
    logits, teacher = (torch.randn(6, V, generator=generator) for _ in range(2))
    labels = torch.randint(V, (6,), generator=generator)
    expected = 0.0
    for said, taught, label in zip(logits.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        said, taught = naive_softmax(said), naive_softmax(taught)
        expected -= (1 - alpha) * math.log(said[label]) / 6
        expected -= alpha * sum(t * math.log(s) for t, s in zip(taught, said, strict=True)) / 6
    assert float(distilled_token_loss(logits, labels, teacher, alpha)) == pytest.approx(expected, abs=1e-5)
    assert_close(distilled_token_loss(logits, labels), F.cross_entropy(logits, labels))


def test_distilled_token_loss_teaches_the_student_alone():
    logits, teacher = torch.randn(6, V, requires_grad=True), torch.randn(6, V, requires_grad=True)
    distilled_token_loss(logits, torch.arange(6), teacher, 0.4).backward()
    assert teacher.grad is None and logits.grad.abs().max() > 0


def test_a_batch_without_a_masked_word_costs_nothing_and_still_has_a_gradient():
    logits = torch.randn(0, V, requires_grad=True)
    loss = distilled_token_loss(logits, torch.zeros(0, dtype=torch.long), torch.randn(0, V), 0.4)
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, V)


def test_each_token_is_to_predict_the_next_one_outside_prompt_and_padding():
    tokens = torch.tensor([[1, 4, 5, 6, 2], [1, 4, 7, 2, 0]])
    present = tokens != 0
    no = IGNORED
    assert next_token_targets(tokens, present).tolist() == [[4, 5, 6, 2, no], [4, 7, 2, no, no]]
    assert next_token_targets(tokens, present, prompt=1).tolist() == [[4, 5, 6, 2, no], [4, 7, 2, no, no]]
    assert next_token_targets(tokens, present, prompt=3).tolist() == [[no, no, 6, 2, no], [no, no, 2, no, no]]
    left = torch.tensor([[0, 0, 1, 4, 2]])
    assert next_token_targets(left, left != 0).tolist() == [[no, no, 4, 2, no]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_language_loss_smooths_labels_over_the_whole_vocabulary(smoothing):
    generator = torch.Generator().manual_seed(5)
    logits, targets = torch.randn(T, V, generator=generator), torch.tensor([3, IGNORED, 0, 10, 7, IGNORED, 7])
    expected, counted = 0.0, 0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        if target == IGNORED:
            continue
        said, counted = naive_softmax(row), counted + 1
        for word in range(V):
            wanted = (1 - smoothing) * (word == target) + smoothing / V
            expected -= wanted * math.log(said[word])
    assert float(language_loss(logits, targets, smoothing)) == pytest.approx(expected / counted, abs=1e-5)
    wanted = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=smoothing)
    assert_close(language_loss(logits, targets, smoothing), wanted)


def test_language_loss_of_texts_without_a_word_is_zero_not_nan():
    logits = torch.randn(3, V, requires_grad=True)
    loss = language_loss(logits, torch.full((3,), IGNORED))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()

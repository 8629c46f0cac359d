"""Scores against brute force, and against torchmetrics where the definitions coincide."""

import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torchmetrics import functional as published

from shared import metrics
from shared.core.errors import UserError
from shared.metrics import retrieval


def random_scores(rows, columns, levels=None, seed=0):
    """`levels` draws from few values, so that ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, (rows, columns), generator=generator).float()
    return torch.randn(rows, columns, generator=generator)


def brute_force_ahead(row, right):
    """How many wrong items stand at or above the best right one."""
    best = max(row[i] for i in right)
    return sum(1 for i, value in enumerate(row) if i not in right and not value < best)


# zero-shot classification


def test_the_classifier_is_the_normalised_mean_of_normalised_prompts():
    features = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    features[0, 0] *= 100  # a long embedding must weigh no more than the others
    for c, weight in enumerate(metrics.zero_shot_classifier(features)):
        mean = sum(p / p.norm() for p in features[c]) / 4
        torch.testing.assert_close(weight, mean / mean.norm())


def test_one_prompt_a_class_still_needs_its_axis():
    assert metrics.zero_shot_classifier(torch.randn(3, 1, 5)).shape == (3, 5)
    with pytest.raises(ValueError, match="classes, prompts, width"):
        metrics.zero_shot_classifier(torch.randn(3, 5))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_topk_without_ties_is_that_of_torchmetrics(k):
    scores, labels = random_scores(200, 7), torch.arange(200) % 7
    expected = published.accuracy(scores, labels, task="multiclass", num_classes=7, top_k=k, average="micro")
    assert metrics.topk_accuracy(scores, labels, k) == pytest.approx(expected.item())


def test_mean_per_class_is_the_macro_accuracy_of_torchmetrics_when_every_class_occurs():
    scores, labels = random_scores(200, 7), torch.arange(200) ** 2 % 7
    labels[:3] = torch.tensor([3, 5, 6])  # the squares leave only 0, 1, 2, 4: unbalanced, but complete now
    expected = published.accuracy(scores, labels, task="multiclass", num_classes=7, average="macro")
    assert metrics.mean_per_class(scores, labels) == pytest.approx(expected.item())
    assert metrics.mean_per_class(scores, labels) != pytest.approx(metrics.topk_accuracy(scores, labels))


def test_a_class_that_never_occurs_does_not_lower_the_mean_per_class():
    # torchmetrics divides by the classes that were answered, too
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.2, 0.7], [0.1, 0.8, 0.1]])
    assert metrics.mean_per_class(scores, torch.tensor([0, 1, 1])) == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_topk_counts_every_tie_against_the_model(k):
    scores, labels = random_scores(300, 6, levels=4), torch.arange(300) % 6
    expected = sum(brute_force_ahead(row.tolist(), {int(y)}) < k for row, y in zip(scores, labels, strict=True)) / 300
    assert metrics.topk_accuracy(scores, labels, k) == pytest.approx(expected)


def test_a_model_that_says_the_same_of_everything_scores_zero():
    labels = torch.arange(4)
    assert metrics.topk_accuracy(torch.zeros(4, 4), labels, 3) == 0
    assert metrics.mean_per_class(torch.zeros(4, 4), labels) == 0
    assert metrics.retrieval_hits(torch.zeros(4, 4), labels, (1,))["retrieval/t2i_r1@hit-pessimistic"] == 0


def test_a_model_that_answers_nan_scores_zero():
    labels = torch.arange(4)
    scores = torch.full((4, 4), math.nan)
    assert metrics.topk_accuracy(scores, labels) == 0
    assert set(metrics.retrieval_hits(scores, labels, (1, 3)).values()) == {0.0}
    assert metrics.topk_accuracy(torch.eye(4).fill_diagonal_(math.nan), labels) == 0


def test_confusion_has_truth_in_rows_and_agrees_with_torchmetrics():
    scores, labels = random_scores(200, 5), torch.arange(200) ** 2 % 5
    expected = published.confusion_matrix(scores, labels, task="multiclass", num_classes=5)
    assert torch.equal(metrics.confusion(scores, labels), expected)
    single = metrics.confusion(torch.tensor([[0.1, 0.9, 0.0]]), torch.tensor([2]))
    assert single[2, 1] == 1 and single.sum() == 1


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_diagonal_of_confusion_is_the_accuracy_even_with_ties(levels):
    scores, labels = random_scores(100, 4, levels), torch.arange(100) % 4
    matrix = metrics.confusion(scores, labels)
    assert matrix.sum() == 100
    assert matrix.diagonal().sum().item() / 100 == pytest.approx(metrics.topk_accuracy(scores, labels))
    hopeless = metrics.confusion(torch.full((3, 3), -math.inf), torch.arange(3))
    assert hopeless.diagonal().sum() == 0 and hopeless.sum() == 3


def test_labels_and_scores_that_do_not_fit_are_refused():
    for scores, labels in [
        (torch.zeros(2, 3), torch.tensor([0, 3])),
        (torch.zeros(2, 3), torch.tensor([-100, 0])),
        (torch.zeros(2, 3), torch.tensor([0])),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0])),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)),
    ]:
        with pytest.raises(ValueError):
            metrics.topk_accuracy(scores, labels)


def test_the_running_accuracy_over_uneven_batches_equals_the_whole():
    scores, labels = random_scores(97, 6, levels=5), torch.arange(97) ** 2 % 6
    running = metrics.ZeroShotAccuracy(classes=6, protocol="openai-ensemble", ks=(1, 3))
    for start, stop in ((0, 40), (40, 41), (41, 97)):
        running.update(scores[start:stop], labels[start:stop])
    found = {name: value.item() for name, value in running.compute().items()}
    assert found == pytest.approx(
        {
            "zeroshot/top1@openai-ensemble": metrics.topk_accuracy(scores, labels, 1),
            "zeroshot/top3@openai-ensemble": metrics.topk_accuracy(scores, labels, 3),
            "zeroshot/mean_per_class@openai-ensemble": metrics.mean_per_class(scores, labels),
        }
    )
    running.reset()
    running.update(scores[:5], labels[:5])
    assert running.compute()["zeroshot/top1@openai-ensemble"] == metrics.topk_accuracy(scores[:5], labels[:5])


# retrieval


def owners(images, texts, seed=0):
    """Every image has at least one text, some have several, in no order."""
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randint(images, (texts - images,), generator=generator)
    return torch.cat([torch.arange(images), extra])[torch.randperm(texts, generator=generator)]


@pytest.mark.parametrize("levels", [None, 3, 10])
@pytest.mark.parametrize("cells", [16_000_000, 50, 1])
def test_retrieval_hits_equal_brute_force_with_ties_and_in_chunks(levels, cells, monkeypatch):
    monkeypatch.setattr(retrieval, "_CELLS", cells)
    images, texts, ks = 17, 41, (1, 2, 5)
    scores, owner = random_scores(images, texts, levels), owners(images, texts)
    expected = {}
    for k in ks:
        rights = [{t for t in range(texts) if owner[t] == i} for i in range(images)]
        i2t = [brute_force_ahead(scores[i].tolist(), rights[i]) < k for i in range(images)]
        t2i = [brute_force_ahead(scores[:, t].tolist(), {int(owner[t])}) < k for t in range(texts)]
        expected[f"retrieval/i2t_r{k}@hit-pessimistic"] = sum(i2t) / images
        expected[f"retrieval/t2i_r{k}@hit-pessimistic"] = sum(t2i) / texts
    assert metrics.retrieval_hits(scores, owner, ks) == pytest.approx(expected)


def test_without_ties_the_hits_are_those_of_torchmetrics_and_not_its_recall():
    scores, owner = random_scores(12, 36), owners(12, 36)
    found = metrics.retrieval_hits(scores, owner, (5,))
    rows = [(scores[i], owner == i) for i in range(12)]
    hit = sum(published.retrieval_hit_rate(s, right, top_k=5) for s, right in rows) / 12
    recall = sum(published.retrieval_recall(s, right, top_k=5) for s, right in rows) / 12
    assert found["retrieval/i2t_r5@hit-pessimistic"] == pytest.approx(hit.item())
    assert found["retrieval/i2t_r5@hit-pessimistic"] > recall.item() + 0.1


def test_sibling_captions_are_no_rivals():
    # image 0 owns texts 0 and 1, tied on top: a hit; a tie with the stranger 2 is a miss
    owner = torch.tensor([0, 0, 1])
    hit = metrics.retrieval_hits(torch.tensor([[1.0, 1.0, 0.5], [0.0, 0.0, 1.0]]), owner, (1,))
    miss = metrics.retrieval_hits(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]), owner, (1,))
    assert hit["retrieval/i2t_r1@hit-pessimistic"] == 1.0
    assert miss["retrieval/i2t_r1@hit-pessimistic"] == 0.5


def test_the_two_directions_are_not_swapped():
    # both texts like image 0 best; each image likes its own text best
    scores = torch.tensor([[0.9, 0.8], [0.1, 0.7]])
    found = metrics.retrieval_hits(scores, torch.tensor([0, 1]), (1,))
    assert found["retrieval/i2t_r1@hit-pessimistic"] == 1.0
    assert found["retrieval/t2i_r1@hit-pessimistic"] == 0.5


def test_hits_from_features_equal_those_from_the_matrix(monkeypatch):
    monkeypatch.setattr(retrieval, "_CELLS", 100)
    images, texts = F.normalize(random_scores(20, 8), dim=1), F.normalize(random_scores(50, 8, seed=1), dim=1)
    owner = owners(20, 50)
    assert metrics.retrieval_hits_from_features(images, texts, owner) == metrics.retrieval_hits(images @ texts.T, owner)


def test_a_gallery_that_is_undefined_is_refused():
    scores = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="1 of 3 images have no text"):
        metrics.retrieval_hits(scores, torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="there are 3 images"):
        metrics.retrieval_hits(scores, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="one image row for 4 texts"):
        metrics.retrieval_hits(scores, torch.tensor([0, 1, 2]))


def test_running_hits_forget_what_a_sampler_repeats_and_ids_need_no_order():
    images, texts = F.normalize(random_scores(9, 6), dim=1), F.normalize(random_scores(20, 6, seed=1), dim=1)
    owner = owners(9, 20)
    expected = metrics.retrieval_hits(images @ texts.T, owner, (1, 3))
    image_ids, text_ids = torch.arange(9) * 7 + 100, torch.arange(20) * 3
    running = metrics.RetrievalHits(ks=(1, 3))
    for members in (torch.tensor([8, 2, 5]), torch.tensor([0, 1, 3, 4]), torch.tensor([6, 7, 8, 0])):  # 8 and 0 twice
        here = torch.isin(owner, members)
        running.update(images[members], image_ids[members], texts[here], text_ids[here], image_ids[owner[here]])
    assert {name: value.item() for name, value in running.compute().items()} == pytest.approx(expected)


def test_a_text_whose_image_never_came_is_named():
    running = metrics.RetrievalHits()
    one = torch.ones(1, 4)
    running.update(one, torch.tensor([5]), one, torch.tensor([0]), torch.tensor([77]))
    with pytest.raises(ValueError, match="first: 77"):
        running.compute()
    with pytest.raises(ValueError, match="as many ids as features"):
        running.update(one, torch.tensor([5, 6]), one, torch.tensor([0]), torch.tensor([5]))


# linear probe


def clusters(n, classes=3, width=4, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99)) * 1.5
    labels = torch.arange(n) % classes
    return centres[labels] + noise * torch.randn(n, width, generator=generator), labels


def test_the_probe_with_one_strength_is_scikit_learns_regression():
    from sklearn.linear_model import LogisticRegression

    (train_x, train_y), (test_x, test_y) = clusters(60), clusters(60, seed=1)
    probe = metrics.linear_probe(train_x, train_y, test_x, test_y, strengths=[0.5])
    reference = LogisticRegression(C=2.0, max_iter=1000).fit(train_x.numpy(), train_y.numpy())
    assert probe.predictions.tolist() == reference.predict(test_x.numpy()).tolist()
    assert probe.accuracy == pytest.approx(reference.score(test_x.numpy(), test_y.numpy()))
    assert probe.converged and probe.validation == {}
    assert not metrics.linear_probe(train_x, train_y, test_x, test_y, strengths=[1e-6], max_iter=1).converged


def test_the_strength_is_chosen_on_validation_and_refitted_on_everything():
    from sklearn.linear_model import LogisticRegression

    (train_x, train_y), (val_x, val_y), (test_x, test_y) = (clusters(30, seed=s, noise=3) for s in range(3))
    probe = metrics.linear_probe(train_x, train_y, test_x, test_y, val_x=val_x, val_y=val_y, strengths=[1e-3, 1.0, 1e6])
    scores = {
        s: LogisticRegression(C=1 / s, max_iter=1000).fit(train_x, train_y).score(val_x, val_y)
        for s in (1e6, 1.0, 1e-3)
    }
    assert probe.validation == pytest.approx(scores)
    assert probe.strength == max(scores, key=scores.get)
    both = LogisticRegression(C=1 / probe.strength, max_iter=1000)
    both.fit(torch.cat([train_x, val_x]), torch.cat([train_y, val_y]))
    assert probe.predictions.tolist() == both.predict(test_x.numpy()).tolist()


@pytest.mark.parametrize("peak", [1e-6, 10**-5.875, 10**-0.375, 1.0, 10**2.125, 1e6])
def test_the_search_finds_a_single_peak_to_an_eighth_of_a_decade_in_few_fits(peak):
    from shared.metrics import probe

    seen = Counter()

    def score(strength):
        seen[strength] += 1
        return -abs(math.log10(strength) - math.log10(peak))

    assert probe._coarse_to_fine(score) == pytest.approx(peak)
    assert len(seen) <= 15  # of 97
    assert {10.0**e for e in range(-6, 7, 2)} <= {float(f"{s:.6g}") for s in seen}


def test_the_probe_holds_out_a_fifth_when_no_validation_is_given():
    (train_x, train_y), (test_x, test_y) = clusters(60), clusters(60, seed=1)
    first = metrics.linear_probe(train_x, train_y, test_x, test_y, strengths=[1e-2, 1.0])
    again = metrics.linear_probe(train_x, train_y, test_x, test_y, strengths=[1e-2, 1.0])
    assert first.validation == again.validation and len(first.validation) == 2
    assert all((value * 12) == pytest.approx(round(value * 12)) for value in first.validation.values())


def test_a_probe_that_cannot_be_fitted_says_why():
    x, y = clusters(6)
    with pytest.raises(UserError, match="only one of val_x and val_y"):
        metrics.linear_probe(x, y, x, y, val_x=x)
    with pytest.raises(UserError, match="positive numbers"):
        metrics.linear_probe(x, y, x, y, strengths=[0.0])
    with pytest.raises(UserError, match="has one training example"):
        metrics.linear_probe(x[:3], y[:3], x, y)
    with pytest.raises(UserError, match="test split is empty"):
        metrics.linear_probe(x, y, x[:0], y[:0])


def test_few_shot_takes_k_of_every_class_and_grows_with_k():
    labels = torch.arange(40) ** 2 % 5  # unbalanced
    two, three = metrics.few_shot(labels, 2, seed=3), metrics.few_shot(labels, 3, seed=3)
    assert Counter(labels[two].tolist()) == {0: 2, 1: 2, 4: 2}
    assert set(two.tolist()) < set(three.tolist())
    assert torch.equal(two, metrics.few_shot(labels, 2, seed=3))
    assert not torch.equal(three, metrics.few_shot(labels, 3, seed=4))
    with pytest.raises(UserError, match="class 0 has 8 examples, 9 were asked for"):
        metrics.few_shot(labels, 9, seed=0)


def test_a_metric_has_no_name_without_its_protocol():
    assert metrics.metric_name("zeroshot", "top1", "openai-ensemble") == "zeroshot/top1@openai-ensemble"
    assert metrics.metric_name("textvqa", "acc", "m4c+ocr") == "textvqa/acc@m4c+ocr"
    for parts in (("zeroshot", "top1", ""), ("zeroshot", "top1@x", "y"), ("zero shot", "top1", "y")):
        with pytest.raises(UserError):
            metrics.metric_name(*parts)

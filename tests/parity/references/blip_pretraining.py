"""BLIP's pre-training losses (Li et al. 2022, Sec. 3.2) written out number by number: what ITC compares with and aims
at, whom hard negatives are drawn from, the smoothed next-token loss. Slow, and with nothing from `shared`."""

import math


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(scores):
    top = max(scores)
    exponentials = [math.exp(score - top) for score in scores]
    return [e / sum(exponentials) for e in exponentials]


def partners(row, batch, ids, queue_ids):
    """1 for each key (the batch's, then the queue's) that belongs to a row: its own, or with ids all of its picture."""
    if ids is None:
        return [float(key == row) for key in range(batch + len(queue_ids))]
    return [float(key == ids[row]) for key in [*ids, *queue_ids]]


def contrast(images, texts, slow_images, slow_texts, queue_images, queue_texts, temperature, alpha, ids, queue_ids):
    """ITC of lists of features -> the loss, and for every row the similarities to all keys, (image to text, text to
    image)."""
    image_keys, text_keys = [*slow_images, *queue_images], [*slow_texts, *queue_texts]
    loss, similarities = 0.0, ([], [])
    for way, (queries, teachers, keys) in enumerate(
        ((images, slow_images, text_keys), (texts, slow_texts, image_keys))
    ):
        total = 0.0
        for row, (query, teacher) in enumerate(zip(queries, teachers, strict=True)):
            belongs = partners(row, len(queries), ids, queue_ids)
            soft = softmax([dot(teacher, key) / temperature for key in keys])
            scores = [dot(query, key) / temperature for key in keys]
            similarities[way].append(scores)
            for wanted, taught, share in zip(belongs, soft, softmax(scores), strict=True):
                target = (1 - alpha) * wanted / sum(belongs) + alpha * taught
                total -= target * math.log(share)
        loss += total / len(queries) / 2
    return loss, similarities


def negative_probabilities(similarities, ids, floor):
    """How likely each of the batch is drawn as a row's hard negative."""
    batch = len(similarities)
    rows = []
    for row in range(batch):
        weights = [share + floor for share in softmax(similarities[row][:batch])]
        for other in range(batch):
            if other == row or (ids is not None and ids[other] == ids[row]):
                weights[other] = 0.0
        rows.append([weight / sum(weights) for weight in weights])
    return rows


def smoothed_next_token_loss(logits, tokens, pad, prompt, smoothing):
    """logits[text][position][word]; mean over all tokens that have to be told."""
    total = count = 0
    for text, words in zip(logits, tokens, strict=True):
        for position in range(len(words) - 1):
            wanted = words[position + 1]
            if wanted == pad or position + 1 < prompt:
                continue
            logs = [math.log(share) for share in softmax(text[position])]
            total -= (1 - smoothing) * logs[wanted] + smoothing * sum(logs) / len(logs)
            count += 1
    return total / count


def match_loss(true_pairs, false_pairs):
    """Logits (no, yes) of pairs that match and of pairs that do not."""
    losses = [-math.log(softmax(pair)[1]) for pair in true_pairs]
    losses += [-math.log(softmax(pair)[0]) for pair in false_pairs]
    return sum(losses) / len(losses)

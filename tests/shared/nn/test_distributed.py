"""Two real ranks on CPU: the gathered contrastive losses and their gradients equal those of the whole batch on one."""

from functools import partial

import pytest
import torch
from ranks import on_two_ranks
from torch.nn import functional as F

from shared.losses.contrastive import chunked_contrastive_loss, contrastive_loss
from shared.nn.distributed import all_gather, world

ROWS, WIDTH = 6, 5


def features():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(ROWS, WIDTH, generator=generator), dim=-1) for _ in range(2))
    return images, texts


LOSSES = {
    "plain": contrastive_loss,
    "chunks that do not divide": partial(chunked_contrastive_loss, chunk=2),
    "one chunk a rank": partial(chunked_contrastive_loss, chunk=64),
}


def step(loss, shard=slice(None), scale=7.0, weight=1.0):
    """Loss, gradients of images and texts, gradient of the scale, as plain numbers."""
    images, texts = (x[shard].clone().requires_grad_() for x in features())
    scale = torch.tensor(scale, requires_grad=True)
    value = loss(images, texts, scale)
    (weight * value).backward()
    return [x.tolist() for x in (value.detach(), images.grad, texts.grad, scale.grad)]


def on_rank(rank):
    shard = slice(rank * 3, rank * 3 + 3)
    found = {}
    for name, loss in LOSSES.items():
        for scale in (7.0, 100.0):
            found[name, scale] = step(loss, shard, scale)
        found[name, "weighted"] = step(loss, shard, weight=rank + 1.0)
    return found


@pytest.fixture(scope="module")
def ranks():
    """What each of the two ranks found, in order."""
    return on_two_ranks(on_rank)


@pytest.mark.parametrize("scale", [7.0, 100.0])
@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_give_the_loss_and_gradients_of_one(ranks, name, scale):
    whole = step(contrastive_loss, scale=scale)
    found = [rank[name, scale] for rank in ranks]
    # data-parallel training averages gradients over ranks
    for place, average in ((0, mean), (1, joined), (2, joined), (3, mean)):
        close(average([f[place] for f in found]), torch.tensor(whole[place]))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "plain"])
@pytest.mark.parametrize("key", [7.0, 100.0, "weighted"])
def test_each_rank_has_the_plain_losses_value_and_gradients(ranks, name, key):
    """Also where every rank weighs its loss differently, so that gradients from above differ."""
    for rank in ranks:
        for ours, plain in zip(rank[name, key][:3], rank["plain", key][:3], strict=True):
            close(torch.tensor(ours), torch.tensor(plain))
    close(mean([rank[name, key][3] for rank in ranks]), mean([rank["plain", key][3] for rank in ranks]))


def mean(values):
    return torch.tensor(values).mean()


def joined(shards):
    return torch.cat([torch.tensor(shard) for shard in shards]) / len(shards)


def close(found, expected):
    """To 1e-6 of the greatest entry, and of 1 where that is smaller."""
    torch.testing.assert_close(found, expected, atol=1e-6 * max(1.0, float(expected.abs().max())), rtol=0)


def test_one_process_gathers_nothing():
    x = torch.randn(2, 3)
    assert world() == (0, 1) and all_gather(x) is x


def test_the_contrastive_loss_is_the_papers_pseudocode():
    images, texts = features()
    logits = images.double() @ texts.double().T * 7
    rows = sum(-logits[i].log_softmax(0)[i] for i in range(ROWS)) / ROWS
    columns = sum(-logits[:, i].log_softmax(0)[i] for i in range(ROWS)) / ROWS
    assert float(contrastive_loss(images, texts, torch.tensor(7.0))) == pytest.approx(
        float(rows + columns) / 2, abs=1e-6
    )

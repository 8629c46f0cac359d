"""Two real ranks on CPU: the gathered contrastive loss and its gradients equal those of the whole batch on one rank."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from shared.distributed import all_gather, world
from shared.losses import contrastive_loss

ROWS, WIDTH = 6, 5


def features():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(ROWS, WIDTH, generator=generator), dim=-1) for _ in range(2))
    return images, texts


def on_rank(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    images, texts = (x[rank * 3 : rank * 3 + 3].requires_grad_() for x in features())
    scale = torch.tensor(7.0, requires_grad=True)
    loss = contrastive_loss(images, texts, scale)
    loss.backward()
    results.put((rank, float(loss), images.grad.tolist(), texts.grad.tolist(), float(scale.grad)))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_give_the_loss_and_gradients_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(on_rank, args=(port, results), nprocs=2)
    found = sorted(results.get() for _ in range(2))
    images, texts = (x.requires_grad_() for x in features())
    scale = torch.tensor(7.0, requires_grad=True)
    whole = contrastive_loss(images, texts, scale)
    whole.backward()
    assert sum(f[1] for f in found) / 2 == pytest.approx(float(whole.detach()), abs=1e-6)
    # data-parallel training averages gradients over ranks
    for place, expected in ((2, images.grad), (3, texts.grad)):
        gathered = torch.cat([torch.tensor(f[place]) for f in found]) / 2
        torch.testing.assert_close(gathered, expected, atol=1e-6, rtol=0)
    assert sum(f[4] for f in found) / 2 == pytest.approx(float(scale.grad), abs=1e-6)


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

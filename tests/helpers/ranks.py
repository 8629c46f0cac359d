"""Two ranks (processes, gloo, CPU) that run a function each; light, because both import it anew."""

import os
import socket
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.distributed as dist


def on_two_ranks(function) -> list:
    """What function(rank) gave on either rank, as plain numbers. The function is one of a module's own names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(2, get_context("spawn")) as ranks:
        return [started.result() for started in [ranks.submit(_run, function, rank, port) for rank in range(2)]]


def _run(function, rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        found = function(rank)
        dist.barrier()
        return found
    finally:  # also of a rank that failed, so that the other does not wait for it
        dist.destroy_process_group()

"""Starts ranks: processes forked from one that has imported everything already, so that a start costs no imports."""

import functools
import multiprocessing
import socket
from pathlib import Path

import pytest
import worker

LONGEST = 300  # seconds that one training may take on a busy machine
PRELOADED = ["lightning.pytorch", "shared.training.trainer", "papers.clip.module", "deepspeed"]
PRELOADED += ["deepspeed.runtime.zero.muon.muon_optimizer"]  # imported by every deepspeed.initialize; half of its time


@pytest.fixture(scope="session")
def processes():
    """launch(target, task) -> the exit codes of its ranks, once all have ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # One thread each: forks keep no thread pools, and the order of sums stays the same. Inherited by all.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        context.Process(target=str).start()

    def launch(target, task: worker.Task) -> list[int]:
        task.folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [context.Process(target=target, args=(task, rank, port), daemon=True) for rank in range(task.ranks)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(LONGEST)
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
        return [rank.exitcode for rank in ranks]

    return launch


@pytest.fixture(scope="session")
def trained(processes, tmp_path_factory):
    """trained(strategy, accumulate) -> the folder of a whole training: on one rank by "auto", else on two."""

    @functools.cache
    def folder(strategy: str, accumulate: int = 1) -> Path:
        place, ranks = tmp_path_factory.mktemp(strategy), 1 if strategy == "auto" else 2
        assert processes(worker.run, worker.Task(strategy, ranks, place, accumulate)) == [0] * ranks
        return place

    return folder

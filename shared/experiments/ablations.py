"""Runs the arms of a paper's claims: every (arm, seed) is trained once, from (recipe, seed) alone, several at once.

A paper's claims.py offers ARMS, {name: function(Context) -> measurements}, and CLAIMS, {id: Claim}. A seed's arms begin
in the order of ARMS: put those first that make what others wait for.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.core.device import cores
from shared.core.errors import UserError
from shared.core.files import write_whole
from shared.core.paper_package import Context, PaperPackage
from shared.core.recipe import SEED_BASE, Recipe, digest, training_fields


@dataclass(frozen=True)
class Outcome:
    arm: str
    seed: int
    seconds: float
    measured: dict[str, Any]  # numbers, `curves`: {name: [(samples, value)]}, `waited`: share of the time, for data


def seeds_of(recipe: Recipe) -> list[int]:
    return [SEED_BASE + index for index in range(recipe.seeds)]


def run_arms(
    package: str, recipe: Recipe, arms: list[str], folder: Path, progress: Callable[[int], None]
) -> Iterator[Outcome]:
    """Yield every (arm, seed) as it is finished; what stands finished in `folder` with this recipe is not run again."""
    order = list(PaperPackage(package).claims.ARMS)
    jobs = []
    for seed in seeds_of(recipe):
        for arm in sorted(arms, key=order.index):
            job = Job(package, recipe, arm, seed, folder / f"{arm}-{seed}", seed == SEED_BASE)
            finished = job.finished()
            if finished:
                yield finished
            else:
                jobs.append(job)
    at_once = min(recipe.jobs or _processes(recipe), len(jobs))
    if at_once > 1:
        yield from _in_processes(jobs, at_once, progress)
    else:
        for job in jobs:
            yield job.run(progress)


@dataclass(frozen=True)
class Job:
    package: str
    recipe: Recipe
    arm: str
    seed: int
    folder: Path
    first: bool

    @property
    def file(self) -> Path:
        return self.folder / "outcome.json"

    def finished(self) -> Outcome | None:
        if not self.file.is_file():
            return None
        found = json.loads(self.file.read_text())
        return Outcome(**found["outcome"]) if found["recipe"] == digest(training_fields(self.recipe)) else None

    def run(self, progress: Callable[[int], None]) -> Outcome:
        import lightning

        started = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        lightning.seed_everything(self.seed, verbose=False)
        context = Context(self.recipe, self.seed, self.folder, progress, self.first, self.arm)
        measured = PaperPackage(self.package).claims.ARMS[self.arm](context)
        outcome = Outcome(self.arm, self.seed, round(time.perf_counter() - started, 2), measured)
        write_whole(self.file, json.dumps({"recipe": digest(training_fields(self.recipe)), "outcome": asdict(outcome)}))
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)  # nothing is left to go on with
        return outcome


def _processes(recipe: Recipe) -> int:
    """Small models leave cores idle: one process a core beats one process on all of them. One process on a GPU, whose
    memory is not known here to hold more."""
    from shared.core.device import device_for

    return 1 if device_for(recipe).type == "cuda" else cores()


def _in_processes(jobs: list[Job], at_once: int, progress: Callable[[int], None]) -> Iterator[Outcome]:
    import multiprocessing

    # spawn, not fork: torch's thread pools do not survive a fork
    context = multiprocessing.get_context("spawn")
    done = context.Queue()  # a plain pipe would hold a few hundred jobs, and putting more hang
    # Workers keep to their seeds while these have arms left, then help with others: few wait for what a seed shares,
    # and few make its data twice.
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    todo = [context.Queue() for _ in seeds[:at_once]]
    for job in jobs:
        todo[seeds.index(job.seed) % len(todo)].put(job)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # for what computes beside torch, such as scikit-learn
        os.environ.setdefault(name, str(max(1, cores() // at_once)))
    workers = []
    for number in range(at_once):
        first = number % len(todo)
        turn = (*todo[first:], *todo[:first])
        workers.append(context.Process(target=_work, args=(turn, done, at_once), daemon=False))
        for queue in todo:
            queue.put(None)
    for worker in workers:
        worker.start()
    try:
        left = len(jobs)
        while left:
            kind, value = _next(done, workers)
            if kind == "samples":
                progress(value)
            elif kind == "failed":
                raise value if isinstance(value, UserError) else RuntimeError(value)
            else:
                left -= 1
                yield value
        for worker in workers:
            worker.join()
    finally:
        for queue in todo:
            queue.cancel_join_thread()
        for worker in workers:
            worker.terminate()


def _next(done, workers):
    """The next message of a worker. UserError where one has died."""
    import queue

    message = None
    while message is None:
        with contextlib.suppress(queue.Empty):
            message = done.get(timeout=2)
        dead = [w for w in workers if w.exitcode not in (None, 0)]
        if dead and (message is None or message[0] == "samples"):  # the others' may come for a long time
            raise UserError(
                f"a training process ended with code {dead[0].exitcode} (killed, or out of memory?); "
                "run again with ARGS=jobs=1 to use less memory"
            )
    return message


def _work(todo, done, at_once: int) -> None:
    """A worker process: one job after the other, queue by queue, each up to its None; its share of the cores, quiet; it
    does not outlive its parent."""
    import multiprocessing
    import signal
    import threading

    def follow_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    import torch

    from shared.core.console import quiet

    quiet()
    torch.set_num_threads(max(1, cores() // at_once))
    for job in (job for queue in todo for job in iter(queue.get, None)):
        try:
            done.put(("done", job.run(lambda samples: done.put(("samples", samples)))))
        except UserError as error:
            done.put(("failed", error))
        except Exception:
            done.put(("failed", f"arm {job.arm}, seed {job.seed}:\n{traceback.format_exc()}"))
            return
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what this arm needed most of it, another worker may need now

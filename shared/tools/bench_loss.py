"""Time and memory of the contrastive loss, plain against chunked: one process a measurement, in turns, on the CPU."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared.core.errors import UserError
from shared.core.files import ROOT

SCALE = 1 / 0.07  # CLIP's scale at the start of training (Sec. 2.5)
MATRICES = 4  # B x B floats that the plain loss holds at its peak: two directions, each with its gradient
GIB = 2**30


def measure(
    B: int = 32768,
    D: int = 512,
    *,
    chunks: tuple[int, ...] | None = None,
    rounds: int = 3,
    threads: int | None = None,
) -> dict:
    """Forward and backward of one batch of B random pairs of width D in fp32, plain and in every chunk size.

    chunks: default the loss's own; threads: default torch's own. A round runs every variant once, each in a fresh
    process, and measures its second step (the first, small one loads what is loaded late). Returns, beside batch,
    width, threads and rounds:

    - rows: one dict a variant with chunk (None: plain) and, one number a round, seconds (wall), cpu_seconds (of all
      threads: what else runs on the machine disturbs them less) and bytes (peak of resident memory less what lay there
      before the loss: logits, their gradients and those of the features). Where the plain loss ran, the others also
      have time_ratio, cpu_ratio and memory_ratio (medians over rounds of this / plain), loss_difference and
      gradient_difference (absolute; the greatest over the entries of all three gradients), and both again with
      _relative_ (norm of the difference / norm; the greatest of the three);
    - not_run: why the plain loss did not run, None where it did. It is left out where 4·B² floats and 1 GiB more than
      is free would be needed.
    """
    from shared.losses.contrastive import CHUNK

    if not Path("/proc/self/status").is_file():
        raise UserError("bench: peak memory is read from /proc/self/status, which only Linux has; run it there")
    chunks = (CHUNK,) if chunks is None else chunks
    needed, free = MATRICES * 4 * B * B + GIB, _kib("/proc/meminfo", "MemAvailable") * 1024
    not_run = None
    if needed > free:
        not_run = f"the plain loss of {B} pairs needs about {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"
    variants = ([] if not_run else [None]) + list(chunks)
    with tempfile.TemporaryDirectory() as folder:
        steps = {variant: [] for variant in variants}
        for _ in range(rounds):
            for variant in variants:
                steps[variant].append(_in_a_process(B, D, variant, threads, Path(folder) / f"{variant}.pt"))
        rows = [_row(variant, steps, Path(folder)) for variant in variants]
    threads = steps[variants[0]][0]["threads"]
    return {"batch": B, "width": D, "threads": threads, "rounds": rounds, "not_run": not_run, "rows": rows}


def _row(variant: int | None, steps: dict[int | None, list[dict]], folder: Path) -> dict:
    import torch

    row = {"chunk": variant}
    for key in ("seconds", "cpu_seconds", "bytes"):
        row[key] = [step[key] for step in steps[variant]]
    if variant is None or None not in steps:
        return row
    for key, ratio in (("seconds", "time_ratio"), ("cpu_seconds", "cpu_ratio"), ("bytes", "memory_ratio")):
        row[ratio] = statistics.median(a[key] / b[key] for a, b in zip(steps[variant], steps[None], strict=True))
    ours, plain = (torch.load(folder / f"{name}.pt", weights_only=True) for name in (variant, None))
    absolute = [float((a - b).abs().max()) for a, b in zip(ours, plain, strict=True)]
    relative = [float((a - b).norm() / b.norm()) for a, b in zip(ours, plain, strict=True)]
    row |= {"loss_difference": absolute[0], "loss_relative_difference": relative[0]}
    return row | {"gradient_difference": max(absolute[1:]), "gradient_relative_difference": max(relative[1:])}


def _in_a_process(B: int, D: int, chunk: int | None, threads: int | None, target: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "shared.tools.bench_loss", json.dumps([B, D, chunk, threads, str(target)])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        name = "plain loss" if chunk is None else f"loss in chunks of {chunk}"
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else "killed, as for lack of memory" if done.returncode == -9 else "no message"
        raise UserError(f"bench: the {name} of {B} pairs ended with status {done.returncode}: {why}")
    return json.loads(done.stdout)


def _step(B: int, D: int, chunk: int | None, threads: int | None, target: str) -> dict:
    """One measurement, in this process; the loss and its gradients are saved in target."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, this process ends and no other
    import torch
    from torch.nn import functional as F

    from shared.losses.contrastive import chunked_contrastive_loss, contrastive_loss

    if threads:
        torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)

    def inputs(rows: int) -> list[torch.Tensor]:
        features = [F.normalize(torch.randn(rows, D, generator=generator), dim=-1) for _ in range(2)]
        return [x.requires_grad_() for x in (*features, torch.tensor(SCALE))]

    def loss(*of: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(*of) if chunk is None else chunked_contrastive_loss(*of, chunk=chunk)

    loss(*inputs(min(B, 512))).backward()
    measured = inputs(B)
    # VmHWM, not getrusage: ru_maxrss of a child starts at its parent's.
    before = _kib("/proc/self/status", "VmRSS")
    started, cpu_started = time.perf_counter(), time.process_time()
    value = loss(*measured)
    value.backward()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = _kib("/proc/self/status", "VmHWM")
    torch.save([value.detach(), *(x.grad for x in measured)], target)
    bytes_taken = (peak - before) * 1024
    used = torch.get_num_threads()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "bytes": bytes_taken, "threads": used}


def _kib(file: str, key: str) -> int:
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(key + ":"))


if __name__ == "__main__":
    print(json.dumps(_step(*json.loads(sys.argv[1]))))

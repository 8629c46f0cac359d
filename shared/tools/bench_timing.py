"""Races: contestants in turns, their times, memory and the machine's matrix peak."""

from __future__ import annotations

import gc
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shared.core.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FEWEST_ROUNDS = 3


# ---- time


def race(
    contestants: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    *,
    device: str = "cpu",
    tolerance: float = 1e-4,
    seconds: float = math.inf,
    at_least: float = 0.0,
    items: float = 1,
    unit: str = "calls/s",
    peak: float | None = None,
) -> list[dict]:
    """Call every contestant once a round, `repeats` rounds, the first place moving on; one row a contestant.

    A call returns a tensor, a number or a tuple of them: all contestants must agree with the first within `tolerance`
    of its largest entry, at the warm-up and in every round (UserError). So contestants that train on equal data from
    equal weights are held to equal losses all along, which compares their gradients too.
    Row: name; value = `items` a second at the median; unit; median_s; ratio = median over rounds of its time by that of
    the first contestant in the same round, with its quartiles ratio_low and ratio_high; seconds, one a round; and
    with `peak`, share_of_peak = flops / median_s / peak, by the FLOPs of the first contestant (the same for all: work,
    not waste, is counted).
    Fewer rounds, but at least 3, are run where `repeats` would take more than `seconds`. `at_least`: shortest time
    to be measured; quicker calls are repeated within a round.
    """
    names = list(contestants)
    started = time.perf_counter()
    counter = FlopCounterMode(display=False)

    def counted() -> Any:  # as written: what is compiled hides its products
        with torch.compiler.set_stance("force_eager"), counter:
            return contestants[names[0]]()

    warm_ups = [{**contestants, names[0]: counted} if peak else contestants]
    if at_least or device == "cuda":
        warm_ups.append(contestants)
    for warm_up in warm_ups:
        warm = {name: _timed(name, call, device, 1) for name, call in warm_up.items()}
        _same({name: output for name, (_, output) in warm.items()}, tolerance)
    calls = max(1, math.ceil(at_least / min(taken for taken, _ in warm.values())))
    times: dict[str, list[float]] = {name: [] for name in names}
    rounds_started = time.perf_counter()
    for done in range(repeats):
        a_round = (time.perf_counter() - rounds_started) / max(1, done)
        if done >= FEWEST_ROUNDS and time.perf_counter() - started + a_round > seconds:
            break
        outputs = {}
        for name in names[done % len(names) :] + names[: done % len(names)]:
            taken, outputs[name] = _timed(name, contestants[name], device, calls)
            times[name].append(taken)
        _same({name: outputs[name] for name in names}, tolerance)
    return rows_of(times, items=items, unit=unit, flops=counter.get_total_flops(), peak=peak)


def rows_of(
    times: Mapping[str, Sequence[float]],
    *,
    items: float = 1,
    unit: str = "calls/s",
    flops: float | None = None,
    peak: float | None = None,
) -> list[dict]:
    """{contestant: seconds, one a round} -> the rows that `race` describes."""
    base = next(iter(times.values()))
    rows = []
    for name, taken in times.items():
        ratios = [its / bases for its, bases in zip(taken, base, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        median = statistics.median(taken)
        row = {
            "name": name,
            "value": _rounded(items / median),
            "unit": unit,
            "median_s": _rounded(median),
            "ratio": _rounded(statistics.median(ratios)),
            "ratio_low": _rounded(low),
            "ratio_high": _rounded(high),
            "seconds": [_rounded(value) for value in taken],
        }
        if flops and peak:
            row["share_of_peak"] = _rounded(flops / median / peak)
        rows.append(row)
    return rows


def _timed(name: str, call: Callable[[], Any], device: str, calls: int) -> tuple[float, Any]:
    """(seconds a call, the last output)."""
    try:
        synchronise(device)
        started = time.perf_counter()
        for _ in range(calls):
            output = call()
        synchronise(device)
        return (time.perf_counter() - started) / calls, output
    except torch.OutOfMemoryError:
        raise UserError(f"bench: {name} ran out of the GPU's memory; give a smaller batch=") from None


def synchronise(device: str) -> None:
    """Kernels of a GPU run behind the calls that start them: wait for them."""
    if device == "cuda":
        torch.cuda.synchronize()


def _same(outputs: Mapping[str, Any], tolerance: float) -> None:
    (first, expected), *others = outputs.items()
    for name, output in others:
        for ours, theirs in zip(_tensors(expected), _tensors(output), strict=True):
            if ours.shape != theirs.shape:
                raise UserError(f"bench: {first} gives {tuple(ours.shape)}, {name} {tuple(theirs.shape)}: not the same")
            gap = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30))
            if not gap <= tolerance:  # a NaN is not the same either
                raise UserError(
                    f"bench: {name} does not compute what {first} does: they differ by {gap:.2g} of the largest value, "
                    f"allowed is {tolerance:g}"
                )


def _tensors(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, tuple) else (output,)
    return [torch.as_tensor(part).detach().double() for part in parts]


def _rounded(value: float) -> float:
    """Four digits: more would be noise, and would make the committed files larger."""
    return float(f"{value:.4g}")


# ---- what the machine can do


def matrix_peak(device: str, precision: str) -> dict | None:
    """{"precision", "flops_per_second", "shape"} of the fastest of several matrix products, each at its best time.

    None where the precision is not for this machine: a CPU without bf16 instructions is a hundred times slower in it.
    """
    if precision != "fp32" and _product(256, 256, 256, device, precision) * 2 < _product(256, 256, 256, device, "fp32"):
        return None
    if device == "cuda":
        shapes = [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 16384), (16384, 768, 3072), (50432, 3072, 768)]
    else:
        shapes = [(1024, 1024, 1024), (2048, 2048, 2048), (800, 768, 3072), (3152, 768, 3072), (3152, 3072, 768)]
    speeds = {shape: _product(*shape, device, precision) for shape in shapes}
    shape, speed = max(speeds.items(), key=lambda item: item[1])
    return {"precision": precision, "flops_per_second": _rounded(speed), "shape": list(shape)}


def _product(rows: int, inner: int, columns: int, device: str, precision: str) -> float:
    """FLOPs a second of x W^T, as a linear layer lays them out."""
    x = torch.randn(rows, inner, device=device).to(DTYPES[precision])
    weight = torch.randn(columns, inner, device=device).to(DTYPES[precision])
    out = torch.empty(rows, columns, device=device, dtype=DTYPES[precision])
    calls = 1 if device != "cuda" else 3 if precision == "fp32" else 20
    times = [_timed("x", lambda: torch.mm(x, weight.mT, out=out), device, calls)[0] for _ in range(6)]
    return 2 * rows * inner * columns / min(times[1:])


# ---- memory


class MemoryMeter:
    """Peak memory above where this process stood when the meter was made, in bytes; best used in a process of its own.

    On a GPU what torch allocates there. On a CPU resident memory, by the kernel's high-water mark of this process
    (Linux); elsewhere by ru_maxrss, which cannot be reset: there `peak` never falls.
    """

    def __init__(self, device: str):
        self.device = device
        gc.collect()
        self.start = torch.cuda.memory_allocated() if device == "cuda" else self._resident("VmRSS")
        self.reset()

    def reset(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # "reset the peak resident set size", proc(5)

    def peak(self) -> int:
        """The most that was in use at once since the last reset."""
        if self.device == "cuda":
            synchronise(self.device)
            return torch.cuda.max_memory_allocated() - self.start
        return self._resident("VmHWM") - self.start

    @staticmethod
    def _resident(key: str) -> int:
        try:
            # ru_maxrss of a process that a larger one has started begins with that one's
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
        except (OSError, StopIteration):
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return most if sys.platform == "darwin" else most * 1024


def in_child(function: Callable, *arguments: Any) -> Any:
    """What an importable function returns, called in a fresh process: nobody's memory or caches but its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError(
                f"bench: the process of {function.__name__}{arguments} was ended from outside, as a rule for want of "
                "memory; give a smaller batch="
            ) from None


def memory_rows(peaks: Mapping[str, int]) -> list[dict]:
    """{contestant: bytes} -> rows as `race` gives them, in MiB and without times."""
    base = next(iter(peaks.values()))
    return [
        {"name": name, "value": round(peak / 2**20), "unit": "MiB", "ratio": _rounded(peak / max(1, base))}
        for name, peak in peaks.items()
    ]

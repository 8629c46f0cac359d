"""Side by side in one run: contestants in turns and the ratios of pairs, peak memory, shares of the machine's own peak.

What a paper's bench.py is made of, and what needs no paper: attention backends, patch product, contrastive loss.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.console import Console
from shared.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FEWEST_ROUNDS = 3
# Tokens of a caption with both end marks. Of the kind that COCO's captions have: about 13 on average, few beyond 20.
NATURAL = (11, 16, 13, 10, 12, 22, 14, 11, 9, 13, 15, 12, 10, 17, 12, 14)
DEFAULTS = {
    "sweep": "all",
    "variant": "",
    "batch": "",
    "repeats": 5,
    "precision": "",
    "seconds": 150.0,  # at most this long in one race, but for its first three rounds
    "out": "results/bench",
}


@dataclass(frozen=True)
class Job:
    """One line of a sweep's table: `run() -> rows`, one row a contestant; `seconds` is a guess of what it takes."""

    setting: str
    seconds: float
    run: Callable[[], list[dict]]


@dataclass(frozen=True)
class Sweep:
    """Jobs that share a table, a JSON file and a figure, all called `name`.

    verb: how a contestant's ratio reads, "takes" (times as long) or "needs" (times as much). x: the key of the rows
    that a line figure has on its axis; without one the figure shows ratios as bars.
    """

    name: str
    title: str
    jobs: Sequence[Job]
    verb: str = "takes"
    x: str = ""
    x_label: str = ""


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
    flops: float | None = None,
    peak: float | None = None,
) -> list[dict]:
    """Call every contestant once a round, `repeats` rounds, the first place moving on; one row a contestant.

    A call returns a tensor, a number or a tuple of them: all contestants must agree with the first within `tolerance`
    of its largest entry, at the warm-up and in every round (UserError). So contestants that train on equal data from
    equal weights are held to equal losses all along, which compares their gradients too.
    Row: name; value = `items` a second at the median; unit; median_s; ratio = median over rounds of its time by that of
    the first contestant in the same round, with its quartiles ratio_low and ratio_high; seconds, one a round; and
    share_of_peak = flops / median_s / peak where both are given (the same flops for all: work, not waste, is counted).
    Fewer rounds, but at least 3, are run where `repeats` would take more than `seconds`. `at_least`: shortest time
    to be measured; quicker calls are repeated within a round.
    """
    names = list(contestants)
    started = time.perf_counter()
    calls = 1
    for _ in range(2 if at_least or device == "cuda" else 1):
        warm = {name: _timed(name, call, device, 1) for name, call in contestants.items()}
        _same({name: output for name, (_, output) in warm.items()}, tolerance)
    if at_least:
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
    return rows_of(times, items=items, unit=unit, flops=flops, peak=peak)


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


# ---- what needs no paper


CORE = {
    "attention": lambda plan: [_attention(plan.device, plan.precision, plan.repeats)],
    "patches": lambda plan: [_patches(plan.device, plan.precision, plan.repeats)],
    "loss": lambda plan: _loss(plan.device, plan.repeats),
}


def _loss(device: str, repeats: int) -> list[Sweep]:
    """Time and peak memory of the chunked loss against the plain one: two tables of the same measurement."""
    width = 512
    measured = functools.cache(_loss_on_gpu if device == "cuda" else _loss_on_cpu)
    sizes = (65_536, 32_768, 8_192) if device == "cuda" else (8_192, 32_768)

    def jobs(which: int, seconds: float) -> list[Job]:
        def run(batch: int) -> list[dict]:
            return [{"batch": batch, **row} for row in measured(batch, width, repeats)[which]]

        return [
            Job(f"batch {batch:,}, width {width}", seconds * (batch / 8_192) ** 2, functools.partial(run, batch))
            for batch in sizes
        ]

    title = "CONTRASTIVE LOSS in tiles, forward and backward, fp32"
    return [
        Sweep("loss-time", title, jobs(0, 0.3 if device == "cuda" else 20)),
        Sweep("loss-memory", f"{title}: peak memory", jobs(1, 0), verb="needs"),
    ]


def _loss_on_cpu(batch: int, width: int, repeats: int) -> tuple[list[dict], list[dict]]:
    from shared.bench_loss import measure

    found = {
        "plain" if row["chunk"] is None else "chunked": row
        for row in measure(batch, width, rounds=min(3, repeats))["rows"]
    }
    names = [name for name in ("chunked", "plain") if name in found]
    return (
        rows_of({name: found[name]["seconds"] for name in names}, unit="losses/s"),
        memory_rows({name: int(statistics.median(found[name]["bytes"])) for name in names}),
    )


def _loss_on_gpu(batch: int, width: int, repeats: int) -> tuple[list[dict], list[dict]]:
    from shared.losses import CHUNK, chunked_contrastive_loss, contrastive_loss

    torch.manual_seed(0)
    features = [torch.nn.functional.normalize(torch.randn(batch, width, device="cuda"), dim=-1) for _ in range(2)]
    inputs = [x.requires_grad_() for x in (*features, torch.tensor(14.3, device="cuda"))]

    def call(loss: Callable) -> tuple[Tensor, ...]:
        value = loss(*inputs)
        return (value, *torch.autograd.grad(value, inputs[:2]))

    losses = {
        ("chunked" if chunk == CHUNK else f"chunk {chunk:,}"): functools.partial(chunked_contrastive_loss, chunk=chunk)
        for chunk in (CHUNK, 4 * CHUNK, 16 * CHUNK)
        if chunk <= batch
    } | {"plain": contrastive_loss}
    calls = {name: functools.partial(call, loss) for name, loss in losses.items()}
    peaks, not_run = {}, {}
    for name, step in list(calls.items()):
        meter = MemoryMeter("cuda")
        try:
            step()
            peaks[name] = meter.peak()
        except torch.OutOfMemoryError:
            del calls[name]
            not_run[name] = f"out of the GPU's {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB of memory"
        torch.cuda.empty_cache()
    times = race(calls, min(3, repeats), device="cuda", tolerance=1e-3, unit="losses/s")
    memory = memory_rows(peaks)
    if not_run:
        times[0]["not_run"] = memory[0]["not_run"] = not_run
    return times, memory


def _attention(device: str, precision: str, repeats: int) -> Sweep:
    from shared.attention import StructuredMask, attention

    def documents(tokens: int, length: int) -> StructuredMask:
        return StructuredMask(lambda b, h, q, k: q // length == k // length, 1, 1, tokens, tokens)

    more = 64 if device == "cuda" else 1
    # (what, B, H, T, K, causal, mask)
    shapes = [
        ("pictures, ViT-B/32, 50 tokens", 8, 12, 50, 64, False, None),
        ("pictures, ViT-L/14 at 336 px, 577 tokens", 1, 16, 577, 64, False, None),
        ("texts, causal, 77 tokens", 8, 8, 77, 64, True, None),
        ("packed, causal, 4 documents of 256 tokens", 1, 8, 1024, 64, True, 256),
    ]

    def run(B: int, H: int, T: int, K: int, causal: bool, length: int | None, train: bool) -> list[dict]:
        generator = torch.Generator().manual_seed(0)
        q, k, v, gradient = (
            torch.randn(B, H, T, K, generator=generator).to(device, DTYPES[precision]) for _ in range(4)
        )
        for tensor in (q, k, v):
            tensor.requires_grad_(train)
        mask = documents(T, length) if length else None

        def call(backend: str):
            with torch.set_grad_enabled(train):
                out = attention(q, k, v, mask=mask, causal=causal, backend=backend)
            return (out, *torch.autograd.grad(out, (q, k, v), gradient)) if train else out

        backends = ["sdpa", "reference"] + (["flex"] if device == "cuda" or not train else [])
        rows = race(
            {name: functools.partial(call, name) for name in backends},
            repeats,
            device=device,
            tolerance=1e-4 if precision == "fp32" else 5e-2,
            at_least=0.02,
            items=B,
            unit="rows/s",
        )
        return [{"tokens": T, "batch": B, **row} for row in rows]

    jobs = []
    for train in (False, True):
        for what, B, H, *rest in shapes:
            setting = f"{'forward and backward' if train else 'forward'}: {what}, batch {B * more}"
            jobs.append(Job(setting, 1.5, functools.partial(run, B * more, H, *rest, train)))
    return Sweep("attention", "ATTENTION, the backends of one call", jobs)


def _patches(device: str, precision: str, repeats: int) -> Sweep:
    from shared.patch_embedding import PatchEmbedding

    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    batch = 256 if device == "cuda" else 16

    def run(patch: int, width: int, train: bool) -> list[dict]:
        torch.manual_seed(0)
        ours = PatchEmbedding(patch, width, mean=mean, std=std).to(device)
        pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=device)
        shift = torch.tensor(mean, device=device).view(3, 1, 1)
        scale = torch.tensor(std, device=device).view(3, 1, 1)

        def convolution() -> Tensor:
            normalised = pixels.float().div_(255).sub_(shift).div_(scale)
            return torch.conv2d(normalised, ours.weight, stride=patch).flatten(2).transpose(1, 2)  # (B, N, D)

        def call(embed: Callable[[], Tensor]):
            with torch.set_grad_enabled(train), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                out = embed()
            return torch.autograd.grad(out, ours.weight, torch.ones_like(out))[0] if train else out

        rows = race(
            {"product": lambda: call(lambda: ours(pixels)), "convolution": lambda: call(convolution)},
            repeats,
            device=device,
            tolerance=1e-4 if precision == "fp32" else 5e-2,
            at_least=0.02,
            items=batch,
            unit="pictures/s",
        )
        return [{"patch": patch, "batch": batch, **row} for row in rows]

    jobs = []
    for train in (False, True):
        for patch, width in ((32, 768), (16, 768), (14, 1024)):
            setting = f"{'forward and backward' if train else 'forward'}: 224 px, patch {patch}, batch {batch}"
            jobs.append(Job(setting, 2.5, functools.partial(run, patch, width, train)))
    return Sweep("patches", "PATCHES, from bytes to tokens: one matrix product, or normalise and convolve", jobs)


# ---- what a paper's contestants are given


def pictures_and_texts(
    batch: int, size: int, context: int, *, start: int, end: int, words: tuple[int, int], lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Pictures of noise (B, 3, size, size) uint8; token ids (B, context), whose texts have `lengths` in turn: `start`,
    any from words[0] to below words[1], `end`, then zeros."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(*words, (batch, context), generator=generator)
    ends = torch.tensor([min(lengths[row % len(lengths)], context) - 1 for row in range(batch)])[:, None]
    place = torch.arange(context)
    tokens = torch.where(place < ends, tokens, torch.where(place == ends, end, 0))
    tokens[:, 0] = start
    return pixels, tokens


def longest(batch: int, context: int, lengths: Sequence[int] = NATURAL) -> int:
    """Tokens of the longest text of such a batch."""
    return min(context, max(lengths[:batch]))


def normaliser(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """From bytes to what a library's model takes, in its weights' precision."""
    weight = next(model.parameters())

    @functools.cache
    def parts(device: torch.device) -> list[Tensor]:
        return [torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std)]

    def normalised(pixels: Tensor) -> Tensor:
        shift, scale = parts(pixels.device)
        return pixels.float().div_(255).sub_(shift).div_(scale).to(weight.dtype)

    return normalised


def without_gradients(call: Callable[..., Any], *data: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return call(*data)

    return run


def stepper(
    model: nn.Module, loss: Callable[..., Tensor | tuple[Tensor, ...]], parameters: Iterable, precision: str
) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """A function of the loss's arguments that takes one optimizer step, and returns the loss, or the several losses
    whose sum is trained on, before it."""
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step(*data: Tensor) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast(data[0].device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            losses = loss(*data)
        several = isinstance(losses, tuple)
        (sum(losses) if several else losses).backward()
        optimizer.step()
        optimizer.zero_grad()
        return tuple(one.detach() for one in losses) if several else losses.detach()

    return step


def compiled(model: nn.Module) -> nn.Module:
    """The model with every layer of its stacks compiled by itself: what torch advises where layers are alike, since a
    stack is then compiled once and not once a layer. Anybody's model: it asks for no more than an nn.ModuleList."""
    # all layers are compiled through one function of torch, whose limit of variants is meant for one layer
    torch._dynamo.config.recompile_limit = 64
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            for layer in stack:
                layer.compile(dynamic=False)
    return model


# ---- a whole run


@dataclass(frozen=True)
class Plan:
    """What to measure, and on what; `variant` and `batches` empty: what suits the device. A paper's own plan has a
    method `_<name>` for every sweep."""

    device: str
    precision: str
    repeats: int
    seconds: float
    peaks: list[dict]
    variant: str = ""
    batches: tuple[int, ...] = ()

    def sweeps(self, name: str) -> list[Sweep]:
        if name == "core":
            return [sweep for part in CORE for sweep in self.sweeps(part)]
        return CORE[name](self) if name in CORE else [getattr(self, f"_{name}")()]

    @property
    def peak(self) -> float:
        return next(peak["flops_per_second"] for peak in self.peaks if peak["precision"] == self.precision)

    def expected(self, work: float, rounds: int | None = None) -> float:
        """Seconds, when `work` FLOPs are counted for one round of all contestants."""
        rounds = (self.repeats if rounds is None else rounds) + 1
        return 1 + rounds * work / (0.6 * self.peak)

    def on(self, cpu, cuda):
        return cuda if self.device == "cuda" else cpu

    def race(self, calls: Mapping[str, Callable], **options) -> list[dict]:
        """Looser where weights move: a rounding error in a gradient that is zero becomes a whole step of Adam."""
        training = options.pop("training", False)
        tolerance = 5e-2 if self.precision == "bf16" else 1e-3 if training else 1e-4
        return race(
            calls,
            self.repeats,
            device=self.device,
            tolerance=tolerance,
            seconds=self.seconds,
            peak=self.peak,
            **options,
        )


def run_plan(
    root: Path, overrides: Iterable[str], plan: type[Plan], sweeps: Sequence[str], known: Callable[[str], Any]
) -> None:
    """Print a table a sweep; write it, with its figure, into results/bench/.

    overrides: key=value words over DEFAULTS. sweeps: the names to choose from. known(variant) raises for a wrong one.
    """
    settings = parse(overrides, DEFAULTS)
    chosen = sweeps if settings["sweep"] == "all" else settings["sweep"].split(",")
    known_sweeps = (*sweeps, *CORE) if "core" in sweeps else sweeps
    if unknown := set(chosen) - set(known_sweeps):
        raise UserError(f"bench: no sweep '{unknown.pop()}'; choose all, {', '.join(known_sweeps)}")
    if settings["repeats"] < 1:
        raise UserError(f"bench: repeats={settings['repeats']}: give at least 1")
    if settings["variant"]:
        known(settings["variant"])
    batches = _batches(settings["batch"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = settings["precision"] or ("bf16" if device == "cuda" else "fp32")
    if precision not in DTYPES:
        raise UserError(f"bench: no precision '{precision}'; choose {', '.join(DTYPES)}")
    measured = DTYPES if device == "cpu" else (precision,)
    peaks = [peak for peak in (matrix_peak(device, name) for name in measured) if peak]
    if precision not in {peak["precision"] for peak in peaks}:
        raise UserError(f"bench: {precision} products are slower than fp32 ones on this machine; precision=fp32")
    made = plan(device, precision, settings["repeats"], settings["seconds"], peaks, settings["variant"], batches)
    settings |= {"device": device, "precision": precision}
    run_sweeps([sweep for name in chosen for sweep in made.sweeps(name)], settings, root / settings["out"], peaks)


def one_of(variant: str, variants: Iterable[str]) -> None:
    if variant not in variants:
        raise UserError(f"bench: no variant '{variant}'; choose {', '.join(variants)}")


def _batches(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(",") if size)
    except ValueError:
        raise UserError(f"bench: batch={text} is no list of whole numbers; batch=4,16") from None
    if any(size < 1 for size in sizes):
        raise UserError(f"bench: batch={text} holds a batch of nothing")
    return sizes


def parse(overrides: Iterable[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """key=value words over `defaults`, each in its default's type; UserError for an unknown key or a wrong value."""
    settings = dict(defaults)
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or key not in settings:
            raise UserError(f"bench: '{override}' is not one of {', '.join(f'{k}=' for k in settings)}")
        kind = type(defaults[key])
        try:
            settings[key] = kind(value)
        except ValueError:
            raise UserError(f"bench: {key}={value} is no {'whole number' if kind is int else 'number'}") from None
    return settings


def run_sweeps(sweeps: list[Sweep], settings: Mapping[str, Any], folder: Path, peaks: Sequence[dict]) -> None:
    """Run every job with its remaining time; after each sweep print its table, write its JSON and its figure.

    Written are folder/<name>-<device>-<precision>.json and folder/figures/<name>-<device>-<precision>.png. A job that
    fails costs its own rows: the others still run, then its error is raised. Ctrl-C keeps what was measured before.
    `sweeps` is emptied on the way, for a sweep that is over must not keep its models.
    """
    console = Console()
    count, total = sum(len(sweep.jobs) for sweep in sweeps), sum(job.seconds for sweep in sweeps for job in sweep.jobs)
    console.stages(count)
    console.say(f"{count} measurements, about {_minutes(total)} on a quiet machine")
    for peak in peaks:
        shape = " x ".join(map(str, peak["shape"]))
        console.say(f"matrix product, {peak['precision']}: {peak['flops_per_second'] / 1e9:,.0f} GFLOP/s at {shape}")
    begun, done, failures = time.perf_counter(), 0.0, []
    while sweeps:
        sweep, rows = sweeps.pop(0), []
        try:
            for job in sweep.jobs:
                slower = (time.perf_counter() - begun) / done if done else 1.0
                console.stage(f"{sweep.name}: {job.setting} (about {_minutes((total - done) * slower)} left)")
                try:
                    gc.collect()
                    if settings["device"] == "cuda":
                        torch.cuda.empty_cache()
                    rows += [{"setting": job.setting, **row} for row in job.run()]
                except UserError as error:
                    failures.append(f"{sweep.name}: {job.setting}: {error}")
                except Exception as error:
                    traceback.print_exc()
                    told = f"{type(error).__name__}: {error}".splitlines()[0]
                    failures.append(f"{sweep.name}: {job.setting}: {told}")
                done += job.seconds
        finally:
            if rows:
                path = save(sweep, rows, settings, folder, peaks)
                print(f"\n{table(sweep, rows)}\n{path}\n", flush=True)
    if failures:
        raise UserError("; ".join(failures))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{math.ceil(seconds)} s"


def save(sweep: Sweep, rows: list[dict], settings: Mapping[str, Any], folder: Path, peaks: Sequence[dict]) -> Path:
    """Settings, machine, commit, date, peaks and rows as JSON; beside it, in figures/, the picture."""
    from shared.runs import write_whole
    from shared.tracking import commit_and_dirty, machine_description

    commit, dirty = commit_and_dirty(Path(__file__).resolve().parents[1])
    result = {
        "name": sweep.name,
        "title": sweep.title,
        "settings": dict(settings),
        "machine": machine_description(),
        "commit": commit,
        "dirty": dirty,
        "date": time.strftime("%Y-%m-%d"),
        "peaks": list(peaks),
        "rows": rows,
    }
    path = folder / f"{sweep.name}-{settings['device']}-{settings['precision']}.json"
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, indent=1) + "\n")
    if any("ratio" in row for row in rows):
        (folder / "figures" / f"{path.stem}.png").write_bytes(figure(sweep, rows, result["machine"]))
    return path


def table(sweep: Sweep, rows: Sequence[dict]) -> str:
    """One line a setting: the first contestant's own value, then how many times as long (as much) the others take."""
    lines = [sweep.title]
    if not any("ratio" in row for row in rows):
        return "\n".join(lines + [", ".join(f"{key} {value}" for key, value in row.items()) for row in rows])
    names = list(dict.fromkeys(row["name"] for row in rows))
    head = ["", names[0], "of peak", *(f"{name} {sweep.verb}" for name in names[1:])]
    cells = []
    for setting, group in by_setting(rows).items():
        first = group[names[0]]
        share = f"{100 * first['share_of_peak']:.0f} %" if "share_of_peak" in first else ""
        others = [ratio_text(group[name]) if name in group else "-" for name in names[1:]]
        cells.append([setting, f"{first['value']:,g} {first['unit']}", share, *others])
    if not any(line[2] for line in cells):
        head, *cells = ([*line[:2], *line[3:]] for line in (head, *cells))
    widths = [max(len(line[column]) for line in (head, *cells)) for column in range(len(head))]
    for line in (head, ["-" * width for width in widths], *cells):
        padded = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        lines.append("  ".join(padded).rstrip())
    what = "as much" if sweep.verb == "needs" else "as long; in brackets the quartiles over rounds"
    return "\n".join([*lines, f"x: times {what}. Above 1, {names[0]} is ahead."])


def ratio_text(row: dict) -> str:
    spread = f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]" if "ratio_low" in row else ""
    return f"{row['ratio']:.2f} x{spread}"


def by_setting(rows: Iterable[dict]) -> dict[str, dict[str, dict]]:
    settings: dict[str, dict[str, dict]] = {}
    for row in rows:
        settings.setdefault(row["setting"], {})[row["name"]] = row
    return settings


def figure(sweep: Sweep, rows: Sequence[dict], machine: Mapping[str, Any]) -> bytes:
    """A PNG: values over `sweep.x` as lines, or every setting's ratios as bars with their quartiles."""
    import io

    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from shared.figures import _STYLE

    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        height = 4.0 if sweep.x else 1.6 + 0.24 * len(rows)
        canvas = Figure(figsize=(7.5, height), dpi=110, layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots()
        (_lines if sweep.x else _bars)(axes, sweep, rows)
        where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
        canvas.suptitle(f"{sweep.title[:1]}{sweep.title[1:].lower()}", x=0.01, ha="left", fontsize=11, weight="bold")
        axes.set_title(f"{where}, torch {machine['torch']}", fontsize=8, weight="normal")
        canvas.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _lines(axes, sweep: Sweep, rows: Sequence[dict]) -> None:
    from shared.figures import _COLOURS, _MARKS

    for place, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        own = sorted((row[sweep.x], row["value"]) for row in rows if row["name"] == name)
        axes.plot(*zip(*own, strict=True), color=_COLOURS[place], marker=_MARKS[place], label=name)
    axes.set(xlabel=sweep.x_label, ylabel=rows[0]["unit"], xticks=sorted({row[sweep.x] for row in rows}))
    axes.set_ylim(bottom=0)
    axes.legend()


def _bars(axes, sweep: Sweep, rows: Sequence[dict]) -> None:
    from shared.figures import _COLOURS

    names = list(dict.fromkeys(row["name"] for row in rows))
    settings = by_setting(rows)
    thick = 0.8 / max(1, len(names) - 1)
    for place, name in enumerate(names[1:]):
        for line, group in enumerate(settings.values()):
            if name not in group:
                continue
            row, y = group[name], line + (place - (len(names) - 2) / 2) * thick
            label = name if line == next(i for i, g in enumerate(settings.values()) if name in g) else None
            axes.barh(y, row["ratio"], height=0.9 * thick, color=_COLOURS[place + 1], alpha=0.8, label=label)
            end = row["ratio"]
            if "ratio_low" in row:
                axes.plot([row["ratio_low"], row["ratio_high"]], [y, y], color="#111827", linewidth=1.2)
                end = row["ratio_high"]
            axes.annotate(f"{row['ratio']:.2f}", (end, y), xytext=(4, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="#374151", linewidth=1)
    firsts = [group[names[0]] for group in settings.values()]
    values = [f"{first['name']}: {first['value']:,g} {first['unit']}" for first in firsts]
    labels = [f"{setting}\n{value}" for setting, value in zip(settings, values, strict=True)]
    axes.set_yticks(range(len(settings)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel(f"{'memory' if sweep.verb == 'needs' else 'time'}, {names[0]} = 1; above 1, {names[0]} is ahead")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1 if len(rows) > 12 else -0.22), ncols=len(names))

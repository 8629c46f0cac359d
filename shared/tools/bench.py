"""Side by side in one run: contestants in turns and the ratios of pairs, peak memory, shares of the machine's own peak.

What a paper's bench.py is made of, and what needs no paper: attention backends, patch product, contrastive loss.
"""

from __future__ import annotations

import functools
import gc
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.core.console import Console
from shared.core.errors import UserError
from shared.tools.bench_core import CORE
from shared.tools.bench_output import save, table
from shared.tools.bench_timing import DEFAULTS, DTYPES, NATURAL, Sweep, matrix_peak, race

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

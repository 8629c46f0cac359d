"""Side by side in one run: contestants in turns and the ratios of pairs, peak memory, shares of the machine's own peak.

A paper's bench.py says how another library's model is built with the weights of ours, and what a step is; its sweeps
are made of the `race`s of a Setup.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shared.core.console import Console
from shared.core.errors import UserError
from shared.tools.bench_output import Sweep, save, table
from shared.tools.bench_setup import Setup
from shared.tools.bench_timing import DTYPES, matrix_peak

if TYPE_CHECKING:
    from shared.core.paper_package import Bench

DEFAULTS = {
    "sweep": "all",
    "variant": "",
    "batch": "",
    "repeats": 5,
    "precision": "",
    "seconds": 150.0,  # at most this long in one race, but for its first three rounds
    "out": "results/bench",
}


# ---- a whole run


def run(bench: Bench, root: Path, overrides: Iterable[str]) -> None:
    """Print a table a sweep; write it, with its figure, into results/bench/. overrides: key=value words over DEFAULTS.

    UserError: an unknown key, sweep, variant or precision, a wrong number, a precision that is slow on this machine.
    """
    from shared.tools.bench_core import CORE

    settings = parse(overrides, DEFAULTS)
    chosen = list(bench.SWEEPS) if settings["sweep"] == "all" else settings["sweep"].split(",")
    sweeps = {**bench.SWEEPS, **CORE} if "core" in bench.SWEEPS else bench.SWEEPS
    if unknown := set(chosen) - set(sweeps):
        raise UserError(f"bench: no sweep '{unknown.pop()}'; choose all, {', '.join(bench.SWEEPS)}")
    if settings["repeats"] < 1:
        raise UserError(f"bench: repeats={settings['repeats']}: give at least 1")
    if settings["variant"]:
        bench.config_of(settings["variant"])
    batches = _batches(settings["batch"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = settings["precision"] or ("bf16" if device == "cuda" else "fp32")
    if precision not in DTYPES:
        raise UserError(f"bench: no precision '{precision}'; choose {', '.join(DTYPES)}")
    measured = DTYPES if device == "cpu" else (precision,)
    peaks = [peak for peak in (matrix_peak(device, name) for name in measured) if peak]
    if precision not in {peak["precision"] for peak in peaks}:
        raise UserError(f"bench: {precision} products are slower than fp32 ones on this machine; precision=fp32")
    setup = Setup(device, precision, settings["repeats"], settings["seconds"], peaks, settings["variant"], batches)
    settings |= {"device": device, "precision": precision}
    run_sweeps([sweep for name in chosen for sweep in sweeps[name](setup)], settings, root / settings["out"], peaks)


def pick(variant: str, variants: Mapping[str, Callable[[], Any]]) -> Any:
    """The variant's configuration; UserError for an unknown one."""
    if variant not in variants:
        raise UserError(f"bench: no variant '{variant}'; choose {', '.join(variants)}")
    return variants[variant]()


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
    """Run every job; after each sweep print its table, write its JSON and its figure.

    Written are folder/<name>-<device>-<precision>.json and folder/figures/<name>-<device>-<precision>.png. A job that
    fails costs its own rows: the others still run, then its error is raised. Ctrl-C keeps what was measured before.
    `sweeps` is emptied on the way, for a sweep that is over must not keep its models.
    """
    console = Console()
    count, begun, done, failures = sum(len(sweep.jobs) for sweep in sweeps), time.perf_counter(), 0, []
    console.stages(count)
    for peak in peaks:
        shape = " x ".join(map(str, peak["shape"]))
        console.say(f"matrix product, {peak['precision']}: {peak['flops_per_second'] / 1e9:,.0f} GFLOP/s at {shape}")
    while sweeps:
        sweep, rows = sweeps.pop(0), []
        try:
            for job in sweep.jobs:
                left = (count - done) * (time.perf_counter() - begun) / done if done else 0
                console.stage(f"{sweep.name}: {job.setting}" + (f" (about {left / 60:.0f} min left)" if left else ""))
                done += 1
                try:
                    gc.collect()
                    if settings["device"] == "cuda":
                        torch.cuda.empty_cache()
                    rows += [{"setting": job.setting, **row} for row in job.run()]
                except UserError as error:
                    failures.append(f"{sweep.name}: {job.setting}: {error}")
                except Exception as error:
                    traceback.print_exc()
                    message = f"{type(error).__name__}: {error}".splitlines()[0]
                    failures.append(f"{sweep.name}: {job.setting}: {message}")
        finally:
            if rows:
                path = save(sweep, rows, settings, folder, peaks)
                print(f"\n{table(sweep, rows)}\n{path}\n", flush=True)
    if failures:
        raise UserError("; ".join(failures))

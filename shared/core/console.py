"""What a person sees while it runs: numbered stages, one bar with rate and remaining time, plain lines elsewhere.

Of tqdm, not of rich, whose live display has no rate and takes over standard output, where the verbs' own lines go.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Console:
    """Writes to standard error, so that a verb's own output can be piped. Bars only on a terminal."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.number = self.total = 0
        self.clock = time.perf_counter()

    def stages(self, total: int) -> None:
        self.number, self.total, self.clock = 0, total, time.perf_counter()

    def stage(self, title: str) -> None:
        self.number += 1
        spent = time.perf_counter() - self.clock
        print(f"[{self.number}/{self.total}] {spent:4.0f} s  {title}", file=self.stream, flush=True)

    def say(self, text: str) -> None:
        print(f"      {text}", file=self.stream, flush=True)

    def bar(self, items: Iterable[T], unit: str) -> Iterator[T]:
        from tqdm import tqdm

        items = list(items)
        return iter(tqdm(items, unit=f" {unit}", file=self.stream, disable=not self.live, leave=False))

    @contextmanager
    def progress(self, total: int, title: str, unit: str) -> Iterator[Progress]:
        progress = Progress(self, total, title, unit)
        try:
            yield progress
        finally:
            progress.close()

    @contextmanager
    def waiting(self, title: str) -> Iterator[Callable[[str], None]]:
        """A line with a running clock; the value yielded changes its text."""
        if not self.live:
            self.say(f"{title} ...")
            yield lambda text: None
            return
        state, done = {"text": title}, threading.Event()

        def draw() -> None:
            started = time.perf_counter()
            while not done.wait(0.2):
                line = f"      {state['text']} ... {time.perf_counter() - started:.0f} s"
                print(f"\r{line}\033[K", end="", file=self.stream, flush=True)
            print("\r\033[K", end="", file=self.stream, flush=True)

        thread = threading.Thread(target=draw, daemon=True)
        thread.start()
        try:
            yield lambda text: state.update(text=text)
        finally:
            done.set()
            thread.join()


class Progress:
    """A bar over a known amount of work; without a terminal a line every half minute."""

    def __init__(self, console: Console, total: int, title: str, unit: str):
        from tqdm import tqdm

        self.console, self.total, self.title, self.done = console, total, title, 0
        self.started = self.spoken = time.perf_counter()
        self.text = ""
        self.tqdm = tqdm(
            total=total,
            desc=f"      {title}",
            unit=f" {unit}",
            unit_scale=True,
            file=console.stream,
            disable=not console.live,
            leave=False,
            dynamic_ncols=True,
        )

    def advance(self, amount: int) -> None:
        self.done += amount
        self.tqdm.update(amount)
        now = time.perf_counter()
        # processes that are still starting would make the first estimate absurd
        if not self.console.live and now - self.spoken > 30 and self.done > 0.02 * self.total:
            self.spoken = now
            left = (now - self.started) * (self.total - self.done) / max(1, self.done)
            self.console.say(f"{self.title}: {self.done / self.total:.0%}, about {left:.0f} s left; {self.text}")

    def note(self, text: str) -> None:
        self.text = text
        self.tqdm.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        self.tqdm.close()


def quiet() -> None:
    """Silence third-party chatter (not errors): Lightning's tips, worker hints, deprecations."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "mlflow", "alembic", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

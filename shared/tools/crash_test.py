"""`chaos`: a small run is killed with -9 at random moments, started again each time with the same command, and must end
as one that was never interrupted: the same curves, metrics and weights, bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shared.core.catalog import Catalog
from shared.core.errors import UserError

# Over the smoke recipe. A recipe that lacks a key goes without it.
SMALL = {
    "steps": 60, "pairs": 256, "test_pairs": 16, "classes": 4, "batch": 16, "measure_at": 4, "val_pictures": 8,
    "accelerator": "cpu", "checkpoint_every": 3, "jobs": 1,
}  # fmt: skip
LONGEST = 600  # seconds that one start may take


@dataclass
class CrashTest:
    """What was done, and what came out of it. lost: steps that had to be trained again, per kill."""

    kills: int = 0
    while_writing: int = 0
    before_a_checkpoint: int = 0
    runs: int = 0
    equal: int = 0
    lost: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        mean = sum(self.lost) / len(self.lost) if self.lost else 0.0
        return (
            f"{self.kills} kills over {self.runs} runs ({self.while_writing} while a checkpoint was being written, "
            f"{self.before_a_checkpoint} before the first), {mean:.1f} steps trained again per kill; "
            f"{self.equal} of {self.runs} runs ended bit for bit as the uninterrupted one"
        )


def chaos(
    catalog: Catalog,
    name: str,
    kills: int,
    seed: int,
    folder: Path,
    overrides: list[str],
    say: Callable[[str], None],
) -> CrashTest:
    """Kill the paper's first arm `kills` times, over as many whole runs as that takes. folder: a new, empty one.

    UserError where a run does not end, or fails without having been killed.
    """
    drawn = random.Random(seed)
    keys = {one.name for one in dataclasses.fields(catalog.package(name).recipe_type)}
    overrides = [*(f"{key}={value}" for key, value in SMALL.items() if key in keys), *overrides]
    recipe = catalog.recipe(name, "smoke", overrides)  # a mistake in it is told here, not by every child
    command = [sys.executable, "-c", CHILD, str(catalog.root), catalog.import_name, name, json.dumps(overrides)]
    found = CrashTest()
    say("an uninterrupted run")
    expected, duration = ended(Child(command, folder / "whole"))
    while found.kills < kills:
        place = folder / f"killed-{found.runs}"
        found.runs += 1
        kept = 0
        while True:
            child = Child(command, place)
            # A step, and a moment within it: drawn over seconds, a busy machine would be killed early or not at all.
            step, writing = drawn.randint(kept, recipe.steps - 1), drawn.random() < 0.5
            later = drawn.uniform(0.0, duration / recipe.steps)
            if found.kills >= kills or not child.survives_until(step, later, writing) or not child.kill():
                break
            found.kills += 1
            found.while_writing += child.left_half_written()
            kept = child.newest_step()
            found.before_a_checkpoint += kept == 0
            found.lost.append(max(0, child.seen - kept))
            say(f"kill {found.kills}: at step {child.seen}, goes on from step {kept}")
        now, _ = ended(child)
        different = sorted(key for key in expected.keys() | now.keys() if expected.get(key) != now.get(key))
        found.equal += not different
        found.differences += [f"run {found.runs}: {key}" for key in different]
        say(f"run {found.runs} ended {'bit for bit equal' if not different else f'different: {different}'}")
    return found


class Child:
    """One start of the run in a process of its own; it writes the number of every finished step to `progress`."""

    def __init__(self, command: list[str], folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.progress, self.log = folder / "progress", folder / "log.txt"
        self.progress.unlink(missing_ok=True)
        environment = os.environ | {"PYTHONPATH": command[3], "OMP_NUM_THREADS": "1"}  # the root of the catalog
        with self.log.open("a") as log:
            self.process = subprocess.Popen([*command, str(folder)], stdout=log, stderr=log, env=environment)
        self.limit = time.monotonic() + LONGEST

    @property
    def seen(self) -> int:
        """Steps trained so far, those before a resume included."""
        try:
            return int(self.progress.read_text() or 0)
        except (OSError, ValueError):
            return 0

    def alive(self) -> bool:
        """Whether it has not ended yet, after a moment's wait; UserError where it takes too long."""
        if self.process.poll() is not None:
            return False
        if time.monotonic() > self.limit:
            self.kill()
            raise UserError(f"{self.folder}: no end after {LONGEST} s; {self.last_words()}")
        time.sleep(0.0005)
        return True

    def survives_until(self, step: int, later: float, writing: bool) -> bool:
        """Wait for a step, `later` seconds more, and for a checkpoint that is begun if wanted. False: it ended."""
        moment = None
        while self.alive():
            if moment is None and self.seen >= step:
                moment = time.monotonic() + later
            if moment is not None and time.monotonic() >= moment and (not writing or self.left_half_written()):
                return True
        return False

    def kill(self) -> bool:
        """With -9. False where it had just ended by itself."""
        self.process.kill()
        return self.process.wait() == -signal.SIGKILL

    def left_half_written(self) -> bool:
        return any((self.folder / "checkpoints").glob("*.partial"))

    def newest_step(self) -> int:
        from shared.training.checkpointing import newest_valid

        sealed = newest_valid(self.folder / "checkpoints")
        return sealed.step if sealed else 0

    def last_words(self) -> str:
        """The last line that it printed: the folder is gone when the error is read."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"its last words: {lines[-1].strip()}" if lines else "it said nothing"


def ended(child: Child) -> tuple[dict, float]:
    """Wait for the end. -> ({what is compared: its value or digest}, seconds of training)."""
    started = None
    while child.alive():
        started = started or (time.monotonic() if child.seen else None)
    spent = time.monotonic() - started if started else 0.0
    if child.process.returncode:
        raise UserError(f"{child.folder}: the run ended with code {child.process.returncode}; {child.last_words()}")
    outcome = json.loads((child.folder / "outcome.json").read_text())["outcome"]["measured"]
    compared = {key: value for key, value in outcome.items() if key != "waited"}
    curves = compared.pop("curves", {})
    compared |= {f"curve {key}": value for key, value in curves.items()}
    weights = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in child.folder.glob("*.safetensors")}
    if not weights:
        raise UserError(f"{child.folder}: the arm kept no weights, so they cannot be compared")
    return compared | weights, spent


CHILD = """
import json, sys
from pathlib import Path
from shared.core.catalog import Catalog
from shared.tools.crash_test import run_child
root, package, name, overrides, folder = sys.argv[1:]
run_child(Catalog(Path(root) / package, package), name, json.loads(overrides), Path(folder))
"""


def run_child(catalog: Catalog, name: str, overrides: list[str], folder: Path) -> None:
    """What is started and killed: the first arm of the paper at smoke scale, as `reproduce` runs it.

    folder/progress then holds the number of steps trained so far.
    """
    import torch

    from shared.core.console import quiet
    from shared.core.recipe import SEED_BASE
    from shared.experiments.ablations import Job

    quiet()
    torch.set_num_threads(1)
    recipe = catalog.recipe(name, "smoke", overrides)
    arm = next(iter(catalog.package(name).claims.ARMS))
    seen, file = 0, (folder / "progress").open("w")

    def progress(samples: int) -> None:
        nonlocal seen
        seen += samples // recipe.batch
        file.seek(0)
        file.write(str(seen))
        file.flush()

    Job(catalog.package(name).name, recipe, arm, SEED_BASE, folder, True).run(progress)

"""The folder of one reproduction: a new one, or the one that an interrupted run of the same recipe and code left."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from shared.core.errors import UserError
from shared.core.files import claim, write_whole
from shared.core.provenance import code_digest
from shared.core.recipe import Recipe, digest

STATE, LOCK, FINISHED = "run.json", "run.lock", "report.json"


class RunFolder:
    """runs/<paper>/<scale>/<stamp>/ with run.json, what a resume needs to know; locked while this process lives.

    before: seconds that earlier sessions took; sessions: how many there were, this one included.
    """

    def __init__(self, path: Path, state: dict[str, Any], lock) -> None:
        self.path, self._state, self._lock, self._clock = path, state, lock, time.perf_counter()
        self.before, self.sessions = state["seconds"], state["sessions"]

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self._clock

    @property
    def started(self) -> str:
        return self._state["started"]

    def keep(self, **values: Any) -> None:
        """Remember values, and the seconds so far, for a resume."""
        self._state |= values | {"seconds": round(self.seconds, 1)}
        write_whole(self.path / STATE, json.dumps(self._state, indent=1))

    def same(self, what: str, value: Any) -> None:
        """Refuse to go on where `what` is not what it was when the run began."""
        if self._state.get(what, value) != value:
            raise UserError(
                f"{self.path}: was begun with {what} {self._state[what]}, now it is {value}; restore it, or begin anew "
                "with ARGS=--fresh"
            )
        self.keep(**{what: value})


def open_run(root: Path, recipe: Recipe, fresh: bool = False) -> RunFolder:
    """The newest unfinished run of this recipe by this very code that no process holds; else a new folder."""
    parent = root / "runs" / recipe.paper / recipe.scale
    begun = {"recipe": digest(recipe), "code": code_digest(root)}
    for path in [] if fresh else sorted(parent.glob("*/"), reverse=True):
        state = _state_of(path)
        if state and not (path / FINISHED).exists() and all(state.get(key) == begun[key] for key in begun):
            lock = _locked(path)
            if lock:
                run = RunFolder(path, state | {"sessions": state["sessions"] + 1}, lock)
                run.keep()
                return run
    path = new_folder(parent)
    state = begun | {"started": time.strftime("%Y-%m-%dT%H:%M:%S"), "seconds": 0.0, "sessions": 1}
    run = RunFolder(path, state, _locked(path))
    run.keep()
    return run


def new_folder(parent: Path) -> Path:
    """A folder named after the moment; a second run in the same second gets another."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(100):
        folder = parent / (stamp if attempt == 0 else f"{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{parent}: cannot write there ({error.strerror}); run in a folder of your own") from None
    raise UserError(f"{parent}: no free name for a run; remove old runs with `make clean`")


def _state_of(path: Path) -> dict | None:
    try:
        state = json.loads((path / STATE).read_text())
        return state if {"recipe", "code", "started", "seconds", "sessions"} <= state.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _locked(path: Path):
    """An open file that holds the folder's lock, None where another process does. The lock ends with the process."""
    try:
        return claim(path / LOCK)[0]
    except BlockingIOError:
        return None

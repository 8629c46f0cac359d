"""Sealed checkpoints, so that a run killed at any moment goes on bit for bit where its last one stands.

A checkpoint is a folder `step-00000040/`: the Trainer's own state (state.ckpt), every rank's random states and position
in the data, and SEAL.json with the size and SHA-256 of each file and the identity of the run. It is written beside as
`step-00000040.partial/`, flushed to the disk and renamed; a folder without a valid seal is no checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Checkpoint

from shared.core.errors import UserError
from shared.core.files import flush, made, sha256
from shared.nn.distributed import world

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

SEAL, STATE = "SEAL.json", "state.ckpt"
KEPT = 2  # the newest, and the one before it


@dataclass(frozen=True)
class Sealed:
    """A checkpoint whose files are what its seal says."""

    folder: Path
    seal: dict[str, Any]

    @property
    def step(self) -> int:
        return self.seal["step"]

    @property
    def state(self) -> Path:
        return self.folder / STATE

    def of_rank(self, rank: int) -> dict[str, Any]:
        """{"random": the random states, "data": the position in the data} of one rank."""
        return torch.load(self.folder / _file_of(rank), weights_only=True)


class SealedCheckpoints(Checkpoint):
    """Writes a sealed checkpoint every `every` optimizer steps, and restores the random states of one.

    identity: what must be the same for a resume (recipe, data, seed, ranks ...): JSON values. conditions: what only
    bit-equality needs (threads, torch): differences are told, not refused. last: write one after the last step too.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        identity: dict,
        conditions: dict,
        resumed: Sealed | None = None,
        last: bool = False,
    ):
        self.folder, self.every, self.identity, self.conditions = folder, every, identity, conditions
        self.resumed, self.last = resumed, last

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Before a step, not after it: then every hook of the step before has run (clamps, momentum, queues), no
        # gradient is half accumulated, and Lightning's counters of finished batches are right.
        step = trainer.global_step
        if batch_idx % trainer.accumulate_grad_batches:
            return
        if self.resumed and step == self.resumed.step:
            restore_random(self.resumed.of_rank(trainer.global_rank)["random"])
            self.resumed = None
        elif self.every and step and step % self.every == 0:
            self.save(trainer, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.last and not (self.folder / f"step-{trainer.global_step:08d}").is_dir():
            self.save(trainer, trainer.global_step * trainer.accumulate_grad_batches)

    def save(self, trainer: Trainer, items: int) -> Path:
        """Write, flush, seal and rename a checkpoint behind the first `items` batches; all ranks take part."""
        step = trainer.global_step
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(final.name + ".partial")
        if trainer.global_rank == 0:
            for stale in (partial, final):
                shutil.rmtree(stale, ignore_errors=True)
            made(partial)
        trainer.strategy.barrier("checkpoint folder")
        try:
            trainer.save_checkpoint(partial / STATE)
            loader: Any = trainer.train_dataloader
            mine = {"random": random_states(), "data": loader.position(items)}
            torch.save(mine, partial / _file_of(trainer.global_rank))
        except OSError as error:
            raise UserError(
                f"{partial}: the checkpoint cannot be written ({error.strerror}); free space there"
            ) from error
        trainer.strategy.barrier("checkpoint parts")
        if trainer.global_rank == 0:
            seal = {"format": 1, "step": step, "identity": self.identity, "conditions": self.conditions}
            try:
                _seal(partial, final, seal)
            except OSError as error:
                raise UserError(f"{final}: cannot be sealed ({error.strerror}); free space there") from error
            for old in _folders(self.folder)[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
        trainer.strategy.barrier("checkpoint sealed")
        return final


def newest(folder: Path, identity: dict, conditions: dict | None = None) -> Sealed | None:
    """The newest checkpoint of `folder` with a valid seal, None without any.

    UserError, naming the first differences, where the newest is of a run with another identity.
    """
    sealed = newest_valid(folder)
    if sealed is None:
        return None
    if differences := _differences(sealed.seal["identity"], json.loads(json.dumps(identity))):
        raise UserError(
            f"{sealed.folder}: was begun with other settings ({'; '.join(differences[:4])}); "
            "give it the same ones, or remove the folder to begin anew"
        )
    if differences := _differences(sealed.seal["conditions"], json.loads(json.dumps(conditions or {}))):
        _tell(f"{sealed.folder}: goes on under other conditions, so not bit for bit ({'; '.join(differences)})")
    return sealed


def newest_valid(folder: Path) -> Sealed | None:
    """The newest checkpoint that is what its seal says; a broken one is told and passed over."""
    for candidate in _folders(folder):
        try:
            return read_seal(candidate)
        except UserError as fault:
            _tell(f"{fault}; the checkpoint before it is taken")
    return None


def read_seal(folder: Path) -> Sealed:
    """Check every file of a checkpoint against its seal. UserError names the first fault."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        files = dict(seal["files"])
        identity, conditions, _ = seal["identity"], seal["conditions"], int(seal["step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: no valid seal") from None
    if STATE not in {Path(name).parts[0] for name in files} or not isinstance(identity, dict) or conditions is None:
        raise UserError(f"{folder}: no valid seal")
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or sha256(path) != digest:
            raise UserError(f"{folder}: {name} is not what its seal says")
    return Sealed(folder, seal)


def _folders(folder: Path) -> list[Path]:
    """Finished checkpoint folders, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit()), reverse=True)


def _seal(partial: Path, final: Path, seal: dict) -> None:
    files = {}
    for path in sorted(p for p in partial.rglob("*") if p.is_file()):
        flush(path)
        files[path.relative_to(partial).as_posix()] = [path.stat().st_size, sha256(path)]
    target = partial / SEAL
    target.write_text(json.dumps(seal | {"files": files}, indent=1))
    flush(target)
    for folder in {path.parent for path in partial.rglob("*")}:
        flush(folder)
    os.replace(partial, final)
    flush(final.parent)


def _differences(stored: Any, given: Any, name: str = "") -> list[str]:
    """'batch: 32 then, 64 now' for every leaf in which two JSON values differ."""
    if isinstance(stored, dict) and isinstance(given, dict):
        keys = sorted(stored.keys() | given.keys())
        return [
            line for key in keys for line in _differences(stored.get(key), given.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if stored == given else [f"{name}: {stored} then, {given} now"]


def _tell(line: str) -> None:
    if world()[0] == 0:
        print(line, file=sys.stderr, flush=True)


# ---- random states


def _file_of(rank: int) -> str:
    return f"rank-{rank}.pt"


def random_states() -> dict[str, Any]:
    """Of every library that could be drawn from, in types that torch.load(weights_only=True) reads."""
    import numpy

    state: Any = numpy.random.get_state()
    name, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random(states: dict[str, Any]) -> None:
    import numpy

    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])

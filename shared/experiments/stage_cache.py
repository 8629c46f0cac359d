"""What several arms of a seed stand on (a pre-trained model, the texts that it wrote), made once and kept on disk.

Whoever needs a stage first makes it, others wait: safe under parallel processes, and after an interruption a stage is
there whole or not at all. A stage follows from its key alone, so that it makes no difference which arm made it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shared.core.files import locked, made, write_whole

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")


@dataclass(frozen=True)
class StageCache:
    """folder: of one recipe, seed and data; its name says which. seed: what every stage draws from."""

    folder: Path
    seed: int

    def get_or_build(self, name: str, make: Callable[[Path], None], draws: str = "") -> Path:
        """The folder of stage `name`, filled by `make(folder)` where it is not there yet.

        What `make` leaves half done stays in that folder: it is given the same one again and may go on from there.
        draws: what names its random numbers beside the seed, where not the stage's name.
        """
        final, partial = self.folder / name, self.folder / f"{name}.partial"
        if final.is_dir():
            return final
        made(self.folder)
        with locked(self.folder / f"{name}.lock"):
            if not final.is_dir():  # another process may have made it while this one waited
                made(partial)
                with own_randomness(self.seed, draws or name):
                    make(partial)
                shutil.rmtree(partial / "checkpoints", ignore_errors=True)  # nothing is left to go on with
                os.replace(partial, final)
        return final

    def model(
        self, name: str, build: Callable[[], M], train: Callable[[Path], tuple[nn.Module, Mapping[str, Any]]]
    ) -> tuple[M, dict[str, Any]]:
        """The model of stage `name` in eval mode, and the stats of its training.

        train(folder) -> the trained model and its stats, which JSON can hold: called where the stage is not there yet,
        under the stage's random numbers. build() -> a model for its weights, called every time, under the caller's.
        UserError where the weights do not fit it.
        """
        from shared.weights.load import load_weights, save_weights

        def make(folder: Path) -> None:
            trained, stats = train(folder)
            save_weights(trained, folder / "weights.safetensors")
            write_whole(folder / "training.json", json.dumps(stats))

        folder = self.get_or_build(name, make)
        model = build()
        load_weights(model, folder / "weights.safetensors")
        return model.eval(), json.loads((folder / "training.json").read_text())


@contextlib.contextmanager
def own_randomness(seed: int, name: str) -> Iterator[None]:
    """Random numbers that follow from (seed, name); afterwards the generators are where they were."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    drawn = random.Random(f"{seed} {name}").getrandbits(32)
    random.seed(drawn)
    numpy.random.seed(drawn)
    torch.manual_seed(drawn)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)

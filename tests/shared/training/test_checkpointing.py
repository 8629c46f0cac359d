"""A training stopped anywhere goes on bit for bit; what is no sealed checkpoint of this very run is not taken."""

import contextlib
import json
import os
import random

import lightning
import numpy
import pytest
import torch
from torch import nn

from papers.clip.recipe import ClipRecipe
from shared.core.errors import UserError
from shared.data.loader import Batches
from shared.training.callbacks import EvalAtSteps, MetricRecorder
from shared.training.checkpointing import SEAL, newest, newest_valid, random_states, restore_random
from shared.training.optim import decay_groups, optimizer_with_schedule
from shared.training.trainer import fit

RECIPE = {"paper": "clip", "model": "clip-tiny", "steps": 12, "batch": 4, "accelerator": "cpu", "checkpoint_every": 4}
IDENTITY = {"arm": "a", "seed": 1, "data": "d"}


class Drawing(lightning.LightningModule):
    """Draws from every library in its steps, and changes a buffer and a weight outside the optimizer."""

    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.register_buffer("momentum", torch.zeros(()))
        self.seen = []

    def configure_optimizers(self):
        return optimizer_with_schedule(decay_groups(self, self.recipe.weight_decay), self.recipe)

    def training_step(self, batch, index):
        noise = random.random() + numpy.random.rand()
        loss = (self.net(batch[0]) - noise).square().mean()
        self.seen.append(batch[1].tolist())
        self.log("loss", loss.detach())
        return loss

    def on_train_batch_end(self, outputs, batch, index):
        self.momentum.mul_(0.9).add_(float(outputs["loss"]))
        self.net[0].weight.data.clamp_(-0.3, 0.3)


class Stop(Exception):
    pass


def run(folder, stop_at=None, **changes):
    """Train, or stop after `stop_at` items. -> (weights, curve, measured points, rows seen)"""
    recipe = ClipRecipe(**RECIPE | changes)
    lightning.seed_everything(5, verbose=False)
    module = Drawing(recipe)
    rows = torch.arange(20)
    tensors = (torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), rows)
    batches = Batches(tensors, recipe.batch, recipe.steps, 3, accumulate=recipe.accumulate)
    curves = MetricRecorder(recipe.batch, every=1)
    at = EvalAtSteps([3, 8, 11], recipe.batch, lambda: float(module.net(torch.ones(1, 3)).detach()))

    class Stops(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
            if stop_at is not None and index + 1 == stop_at:
                raise Stop

    callbacks = [curves, at, Stops()]
    with contextlib.suppress(Stop):
        fit(module, batches, recipe, folder, callbacks, IDENTITY)
    return {k: v.clone() for k, v in module.state_dict().items()}, curves.values, at.values, module.seen


@pytest.mark.parametrize(("stop_at", "accumulate"), [(3, 1), (4, 1), (5, 1), (9, 1), (7, 2), (18, 2)])
def test_stopped_and_gone_on_with_equals_never_stopped(tmp_path, stop_at, accumulate):
    weights, curves, measured, seen = run(tmp_path / "whole", accumulate=accumulate)
    run(tmp_path / "stopped", stop_at, accumulate=accumulate)
    kept = newest_valid(tmp_path / "stopped" / "checkpoints")
    assert (kept.step if kept else 0) == max(0, (stop_at // accumulate - (stop_at % accumulate == 0)) // 4 * 4)
    resumed = run(tmp_path / "stopped", accumulate=accumulate)
    assert all(torch.equal(resumed[0][key], weights[key]) for key in weights)
    assert resumed[1] == curves and len(curves["loss"]) == 12
    assert resumed[2] == measured and len(measured) == 3
    assert resumed[3] == seen[len(seen) - len(resumed[3]) :], "the same rows in the same order"


def test_every_library_draws_what_it_would_have_drawn():
    def draws():
        return random.random(), numpy.random.rand(), torch.rand(()).item(), random.gauss(0, 1)

    random.gauss(0, 1)  # python keeps a second one back
    states = random_states()
    first = draws()
    draws()
    restore_random(states)
    assert draws() == first


def stopped(tmp_path):
    run(tmp_path, 10)
    return tmp_path / "checkpoints"


def test_the_newest_two_are_kept(tmp_path):
    run(tmp_path, 12, checkpoint_every=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BREAKS = {
    "a flipped bit": lambda folder: flip(folder / "state.ckpt"),
    "a part cut short": lambda folder: os.truncate(folder / "rank-0.pt", 10),
    "a part gone": lambda folder: (folder / "rank-0.pt").unlink(),
    "no seal": lambda folder: (folder / SEAL).unlink(),
    "half a seal": lambda folder: os.truncate(folder / SEAL, 40),
    "an empty seal": lambda folder: (folder / SEAL).write_text("{}"),
    "a seal over nothing": lambda folder: (folder / SEAL).write_text(
        json.dumps({"step": 9, "identity": {}, "conditions": {}, "files": {}})
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_checkpoint_is_told_and_the_one_before_it_taken(tmp_path, capsys, name):
    folder = stopped(tmp_path)
    BREAKS[name](folder / "step-00000008")
    assert newest_valid(folder).step == 4
    assert "the checkpoint before it is taken" in capsys.readouterr().err


def test_what_was_being_written_is_no_checkpoint(tmp_path):
    folder = stopped(tmp_path)
    (folder / "step-00000008").rename(folder / "step-00000012.partial")
    assert newest_valid(folder).step == 4
    run(tmp_path)
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize(
    ("identity", "words"),
    [
        ({"data": "other"}, "data: d then, other now"),
        ({"recipe": {"learning_rate": 1.0}}, "recipe.learning_rate: 0.001 then, 1.0 now"),
        ({"ranks": 2}, "ranks: 1 then, 2 now"),
    ],
)
def test_a_resume_with_another_identity_is_refused_by_name(tmp_path, identity, words):
    folder = stopped(tmp_path)
    given = newest_valid(folder).seal["identity"]
    given["recipe"] |= identity.pop("recipe", {})
    with pytest.raises(UserError, match=words):
        newest(folder, given | identity)


def test_other_conditions_are_told_not_refused(tmp_path, capsys):
    folder = stopped(tmp_path)
    seal = newest_valid(folder).seal
    assert newest(folder, seal["identity"], seal["conditions"] | {"threads": 77}).step == 8
    assert "not bit for bit (threads:" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    from shared.training import checkpointing as resume

    def full(*arguments):
        raise OSError(28, "No space left on device")

    run(tmp_path, 5)
    monkeypatch.setattr(resume.torch, "save", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free space there"):
        run(tmp_path)
    assert newest_valid(tmp_path / "checkpoints").step == 4


class NotFinite(Drawing):
    """At step 7 its loss, or only its gradient, is no number."""

    def __init__(self, recipe, what):
        super().__init__(recipe)
        self.what = what

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        if index != 6:
            return loss
        # the square root's slope is infinite at zero: a finite loss with a gradient that is not
        return loss * float("inf") if self.what == "loss" else loss + (self.net[0].weight * 0).sum().sqrt()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_step_and_names_the_samples(tmp_path, what):
    recipe = ClipRecipe(**RECIPE)
    module = NotFinite(recipe, what)
    batches = Batches((torch.randn(20, 3), torch.arange(20)), 4, 12, 3, ids=[f"picture {i}" for i in range(20)])
    before = {}

    class Keep(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, index):
            before.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    with pytest.raises(UserError) as error:
        fit(module, batches, recipe, tmp_path, [Keep()], IDENTITY)
    names = [f"picture {row}" for row in batches.rows(6).tolist()]
    assert "not finite before step 7 on rank 0" in str(error.value) and all(name in str(error.value) for name in names)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert json.loads((tmp_path / "not-finite-0.json").read_text())["samples"] == names
    assert newest_valid(tmp_path / "checkpoints").step == 4

"""What holds for every paper: a training that was stopped and goes on equals one that was not, bit for bit, in all that
it keeps: weights, buffers (queues, momentum copies), optimizer and schedule."""

import contextlib

import lightning
import pytest
import torch
from tests_common import CATALOG

from shared.data.loader import Batches
from shared.training.checkpointing import newest_valid
from shared.training.trainer import fit

ROWS, BATCH, STEPS = 8, 4, 5
STOPPED, KEPT = 3, 2  # it ends after this step; the checkpoint of a step is written before the next one
pytestmark = pytest.mark.parametrize("name", CATALOG.names())


class Stop(Exception):
    pass


def trained(name, folder, seed, stop_at=None):
    """Train the paper's example, or stop after a step. -> ({what is kept: value}, the same before the first step)"""
    torch.manual_seed(0)
    _, rows = CATALOG.package(name).module.example(ROWS)
    lightning.seed_everything(seed, verbose=False)
    module, _ = CATALOG.package(name).module.example(2)
    recipe = CATALOG.package(name).recipe_type(
        paper=name, model="tiny", steps=STEPS, batch=BATCH, pairs=ROWS, accelerator="cpu", checkpoint_every=1
    )
    kept, before = {}, state_of(module)

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
            kept.update({f"loss {index}": outputs["loss"].clone()})
            if index + 1 == stop_at:
                raise Stop

        def on_train_end(self, trainer, pl_module):
            for place, optimizer in enumerate(trainer.optimizers):
                kept.update(leaves(optimizer.state_dict(), f"optimizer {place}"))
            for place, config in enumerate(trainer.lr_scheduler_configs):
                kept.update(leaves(config.scheduler.state_dict(), f"schedule {place}"))

    with contextlib.suppress(Stop):
        fit(module, Batches(rows, BATCH, STEPS, 0), recipe, folder, [Watch()], {"seed": 0})
    return kept | state_of(module), before


def state_of(module):
    """Every parameter and buffer, those that a state dict leaves out too."""
    return {key: value.detach().clone() for key, value in [*module.named_parameters(), *module.named_buffers()]}


def leaves(value, place):
    """{place: leaf} of nested dicts and lists."""
    if isinstance(value, (dict, list, tuple)):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in inside for key, leaf in leaves(part, f"{place}.{name}").items()}
    return {place: value.clone() if isinstance(value, torch.Tensor) else value}


def differences(ours, theirs):
    assert ours.keys() == theirs.keys()
    return [
        key
        for key, value in ours.items()
        if not (torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key])
    ]


def test_stopped_and_gone_on_with_equals_never_stopped(name, tmp_path):
    whole, before = trained(name, tmp_path / "whole", seed=1)
    assert differences({key: whole[key] for key in before}, before), "it trains"
    assert any(key.startswith("optimizer 0.state.") for key in whole)
    trained(name, tmp_path / "stopped", seed=1, stop_at=STOPPED)
    assert newest_valid(tmp_path / "stopped" / "checkpoints").step == KEPT
    # from another seed, so that nothing is right but what the checkpoint brings
    resumed, other = trained(name, tmp_path / "stopped", seed=2)
    assert differences(other, before)
    assert {key for key in whole if key.startswith("loss")} - resumed.keys() == {f"loss {i}" for i in range(KEPT)}
    assert differences(resumed, {key: whole[key] for key in whole if key in resumed}) == []

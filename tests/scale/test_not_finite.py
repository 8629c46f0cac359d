"""A loss or gradient that is not finite on one of two real ranks stops both before the optimizer's step."""

import importlib.util
import json

import pytest
import unfit

from shared.data.loader import Batches
from shared.training.checkpointing import newest_valid

CASES = [("ddp", "loss"), ("ddp", "gradient")]
if importlib.util.find_spec("deepspeed"):
    CASES.append(("zero2", "loss"))


@pytest.mark.parametrize(("strategy", "what"), CASES)
def test_all_ranks_stop_before_the_step_and_the_samples_are_named(strategy, what, processes, tmp_path):
    import torch

    assert processes(unfit.run, unfit.Task(strategy, what, 2, tmp_path)) == [0, 0]
    for rank in range(2):
        step, same, told = (tmp_path / f"stopped-{rank}").read_text().split(" ", 2)
        assert (int(step), same) == (unfit.POISONED_STEP, "True"), "weights are those before the step, on every rank"
        assert "before step 7" in told and "the last checkpoint is good" in told and "\n" not in told
        if what == "loss":
            assert f"on rank {unfit.POISONED_RANK} (" in told, "the rank that caused it"
    mine = Batches((torch.arange(32),), 8, 10, 0, unfit.POISONED_RANK, 2, ids=[f"picture {i}" for i in range(32)])
    found = json.loads((tmp_path / f"not-finite-{unfit.POISONED_RANK}.json").read_text())
    assert found["samples"] == mine.names(unfit.POISONED_STEP)
    assert newest_valid(tmp_path / "checkpoints").step == 4

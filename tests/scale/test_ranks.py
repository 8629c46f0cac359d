"""Two real ranks (processes, gloo, CPU) against one: DDP and ZeRO train the same, resume the same, end in one file."""

import filecmp
import importlib.util
import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import worker
from worker import CHECKPOINT, KILLED, STEPS, Task

from papers.clip.module import example
from papers.clip.recipe import ClipRecipe
from shared.core.errors import UserError
from shared.training.strategies import CONFIGS, NAMES, strategy_of, whole
from shared.weights.consolidate import consolidate
from shared.weights.load import load_weights

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install -e '.[deepspeed]'"
)


def trace_of(folder, rank):
    """{step: [losses]}; a step that was trained again has several."""
    seen = {}
    for line in (folder / f"trace-{rank}.jsonl").read_text().splitlines():
        step, loss = json.loads(line)
        seen.setdefault(step, []).append(float.fromhex(loss))
    return seen


def weights_of(processes, folder, out):
    """What the folder's last checkpoint consolidates to, read back on one process, strictly."""
    checkpoint = folder / "checkpoints" / f"step-{STEPS:08d}"
    assert processes(worker.consolidated, Task("", 1, out, resume=checkpoint)) == [0]
    module, _ = example(2)
    load_weights(module.model, out / "model.safetensors")
    return module.model.state_dict()


@pytest.mark.parametrize(
    ("strategy", "accumulate"),
    [
        ("ddp", 1),
        *(pytest.param(*zero, marks=needs_deepspeed) for zero in [*((z, 1) for z in NAMES[2:]), ("zero2", 2)]),
    ],
)
def test_two_ranks_train_as_one(strategy, accumulate, processes, trained, tmp_path):
    one, two = trained("auto", accumulate), trained(strategy, accumulate)
    alone, *halves = trace_of(one, 0), trace_of(two, 0), trace_of(two, 1)
    assert alone[STEPS][0] < 0.7 * alone[1][0], "it learns"
    assert halves[0] != halves[1], "each rank has rows of its own"
    mean = {step: [sum(pair) / 2 for pair in zip(*(half[step] for half in halves), strict=True)] for step in halves[0]}
    assert mean.keys() == alone.keys()
    for step in alone:
        assert mean[step] == pytest.approx(alone[step], abs=1e-6), f"step {step}"
    expected = torch.load(one / "gradients-0.pt", weights_only=True)
    for rank in range(2):  # elements are up to 1
        torch.testing.assert_close(
            torch.load(two / f"gradients-{rank}.pt", weights_only=True), expected, atol=5e-6, rtol=0
        )
    ours, theirs = (weights_of(processes, folder, tmp_path / folder.name) for folder in (two, one))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", ["ddp", *(pytest.param(name, marks=needs_deepspeed) for name in NAMES[2:5])])
def test_a_killed_training_goes_on_bit_for_bit(strategy, processes, trained, tmp_path):
    task = Task(strategy, 2, tmp_path / "killed", kill=True)
    assert processes(worker.run, task) == [-signal.SIGKILL] * 2
    assert [path.name for path in (task.folder / "checkpoints").iterdir()] == [f"step-{CHECKPOINT:08d}"]
    assert processes(worker.run, Task(strategy, 2, task.folder)) == [0, 0]
    for rank in range(2):
        expected, found = trace_of(trained(strategy), rank), trace_of(task.folder, rank)
        twice = range(CHECKPOINT + 1, KILLED + 1)  # trained before the end and again after it
        assert found == {step: losses * (2 if step in twice else 1) for step, losses in expected.items()}
    for folder, out in ((trained(strategy), "expected"), (task.folder, "found")):
        weights_of(processes, folder, tmp_path / out)
    assert filecmp.cmp(*(tmp_path / out / "model.safetensors" for out in ("expected", "found")), shallow=False)


@needs_deepspeed
def test_a_checkpoint_of_two_ranks_is_refused_by_one(processes, trained, tmp_path):
    state = trained("zero2") / "checkpoints" / f"step-{CHECKPOINT:08d}" / "state.ckpt"
    assert processes(worker.run, Task("zero2", 1, tmp_path, resume=state)) == [0]
    told = (tmp_path / "error-0").read_text()
    assert str(state) in told and "written by 2 ranks, but this run has 1" in told and "\n" not in told


class Harmful:
    """Unpickled by a loader that runs what it is told, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def lose(part):
    part.unlink()


def cut(part):
    part.write_bytes(part.read_bytes()[:1000])


def poison(part):
    torch.save({"optimizer_state_dict": Harmful(part.parent / "mark")}, part)


@needs_deepspeed
@pytest.mark.parametrize(
    ("damage", "message"), [(lose, "Expected 2 of"), (cut, ""), (poison, "Weights only load failed")]
)
def test_a_damaged_checkpoint_is_refused_in_one_line(damage, message, processes, trained, tmp_path):
    state = tmp_path / "state.ckpt"
    shutil.copytree(trained("zero2") / "checkpoints" / f"step-{CHECKPOINT:08d}" / "state.ckpt", state)
    damage(state / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    assert processes(worker.consolidated, Task("", 1, tmp_path, resume=state)) == [0]
    told = (tmp_path / "error-0").read_text()
    assert told.startswith(f"{state}: refused as a checkpoint ({message}") and "\n" not in told
    assert not (state / "checkpoint" / "mark").exists() and not (tmp_path / "model.safetensors").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a checkpoint of ZeRO"):
        consolidate(tmp_path)
    with pytest.raises(UserError, match=r"gone\.ckpt: cannot read it"):
        consolidate(tmp_path / "gone.ckpt")
    torch.save({"state_dict": {"model.a": torch.ones(1), "teacher.a": torch.ones(1)}}, tmp_path / "two.ckpt")
    with pytest.raises(UserError, match=r"teacher\.a lie outside `model\.`"):
        consolidate(tmp_path / "two.ckpt")


@pytest.mark.parametrize("name", NAMES[2:])
def test_a_stages_settings_are_what_its_name_says(name):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4]) and ("offload_optimizer" in zero) == name.endswith("offload")
    assert config["zero_allow_untested_optimizer"], "torch's AdamW is one"
    batch = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
    assert not {*batch, "fp16", "bf16"} & set(config), "the recipe and Lightning fill these"


def test_strategies_are_chosen_by_name(monkeypatch):
    recipe = ClipRecipe(model="clip-tiny", batch=24, accelerator="cpu", devices=2, nodes=3, accumulate=2)
    assert strategy_of(recipe) == "auto"
    assert type(strategy_of(replace(recipe, strategy="ddp"))).__name__ == "DDPStrategy"
    with pytest.raises(UserError, match="no strategy 'zero4'; there are: auto, ddp, zero1, zero2"):
        strategy_of(replace(recipe, strategy="zero4"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs deepspeed.*pip install -e '\.\[deepspeed\]'"):
        strategy_of(replace(recipe, strategy="zero2"))


def test_an_ordinary_parameter_is_its_own_whole():
    parameter = torch.nn.Parameter(torch.tensor([3.0, -3.0]))
    with whole(parameter) as (value,):
        value.clamp_(-1, 1)
    assert parameter.tolist() == [1.0, -1.0]

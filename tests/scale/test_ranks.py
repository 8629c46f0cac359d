"""Two real ranks (processes, gloo, CPU) against one: DDP and ZeRO train the same, resume the same, end in one file."""

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
from shared.checkpoints import load_weights
from shared.consolidate import consolidate
from shared.errors import UserError
from shared.strategies import CONFIGS, NAMES, strategy_of, whole

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install -e '.[deepspeed]'"
)
ZERO = [pytest.param(name, marks=needs_deepspeed) for name in ("zero1", "zero2", "zero3", "zero3_offload")]
STRATEGIES = ["ddp", *ZERO]


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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_as_one(strategy, processes, trained, tmp_path):
    one, two = trained("auto"), trained(strategy)
    whole, halves = trace_of(one, 0), [trace_of(two, rank) for rank in range(2)]
    assert list(whole) == list(range(1, STEPS + 1)) and whole[STEPS][0] < 0.7 * whole[1][0], "it learns"
    for step in whole:
        shares = [half[step][0] for half in halves]
        assert shares[0] != shares[1], "each rank has rows of its own"
        assert sum(shares) / 2 == pytest.approx(whole[step][0], abs=1e-6), f"step {step}"
    expected = torch.load(one / "gradients-0.pt")
    for rank in range(2):  # elements are up to 1
        torch.testing.assert_close(torch.load(two / f"gradients-{rank}.pt"), expected, atol=5e-6, rtol=0)
    ours, theirs = (weights_of(processes, folder, tmp_path / folder.name) for folder in (two, one))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES[:4])
def test_a_killed_training_goes_on_bit_for_bit(strategy, processes, trained, tmp_path):
    task = Task(strategy, 2, tmp_path / "killed", kill=True)
    assert processes(worker.run, task) == [-signal.SIGKILL] * 2
    assert [path.name for path in (task.folder / "checkpoints").iterdir()] == [f"step-{CHECKPOINT:08d}"]
    assert processes(worker.run, Task(strategy, 2, task.folder)) == [0, 0]
    for rank in range(2):
        expected, found = trace_of(trained(strategy), rank), trace_of(task.folder, rank)
        assert [len(found[step]) for step in found] == [1] * CHECKPOINT + [2] * (KILLED - CHECKPOINT) + [1] * (
            STEPS - KILLED
        )
        assert {step: set(losses) for step, losses in found.items()} == {
            step: set(losses) for step, losses in expected.items()
        }
    folders = {"whole": trained(strategy), "resumed": task.folder}
    whole, resumed = (weights_of(processes, folder, tmp_path / name) for name, folder in folders.items())
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


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

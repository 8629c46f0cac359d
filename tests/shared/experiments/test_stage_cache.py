"""StageCache are made once, by whoever comes first, whole or not at all, and follow from their key alone."""

import multiprocessing
import random
import time

import pytest
import torch

from shared.core.errors import UserError
from shared.experiments.stage_cache import StageCache


def test_a_stage_is_made_once_and_then_found(tmp_path):
    made = []

    def make(folder):
        made.append(1)
        (folder / "value").write_text(str(torch.rand(1).item()))

    stages = StageCache(tmp_path, 3)
    first = stages.get_or_build("drawn", make)
    assert stages.get_or_build("drawn", make) == first and made == [1]


def test_what_it_draws_follows_from_seed_and_name_and_disturbs_nobody(tmp_path):
    def value(folder, seed, name, before):
        torch.manual_seed(before)
        random.seed(before)
        found = StageCache(folder, seed).get_or_build(
            name, lambda f: (f / "v").write_text(f"{torch.rand(1)} {random.random()}")
        )
        return (found / "v").read_text(), torch.rand(1).item(), random.random()

    (a, torch_a, random_a), (b, torch_b, random_b) = (
        value(tmp_path / "a", 3, "x", 1),
        value(tmp_path / "b", 3, "x", 1),
    )
    assert (a, torch_a, random_a) == (b, torch_b, random_b)
    assert value(tmp_path / "c", 3, "x", 2)[0] == a, "whatever was drawn before"
    assert value(tmp_path / "d", 4, "x", 1)[0] != a and value(tmp_path / "e", 3, "y", 1)[0] != a
    torch.manual_seed(1)
    random.seed(1)
    assert (torch.rand(1).item(), random.random()) == (torch_a, random_a), "the caller's numbers are as without a stage"


def test_an_interrupted_stage_is_not_there_and_goes_on_in_its_folder(tmp_path):
    def fails(folder):
        (folder / "half").write_text("half")
        (folder / "checkpoints").mkdir()
        raise KeyboardInterrupt

    stages = StageCache(tmp_path, 0)
    with pytest.raises(KeyboardInterrupt):
        stages.get_or_build("s", fails)
    assert not (tmp_path / "s").exists()

    def goes_on(folder):
        assert (folder / "half").read_text() == "half" and (folder / "checkpoints").is_dir()
        (folder / "whole").write_text("whole")

    found = stages.get_or_build("s", goes_on)
    assert (found / "whole").is_file() and not (found / "checkpoints").exists()


def test_a_model_is_trained_once_with_the_stages_numbers_and_then_built_and_loaded(tmp_path):
    trained = []

    def train(folder):
        trained.append(folder)
        return torch.nn.Linear(2, 3), {"loss": 0.5, "curve": [(1, 2.0)]}

    stages = StageCache(tmp_path, 3)
    first, stats = stages.model("linear", lambda: torch.nn.Linear(2, 3), train)
    torch.manual_seed(9)
    again, _ = stages.model("linear", lambda: torch.nn.Linear(2, 3), train)
    assert len(trained) == 1 and stats == {"loss": 0.5, "curve": [[1, 2.0]]} and not again.training
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    other, _ = StageCache(tmp_path / "b", 3).model("linear", lambda: torch.nn.Linear(2, 3), train)
    assert torch.equal(other.weight, first.weight), "whatever was drawn before"
    with pytest.raises(UserError, match="do not fit the model"):
        stages.model("linear", lambda: torch.nn.Linear(2, 4), train)


def slow(folder):
    with (folder / "writers").open("a") as file:
        file.write("w")
    time.sleep(0.3)


def ask_for(folder):
    StageCache(folder, 0).get_or_build("slow", slow)


def test_two_processes_that_need_it_at_once_make_it_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=ask_for, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "slow" / "writers").read_text() == "w"

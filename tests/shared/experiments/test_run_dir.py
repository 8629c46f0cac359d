"""An interrupted run is gone on with by the same command, and by nothing else."""

import json
import subprocess
import sys

import pytest
from tests_common import ROOT

from papers.clip.recipe import ClipRecipe
from shared.core.errors import UserError
from shared.core.provenance import code_digest
from shared.experiments.run_dir import FINISHED, open_run


def recipe(**changes):
    return ClipRecipe(**{"paper": "clip", "model": "clip-tiny"} | changes)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "a.py").write_text("x = 1\n")
    return tmp_path


def close(run):
    run._lock.close()


def test_the_same_command_goes_on_with_the_newest_unfinished_run(root):
    first = open_run(root, recipe())
    first.keep(mlflow="abc")
    close(first)
    again = open_run(root, recipe())
    assert (
        again.path == first.path
        and again.sessions == 2
        and json.loads((again.path / "run.json").read_text())["mlflow"] == "abc"
    )
    assert again.started == first.started and again.seconds >= first.before


@pytest.mark.parametrize("what", ["recipe", "code", "finished", "fresh"])
def test_another_recipe_other_code_a_finished_run_or_a_wish_begin_anew(root, what):
    first = open_run(root, recipe())
    close(first)
    if what == "code":
        (root / "papers" / "a.py").write_text("x = 2\n")
    if what == "finished":
        (first.path / FINISHED).write_text("{}")
    again = open_run(root, recipe(steps=7) if what == "recipe" else recipe(), fresh=what == "fresh")
    assert again.path != first.path and again.sessions == 1


def test_a_run_that_still_runs_is_left_alone(root):
    first = open_run(root, recipe())
    assert open_run(root, recipe()).path != first.path
    close(first)


def test_a_killed_process_does_not_hold_its_run(root):
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom papers.clip.recipe import ClipRecipe\n"
        "from shared.experiments.run_dir import open_run\n"
        f"print(open_run(Path({str(root)!r}), ClipRecipe(paper='clip', model='clip-tiny')).path, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == -9 and str(open_run(root, recipe()).path) == ran.stdout.strip()


def test_other_data_under_the_same_command_are_refused_by_name(root):
    run = open_run(root, recipe())
    run.same("data", "aaaa")
    run.same("data", "aaaa")
    with pytest.raises(UserError, match="begun with data aaaa, now it is bbbb"):
        run.same("data", "bbbb")


@pytest.mark.parametrize("content", ["", "[]", "{", json.dumps({"recipe": "x"})])
def test_a_broken_state_is_no_run_to_go_on_with(root, content):
    first = open_run(root, recipe())
    close(first)
    (first.path / "run.json").write_text(content)
    assert open_run(root, recipe()).path != first.path


def test_the_code_digest_sees_every_source(root):
    before = code_digest(root)
    (root / "papers" / "deep").mkdir()
    (root / "papers" / "deep" / "b.yaml").write_text("a: 1\n")
    assert code_digest(root) != before

"""`chaos` in short: a run killed with -9 ends bit for bit as one that was not, and a run that differs is told."""

import pytest
from tests_common import CATALOG

from shared.core.errors import UserError
from shared.tools import crash_test as module
from shared.tools.crash_test import chaos

SHORT = ["steps=12", "pairs=64", "checkpoint_every=2", "measure_at=2"]


def test_killed_twice_it_ends_bit_for_bit_as_uninterrupted(tmp_path):
    said = []
    found = chaos(CATALOG, "clip", 2, 5, tmp_path, SHORT, said.append)
    assert found.kills == 2 and found.runs >= 1
    assert found.equal == found.runs and found.differences == []
    assert sum(line.startswith("kill ") for line in said) == 2
    weights = {path.read_bytes() for path in tmp_path.glob("*/model.safetensors")}
    assert len(weights) == 1 and len(list(tmp_path.glob("*/model.safetensors"))) == 1 + found.runs


def fake(tmp_path, monkeypatch, script):
    """chaos over a child that is `script`, which is given its folder as argv[5]."""
    monkeypatch.setattr(module, "CHILD", script)
    return chaos(CATALOG, "clip", 1, 0, tmp_path, [], lambda line: None)


RUN = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[5])
first = not (folder / "begun").exists()
(folder / "begun").touch()
if first and folder.name != "whole":
    (folder / "checkpoints" / "step-00000060.partial").mkdir(parents=True)
    (folder / "progress").write_text("60")
    time.sleep(60)
value = VALUE
(folder / "model.safetensors").write_text("weights")
(folder / "outcome.json").write_text(json.dumps({"outcome": {"measured": {"accuracy": value, "waited": time.time()}}}))
"""


def test_a_run_that_ends_elsewhere_after_a_kill_is_told(tmp_path, monkeypatch):
    found = fake(tmp_path, monkeypatch, RUN.replace("VALUE", "1 if folder.name == 'whole' else 2"))
    assert (found.kills, found.runs, found.equal) == (1, 1, 0)
    assert found.differences == ["run 1: accuracy"]


def test_a_run_that_ends_alike_is_equal_whatever_it_waited(tmp_path, monkeypatch):
    found = fake(tmp_path, monkeypatch, RUN.replace("VALUE", "1"))
    assert (found.kills, found.equal, found.lost) == (1, 1, [60])


def test_a_run_that_fails_by_itself_is_one_line_with_its_last_words(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"whole: the run ended with code 1; its last words: .*no such thing"):
        fake(tmp_path, monkeypatch, "raise SystemExit('no such thing')")


def test_a_run_that_never_ends_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 0.5)
    with pytest.raises(UserError, match=r"no end after 0\.5 s"):
        fake(tmp_path, monkeypatch, "import time; time.sleep(60)")


def test_a_mistake_in_the_words_is_told_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match="stepz"):
        chaos(CATALOG, "clip", 1, 0, tmp_path, ["stepz=3"], lambda line: None)
    assert list(tmp_path.iterdir()) == []

"""A whole smoke reproduction as a person runs it: report, tracked runs, and a model that classifies."""

import json
import os
import re

import pytest
from verbs import run


@pytest.fixture(scope="module")
def smoke(place):
    """A whole smoke reproduction; parity runs as its own test file and is left out here."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    code = run(place, "reproduce", "clip", "--scale", "smoke", "rungs=[structure,claims,metrics]")
    if before:
        os.environ["MLFLOW_TRACKING_URI"] = before
    assert code == 0
    return next((place / "runs" / "clip" / "smoke").glob("*/report.json")).parent


def test_a_smoke_reproduction_writes_a_whole_report_and_no_verdict(smoke):
    for name in ("report.md", "report.html", "report.json", "recipe.yaml", "environment.txt"):
        assert (smoke / name).stat().st_size > 0, name
    report = json.loads((smoke / "report.json").read_text())
    rungs = {row["rung"] for row in report["rows"]}
    assert rungs == {"structure", "claims", "metrics"}
    assert all(row["verdict"] == "match" for row in report["rows"] if row["rung"] == "structure")
    assert all(row["verdict"] == "not run" and row["need"] for row in report["rows"] if row["rung"] != "structure")
    assert report["data"]["name"] == "shapes" and len(report["data"]["digest"]) == 64
    assert list((smoke / "figures").glob("*.png"))


def test_the_run_is_tracked_with_a_child_per_arm_and_seed(smoke, place):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("clip")
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    arms = json.loads((smoke / "arms" / "contrastive-1000" / "outcome.json").read_text())
    parent = next(run for run in runs if run not in children)
    assert len(children) == 10 and len(runs) == 11
    assert {"report.html", "report.json"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert arms["outcome"]["seed"] == 1000


def test_the_model_of_a_run_classifies_pictures(smoke, place, capsys, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    weights = smoke / "arms" / "contrastive-1000" / "model.safetensors"
    words = ["zeroshot", str(tmp_path / "red.png"), "--model", "clip-tiny", "--weights", str(weights)]
    assert run(place, *words, "--labels", "a red circle,a blue star") == 0
    assert re.search(r"red\.png: .*%.*%", capsys.readouterr().out)
    assert run(place, *words, "--labels", "a circle, red", "--labels", "a star") == 0
    assert re.search(r"red\.png: .*a circle, red \d", capsys.readouterr().out)


def test_report_and_compare_read_what_was_written(smoke, place, capsys):
    assert run(place, "report", "clip") == 0
    assert "STRUCTURE" in capsys.readouterr().out
    assert run(place, "compare", str(smoke / "report.json")) == 0
    assert "smoke" in capsys.readouterr().out


def test_emoji_that_cannot_be_fetched_fall_back_to_shapes_and_say_so(place, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERS_CACHE", str(tmp_path))
    words = ["data=emoji", "rungs=[claims]", "claims=[clip.retrieval.prompt]", "steps=2", "jobs=1"]
    assert run(place, "reproduce", "clip", "--scale", "smoke", *words) == 0
    assert "drawn shapes stand in" in capsys.readouterr().err
    newest = max((place / "runs" / "clip" / "smoke").glob("*/report.json"), key=os.path.getmtime)
    data = json.loads(newest.read_text())["data"]
    assert data["name"] == "shapes" and "drawn shapes stand in" in data["note"]

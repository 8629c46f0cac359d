"""What MLflow holds after a run, read back with its own client; and what is left when it fails."""

import contextlib
import io
import json
import socket
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

from shared.tracking import Tracker, commit_and_dirty, environment_text, machine_description


@pytest.fixture(autouse=True)
def no_server_of_the_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


_PRINTED = io.StringIO()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """One reproduction in a folder with spaces, its database new: (folder, client, parent, children by name)."""
    folder = tmp_path_factory.mktemp("a place with spaces") / "deeper one"
    (source := folder.parent / "curve.csv").write_text("step,loss\n0,1\n")
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with (
        contextlib.redirect_stdout(_PRINTED),
        contextlib.redirect_stderr(_PRINTED),
        Tracker(experiment="clip", name="mini", folder=folder, data_digest="abc123", params={"scale": "mini"}) as t,
    ):
        for arm in ("baseline", "treatment"):
            with t.child(f"{arm}, seed 0", tags={"arm": arm}, params={"seed": 0, "long": "x" * 7000}) as run:
                run.log_curves({"train/loss": [(i, 1 / (i + 1)) for i in range(2500)], "lr": [(0, 0.1)]})
                run.log_metrics({"retrieval/i2t_r1@hit-pessimistic": 0.5, "textvqa/acc@m4c+ocr": 0.25})
        t.log_metrics({"effect": 0.25})
        t.log_artifact(source)
    patch.undo()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=t.uri)
    runs = client.search_runs([client.get_experiment_by_name("clip").experiment_id])
    children = {run.info.run_name: run for run in runs if run.info.run_id != t.run_id}
    return folder, client, client.get_run(t.run_id), children


@pytest.fixture
def printed_by_the_first_run(recorded):
    return _PRINTED.getvalue()


def test_a_child_per_arm_hangs_under_one_parent(recorded):
    _, _, parent, children = recorded
    assert sorted(children) == ["baseline, seed 0", "treatment, seed 0"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    assert "mlflow.parentRunId" not in parent.data.tags
    assert children["treatment, seed 0"].data.tags["arm"] == "treatment"
    assert {run.info.status for run in [parent, *children.values()]} == {"FINISHED"}


def test_a_whole_curve_longer_than_a_batch_comes_back(recorded):
    _, client, _, children = recorded
    history = client.get_metric_history(children["baseline, seed 0"].info.run_id, "train/loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(i, 1 / (i + 1)) for i in range(2500)]


def test_metric_names_with_a_protocol_are_spelled_as_mlflow_allows(recorded):
    _, _, _, children = recorded
    found = children["baseline, seed 0"].data.metrics
    assert found["retrieval/i2t_r1:hit-pessimistic"] == 0.5
    assert found["textvqa/acc:m4c-ocr"] == 0.25


def test_a_long_parameter_is_cut_to_the_limit_and_shows_it(recorded):
    _, _, _, children = recorded
    kept = children["baseline, seed 0"].data.params
    assert kept["long"] == "x" * 5999 + "…"
    assert kept["seed"] == "0"


def test_the_parent_says_on_what_it_ran(recorded):
    _, client, parent, _ = recorded
    tags = parent.data.tags
    assert tags["data_digest"] == "abc123"
    assert tags["commit"] and tags["dirty"] in ("true", "false", "unknown")
    assert int(tags["machine.cores"]) >= 1 and tags["machine.torch"]
    names = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert names == {"environment.txt", "curve.csv"}


def test_the_database_and_its_artifacts_lie_in_the_folder_and_nothing_else(recorded):
    folder, _, parent, _ = recorded
    assert {item.name for item in folder.iterdir()} == {"mlflow.db", "mlartifacts"}
    place = Path(urllib.parse.unquote(urllib.parse.urlparse(parent.info.artifact_uri).path))
    assert "torch==" in (place / "environment.txt").read_text() and folder in place.parents


def test_a_first_run_prints_nothing_at_all(printed_by_the_first_run):
    assert printed_by_the_first_run == ""


def test_the_environment_variable_names_the_store(recorded, tmp_path, monkeypatch):
    folder, client, _, _ = recorded
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    with Tracker(experiment="elsewhere", folder=tmp_path) as t:
        pass
    experiment = client.get_experiment_by_name("elsewhere")
    assert client.get_run(t.run_id).info.experiment_id == experiment.experiment_id
    assert list(tmp_path.iterdir()) == []
    # the artifacts stay beside that database, wherever the run's own folder is
    assert experiment.artifact_location == (folder / "mlartifacts").as_uri()


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_run_that_breaks_off_is_marked_and_its_error_passes(error, status, recorded):
    folder, client, _, _ = recorded
    tracker = Tracker(experiment="broken", folder=folder)
    if error is None:
        with tracker:
            pass
    else:
        with pytest.raises(error), tracker:
            raise error("stop")
    assert client.get_run(tracker.run_id).info.status == status


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_server_that_is_away_costs_one_warning_and_no_data(tmp_path, capfd):
    uri = f"http://someone:secret@127.0.0.1:{unused_port()}"
    with (
        Tracker(uri, experiment="clip", name="mini", folder=tmp_path, params={"scale": "mini"}) as t,
        t.child("baseline", tags={"arm": "baseline"}, params={"seed": 1}) as run,
    ):
        run.log_curves({"train/loss": [(0, 2.0), (1, 1.0)]})
        run.log_metrics({"acc": 0.5}, step=1)
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1, printed.err
    assert "the run goes on" in printed.err and str(t.local_file) in printed.err
    assert "secret" not in printed.err
    assert not t.working
    kept = records(t.local_file)
    assert {k: kept[0][k] for k in ("run", "parent")} == {"run": "mini", "parent": None}
    child = next(r for r in kept if r["run"] == "baseline" and "parent" in r)
    assert child["parent"] == "mini" and child["tags"] == {"arm": "baseline"} and child["params"] == {"seed": "1"}
    assert {"run": "baseline", "curves": {"train/loss": [[0, 2.0], [1, 1.0]]}} in kept
    assert {"run": "baseline", "curves": {"acc": [[1, 0.5]]}} in kept


def test_a_store_that_fails_half_way_keeps_the_failed_batch_and_all_after_it(recorded, tmp_path, capfd):
    with Tracker(f"sqlite:///{recorded[0] / 'mlflow.db'}", experiment="broken", folder=tmp_path) as t:
        run = t.child("baseline", params={"seed": 1})

        class Gone:
            def log_batch(self, *_, **__):
                raise ConnectionError("the store went away\nwith a long story")

        t._store.client = Gone()
        run.log_curves({"loss": [(0, 2.0)]})
        run.log_curves({"loss": [(1, float("nan"))]})
        run.finish()
    printed = capfd.readouterr().err
    assert len(printed.splitlines()) == 1 and "ConnectionError: the store went away" in printed
    kept = [r for r in records(t.local_file) if r["run"] == "baseline"]
    assert kept[0]["run_id"] == run.run_id and kept[0]["params"] == {"seed": "1"}
    assert kept[1]["curves"] == {"loss": [[0, 2.0]]} and str(kept[2]["curves"]["loss"][0][1]) == "nan"
    assert kept[3]["status"] == "FINISHED"


def test_without_mlflow_the_run_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with Tracker(experiment="clip", folder=tmp_path) as t:
        t.log_metrics({"acc": 0.5})
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert {"run": "reproduction", "curves": {"acc": [[0, 0.5]]}} in records(t.local_file)


def test_a_missing_artifact_is_the_callers_mistake_and_not_the_stores(recorded):
    folder, _, _, _ = recorded
    with pytest.raises(FileNotFoundError), Tracker(experiment="broken", folder=folder) as t:
        t.log_artifact(folder / "nothing.txt")
    assert t.working


def git(root, *arguments):
    name = ["-c", "user.name=t", "-c", "user.email=t@example.invalid", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *name, *arguments], check=True, capture_output=True)


def test_the_dirty_flag_sees_edits_and_new_files_but_not_results(tmp_path):
    assert commit_and_dirty(tmp_path) == (None, None)
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    commit, dirty = commit_and_dirty(tmp_path)
    assert len(commit) == 40 and dirty is False
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "clip.json").write_text("{}")
    assert commit_and_dirty(tmp_path) == (commit, False)
    (tmp_path / "a.py").write_text("2")
    assert commit_and_dirty(tmp_path) == (commit, True)
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("1")
    assert commit_and_dirty(tmp_path) == (commit, True)


def test_the_machine_and_the_environment_are_described_without_a_host_name():
    machine = machine_description()
    assert list(machine) == ["cpu", "cores", "memory_gib", "gpus", "system", "python", "torch"]
    assert socket.gethostname() not in json.dumps(machine)
    lines = environment_text().splitlines()
    assert lines[0].startswith("# python 3.") and any(line.startswith("mlflow==") for line in lines)
    assert lines[1:] == sorted(lines[1:], key=str.lower)

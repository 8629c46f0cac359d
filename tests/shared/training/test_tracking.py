"""What MLflow holds after a run, read back with its own client; and that nothing is lost or doubled when it fails."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from shared.cli import main
from shared.core.errors import UserError
from shared.core.provenance import commit_and_dirty, environment_text, machine_description
from shared.training import tracking
from shared.training.tracking import Tracker, deliver, read_record, undelivered


@pytest.fixture(autouse=True)
def no_server_of_the_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def leave_outcome(folder, arm, seed=0, **measured):
    """What a finished arm leaves in the run's folder."""
    path = folder / "arms" / f"{arm}-{seed}" / "outcome.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    outcome = {"arm": arm, "seed": seed, "seconds": 12.5, "measured": measured}
    path.write_text(json.dumps({"recipe": "abc", "outcome": outcome}))


def leave_report(folder):
    rows = [
        {"rung": "structure", "id": "clip.size", "reproduced": 12.5},
        {"rung": "claims", "id": "clip.effect", "reproduced": 0.25},
        {"rung": "claims", "id": "clip.not_run", "reproduced": None},
    ]
    (folder / "report.html").write_text("<html>")
    (folder / "report.json").write_text(json.dumps({"rows": rows}))


def client_and_runs(uri, experiment):
    """-> (client, its active runs by name), none of them doubled."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert len(by_name) == len(runs), "a run was doubled"
    return client, by_name


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """One reproduction in a folder with spaces, its database new: (root, client, runs by name, what was printed)."""
    root, printed = tmp_path_factory.mktemp("a place with spaces") / "deeper one", io.StringIO()
    folder = root / "runs" / "clip" / "mini" / "1"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("steps: 8")
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        Tracker(
            folder,
            root,
            experiment="clip",
            name="mini emoji",
            data="emoji",
            data_digest="abc123" * 10,
            command="make reproduce PAPER=clip",
            about="Radford et al. 2021",
            tags={"scale": "mini"},
            params={"scale": "mini", "steps": 8, "long": "x" * 7000},
        ) as t,
    ):
        for arm in ("baseline", "treatment"):
            curves = {"train/loss": [(i, 1 / (i + 1)) for i in range(2500)], "lr": [(0, 0.1)]}
            numbers = {"retrieval/i2t_r1@hit-pessimistic": 0.5, "textvqa/acc@m4c+ocr": 0.25, "answers": ["a"]}
            leave_outcome(folder, arm, curves=curves, **numbers)
            t.update()
    leave_report(folder)
    t.update(again=True)
    patch.undo()
    return root, *client_and_runs(f"sqlite:///{root / 'mlflow.db'}", "clip"), printed.getvalue()


def test_a_child_per_arm_and_seed_hangs_under_one_parent(recorded):
    _, _, runs, _ = recorded
    assert sorted(runs) == ["baseline 0", "mini emoji", "treatment 0"]
    parent, child = runs["mini emoji"], runs["treatment 0"]
    children = [run for run in runs.values() if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert "mlflow.parentRunId" not in parent.data.tags
    assert child.data.tags["arm"] == "treatment" and child.data.params == {"seed": "0"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {(run.data.tags["paper"], run.data.tags["data"], run.data.tags["scale"]) for run in runs.values()} == {
        ("clip", "emoji", "mini")
    }


def test_a_whole_curve_longer_than_a_batch_comes_back(recorded):
    _, client, runs, _ = recorded
    history = client.get_metric_history(runs["baseline 0"].info.run_id, "train/loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(i, 1 / (i + 1)) for i in range(2500)]


def test_metric_names_with_a_protocol_are_spelled_as_mlflow_allows(recorded):
    _, client, runs, _ = recorded
    run = runs["baseline 0"]
    last = {"retrieval/i2t_r1:hit-pessimistic": 0.5, "textvqa/acc:m4c-ocr": 0.25, "seconds": 12.5}
    assert run.data.metrics == last | {"lr": 0.1, "train/loss": 1 / 2500}
    for name in last:
        assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == [8]


def test_a_long_parameter_is_cut_to_the_limit_and_shows_it(recorded):
    params = recorded[2]["mini emoji"].data.params
    assert params["long"] == "x" * 5999 + "…" and params["steps"] == "8"


def test_the_parent_says_on_what_it_ran_and_holds_the_effects_and_the_report(recorded):
    _, client, runs, _ = recorded
    parent = runs["mini emoji"]
    tags = parent.data.tags
    assert tags["data_digest"] == "abc123" * 10
    assert tags["commit"] and tags["dirty"] in ("true", "false", "unknown")
    assert f"torch {machine_description()['torch']}" in tags["machine"]
    assert tags["mlflow.source.name"] == "make reproduce PAPER=clip"
    assert parent.data.metrics == {"clip.effect": 0.25}
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"environment.txt", "recipe.yaml", "report.html", "report.json"}
    (read,) = parent.inputs.dataset_inputs
    assert (read.dataset.name, read.dataset.digest) == ("emoji", "abc123abc123")
    assert client.get_experiment_by_name("clip").tags["mlflow.note.content"] == "Radford et al. 2021"


def test_the_database_and_its_artifacts_lie_in_the_root_and_nothing_else_and_nothing_is_printed(recorded):
    root, _, runs, printed = recorded
    assert {item.name for item in root.iterdir()} == {"mlflow.db", "mlartifacts", "runs"}
    place = Path(urllib.parse.unquote(urllib.parse.urlparse(runs["mini emoji"].info.artifact_uri).path))
    assert "torch==" in (place / "environment.txt").read_text() and root in place.parents
    assert printed == "" and undelivered(root) == []


def test_the_environment_variable_names_the_store(recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{recorded[0] / 'mlflow.db'}")
    with Tracker(tmp_path, tmp_path, experiment="elsewhere", name="run"):
        pass
    client, runs = client_and_runs(uri, "elsewhere")
    assert list(runs) == ["run"] and not (tmp_path / "mlflow.db").exists()
    # the artifacts stay beside that database, wherever the run's own folder is
    assert client.get_experiment_by_name("elsewhere").artifact_location == (recorded[0] / "mlartifacts").as_uri()


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_breaks_off_is_marked_and_its_error_passes(error, status, place):
    with pytest.raises(error), place.tracker():
        raise error("stop")
    assert client_and_runs(place.uri, place.experiment)[1]["mini"].info.status == status


@pytest.mark.parametrize("name", ["a%20b", "what? 50%"])
def test_a_folder_whose_name_means_something_in_a_uri_is_tracked_right(name, tmp_path, capfd):
    root = tmp_path / name / "deeper"
    (root / "run").mkdir(parents=True)
    with Tracker(root / "run", root, experiment="odd", name="mini"):
        pass
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert sorted(path.name for path in root.iterdir()) == ["mlartifacts", "mlflow.db", "run"]
    assert len(list((root / "mlartifacts").glob("*/artifacts/environment.txt"))) == 1
    with sqlite3.connect(root / "mlflow.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [("mini", "FINISHED")]


# ---- a store that goes away


class Weather:
    """Stands between a tracker and its store: call number `at` (and all after it, where `for_good`) fails, before it is
    carried out or, where it `loses_answers`, after that."""

    def __init__(self, connect):
        self.connect, self.calls, self.at, self.for_good, self.loses_answers = connect, 0, None, True, False

    def client(self, uri):
        return Shaky(self, self.connect(uri))


class Shaky:
    def __init__(self, weather, client):
        self.weather, self.inner = weather, client

    def __getattr__(self, name):
        def call(*arguments, **options):
            weather = self.weather
            weather.calls += 1
            late = weather.calls - weather.at - 1 if weather.at is not None else -1  # 0 at the call that fails first
            fails = late >= 0 if weather.for_good else late == 0
            answer = None if fails and not weather.loses_answers else getattr(self.inner, name)(*arguments, **options)
            if fails:
                raise ConnectionError("the store went away\nwith a long story")
            return answer

        return call


@pytest.fixture
def weather(monkeypatch):
    weather = Weather(tracking._connect)
    monkeypatch.setattr(tracking, "_connect", weather.client)
    return weather


class Place:
    """A run's folder with the module's database as its store, and an experiment of its own."""

    def __init__(self, uri, experiment, root):
        self.uri, self.experiment, self.root, self.folder = uri, experiment, root, root / "runs/clip/mini/1"

    def tracker(self, **options):
        self.folder.mkdir(parents=True, exist_ok=True)
        return Tracker(
            self.folder,
            self.root,
            experiment=self.experiment,
            name="mini",
            params={"steps": 1, "scale": "mini"},
            **options,
        )

    def leave(self, arm):
        leave_outcome(self.folder, arm, acc=0.5, curves={"loss": [(0, 2.0), (1, 1.0)]})

    def reproduce(self, before=lambda event: None):
        """A small run; before(event) is called ahead of what is sent."""
        before("begin")
        with self.tracker() as t:
            for arm in ("first", "second"):
                self.leave(arm)
                before(arm)
                t.update()
        leave_report(self.folder)
        before("report")
        t.update(again=True)

    def logged(self):
        """{run name: (status, params, its curves with every point, its parent's name, its artifacts)}."""
        client, runs = client_and_runs(self.uri, self.experiment)
        names = {run.info.run_id: name for name, run in runs.items()}
        return {
            name: (
                run.info.status,
                run.data.params,
                {
                    metric: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, metric))
                    for metric in run.data.metrics
                },
                names.get(run.data.tags.get("mlflow.parentRunId")),
                sorted(item.path for item in client.list_artifacts(run.info.run_id)),
            )
            for name, run in runs.items()
        }


CHILD = {"loss": [(0, 2.0), (1, 1.0)], "acc": [(1, 0.5)], "seconds": [(1, 12.5)]}
WHOLE = {
    "mini": (
        "FINISHED",
        {"scale": "mini", "steps": "1"},
        {"clip.effect": [(0, 0.25)]},
        None,
        ["environment.txt", "report.html", "report.json"],
    ),
    **{f"{arm} 0": ("FINISHED", {"seed": "0"}, CHILD, "mini", []) for arm in ("first", "second")},
}


@pytest.fixture
def place(recorded, tmp_path, request, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{recorded[0] / 'mlflow.db'}")
    return Place(uri, request.node.name, tmp_path)


def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("answers", ["refuses", "hangs"])
def test_a_server_that_is_away_costs_seconds_one_warning_and_no_data(answers, place, monkeypatch, capfd):
    store = place.uri
    import mlflow  # noqa: F401  its import is not what is timed

    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:  # it takes connections and never answers
        port = server.getsockname()[1] if answers == "hangs" else unused_port()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:se@cret@127.0.0.1:{port}")
        started = time.monotonic()
        place.reproduce()
        assert time.monotonic() - started < 20  # MLflow's own client would take minutes
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1, printed.err
    assert "the run goes on" in printed.err and f"papers deliver {place.folder}" in printed.err
    assert "cret" not in printed.err + (place.folder / "tracking.json").read_text()
    assert read_record(place.folder)["uri"] == f"http://127.0.0.1:{port}"
    assert undelivered(place.root) == [place.folder]
    with pytest.raises(UserError, match=r"mini/1: http://127.* failed \(.*\); give the same command again") as raised:
        deliver(place.folder, place.root)
    assert "cret" not in str(raised.value)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert deliver(place.folder, place.root) == 2
    assert place.logged() == WHOLE and undelivered(place.root) == []
    assert deliver(place.folder / "tracking.json", place.root) == 0
    assert place.logged() == WHOLE


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        (None, "not a database"),
        ("sqlite:///{root}/mlflow.db/mlflow.db", "Error"),
        ("{root}/mlruns", "Error|Exception"),  # the plain file store, which MLflow gave up
    ],
)
def test_a_broken_store_costs_seconds_and_one_warning(uri, reason, place, monkeypatch, capfd):
    (place.root / "mlflow.db").write_bytes(b"no database at all, but long enough to be taken for one " * 100)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(root=place.root))
    started = time.monotonic()
    place.reproduce()
    assert time.monotonic() - started < 20
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and re.search(reason, printed.err)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.uri)
    assert deliver(place.folder, place.root) == 2 and place.logged() == WHOLE


CALLS = 23  # of one small run


@pytest.mark.parametrize("loses_answers", [False, True], ids=["fails", "loses its answer"])
@pytest.mark.parametrize("call", range(CALLS))
def test_a_store_that_goes_away_at_any_call_loses_and_doubles_nothing(call, loses_answers, place, weather, capfd):
    weather.at, weather.loses_answers = call, loses_answers
    place.reproduce()
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert "ConnectionError: the store went away)" in printed.err
    assert undelivered(place.root) == [place.folder]
    weather.at = None
    deliver(place.folder, place.root)
    assert place.logged() == WHOLE and undelivered(place.root) == []


def test_the_calls_above_are_all_that_there_are(place, weather):
    place.reproduce()
    assert weather.calls == CALLS and place.logged() == WHOLE


@pytest.mark.parametrize("call", [0, 2, 9, 12])
def test_what_a_store_missed_is_sent_at_the_end_where_it_is_back(call, place, weather, capfd):
    weather.at, weather.for_good = call, False
    place.reproduce()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "the run goes on" in lines[0] and "is back and has the whole run" in lines[1]
    assert place.logged() == WHOLE and undelivered(place.root) == []


def test_a_store_that_failed_is_left_alone_until_the_end(place, weather):
    weather.at, calls = 0, []
    place.reproduce(lambda event: calls.append((event, weather.calls)))
    assert calls == [("begin", 0), ("first", 1), ("second", 1), ("report", 1)] and weather.calls == 2


def test_without_mlflow_the_run_goes_on(place, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    place.reproduce()
    assert len(capfd.readouterr().err.splitlines()) == 1
    monkeypatch.undo()
    deliver(place.folder, place.root)


def test_ctrl_c_in_the_middle_of_a_call_loses_nothing(place, monkeypatch):
    with pytest.raises(KeyboardInterrupt), place.tracker() as t:
        place.leave("first")

        def interrupted(*arguments):
            monkeypatch.setattr(tracking._Store, "_log", real)
            raise KeyboardInterrupt

        real = tracking._Store._log
        monkeypatch.setattr(tracking._Store, "_log", interrupted)
        t.update()
    assert place.logged()["first 0"] == WHOLE["first 0"] and place.logged()["mini"][0] == "KILLED"


# ---- going on, and delivering by hand


def test_a_run_that_is_gone_on_with_is_the_same_run_in_mlflow(place):
    first = place.tracker()
    place.leave("first")
    first.update()  # and then its process is killed
    client, runs = client_and_runs(place.uri, place.experiment)
    client.set_terminated(runs["mini"].info.run_id, "KILLED")
    place.tracker()
    assert client.get_run(runs["mini"].info.run_id).info.status == "RUNNING"
    place.reproduce()
    assert place.logged() == WHOLE
    assert client.get_run(runs["mini"].info.run_id).data.metrics == {"clip.effect": 0.25}


def test_a_run_that_the_store_does_not_have_is_begun_anew(place):
    place.tracker()
    client, runs = client_and_runs(place.uri, place.experiment)
    client.delete_run(runs["mini"].info.run_id)
    place.reproduce()
    assert place.logged() == WHOLE


def test_a_broken_record_of_an_earlier_session_costs_nothing_but_its_key(place):
    place.folder.mkdir(parents=True)
    (place.folder / "tracking.json").write_text("{")
    place.reproduce()
    assert place.logged() == WHOLE


def test_what_an_interrupted_run_could_not_send_joins_the_run_that_goes_on(place, weather):
    weather.at = 0
    place.tracker()
    place.leave("first")
    assert undelivered(place.root) == [place.folder]
    weather.at = None
    place.reproduce()
    assert place.logged() == WHOLE and undelivered(place.root) == []


def test_curves_of_a_training_without_arms_are_kept_and_sent(place, weather):
    weather.at = 0
    place.tracker(curves={"loss": [(32, 2.0), (64, 1.0)], "waited": [(2, 0.25)]}).finish()
    weather.at = None
    assert deliver(place.folder, place.root) == 0
    assert place.logged()["mini"][2] == {"loss": [(32, 2.0), (64, 1.0)], "waited": [(2, 0.25)]}


def test_while_a_run_writes_to_its_folder_nobody_else_delivers_it(place, weather):
    import fcntl

    weather.at = 0
    place.reproduce()
    with (place.folder / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="mini/1: a run still writes to it; wait for its end"):
            deliver(place.folder, place.root)
        assert undelivered(place.root) == []
    assert undelivered(place.root) == [place.folder]


def test_what_cannot_be_delivered_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"nothing: no tracking\.json there; name a run's folder"):
        deliver(tmp_path / "nothing", tmp_path)
    for content in ('{"a": 1}', "[]", "not json", "\xff"):
        (tmp_path / "tracking.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=r"tracking\.json: not what a tracked run leaves"):
            deliver(tmp_path, tmp_path)


def test_the_verb_delivers_what_is_named_or_all_that_is_missing(place, weather, capsys):
    def verb(*words):
        with pytest.raises(SystemExit) as ended:
            main(place.root / "papers", "papers", ["deliver", *words])
        assert ended.value.code == 0
        return capsys.readouterr().out

    (place.root / "papers").mkdir()
    weather.at = 0
    place.reproduce()
    weather.at = None
    assert verb() == f"{place.folder}: delivered; MLflow lacked 2 arms of it\n"
    assert place.logged() == WHOLE
    assert verb() == "nothing is missing: all that was tracked has arrived\n"
    assert "lacked 0 arms" in verb(str(place.folder))


# ---- a real server


@pytest.fixture
def server(tmp_path):
    """start() and kill() of an `mlflow server` on loopback, always on the same port and database."""
    port, running = unused_port(), []

    def start():
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(tmp_path / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (tmp_path / "server.log").open("ab") as log:
            running.append(
                subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=environment, start_new_session=True)
            )
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and running[-1].poll() is None:
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            time.sleep(0.2)
        pytest.fail(f"the server did not start:\n{(tmp_path / 'server.log').read_text()[-2000:]}")

    def kill():
        os.killpg(running[-1].pid, signal.SIGKILL)  # its workers too
        running.pop().wait()

    try:
        yield f"http://127.0.0.1:{port}", start, kill
    finally:
        while running:
            kill()


def test_a_real_server_is_killed_in_the_middle_and_comes_back(server, tmp_path, capfd, monkeypatch):
    uri, start, kill = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    place = Place(uri, "a real server", tmp_path)
    start()
    place.reproduce(lambda event: {"second": kill, "report": start}.get(event, lambda: None)())
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 2, printed.err
    assert "the run goes on" in printed.err and "is back and has the whole run" in printed.err
    assert place.logged() == WHOLE and undelivered(tmp_path) == []


# ---- what is recorded of code and machine


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

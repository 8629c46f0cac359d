"""What MLflow holds after a run, read back with its own client; and that nothing is lost or doubled when it fails."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from shared.core.errors import UserError
from shared.core.provenance import commit_and_dirty, environment_text, machine_description
from shared.training import tracking
from shared.training.tracking import Tracker, deliver, kept_files


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
        Tracker(
            experiment="clip",
            name="mini emoji",
            folder=folder,
            data="emoji",
            data_digest="abc123" * 10,
            command="make reproduce PAPER=clip",
            about="Radford et al. 2021",
            tags={"scale": "mini"},
            params={"scale": "mini"},
        ) as t,
    ):
        for arm in ("baseline", "treatment"):
            with t.child(f"{arm}, seed 0", tags={"arm": arm}, params={"seed": 0, "long": "x" * 7000}) as run:
                run.log_curves({"train/loss": [(i, 1 / (i + 1)) for i in range(2500)], "lr": [(0, 0.1)]})
                run.log_metrics({"retrieval/i2t_r1@hit-pessimistic": 0.5, "textvqa/acc@m4c+ocr": 0.25})
        t.log_metrics({"effect": 0.25})
        t.log_artifact(source)
        t.describe("**7 reproduced**")
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
    assert tags["data_digest"] == "abc123" * 10
    assert tags["commit"] and tags["dirty"] in ("true", "false", "unknown")
    assert f"torch {machine_description()['torch']}" in tags["machine"]
    names = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert names == {"environment.txt", "curve.csv"}


def test_the_page_shows_a_description_a_dataset_and_a_source(recorded):
    _, client, parent, children = recorded
    assert parent.data.tags["mlflow.note.content"] == "**7 reproduced**"
    assert parent.data.tags["mlflow.source.name"] == "make reproduce PAPER=clip"
    (read,) = parent.inputs.dataset_inputs
    assert (read.dataset.name, read.dataset.digest) == ("emoji", "abc123abc123")
    assert {(run.data.tags["paper"], run.data.tags["data"], run.data.tags["scale"]) for run in children.values()} == {
        ("clip", "emoji", "mini")
    }
    assert client.get_experiment_by_name("clip").tags["mlflow.note.content"] == "Radford et al. 2021"


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


# ---- a store that goes away


class Weather:
    """Stands between a tracker and its store: `away` fails every call, `loses_answers` after it was carried out,
    `fails_after` n more calls that write."""

    def __init__(self, connect):
        self.connect, self.away, self.loses_answers, self.fails_after, self.asked = connect, False, False, None, []

    def client(self, uri):
        self.asked.append("connect")
        if self.away:
            raise ConnectionError("the store went away\nwith a long story")
        return Shaky(self, self.connect(uri))


class Shaky:
    def __init__(self, weather, client):
        self.weather, self.inner = weather, client

    def __getattr__(self, name):
        def call(*arguments, **options):
            weather = self.weather
            weather.asked.append(name)
            if weather.fails_after is not None and name in ("create_run", "log_batch", "set_terminated", "log_text"):
                weather.fails_after -= 1
                if weather.fails_after < 0:
                    weather.away = True
            if weather.away:
                raise ConnectionError("the store went away\nwith a long story")
            answer = getattr(self.inner, name)(*arguments, **options)
            if weather.loses_answers:
                raise TimeoutError("no answer")
            return answer

        return call


@pytest.fixture
def weather(monkeypatch):
    weather = Weather(tracking._connect)
    monkeypatch.setattr(tracking, "_connect", weather.client)
    return weather


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so: clock[0] += 30."""
    seconds = [1000.0]
    monkeypatch.setattr(tracking, "_now", lambda: seconds[0])
    return seconds


@pytest.fixture
def place(recorded, tmp_path, request):
    """Options of a tracker in the module's database, with an experiment and a folder of its own."""
    uri = f"sqlite:///{recorded[0] / 'mlflow.db'}"
    return {"uri": uri, "experiment": request.node.name, "folder": tmp_path, "name": "mini"}


def logged(uri, experiment):
    """{run name: (status, params, its curves with every point, its parent's name, its artifacts)}."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    names = {run.info.run_id: run.info.run_name for run in runs}
    assert len(set(names.values())) == len(runs), "a run was doubled"
    return {
        run.info.run_name: (
            run.info.status,
            run.data.params,
            {
                name: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))
                for name in run.data.metrics
            },
            names.get(run.data.tags.get("mlflow.parentRunId")),
            sorted(item.path for item in client.list_artifacts(run.info.run_id)),
        )
        for run in runs
    }


WHOLE = {
    "mini": ("FINISHED", {"scale": "mini"}, {"effect": [(0, 0.25)]}, None, ["environment.txt", "recipe.yaml"]),
    **{
        f"{arm} seed 0": ("FINISHED", {"seed": "0"}, {"loss": [(0, 2.0), (1, 1.0)], "acc": [(1, 0.5)]}, "mini", [])
        for arm in ("first", "second")
    },
}


def reproduction(before=lambda event: None, **options):
    """A small run; before(event) is called ahead of each thing that it logs. -> its tracker."""
    before("tracker")
    with Tracker(params={"scale": "mini"}, **options) as t:
        for arm in ("first", "second"):
            before(arm)
            with t.child(f"{arm} seed 0", params={"seed": 0}) as run:
                before(f"{arm} curves")
                run.log_curves({"loss": [(0, 2.0), (1, 1.0)]})
                before(f"{arm} metrics")
                run.log_metrics({"acc": 0.5}, step=1)
                before(f"{arm} end")
        before("recipe")
        t.log_text("steps: 1", "recipe.yaml")
        before("effect")
        t.log_metrics({"effect": 0.25})
        before("end")
    return t


EVENTS = ["tracker", "first", "first curves", "first metrics", "first end", "second", "second curves", "recipe", "end"]


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_server_that_is_away_costs_one_warning_and_no_data(recorded, tmp_path, capfd):
    uri = f"http://someone:secret@127.0.0.1:{unused_port()}"
    started = time.monotonic()
    t = reproduction(uri=uri, experiment="away all the time", name="mini", folder=tmp_path)
    assert time.monotonic() - started < 60  # MLflow's own client would take minutes
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1, printed.err
    assert "the run goes on" in printed.err and str(t.local_file) in printed.err
    assert not t.working and t.run_id is None
    assert kept_files(tmp_path) == [t.local_file]
    kept = records(t.local_file)
    assert kept[0] == {"uri": uri.replace("someone:secret@", ""), "experiment": "away all the time"}
    assert "secret" not in printed.err + t.local_file.read_text()
    assert [r["name"] for r in kept if "create" in r] == ["mini", "first seed 0", "second seed 0"]

    store = f"sqlite:///{recorded[0] / 'mlflow.db'}"
    assert deliver(t.local_file, store) == len(kept) - 1
    assert logged(store, "away all the time") == WHOLE
    assert kept_files(tmp_path) == []
    assert deliver(t.local_file, store) == 0 == deliver(f"{t.local_file}.delivered", store)
    os.replace(f"{t.local_file}.delivered", t.local_file)  # even a file whose renaming was lost
    deliver(t.local_file, store)
    assert logged(store, "away all the time") == WHOLE


@pytest.mark.parametrize("back", ["at the end", "two records later", "never"])
@pytest.mark.parametrize("event", EVENTS)
def test_a_store_that_goes_away_at_any_moment_loses_and_doubles_nothing(event, back, place, weather, clock, capfd):
    passed = []

    def before(now):
        clock[0] += 31
        passed.append(now)
        if now == event:
            weather.away = True
        if (back == "two records later" and passed[-3:-2] == [event]) or (back == "at the end" and now == "end"):
            weather.away = False

    t = reproduction(before, **place)
    said = capfd.readouterr()
    if weather.away:
        assert len(said.err.splitlines()) == 1 and "ConnectionError: the store went away)" in said.err
        weather.away = False
        assert deliver(t.local_file) > 0
    elif not (event == back == "end" or (back == "at the end" and event == "end")):
        assert len(said.err.splitlines()) == 2 and "kept records were delivered" in said.err
        assert t.working
    assert said.out == ""
    assert logged(place["uri"], place["experiment"]) == WHOLE
    assert kept_files(place["folder"]) == []


@pytest.mark.parametrize("event", EVENTS)
def test_an_answer_that_is_lost_doubles_nothing(event, place, weather, clock):
    def before(now):
        clock[0] += 31
        weather.loses_answers = now == event

    t = reproduction(before, **place)
    weather.loses_answers = False
    if kept_files(place["folder"]):
        deliver(t.local_file)
    assert logged(place["uri"], place["experiment"]) == WHOLE


def test_a_store_that_is_away_is_asked_ever_more_seldom(place, weather, clock):
    with Tracker(**place) as t:
        weather.away = True
        t.log_metrics({"x": 0.0})
        weather.asked.clear()
        asked_at = []
        for second in range(3600):
            clock[0] += 1
            t.log_metrics({"x": 1.0}, step=second)
            if weather.asked:
                asked_at.append(second + 1)
                weather.asked.clear()
        assert asked_at == [30, 30 + 60, 90 + 120, 210 + 240, 450 + 480, 930 + 600, 1530 + 600, 2130 + 600, 2730 + 600]


def test_a_long_backlog_is_delivered_over_several_calls_so_that_none_waits_long(place, weather, clock, monkeypatch):
    with Tracker(**place) as t:
        weather.away = True
        for step in range(40):
            t.log_metrics({"x": 1.0}, step=step)
        weather.away = False
        real = tracking._send_curves
        monkeypatch.setitem(tracking._SENDERS, "curves", lambda *a: (real(*a), clock.__setitem__(0, clock[0] + 0.25)))
        clock[0] += 31
        for step in (40, 41):
            before = clock[0]
            t.log_metrics({"x": 1.0}, step=step)
            assert 0.9 <= clock[0] - before <= 1.3
        assert not t.working
    points = logged(place["uri"], place["experiment"])["mini"][2]["x"]
    assert [step for step, _ in points] == list(range(42))


def test_a_delivery_that_breaks_off_goes_on_where_it_stopped(place, weather):
    weather.away = True
    t = reproduction(**place)
    total = len(records(t.local_file)) - 1
    weather.away, weather.fails_after = False, 5
    with pytest.raises(UserError, match=r"went away\); \d records were delivered, \d+ are still kept; give the same"):
        deliver(t.local_file)
    first = records(t.local_file)[-1]["delivered"]
    assert 0 < first < total
    weather.away, weather.fails_after = False, None
    weather.asked.clear()
    assert deliver(t.local_file) == total - first
    assert weather.asked.count("create_run") < 3  # some stood there already
    assert logged(place["uri"], place["experiment"]) == WHOLE


def test_a_record_that_the_store_refuses_does_not_stop_those_behind_it(place, weather, clock, capfd):
    with Tracker(params={"jobs": 1}, **place) as t:
        t.log_params({"jobs": 2})  # MLflow takes a parameter once
        t.log_params({"jobs": 3})
        weather.away = True
        (gone := place["folder"] / "figure.png").write_text("x")
        t.log_artifact(gone)
        gone.unlink()
        t.log_metrics({"x": 1.0})
        weather.away = False
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3 and "refused a record" in said[0] and "went away" in said[1] and "delivered" in said[2]
    assert logged(place["uri"], place["experiment"])["mini"][2] == {"x": [(0, 1.0)]}
    refused = records(Path(f"{t.local_file}.refused"))
    assert [r["params"]["jobs"] for r in refused[:2]] == ["2", "3"] and refused[2]["artifact"][0] == str(gone)


def test_while_a_run_writes_to_its_file_nobody_else_delivers_it(place, weather):
    weather.away = True
    with Tracker(**place) as t, pytest.raises(UserError, match="a run still writes to it"):
        deliver(t.local_file)
    weather.away = False
    assert deliver(t.local_file) > 0


def test_what_cannot_be_delivered_is_said_in_one_line(place, weather, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jsonl: no such file"):
        deliver(tmp_path / "nothing.jsonl")
    (other := tmp_path / "other.jsonl").write_text('{"a": 1}\nnot json\n')
    with pytest.raises(UserError, match="not a file that a tracker kept"):
        deliver(other)
    assert other.read_text() == '{"a": 1}\nnot json\n'


def test_a_line_that_a_full_disk_cut_off_costs_only_itself(place, weather):
    weather.away = True
    t = reproduction(**place)
    whole = t.local_file.read_bytes().splitlines(keepends=True)
    (cut := [line for line in whole if b"effect" in line])[0]
    t.local_file.write_bytes(b"".join(whole[: whole.index(cut[0])]) + cut[0][:20])
    weather.away = False
    deliver(t.local_file)
    found = logged(place["uri"], place["experiment"])
    assert found["first seed 0"] == WHOLE["first seed 0"] and found["mini"][2] == {}


def test_without_a_disk_the_records_wait_in_memory_and_are_delivered(place, weather, clock, capfd, monkeypatch):
    from shared.training import outbox as kept

    class Full:
        def readall(self):
            return b""

        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "claim", lambda path: (Full(), True))
    monkeypatch.setattr(kept, "release", lambda file: None)
    weather.away = True
    reproduction(lambda event: setattr(weather, "away", event != "end"), **place)
    said = capfd.readouterr().err
    assert said.count("No space left on device") == 1
    assert logged(place["uri"], place["experiment"]) == WHOLE


def test_without_mlflow_the_run_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with Tracker(experiment="clip", folder=tmp_path) as t:
        t.log_metrics({"acc": 0.5})
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert [r["curves"] for r in records(t.local_file) if "curves" in r] == [{"acc": [[0, 0.5]]}]


def test_a_missing_artifact_is_the_callers_mistake_and_not_the_stores(place):
    with pytest.raises(FileNotFoundError), Tracker(**place) as t:
        t.log_artifact(place["folder"] / "nothing.txt")
    assert t.working


def test_ctrl_c_in_the_middle_of_a_call_loses_nothing(place, monkeypatch):
    real = tracking._send_curves

    def interrupted(*arguments):
        monkeypatch.setitem(tracking._SENDERS, "curves", real)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Tracker(**place) as t:
        monkeypatch.setitem(tracking._SENDERS, "curves", interrupted)
        t.log_metrics({"x": 1.0})
    assert logged(place["uri"], place["experiment"])["mini"][:3] == ("KILLED", {}, {"x": [(0, 1.0)]})


# ---- going on


def interrupted_run(place):
    """A run that is killed in its second arm: nothing of it is closed. -> its tracker."""
    t = Tracker(params={"scale": "mini"}, **place)
    with t.child("first seed 0", params={"seed": 0}) as run:
        run.log_curves({"loss": [(0, 2.0), (1, 1.0)]})
        run.log_metrics({"acc": 0.5}, step=1)
    t.child("second seed 0", params={"seed": 0})
    t._store.kept.close()  # as the end of its process does
    return t


def test_a_run_that_is_gone_on_with_is_the_same_run_in_mlflow(place, recorded):
    first = interrupted_run(place)
    client = recorded[1]
    client.set_terminated(first.run_id, "KILLED")
    t = Tracker(resume=first.key, **place)
    assert t.run_id == first.run_id
    assert client.get_run(t.run_id).info.status == "RUNNING"
    assert list(t.children()) == ["first seed 0"]
    assert client.get_run(t.children()["first seed 0"]).data.tags["mlflow.parentRunId"] == t.run_id
    t.finish()
    reproduction(resume=first.key, **place)  # all of it again: as a run does that does not ask
    assert logged(place["uri"], place["experiment"]) == WHOLE


def test_a_run_that_the_store_does_not_have_is_begun_anew(place, recorded):
    gone = interrupted_run(place)
    recorded[1].delete_run(gone.run_id)
    for resume in (gone.key, "20200101-000000-abcdef"):
        t = Tracker(resume=resume, **place)
        assert t.run_id and t.run_id != gone.run_id and t.children() == {}
        t.finish()
    for no_key in ("it's", gone.run_id):
        with pytest.raises(ValueError, match="resume is the key of a tracker, not"):
            Tracker(resume=no_key, **place)


@pytest.mark.parametrize("delivered_by", ["the run that goes on", "hand, afterwards"])
def test_what_an_interrupted_run_kept_joins_the_run_that_goes_on(delivered_by, place, weather, clock):
    weather.away = True
    first = interrupted_run(place)
    kept = first.local_file.read_bytes()
    if delivered_by == "the run that goes on":
        weather.away = False
        t = reproduction(resume=first.key, **place)
        assert t.children().keys() == {"first seed 0", "second seed 0"}
    else:
        t = Tracker(resume=first.key, **place)
        assert t.children() == {"first seed 0": t._key_of("first seed 0")}
        t._store.kept.close()
        reproduction(resume=first.key, **place)
        assert t.local_file.read_bytes().startswith(kept)
        weather.away = False
        deliver(t.local_file)
    assert logged(place["uri"], place["experiment"]) == WHOLE


# ---- a real server


@pytest.fixture
def server(recorded, tmp_path):
    """start() and kill() of an `mlflow server` on loopback, always on the same port and database."""
    shutil.copy(recorded[0] / "mlflow.db", tmp_path / "server.db")
    port, running = unused_port(), []

    def start():
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(tmp_path / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
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
    monkeypatch.setattr(tracking, "_FIRST_PAUSE", 0.0)

    def before(event):
        if event == "first curves":
            kill()
        if event == "effect":
            start()

    start()
    t = reproduction(before, uri=uri, experiment="a real server", name="mini", folder=tmp_path)
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 2, printed.err
    assert "the run goes on" in printed.err and "kept records were delivered" in printed.err
    assert t.working and kept_files(tmp_path) == []
    assert logged(uri, "a real server") == WHOLE


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

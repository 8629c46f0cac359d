"""MLflow tracking: one parent run a run folder, a child per arm and seed, sent as they come about.

All that MLflow shows is read from the folder: tracking.json (what is known when a run begins), arms/*/outcome.json and
report.json. So tracking never costs a run: where the store fails there is one warning, and `deliver` reads the folder
again later. What arrived already is found and not sent twice: a parent by its key (a tag), a child by its name, a point
by its time, which is the start of its run.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from shared.core.errors import UserError
from shared.core.files import write_whole
from shared.core.provenance import commit_and_dirty, environment_text, machine_description, machine_line

RECORD = "tracking.json"
_ARTIFACTS = ("environment.txt", "recipe.yaml", "report.html", "report.json")
_PARAM, _TAG = 6000, 8000  # characters, MLflow's own limits (mlflow.utils.validation)
_KEY = "tracking.key"  # the tag by which a parent run is found again


class Tracker:
    """The MLflow run of one run folder. As a context manager it ends as FINISHED, FAILED or KILLED.

        with Tracker(folder, root, experiment="clip", name="mini emoji") as tracker:
            for outcome in run_arms(...):  # each leaves arms/<arm>-<seed>/outcome.json
                tracker.update()

    folder: where it holds a tracking.json, that run goes on. root: the checkout whose commit is recorded; the store is
    MLFLOW_TRACKING_URI, else sqlite:///<root>/mlflow.db with its artifacts in mlartifacts beside it.
    data, data_digest: name and hash of what is read. command: what gives this run again. about: the experiment's
    description, in Markdown. tags: of this run and of every child. params: with `steps`, where arms stand.
    curves: of the parent, {name: [(step, value)]}.
    """

    def __init__(
        self,
        folder: Path,
        root: Path,
        *,
        experiment: str,
        name: str,
        about: str = "",
        data: str | None = None,
        data_digest: str | None = None,
        command: str = "",
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        curves: Mapping[str, Iterable[tuple[int, float]]] | None = None,
    ) -> None:
        commit, dirty = commit_and_dirty(root)
        of_all = {"paper": experiment} | ({"data": data} if data else {}) | dict(tags or {})
        own = {
            "commit": commit[:12] if commit else "unknown",
            "dirty": "unknown" if dirty is None else str(dirty).lower(),
            "data_digest": data_digest or "none",
            "machine": machine_line(machine_description()),
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": command,
            "mlflow.source.git.commit": commit or "",
        }
        record = {
            "key": f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}",
            "started": int(time.time() * 1000),
            "uri": _public(os.environ.get("MLFLOW_TRACKING_URI", "")),
            "experiment": experiment,
            "about": about,
            "name": name,
            "tags": _texts({key: value for key, value in own.items() if value} | of_all, _TAG),
            "tags_of_arms": _texts(of_all, _TAG),
            "params": _texts(params or {}, _PARAM),
            "data": [data, data_digest[:12]] if data and data_digest else None,
            "curves": {key: list(curve) for key, curve in (curves or {}).items()},
            "status": None,
            "missed": False,  # whether MLflow lacks something
        }
        with suppress(UserError):
            before = read_record(folder)
            record |= {"key": before["key"], "started": before["started"]}
        self.folder, self._record, self._uri = folder, record, _uri("", root)
        self._store: _Store | None = None
        self._failed = False
        write_whole(folder / "environment.txt", environment_text())
        self._keep()
        self.update()

    def update(self, again: bool = False) -> None:
        """Send what is new in the folder. Raises nothing: it must not end a training run. A store that failed is left
        alone from then on, unless `again`."""
        if self._failed and not again:
            return
        store, self._store = self._store, None  # after an error or Ctrl-C what arrived has to be looked up
        try:
            store = store or _Store(self._uri, self._record)
            store.send(self.folder)
        except Exception as error:
            if not self._failed:
                later = f"send it when it is back: python -m papers deliver {shlex.quote(str(self.folder))}"
                _say(f"{_public(self._uri)} failed ({_reason(error)}); the run goes on, {later}")
            self._failed = True
            self._keep(missed=True)
            return
        if self._failed:
            _say(f"{_public(self._uri)} is back and has the whole run")
            self._keep(missed=False)
        self._store, self._failed = store, False

    def finish(self, status: str = "FINISHED") -> None:
        self._keep(status=status, ended=int(time.time() * 1000))
        self.update()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind, error, trace) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.finish("FINISHED" if kind is None else "KILLED" if interrupted else "FAILED")

    def _keep(self, **values: Any) -> None:
        self._record |= values
        with suppress(UserError):  # a full disk ends the run elsewhere
            write_whole(self.folder / RECORD, json.dumps(self._record, indent=1))


def deliver(folder: Path, root: Path) -> int:
    """Send what MLflow lacks of a run's folder, to MLFLOW_TRACKING_URI, else the store that it was meant for, else the
    one in `root`. -> how many arms arrived. UserError where the folder tracks no run or an unfinished one, and where
    the store fails; what arrived until then is not sent again."""
    folder = folder.parent if folder.name == RECORD else folder
    record = read_record(folder)
    if _is_running(folder):
        raise UserError(f"{folder}: a run still writes to it; wait for its end")
    uri = _uri(record["uri"], root)
    try:
        sent = _Store(uri, record).send(folder)
    except Exception as error:
        raise UserError(
            f"{folder}: {_public(uri)} failed ({_reason(error)}); give the same command again when it is back"
        ) from None
    write_whole(folder / RECORD, json.dumps(record | {"missed": False}, indent=1))
    return sent


def undelivered(root: Path) -> list[Path]:
    """The folders of ended runs below root/runs of which MLflow lacks something."""
    records = sorted([*root.glob(f"runs/*/*/{RECORD}"), *root.glob(f"runs/*/*/*/{RECORD}")])
    return [path.parent for path in records if read_record(path.parent)["missed"] and not _is_running(path.parent)]


def read_record(folder: Path) -> dict[str, Any]:
    """tracking.json of a run's folder. UserError where there is none, or another file of that name."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if {"key", "started", "uri", "experiment", "params", "status", "missed"} <= record.keys():
            return record
    except OSError:
        raise UserError(
            f"{folder}: no {RECORD} there; name a run's folder, as runs/clip/mini/20260102-030405"
        ) from None
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{folder / RECORD}: not what a tracked run leaves; name another run's folder")


def _is_running(folder: Path) -> bool:
    """Whether a process holds the lock of a reproduction's folder; a training has none."""
    try:
        with (folder / "run.lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


class _Store:
    """A connection to MLflow, with the parent run of a record found there or made."""

    def __init__(self, uri: str, record: Mapping[str, Any]) -> None:
        self._client, self._record = _connect(uri), record
        self._experiment_id = _experiment_id(self._client, uri, record["experiment"], record["about"])
        self._sent: set[Path] = set()
        self._status = None
        tags = record["tags"] | {_KEY: record["key"]}
        parents = self._runs(f"tags.`{_KEY}` = '{record['key']}'")
        self._parent = self._run(parents, record["name"], tags, record["params"], record["started"])
        children = self._runs(f"tags.`mlflow.parentRunId` = '{self._parent.info.run_id}'")
        self._children = {run.info.run_name: run for run in children}
        if not record["status"] and self._parent.info.status != "RUNNING":
            self._client.update_run(self._parent.info.run_id, status="RUNNING")
        if record["data"]:
            from mlflow.entities import Dataset, DatasetInput

            name, digest = record["data"]
            data = Dataset(name, digest, source_type="local", source="{}")
            self._client.log_inputs(self._parent.info.run_id, [DatasetInput(data)])
        self._log(self._parent, record["curves"])

    def send(self, folder: Path) -> int:
        """What stands in the folder and was not sent through this connection. -> how many arms MLflow lacked."""
        outcomes = [path for path in folder.glob("arms/*/outcome.json") if path not in self._sent]
        arms = 0
        for path in sorted(outcomes, key=lambda path: path.stat().st_mtime):
            arms += self._send_arm(path)
            self._sent.add(path)
        for path in (folder / name for name in _ARTIFACTS):
            if path.is_file() and path not in self._sent:
                if path.name == "report.json":
                    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
                    effects = {row["id"]: row["reproduced"] for row in rows if row["rung"] == "claims"}
                    numbers = {name: [(0, value)] for name, value in effects.items() if isinstance(value, float)}
                    self._log(self._parent, numbers)
                self._client.log_artifact(self._parent.info.run_id, str(path))
                self._sent.add(path)
        if self._record["status"] not in (None, self._status):
            self._status = self._record["status"]
            self._client.set_terminated(self._parent.info.run_id, self._status, self._record["ended"])
        return arms

    def _send_arm(self, path: Path) -> bool:
        outcome = json.loads(path.read_text(encoding="utf-8"))["outcome"]
        name, measured = f"{outcome['arm']} {outcome['seed']}", outcome["measured"]
        known = [self._children[name]] if name in self._children else []
        if known and known[0].info.status == "FINISHED":
            return False
        ended, step = int(path.stat().st_mtime * 1000), int(self._record["params"]["steps"])
        tags = self._record["tags_of_arms"] | {"arm": outcome["arm"], "mlflow.parentRunId": self._parent.info.run_id}
        run = self._run(known, name, tags, {"seed": str(outcome["seed"])}, ended)
        numbers = {key: value for key, value in measured.items() if isinstance(value, (int, float))}
        numbers["seconds"] = outcome["seconds"]
        self._log(run, {key: [(step, value)] for key, value in numbers.items()})
        self._log(run, measured.get("curves", {}))
        self._client.set_terminated(run.info.run_id, "FINISHED", ended)
        return True

    def _runs(self, condition: str) -> list:
        return self._client.search_runs([self._experiment_id], condition, max_results=50_000)

    def _run(self, known: list, name: str, tags: Mapping[str, str], params: Mapping[str, str], started: int):
        """The first of the `known` runs, or a new one, with these tags and parameters."""
        from mlflow.entities import Param, RunTag

        run = known[0] if known else self._client.create_run(self._experiment_id, started, tags, name)
        missing = [Param(key, value) for key, value in params.items() if key not in run.data.params]  # set only once
        self._client.log_batch(run.info.run_id, params=missing, tags=[RunTag(*tag) for tag in tags.items()])
        return run

    def _log(self, run, curves: Mapping[str, Iterable[tuple[int, float]]]) -> None:
        from mlflow.entities import Metric

        points = [(_key(name), *point) for name, curve in curves.items() for point in curve]
        at = run.info.start_time
        self._client.log_batch(
            run.info.run_id, [Metric(name, float(value), at, int(step)) for name, step, value in points]
        )


def _uri(meant: str, root: Path) -> str:
    """MLFLOW_TRACKING_URI, else the store that was meant, else the database in `root`."""
    # what would begin a query or stand for another character in a URI
    database = str(root.resolve() / "mlflow.db").replace("%", "%25").replace("?", "%3F")
    return os.environ.get("MLFLOW_TRACKING_URI") or meant or f"sqlite:///{database}"


def _connect(uri: str):
    # Read by mlflow at import or at a call, so set before either; what the user chose stays.
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines a run, through our progress bar
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the default waits for minutes on a server that is away
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # "Creating initial MLflow database tables..."
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # its retries, besides our one line
    if not uri.startswith("http"):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 1  # ten attempts at a broken database take more than a minute
    return MlflowClient(tracking_uri=uri)


def _experiment_id(client, uri: str, name: str, about: str) -> str:
    known = client.get_experiment_by_name(name)
    if "%" in uri:
        with suppress(OSError):  # MLflow makes the folder as it is spelled in the URI, beside the one that is meant
            os.removedirs(Path(uri.removeprefix("sqlite:///")).parent)
    if known is None:
        # MLflow's default is ./mlruns of whatever the working directory is; a server has its own place
        place = None
        if uri.startswith("sqlite:///"):
            database = Path(unquote(uri.removeprefix("sqlite:///"))).resolve()
            place = (database.parent / "mlartifacts").as_uri()
        known = client.get_experiment(client.create_experiment(name, artifact_location=place))
    if known.lifecycle_stage == "deleted":
        client.restore_experiment(known.experiment_id)
    if about and known.tags.get("mlflow.note.content") != about:
        client.set_experiment_tag(known.experiment_id, "mlflow.note.content", about)
    return known.experiment_id


def _public(text: str) -> str:
    return re.sub(r"//[^/\s]*@", "//", text)  # a URI may carry a password


def _key(name: str) -> str:
    """`task/metric@protocol` as MLflow allows it: letters, digits and _ - . space : /, so `@` becomes `:`."""
    return re.sub(r"[^\w\-. :/]", "-", name.replace("@", ":"))


def _texts(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    texts = {_key(str(key)): str(value) for key, value in values.items()}
    return {key: text if len(text) <= limit else text[: limit - 1] + "…" for key, text in texts.items()}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return _public(f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}")


def _say(line: str) -> None:
    print(f"tracking: {line}", file=sys.stderr, flush=True)

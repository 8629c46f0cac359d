"""MLflow tracking: one parent run a reproduction, a child per arm and seed; sqlite unless MLFLOW_TRACKING_URI is set.

Tracking never costs a run: what a store does not take is kept in a JSONL file, in order, and delivered when the store
is back, at the end of the run, or later by `deliver`. Whatever is sent twice arrives once: a run is known by its key (a
tag), a point by its time, and all else overwrites itself.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import secrets
import shlex
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.core.errors import UserError
from shared.core.files import ROOT
from shared.core.provenance import commit_and_dirty, environment_text, machine_description
from shared.training.outbox import Kept

# MLflow's own limits (mlflow.utils.validation)
_PARAM, _TAG, _METRICS_A_BATCH, _OTHERS_A_BATCH = 6000, 8000, 1000, 100
_KEY = "tracking.key"  # the tag by which a run is found again
# A store that is away is asked again after 30 s, then after twice as long each time, up to 10 minutes. Seconds: the
# wait for its answer, what one call of the run may spend on delivering, and what its end may.
_FIRST_PAUSE, _LONGEST_PAUSE, _PROBE, _SHARE, _AT_THE_END = 30.0, 600.0, 2.0, 1.0, 60.0
_now = time.monotonic


class Run:
    """One MLflow run, parent or child. As a context manager it ends as FINISHED, FAILED or KILLED."""

    def __init__(
        self, store: _Store, key: str, name: str, tags: Mapping[str, Any], params: Mapping[str, Any], parent: Run | None
    ) -> None:
        self.name, self.key, self._store = name, key, store
        parent_key = parent.key if parent is not None else None
        header = {"parent": parent_key, "tags": _texts(tags, _TAG), "params": _texts(params, _PARAM)}
        self._log("create", header)

    @property
    def run_id(self) -> str | None:
        """MLflow's id; None until the store has taken the run."""
        return self._store.ids.get(self.key)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Values longer than MLflow's 6000 characters are cut, with an ellipsis to show it."""
        self._log("params", _texts(params, _PARAM))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._log("tags", _texts(tags, _TAG))

    def describe(self, markdown: str) -> None:
        """The description at the top of the run's page."""
        self.set_tags({"mlflow.note.content": markdown})

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """`group/name` puts a metric's chart into the section `group` of the run's page."""
        self.log_curves({name: [(step, value)] for name, value in metrics.items()})

    def log_curves(self, curves: Mapping[str, Iterable[tuple[int, float]]]) -> None:
        """Whole curves, {name: [(step, value), ...]}, in batches of 1000 points instead of one call a point."""
        points = {_key(name): [[int(step), float(value)] for step, value in curve] for name, curve in curves.items()}
        self._log("curves", points)

    def log_data(self, name: str, digest: str) -> None:
        """What the run read, as the Dataset column of MLflow's list of runs shows it."""
        self._log("data", [name, digest[:12]])

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file or a folder, copied to the artifact store."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"artifact {path} does not exist")
        self._log("artifact", [str(path.resolve()), folder])

    def log_text(self, text: str, name: str) -> None:
        self._log("text", [text, name])

    def finish(self, status: str = "FINISHED") -> None:
        self._log("status", status)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.finish("FINISHED" if kind is None else "KILLED" if interrupted else "FAILED")

    def _log(self, kind: str, payload: Any) -> None:
        if payload:
            # the time is part of a point's identity: the record keeps it for whenever it is sent
            self._store.log({"run": self.key, "name": self.name, "time": int(time.time() * 1000), kind: payload})


class Tracker(Run):
    """The parent run of one reproduction.

        with Tracker(experiment="clip", name="mini emoji", folder=out, data_digest=world.digest) as tracker:
            with tracker.child("0 baseline", tags={"arm": "baseline"}, params={"seed": 0}) as run:
                run.log_curves({"curve/loss": [(0, 3.1), (1, 2.9)]})

    uri: an MLflow tracking URI; else MLFLOW_TRACKING_URI; else `sqlite:///<folder>/mlflow.db`.
    folder: where that database, its artifacts and the file of kept records go (default: the working directory).
    root: the source checkout whose commit and dirty flag are recorded (default: the one this file lies in).
    data, data_digest: name and hash of what is read. command: what gives this run again.
    tags: of this run and of every child. about: the experiment's description, in Markdown.
    resume: the `key` of an earlier tracker (there before MLflow gives the run an id). Where the store has its run it
    goes on there, RUNNING again; a child that stands FINISHED is complete, and what is logged to it again is left out.
    """

    def __init__(
        self,
        uri: str | None = None,
        *,
        experiment: str,
        name: str = "reproduction",
        folder: str | Path | None = None,
        root: str | Path | None = None,
        data: str | None = None,
        data_digest: str | None = None,
        command: str | None = None,
        about: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        resume: str | None = None,
    ) -> None:
        from shared.core.provenance import machine_line

        folder = Path(folder or Path.cwd()).resolve()
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        if resume is not None and not re.fullmatch("[0-9]{8}-[0-9]{6}-[0-9a-f]{6}", resume):
            raise ValueError(f"resume is the key of a tracker, not {resume!r}")
        key = resume or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        commit, dirty = commit_and_dirty(Path(root) if root else ROOT)
        self._of_all = {"paper": experiment} | ({"data": data} if data else {}) | dict(tags or {})
        described = {
            "commit": commit[:12] if commit else "unknown",
            "dirty": "unknown" if dirty is None else str(dirty).lower(),
            "data_digest": data_digest or "none",
            "machine": machine_line(machine_description()),
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": command or "",
            "mlflow.source.git.commit": commit or "",
        }
        described = {key: value for key, value in described.items() if value}
        kept = _kept_for(folder, key, {"uri": _public(self.uri), "experiment": experiment})
        store = _Store(self.uri, experiment, about or "", kept, resume is not None)
        super().__init__(store, key, name, described | self._of_all, params or {}, None)
        self.log_text(environment_text(), "environment.txt")
        if data and data_digest:
            self.log_data(data, data_digest)

    def child(self, name: str, tags: Mapping[str, Any] | None = None, params: Mapping[str, Any] | None = None) -> Run:
        """A run nested under this one: an arm with a seed, by a name that no other has. Use it as a context manager, or
        call `finish`."""
        return Run(self._store, self._key_of(name), name, self._of_all | dict(tags or {}), params or {}, self)

    def children(self) -> dict[str, str]:
        """{name: run id} of the children that are logged to their end, in the store or, with their key for an id, in
        the file of kept records. Of a store that is away only the latter are known."""
        ended = [record for record in self._store.kept.waiting if record.get("status") == "FINISHED"]
        kept = {record["name"]: record["run"] for record in ended if record["run"] != self.key}
        return kept | self._store.finished_children(self.run_id)

    def finish(self, status: str = "FINISHED") -> None:
        """Also a last try to deliver what is kept, for a minute at most."""
        super().finish(status)
        self._store.close()

    @property
    def working(self) -> bool:
        """False while the store is away and records go to `local_file`."""
        return self._store.working

    @property
    def local_file(self) -> Path:
        return self._store.kept.path

    def _key_of(self, child: str) -> str:
        return hashlib.sha256(f"{self.key}\n{child}".encode()).hexdigest()[:20]


def kept_files(folder: str | Path) -> list[Path]:
    """What trackers kept in `folder` and could not deliver yet, oldest first."""
    return sorted(Path(folder).glob("tracking-*.jsonl"), key=lambda path: path.stat().st_mtime)


def deliver(path: str | Path, uri: str | None = None) -> int:
    """Send what a tracker kept, to `uri`, else MLFLOW_TRACKING_URI, else the store that it was meant for. -> how many
    records arrived.

    The file is then renamed to `<name>.delivered`; a second call finds that and sends nothing. Where the store fails in
    the middle (UserError) the file remembers how far it came.
    """
    path = Path(path)
    delivered = path if path.suffix == ".delivered" else path.with_name(f"{path.name}.delivered")
    if delivered.is_file() and (path == delivered or not path.is_file()):
        return 0
    if not path.is_file():
        raise UserError(f"{path}: no such file; kept records are in tracking-*.jsonl where the run was started")
    try:
        kept = Kept(path)
    except BlockingIOError:
        raise UserError(f"{path}: a run still writes to it and will deliver it itself; wait for its end") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); it has to be readable and writable") from None
    if not {"uri", "experiment"} <= kept.belong.keys():
        raise UserError(f"{path}: not a file that a tracker kept, its first line names no experiment")
    before, uri = kept.sent, uri or os.environ.get("MLFLOW_TRACKING_URI") or kept.belong["uri"]
    store = _Store(uri, kept.belong["experiment"], "", kept, True)
    try:
        store.deliver(math.inf)
    except Exception as error:
        raise UserError(
            f"{path}: {_public(uri)} failed ({store.reason(error)}); {kept.sent - before} records were delivered, "
            f"{len(kept.waiting)} are still kept; give the same command again when it is back"
        ) from None
    finally:
        kept.close()
    return kept.sent - before


class _Refused(Exception):
    """The store is there, and will never take this record."""


class _Store:
    """The connection to an MLflow store, and what waits for it while it is away."""

    def __init__(self, uri: str, experiment: str, about: str, kept: Kept, resumed: bool) -> None:
        self.uri, self.experiment, self.about, self.kept, self.resumed = uri, experiment, about, kept, resumed
        self.ids: dict[str, str] = {}  # key of a run -> MLflow's id
        self._complete: set[str] = set()  # children that were found finished
        self._client = self._experiment_id = None
        self._away = self._refused = False
        self._pause, self._due = _FIRST_PAUSE, 0.0

    @property
    def working(self) -> bool:
        return self._client is not None and not self.kept.waiting

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a record, or keep it behind those that wait. Raises nothing: it must not end a training run."""
        if not self.working:
            self.catch_up(_SHARE)
        if self.working:
            try:
                return self._send(record, self.resumed)
            except Exception as error:
                self._failed(error)
            except BaseException:  # Ctrl-C in the middle of it
                self.kept.add(record)
                raise
        self.kept.add(record)

    def catch_up(self, seconds: float, at_once: bool = False) -> None:
        """Deliver what waits, for about so long, unless the store was found away a short while ago."""
        if _now() < self._due and not at_once:
            return
        try:
            self.deliver(seconds)
        except Exception as error:
            return self._failed(error)
        if not self.kept.waiting:
            if self.kept.sent:
                _say(f"tracking: {self.kept.sent} kept records were delivered to {_public(self.uri)}")
            self._away, self._pause = False, _FIRST_PAUSE
            self.kept.close()

    def deliver(self, seconds: float) -> None:
        """As `catch_up`, but an error is the caller's."""
        if self._client is None or self._away:
            _probe(self.uri)
        if self._client is None:
            client = _connect(self.uri)
            self._experiment_id = _experiment_id(client, self.uri, self.experiment, self.about)
            self._client = client
        until = _now() + seconds
        while self.kept.waiting and _now() < until:
            self._send(self.kept.waiting[0], True)
            self.kept.done()

    def close(self) -> None:
        """The last try, and no file stays open. What is logged later opens it again."""
        if self.kept.waiting:
            self.catch_up(_AT_THE_END, at_once=True)
        self.kept.close()

    def finished_children(self, run_id: str | None) -> dict[str, str]:
        if run_id is None or self._client is None:
            return {}
        found, token = {}, None
        try:
            while True:
                page = self._client.search_runs(
                    [self._experiment_id],
                    f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'FINISHED'",
                    page_token=token,
                )
                found |= {run.info.run_name: run.info.run_id for run in page}
                token = page.token
                if not token:
                    return found
        except Exception:  # then more is logged again than need be
            return found

    def reason(self, error: Exception) -> str:
        return f"{type(error).__name__}: {_first_line(error)}".replace(self.uri, _public(self.uri))

    def _failed(self, error: Exception) -> None:
        self._due = _now() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self.kept.mark()
        if not self._away:
            self._away = True
            later = f"python -m papers deliver {shlex.quote(str(self.kept.path))}"
            _say(
                f"tracking: {_public(self.uri)} failed ({self.reason(error)}); the run goes on, its records are kept "
                f"and delivered when it is back, or later by: {later}"
            )

    def _send(self, record: Mapping[str, Any], again: bool) -> None:
        """again: part of it may have arrived before."""
        try:
            if "create" in record:
                self._create(record, again)
            elif record["run"] not in self._complete:
                run_id = self._id(record["run"])
                for kind, send in _SENDERS.items():
                    if kind in record:
                        send(self._client, run_id, record[kind], record["time"])
        except Exception as error:
            if not isinstance(error, _Refused) and getattr(error, "error_code", None) not in _NEVER:
                raise
            place = self.kept.refuse(record)
            if not self._refused:
                self._refused = True
                _say(f"tracking: {_public(self.uri)} refused a record ({self.reason(error)}); such are kept in {place}")

    def _create(self, record: Mapping[str, Any], again: bool) -> None:
        client, key, header = self._client, record["run"], record["create"]
        found = self._find(key) if again else None
        tags, params = header["tags"] | {_KEY: key}, header["params"]
        if found is None:
            if header["parent"]:
                tags = tags | {"mlflow.parentRunId": self._id(header["parent"])}
            run = client.create_run(self._experiment_id, record["time"], tags, record["name"])
            self.ids[key] = run.info.run_id
        else:
            self.ids[key] = found.info.run_id
            if header["parent"] and found.info.status == "FINISHED":
                self._complete.add(key)
                return
            if found.info.status != "RUNNING":
                client.update_run(self.ids[key], status="RUNNING")
            _send_tags(client, self.ids[key], tags, record["time"])
            params = {name: value for name, value in params.items() if name not in found.data.params}
        _send_params(client, self.ids[key], params, record["time"])

    def _id(self, key: str) -> str:
        if key not in self.ids:
            found = self._find(key)
            if found is None:
                raise _Refused(f"no run of the key {key}")
            self.ids[key] = found.info.run_id
        return self.ids[key]

    def _find(self, key: str):
        """The run of a key; None where there is none, or it was deleted."""
        found = self._client.search_runs([self._experiment_id], f"tags.`{_KEY}` = '{key}'", max_results=1)
        return found[0] if found else None


# What MLflow answers where asking again cannot help; all else is taken for a store that is away.
_NEVER = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_CONFLICT"}


def _send_params(client, run_id: str, params: Mapping[str, str], at: int) -> None:
    from mlflow.entities import Param

    for part in _batches([Param(k, v) for k, v in params.items()], _OTHERS_A_BATCH):
        client.log_batch(run_id, params=part)


def _send_tags(client, run_id: str, tags: Mapping[str, str], at: int) -> None:
    from mlflow.entities import RunTag

    for part in _batches([RunTag(k, v) for k, v in tags.items()], _OTHERS_A_BATCH):
        client.log_batch(run_id, tags=part)


def _send_curves(client, run_id: str, curves: Mapping[str, Sequence[Sequence[float]]], at: int) -> None:
    from mlflow.entities import Metric

    points = [Metric(name, value, at, step) for name, curve in curves.items() for step, value in curve]
    for part in _batches(points, _METRICS_A_BATCH):
        client.log_batch(run_id, metrics=part)


def _send_data(client, run_id: str, data: Sequence[str], at: int) -> None:
    from mlflow.entities import Dataset, DatasetInput

    name, digest = data
    client.log_inputs(run_id, [DatasetInput(Dataset(name, digest, "local", "{}"))])


def _send_artifact(client, run_id: str, artifact: Sequence[str | None], at: int) -> None:
    path, folder = artifact
    if not os.path.exists(path):
        raise _Refused(f"{path} is gone")
    (client.log_artifacts if os.path.isdir(path) else client.log_artifact)(run_id, path, folder)


def _send_text(client, run_id: str, text: Sequence[str], at: int) -> None:
    client.log_text(run_id, *text)


def _send_status(client, run_id: str, status: str, at: int) -> None:
    client.set_terminated(run_id, status, at)


_SENDERS: dict[str, Callable[[Any, str, Any, int], None]] = {
    "params": _send_params,
    "tags": _send_tags,
    "curves": _send_curves,
    "data": _send_data,
    "artifact": _send_artifact,
    "text": _send_text,
    "status": _send_status,
}


def _kept_for(folder: Path, key: str, belong: Mapping[str, str]) -> Kept:
    """The file is the key's: what an interrupted run could not deliver waits there for the run that goes on."""
    try:
        return Kept(folder / f"tracking-{key}.jsonl", belong)
    except OSError:  # somebody delivers it just now, or it cannot be read
        return Kept(folder / f"tracking-{key}-{os.getpid()}.jsonl", belong)


def _connect(uri: str):
    # Read by mlflow at import or at a call, so set before either; what the user chose stays.
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines a run, through our progress bar
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default waits for minutes on a server that is away
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # "Creating initial MLflow database tables..."
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # its retries, besides our one line
    return MlflowClient(tracking_uri=uri)


def _experiment_id(client, uri: str, name: str, about: str) -> str:
    known = client.get_experiment_by_name(name)
    if known is None:
        # MLflow's default is ./mlruns of whatever the working directory is; a server has its own place
        database = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
        place = (database.resolve().parent / "mlartifacts").as_uri() if database else None
        known = client.get_experiment(client.create_experiment(name, artifact_location=place))
    if known.lifecycle_stage == "deleted":
        client.restore_experiment(known.experiment_id)
    if about and known.tags.get("mlflow.note.content") != about:
        client.set_experiment_tag(known.experiment_id, "mlflow.note.content", about)
    return known.experiment_id


def _probe(uri: str) -> None:
    """Raises within two seconds where a server is away; MLflow's own client would ask again and wait much longer."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(_public(uri).rstrip("/") + "/health", timeout=_PROBE).close()
    except urllib.error.HTTPError as error:  # whoever says "not here" or "not you" is there
        if error.code >= 500:
            raise


def _public(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)  # it may carry a password


def _key(name: str) -> str:
    """`task/metric@protocol` as MLflow allows it: letters, digits and _ - . space : /, so `@` becomes `:`."""
    return re.sub(r"[^\w\-. :/]", "-", name.replace("@", ":"))


def _texts(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    texts = {_key(str(key)): str(value) for key, value in values.items()}
    return {key: text if len(text) <= limit else text[: limit - 1] + "…" for key, text in texts.items()}


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no message"

"""MLflow tracking: one parent run a reproduction, a child per arm and seed; sqlite unless MLFLOW_TRACKING_URI is set.
Tracking never costs a run: when it fails there is one warning, and all that follows goes to a JSONL file beside it.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# MLflow's own limits (mlflow.utils.validation)
_PARAM, _TAG, _METRICS_A_BATCH, _OTHERS_A_BATCH = 6000, 8000, 1000, 100


class Run:
    """One MLflow run, parent or child. As a context manager it ends as FINISHED, FAILED or KILLED."""

    def __init__(
        self, store: _Store, name: str, tags: Mapping[str, Any], params: Mapping[str, Any], parent: Run | None
    ) -> None:
        self.name, self.parent, self.run_id = name, parent, None
        self._store, self._kept = store, False
        self._header = {"tags": _texts(tags, _TAG), "params": _texts(params, _PARAM)}
        nesting = {"mlflow.parentRunId": parent.run_id} if parent is not None and parent.run_id else {}

        def create(client) -> None:
            run = client.create_run(store.experiment_id, tags=self._header["tags"] | nesting, run_name=name)
            self.run_id = run.info.run_id

        if store.do(create):
            self.log_params(params)
        else:
            self._keep_header()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Values longer than MLflow's 6000 characters are cut, with an ellipsis to show it."""
        texts = _texts(params, _PARAM)

        def log(client) -> None:
            from mlflow.entities import Param

            for part in _batches([Param(k, v) for k, v in texts.items()], _OTHERS_A_BATCH):
                client.log_batch(self.run_id, params=part)

        self._log(log, "params", texts)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        texts = _texts(tags, _TAG)

        def log(client) -> None:
            from mlflow.entities import RunTag

            for part in _batches([RunTag(k, v) for k, v in texts.items()], _OTHERS_A_BATCH):
                client.log_batch(self.run_id, tags=part)

        self._log(log, "tags", texts)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        self.log_curves({name: [(step, value)] for name, value in metrics.items()})

    def log_curves(self, curves: Mapping[str, Iterable[tuple[int, float]]]) -> None:
        """Whole curves, {name: [(step, value), ...]}, in batches of 1000 points instead of one call a point."""
        now = int(time.time() * 1000)
        points = [(name, int(step), float(value)) for name, curve in curves.items() for step, value in curve]

        def log(client) -> None:
            from mlflow.entities import Metric

            entries = [Metric(_key(name), value, now, step) for name, step, value in points]
            for part in _batches(entries, _METRICS_A_BATCH):
                client.log_batch(self.run_id, metrics=part)

        grouped: dict[str, list] = {}
        for name, step, value in points:
            grouped.setdefault(name, []).append([step, value])
        self._log(log, "curves", grouped)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file or a folder, copied to the artifact store."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"artifact {path} does not exist")
        upload = "log_artifacts" if path.is_dir() else "log_artifact"
        self._log(lambda client: getattr(client, upload)(self.run_id, str(path), folder), "artifact", str(path))

    def log_text(self, text: str, name: str) -> None:
        self._log(lambda client: client.log_text(self.run_id, text, name), "text", {name: text})

    def finish(self, status: str = "FINISHED") -> None:
        self._log(lambda client: client.set_terminated(self.run_id, status), "status", status)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.finish("FINISHED" if kind is None else "KILLED" if interrupted else "FAILED")

    def _log(self, call: Callable[[Any], None], kind: str, payload: Any) -> None:
        if payload and not self._store.do(call):
            self._keep_header()
            self._store.keep({"run": self.name, kind: payload})

    def _keep_header(self) -> None:
        """Once, so that the local file can be read without the server."""
        if not self._kept:
            self._kept = True
            parent = self.parent.name if self.parent is not None else None
            self._store.keep({"run": self.name, "parent": parent, "run_id": self.run_id, **self._header})


class Tracker(Run):
    """The parent run of one reproduction.

        with Tracker(experiment="clip", name="mini", folder=out, data_digest=world.digest) as tracker:
            with tracker.child("baseline, seed 0", tags={"arm": "baseline"}, params={"seed": 0}) as run:
                run.log_curves({"train/loss": [(0, 3.1), (1, 2.9)]})

    uri: an MLflow tracking URI; else MLFLOW_TRACKING_URI; else `sqlite:///<folder>/mlflow.db`.
    folder: where that database, its artifacts and the local file of a failed tracking go (default: the working
    directory).
    root: the source checkout whose commit and dirty flag are recorded (default: the one this file lies in).
    """

    def __init__(
        self,
        uri: str | None = None,
        *,
        experiment: str,
        name: str = "reproduction",
        folder: str | Path | None = None,
        root: str | Path | None = None,
        data_digest: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        folder = Path(folder or Path.cwd()).resolve()
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        commit, dirty = commit_and_dirty(Path(root) if root else Path(__file__).resolve().parents[1])
        machine = machine_description()
        described = {
            "commit": commit or "unknown",
            "dirty": "unknown" if dirty is None else str(dirty).lower(),
            "data_digest": data_digest or "none",
            **{f"machine.{key}": value for key, value in machine.items()},
        }
        self.uri = uri
        super().__init__(_Store(uri, experiment, folder), name, described | dict(tags or {}), params or {}, None)
        self.log_text(environment_text(), "environment.txt")

    def child(self, name: str, tags: Mapping[str, Any] | None = None, params: Mapping[str, Any] | None = None) -> Run:
        """A run nested under this one: an arm with a seed. Use it as a context manager, or call `finish`."""
        return Run(self._store, name, tags or {}, params or {}, self)

    @property
    def working(self) -> bool:
        """False once tracking has failed and records go to `local_file`."""
        return self._store.client is not None

    @property
    def local_file(self) -> Path:
        return self._store.path


class _Store:
    """The connection, its experiment, and the way out when either fails."""

    def __init__(self, uri: str, experiment: str, folder: Path) -> None:
        self.uri, self.client, self.experiment_id = uri, None, None
        # the process id keeps two runs of one second apart
        self.path = folder / f"tracking-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.client = _connect(uri)
            self.experiment_id = _experiment_id(self.client, uri, experiment)
        except Exception as error:
            self._give_up(error)

    def do(self, call: Callable[[Any], None]) -> bool:
        if self.client is None:
            return False
        try:
            call(self.client)
        except Exception as error:  # whatever it is, it must not end a training run
            self._give_up(error)
            return False
        return True

    def keep(self, record: Mapping[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            _warn(f"tracking: {self.path} cannot be written either ({_first_line(error)}); nothing is kept")
            self.path = Path(os.devnull)

    def _give_up(self, error: Exception) -> None:
        self.client = None
        where = re.sub(r"//[^/@]*@", "//", self.uri)  # a URI may carry a password
        reason = f"{type(error).__name__}: {_first_line(error)}".replace(self.uri, where)
        _warn(f"tracking: {where} failed ({reason}); the run goes on, its curves are kept in {self.path}")


def commit_and_dirty(root: str | Path) -> tuple[str | None, bool | None]:
    """(commit, True if anything but results/ differs from it) of the checkout at `root`; (None, None) without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        # results/ is what runs write, and no input of any
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ".", ":(exclude)results"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def machine_description() -> dict[str, Any]:
    """cpu, cores, memory_gib, gpus, system, python, torch: what a reader needs to judge a duration. No host name."""
    import torch

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gib": _memory_gib(),
        "gpus": [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def environment_text() -> str:
    """Interpreter, platform and every installed distribution, one `name==version` a line."""
    names = {(d.metadata["Name"] or "?", d.version) for d in metadata.distributions()}
    lines = sorted({f"{name}=={version}" for name, version in names}, key=str.lower)
    return "\n".join([f"# python {platform.python_version()} on {platform.platform()}", *lines]) + "\n"


def _connect(uri: str):
    # Read by mlflow at import or at a call, so set before either; what the user chose stays.
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default waits for minutes on a server that is away
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # "Creating initial MLflow database tables..."
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # its retries, besides our one line
    return MlflowClient(tracking_uri=uri)


def _experiment_id(client, uri: str, name: str) -> str:
    known = client.get_experiment_by_name(name)
    if known is None:
        # MLflow's default is ./mlruns of whatever the working directory is; a server has its own place
        database = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
        place = (database.resolve().parent / "mlartifacts").as_uri() if database else None
        return client.create_experiment(name, artifact_location=place)
    if known.lifecycle_stage == "deleted":
        client.restore_experiment(known.experiment_id)
    return known.experiment_id


def _key(name: str) -> str:
    """`task/metric@protocol` as MLflow allows it: letters, digits and _ - . space : /, so `@` becomes `:`."""
    return re.sub(r"[^\w\-. :/]", "-", name.replace("@", ":"))


def _texts(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    texts = {_key(str(key)): str(value) for key, value in values.items()}
    return {key: text if len(text) <= limit else text[: limit - 1] + "…" for key, text in texts.items()}


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no message"


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None

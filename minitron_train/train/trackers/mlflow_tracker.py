"""MLflow: a thread copies metrics.jsonl to a tracking server or a database, so that training never waits for either."""

import importlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

from minitron_train.config import MlflowConfig, TrackingConfig
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import first_line
from minitron_train.train.settings import flat
from minitron_train.train.trackers.tracker import Tracker, Training, numbers

ENVIRONMENT = {  # defaults; the user's own values win
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the report has it
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the thread tries again
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
}
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # schemes of MLflow's database stores
FORBIDDEN = re.compile(r"[^\w\-. :/]", re.ASCII)  # characters that MLflow's names may not have
MAX_METRICS, MAX_PARAMETERS = 1000, 100  # of one request
RETRY_S = 60.0  # between attempts while the server does not answer
CLOSE_S = 10.0  # a scheduler that stops a job grants half a minute


def mlflow() -> Any:
    """The package, which is optional, with defaults for what it reads from the environment."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return importlib.import_module("mlflow")


def store_of(settings: MlflowConfig, folder: Path) -> str:
    """The address of the server or database: as configured, else from the environment, else SQLite in `folder`."""
    return settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"


class MlflowTracker(Tracker):
    """One MLflow run. Steps that it already has are not logged again."""

    label = "MLflow"

    def __init__(self, settings: TrackingConfig, training: Training) -> None:
        self.mlflow = mlflow()
        store = store_of(settings.mlflow, training.folder)
        self.client = self.mlflow.MlflowClient(tracking_uri=store)
        run = self._known(training.run_id) or self._created(settings.mlflow, training)
        self.run_id = run.info.run_id
        self.place = page(store, run.info.experiment_id, run.info.run_id)
        self.copier = Copier(self.client, run.info.run_id, training.metrics_file, int(run.data.metrics.get("step", -1)))
        self.copier.start()

    @classmethod
    def packages(cls, settings: TrackingConfig) -> Mapping[str, str]:
        scheme = re.split("[+:]", store_of(settings.mlflow, Path()))[0]  # sqlite, also of sqlite+pysqlite://
        database = {"sqlalchemy": "sqlalchemy", "alembic": "alembic"} if scheme in DATABASES else {}
        return {"mlflow": "mlflow-skinny", **database}

    def write(self, row: Mapping[str, Any]) -> None:
        self.copier.wake.set()

    def record(self, kind: str, folder: Path, *, consumed: bool, facts: Mapping[str, Any] | None = None) -> None:
        self.copier.tags[f"{'input' if consumed else 'output'}.{kind}"] = folder.resolve().as_uri()
        self.copier.wake.set()

    def close(self, *, failed: bool) -> None:
        self.copier.finish("FAILED" if failed else "FINISHED")

    def _known(self, run_id: str | None) -> Any:
        """The run of the last start, running again; None without one, or if it was deleted."""
        if run_id is None:
            return None
        try:
            run = self.client.get_run(run_id)
        except self.mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if run.info.lifecycle_stage == "deleted":
            return None
        self.client.update_run(run_id, status="RUNNING")
        return run

    def _created(self, settings: MlflowConfig, training: Training) -> Any:
        """A new run, with the configuration as its parameters."""
        name = settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "minitron_train"
        experiment = self.client.get_experiment_by_name(name)
        identity = experiment.experiment_id if experiment else self.client.create_experiment(name)
        run = self.client.create_run(identity, run_name=settings.name or training.name)
        values = flat(training.config).items()
        parameters = [self.mlflow.entities.Param(FORBIDDEN.sub("_", key), as_text(value)) for key, value in values]
        for start in range(0, len(parameters), MAX_PARAMETERS):
            self.client.log_batch(run.info.run_id, params=parameters[start : start + MAX_PARAMETERS])
        return run


class Copier(threading.Thread):
    """Sends the lines of metrics.jsonl after step `sent`. While the server does not answer, it waits and tries again.

    A line stays in the file until the server has it, so neither an outage nor a kill loses one.
    """

    def __init__(self, client: Any, run_id: str, metrics_file: Path, sent: int) -> None:
        super().__init__(name="mlflow", daemon=True)  # a hanging server must not keep the process alive
        self.client, self.run_id, self.metrics_file, self.sent = client, run_id, metrics_file, sent
        self.tags: dict[str, str] = {}  # to be set
        self.wake, self.closing = threading.Event(), threading.Event()
        self.status: str | None = None  # with which the run ends
        self.failure: str | None = None  # of the last attempt

    def run(self) -> None:
        with self.metrics_file.open("rb") as lines:
            is_last = False
            while not is_last:
                if self.failure is None:
                    self.wake.wait()
                else:
                    self.closing.wait(RETRY_S)
                self.wake.clear()
                is_last = self.closing.is_set()
                self.attempt(lines)

    def attempt(self, lines: BinaryIO) -> None:
        """Send what is new, and end the run if it is over. A failure is reported once until the server answers again."""
        start, status = lines.tell(), self.status
        try:
            self.send(lines)
            while self.tags:
                name = next(iter(self.tags))
                self.client.set_tag(self.run_id, name, self.tags[name])
                del self.tags[name]
            if status is not None:
                self.client.set_terminated(self.run_id, status)
        except Exception as error:  # of any kind: the database's, the network's
            lines.seek(start)
            if self.failure is None and status is None:
                say(
                    f"MLflow does not answer ({first_line(error)}); training continues, and sends all metrics when it does"
                )
            self.failure = first_line(error)
        else:
            if self.failure is not None:
                say("MLflow answers again and has all metrics")
            self.failure = None

    def send(self, lines: BinaryIO) -> None:
        """Send the complete lines from the file's position on."""
        metric = mlflow().entities.Metric
        batch: list[Any] = []
        for row in new_rows(lines):
            if row["step"] <= self.sent:
                continue
            now_ms, step = int(time.time() * 1000), row["step"]
            values = {**numbers(row), "step": step}  # the last one: where it is, the line is
            if len(batch) + len(values) > MAX_METRICS:
                self.log(batch)
                batch = []
            batch += [metric(FORBIDDEN.sub("_", key), value, now_ms, step) for key, value in values.items()]
        self.log(batch)

    def log(self, batch: list[Any]) -> None:
        """Send the metrics of whole lines."""
        for start in range(0, len(batch), MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=batch[start : start + MAX_METRICS])
        if batch:
            self.sent = batch[-1].step

    def finish(self, status: str) -> None:
        """Send what is left and end the run.

        Raises:
            RuntimeError: the server does not answer within CLOSE_S.
        """
        self.status = status
        self.closing.set()
        self.wake.set()
        self.join(CLOSE_S)
        if self.is_alive() or self.failure is not None:
            raise RuntimeError(f"it has the metrics up to step {self.sent}; {self.failure or 'no answer'}")


def new_rows(lines: BinaryIO) -> Iterator[dict[str, Any]]:
    """The complete lines of metrics.jsonl from the file's position on; a line that is being written stays unread."""
    while (line := lines.readline()).endswith(b"\n"):
        yield json.loads(line)
    lines.seek(-len(line), os.SEEK_CUR)


def as_text(value: Any) -> str:
    """A parameter's value: text as it is, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def page(store: str, experiment_id: str, run_id: str) -> str:
    """Where a person finds a run: its page on a server, without credentials, or the address of the store."""
    parts = urlsplit(store)
    if parts.scheme not in ("http", "https"):
        return store
    address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
    return f"{address}/#/experiments/{experiment_id}/runs/{run_id}"

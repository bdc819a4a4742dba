"""Trackers: W&B, TensorBoard and MLflow on local files, read back with their own readers."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import wandb
from mlflow.entities import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minitron_train.config import Config, MlflowConfig, TrackerKind, TrackingConfig, WandbConfig, WandbMode
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.masking import mask_credentials
from minitron_train.train import tracking
from minitron_train.train.metrics import MetricsFile
from minitron_train.train.trackers import mlflow_tracker
from minitron_train.train.trackers.mlflow_tracker import MlflowTracker, page
from minitron_train.train.trackers.tensorboard_tracker import TensorBoardTracker
from minitron_train.train.trackers.tracker import Training
from minitron_train.train.trackers.wandb_tracker import Place, WandbTracker, run_place, wandb_mode
from minitron_train.train.tracking import TrackedRun, Trackers, check_packages, read_runs
from tests.support.training import (
    NUM_STEPS,
    ROWS,
    SEQ_LENGTH,
    Interrupted,
    Material,
    before_step,
    interrupt,
    rows,
    run,
)

PLACES = ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME", "WANDB_DIR")
OFFLINE = TrackingConfig(wandb=WandbConfig(mode=WandbMode.offline))
CONFIG = {"seed": 1, "train": {"lr": 0.5, "hooks": []}, "members": {"a@b": {"note": None}}}


def begun(folder: Path, **changes: Any) -> Training:
    """A training that begins in `folder`, or as `changes` say."""
    return Training(**{"folder": folder, "name": "a", "step": 0, "run_id": None, "config": CONFIG, **changes})


@pytest.fixture(scope="module")
def three(training: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that was interrupted in step 6, after the checkpoint of step 3, and resumed, with all trackers."""
    folder = tmp_path_factory.mktemp("three")
    settings = {"tracking__trackers": list(TrackerKind), "tracking__wandb": OFFLINE.wandb}
    with pytest.raises(Interrupted), before_step(6, interrupt):
        run(training, folder, **settings)
    began = read_runs(folder)
    run(training, folder, **settings)
    ended = read_runs(folder)
    assert {kind: run["run_id"] for kind, run in began.items()} == {kind: run["run_id"] for kind, run in ended.items()}
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of metrics.jsonl."""
    return [(row["step"], pytest.approx(row["loss"])) for row in rows(folder)]


def test_each_step_is_in_tensorboard_once(three: Path) -> None:
    events = EventAccumulator(str(three / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == losses(three)
    assert [event.step for event in events.Scalars("eval.validation.kl")] == [NUM_STEPS]
    texts = {tag: events.Tensors(f"{tag}/text_summary")[-1] for tag in ("config", "input/teacher", "output/student")}
    config = texts["config"].tensor_proto.string_val[0].decode()
    assert json.loads(config)["train"]["seq_length"] == SEQ_LENGTH
    assert texts["config"].step == 4, "the resumed run's"
    assert json.loads(texts["output/student"].tensor_proto.string_val[0])["facts"]["steps"] == NUM_STEPS


def mlflow_run(folder: Path) -> tuple[mlflow.MlflowClient, Run]:
    """The run in the database of a training's folder."""
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    run_id = read_runs(folder)["mlflow"]["run_id"]
    assert run_id is not None
    return client, client.get_run(run_id)


def test_each_step_is_in_mlflow_once(three: Path) -> None:
    client, found = mlflow_run(three)
    assert len(client.search_runs([found.info.experiment_id])) == 1
    assert found.info.status == "FINISHED" and found.info.run_name == "test"
    history = sorted(client.get_metric_history(found.info.run_id, "loss"), key=lambda metric: metric.step)
    assert [(metric.step, metric.value) for metric in history] == losses(three)
    assert found.data.params["train.seq_length"] == str(SEQ_LENGTH)
    assert found.data.params["train.global_batch_size"] == str(ROWS)
    assert found.data.tags["output.student"] == (three / "checkpoints").as_uri()
    assert set(found.data.tags) >= {"input.teacher", "input.pruned"}


def test_all_trackers_have_the_metrics_of_the_file(three: Path) -> None:
    names = {name for row in rows(three) for name, value in row.items() if value is not None}
    events = EventAccumulator(str(three / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) >= names - {"step"}
    assert set(mlflow_run(three)[1].data.metrics) >= names
    assert len(list((three / "wandb").glob(f"offline-run-*-{read_runs(three)['wandb']['run_id']}"))) >= 1


def test_tensorboard_added_later_has_the_earlier_steps(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": step / 2, "ce_loss": None})
    file = MetricsFile(tmp_path / "metrics.jsonl", 2)
    tracker = TensorBoardTracker(TrackingConfig(), begun(tmp_path, step=2))
    tracker.write({"step": 3, "loss": float("nan"), "note": "text"})
    tracker.close(failed=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert events.Tags()["scalars"] == ["loss"]


class Server:
    """A small MLflow server: what it was sent, and whether it answers."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, int]] = []
        self.params: dict[str, str] = {}
        self.status: str | None = None
        self.is_down = False
        self.refused = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                found = outer.answer(self.path, json.loads(body or "{}"))
                text = json.dumps(found or {}).encode()
                self.send_response(503 if found is None else 200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PATCH = answer

            def log_message(self, *_: object) -> None: ...

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.uri = f"http://me:pass-word@127.0.0.1:{self.http.server_port}"

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to one request; None for an error of the server."""
        if self.is_down:
            self.refused.set()
            return None
        self.metrics += [(metric["key"], int(metric["step"])) for metric in body.get("metrics", [])]
        self.params |= {param["key"]: param["value"] for param in body.get("params", [])}
        info = {"run_id": "r1", "experiment_id": "7", "status": "RUNNING", "lifecycle_stage": "active"}
        if path.endswith("runs/update"):
            self.status = body["status"]
            return {"run_info": info}
        steps = [step for name, step in self.metrics if name == "step"]
        latest = [{"key": "step", "value": max(steps), "step": max(steps), "timestamp": 1}] if steps else []
        experiment = {"experiment_id": "7", "name": "minitron_train", "lifecycle_stage": "active"}
        return {"run": {"info": info, "data": {"metrics": latest}}, "experiment": experiment}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An MLflow server on this machine, and fast retries."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(mlflow_tracker, "RETRY_S", 0.05)
    made = Server()
    yield made
    made.http.shutdown()


def test_an_outage_of_mlflow_loses_no_step(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    tracker = MlflowTracker(TrackingConfig(mlflow=MlflowConfig(uri=server.uri)), begun(tmp_path))
    for step in range(1, 7):
        server.is_down = 2 < step < 6
        file.write({"step": step, "loss": 1.0, "eval.code.pass@1": 0.5, "ce_loss": None})
        tracker.write({"step": step})
        if step == 3:
            assert server.refused.wait(20)
    tracker.close(failed=False)
    assert server.status == "FINISHED"
    assert [step for name, step in server.metrics if name == "loss"] == [1, 2, 3, 4, 5, 6]
    assert {name for name, _ in server.metrics} == {"loss", "eval.code.pass_1", "step"}
    assert server.params == {"seed": "1", "train.lr": "0.5", "train.hooks": "[]", "members.a_b.note": "null"}
    said = capsys.readouterr().out
    assert said.count("MLflow does not answer") == 1 and said.count("answers again") == 1
    assert "pass-word" not in mask_credentials(said)
    assert tracker.place == f"{server.uri.replace('me:pass-word@', '')}/#/experiments/7/runs/r1"


def test_a_restart_sends_what_an_earlier_outage_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlflow_tracker, "CLOSE_S", 5.0)
    settings = TrackingConfig(trackers=[TrackerKind.mlflow], mlflow=MlflowConfig(uri=server.uri))
    for first, is_down in ((1, True), (3, False)):
        server.is_down = False
        file = MetricsFile(tmp_path / "metrics.jsonl", first - 1)
        opened = Trackers.open(settings, begun(tmp_path, step=first - 1))
        server.is_down = is_down
        for step in (first, first + 1):
            for sink in (file, opened):
                sink.write({"step": step, "loss": 1.0})
        opened.close(failed=is_down)
        assert ("MLflow failed" in capsys.readouterr().out) is is_down
    assert [step for name, step in server.metrics if name == "loss"] == [1, 2, 3, 4]
    assert read_runs(tmp_path)["mlflow"]["run_id"] == "r1"


def test_a_server_that_is_not_there_costs_its_tracker_alone(
    training: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = {
        "tracking__trackers": [TrackerKind.mlflow, TrackerKind.tensorboard],
        "tracking__mlflow": MlflowConfig(uri="http://me:pass-word@127.0.0.1:9"),
    }
    run(training, tmp_path, train__num_tokens=2 * ROWS * SEQ_LENGTH, **settings)
    said = capsys.readouterr().out
    assert "MLflow could not start" in said and "Connection refused" in said
    assert list(read_runs(tmp_path)) == ["tensorboard"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert "pass-word" not in "".join(mask_credentials(said) + (tmp_path / "trackers.json").read_text())


def test_only_the_configuration_with_masked_credentials_is_sent(training: Material, tmp_path: Path) -> None:
    secret = f"sqlite:///{tmp_path}/mlflow.db?token=abcdefgh1234"
    settings = {
        "tracking__trackers": list(TrackerKind)[1:],
        "tracking__mlflow": MlflowConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
        "tracking__wandb": WandbConfig(mode=WandbMode.disabled, project=secret),
    }
    run(training, tmp_path, train__num_tokens=2 * ROWS * SEQ_LENGTH, **settings)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("mlflow.db" in path.name for path in files) and any("events" in path.name for path in files)
    assert not [path for path in files if b"abcdefgh1234" in path.read_bytes()]
    assert mlflow_run(tmp_path)[1].data.params["tracking.wandb.project"].endswith("token=***")


def test_a_missing_package_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = TrackingConfig(trackers=list(TrackerKind))
    check_packages(settings)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    check_packages(TrackingConfig())
    with pytest.raises(UserError, match=r"tensorboard needs tensorboard, .*; run pip install tensorboard, or leave"):
        check_packages(settings)
    settings.trackers = [TrackerKind.mlflow]
    with pytest.raises(UserError, match=r"run pip install mlflow-skinny sqlalchemy alembic, or leave mlflow out"):
        check_packages(settings)
    settings.mlflow.uri = "https://host"
    with pytest.raises(UserError, match=r"mlflow needs mlflow, not .*; run pip install mlflow-skinny, or"):
        check_packages(settings)


def test_settings_are_checked_before_anything_starts() -> None:
    config = Config(name="test")
    config.tracking.trackers = [TrackerKind.mlflow, TrackerKind.mlflow]
    with pytest.raises(UserError, match=r"tracking.trackers=\['mlflow', 'mlflow'\]: names a tracker twice"):
        config.validate()


def test_the_early_check_loads_neither_torch_nor_a_tracker() -> None:
    code = (
        "import sys; from minitron_train.config import *; from minitron_train.train.tracking import check_packages; "
        "check_packages(TrackingConfig(trackers=list(TrackerKind))); "
        "print([name for name in ('torch', 'mlflow', 'wandb', 'tensorboard') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("text", ["{", '{"wandb": 3}', "[]"])
def test_a_damaged_record_of_runs_is_kept_aside(tmp_path: Path, text: str) -> None:
    (tmp_path / "trackers.json").write_text(text)
    (tmp_path / "metrics.jsonl").touch()
    opened = Trackers.open(TrackingConfig(trackers=[TrackerKind.tensorboard]), begun(tmp_path))
    opened.close()
    assert (tmp_path / "trackers.json.damaged-1").read_text() == text
    assert list(read_runs(tmp_path)) == ["tensorboard"]


def test_the_page_of_a_run() -> None:
    assert page("https://me:word@host/base/?a=b", "7", "r") == "https://host/base/#/experiments/7/runs/r"
    assert page("sqlite:////data/mlflow.db", "7", "r") == "sqlite:////data/mlflow.db"


def test_wandb_continues_its_run(training: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert wandb_mode(WandbMode.auto) == "offline"
    first = Trackers.open(TrackingConfig(), begun(tmp_path))
    run_id = read_runs(tmp_path)["wandb"]["run_id"]
    first.write({"step": 1, "loss": 2.0, "ce_loss": None})
    first.record({"teacher": training.teacher}, consumed=True)
    first.close()
    Trackers.open(TrackingConfig(), begun(tmp_path)).close()
    assert read_runs(tmp_path)["wandb"]["run_id"] == run_id
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))) >= 1

    def refuse(**_: object) -> None:
        raise ConnectionError("no network")

    with monkeypatch.context() as patch:  # a restart without network continues, and keeps the run for the next one
        patch.setattr("wandb.init", refuse)
        without = Trackers.open(TrackingConfig(), begun(tmp_path))
        without.write({"step": 2, "loss": 1.0})
        without.close()
        assert read_runs(tmp_path)["wandb"]["run_id"] == run_id
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert wandb_mode(WandbMode.auto) == "online"
    assert json.dumps("secret") not in "".join(p.read_text(errors="ignore") for p in tmp_path.rglob("*.yaml"))


def test_a_checkpoint_from_before_names_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begins: list[str | None] = []

    class Noted(WandbTracker):
        def __init__(self, settings: TrackingConfig, training: Training) -> None:
            begins.append(training.run_id)
            self.run_id = training.run_id or "new"

    monkeypatch.setitem(tracking.TRACKERS, TrackerKind.wandb, Noted)
    Trackers.open(OFFLINE, begun(tmp_path), former_wandb_id="old")
    assert read_runs(tmp_path) == {"wandb": TrackedRun(run_id="old", place=None)}
    Trackers.open(OFFLINE, begun(tmp_path), former_wandb_id="other")
    assert begins == ["old", "old"]


@pytest.mark.parametrize(
    ("environ", "setting", "mode"),
    [
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, WandbMode.auto, "offline"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, WandbMode.auto, "disabled"),
        ({"WANDB_MODE": "dryrun"}, WandbMode.auto, "offline"),
        ({"WANDB_MODE": "online"}, WandbMode.auto, "online"),
        ({"WANDB_MODE": "nonsense", "WANDB_API_KEY": "k"}, WandbMode.auto, "offline"),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, WandbMode.auto, "disabled"),
        ({"WANDB_DISABLED": "false", "WANDB_API_KEY": "k"}, WandbMode.auto, "online"),
        ({"WANDB_MODE": "disabled", "WANDB_DISABLED": "1"}, WandbMode.offline, "offline"),
    ],
)
def test_wandb_follows_the_environment(
    environ: dict[str, str], setting: WandbMode, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An explicit setting wins over the environment, which wins over auto; the same for project, entity and name."""
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY", *PLACES):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(setting) == mode
    settings = TrackingConfig(wandb=WandbConfig(mode=setting))
    assert tracking.configured(settings) == ([] if mode == "disabled" else [TrackerKind.wandb])
    assert run_place(WandbConfig(), tmp_path, "tiny") == Place("minitron_train", None, "tiny", tmp_path)
    for name in PLACES:
        monkeypatch.setenv(name, name)
    assert run_place(WandbConfig(), tmp_path, "tiny") == Place(*PLACES[:3], Path("WANDB_DIR"))
    given = WandbConfig(project="p", entity="e", name="n")
    assert run_place(given, tmp_path, "tiny") == Place("p", "e", "n", Path("WANDB_DIR"))


def test_wandb_artifacts(training: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names follow from any name of the run; a training's says what it began with and what came of it."""
    made: list[wandb.Artifact] = []

    class Noted(wandb.Artifact):
        def __init__(self, *words: Any, **more: Any) -> None:
            super().__init__(*words, **more)
            made.append(self)

    monkeypatch.setattr(wandb, "Artifact", Noted)
    began = {"inputs": {"student": "1f"}, "settings": {"seed": 1}, "command": "minitron distill"}
    (tmp_path / "started.json").write_text(json.dumps(began))
    settings = WandbConfig(mode=WandbMode.offline, name="Größe 4B, run 2/#")
    facts = run(training, tmp_path, train__num_tokens=2 * ROWS * SEQ_LENGTH, tracking__wandb=settings)
    assert [artifact.name for artifact in made] == [
        f"Gr--e-4B--run-2---{kind}" for kind in ("teacher", "pruned", "student")
    ]
    assert made[0].metadata == {}, "neither has a provenance"
    assert made[2].metadata == {**began, "facts": facts}
    references = [entry.ref or "" for entry in made[2].manifest.entries.values()]
    assert references and all(each.startswith(f"{tmp_path.resolve().as_uri()}/checkpoints/") for each in references)


def test_what_wandb_refuses_ends_wandb_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("not like this")

    record = {"stage": "prune", "command": "prune", "inputs": {}, "settings": {}, "facts": {"kept": 3}}
    (tmp_path / "provenance.json").write_text(
        json.dumps(record | {"config": {}, "wall_seconds": 1.0, "python": "3.11"})
    )
    both = replace(OFFLINE, trackers=[TrackerKind.wandb, TrackerKind.tensorboard])
    (tmp_path / "metrics.jsonl").touch()
    opened = Trackers.open(both, begun(tmp_path, name="a" * 200))
    guarded = opened.guarded[0]
    assert isinstance(guarded.tracker, WandbTracker)
    logged: list[wandb.Artifact] = []
    monkeypatch.setattr(guarded.tracker.run, "log_artifact", logged.append)
    opened.record({"pruned": tmp_path}, consumed=True)
    (artifact,) = logged
    assert artifact.metadata == record and artifact.name is not None and len(artifact.name) == 128
    monkeypatch.setattr(wandb, "Artifact", refuse)
    opened.record({"pruned": tmp_path}, consumed=True)
    assert guarded.tracker is None
    opened.write({"step": 1, "loss": 1.0})
    opened.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1]

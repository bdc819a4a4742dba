"""Section tracking: where metrics go besides metrics.jsonl."""

from dataclasses import dataclass
from enum import StrEnum

from minitron_train.config.base import opt, require


class TrackerKind(StrEnum):
    """A program that shows the metrics of runs."""

    wandb = "wandb"
    tensorboard = "tensorboard"
    mlflow = "mlflow"


class WandbMode(StrEnum):
    """auto follows WANDB_MODE; without it, online with WANDB_API_KEY in the environment, else offline. No prompt."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases."""

    mode: WandbMode = opt(
        WandbMode.auto,
        "online, offline, disabled, or auto: WANDB_MODE, else online if WANDB_API_KEY is set, else offline",
    )
    project: str | None = opt(None, "W&B project; default: WANDB_PROJECT, else minitron_train")
    entity: str | None = opt(None, "W&B user or team; default: WANDB_ENTITY, else your own")
    name: str | None = opt(None, "run name; default: WANDB_NAME, else the recipe's")


@dataclass(kw_only=True, slots=True)
class MlflowConfig:
    """MLflow."""

    uri: str | None = opt(
        None, "tracking server or database, like http://host:5000; default: MLFLOW_TRACKING_URI, else train/mlflow.db"
    )
    experiment: str | None = opt(None, "MLflow experiment; default: MLFLOW_EXPERIMENT_NAME, else minitron_train")
    name: str | None = opt(None, "run name; default: the recipe's")


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    trackers: list[TrackerKind] = opt(
        lambda: [TrackerKind.wandb],
        "any of wandb, tensorboard (event files in train/tensorboard) and mlflow; the last two need pip install",
    )
    wandb: WandbConfig = opt(WandbConfig, "Weights & Biases")
    mlflow: MlflowConfig = opt(MlflowConfig, "MLflow")

    def validate(self) -> None:
        """Refuse a tracker that is named twice."""
        require(
            len(set(self.trackers)) == len(self.trackers),
            "tracking.trackers",
            [kind.value for kind in self.trackers],
            "names a tracker twice",
            "name each once",
        )

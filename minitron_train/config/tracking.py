"""Section tracking: where metrics go besides metrics.jsonl."""

from dataclasses import dataclass
from enum import Enum

from minitron_train.config.base import opt


class WandbMode(Enum):
    """auto is online with WANDB_API_KEY in the environment, offline without; there is never a prompt."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases."""

    mode: WandbMode = opt(WandbMode.auto, "auto, online, offline, disabled")
    project: str = opt("minitron_train", "W&B project")
    name: str | None = opt(None, "run name; default: the recipe's")


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig = opt(WandbConfig, "Weights & Biases")

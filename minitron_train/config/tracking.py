"""Section tracking: where metrics go besides metrics.jsonl."""

from dataclasses import dataclass
from enum import StrEnum

from minitron_train.config.base import opt


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
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig = opt(WandbConfig, "Weights & Biases")

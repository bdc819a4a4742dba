"""The program as a library: functions.py has the functions, results.py what they return (docs/python.md)."""

from minitron_train.api.functions import (
    distill,
    distillation_loss,
    evaluate,
    export,
    plan,
    prune,
    report,
    score,
    speed,
    teach,
)
from minitron_train.api.results import Distilled, Evaluated, Exported, Planned, Pruned, Scored, Taught, Timed
from minitron_train.runtime.errors import UserError

__all__ = [
    "Distilled",
    "Evaluated",
    "Exported",
    "Planned",
    "Pruned",
    "Scored",
    "Taught",
    "Timed",
    "UserError",
    "distill",
    "distillation_loss",
    "evaluate",
    "export",
    "plan",
    "prune",
    "report",
    "score",
    "speed",
    "teach",
]

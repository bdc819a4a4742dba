"""The metric that decides which checkpoint is the best, and its direction."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from minitron_train.config import Config
from minitron_train.runtime.errors import UserError

LOWER_IS_BETTER = ("kl", "loss", "perplexity", "bits_per_byte")  # suffixes; for all other metrics higher is better
OWN = ("kl", "loss", "perplexity")  # metrics of the validation; kl only with a teacher


@dataclass(frozen=True, slots=True)
class BestMetric:
    """The metric that compares evaluations, such as `validation.kl` or `hellaswag.acc_norm`."""

    name: str

    @classmethod
    def of(cls, config: Config, *, distilled: bool) -> "BestMetric":
        """Return the metric in checkpoint.best_metric. The default is validation.kl, or validation.loss without a teacher.

        Raises:
            UserError: no evaluation of this run computes it. The metrics of an lm-eval task are known only after it ran.
        """
        name = config.checkpoint.best_metric or ("validation.kl" if distilled else "validation.loss")
        own = [f"validation.{metric}" for metric in OWN if distilled or metric != "kl"]
        task, _, metric = name.partition(".")
        if name not in own and not (metric and task in config.eval.training_tasks):
            tasks = [f"{task}.METRIC" for task in config.eval.training_tasks]
            raise UserError(
                f"checkpoint.best_metric={name}: must be one of {', '.join([*own, *tasks])}; "
                "choose one, or add its task to eval.training_tasks"
            )
        return cls(name)

    def value(self, evaluation: Mapping[str, float]) -> float:
        """Return this metric from the `TASK.METRIC` values of one evaluation.

        Raises:
            UserError: the evaluation does not have it; the message lists the metrics that it has.
        """
        if self.name not in evaluation:
            raise UserError(
                f"checkpoint.best_metric={self.name}: the evaluation has only {', '.join(evaluation)}; choose one of these"
            )
        return evaluation[self.name]

    def rank(self, value: float | None) -> float:
        """Return a sort key: the best value has the lowest. None, NaN and infinities map to infinity and sort last."""
        if value is None or not math.isfinite(value):
            return math.inf
        return value if self.name.endswith(LOWER_IS_BETTER) else -value

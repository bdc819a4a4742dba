"""Which checkpoint is the best: one metric of the evaluations during training, and its direction."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from minitron_train.config import Config
from minitron_train.runtime.errors import UserError

LOWER_IS_BETTER = ("kl", "loss", "perplexity", "bits_per_byte")  # endings; all others are accuracies and the like
OWN = ("kl", "loss", "perplexity")  # what the validation gives; the KL with a teacher only


@dataclass(frozen=True, slots=True)
class BestMetric:
    """The metric `name`, as in `validation.kl` or `hellaswag.acc_norm`, by which evaluations are compared."""

    name: str

    @classmethod
    def of(cls, config: Config, *, distilled: bool) -> "BestMetric":
        """The metric that checkpoint.best_metric names; by default the validation KL, or loss without a teacher.

        Raises:
            UserError: no evaluation of this run can give it. What an lm-eval task gives is known after the first one.
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
        """This metric of one evaluation's `TASK.METRIC` values.

        Raises:
            UserError: it is not among them; names those that are.
        """
        if self.name not in evaluation:
            raise UserError(
                f"checkpoint.best_metric={self.name}: the evaluation gave {', '.join(evaluation)}; choose one"
            )
        return evaluation[self.name]

    def rank(self, value: float | None) -> float:
        """Sorts the best first; nothing, NaN and infinities come last, as infinity."""
        if value is None or not math.isfinite(value):
            return math.inf
        return value if self.name.endswith(LOWER_IS_BETTER) else -value

"""Code of one's own at fixed places of the training loop, without editing the loop."""

from typing import TYPE_CHECKING

from minitron_train.config import Config
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.plugins import import_name
from minitron_train.train.metrics import Metrics

if TYPE_CHECKING:
    from minitron_train.train.loop import Trainer


class Hook:
    """Override what you need. All ranks call every method at the same step, so collectives are allowed in all of them.

    `train.hooks=[my_lab.hooks.MyHook]` adds one by its name; it is made without arguments. Figures that a method returns
    go into metrics.jsonl and W&B. An exception ends the run.
    """

    def before_optimizer(self, training: "Trainer") -> None:
        """Gradients of the global batch are complete and not yet clipped."""

    def after_step(self, training: "Trainer", row: Metrics) -> Metrics:
        """One optimizer step is done; `row` has its figures (loss, lr, grad_norm, …), and gets those returned."""
        return {}

    def evaluate(self, training: "Trainer") -> Metrics:
        """A further evaluation, after each validation: `eval.TASK.METRIC` values, among which train.best_metric may be."""
        return {}

    def after_evaluation(self, training: "Trainer", found: Metrics) -> None:
        """Validation and all further evaluations are done and judged; `found` has their figures."""


def hooks_of(config: Config) -> list[Hook]:
    """The hooks that train.hooks names.

    Raises:
        UserError: one cannot be imported, or is no Hook.
    """
    made = []
    for name in config.train.hooks:
        hook = import_name("train.hooks", name)()
        if not isinstance(hook, Hook):
            raise UserError(f"train.hooks={name}: makes no minitron_train.train.hooks.Hook; derive your class from it")
        made.append(hook)
    return made

"""Hooks: user code at fixed places of the training loop."""

from typing import TYPE_CHECKING

from minitron_train.config import Config
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.plugins import import_name
from minitron_train.train.metrics import Metrics

if TYPE_CHECKING:
    from minitron_train.train.loop import Trainer


class Hook:
    """Override the methods that you need. All ranks call each method at the same step, so collectives are allowed.

    `train.hooks=[my_lab.hooks.MyHook]` adds a hook; its class is called without arguments. Values that a method returns
    go to metrics.jsonl and the trackers. An exception ends the run. With pipeline stages, `training.student` is a rank's
    own stage.

    Attributes:
        reads_weights: whether `after_step` may read the student's weights. Each step then waits until all ranks have them.
            False lets them arrive during the next forward pass (parallel.overlap_communication).
    """

    reads_weights: bool = True

    def before_optimizer(self, training: "Trainer") -> None:
        """Called when the gradients of the global batch are complete, before clipping."""

    def after_step(self, training: "Trainer", row: Metrics) -> Metrics:
        """Called after an optimizer step. `row` holds its metrics (loss, lr, grad_norm, …); returned values are added."""
        return {}

    def evaluate(self, training: "Trainer") -> Metrics:
        """Called after each validation. Returns `eval.TASK.METRIC` values; checkpoint.best_metric may name one of them.

        A long evaluation should call `training.is_stopped()` after each batch, and end with runtime.signals.Interrupted on
        all ranks if it was true on any.
        """
        return {}

    def after_evaluation(self, training: "Trainer", found: Metrics) -> None:
        """Called after validation and all evaluations. `found` holds their values."""


def returned(hook: Hook, method: str, values: object) -> Metrics:
    """What a hook's method has returned.

    Raises:
        UserError: it is not a dict of numbers by name.
    """
    if isinstance(values, dict) and all(isinstance(k, str) and isinstance(v, int | float) for k, v in values.items()):
        return values
    name = f"{type(hook).__module__}.{type(hook).__qualname__}.{method}"
    raise UserError(f"train.hooks: {name} returned {values!r:.80}; return a dict of numbers by name, or {{}}")


def hooks_of(config: Config) -> list[Hook]:
    """Import and create the hooks in train.hooks.

    Raises:
        UserError: a hook cannot be imported, or is not a Hook.
    """
    made = []
    for name in config.train.hooks:
        hook = import_name("train.hooks", name)()
        if not isinstance(hook, Hook):
            raise UserError(
                f"train.hooks={name}: is not a subclass of minitron_train.train.hooks.Hook; derive your class from it"
            )
        made.append(hook)
    return made

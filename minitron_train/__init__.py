"""Prune a large language model and distil it back: Minitron (arXiv 2407.14679, 2408.11796) on megatron-core.

    import minitron_train as mt

docs/python.md shows the functions. They load on first use, so that `import minitron_train` needs neither torch nor Hydra.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

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

if TYPE_CHECKING:  # editors and pyright read these lines, and so find misspelt names; at run time __getattr__ answers
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
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("minitron_train.api.functions"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

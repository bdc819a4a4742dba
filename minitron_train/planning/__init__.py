"""What a recipe costs before anyone pays for it: parameters, FLOPs, memory, time, network, disk, dollars. Nothing is run.

Everything follows from two shapes, the training settings and a hardware table; no teacher, network or GPU is needed.
"""

from minitron_train.planning.check import check_fits
from minitron_train.planning.estimate import make_plan
from minitron_train.planning.show import format_plan

__all__ = ["check_fits", "format_plan", "make_plan"]

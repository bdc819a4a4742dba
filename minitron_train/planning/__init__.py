"""Estimate the cost of a recipe without running it: parameters, FLOPs, memory, time, network, disk, dollars.

The inputs are two shapes, the training settings and a hardware table. The plan needs no teacher, network or GPU.
"""

from minitron_train.planning.check import check_fits
from minitron_train.planning.estimate import make_plan
from minitron_train.planning.family import Member, family_plan
from minitron_train.planning.show import format_plan

__all__ = ["Member", "check_fits", "family_plan", "format_plan", "make_plan"]

"""Least squares with a ridge towards the weights at hand, from sums over the tokens of all processes."""

import torch
from torch import Tensor

from minitron_train.parallel.groups import Groups
from minitron_train.runtime.errors import UserError

# N tokens, I inputs, O outputs


class LeastSquares:
    """argmin over W of Σ w ‖y - W x‖² + ridge ‖W - W₀‖², from sums over the tokens of all processes."""

    def __init__(self, inputs: int, outputs: int, groups: Groups) -> None:
        self.groups = groups
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=groups.device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=groups.device)

    def add(self, x_NI: Tensor, y_NO: Tensor, weight_N: Tensor) -> None:
        """Add tokens; the products of one call are fp32, the sums over calls fp64."""
        wide_NI = x_NI.float()
        weighted_IN = (wide_NI * weight_N[:, None]).t()
        self.gram += weighted_IN @ wide_NI
        self.cross += weighted_IN @ y_NO.float()

    def solve(self, start_OI: Tensor, ridge: float) -> Tensor:
        """The best weights, regularised towards `start_OI`; `ridge` is relative to the mean of the Gram matrix's diagonal.

        If all inputs are zero, as after an embedding of zeros, `start_OI` is returned.

        Raises:
            UserError: inputs or outputs are not finite; raised on all processes.
        """
        for sums in (self.gram, self.cross):
            self.groups.sum(sums)
        if not (self.gram.isfinite().all() and self.cross.isfinite().all()):
            raise UserError(
                "prune.refit: the model's activations are NaN or infinite while it is repaired; check the teacher's weights, "
                "or prune without repair: prune=paper"
            )
        if not self.gram.diagonal().any():
            return start_OI
        missing = self.cross - self.gram @ start_OI.double().t()
        self.gram.diagonal().add_(ridge * self.gram.diagonal().mean())
        change_IO = torch.cholesky_solve(missing, torch.linalg.cholesky(self.gram))
        return start_OI + change_IO.t().to(start_OI.dtype)

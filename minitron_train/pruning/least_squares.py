"""Least squares with a ridge towards the weights at hand, from sums over the tokens of all processes.

A layer's fits see the outputs of earlier fits on the same tokens. So the error on these tokens falls below that on others, layer
by layer. `HeldOutRidge` chooses each linear's ridge on tokens that no linear is fitted to.
"""

import torch
from torch import Tensor

from minitron_train.parallel.groups import Groups
from minitron_train.runtime.errors import UserError

# N tokens, I inputs, O outputs

RIDGE_FACTORS = (
    1.0,
    0.1,
    0.3,
    3.0,
    10.0,
    30.0,
    100.0,
)  # ridges that are tried, relative to prune.ridge; the first of equal ones wins


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
        missing_IO = self.missing(start_OI)
        if not self.gram.diagonal().any():
            return start_OI
        return start_OI + self.change(missing_IO, ridge).t().to(start_OI.dtype)

    def missing(self, start_OI: Tensor) -> Tensor:
        """Σ w x (y - W₀ x)ᵀ over all processes, fp64 [I, O]. Call it once, before `change` and `gain`.

        Raises:
            UserError: see `solve`.
        """
        for sums in (self.gram, self.cross):
            self.groups.sum(sums)
        if not (self.gram.isfinite().all() and self.cross.isfinite().all()):
            raise UserError(
                "prune.refit: the model's activations are NaN or infinite while it is repaired; check the teacher's weights, "
                "or prune without repair: prune=paper"
            )
        return self.cross - self.gram @ start_OI.double().t()

    def change(self, missing_IO: Tensor, ridge: float) -> Tensor:
        """What the fit with a ridge adds to the weights, fp64 [I, O]."""
        shifted = self.gram.clone()
        shifted.diagonal().add_(ridge * self.gram.diagonal().mean())
        return torch.cholesky_solve(missing_IO, torch.linalg.cholesky(shifted))

    def gain(self, missing_IO: Tensor, change_IO: Tensor) -> float:
        """By how much a change of the weights lowers Σ w ‖y - W x‖²."""
        return float((change_IO * (2 * missing_IO - self.gram @ change_IO)).sum())


class HeldOutRidge:
    """Least squares whose ridge is the one of prune.ridge x RIDGE_FACTORS with the least error on held-out tokens.

    Without held-out tokens the ridge is prune.ridge.
    """

    def __init__(self, inputs: int, outputs: int, groups: Groups, *, has_held_out: bool) -> None:
        self.groups = groups
        self.fitted = LeastSquares(inputs, outputs, groups)
        self.held_out = LeastSquares(inputs, outputs, groups) if has_held_out else None

    def add(self, x_NI: Tensor, y_NO: Tensor, weight_N: Tensor, is_fitted_N: Tensor) -> None:
        """Add tokens; the others than `is_fitted_N` are held out."""
        if self.held_out is None:
            return self.fitted.add(x_NI, y_NO, weight_N)
        for sums, chosen_N in ((self.fitted, is_fitted_N), (self.held_out, ~is_fitted_N)):
            sums.add(x_NI[chosen_N], y_NO[chosen_N], weight_N[chosen_N])

    def solve(self, start_OI: Tensor, ridge: float) -> Tensor:
        """The best weights, as LeastSquares.solve."""
        if self.held_out is None:
            return self.fitted.solve(start_OI, ridge)
        missing_IO, missing_held_out_IO = self.fitted.missing(start_OI), self.held_out.missing(start_OI)
        if not self.fitted.gram.diagonal().any():
            return start_OI
        best_IO, best = torch.zeros_like(missing_IO), -torch.inf
        for factor in RIDGE_FACTORS:
            change_IO = self.fitted.change(missing_IO, ridge * factor)
            gain = self.held_out.gain(missing_held_out_IO, change_IO)
            if gain > best:
                best_IO, best = change_IO, gain
        return start_OI + self.groups.from_first(best_IO).t().to(start_OI.dtype)

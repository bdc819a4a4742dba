"""The forward KL with its passes over a block fused by torch.compile: Triton on CUDA, C++ on a CPU.

The first sweep reads both models' logits twice (row maxima, then sums). The second reads them once and writes the
gradient. These are 7 passes; `loss_terms.ForwardKL` makes 32, and is the fallback where the compiler is missing or fails.

Legend: R rows and C columns of a block.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minitron_train.distillation.loss_blocks import Block
from minitron_train.distillation.loss_terms import ForwardKL
from minitron_train.runtime.console import say

MOST_DIFFERENT = 0.01  # relative error of a compiled kernel: above a bf16 rounding, below any mistake


def forward_kl(like_N: Tensor, temperature: float, compile_loss: bool | None) -> ForwardKL:
    """The forward KL, compiled if asked for; None compiles on CUDA.

    On a CPU, the start of the compiler costs as much time as the fused passes save in some billion logits.
    """
    if like_N.is_cuda if compile_loss is None else compile_loss:
        return CompiledForwardKL(like_N, temperature)
    return ForwardKL(like_N, temperature)


class CompiledForwardKL(ForwardKL):
    """ForwardKL, whose sums and gradient of a block are fused kernels."""

    writes_any_dtype = True

    def __init__(self, like_N: Tensor, temperature: float) -> None:
        super().__init__(like_N, temperature)
        self.block_sums, self.block_gradient = kernels(temperature)

    def observe(self, sweep: int, block: Block) -> None:
        """Both normalisers, and exp(t) (t - s)."""
        rows, student, teacher = block.rows, self.student, self.teacher
        found = self.block_sums(block.student_RC, block.teacher_RC, student.max_N[rows], teacher.max_N[rows])
        if found is None:
            super().observe(sweep, block)
            return
        student_max_R, teacher_max_R, student_R, teacher_R, difference_R = found
        student.rescale(rows, student_max_R)
        teacher.rescale(rows, teacher_max_R)
        student.sums_KN[0, rows] += student_R
        teacher.sums_KN[0, rows] += teacher_R
        teacher.sums_KN[1, rows] += difference_R

    def gradient(self, block: Block, weight: Tensor, out_RC: Tensor) -> None:
        """p - q."""
        rows, scaled = block.rows, weight / self.student.temperature
        maxima = self.student.max_N[rows], self.teacher.max_N[rows]
        factors = self.student.scale(rows, scaled), self.teacher.scale(rows, -scaled)
        if self.block_gradient(block.student_RC, block.teacher_RC, *maxima, *factors, out_RC) is None:
            exact_RC = out_RC if out_RC.dtype == block.student_RC.dtype else block.scratch_RC(0)
            super().gradient(block, weight, exact_RC)
            out_RC.copy_(exact_RC)


class Compiled:
    """A function that is compiled at its first call, for blocks of any shape, and compared with the plain one there.

    It returns None once the compiler has failed or its first result was wrong.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.plain = function
        self.function: Callable[..., Any] | None = torch.compile(function, dynamic=True)
        self.is_checked = False

    def __call__(self, *args: Tensor) -> Any:
        if self.function is None:
            return None
        try:
            result = self.function(*(arg.detach() for arg in args))  # a view's base is a reason to compile again
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler fails in many ways: no C++ compiler, no Triton, an unsupported device
            if self.is_checked:
                raise
            return self.give_up(f"{type(error).__name__}")
        if not self.is_checked and not agree(self.plain, args, result):
            return self.give_up("its result was wrong")
        self.is_checked = True
        return result

    def give_up(self, reason: str) -> None:
        """Use the eager path from now on."""
        self.function = None
        say(f"distillation loss: not compiled ({reason}); its passes are not fused")


def agree(plain: Callable[..., Any], args: tuple[Tensor, ...], result: Any) -> bool:
    """Whether a compiled function's result is the plain one's; both may write into one of `args`."""
    found = [value.float() for value in (result if isinstance(result, tuple) else (result.clone(),))]
    exact = plain(*args)
    pairs = zip(found, exact if isinstance(exact, tuple) else (exact,), strict=True)
    return all(bool((one - other.float()).norm() <= MOST_DIFFERENT * other.float().norm()) for one, other in pairs)


@cache
def kernels(temperature: float) -> tuple[Compiled, Compiled]:
    """The two kernels at one temperature, compiled once per process."""

    def exp(logits_RC: Tensor, max_R: Tensor) -> Tensor:
        shifted_RC = logits_RC - max_R[:, None]
        return (shifted_RC if temperature == 1 else shifted_RC / temperature).exp()

    def block_sums(
        student_RC: Tensor, teacher_RC: Tensor, student_max_R: Tensor, teacher_max_R: Tensor
    ) -> tuple[Tensor, ...]:
        """The new row maxima m of both models, sum exp(s - m), sum exp(t - m) and sum exp(t - m) (t - s)."""
        student_max_R = torch.maximum(student_max_R, student_RC.amax(dim=1))
        teacher_max_R = torch.maximum(teacher_max_R, teacher_RC.amax(dim=1))
        teacher_exp_RC = exp(teacher_RC, teacher_max_R)
        difference_R = (teacher_exp_RC * (teacher_RC - student_RC)).sum(dim=1)
        student_R = exp(student_RC, student_max_R).sum(dim=1)
        return student_max_R, teacher_max_R, student_R, teacher_exp_RC.sum(dim=1), difference_R

    def block_gradient(
        student_RC: Tensor,
        teacher_RC: Tensor,
        student_max_R: Tensor,
        teacher_max_R: Tensor,
        student_R1: Tensor,
        teacher_R1: Tensor,
        out_RC: Tensor,
    ) -> Tensor:
        """Write the weighted probabilities' difference into `out_RC`, in its dtype."""
        student_exp_RC, teacher_exp_RC = exp(student_RC, student_max_R), exp(teacher_RC, teacher_max_R)
        return out_RC.copy_(student_exp_RC * student_R1 + teacher_exp_RC * teacher_R1)

    return Compiled(block_sums), Compiled(block_gradient)

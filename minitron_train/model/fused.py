"""Elementwise parts of a layer with fewer passes over memory than autograd takes, and fewer tensors kept for it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class SquaredRelu(torch.autograd.Function):
    """relu(x)² with two passes over memory forward and one backward; autograd would take three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """relu(x)², [...]; saves relu(x) for the backward pass."""
        positive = F.relu(x)
        if not x.requires_grad:
            return positive.square_()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """2 relu(x) grad."""
        (positive,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, positive, value=2)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)², Nemotron-4's activation."""
    return SquaredRelu.apply(x)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Gate:
    """An activation function, and its backward pass: (grad, x, grad_input=out)."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]


class GatedUnit(torch.autograd.Function):
    """f(gate) * up of [..., gate and up]; saves its input alone, and computes f(gate) again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Gate) -> Tensor:
        """f(gate) * up, half as wide as x."""
        ctx.save_for_backward(x)
        ctx.function = function
        gate, up = x.chunk(2, dim=-1)
        return function.forward(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Both halves of the gradient, written in place."""
        (x,), function = ctx.saved_tensors, ctx.function
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.mul(grad, function.forward(gate), out=grad_up)
        function.backward(grad * up, gate, grad_input=grad_gate)
        return grad_x, None


SILU = Gate(F.silu, torch.ops.aten.silu_backward.grad_input)
GELU_TANH = Gate(
    partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh")
)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, the activation of Llama and its relatives; `x` holds gate and up side by side."""
    return GatedUnit.apply(x, SILU)  # type: ignore[return-value]


def geglu(x: Tensor) -> Tensor:
    """gelu(gate) * up with gelu's tanh approximation, Gemma's activation; `x` holds gate and up side by side."""
    return GatedUnit.apply(x, GELU_TANH)  # type: ignore[return-value]


class RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension, on a CPU; saves its inputs and 1 / rms(x).

    torch (2.13) has no CPU kernel for the backward pass: it takes about ten passes and keeps the normalised values. The kernel
    of LayerNorm, given a mean of zero, computes it except for one term: it also subtracts the mean of grad * weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As torch.nn.functional.rms_norm."""
        out, scale = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        """Gradients of x and of the weight, computed in fp32 or wider."""
        x, weight, scale = ctx.saved_tensors
        wide = [value.to(scale.dtype) for value in (grad, x, weight)]
        wants = [True, ctx.needs_input_grad[1], False]
        mean = torch.zeros_like(scale)
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            *wide[:2], weight.shape, mean, scale, wide[2], None, wants
        )
        grad_x.addcmul_(scale, (wide[0] @ wide[2])[..., None], value=1 / len(weight))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype) if wants[1] else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; GPUs have a kernel of their own."""
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    return RmsNorm.apply(x, weight, eps)  # type: ignore[return-value]

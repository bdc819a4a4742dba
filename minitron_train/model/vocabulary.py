"""The vocabulary's two matrices: where hidden states become logits, and how token embeddings are read one batch at a time.

`OutputLayer` is the only code that multiplies by output weights, `LanguageModel.embed` the only code that embeds tokens.
`LogitMap` is what a family does to their product: its effect is in `apply`, its derivative in `pull_back`.

Legend: N tokens, V vocabulary rows, H hidden size, B batch, S sequence, U distinct tokens of a batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitMap:
    """Logits as a function of the products x of hidden states and output weights: x / divisor, or with a soft cap c
    c tanh(x / divisor / c), as in Gemma 2 (arXiv 2408.00118 §2).
    """

    divisor: float = 1.0
    softcap: float | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the products are the logits."""
        return self == PLAIN

    def apply(self, products: Tensor) -> Tensor:
        """Logits, differentiable."""
        scaled = products if self.divisor == 1 else products / self.divisor
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    def pull_back(self, grad: Tensor, logits: Tensor) -> Tensor:
        """d loss / d products from `grad`, d loss / d logits; written in place."""
        if self.softcap is not None:
            grad.mul_(1 - (logits / self.softcap).square())
        return grad if self.divisor == 1 else grad.div_(self.divisor)


PLAIN = LogitMap()


@dataclass(frozen=True, slots=True)
class OutputLayer:
    """Some rows of a model's output weights, [V, H]: one tensor-parallel rank's, or one block of them.

    Attributes:
        real_rows: the rows after these are padding, and their logits are -inf; None: there is no padding.
    """

    weight_VH: Tensor
    map: LogitMap = PLAIN
    real_rows: int | None = None

    @property
    def num_rows(self) -> int:
        """V."""
        return self.weight_VH.shape[0]

    def rows(self, part: slice, dtype: torch.dtype) -> "OutputLayer":
        """Some of the rows, in another dtype, without padding among them."""
        return replace(self, weight_VH=self.weight_VH[part].to(dtype), real_rows=None)

    def logits(self, hidden_NH: Tensor, out_NV: Tensor | None = None) -> Tensor:
        """Logits [..., V] of hidden states [..., H].

        Without `out_NV`: differentiable, multiplied in the weights' dtype as transformers does, then widened to fp32.
        With `out_NV`: written there, with sums in its dtype, which may be wider than the weights' only on CUDA.
        """
        if out_NV is not None:
            multiply(hidden_NH, self.weight_VH.T, out_NV)
            return out_NV if self.map.is_identity else out_NV.copy_(self.map.apply(out_NV))
        products_NV = hidden_NH @ self.weight_VH.T
        logits_NV = self.map.apply(products_NV.to(torch.promote_types(products_NV.dtype, torch.float32)))
        padding = 0 if self.real_rows is None else self.num_rows - self.real_rows
        return F.pad(logits_NV[..., : self.real_rows], (0, padding), value=-torch.inf) if padding else logits_NV

    def add_gradients(
        self,
        grad_NV: Tensor,
        hidden_NH: Tensor,
        *,
        hidden_grad_NH: Tensor | None,
        weight_grad_VH: Tensor | None,
        overwrite_weight_grad: bool,
    ) -> None:
        """Backward pass of the product: add d loss / d hidden and d loss / d weight to the given tensors; None skips one.

        Args:
            grad_NV: d loss / d products (see LogitMap.pull_back), in the dtype of `hidden_NH`.
            overwrite_weight_grad: write `weight_grad_VH` instead of adding to it.
        """
        if weight_grad_VH is not None:
            multiply(grad_NV.T, hidden_NH, weight_grad_VH, add=not overwrite_weight_grad)
        if hidden_grad_NH is not None:
            multiply(grad_NV, self.weight_VH, hidden_grad_NH, add=True)


def multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = left @ right, or out += left @ right; operands of one dtype, the result of the same or a wider one.

    A wider result is summed and returned as such on CUDA. A CPU has no such product: it sums in fp32, and rounds the
    product once to the dtype of the operands.
    """
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
    elif left.device.type == "cpu":
        product = torch.mm(left, right)
        out.add_(product) if add else out.copy_(product)
    elif add:
        out.add_(torch.mm(left, right, out_dtype=out.dtype))
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


@contextmanager
def bf16_operands() -> Iterator[None]:
    """Products of fp32 matrices inside may round their operands to bf16; sums and results stay fp32.

    Operands that are widened bf16 lose nothing. A CPU with bf16 instructions multiplies them faster; others ignore it.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class StreamedEmbedding(torch.nn.Module):
    """Replaces the embedding matrix of a model that is not held in memory: reads only the rows that a batch needs.

    Args:
        read_rows: ascending row numbers [U], on the CPU -> these rows [U, H], on the model's device.
    """

    def __init__(self, read_rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read_rows = read_rows

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Embeddings [B, S, H], whole on every tensor-parallel rank; a negative token is padding and gets the first row."""
        ids_U, places_BS = tokens_BS.clamp(min=0).unique(return_inverse=True)
        rows_UH = self.read_rows(ids_U.cpu())
        return rows_UH[places_BS.t().to(rows_UH.device)].transpose(0, 1)  # megatron-core's embedding transposes it back

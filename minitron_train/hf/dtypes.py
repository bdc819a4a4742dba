"""Number types of stored tensors, and conversions that refuse to turn a finite value into infinity."""

import torch
from torch import Tensor

from minitron_train.errors import UserError

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # what is written


def cast(tensor: Tensor, dtype: torch.dtype, where: str, remedy: str) -> Tensor:
    """The tensor in another number type.

    Args:
        where: names the tensor in the error.

    Raises:
        UserError: a finite value lies beyond the range of `dtype`; the line ends with `remedy`.
    """
    converted = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and converted.isinf().any():
        finite = tensor[tensor.isfinite()].abs()
        largest = finite.max().item() if len(finite) else 0.0
        if converted.new_tensor(largest).isinf():
            name = str(dtype).removeprefix("torch.")
            limit = torch.finfo(dtype).max
            raise UserError(f"{where}: holds {largest:.4g}, but {name} ends at {limit:.4g}; {remedy}")
    return converted

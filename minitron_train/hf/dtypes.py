"""Number types of stored tensors, and conversions that raise an error instead of turning a finite value into infinity."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minitron_train.runtime.errors import UserError

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # types that can be written

SYNONYMS = {"half": "float16", "float": "float32", "double": "float64"}  # torch's own


def named_dtype(config: Mapping[str, Any]) -> str | None:
    """The number type in config.json, as torch spells it; None if there is none, or none that a model is stored in.

    "auto", an eight-bit type or "torch.float16" fail in transformers unless from_pretrained is given another type.
    """
    named = config.get("dtype") or config.get("torch_dtype")
    if not isinstance(named, str):
        return None
    plain = named.removeprefix("torch.")
    plain = SYNONYMS.get(plain, plain)
    return plain if plain in (*DTYPES, "float64") else None


def cast(tensor: Tensor, dtype: torch.dtype, where: str, remedy: str) -> Tensor:
    """Convert a tensor to another number type.

    Args:
        where: names the tensor in the message.

    Raises:
        UserError: a finite value is out of the range of `dtype`; the message ends with `remedy`.
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

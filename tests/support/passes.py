"""Counts the passes over [N, V] that code makes outside of matrix products: elements read or written, over N x V."""

import re
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOT_PASSES = {
    "mm",
    "addmm",
    "bmm",
    "empty",
    "empty_like",
    "new_empty",
    "detach",
    "_unsafe_view",
}  # products count as FLOPs
BLOCK_ACCESS = re.compile(r"\b((?:in_|out_|in_out_)ptr\d+)(?: \+ |\[)static_cast<int64_t>\(x1 \+")
OUTER_LOOP = re.compile(r"for\(int64_t x0=")


class Traffic(TorchDispatchMode):
    """Counts the elements that operations read and write, matrix products and views aside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in NOT_PASSES:
            given = {name: value for name, value in (kwargs or {}).items() if name != "out"}
            tensors = [leaf for leaf in tree_leaves((args, given, result)) if isinstance(leaf, torch.Tensor)]
            self.elements += sum(tensor.numel() for tensor in tensors)
        return result


def compiled_passes(code: str) -> int:
    """Passes over a block [x0, x1] in C++ code of torch's inductor: the block's pointers of each loop over rows."""
    return sum(len(set(BLOCK_ACCESS.findall(loop))) for loop in OUTER_LOOP.split(code)[1:])

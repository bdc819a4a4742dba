"""Folders that store all experts of a layer as one tensor, as transformers 5 does with save_original_format=False."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from math import prod

from minitron_train.arch import ParamSpec, Shape, architecture
from minitron_train.arch.table import EXPERT, ROUTER, stacked
from minitron_train.hf.headers import Entry
from minitron_train.hf.locate import Weights

FUSED = re.compile(r"(?<=layers\.)(\d+)\.mlp\.(experts\.gate_up_proj|experts\.down_proj|gate\.weight)$")
ROWS = {  # end of a stored name -> the row whose parts it holds
    "experts.gate_up_proj": EXPERT + "linear_fc1.weight",
    "experts.down_proj": EXPERT + "linear_fc2.weight",
    "gate.weight": ROUTER,
}


def with_single_experts(weights: Weights, shape: Shape) -> Weights:
    """The same tensors, those of all experts of a layer as ranges under the names of the table.

    A layer's experts are stored as [experts, 2 neurons, hidden], gate above up, and as [experts, hidden, neurons].
    """
    table = architecture(shape.architecture)
    if not table.has_experts or not any(name.endswith(".experts.gate_up_proj") for name in weights.tensors):
        return weights
    rows = {row.mcore: row for row in table.rows}
    found: dict[str, list[Entry]] = {}
    for stored, entries in weights.tensors.items():
        match = FUSED.search(stored)
        for entry in entries:
            parts = parts_of(entry, rows[ROWS[match[2]]], match[1], shape) if match else [(stored, entry)]
            for name, part in parts:
                found.setdefault(name, []).append(part)
    return replace(weights, tensors=found)


def parts_of(entry: Entry, row: ParamSpec, layer: str, shape: Shape) -> Iterator[tuple[str, Entry]]:
    """Name and place of every tensor of the table that a stored tensor holds; if its size is another, itself."""
    sizes = row.sizes(shape)
    experts, whole = range(1), stacked(sizes)
    if row.per_expert:
        experts, whole = range(shape.num_moe_experts), (shape.num_moe_experts, *whole)
    if entry.size != whole:
        yield entry.name, entry
        return
    start = entry.start
    for e, (name, size) in itertools.product(experts, sizes.items()):
        num_bytes = entry.num_bytes // prod(whole) * prod(size)
        yield name.format(i=layer, e=e), replace(entry, size=size, start=start, num_bytes=num_bytes)
        start += num_bytes

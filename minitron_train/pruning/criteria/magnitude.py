"""L2 norm of all weights that belong to a channel, head or neuron (the group norm of arXiv 2305.11627)."""

import torch

from minitron_train.pruning.criterion import Evidence, UnitSquares, Width


def width(evidence: Evidence) -> Width:
    """L2 norms over the weights of each unit.

    The weights of a channel are its entries in every tensor along the residual stream, in all layers; a tied embedding
    counts once. Those of a head are its query rows and output columns, those of a neuron its rows of gate and up and its
    column of down, those of an expert its MLP and its row of the router.
    """
    sums = UnitSquares(evidence.shape)
    for row in evidence.table.rows_of(evidence.shape):
        for i in row.layers(evidence.shape):
            for name, axes in row.hf.items():
                squares = evidence.source.read(name.format(i=i)).double().square()
                for dim, axis in enumerate(axes):
                    others = [k for k in range(len(axes)) if k != dim]
                    sums.add(axis, i, squares.sum(others) if others else squares, row.expert)
                if row.expert is not None:
                    own = torch.zeros(evidence.shape.num_moe_experts, dtype=squares.dtype)
                    own[row.expert] = squares.sum()
                    sums.add("expert", i, own)
    return sums.norms()

"""L2 norm of weight x input norm over the weights that read a unit (Wanda, arXiv 2306.11695; for groups 2312.11983)."""

from minitron_train.arch.table import LAYER, OUTPUT
from minitron_train.config import Aggregation
from minitron_train.pruning.collect import FINAL_NORM
from minitron_train.pruning.criterion import Evidence, UnitSquares, Width
from minitron_train.runtime.errors import UserError

INPUTS = {  # a linear -> the hook point (see pruning.collect.POINTS) that sees its input
    LAYER + "self_attention.linear_qkv.weight": "layers.{i}.input_norm",
    LAYER + "self_attention.linear_proj.weight": "layers.{i}.head_channels",
    LAYER + "mlp.linear_fc1.weight": "layers.{i}.mlp_norm",
    LAYER + "mlp.linear_fc2.weight": "layers.{i}.neurons_post",
}


def width(evidence: Evidence) -> Width:
    """The L2 norm of Wanda's scores |W_oj| ‖x_j‖ over a unit's weights, with x_j over all calibration tokens.

    With prune.include_final_norm, the output layer's weights count for the channels too.
    """
    if evidence.shape.num_moe_experts:
        raise UserError(
            "prune.width=wanda: the inputs of single experts are not measured; choose activation or magnitude"
        )
    inputs = INPUTS | ({OUTPUT: FINAL_NORM} if evidence.prune.include_final_norm else {})
    sums, shape = UnitSquares(evidence.shape), evidence.shape
    for row in (row for row in evidence.table.rows if row.mcore in inputs):
        for i in row.layers(shape):
            moments = evidence.statistics.moments[inputs[row.mcore].format(i=i)]
            square_norms = moments.aggregate(Aggregation.l2, Aggregation.l2).square()
            for name, axes in row.hf.items():
                stored = evidence.table.output_name(shape) if row.mcore == OUTPUT else name.format(i=i)
                weight = evidence.source.read(stored)
                sums.add(axes[-1], i, weight.double().square().sum(0) * square_norms)
    return sums.norms()

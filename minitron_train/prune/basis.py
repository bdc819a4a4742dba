"""Principal directions of the residual stream, kept instead of its channels (after SliceGPT, arXiv 2401.15024).

A decoder whose norms have constant weights does not change when its residual stream x is rotated, x -> x Q, and every
linear with it: a norm sees only the stream's length. So each norm's weights γ go into the linears that read it, Q is
chosen from the stream itself, and the directions of least variance are cut. Unlike SliceGPT's students, ours stay plain
models of their family: one Q serves all layers, so that no matrices are added to the residual path; and

    tied embeddings     E reads tokens in and, as E γ, gives logits out. With a = sqrt(γ / mean γ) the stream x a has both
                        in the one matrix E a. The lengths |x a| and |x| keep their ratio only where γ is nearly constant,
                        so channels whose γ is not near the median stay channels, unrotated, with their own γ.
    LayerNorm           takes out the mean over channels, so the direction (1, …, 1) of the teacher's stream becomes that of
                        the student's, and the principal directions lie in the planes of mean zero of both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_train.arch.shape import Shape
from minitron_train.arch.table import Architecture
from minitron_train.errors import UserError
from minitron_train.prune.layers import Layers, forward, seeing

# N sequences, S length, D teacher's hidden, H student's hidden

NEAR_MEDIAN = 0.3  # a final norm's weight that differs by less, relative to the median, counts as nearly constant
TOKENS_PER_CHANNEL = 16  # that the principal directions are taken from


@dataclass(frozen=True, slots=True)
class Basis:
    """The student's residual stream in terms of the teacher's."""

    down_DH: Tensor  # the student's stream is the teacher's times this
    up_DH: Tensor  # a linear W behind a norm γ becomes (W γ) times this
    norm: float  # weight of the student's norms: they divide by a root mean square over H instead of D channels
    final_norm_H: Tensor  # weight of the student's last norm
    variance_D: Tensor  # share of the normalised stream's variance in every direction, the kept ones first


def check_rotation(table: Architecture, teacher: Shape, iterations: int) -> None:
    """Refuse what cannot be rotated, before any work."""
    if teacher.tie_embeddings and table.transformer["normalization"] == "LayerNorm":
        raise UserError(
            "prune.rotate=true: not possible with LayerNorm and tied embeddings together; set prune.rotate=false"
        )
    if iterations > 1:
        raise UserError(
            f"prune.iterations={iterations}: channels are cut in steps, directions at once; "
            "set prune.iterations=1 or prune.rotate=false"
        )


@torch.no_grad()
def principal_basis(layers: Layers, tokens_NS: Tensor, hidden_size: int, micro_batch_size: int) -> Basis:
    """The `hidden_size` directions in which the teacher's normalised residual stream varies most, over all layers.

    Args:
        tokens_NS: of all processes; each takes its share. Negative ones are padding.

    Raises:
        UserError: tied embeddings under a final norm whose weights are far from constant.
    """
    norm = layers.final_norm
    gamma_D, centred = (norm.weight + norm.offset).float(), norm.bias is not None
    alone_D = torch.zeros_like(gamma_D, dtype=torch.bool)
    if layers.shape.tie_embeddings:
        middle = gamma_D.median()
        alone_D = (gamma_D - middle).abs() > NEAR_MEDIAN * middle.abs()
        if 2 * int(alone_D.sum()) > hidden_size:
            raise UserError(
                f"prune.rotate=true: {int(alone_D.sum())} of {len(gamma_D)} weights of the final norm are far from their "
                "median, and embeddings are tied; set prune.rotate=false"
            )
    mean = gamma_D[~alone_D].mean()
    scale_D = torch.where(alone_D | (not layers.shape.tie_embeddings), 1.0, gamma_D / mean).sqrt()

    covariance_DD = stream_covariance(layers, tokens_NS, scale_D, micro_batch_size, centred=centred)
    covariance_DD = covariance_DD / covariance_DD.trace()
    channels, others = alone_D.nonzero().flatten(), (~alone_D).nonzero().flatten()
    variances, vectors = torch.linalg.eigh(covariance_DD[others][:, others])
    variances, vectors = variances.flip(0), layers.groups.from_first(vectors.flip(1).contiguous())
    num_directions = hidden_size - len(channels)
    num_free = num_directions - 1 if centred else num_directions
    directions_DH = torch.zeros(len(gamma_D), hidden_size, dtype=torch.float64, device=gamma_D.device)
    directions_DH[channels, torch.arange(len(channels))] = 1.0
    kept = vectors[:, :num_free]
    if centred:  # nothing is tied then: all channels are rotated
        kept = kept @ plane_of_mean_zero(hidden_size).to(kept) + (len(gamma_D) * hidden_size) ** -0.5
    directions_DH[others, len(channels) :] = kept
    variance_D = torch.cat([covariance_DD.diagonal()[channels], variances])
    stretch = float((len(gamma_D) / hidden_size * variance_D[: len(channels) + num_free].sum()).sqrt())
    common = mean if layers.shape.tie_embeddings else torch.ones_like(mean)
    last_H = torch.cat([gamma_D[channels], common.expand(num_directions)])
    down_DH, up_DH = scale_D[:, None] * directions_DH, directions_DH / scale_D[:, None]
    return Basis(
        down_DH=down_DH.float(),
        up_DH=up_DH.float(),
        norm=stretch,
        final_norm_H=stretch * last_H,
        variance_D=variance_D.float(),
    )


def plane_of_mean_zero(size: int) -> Tensor:
    """Orthonormal rows that are orthogonal to (1, …, 1), fp64 [size - 1, size] (Helmert's matrix)."""
    rows = torch.tril(torch.ones(size - 1, size, dtype=torch.float64))
    i = torch.arange(1, size, dtype=torch.float64)
    rows[torch.arange(size - 1), torch.arange(1, size)] = -i
    return rows / (i * (i + 1)).sqrt()[:, None]


def stream_covariance(
    layers: Layers, tokens_NS: Tensor, scale_D: Tensor, micro_batch_size: int, *, centred: bool
) -> Tensor:
    """Σ of u uᵀ over tokens and over all norms' inputs x, u = x · scale at length sqrt(D) (`centred`: less its mean)."""
    groups = layers.groups
    batches = tokens_NS[groups.dp_rank :: groups.dp_size].split(micro_batch_size)
    masks = [(batch >= 0).t().to(groups.device) for batch in batches]
    hidden, rotary = [layers.embed(batch) for batch in batches], layers.rotary(tokens_NS.shape[1])
    total_DD = torch.zeros(len(scale_D), len(scale_D), dtype=torch.float64, device=groups.device)

    def add(x_SBD: Tensor, mask_SB: Tensor) -> None:
        x_ND = x_SBD[mask_SB].float() * scale_D
        x_ND = x_ND - x_ND.mean(-1, keepdim=True) if centred else x_ND
        u_ND = torch.nn.functional.rms_norm(x_ND, x_ND.shape[-1:])
        total_DD.add_(u_ND.t() @ u_ND)

    for i in range(layers.shape.num_layers):
        layer = layers[i]
        for k, mask in enumerate(masks):
            with seeing(layer.get_submodule("pre_mlp_layernorm"), of_input=True) as seen:
                after = forward(layer, hidden[k], rotary)
            for x in (hidden[k], seen[0]):
                add(x, mask)
            hidden[k] = after
    for x, mask in zip(hidden, masks, strict=True):
        add(x, mask)
    return groups.sum(total_DD)

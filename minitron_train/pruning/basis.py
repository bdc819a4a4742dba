"""Principal directions of the residual stream, kept instead of its channels (after SliceGPT, arXiv 2401.15024).

A norm with constant weights depends only on the length of its input. So a decoder with such norms does not change when its
residual stream x is rotated, x -> x Q, together with every linear. To reach this form, each norm's weights γ are folded
into the linears that read it. Q holds the principal directions of the stream, and those of least variance are dropped.
One Q serves all layers. Unlike in SliceGPT, the residual path then needs no extra matrices, and the student stays a plain
model of its family. Two cases need more:

    tied embeddings     E embeds tokens, and E γ gives logits. With a = sqrt(γ / mean γ), the single matrix E a does both for
                        the stream x a. The ratio of the lengths |x a| and |x| is constant only where γ is nearly constant.
                        So channels whose γ is not near the median are kept as channels, unrotated, with their own γ.
    LayerNorm           subtracts the mean over channels. So the teacher's direction (1, …, 1) maps to the student's, and the
                        principal directions lie in the planes of mean zero of both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_train.pruning.halves import forward
from minitron_train.pruning.layers import Layers, seeing

# N sequences, S length, D teacher's hidden, H student's hidden

NEAR_MEDIAN = 0.3  # a final norm's weight within this relative distance of the median counts as nearly constant


@dataclass(frozen=True, slots=True)
class Basis:
    """The student's residual stream in terms of the teacher's."""

    down_DH: Tensor  # the student's stream is the teacher's stream @ down_DH
    up_DH: Tensor  # a linear W after a norm γ becomes (W γ) @ up_DH
    norm: float  # weight of the student's norms: their RMS is over H instead of D channels
    final_norm_H: Tensor  # weight of the student's last norm
    variance_D: Tensor  # share of the normalised stream's variance in every direction, kept directions first


def why_not(layers: Layers, hidden_size: int) -> str | None:
    """Why this teacher's stream cannot be rotated, or None."""
    if layers.table.has_post_norms:
        return "its norms after attention and MLP weigh single channels of the stream"
    if norm := norm_without_weight(layers):
        return f"{norm} has a bias where its weight is zero, and no linear can take that over"
    if not layers.shape.tie_embeddings:
        return None
    if layers.final_norm.bias is not None:
        return "LayerNorm and tied embeddings together"
    num_alone = int(unrotated(layers).sum())
    if 2 * num_alone > hidden_size:
        return f"embeddings are tied, and {num_alone} of the final norm's weights are far from their median"
    return None


def norm_without_weight(layers: Layers) -> str | None:
    """Name of a norm that has a bias where its weight is zero, or None: rotation needs β / γ."""
    for row in layers.table.rows:
        if row.mcore.endswith("layernorm.bias"):
            for i in row.layers(layers.shape):
                name = next(iter(row.hf)).format(i=i)
                gamma = layers.source.read(name.removesuffix("bias") + "weight") + layers.final_norm.offset
                if ((gamma == 0) & (layers.source.read(name) != 0)).any():
                    return name.removesuffix(".bias")
    return None


def effective_gamma(layers: Layers) -> Tensor:
    """Weights of the last norm including its offset, [D]."""
    return (layers.final_norm.weight + layers.final_norm.offset).float()


def unrotated(layers: Layers) -> Tensor:
    """Channels that are not rotated, bool [D]: with tied embeddings, those whose final norm weight is far from the median."""
    gamma_D = effective_gamma(layers)
    middle = gamma_D.median()
    return (gamma_D - middle).abs() > (NEAR_MEDIAN * middle.abs() if layers.shape.tie_embeddings else torch.inf)


@torch.no_grad()
def principal_basis(
    layers: Layers,
    tokens_NS: Tensor,
    hidden_size: int,
    micro_batch_size: int,
    dtype: torch.dtype = torch.float32,
) -> Basis:
    """The `hidden_size` directions in which the teacher's normalised residual stream varies most, over all layers.

    Args:
        layers: a teacher that can be rotated (`why_not` is None).
        tokens_NS: the sequences of all processes; each takes its share. Negative tokens are padding.
        dtype: in which the teacher multiplies matrices; its stream is fp32, and sums are fp64.
    """
    gamma_D, alone_D, centred = effective_gamma(layers), unrotated(layers), layers.final_norm.bias is not None
    common = gamma_D[~alone_D].mean()
    scale_D = torch.ones_like(gamma_D)
    if layers.shape.tie_embeddings:
        scale_D[~alone_D] = (gamma_D[~alone_D] / common).sqrt()
    covariance_DD = stream_covariance(layers, tokens_NS, scale_D, micro_batch_size, dtype, centred=centred)
    covariance_DD = covariance_DD / covariance_DD.trace()

    channels, others = alone_D.nonzero().flatten(), (~alone_D).nonzero().flatten()
    variances, vectors = torch.linalg.eigh(covariance_DD[others][:, others])
    variances, vectors = variances.flip(0), layers.groups.from_first(vectors.flip(1).contiguous())
    num_turned = hidden_size - len(channels)
    num_free = num_turned - 1 if centred else num_turned
    turned = vectors[:, :num_free]
    if centred:  # embeddings are not tied then, and all channels are rotated
        turned = turned @ plane_of_mean_zero(hidden_size).to(turned) + (len(gamma_D) * hidden_size) ** -0.5
    directions_DH = torch.zeros(len(gamma_D), hidden_size, dtype=torch.float64, device=gamma_D.device)
    directions_DH[channels, torch.arange(len(channels))] = 1.0
    directions_DH[others, len(channels) :] = turned

    variance_D = torch.cat([covariance_DD.diagonal()[channels], variances])
    norm = float((len(gamma_D) / hidden_size * variance_D[: len(channels) + num_free].sum()).sqrt())
    last = (
        common if layers.shape.tie_embeddings else torch.ones_like(common)
    )  # untied: it is folded into the output layer
    return Basis(
        down_DH=(scale_D[:, None] * directions_DH).float().cpu(),
        up_DH=(directions_DH / scale_D[:, None]).float().cpu(),
        norm=norm,
        final_norm_H=norm * torch.cat([gamma_D[channels], last.expand(num_turned)]).cpu(),
        variance_D=variance_D.float().cpu(),
    )


def plane_of_mean_zero(size: int) -> Tensor:
    """Orthonormal rows, each orthogonal to (1, …, 1), fp64 [size - 1, size] (Helmert's matrix)."""
    rows = torch.tril(torch.ones(size - 1, size, dtype=torch.float64))
    i = torch.arange(1, size, dtype=torch.float64)
    rows[torch.arange(size - 1), torch.arange(1, size)] = -i
    return rows / (i * (i + 1)).sqrt()[:, None]


def stream_covariance(
    layers: Layers,
    tokens_NS: Tensor,
    scale_D: Tensor,
    micro_batch_size: int,
    dtype: torch.dtype,
    *,
    centred: bool,
) -> Tensor:
    """Σ u uᵀ over tokens and all norms' inputs x, fp64 [D, D]; u is x · scale, minus its mean if `centred`, with RMS 1."""
    groups = layers.groups
    batches = list(groups.own_parts(tokens_NS, micro_batch_size))
    masks = [(batch >= 0).t() for batch in batches]
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
                after = forward(layer, hidden[k], rotary, dtype)
            for x in (hidden[k], seen[0]):
                add(x, mask)
            hidden[k] = after
    for x, mask in zip(hidden, masks, strict=True):
        add(x, mask)
    return groups.sum(total_DD)

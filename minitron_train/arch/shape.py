"""The sizes of a model and the rules that they obey. Pure Python: `plan` imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minitron_train.arch.layer_kind import LayerKind, Rope
from minitron_train.runtime.errors import UserError

SIZES = (  # can be pruned
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_moe_experts",
)
FACTORS = (  # numbers that a family multiplies or divides by
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "query_scalar",
    "logits_divisor",
    "attention_softcap",
    "logits_softcap",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One decoder's shape, with megatron-core's names. `architecture` is a key of arch.ARCHITECTURES.

    In a mixture of experts, every layer has `num_moe_experts` experts, and `ffn_hidden_size` is the width of one of them.
    """

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
    layernorm_epsilon: float = 1e-5
    num_moe_experts: int = 0  # experts of each layer; 0: one dense MLP
    moe_router_topk: int = 0  # experts that process a token, those of its highest router probabilities
    norm_topk_prob: bool = False  # whether these probabilities are divided by their sum
    attention_bias: bool = False  # whether the attention has the biases that the table lists under this field
    mlp_bias: bool = False  # likewise the MLP
    embedding_multiplier: float = 1.0  # of embeddings (see Architecture.embedding_scale)
    residual_multiplier: float = 1.0  # of what attention and MLP add to the residual stream
    attention_multiplier: float | None = None  # of query x key; None: 1 / sqrt(kv_channels)
    query_scalar: float | None = None  # query x key is divided by its root; None: by that of kv_channels
    logits_divisor: float = 1.0
    attention_softcap: float | None = None  # scores x become c tanh(x / c)
    logits_softcap: float | None = None  # likewise the logits
    wrapper: str | None = None  # model_type of the vision-language model around this text model
    num_bound_layers: int = 0  # first layers that the vision model adds image features to
    kinds: tuple[LayerKind, ...] = (LayerKind(),)  # different ones, in the order of the first layer that has each
    kind_of_layer: tuple[int, ...] = ()  # each layer's index into `kinds`; empty if there is only one kind

    def __post_init__(self) -> None:
        assert len(self.kind_of_layer) == (self.num_layers if len(self.kinds) > 1 else 0), "kinds of other layers"

    @property
    def softmax_scale(self) -> float | None:
        """Factor of query x key; None: 1 / sqrt(kv_channels)."""
        return self.attention_multiplier if self.query_scalar is None else self.query_scalar**-0.5

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        return tuple(self.kinds[k] for k in self.kind_of_layer) or self.kinds * self.num_layers

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different attention windows of the layers."""
        return tuple(dict.fromkeys(kind.window for kind in self.kinds))

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary embeddings of the layers."""
        return tuple(dict.fromkeys(kind.rope for kind in self.kinds if kind.rope is not None))

    def is_plain(self, length: int) -> bool:
        """Whether megatron-core's attention suffices for `length` tokens: one rope that scales nothing, no window below."""
        ropes = {kind.rope for kind in self.kinds}
        one_rope = len(ropes) == 1 and all(rope is not None and not rope.scales_queries for rope in ropes)
        return one_rope and all(window is None or window >= length for window in self.windows)

    @property
    def neurons_per_layer(self) -> int:
        """MLP neurons of a layer, those of all experts together."""
        return self.ffn_hidden_size * max(self.num_moe_experts, 1)

    @property
    def neurons_per_token(self) -> int:
        """MLP neurons of a layer that process a token, those of its experts."""
        return self.ffn_hidden_size * max(self.moe_router_topk, 1)

    def sizes(self) -> dict[str, int]:
        """The sizes that pruning can change, by name; a dense model has no number of experts."""
        return {size: getattr(self, size) for size in SIZES if size != "num_moe_experts" or self.num_moe_experts}

    def axis_size(self, axis: str) -> int:
        """Length of a named axis (see arch.table): embd, q, kv, ffn, vocab, head or expert."""
        return {
            "embd": self.hidden_size,
            "q": self.num_attention_heads * self.kv_channels,
            "kv": self.num_query_groups * self.kv_channels,
            "ffn": self.ffn_hidden_size,
            "vocab": self.vocab_size,
            "head": self.kv_channels,
            "expert": self.num_moe_experts,
        }[axis]

    def check(self, name: str) -> None:
        """Reject a shape that no model can have. `name` ("student", …) goes into the message."""
        for key in (*self.sizes(), "kv_channels", "vocab_size"):
            if getattr(self, key) < 1:
                raise UserError(f"{name}.{key}={getattr(self, key)}: must be at least 1; set a positive number")
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"{name}.num_attention_heads={self.num_attention_heads}: must be a multiple of "
                f"num_query_groups={self.num_query_groups} (every KV group keeps the same number of heads); "
                f"choose {nearest_multiples(self.num_attention_heads, self.num_query_groups)}"
            )
        if self.moe_router_topk > self.num_moe_experts:
            raise UserError(
                f"{name}.num_moe_experts={self.num_moe_experts}: the router sends each token to {self.moe_router_topk} "
                f"experts; choose at least {self.moe_router_topk}"
            )

    def check_parallel(self, tensor_model_parallel_size: int, name: str) -> None:
        """Reject a tensor-parallel size that does not divide heads, KV groups, MLP and vocabulary."""
        for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
            if getattr(self, key) % tensor_model_parallel_size:
                raise UserError(
                    f"parallel.tensor_model_parallel_size={tensor_model_parallel_size}: must divide the {name}'s "
                    f"{key}={getattr(self, key)}; choose a divisor"
                )

    def check_stages(self, pipeline_model_parallel_size: int, name: str) -> None:
        """Reject more pipeline stages than layers: each stage holds at least one."""
        if self.num_layers < pipeline_model_parallel_size:
            raise UserError(
                f"parallel.pipeline_model_parallel_size={pipeline_model_parallel_size}: the {name} has only "
                f"num_layers={self.num_layers}, and each stage needs one; choose at most {self.num_layers}"
            )

    def check_length(self, length: int, key: str, name: str) -> None:
        """Reject sequences that are longer than the model's context. `key` is the setting that gives the length."""
        if length > self.max_position_embeddings:
            raise UserError(
                f"{key}={length}: the {name} was made for {self.max_position_embeddings} positions; shorten it"
            )

    def with_layers(self, kinds: Sequence[LayerKind]) -> "Shape":
        """This shape with as many layers as there are `kinds`, of these kinds."""
        different = tuple(dict.fromkeys(kinds)) or self.kinds[:1]
        places = tuple(map(different.index, kinds)) if len(different) > 1 else ()
        return replace(self, num_layers=len(kinds), kinds=different, kind_of_layer=places)

    def untied(self) -> "Shape":
        """This shape with an output layer that is not tied to the embedding."""
        return replace(self, tie_embeddings=False)

    def smaller(self, **sizes: int | None) -> "Shape":
        """This shape with some sizes reduced; None keeps a size.

        With fewer layers it gets the kinds of the first ones, until pruning chooses the layers (`with_layers`).

        Raises:
            UserError: a size exceeds this shape's, or the KV groups do not divide the heads.
        """
        changed = {key: value for key, value in sizes.items() if value is not None}
        if "num_moe_experts" in changed and not self.num_moe_experts:
            raise UserError(
                f"student.num_moe_experts={changed['num_moe_experts']}: the teacher has no experts; leave it out"
            )
        for key, value in changed.items():
            if value > getattr(self, key):
                raise UserError(
                    f"student.{key}={value}: larger than the teacher's {getattr(self, key)}; pruning only cuts, "
                    f"choose at most {getattr(self, key)}"
                )
        first = self.layer_kinds[: max(0, changed.get("num_layers", self.num_layers))]
        shape = replace(self.with_layers(first), **changed)
        shape.check("student")
        return shape


def nearest_multiples(value: int, base: int) -> str:
    """The multiples of `base` next to `value`, for a message: "4 or 8"."""
    below = value // base * base
    return f"{below} or {below + base}" if below else str(base)

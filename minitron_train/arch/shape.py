"""The sizes of a model and the rules that they obey. Pure Python: `plan` imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType

from minitron_train.arch.layer_kind import LayerKind, Rope
from minitron_train.runtime.errors import UserError

SIZES = (  # can be pruned
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_moe_experts",
    "moe_shared_expert_intermediate_size",
    "dense_ffn_hidden_size",
)
ABSENT = {
    "num_moe_experts": "experts",
    "moe_shared_expert_intermediate_size": "shared expert",
    "dense_ffn_hidden_size": "dense layers among layers with experts",
}  # 0 where there are none
SPLIT_SIZES = (  # that tensor parallelism divides; vocab_size is padded
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "dense_ffn_hidden_size",
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

    In a mixture of experts, a layer has `num_moe_experts` experts, and `ffn_hidden_size` is the width of one of them.
    Some families add a shared expert, which processes every token. Layers whose kind is dense have one MLP instead.
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
    moe_shared_expert_intermediate_size: int = 0  # neurons of each layer's shared expert; 0: there is none
    dense_ffn_hidden_size: int = 0  # neurons of the MLP of dense layers among layers with experts; 0: there are none
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

    def by_mlp(self) -> tuple[tuple["Shape", int], ...]:
        """This model as models whose layers all have experts, or all a dense MLP, each with its number of layers."""
        if not any(kind.is_dense for kind in self.kinds):
            return ((self, self.num_layers),)
        absent = dict.fromkeys((*ABSENT, "moe_router_topk"), 0)
        without = replace(self, ffn_hidden_size=self.dense_ffn_hidden_size, **absent)
        parts = [
            (part, [kind for kind in self.layer_kinds if kind.is_dense == is_dense])
            for part, is_dense in ((self, False), (without, True))
        ]
        return tuple((part.with_layers(kinds), len(kinds)) for part, kinds in parts if kinds)

    def unit_sizes(self, kind: LayerKind) -> dict[str, tuple[int, ...]]:
        """Sizes of the scores of a layer's experts, of its neurons (with experts: of each expert), and of its shared expert's."""
        if kind.is_dense:
            return {"experts": (0,), "ffn": (self.dense_ffn_hidden_size,), "shared": (0,)}
        experts = (self.num_moe_experts,) if self.num_moe_experts else ()
        return {
            "experts": (self.num_moe_experts,),
            "ffn": (*experts, self.ffn_hidden_size),
            "shared": (self.moe_shared_expert_intermediate_size,),
        }

    @property
    def neurons_per_layer(self) -> int:
        """MLP neurons of a layer, those of all experts together."""
        return self.ffn_hidden_size * max(self.num_moe_experts, 1) + self.moe_shared_expert_intermediate_size

    @property
    def neurons_per_token(self) -> int:
        """MLP neurons of a layer that process a token, those of its experts."""
        return self.ffn_hidden_size * max(self.moe_router_topk, 1) + self.moe_shared_expert_intermediate_size

    def sizes(self) -> dict[str, int]:
        """The sizes that pruning can change, by name; without experts, and those of experts that the model lacks."""
        return {size: getattr(self, size) for size in SIZES if size not in ABSENT or getattr(self, size)}

    def axis_size(self, axis: str) -> int:
        """Length of a named axis (see arch.table)."""
        return {
            "embd": self.hidden_size,
            "q": self.num_attention_heads * self.kv_channels,
            "kv": self.num_query_groups * self.kv_channels,
            "ffn": self.ffn_hidden_size,
            "vocab": self.vocab_size,
            "head": self.kv_channels,
            "expert": self.num_moe_experts,
            "shared": self.moe_shared_expert_intermediate_size,
            "dense": self.dense_ffn_hidden_size,
            "one": 1,
        }[axis]

    def check(self, prefix: str, keys: Mapping[str, str] = MappingProxyType({})) -> None:
        """Reject a shape that no model can have.

        Args:
            prefix: what a message puts before a size: "student.", or a file and a colon.
            keys: the names of sizes that messages use, by field; a field without one has its own name.
        """

        def told(field: str) -> str:
            return f"{keys.get(field, field)}={getattr(self, field)}"

        for field in (*self.sizes(), "kv_channels", "vocab_size"):
            if getattr(self, field) < 1:
                raise UserError(f"{prefix}{told(field)}: must be at least 1; set a positive number")
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"{prefix}{told('num_attention_heads')}: must be a multiple of {told('num_query_groups')} "
                "(every KV group keeps the same number of heads); "
                f"choose {nearest_multiples(self.num_attention_heads, self.num_query_groups)}"
            )
        if self.moe_router_topk > self.num_moe_experts:
            raise UserError(
                f"{prefix}{told('num_moe_experts')}: the router sends each token to {self.moe_router_topk} experts; "
                f"choose at least {self.moe_router_topk}"
            )
        if self.num_moe_experts and all(kind.is_dense for kind in self.kinds):
            raise UserError(f"{prefix}{told('num_moe_experts')}: no layer has experts; keep at least one that has them")

    def check_parallel(self, tensor_model_parallel_size: int, name: str) -> None:
        """Reject a tensor-parallel size that does not divide heads, KV groups and MLP, or leaves a rank without vocabulary."""
        for key in SPLIT_SIZES:
            if getattr(self, key) % tensor_model_parallel_size:
                raise UserError(
                    f"parallel.tensor_model_parallel_size={tensor_model_parallel_size}: must divide the {name}'s "
                    f"{key}={getattr(self, key)}; choose a divisor"
                )
        if not self.real_rows(tensor_model_parallel_size - 1, tensor_model_parallel_size):
            raise UserError(
                f"parallel.tensor_model_parallel_size={tensor_model_parallel_size}: leaves a rank without a row of the "
                f"{name}'s vocab_size={self.vocab_size}; lower it"
            )

    def rank_rows(self, tp: int) -> int:
        """Return the vocabulary rows that each tensor-parallel rank holds, with padding if `tp` does not divide vocab_size."""
        return -(-self.vocab_size // tp)

    def real_rows(self, rank: int, tp: int, held: int | None = None) -> int:
        """Return how many of the rows on tensor-parallel rank `rank` are no padding, which is at the vocabulary's end.

        Args:
            held: rows that each rank holds; None: rank_rows(tp).
        """
        return rows_without_padding(self.vocab_size, rank, self.rank_rows(tp) if held is None else held)

    def check_experts(self, expert_model_parallel_size: int, name: str) -> None:
        """Reject an expert-parallel size that does not divide the experts, or a dense model with one above 1."""
        what = f"parallel.expert_model_parallel_size={expert_model_parallel_size}"
        if not self.num_moe_experts and expert_model_parallel_size > 1:
            raise UserError(f"{what}: the {name} has no experts; set it to 1")
        if self.num_moe_experts % expert_model_parallel_size:
            raise UserError(
                f"{what}: must divide the {name}'s num_moe_experts={self.num_moe_experts}; choose a divisor"
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
        dense = self.dense_ffn_hidden_size if any(kind.is_dense for kind in different) else 0
        return replace(self, num_layers=len(kinds), kinds=different, kind_of_layer=places, dense_ffn_hidden_size=dense)

    def largest_layers(self, count: int) -> list[LayerKind]:
        """The kinds of `count` layers: the first ones, or in a model with dense layers among layers with experts the largest.

        Of such a model, the first layer with experts and the first dense layer come before all others, so that the shape
        has the widths of both.
        """
        kinds = self.layer_kinds
        firsts = [next((i for i, kind in enumerate(kinds) if kind.is_dense == dense), 0) for dense in (False, True)]
        sizes = [self.unit_sizes(kind) for kind in kinds]
        neurons = [prod(size["ffn"]) + size["shared"][0] for size in sizes]
        rest = sorted(set(range(len(kinds))) - {*firsts}, key=lambda i: (-neurons[i], i))
        return [kinds[i] for i in sorted([*dict.fromkeys(firsts), *rest][:count])]

    def layers_decide_sizes(self, num_layers: int) -> bool:
        """Whether the size of a student with `num_layers` depends on which layers are dropped."""
        return self.dense_ffn_hidden_size > 0 and num_layers < self.num_layers

    def untied(self) -> "Shape":
        """This shape with an output layer that is not tied to the embedding."""
        return replace(self, tie_embeddings=False)

    def smaller(self, drop_layers: Sequence[int] | None = None, /, **sizes: int | None) -> "Shape":
        """This shape with some sizes reduced; None keeps a size.

        With fewer layers it has the kinds of those that `drop_layers` leaves. Without a list of fitting length it has the
        kinds of `largest_layers`, until pruning chooses the layers (`with_layers`).

        Raises:
            UserError: a size exceeds this shape's, or the KV groups do not divide the heads.
        """
        changed = {key: value for key, value in sizes.items() if value is not None}
        for key, what in ABSENT.items():
            if key in changed and not getattr(self, key):
                raise UserError(f"student.{key}={changed[key]}: the teacher has no {what}; leave it out")
        for key, value in changed.items():
            if value > getattr(self, key):
                raise UserError(
                    f"student.{key}={value}: larger than the teacher's {getattr(self, key)}; pruning only cuts, "
                    f"choose at most {getattr(self, key)}"
                )
        count = changed.pop("num_layers", self.num_layers)
        left = [kind for i, kind in enumerate(self.layer_kinds) if i not in (drop_layers or ())]
        changed_shape = replace(self, **changed)
        kinds = left if len(left) == count else changed_shape.largest_layers(max(0, count))
        shape = replace(changed_shape.with_layers(kinds), num_layers=count)
        shape.check("student.")
        return shape


def rows_without_padding(num_rows: int, rank: int, held: int) -> int:
    """How many of the `held` rows on tensor-parallel rank `rank` are among the first `num_rows` rows of all ranks."""
    return min(max(num_rows - rank * held, 0), held)


def nearest_multiples(value: int, base: int) -> str:
    """The multiples of `base` next to `value`, for a message: "4 or 8"."""
    below = value // base * base
    return f"{below} or {below + base}" if below else str(base)

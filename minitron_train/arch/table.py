"""Tables of parameters, one row each: import, export, tensor-parallel shards and pruning all follow from them.

A row names the axis of every dimension. The axis decides how the dimension is split and pruned:

    axis    length                        split by tensor parallelism   pruned
    embd    hidden_size                   no                          yes
    q       num_attention_heads * head    yes                         whole heads
    kv      num_query_groups * head       yes                         whole KV groups
    ffn     ffn_hidden_size               yes                         yes
    vocab   vocab_size                    yes                         no
    head    kv_channels                   no                          no
    expert  num_moe_experts               no                          yes
    shared  moe_shared_expert_intermediate_size  yes                  yes
    dense   dense_ffn_hidden_size         yes                         yes
    one     1                             no                          no

A row with `{e}` in its names stands for one parameter of every expert.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from typing import Any

from minitron_train.arch.layer_kind import LayerKind
from minitron_train.arch.shape import FACTORS, Shape

PARALLEL_AXES = frozenset({"q", "kv", "ffn", "shared", "dense", "vocab"})

Axes = tuple[str, ...]
Rule = Callable[[Shape], str | None]  # why a loader of the Hugging Face folder would reject the shape, or None


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamSpec:
    """One megatron-core parameter and the Hugging Face tensors that it is fused from.

    `{i}` in a name is the layer, `{e}` the expert. With `per_group` the parts are interleaved per KV group, which is
    megatron-core's layout of QKV: the group's query rows, then its key rows, then its value rows. Otherwise they are
    stacked (gate, then up). `when` names the Shape field that must be true for a model to have this parameter; None: every
    model has it. `dense` is True for a parameter of dense layers among layers with experts, False for one of the latter.

    Some families store the parts as one tensor, `stored_as`, one range of rows after the other. Then the names in `hf` are
    those of the ranges: the reader finds them there, and writers put them there.
    """

    mcore: str
    hf: Mapping[str, Axes]
    per_group: bool = False
    when: str | None = None
    dense: bool | None = None
    stored_as: str | None = None
    expert: int | None = None  # set by `of_expert`

    @property
    def per_expert(self) -> bool:
        """Whether this row stands for one parameter of every expert (see `of_expert`)."""
        return "{e}" in self.mcore

    def of_expert(self, expert: int) -> "ParamSpec":
        """The row of one expert's parameter."""
        hf = {name.replace("{e}", str(expert)): axes for name, axes in self.hf.items()}
        return replace(self, mcore=self.mcore.replace("{e}", str(expert)), hf=hf, expert=expert)

    @property
    def per_layer(self) -> bool:
        """Whether this is a parameter of layers."""
        return "{i}" in self.mcore

    def is_in(self, kind: LayerKind) -> bool:
        """Whether layers of this kind have this parameter."""
        return self.per_layer and self.dense in (None, kind.is_dense)

    def layers(self, shape: Shape) -> Iterator[int]:
        """Layer indices that have this parameter; [0] for a parameter outside the layers."""
        if self.dense is None:
            return iter(range(shape.num_layers if self.per_layer else 1))
        return (i for i, kind in enumerate(shape.layer_kinds) if self.is_in(kind))

    def num_layers(self, shape: Shape) -> int:
        """How many parameters of the model this row describes."""
        if self.dense is None:
            return shape.num_layers if self.per_layer else 1
        return sum(1 for _ in self.layers(shape))

    def sizes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Full size of each Hugging Face part."""
        return {name: tuple(shape.axis_size(axis) for axis in axes) for name, axes in self.hf.items()}

    def parallel_dim(self) -> int | None:
        """The dimension that tensor parallelism splits (the same in all parts), or None where it is replicated."""
        axes = next(iter(self.hf.values()))
        cut = [dim for dim, axis in enumerate(axes) if axis in PARALLEL_AXES]
        return cut[0] if cut else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """How a family's config.json chooses the layers that attend within sliding_window tokens, where it is a number.

    `default` takes the config, completed with config_defaults, and a layer.
    """

    default: Callable[[Mapping[str, Any], int], bool] | None = None  # where layer_types is missing; None: no layer ever
    layer_types: bool = True  # whether layer_types decides where it is given
    switch: str | None = None  # key that must be true for any layer to have a window
    first_sliding: str | None = None  # key with the number of the first layer that `default` gives a window
    is_needed: bool = False  # whether the class in transformers makes the mask of a window even if no layer has one


@dataclass(frozen=True, kw_only=True, slots=True)
class Unrotated:
    """How a family's config.json chooses the layers without rotary embedding."""

    key: str  # a list with 0 for each of these layers, and 1 for each other one
    interval: str  # where the list is missing, key of a number n: every n-th layer
    has: Callable[[Mapping[str, Any], int], bool]  # takes the config, completed with config_defaults, and a layer


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseLayers:
    """How a family's config.json chooses the layers that have a dense MLP instead of experts."""

    key: str  # a list of these layers' numbers
    interval: str  # key of a number n: of the other layers, every n-th one has experts
    width: str  # key of their MLP neurons


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalRope:
    """The rotary embedding of layers with a window, where it is another one: its base."""

    key: str | None  # in config.json; None: only rope_parameters can name it
    theta: float  # default


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Everything that this program knows about one family of models.

    Every key of the family's config class in transformers is in exactly one of config_keys, config_facts, config_read and
    HARMLESS_KEYS. A test compares these with the installed class, and config_defaults with its defaults.
    """

    name: str  # Hugging Face model_type
    hf_class: str  # the `architectures` entry of config.json
    models: str  # published models, for the table of families
    rows: tuple[ParamSpec, ...]
    config_keys: Mapping[str, str]  # Shape field -> key of config.json
    config_facts: Mapping[str, tuple[Any, ...]]  # key that changes the logits -> supported values, the usual one first
    config_defaults: Mapping[str, Any]  # transformers' value for a key that config.json lacks; None: it is derived
    config_nullable: frozenset[str] = frozenset({"num_key_value_heads", "head_dim"})  # null: derived, or no window
    config_read: frozenset[str] = frozenset()  # further keys that are supported: rotary embedding, windows
    shape_facts: Mapping[str, Any] = field(default_factory=dict)  # Shape fields that are the same in every model
    config_aliases: Mapping[str, str] = field(default_factory=dict)  # key -> another name that transformers reads it by
    transformer: Mapping[str, Any] = field(default_factory=dict)  # TransformerConfig arguments (see model.build)
    rules: tuple[Rule, ...] = ()
    windows: Windows = Windows()
    rope_theta: float = 10_000.0  # default base of the rotary frequencies
    local_rope: LocalRope | None = None  # None: layers with a window have the same rotary embedding as the others
    embeddings_times_root: bool = False  # whether embeddings are multiplied by sqrt(hidden_size), in their own dtype
    needs_bos: bool = False  # whether predictions are far worse where a sequence does not begin with BOS
    partial_rotary: bool = False  # whether transformers reads partial_rotary_factor for this family
    rotates_pairs_only: bool = False  # whether transformers' class fails with an odd number of rotated channels
    rotary_percent: float = 1.0  # default share of each head's channels that is rotated
    rope_types: Mapping[str, str] | None = (
        None  # types that its config class accepts, and what it takes them for; None: all
    )
    query_growth: str | None = None  # key of the rope with which queries grow with their position (Rope.query_growth)
    unrotated: Unrotated | None = None  # how layers without rotary embedding are chosen; None: there are none
    dense_layers: DenseLayers | None = None  # how layers without experts are chosen; None: there are none

    @property
    def has_experts(self) -> bool:
        """Whether the family's MLPs are mixtures of experts."""
        return any(row.per_expert for row in self.rows)

    @property
    def has_shared_expert(self) -> bool:
        """Whether an expert that processes every token stands next to the others."""
        return any(row.mcore == SHARED_GATE for row in self.rows)

    def templates_of(self, shape: Shape) -> tuple[ParamSpec, ...]:
        """The rows of one model as the table has them; with tied embeddings there is no separate output layer."""
        present = (row for row in self.rows if row.when is None or getattr(shape, row.when))
        return tuple(row for row in present if not (shape.tie_embeddings and row.mcore == OUTPUT))

    def embedding_scale(self, shape: Shape) -> float:
        """The factor between rows of the embedding and the residual stream before the first layer."""
        return shape.embedding_multiplier * (sqrt(shape.hidden_size) if self.embeddings_times_root else 1.0)

    def default_factors(self) -> dict[str, float]:
        """The Shape's FACTORS in a new model of this family."""
        keys = {field: key for field, key in self.config_keys.items() if field in FACTORS}
        return {field: self.config_defaults[key] for field, key in keys.items()}

    def layer_rows(self, shape: Shape, kind: LayerKind) -> tuple[ParamSpec, ...]:
        """The rows of a layer of one of the shape's kinds."""
        return tuple(row for row in self.rows_of(shape) if row.is_in(kind))

    @property
    def has_post_norms(self) -> bool:
        """Whether a norm stands between what a layer computes and the residual stream."""
        return any(row.mcore.endswith("_bda.layernorm.weight") for row in self.rows)

    @property
    def has_pre_norms(self) -> bool:
        """Whether a norm stands between the residual stream and what a layer computes from it."""
        return any(row.mcore == LAYER + "input_layernorm.weight" for row in self.rows)

    @property
    def has_head_norms(self) -> bool:
        """Whether a norm covers each query head and each key head alone."""
        names = (LAYER + "self_attention.q_layernorm.weight", LAYER + "self_attention.k_layernorm.weight")
        return any(row.mcore in names and row.parallel_dim() is None for row in self.rows)

    @property
    def has_projection_norms(self) -> bool:
        """Whether a norm covers all query heads, or all key heads, together."""
        return any("_layernorm" in row.mcore and row.parallel_dim() is not None for row in self.rows)

    def rows_of(self, shape: Shape) -> tuple[ParamSpec, ...]:
        """The rows of one model, with a row of its own for each expert's parameter."""
        found: list[ParamSpec] = []
        for row in self.templates_of(shape):
            found += [row.of_expert(e) for e in range(shape.num_moe_experts)] if row.per_expert else [row]
        return tuple(found)

    def output_name(self, shape: Shape) -> str:
        """Hugging Face name of the output layer's weights, which are the embedding's where they are tied."""
        mcore = EMBEDDING if shape.tie_embeddings else OUTPUT
        return next(name for row in self.rows if row.mcore == mcore for name in row.hf)

    def tensors(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Name and size of every tensor that the rows name."""
        return {name: size for _, parts in self.each_stored(shape) for name, size in parts.items()}

    def each_stored(self, shape: Shape) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
        """Yield every tensor of the Hugging Face checkpoint: its name, and name and size of its parts (usually itself).

        Lazy, because a damaged config may claim a billion layers.
        """
        for row in self.rows_of(shape):
            sizes = row.sizes(shape)
            for i in row.layers(shape):
                parts = {name.format(i=i): size for name, size in sizes.items()}
                if row.stored_as is not None:
                    yield row.stored_as.format(i=i), parts
                else:
                    yield from ((name, {name: size}) for name, size in parts.items())

    def parameters(self, shape: Shape, *, active: bool = False) -> dict[str, int]:
        """Exact parameter counts by part: embedding, output, attention, mlp, norms (tied weights count once).

        Args:
            active: count only those that process one token, which are moe_router_topk experts of each layer.
        """
        counts: dict[str, int] = dict.fromkeys(("embedding", "output", "attention", "mlp", "norms"), 0)
        num_experts = shape.moe_router_topk if active else shape.num_moe_experts
        for row in self.templates_of(shape):
            size = sum(prod(size) for size in row.sizes(shape).values())
            counts[part_of(row.mcore)] += size * row.num_layers(shape) * (num_experts if row.per_expert else 1)
        return counts


EVERY_LAYER = Windows(default=lambda config, i: True, layer_types=False)
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
LAYER = "decoder.layers.{i}."
HF = "model.layers.{i}."
ATTENTION = (  # q, k, v and o of grouped-query attention
    ParamSpec(
        mcore=LAYER + "self_attention.linear_qkv.weight",
        hf={
            HF + "self_attn.q_proj.weight": ("q", "embd"),
            HF + "self_attn.k_proj.weight": ("kv", "embd"),
            HF + "self_attn.v_proj.weight": ("kv", "embd"),
        },
        per_group=True,
    ),
    ParamSpec(mcore=LAYER + "self_attention.linear_proj.weight", hf={HF + "self_attn.o_proj.weight": ("embd", "q")}),
)
POST_NORMS = (  # between a branch and the residual stream
    ParamSpec(mcore=LAYER + "self_attn_bda.layernorm.weight", hf={HF + "post_attention_layernorm.weight": ("embd",)}),
    ParamSpec(mcore=LAYER + "mlp_bda.layernorm.weight", hf={HF + "post_feedforward_layernorm.weight": ("embd",)}),
)
QKV_BIAS = ParamSpec(
    mcore=LAYER + "self_attention.linear_qkv.bias",
    hf={
        HF + "self_attn.q_proj.bias": ("q",),
        HF + "self_attn.k_proj.bias": ("kv",),
        HF + "self_attn.v_proj.bias": ("kv",),
    },
    per_group=True,
)
ATTENTION_BIASES = (  # of q, k, v and o
    replace(QKV_BIAS, when="attention_bias"),
    ParamSpec(
        mcore=LAYER + "self_attention.linear_proj.bias",
        hf={HF + "self_attn.o_proj.bias": ("embd",)},
        when="attention_bias",
    ),
)
GATED_MLP_BIASES = (
    ParamSpec(
        mcore=LAYER + "mlp.linear_fc1.bias",
        hf={HF + "mlp.gate_proj.bias": ("ffn",), HF + "mlp.up_proj.bias": ("ffn",)},
        when="mlp_bias",
    ),
    ParamSpec(mcore=LAYER + "mlp.linear_fc2.bias", hf={HF + "mlp.down_proj.bias": ("embd",)}, when="mlp_bias"),
)
BIAS_KEYS = {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}
BIAS_DEFAULTS = {"attention_bias": False, "mlp_bias": False}
CONFIG_KEYS = {  # common to most families
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
CONFIG_DEFAULTS = {  # common to most families
    "num_key_value_heads": None,
    "head_dim": None,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
ROUTER = LAYER + "mlp.router.weight"
EXPERT = LAYER + "mlp.experts.{e}."
SHARED = LAYER + "mlp.shared_experts."
SHARED_GATE = SHARED + "gate_weight"
ROPE_KEYS = frozenset({"rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings"})
WINDOW_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})
COMMON_FACTS: Mapping[str, tuple[Any, ...]] = {  # config_facts of every family (transformers' masks and base class)
    "is_causal": (True,),
    "per_layer_config": (None, {}),  # a sparse map from layers to other sizes
    "attribute_map": ({},),  # reads one key in place of another
    **dict.fromkeys(("text_config", "decoder", "generator", "text_encoder"), (None,)),  # config of another model
}
HARMLESS_KEYS = frozenset(  # keys of transformers' config classes that do not change the logits
    {
        "transformers_version",
        "architectures",
        "output_hidden_states",
        "return_dict",
        "dtype",
        "chunk_size_feed_forward",  # splits the MLP over positions; these families ignore it
        "is_encoder_decoder",
        "id2label",
        "label2id",
        "problem_type",
        "initializer_range",  # for random initial weights
        "use_cache",
        "pad_token_id",  # zeroes a row of random initial weights only
        "bos_token_id",
        "eos_token_id",
        "pretraining_tp",  # transformers 5 does not read it
        "attention_dropout",  # for training in transformers; this program trains without dropout
        *("residual_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"),  # likewise
        "router_jitter_noise",  # likewise
        "output_router_logits",  # returns them, and adds a loss of transformers' own training
        "router_aux_loss_coef",  # the weight of that loss
    }
)
READ_NORMS = {  # linear -> the norm in front of it
    LAYER + "self_attention.linear_qkv.weight": LAYER + "input_layernorm",
    LAYER + "mlp.linear_fc1.weight": LAYER + "pre_mlp_layernorm",
    ROUTER: LAYER + "pre_mlp_layernorm",
    EXPERT + "linear_fc1.weight": LAYER + "pre_mlp_layernorm",
    SHARED + "linear_fc1.weight": LAYER + "pre_mlp_layernorm",
    SHARED_GATE: LAYER + "pre_mlp_layernorm",
    OUTPUT: "decoder.final_layernorm",
}
FUSED_NORMS = {  # Transformer Engine's layers keep a norm's parameters in the linear that follows it
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def stacked(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Size of the tensor that holds these parts, one range of rows after the other."""
    sizes = list(parts.values())
    return (sum(size[0] for size in sizes), *sizes[0][1:])


def part_of(mcore: str) -> str:
    """The part that a megatron-core parameter is counted in: embedding, output, norms, attention or mlp."""
    marks = {
        EMBEDDING: "embedding",
        OUTPUT: "output",
        "layernorm": "norms",
        "self_attention": "attention",
        "mlp": "mlp",
    }
    return next(part for mark, part in marks.items() if mark in mcore)

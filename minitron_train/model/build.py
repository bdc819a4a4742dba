"""Builds megatron-core's GPTModel from a Shape, with layers that also run on a CPU."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron_train.arch import Shape, architecture
from minitron_train.arch.layer_kind import LayerKind
from minitron_train.arch.pipeline import stage_layers
from minitron_train.arch.table import LAYER
from minitron_train.config import Precision
from minitron_train.model.attention import CappedAttention, LayerAttention, SdpaAttention, window_masks
from minitron_train.model.branch import BranchSum
from minitron_train.model.experts import Experts
from minitron_train.model.fused import GELU_TANH, geglu, squared_relu, swiglu
from minitron_train.model.load import EMBEDDING, OUTPUT, parameters_by_row
from minitron_train.model.norm import Norm, ProjectionNorm
from minitron_train.model.rotary import Rotary
from minitron_train.model.vocabulary import PLAIN, LogitMap, OutputLayer
from minitron_train.parallel.cpu import cuda_means_cpu

# B batch, S sequence, P keys, H hidden

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


class Mlp(MLP):
    """megatron-core's MLP with one function for the whole activation, as megatron-core's fused kernels have on GPUs."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Output [S, B, H] without the second linear's bias, and this bias or None."""
        inner, bias = self.linear_fc1(hidden_states)
        inner = inner if bias is None else inner + bias
        gated = GATED.get(self.activation_func) if self.config.gated_linear_unit else None
        return self.linear_fc2(self.activation_func(inner) if gated is None else gated(inner))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "squared_relu": squared_relu,
    "silu": F.silu,
    "gelu_tanh": GELU_TANH.forward,
}
GATED: dict[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = {F.silu: swiglu, GELU_TANH.forward: geglu}


class LanguageModel(GPTModel):
    """GPTModel whose `forward` returns hidden states, so that callers compute only the logits that they need.

    Attributes:
        num_stages, first_layer: pipeline stages of the whole model, and the number of this stage's first layer in it.
        windows: the different attention windows of the layers.
        embedding_scale: factor of the embeddings.
        logit_map: what the family does to the products with the output weights.
        aligned_output: replaces this rank's rows of the output layer (see `replace_output`).
        real_rows, real_vocab_size: rows of the vocabulary without padding, of this rank and of all tensor-parallel ranks.
    """

    real_rows: int
    real_vocab_size: int
    num_stages: int = 1
    first_layer: int = 0
    rotary_pos_emb: Rotary
    windows: tuple[int | None, ...]
    embedding_scale: float = 1.0
    logit_map: LogitMap = PLAIN
    aligned_output: Tensor | None = None

    def forward(self, tokens_BS: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Final hidden states [S, B, H], after the last norm; under sequence parallelism [S / tp, B, H].

        A pipeline stage continues from what `set_input_tensor` gave it, unless it is the first, and returns the output of
        its last layer.

        Args:
            attention_mask: bool [B, 1, S, S], True hides; None is causal. Windows hide further tokens.
        """
        rotary = self.rotary_pos_emb(tokens_BS.shape[1])
        if attention_mask is not None:
            places_S = torch.arange(tokens_BS.shape[1], device=attention_mask.device)
            attention_mask = window_masks(attention_mask[:, 0], places_S[:, None] - places_S, self.windows)
        hidden_SBH = self.embed(tokens_BS) if self.pre_process else None
        return self.decoder(hidden_states=hidden_SBH, attention_mask=attention_mask, rotary_pos_emb=rotary)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """Input embeddings [S, B, H]; under sequence parallelism [S / tp, B, H]."""
        embedded = self.embedding(input_ids=tokens_BS, position_ids=None)  # positions come in through rotary embeddings
        return embedded if self.embedding_scale == 1 else embedded * self.embedding_scale

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer, [vocab / tp, H]."""
        if self.aligned_output is not None:
            return self.aligned_output
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        assert weight is not None
        return weight

    def replace_output(self, rows_VH: Tensor, real_rows: int) -> None:
        """Give a frozen model other rows of its output layer (`load.share_output_rows`). The embedding stays as it is.

        Args:
            real_rows: the rows after these are padding.
        """
        if self.post_process:
            self.aligned_output, self.real_rows = rows_VH, real_rows
            if not self.share_embeddings_and_output_weights:
                self.output_layer.register_parameter("weight", None)  # frees the rows that nothing reads now

    @property
    def output(self) -> OutputLayer:
        """The output layer, as the function that turns hidden states into this rank's logits."""
        return OutputLayer(self.output_weight, self.logit_map, self.real_rows)

    def logits(self, hidden_SBH: Tensor) -> Tensor:
        """fp32 logits of this rank's part of the vocabulary, [S, B, vocab / tp], from what `forward` returns."""
        if self.config.sequence_parallel:
            return self.output.logits(gather_from_sequence_parallel_region(hidden_SBH))
        return self.output.logits(copy_to_tensor_model_parallel_region(hidden_SBH))


def layer_spec(
    qk_norm: bool = False,
    transformer_engine: bool = False,
    tp_group: ProcessGroup | None = None,
) -> ModuleSpec:
    """The modules of one layer: ours, whose norms and attention hooks can observe, or Transformer Engine's."""
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    spec = get_gpt_layer_local_spec()
    layer: Any = spec.submodules
    attention = layer.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    attention.core_attention = SdpaAttention
    layer.mlp.module, layer.mlp.params = Mlp, {"tp_group": tp_group}  # megatron-core gives it to its own MLP only
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = Norm
    return spec


def family_spec(
    spec: ModuleSpec,
    shape: Shape,
    kind: LayerKind,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    splits_experts: bool,
) -> ModuleSpec:
    """The modules of a layer with those that the rows of the family's table need in place of the usual ones."""
    rows = {row.mcore.removeprefix(LAYER): row for row in architecture(shape.architecture).layer_rows(shape, kind)}
    layer: Any = spec.submodules
    if shape.num_moe_experts and not kind.is_dense:
        expert_groups = {"ep_group": groups.ep, "edp_group": groups.expt_dp} if splits_experts else {}
        layer.mlp = ModuleSpec(module=Experts, params={"tp_group": groups.tp, "shape": shape, **expert_groups})
    for norm in ("input_layernorm", "pre_mlp_layernorm"):
        if f"{norm}.weight" not in rows:
            setattr(layer, norm, IdentityOp)
    for sum_ in ("self_attn_bda", "mlp_bda"):
        arguments = {"multiplier": shape.residual_multiplier, "has_norm": f"{sum_}.layernorm.weight" in rows}
        if arguments != {"multiplier": 1, "has_norm": False}:
            setattr(layer, sum_, ModuleSpec(BranchSum, {"config": config, **arguments}))
    heads = {"q_layernorm": shape.num_attention_heads, "k_layernorm": shape.num_query_groups}
    for norm, num_heads in heads.items():
        row = rows.get(f"self_attention.{norm}.weight")
        if row is not None and row.parallel_dim() is not None:
            arguments = {"num_heads": num_heads, "tp_group": groups.tp}
            setattr(layer.self_attention.submodules, norm, ModuleSpec(ProjectionNorm, arguments))
    if shape.attention_softcap is not None:
        layer.self_attention.submodules.core_attention = functools.partial(
            CappedAttention, softcap=shape.attention_softcap
        )
    return spec


def of_kind(spec: ModuleSpec, shape: Shape, kind: LayerKind) -> ModuleSpec:
    """The layer `spec` with the attention of one of the shape's kinds of layers."""
    if not shape.is_plain(shape.max_position_embeddings):
        attention: Any = spec.submodules.self_attention  # type: ignore[union-attr]
        attention.module, attention.params = LayerAttention, attention.params | {"kind": kind, "shape": shape}
    return spec


PLAIN_KERNELS = dict.fromkeys(
    ("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion", "gradient_accumulation_fusion"), False
)


def transformer_config(
    shape: Shape, *, tp: int, sequence_parallel: bool, dtype: torch.dtype, **extra: Any
) -> TransformerConfig:
    """megatron-core's configuration of one model, with all fused CUDA kernels turned off unless `extra` turns one on."""
    arguments = dict(architecture(shape.architecture).transformer)
    arguments["activation_func"] = ACTIVATIONS[arguments.pop("activation")]
    on_cpu = not torch.cuda.is_available()
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.dense_ffn_hidden_size or shape.ffn_hidden_size,  # experts have their own
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        layernorm_epsilon=shape.layernorm_epsilon,
        softmax_scale=shape.softmax_scale,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel and tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # weights always come from a checkpoint or from arch.init
        use_cpu_initialization=on_cpu,
        **bias_arguments(shape),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        batch_p2p_sync=False,
        **expert_layers(shape),
        **{**PLAIN_KERNELS, **arguments, **extra},
    )


def expert_layers(shape: Shape) -> dict[str, list[int]]:
    """Tell megatron-core where dense layers stand among layers with experts: its checkpoints then stack no layers."""
    mixed = shape.dense_ffn_hidden_size > 0
    return {"moe_layer_freq": [int(not kind.is_dense) for kind in shape.layer_kinds]} if mixed else {}


def fused_arguments(shape: Shape) -> dict[str, bool]:
    """TransformerConfig arguments of the fused kernels for Transformer Engine's layers. This program's own layers take none.

    SwiGLU is fused for silu alone: megatron-core's other kernels compute other functions than the families here. The rotary
    kernel is Transformer Engine's, and takes angles that are not interleaved.
    """
    transformer = architecture(shape.architecture).transformer
    return {
        "bias_activation_fusion": transformer["activation"] == "silu" and transformer["gated_linear_unit"],
        "bias_dropout_fusion": True,
        "apply_rope_fusion": rope_utils.fused_apply_rotary_pos_emb is not None
        and not transformer.get("rotary_interleaved", False),
    }


def embedding_scale(shape: Shape, dtype: torch.dtype) -> float:
    """The factor of the embeddings; a root is rounded to their dtype, as in transformers (Gemma)."""
    table = architecture(shape.architecture)
    scale = table.embedding_scale(shape)
    return torch.tensor(scale, dtype=dtype).item() if table.embeddings_times_root else scale


def logit_map(shape: Shape) -> LogitMap:
    """What the family does to the products with the output weights."""
    return LogitMap(divisor=shape.logits_divisor, softcap=shape.logits_softcap)


LINEAR_BIAS = re.compile(r"\.(linear_\w+)\.bias$")


def bias_arguments(shape: Shape) -> dict[str, bool]:
    """Which linears megatron-core makes with a bias: none, QKV alone, or all (`drop_biases` takes out some of these)."""
    rows = architecture(shape.architecture).rows_of(shape)
    names = {match[1] for row in rows if (match := LINEAR_BIAS.search(row.mcore))}
    return {"add_qkv_bias": "linear_qkv" in names, "add_bias_linear": bool(names - {"linear_qkv"})}


def drop_biases(model: LanguageModel, shape: Shape) -> None:
    """Remove the biases of linears that the family's table has without one."""
    known = {row.mcore for row in architecture(shape.architecture).rows_of(shape)}
    for name, _ in list(model.named_parameters()):
        if LINEAR_BIAS.search(name) and re.sub(r"\.\d+\.", ".{i}.", name, count=1) not in known:
            model.get_submodule(name.removesuffix(".bias")).register_parameter("bias", None)


def build(
    shape: Shape,
    *,
    tp: int = 1,
    tp_group: ProcessGroup | None = None,
    ep: int = 1,
    stage: int = 0,
    num_stages: int = 1,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
    transformer_engine: bool = False,
    **extra: Any,
) -> LanguageModel:
    """Build an uninitialised model on this process's device; model.load.load_weights fills it.

    Args:
        tp: tensor-parallel size. Start megatron-core's groups with this size, or give a `tp_group` of this size.
        ep: expert-parallel size: that of megatron-core's groups, or 1, with which every rank holds all experts.
        stage, num_stages: build one pipeline stage. Start megatron-core's groups with this number of stages. Where embedding
            and output layer are tied, this is collective.
        transformer_engine: use Transformer Engine's fused layers, which need CUDA and the installed package.
        extra: further TransformerConfig arguments, such as recompute_granularity.
    """
    if transformer_engine:
        extra = fused_arguments(shape) | extra
    layers_of_stages = stage_layers(shape.num_layers, num_stages)
    if num_stages > 1:
        extra |= {
            "pipeline_model_parallel_size": num_stages,
            "pipeline_model_parallel_layout": pipeline_layout(layers_of_stages),
        }
    config = transformer_config(shape, tp=tp, sequence_parallel=sequence_parallel, dtype=dtype, **extra)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if tp_group is not None:
        groups.tp = tp_group
    specs = []
    for kind in shape.kinds:
        usual = layer_spec(config.qk_layernorm, transformer_engine, groups.tp)
        specs.append(of_kind(family_spec(usual, shape, kind, config, groups, ep > 1), shape, kind))
    norm: Any = Norm
    layers: Any = [specs[k] for k in shape.kind_of_layer] or specs * shape.num_layers
    own = layers_of_stages[stage]
    block = TransformerBlockSubmodules(layer_specs=layers[own.start : own.stop], layer_norm=norm)
    with cuda_means_cpu():  # tied embeddings in two stages
        model = LanguageModel(
            config,
            block,  # type: ignore[arg-type]
            vocab_size=shape.rank_rows(tp) * tp,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=stage == 0,
            post_process=stage == num_stages - 1,
            position_embedding_type="none",
            share_embeddings_and_output_weights=shape.tie_embeddings,
            pg_collection=groups,
        )
    model.num_stages, model.first_layer = num_stages, own.start
    drop_biases(model, shape)
    model.embedding_scale = embedding_scale(shape, dtype)
    model.logit_map = logit_map(shape)
    model.rotary_pos_emb = Rotary(
        shape, torch.device("cpu" if config.use_cpu_initialization else "cuda"), interleaved=config.rotary_interleaved
    )
    model.windows = shape.windows
    mark_padding(model, shape, groups.tp.rank(), tp)
    if torch.cuda.is_available():
        model.to(torch.cuda.current_device())
    mark_parallel(model, shape)
    return model


def mark_padding(model: LanguageModel, shape: Shape, rank: int, tp: int) -> None:
    """Note how many rows of the vocabulary are no padding, on this tensor-parallel rank and on all of them.

    If any rank has padding, the vocabulary's matrices of every rank get the attribute, because checkpoints need the whole size.
    """
    model.real_rows, model.real_vocab_size = shape.real_rows(rank, tp), shape.vocab_size
    for name, parameter in model.named_parameters() if shape.vocab_size % tp else ():
        if name in (EMBEDDING, OUTPUT):
            setattr(parameter, "real_rows", (model.real_rows, shape.vocab_size))  # noqa: B010  # Parameter declares no such field


def pipeline_layout(layers_of_stages: list[range]) -> list[list[str]]:
    """The same stages in megatron-core's words: the names of the parts of each stage."""
    parts = [["decoder"] * len(layers) for layers in layers_of_stages]
    parts[0].insert(0, "embedding")
    parts[-1].append("loss")
    return parts


def mark_parallel(model: LanguageModel, shape: Shape) -> None:
    """Mark the parameters that are split over the tensor-parallel ranks, so that gradient norms sum over all ranks.

    megatron-core marks only parameters that it initialises itself.
    """
    parameters = parameters_by_row(model)
    for row in architecture(shape.architecture).rows_of(shape):
        dim = row.parallel_dim()
        for i in row.layers(shape) if dim is not None else ():
            parameter = parameters.get(row.mcore.format(i=i))
            if parameter is not None and not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, True, dim, 1)

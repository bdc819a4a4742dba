"""A mixture of experts: a router and the MLPs that it sends tokens to, computed one expert after the other.

megatron-core's MoELayer does not fit here: it trains with tensor parallelism only under sequence parallelism, and it sends
tokens through fused kernels or dispatchers whose experts hooks cannot observe.

Under expert parallelism a rank holds some experts. It gathers the tokens of all ranks of its expert group, computes its own
experts, and each rank gets the sum of its tokens' outputs: the exchange of megatron-core's MoEAllGatherTokenDispatcher.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron_train.arch import Shape
from minitron_train.model.fused import swiglu
from minitron_train.parallel.groups import own_experts

# S sequence, B batch, H hidden, N tokens, M tokens of the whole expert group, E experts, K experts of a token
# T tokens of one expert


class Linear(torch.nn.Module):
    """A matrix without bias, which model.load fills."""

    def __init__(self, config: TransformerConfig, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        empty = torch.empty(num_outputs, num_inputs, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(empty)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T."""
        return F.linear(x, self.weight)


class Expert(torch.nn.Module):
    """A gated MLP, or this tensor-parallel rank's part of its neurons."""

    def __init__(self, config: TransformerConfig, hidden_size: int, num_neurons: int) -> None:
        super().__init__()
        self.linear_fc1 = Linear(config, hidden_size, 2 * num_neurons)
        self.linear_fc2 = Linear(config, num_neurons, hidden_size)

    def forward(self, x_TH: Tensor) -> Tensor:
        """Output [T, H], to be summed over the tensor-parallel ranks."""
        return self.linear_fc2(swiglu(self.linear_fc1(x_TH)))


class SharedExpert(Expert):
    """An expert that processes every token. Its output is multiplied by the sigmoid of a linear of its input.

    Attributes:
        gate_weight: [1, H], the linear, under megatron-core's name.
    """

    def __init__(self, config: TransformerConfig, shape: Shape, tp_group: ProcessGroup | None) -> None:
        width = shape.moe_shared_expert_intermediate_size // config.tensor_model_parallel_size
        super().__init__(config, shape.hidden_size, width)
        self.tp_group, self.gate_weight = tp_group, Linear(config, shape.hidden_size, 1).weight

    def forward(self, x: Tensor) -> Tensor:
        """Output of the size of x, […, H], to be summed over the tensor-parallel ranks."""
        return self.gate(x) * super().forward(x)

    def gate(self, x: Tensor) -> Tensor:
        """The factors of the output, […, 1]. The weight's gradient is summed over the tensor-parallel ranks, as a router's."""
        weight = copy_to_tensor_model_parallel_region(self.gate_weight, self.tp_group)
        return F.sigmoid(F.linear(x, weight))


class WithGradient(torch.autograd.Function):
    """The identity of `x`, whose backward pass gives `loss` the gradient `weight`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        """x; `loss` is a scalar."""
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """The gradients of x and of the loss."""
        return grad, grad.new_tensor(ctx.weight, dtype=torch.float32), None


class Router(Linear):
    """Chooses the experts of every token.

    Attributes:
        balance_weight: gradient of the objective with respect to the load-balancing loss; 0: that loss is not computed.
    """

    def __init__(self, config: TransformerConfig, shape: Shape, tp_group: ProcessGroup | None) -> None:
        super().__init__(config, shape.hidden_size, shape.num_moe_experts)
        self.topk, self.normalised, self.tp_group = shape.moe_router_topk, shape.norm_topk_prob, tp_group
        self.tp_size, self.balance_weight = config.tensor_model_parallel_size, 0.0

    def forward(self, x_NH: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Probabilities and numbers of each token's experts, [N, K] each, in transformers' order of operations.

        Each rank has the gradient of its part of the neurons, and the weight's gradient is summed over the ranks.
        """
        weight = copy_to_tensor_model_parallel_region(self.weight, self.tp_group)
        logits_NE = F.linear(x_NH, weight)
        probs_NE = F.softmax(logits_NE, dim=-1, dtype=torch.float32)
        probs_NK, index_NK = probs_NE.topk(self.topk)
        if self.normalised:
            probs_NK = probs_NK / probs_NK.sum(-1, keepdim=True)
        if self.balance_weight and torch.is_grad_enabled():  # each rank adds its part: the ranks' gradients are summed
            probs_NK = WithGradient.apply(
                probs_NK, balance_loss(probs_NE, index_NK), self.balance_weight / self.tp_size
            )
        return probs_NK.to(x_NH.dtype), index_NK


class Experts(torch.nn.Module):
    """The MLP of a layer with experts. Every tensor-parallel rank holds a part of each expert's neurons.

    Attributes:
        experts: the experts of this rank, by their number among all experts.
        shared_experts: the shared expert, under megatron-core's name, or None. Every rank of an expert group holds it.
        ep_group: the ranks that share the experts; None: every rank holds all of them.
        edp_group: with an ep_group, the ranks that hold the same experts.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: Shape,
        tp_group: ProcessGroup | None,
        ep_group: ProcessGroup | None = None,
        edp_group: ProcessGroup | None = None,
        **_: Any,
    ) -> None:
        super().__init__()  # megatron-core 0.19 gives further arguments to every MLP
        self.tp_group, self.sequence_parallel = tp_group, config.sequence_parallel
        self.ep_group, self.edp_group = ep_group, edp_group
        num_neurons = shape.ffn_hidden_size // config.tensor_model_parallel_size
        self.num_experts = shape.num_moe_experts
        rank, size = (ep_group.rank(), ep_group.size()) if ep_group is not None else (0, 1)
        self.own = own_experts(self.num_experts, rank, size)
        self.router = Router(config, shape, tp_group)
        self.experts = torch.nn.ModuleDict({str(e): Expert(config, shape.hidden_size, num_neurons) for e in self.own})
        has_shared = shape.moe_shared_expert_intermediate_size > 0
        self.shared_experts = SharedExpert(config, shape, tp_group) if has_shared else None
        for parameter in self.experts.parameters() if ep_group is not None else ():
            parameter.allreduce = False  # type: ignore[attr-defined]  # to megatron-core: split over the expert group

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """Output [S, B, H], and no bias. All tokens are routed, padding too."""
        if self.sequence_parallel:
            x_SBH = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            x_SBH = copy_to_tensor_model_parallel_region(hidden_states, self.tp_group)
        out_SBH = self.mixed(x_SBH)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(out_SBH, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(out_SBH, self.tp_group), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """What a checkpoint holds: gate and up are separate tensors, so that the tensor-parallel size can change."""
        values = self.state_dict(prefix="", keep_vars=True)
        split = {name: 0 if "linear_fc1" in name else 1 for name in values if "linear_fc" in name}
        dp_group = (metadata or {}).get("dp_cp_group")
        found: ShardedStateDict = {}
        for of_experts, group in ((False, dp_group), (True, self.edp_group or dp_group)):
            part = {name: value for name, value in values.items() if name.startswith("experts.") == of_experts}
            found |= make_sharded_tensors_for_checkpoint(
                part, prefix, split, sharded_offsets, tp_group=self.tp_group, dp_cp_group=group
            )
        gated = {name: value for name, value in found.items() if "linear_fc1" in name}
        return found | {name: apply_swiglu_sharded_factory(value, sharded_offsets) for name, value in gated.items()}

    def mixed(self, x: Tensor) -> Tensor:
        """The sum of each token's experts by their probabilities, and of the shared one, […, H]; of this rank's neurons."""
        routed = self.routed(x.flatten(0, -2)).view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

    def routed(self, x_NH: Tensor) -> Tensor:
        """The sum of each token's experts by their probabilities, [N, H]; of this rank's neurons."""
        probs_NK, index_NK = self.router(x_NH)
        if self.ep_group is None:
            return self.weighted_sum(x_NH, probs_NK, index_NK)
        gathered = (
            gather_from_sequence_parallel_region(tensor, group=self.ep_group) for tensor in (x_NH, probs_NK, index_NK)
        )
        return reduce_scatter_to_sequence_parallel_region(self.weighted_sum(*gathered), group=self.ep_group)

    def weighted_sum(self, x_MH: Tensor, probs_MK: Tensor, index_MK: Tensor) -> Tensor:
        """The sum over each token's experts on this rank of probability x output, [M, H]."""
        order, counts = by_expert(index_MK, self.num_experts)
        start, counts = sum(counts[: self.own.start]), counts[self.own.start : self.own.stop]
        order = order[start : start + sum(counts)]
        tokens = order // index_MK.shape[1]
        parts = dict(zip(self.experts, x_MH[tokens].split(counts), strict=True))
        # in training, experts without tokens run too, so that each of their weights has a gradient, of zeros
        chosen = [e for e, part in parts.items() if len(part) or torch.is_grad_enabled()] or list(parts)[:1]
        out = torch.cat([self.experts[e](parts[e]) for e in chosen])
        return torch.zeros_like(x_MH).index_add_(0, tokens, out * probs_MK.flatten()[order][:, None])


def balance_loss(probs_NE: Tensor, index_NK: Tensor) -> Tensor:
    """E Σ_e f_e P_e, with f the share of the chosen experts and P the mean probability (arXiv 2101.03961); 1 if even."""
    num_experts = probs_NE.shape[1]
    share_E = index_NK.flatten().bincount(minlength=num_experts) / index_NK.numel()
    return num_experts * (share_E * probs_NE.mean(0)).sum()


def set_balance_weight(model: torch.nn.Module, weight: float) -> None:
    """Set the weight of the load-balancing loss of all routers for the next backward pass."""
    for module in model.modules():
        if isinstance(module, Router):
            module.balance_weight = weight


def by_expert(index_NK: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Positions in the flattened `index_NK`, ordered by expert and then by token, and the number of each expert's."""
    flat = index_NK.flatten()
    return flat.argsort(stable=True), flat.bincount(minlength=num_experts).tolist()

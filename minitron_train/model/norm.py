"""The norms of a layer, which megatron-core has only in Transformer Engine."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron_train.model.fused import rms_norm


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm with optional zero-centred gamma."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.size, self.eps = (hidden_size,), eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        make = {"dtype": config.params_dtype, "device": device}
        self.weight = torch.nn.Parameter(torch.full(self.size, 1.0 - self.offset, **make))
        layer_norm = config.normalization == "LayerNorm"
        self.bias: torch.nn.Parameter | None
        self.register_parameter("bias", torch.nn.Parameter(torch.zeros(self.size, **make)) if layer_norm else None)
        for parameter in self.parameters():  # megatron-core sums these gradients over the tensor-parallel group
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension. The offset is added in fp32: bf16 would round 1 + gain to steps of 0.8 %.

        As Transformer Engine does. torch's CUDA kernels take one dtype only, so there x is widened too.
        """
        if not self.offset or x.dtype == torch.float32:
            weight = self.weight + self.offset if self.offset else self.weight
            return self.normalised(x, weight, self.bias)
        wide = x.float() if x.is_cuda or self.bias is None else x
        bias = None if self.bias is None else self.bias.float()
        return self.normalised(wide, self.weight.float() + self.offset, bias).to(x.dtype)

    def normalised(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """LayerNorm where there is a bias, else RMSNorm."""
        if bias is not None:
            return F.layer_norm(x, self.size, weight, bias, self.eps)
        return rms_norm(x, weight, self.eps)


class ProjectionNorm(torch.nn.Module):
    """RMSNorm over the channels of all query heads, or of all key heads, together (OLMo 2, arXiv 2501.00656).

    Each tensor-parallel rank holds the weights of its heads, and the mean square is that of all ranks' heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        num_heads: int,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.offset = 0.0
        self.eps, self.tp_group, self.num_channels = eps, tp_group, num_heads * hidden_size
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        num_held = self.num_channels // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(num_held, dtype=config.params_dtype, device=device))

    def forward(self, x_SBND: Tensor) -> Tensor:
        """Normalise the heads [S, B, N, D] that this rank holds; computed in fp32."""
        wide = x_SBND.flatten(2).float()
        squares = wide.square().sum(-1, keepdim=True)
        if len(self.weight) < self.num_channels:  # each rank's output depends on the sum, and so on every rank's heads
            squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
            squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        scaled = wide * (squares / self.num_channels + self.eps).rsqrt() * self.weight.float()
        return scaled.to(x_SBND.dtype).view_as(x_SBND)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Megatron-core's description of the weights in a checkpoint: split over the tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"] if metadata else None,
        )

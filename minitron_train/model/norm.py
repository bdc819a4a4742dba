"""The norms of a layer, which megatron-core has only in Transformer Engine."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

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

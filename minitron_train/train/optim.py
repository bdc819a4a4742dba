"""Gradients in, AdamW steps out: megatron-core's DDP and optimizer, the schedule, clipping."""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from minitron_train.config import Precision, Recompute, Schedule, TrainConfig
from minitron_train.model.build import DTYPES, LanguageModel
from minitron_train.parallel import cpu
from minitron_train.planning.hardware import can_shard_optimizer_here

RECOMPUTE: dict[Recompute, dict[str, Any]] = {  # TransformerConfig arguments
    Recompute.none: {},
    Recompute.selective: {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    Recompute.full: {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def student_arguments(train: TrainConfig) -> dict[str, Any]:
    """What model.build needs besides the shape, so that the model can be trained by `Optimizer`.

    With calculate_per_token_loss megatron-core sums gradients over data-parallel ranks: each rank's loss is already
    divided by the global number of tokens.
    """
    return {"dtype": DTYPES[train.precision], "calculate_per_token_loss": True, **RECOMPUTE[train.recompute]}


def learning_rate(train: TrainConfig, tokens: int) -> float:
    """Of the step that begins after `tokens` tokens: linear warm-up from 0, then `train.schedule` down to min_lr."""
    step_tokens = train.step_tokens
    done, warmup, total = tokens + step_tokens, train.warmup_steps * step_tokens, max(train.num_tokens, step_tokens)
    if done <= warmup:
        return train.lr * done / warmup
    if train.schedule is Schedule.constant:
        return train.lr
    progress = min(1.0, (done - warmup) / max(total - warmup, step_tokens))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule is Schedule.cosine else 1 - progress
    return train.min_lr + (train.lr - train.min_lr) * share


class Optimizer:
    """One student under DDP with its AdamW state. Matrices decay; norms and biases (one dimension) do not.

    The distributed optimizer (state split over data-parallel ranks) is the default for several of them where a run can be
    resumed with it: on GPUs with Transformer Engine or Apex. It is not tested there.
    """

    def __init__(self, student: LanguageModel, train: TrainConfig) -> None:
        self.clip_grad = train.clip_grad
        several = parallel_state.get_data_parallel_world_size() > 1
        distributed = train.shards_optimizer(possible=several and can_shard_optimizer_here())
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=distributed,
            overlap_grad_reduce=torch.cuda.is_available(),
        )
        settings = OptimizerConfig(
            lr=train.lr,
            min_lr=train.min_lr,
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_eps=train.adam_eps,
            clip_grad=train.clip_grad,
            bf16=train.precision is Precision.bf16,
            params_dtype=DTYPES[train.precision],
            use_distributed_optimizer=distributed,
        )
        with cpu.cuda_means_cpu():
            self.model = DistributedDataParallel(student.config, ddp, student)
            self.inner: Any = get_megatron_optimizer(settings, [self.model])
        for group in self.inner.param_groups:
            group["fused"] = True  # torch's AdamW in one pass over memory, without a copy of the moments

    def zero_grad(self) -> None:
        """Forget the last step's gradients."""
        self.model.zero_grad_buffer()
        self.inner.zero_grad()

    def no_sync(self) -> AbstractContextManager[Any]:
        """For all micro batches but the last: gradients stay local."""
        return self.model.no_sync()

    def gradient_norm(self) -> float:
        """Sum the gradients over the ranks and return their global L2 norm; NaN or infinite when any of them is."""
        with cpu.cuda_means_cpu():
            finalize_model_grads([self.model])
            found_inf = self.inner.prepare_grads()
            return math.nan if found_inf else float(self.inner.get_grad_norm())

    def step(self, lr: float, gradient_norm: float) -> None:
        """Clip and update; `gradient_norm` is what the method of that name returned, and finite."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        with cpu.cuda_means_cpu():
            if self.clip_grad > 0:
                for part in self.inner.chained_optimizers:
                    clip_grad_by_total_norm_fp32(part.get_parameters(), self.clip_grad, gradient_norm)
            self.inner.step_with_ready_grads()

    def sharded_state_dict(self, model_state: dict[str, Any], loading: bool) -> dict[str, Any]:
        """State as megatron-core's checkpoints want it; sharded state is gathered on the first data-parallel rank alone."""
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": True,
        }
        with cpu.cuda_means_cpu():
            return self.inner.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What dist_checkpointing.load filled."""
        with cpu.cuda_means_cpu():
            self.inner.load_state_dict(state)

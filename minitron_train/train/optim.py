"""The optimizer: megatron-core's DDP and AdamW, the learning-rate schedule, gradient clipping."""

import math
from contextlib import AbstractContextManager
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer

from minitron_train.config import Precision, Recompute, Schedule, TrainConfig
from minitron_train.model.build import DTYPES, LanguageModel
from minitron_train.parallel import cpu
from minitron_train.parallel.copies import sum_copies
from minitron_train.parallel.switches import PLAIN_PATHS, Switches
from minitron_train.train import shards
from minitron_train.train.shards import Held

RECOMPUTE: dict[Recompute, dict[str, Any]] = {  # TransformerConfig arguments
    Recompute.none: {},
    Recompute.selective: {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    Recompute.full: {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def student_arguments(train: TrainConfig, switches: Switches = PLAIN_PATHS) -> dict[str, Any]:
    """Return the arguments of `model.build` that a model needs before `Optimizer` can train it.

    calculate_per_token_loss makes megatron-core sum gradients over data-parallel ranks instead of averaging them. Each
    rank already divides its loss by the global number of tokens.
    """
    return {
        "dtype": DTYPES[train.precision],
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": switches.fused_gradients,
        **RECOMPUTE[train.recompute],
    }


def learning_rate(train: TrainConfig, tokens: int) -> float:
    """Return the learning rate of the step that begins after `tokens` tokens.

    It rises linearly from 0 during warm-up, then follows `train.schedule` down to min_lr.
    """
    step_tokens, (lr, min_lr, warmup_steps) = train.step_tokens, train.rates
    done, warmup, total = tokens + step_tokens, warmup_steps * step_tokens, max(train.num_tokens, step_tokens)
    if done <= warmup:
        return lr * done / warmup
    if train.schedule is Schedule.constant:
        return lr
    progress = min(1.0, (done - warmup) / max(total - warmup, step_tokens))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule is Schedule.cosine else 1 - progress
    return min_lr + (lr - min_lr) * share


class Optimizer:
    """The student under DDP, with its AdamW state. Weight decay applies to matrices, not to norms and biases (1-D).

    With train.distributed_optimizer, several data-parallel ranks shard the state: each updates an equal part of the weights.
    With switches.weight_overlap, the other parts arrive during the next forward pass (`gather_weights`).
    """

    def __init__(self, student: LanguageModel, train: TrainConfig, switches: Switches = PLAIN_PATHS) -> None:
        lr, min_lr, _ = train.rates
        self.clip_grad = train.clip_grad
        self.is_sharded = train.distributed_optimizer and parallel_state.get_data_parallel_world_size() > 1
        self.gathers_late = switches.weight_overlap and self.is_sharded
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=self.is_sharded,
            overlap_grad_reduce=switches.gradient_overlap,
            overlap_param_gather=self.gathers_late,
        )
        settings = OptimizerConfig(
            lr=lr,
            min_lr=min_lr,
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_eps=train.adam_eps,
            clip_grad=train.clip_grad,
            bf16=train.precision is Precision.bf16,
            params_dtype=DTYPES[train.precision],
            use_distributed_optimizer=self.is_sharded,
            overlap_param_gather=self.gathers_late,
        )
        with cpu.cuda_means_cpu():
            self.model = DistributedDataParallel(student.config, ddp, student)
            self.inner: Any = get_megatron_optimizer(settings, [self.model])
        student.config.no_sync_func = self.model.no_sync  # for megatron-core's schedule of pipeline stages
        for group in self.inner.param_groups:
            group["fused"] = True  # torch's AdamW in one pass over memory, without a copy of the moments
        if self.gathers_late:
            # megatron-core's hooks wait for a module's weights, but the loss reads the output weights without their module
            student.register_forward_hook(lambda *_: self.gather_weights())
        shards.create_state(self.parts)

    @property
    def parts(self) -> list[MegatronOptimizer]:
        """megatron-core's optimizers: one, and under expert parallelism another one for the experts."""
        return self.inner.chained_optimizers

    def held(self, part: MegatronOptimizer) -> tuple[list[Held], int, int]:
        """The state in one of `parts`, and this rank's number among those that have this part, and how many they are."""
        of_experts = any(group["is_expert_parallel"] for group in part.param_groups)
        rank, size = (
            (parallel_state.get_expert_data_parallel_rank(), parallel_state.get_expert_data_parallel_world_size())
            if of_experts
            else (parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())
        )
        return shards.held_state([part]), rank, size

    def zero_grad(self) -> None:
        self.model.zero_grad_buffer()
        self.inner.zero_grad()

    def gather_weights(self) -> None:
        """Wait until this rank has all weights of the last update; collective. Only the next forward pass may do without."""
        if self.gathers_late:
            for bucket in (*self.model.bucket_groups, *self.model.expert_parallel_bucket_groups):
                bucket.finish_param_sync(skip_next_bucket_dispatch=True)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Return a context that keeps gradients local. Use it for every micro batch except the last."""
        return self.model.no_sync()

    def gradient_norm(self) -> float:
        """Sum the gradients over the ranks and return their global L2 norm; NaN or infinity if any gradient is not finite."""
        with cpu.cuda_means_cpu():
            finalize_model_grads([self.model])
            sum_copies(self.model.parameters())
            found_inf = self.inner.prepare_grads()
            return math.nan if found_inf else float(self.inner.get_grad_norm())

    def step(self, lr: float, gradient_norm: float) -> None:
        """Clip the gradients and update the weights. `gradient_norm` is the finite value that gradient_norm() returned."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        with cpu.cuda_means_cpu():
            if self.clip_grad > 0:
                for part in self.parts:
                    clip_grad_by_total_norm_fp32([*part.get_parameters()], self.clip_grad, gradient_norm)
            self.inner.step_with_ready_grads()

    def state_to_save(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Return the sharded state dict, `model` and `optimizer`, of the share that this rank saves."""
        share: list[Held] = []
        for held, rank, size in map(self.held, self.parts):
            share += held if self.is_sharded else shards.own_share(held, rank, size)
        return shards.state_to_save(model_state, share)

    def state_to_load(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Return the sharded state dict, `model` and `optimizer`, that a checkpoint fills."""
        state = [(held, 0 if self.is_sharded else rank) for held, rank, _ in map(self.held, self.parts)]
        return shards.state_to_load(model_state, state)

    def load_state_dict(self, template: dict[str, Any], loaded: dict[str, Any], num_updates: int) -> None:
        """Restore the state that `template` asked for, after `num_updates` updates."""
        shards.copy_loaded(template, loaded)
        shards.set_step(self.parts, num_updates)

"""The state of a run, besides weights and optimizer, that the next step depends on."""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker

from minitron_train.parallel.groups import Groups
from minitron_train.train.best import BestMetric
from minitron_train.train.metrics import Metrics, finite


@dataclass(kw_only=True, slots=True)
class RunState:
    """The resumable state of a run. The learning rate is a function of `tokens` and needs no state of its own."""

    step: int = 0  # optimizer steps taken or skipped
    tokens: int = 0  # tokens that went through the student
    num_skipped: int = 0  # steps without an update, because loss or gradient was not finite
    sources: dict[str, int] = field(default_factory=dict)  # sequences drawn from each data source
    stream: list[dict[str, Any]] = field(default_factory=list)  # stream position of each data-parallel rank
    rng: list[dict[str, Any]] = field(default_factory=list)  # random states of each rank
    layout: tuple[int, ...] = (1, 1, 1)  # TP, DP and PP size when `stream` and `rng` were collected
    loss_memory: float | None = None  # distillation.loss_memory.LossMemory.measured
    micro_batch_size: int | None = None  # that `loss_memory` was measured with
    wandb_id: str | None = None  # only in checkpoints from before trackers.json
    hidden_weight: float | None = None  # dynamic weight of the hidden-state loss in the next step
    evaluated_tokens: int = 0  # `tokens` at the last validation
    evaluation: dict[str, float] = field(default_factory=dict)  # results of the last evaluation, by TASK.METRIC
    best: float | None = None  # best value of `best_metric` so far
    best_metric: str | None = None  # metric of `best` and `num_since_best`
    num_since_best: int = 0  # evaluations since the best one
    unevaluated: dict[str, Any] = field(default_factory=dict)  # metrics of this step while its evaluation is pending

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def count(self, tokens: int, sources: Mapping[str, int]) -> None:
        """Count one step: its tokens, and the sequences of each source."""
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        for name, drawn in sources.items():
            self.sources[name] = self.sources.get(name, 0) + drawn

    @property
    def num_updates(self) -> int:
        """Updates of the weights so far, AdamW's `step`."""
        return self.step - self.num_skipped

    @property
    def reported(self) -> int:
        """The last step whose metrics are complete."""
        return self.step - 1 if self.unevaluated else self.step

    @property
    def source_shares(self) -> Metrics:
        """The fraction of all sequences that each source has provided, for the metrics."""
        total = max(1, sum(self.sources.values()))
        return {f"source.{name}": drawn / total for name, drawn in sorted(self.sources.items())}

    def judge(self, evaluation: dict[str, float], metric: BestMetric) -> None:
        """Record the evaluation of this step, and whether it is the best so far."""
        value = metric.value(evaluation)
        if self.best_metric != metric.name:  # a restart may choose another metric
            self.best, self.best_metric, self.num_since_best = None, metric.name, 0
        self.evaluation, self.evaluated_tokens = evaluation, self.tokens
        if metric.rank(value) < metric.rank(self.best):
            self.best, self.num_since_best = value, 0
        else:
            self.num_since_best += 1

    @property
    def is_evaluated(self) -> bool:
        """Whether the current step has been evaluated."""
        return bool(self.evaluation) and self.evaluated_tokens == self.tokens

    @property
    def finite_evaluation(self) -> dict[str, float | None]:
        """The last evaluation, with None for NaN and infinity, which JSON cannot hold."""
        return {name: finite(value) for name, value in self.evaluation.items()}

    def capture(self, groups: Groups, stream: dict[str, Any]) -> None:
        """Gather the stream position and the random states of every rank; collective."""
        mine = {"stream": stream, "rng": rng_state(), "dp_rank": groups.dp_rank}
        everyone: list[Any] = [None] * groups.world_size
        dist.all_gather_object(everyone, mine)
        self.rng = [rank["rng"] for rank in everyone]
        by_dp_rank = {rank["dp_rank"]: rank["stream"] for rank in everyone}
        self.stream = [by_dp_rank[k] for k in range(groups.dp_size)]
        self.layout = (groups.tp_size, groups.dp_size, groups.pp_size)

    def has_layout(self, groups: Groups) -> bool:
        """Whether the checkpoint was saved by as many ranks in the same layout."""
        saved = (*self.layout, 1)[:3]  # earlier versions have saved no PP size
        return saved == (groups.tp_size, groups.dp_size, groups.pp_size)

    def restore(self, groups: Groups) -> dict[str, Any]:
        """Return this rank's stream position, and restore its random states if the parallel layout is unchanged."""
        if self.has_layout(groups):
            set_rng_state(self.rng[groups.rank])
            return self.stream[groups.dp_rank]
        return self.stream[0]


def rng_state() -> dict[str, Any]:
    """Return the random states of Python, torch and megatron-core in this process."""
    state = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "tracker": cast(CudaRNGStatesTracker, get_cuda_rng_tracker()).get_states(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of `rng_state`."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    cast(CudaRNGStatesTracker, get_cuda_rng_tracker()).set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

"""Everything of a run, besides weights and optimizer, that the next step depends on."""

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
    """Where a run stands. The learning rate is a function of `tokens` and needs no state of its own."""

    step: int = 0  # optimizer steps taken or skipped
    tokens: int = 0  # tokens that went through the student
    num_skipped: int = 0  # steps without an update, because something was not finite
    sources: dict[str, int] = field(default_factory=dict)  # sequences drawn from each part of the data
    stream: list[dict[str, Any]] = field(default_factory=list)  # of each data-parallel rank
    rng: list[dict[str, Any]] = field(default_factory=list)  # of each rank
    layout: tuple[int, int] = (1, 1)  # tensor-parallel and data-parallel size that `stream` and `rng` were taken with
    wandb_id: str | None = None
    hidden_weight: float | None = None  # of the hidden-state loss in the next step, where it is dynamic
    evaluated_tokens: int = 0  # at the last validation
    evaluation: dict[str, float] = field(default_factory=dict)  # what the last one gave, by TASK.METRIC
    best: float | None = None  # value of `best_metric` so far
    best_metric: str | None = None  # what `best` and `num_since_best` go by
    num_since_best: int = 0  # evaluations after the best one
    unevaluated: dict[str, Any] = field(default_factory=dict)  # figures of this step, whose evaluation is still to come

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take over saved values."""
        for name, value in values.items():
            setattr(self, name, value)

    def count(self, tokens: int, sources: Mapping[str, int]) -> None:
        """Note one more step: its tokens, and the sequences of each source."""
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        for name, drawn in sources.items():
            self.sources[name] = self.sources.get(name, 0) + drawn

    @property
    def source_shares(self) -> Metrics:
        """What part of the sequences each source gave, for the metrics."""
        total = max(1, sum(self.sources.values()))
        return {f"source.{name}": drawn / total for name, drawn in sorted(self.sources.items())}

    def judge(self, evaluation: dict[str, float], yardstick: BestMetric) -> None:
        """Note what an evaluation at this step gave, and whether it is the best so far."""
        value = yardstick.value(evaluation)
        if self.best_metric != yardstick.name:  # a restart may choose another one
            self.best, self.best_metric, self.num_since_best = None, yardstick.name, 0
        self.evaluation, self.evaluated_tokens = evaluation, self.tokens
        if yardstick.rank(value) < yardstick.rank(self.best):
            self.best, self.num_since_best = value, 0
        else:
            self.num_since_best += 1

    @property
    def is_evaluated(self) -> bool:
        """Whether this very step has been evaluated."""
        return bool(self.evaluation) and self.evaluated_tokens == self.tokens

    @property
    def finite_evaluation(self) -> dict[str, float | None]:
        """The last evaluation for JSON, which has neither NaN nor infinity."""
        return {name: finite(value) for name, value in self.evaluation.items()}

    def capture(self, groups: Groups, stream: dict[str, Any]) -> None:
        """Collect the stream's position and the random states from every rank; collective."""
        mine = {"stream": stream, "rng": rng_state(), "dp_rank": groups.dp_rank, "wandb_id": self.wandb_id}
        everyone: list[Any] = [None] * groups.world_size
        dist.all_gather_object(everyone, mine)
        self.rng = [rank["rng"] for rank in everyone]
        by_dp_rank = {rank["dp_rank"]: rank["stream"] for rank in everyone}
        self.stream = [by_dp_rank[k] for k in range(groups.dp_size)]
        self.wandb_id = everyone[0]["wandb_id"]  # only rank 0 talks to W&B
        self.layout = (groups.tp_size, groups.dp_size)

    def restore(self, groups: Groups) -> dict[str, Any]:
        """Put back the random states when the layout is the same, and return this rank's stream position."""
        if tuple(self.layout) == (groups.tp_size, groups.dp_size):
            set_rng_state(self.rng[groups.rank])
            return self.stream[groups.dp_rank]
        return self.stream[0]


def rng_state() -> dict[str, Any]:
    """Python's, torch's and megatron-core's random states of this process."""
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

"""The training loop: steps, evaluations, checkpoints, and the reaction to signals and failures."""

import contextlib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minitron_train.config import Config, OnNonFinite
from minitron_train.data.prefetch import PrefetchingStream
from minitron_train.data.stream import Batch
from minitron_train.distillation.pipeline import losses_through_stages
from minitron_train.distillation.step import LossSums, Objective, add
from minitron_train.model.build import LanguageModel
from minitron_train.model.experts import set_balance_weight
from minitron_train.parallel.groups import Groups
from minitron_train.parallel.switches import Switches
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.heartbeat import Heartbeat
from minitron_train.runtime.signals import Interrupted, StopSignals
from minitron_train.train.batches import micro_batches, to_device
from minitron_train.train.best import BestMetric
from minitron_train.train.checkpoint import CheckpointManager
from minitron_train.train.hooks import Hook, returned
from minitron_train.train.metrics import Metrics
from minitron_train.train.optim import Optimizer, learning_rate
from minitron_train.train.reporter import Reporter
from minitron_train.train.shards import with_padding
from minitron_train.train.state import RunState
from minitron_train.train.stragglers import Stragglers
from minitron_train.train.validation import Validation

DERIVED = (".teacher", ".kept")  # suffixes of a hook's values that are not the student's own


@dataclass(kw_only=True, slots=True)
class Trainer:
    """The parts of one training run, and the loop over its steps."""

    config: Config
    groups: Groups
    student: LanguageModel
    objective: Objective
    optimizer: Optimizer
    stream: PrefetchingStream
    validation: Validation
    checkpoints: CheckpointManager
    best_metric: BestMetric
    reporter: Reporter
    state: RunState
    heartbeat: Heartbeat
    stragglers: Stragglers
    signals: StopSignals
    switches: Switches
    hooks: list[Hook] = field(default_factory=list)

    @property
    def step_tokens(self) -> int:
        """Tokens of one global batch."""
        return self.config.train.step_tokens

    @property
    def num_steps(self) -> int:
        return self.config.train.num_steps

    @property
    def is_stalled(self) -> bool:
        """Whether the last train.early_stop_evaluations evaluations brought no improvement."""
        patience, state = self.config.train.early_stop_evaluations, self.state
        return 0 < patience <= state.num_since_best and state.best_metric == self.best_metric.name

    @property
    def is_over(self) -> bool:
        """Whether all steps are taken, or training stops early, and no evaluation is pending."""
        return not self.state.unevaluated and (self.state.step >= self.num_steps or self.is_stalled)

    @property
    def is_evaluation_due(self) -> bool:
        """Whether an evaluation follows this step."""
        every, state = self.config.eval.every_tokens, self.state
        passed = every and state.tokens // every > state.evaluated_tokens // every
        return bool(passed or state.unevaluated) or state.step >= self.num_steps

    def run(self) -> str | None:
        """Train to the end or until a signal arrives, and save the last step. Returns the signal's name, or None at the end.

        After a signal, a due evaluation is postponed to the next start, because it may exceed the scheduler's grace period. A
        signal during an evaluation ends it after the current batch.
        """
        if (stop := self.agreed_signal()) is not None and not self.is_over:
            return stop  # the signal arrived while the models loaded, so the last checkpoint is up to date
        self.reporter.resume_clock()
        while not self.is_over:
            row = self.state.unevaluated or self.take_step()
            stop = self.agreed_signal()
            if stop is None and self.is_evaluation_due:
                row |= self.evaluate_or_postpone(row)
                stop = self.agreed_signal()
            if stop is not None and self.is_evaluation_due:
                self.state.unevaluated = row
            else:
                self.reporter.report(self.state.step, row)
            self.save_if_due(last=stop is not None or self.is_over)
            if stop is not None:
                return stop
        if self.is_stalled:
            best, num = f"{self.best_metric.name}={self.state.best}", self.state.num_since_best
            say(f"step {self.state.step}: stopping early: no improvement over {best} in {num} evaluations")
        return None

    def take_step(self) -> Metrics:
        """Train on one global batch and return the step's metrics."""
        self.stragglers.begin(self.state.step + 1)
        self.objective.memory.begin(self.state.step + 1, self.groups.device)
        with self.reporter.waiting_for_data():
            batch = self.stream.next_batch(self.config.train.global_batch_size)
        row = self.forward_backward(batch)
        for hook in self.hooks:
            hook.before_optimizer(self)
        row |= self.update(row, batch)
        self.measure_loss_memory()
        if any(hook.reads_weights for hook in self.hooks):
            self.optimizer.gather_weights()
        for hook in self.hooks:
            row |= returned(hook, "after_step", hook.after_step(self, row))
        return row

    def measure_loss_memory(self) -> None:
        """After the measured step, record the memory of the loss in the run's state."""
        train, memory = self.config.train, self.objective.memory
        num_tokens = train.micro_batch_size * train.seq_length
        memory.end(self.state.step, num_tokens, self.objective.num_rows, self.groups)
        self.state.loss_memory = memory.measured
        self.state.micro_batch_size = train.micro_batch_size

    def forward_backward(self, batch: Batch) -> Metrics:
        """Compute the gradients of the mean loss over the global batch's valid tokens. Returns the mean of each loss part."""
        self.optimizer.zero_grad()
        batch = to_device(batch, self.groups.device)
        num_tokens = batch.mask_BS.count_nonzero().double()
        with self.stragglers.waiting():
            num_tokens = self.groups.sum_over_data(num_tokens).clamp(min=1)
        parts = micro_batches(batch, self.config.train.micro_batch_size)
        weight = self.hidden_weight(parts)
        run = self.run_micro_batches if self.groups.pp_size == 1 else self.run_stages
        means = self.total_over_data(run(parts, weight, num_tokens), num_tokens)
        row: Metrics = means | dict.fromkeys(self.objective.unused)
        if self.objective.hidden is not None:
            row["hidden_weight"] = weight
            if math.isfinite(means["loss"]):
                self.state.hidden_weight = ratio(means["loss"] - weight * means["hidden_loss"], means["hidden_loss"])
        return row

    def run_micro_batches(self, parts: list[Batch], weight: float, num_tokens: Tensor) -> LossSums:
        """Compute the gradients of micro-batches, one after the other. Returns this rank's sum of each loss part."""
        sums: LossSums = {}
        for k, part in enumerate(parts):
            self.balance_experts(part, num_tokens)
            with self.optimizer.no_sync() if k < len(parts) - 1 else contextlib.nullcontext():
                losses = self.objective(part, weight)
                if k == len(parts) - 1:
                    self.stragglers.end()  # the ranks sum their gradients from here on
                (losses.total / num_tokens.to(losses.total.dtype)).backward()
            sums = add(sums, losses.sums)
        return sums

    def run_stages(self, parts: list[Batch], weight: float, num_tokens: Tensor) -> LossSums:
        """Compute the gradients of micro-batches over pipeline stages. Returns the sums over all stages on all of them."""
        found = losses_through_stages(
            self.objective, parts, weight, num_tokens, before=lambda part: self.balance_experts(part, num_tokens)
        )
        self.stragglers.end()
        return found

    def balance_experts(self, part: Batch, num_tokens: Tensor) -> None:
        """Give a micro-batch's load-balancing loss its weight: the configured one x its share of the global batch."""
        weight = self.config.train.router_aux_loss
        if weight is not None:
            share = part.mask_BS.count_nonzero() / num_tokens
            set_balance_weight(self.student, weight * float(share))

    def total_over_data(self, sums: LossSums, num_tokens: Tensor | float = 1.0) -> dict[str, float]:
        """Sum each loss part over the data-parallel ranks and divide it by `num_tokens`; collective."""
        return dict(
            zip(sums, (self.groups.sum_over_data(torch.stack([*sums.values()])) / num_tokens).tolist(), strict=True)
        )

    def hidden_weight(self, parts: list[Batch]) -> float:
        """Return the weight of the hidden-state loss: the configured one, or L_logits / L_is (arXiv 2407.14679 §3).

        The ratio is taken over the previous step's global batch, so that it depends neither on the micro-batch size nor on
        the number of ranks. The first step measures it on its own batch.
        """
        if self.objective.hidden is None:
            return 0.0
        if self.config.distill.hidden_weight is not None:
            return self.config.distill.hidden_weight
        if self.state.hidden_weight is None:
            with torch.no_grad():
                totals = self.total_over_data(self.measured(parts))
            self.state.hidden_weight = ratio(totals["loss"], totals["hidden_loss"])
        return self.state.hidden_weight

    def measured(self, parts: list[Batch]) -> LossSums:
        """Return the sums of micro-batches without gradients and without the weight of the hidden-state loss."""
        if self.groups.pp_size > 1:
            one = torch.ones((), device=self.groups.device)
            return losses_through_stages(self.objective, parts, 0.0, one, forward_only=True)
        sums: LossSums = {}
        for part in parts:
            sums = add(sums, self.objective(part).sums)
        return sums

    def update(self, row: Metrics, batch: Batch) -> Metrics:
        """Take the optimizer step, unless the loss or a gradient is not finite. All ranks make the same decision."""
        lr = learning_rate(self.config.train, self.state.tokens)
        norm = self.optimizer.gradient_norm()
        bad = self.groups.any(not (math.isfinite(row["loss"]) and math.isfinite(norm)))
        if bad:
            self.handle_non_finite(row["loss"], norm, batch)
        else:
            self.optimizer.step(lr, norm)
        self.state.count(self.step_tokens, batch.sources)
        self.heartbeat.step = self.state.step
        self.reporter.count(self.step_tokens)
        return {"tokens": self.state.tokens, "lr": lr, "grad_norm": norm, **self.state.source_shares}

    def handle_non_finite(self, loss: float, norm: float, batch: Batch) -> None:
        """Stop, or skip this update, as train.on_non_finite says. The message names the step and the batch."""
        step, size = self.state.step + 1, self.config.train.global_batch_size
        what = f"step {step}: loss {loss} or gradient norm {norm} is not finite"
        where = f"batch of sequences {self.state.step * size} to {step * size - 1} of the stream ({batch.sources})"
        if self.config.train.on_non_finite is OnNonFinite.stop:
            self.checkpoints.poll(wait=True)  # a checkpoint that is being written precedes this step
            raise UserError(
                f"{what}, {where}; the weights are those of step {step - 1}; lower train.lr, check the data, "
                "or set train.on_non_finite=skip"
            )
        self.state.num_skipped += 1
        say(f"{what}, {where}; skipped this update")

    def evaluate_or_postpone(self, row: Metrics) -> Metrics:
        """Run validation and hooks. If a signal interrupts them, the evaluation stays due.

        If they fail, the step is saved with its metrics `row`, and a restart begins with this evaluation. With several
        ranks this happens only for a UserError: after another error, such as a lack of memory, one rank may have failed
        alone, and the save is collective.
        """
        state = self.state
        is_saved, state.unevaluated = bool(state.unevaluated), {}
        try:
            return self.evaluate()
        except Interrupted:
            state.unevaluated = row
            return {}
        except Exception as error:
            if not is_saved and (isinstance(error, UserError) or self.groups.world_size == 1):
                state.unevaluated = row
                self.save(wait=True)
            raise

    def evaluate(self) -> Metrics:
        """Run validation and hooks, and compare the result with the best one so far."""
        self.optimizer.gather_weights()
        state, found = self.state, self.validation(self.is_stopped)
        for hook in self.hooks:
            found |= returned(hook, "evaluate", hook.evaluate(self))
        values = {name.removeprefix("eval."): value for name, value in found.items()}
        state.judge({name: value for name, value in values.items() if not name.endswith(DERIVED)}, self.best_metric)
        for hook in self.hooks:
            hook.after_evaluation(self, found)
        self.reporter.resume_clock()
        return found

    def is_stopped(self) -> bool:
        """Whether a signal has arrived at a rank that computes with this one, so that an evaluation must end."""
        return self.groups.any_shard(self.signals.received is not None)

    def agreed_signal(self) -> str | None:
        """Return a signal that any rank has received, so that all ranks stop at the same step; collective."""
        if not self.groups.any(self.signals.received is not None):
            return None
        return self.signals.received or "a signal to another rank"

    def save_if_due(self, *, last: bool) -> None:
        """Save every checkpoint.interval_steps, after a new best evaluation, and at the last step, which is waited for."""
        state, settings = self.state, self.config.checkpoint
        is_best = state.is_evaluated and state.num_since_best == 0 and settings.keep_best > 0
        if not (last or is_best or state.step % settings.interval_steps == 0):
            self.checkpoints.poll()
            return
        good = self.save(wait=last)
        if last and not good:
            raise UserError(
                f"{self.checkpoints.folder}: the last checkpoint could not be written; free disk space and run again"
            )

    def save(self, *, wait: bool) -> bool:
        """Save a checkpoint of this step. Returns False if it has already failed."""
        state = self.state
        state.capture(self.groups, self.stream.state_dict())
        facts = {"tokens": state.tokens, "evaluation": state.finite_evaluation if state.is_evaluated else {}}
        sharded = self.optimizer.state_to_save(self.student.sharded_state_dict()) | {"run": state.state_dict()}
        return self.checkpoints.save(state.step, sharded, facts, wait=wait)

    def resume(self) -> None:
        """Resume from the newest undamaged checkpoint, if one exists."""
        template = self.optimizer.state_to_load(self.student.sharded_state_dict())
        loaded = self.checkpoints.load(template)
        if loaded is None:
            return
        self.state.load_state_dict(loaded["run"])
        weights = with_padding(loaded["model"], dict(self.student.named_parameters()))
        self.student.load_state_dict(weights)
        self.optimizer.load_state_dict(template["optimizer"], loaded["optimizer"], self.state.num_updates)
        is_alike = (
            self.state.has_layout(self.groups) and self.state.micro_batch_size == self.config.train.micro_batch_size
        )
        self.objective.memory.measured = self.state.loss_memory if is_alike else None
        self.stream.load_state_dict(self.state.restore(self.groups))
        say(f"resumed at step {self.state.step} of {self.num_steps}")


def ratio(logits: float, hidden: float) -> float:
    """Return the weight that makes both losses equal; 0 if the ratio is not finite or the hidden-state loss is 0."""
    return logits / hidden if hidden > 0 and math.isfinite(logits / hidden) else 0.0

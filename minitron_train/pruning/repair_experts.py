"""Least-squares repair of a layer with experts, each fitted on the tokens that the student's router sends to it.

    router         the teacher's logits of the kept experts
    shared gate    the teacher's products, before the sigmoid
    linear_fc1     the outputs of the teacher's same expert for the same tokens, wherever the teacher sends them
    linear_fc2     what the teacher's and the student's residual stream differ by, given the outputs of all other experts

The experts' linear_fc2 are fitted one after the other. Each fit can only lower the error, and so the kept experts take over
what dropped ones did. An expert that sees too few tokens keeps its cut weights. A shared expert sees all tokens and is fitted
first.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minitron_train.config import PruneConfig, Refit
from minitron_train.model.experts import Experts, Linear, SharedExpert, by_expert
from minitron_train.model.fused import swiglu
from minitron_train.parallel.groups import Groups
from minitron_train.planning.stages import TOKENS_PER_INPUT
from minitron_train.pruning.least_squares import LeastSquares
from minitron_train.pruning.select import Keep
from minitron_train.runtime.console import say

# N tokens without padding, T tokens of one expert, D teacher's hidden, H student's hidden, F the student's neurons


@dataclass(slots=True)
class Routed:
    """One micro-batch in front of a layer's experts, without padding; `route` fills the last three."""

    teacher_ND: Tensor  # normalised stream
    student_NH: Tensor
    weight_N: Tensor  # in the least squares
    tokens: tuple[Tensor, ...] = ()  # by expert: the tokens that the student's router sends to it
    probs: tuple[Tensor, ...] = ()  # by expert: their router probabilities
    lacking_NH: Tensor = field(default_factory=lambda: torch.empty(0))  # what the student's experts do not give yet

    def route(self, experts: Experts) -> None:
        """Sort the tokens by the student's experts."""
        probs_NK, index_NK = experts.router(self.student_NH)
        order, counts = by_expert(index_NK, experts.num_experts)
        self.tokens = (order // index_NK.shape[1]).split(counts)
        self.probs = probs_NK.flatten()[order].split(counts)


class ExpertFits:
    """Fits the layers of one repair, and counts the experts that saw too few tokens."""

    def __init__(self, keep: Keep, prune: PruneConfig, groups: Groups) -> None:
        self.keep, self.prune, self.groups = keep, prune, groups
        self.num_experts, self.num_unfitted = 0, 0

    def fit_inputs(self, teacher: Experts, student: Experts, layer: int, batches: list[Routed]) -> None:
        """Fit the router and each expert's first linear, if prune.refit asks for it; then route the student's tokens."""
        kept = self.keep.experts[layer].tolist()
        if self.prune.refit is Refit.all:
            squares = self._squares(student.router)
            for batch in batches:
                logits_NE = (batch.teacher_ND @ teacher.router.weight.t())[:, kept]
                squares.add(batch.student_NH, logits_NE, batch.weight_N)
            self._solve(student.router, squares)
            self._fit_shared_inputs(teacher, student, layer, batches)
        for batch in batches:
            batch.route(student)
        for e, before in enumerate(kept) if self.prune.refit is Refit.all else ():
            whole, cut = (model.experts[str(k)].linear_fc1 for model, k in ((teacher, before), (student, e)))
            self._fit_first(whole, cut, layer, e, batches)  # type: ignore[arg-type]

    def _fit_shared_inputs(self, teacher: Experts, student: Experts, layer: int, batches: list[Routed]) -> None:
        """Fit the shared expert's gate and first linear, if there is one."""
        whole, cut = teacher.shared_experts, student.shared_experts
        if whole is None or cut is None:
            return
        gate = LeastSquares(cut.gate_weight.shape[1], 1, self.groups)
        for batch in batches:
            gate.add(batch.student_NH, batch.teacher_ND @ whole.gate_weight.t(), batch.weight_N)
        cut.gate_weight.copy_(gate.solve(cut.gate_weight, self.prune.ridge))
        neurons = self.keep.shared[layer].to(self.groups.device)
        rows = torch.cat([neurons, self.keep.teacher.moe_shared_expert_intermediate_size + neurons])  # gate, then up
        squares = self._squares(cut.linear_fc1)
        for batch in batches:
            squares.add(batch.student_NH, whole.linear_fc1(batch.teacher_ND)[:, rows], batch.weight_N)
        self._solve(cut.linear_fc1, squares)

    def _fit_shared_output(self, shared: SharedExpert, batches: list[Routed]) -> None:
        """Fit the shared expert's second linear to what the layer lacks, and take what it adds off that."""
        second, inputs = shared.linear_fc2, []
        squares, old = self._squares(second), second.weight.clone()
        for batch in batches:
            x_NF = swiglu(shared.linear_fc1(batch.student_NH)) * shared.gate(batch.student_NH)
            squares.add(x_NF, batch.lacking_NH + x_NF @ old.t(), batch.weight_N)
            inputs.append(x_NF)
        self._solve(second, squares)
        for batch, x_NF in zip(batches, inputs, strict=True):
            batch.lacking_NH -= x_NF @ (second.weight - old).t()

    def _fit_first(self, teacher: Linear, student: Linear, layer: int, e: int, batches: list[Routed]) -> None:
        if not self._sees_enough(e, batches, student):
            return
        neurons = self.keep.ffn[layer][e].to(self.groups.device)
        rows = torch.cat([neurons, self.keep.teacher.ffn_hidden_size + neurons])  # gate, then up
        squares = self._squares(student)
        for batch in batches:
            tokens = batch.tokens[e]
            wanted = teacher(batch.teacher_ND[tokens])[:, rows]
            squares.add(batch.student_NH[tokens], wanted, batch.weight_N[tokens])
        self._solve(student, squares)

    def fit_outputs(self, student: Experts, batches: list[Routed], wanted: list[Tensor]) -> None:
        """Fit each expert's second linear; `wanted` is what the layer must add to each micro-batch's stream, [N, H]."""
        if self.prune.refit is Refit.none:
            return
        for batch, wanted_NH in zip(batches, wanted, strict=True):
            batch.lacking_NH = wanted_NH - student.mixed(batch.student_NH)
        if student.shared_experts is not None:
            self._fit_shared_output(student.shared_experts, batches)
        for e, expert in enumerate(student.experts.values()):
            first: Linear = expert.linear_fc1  # type: ignore[assignment]
            second: Linear = expert.linear_fc2  # type: ignore[assignment]
            self.num_experts += 1
            if not self._sees_enough(e, batches, second):
                self.num_unfitted += 1
                continue
            squares, inputs, old = self._squares(second), [], second.weight.clone()
            for batch in batches:
                tokens = batch.tokens[e]
                x_TF = swiglu(first(batch.student_NH[tokens])) * batch.probs[e][:, None]
                squares.add(x_TF, batch.lacking_NH[tokens] + x_TF @ old.t(), batch.weight_N[tokens])
                inputs.append(x_TF)
            self._solve(second, squares)
            for batch, x_TF in zip(batches, inputs, strict=True):
                batch.lacking_NH[batch.tokens[e]] -= x_TF @ (second.weight - old).t()

    def report(self) -> None:
        """Print one line if experts saw too few tokens."""
        if self.num_unfitted:
            say(
                f"prune.refit: {self.num_unfitted} of {self.num_experts} experts see fewer than {TOKENS_PER_INPUT} tokens "
                "per neuron and keep their cut weights; raise calibration.num_samples and prune.repair_tokens to fit them"
            )

    def _sees_enough(self, e: int, batches: list[Routed], linear: Linear) -> bool:
        """Whether an expert of all processes' tokens sees enough for the inputs of one of its linears; collective."""
        count = torch.tensor(float(sum(len(batch.tokens[e]) for batch in batches)), device=self.groups.device)
        return float(self.groups.sum(count)) >= TOKENS_PER_INPUT * linear.weight.shape[1]

    def _squares(self, linear: Linear) -> LeastSquares:
        return LeastSquares(linear.weight.shape[1], linear.weight.shape[0], self.groups)

    def _solve(self, linear: Linear, squares: LeastSquares) -> None:
        linear.weight.copy_(squares.solve(linear.weight, self.prune.ridge))

"""Closed-form repair of a pruned model: least squares against the teacher, one layer after the other.

Teacher and student process the same tokens, one layer at a time. In every layer the linears are fitted in the order in
which they run. Their inputs are the activations of the student as repaired so far. Their targets are:

    linear_qkv, linear_fc1      the teacher's outputs of the kept heads and neurons
    linear_proj, linear_fc2     the difference between the teacher's and the student's residual stream, at kept channels

So kept parts compensate for dropped parts as far as they predict them, and errors do not accumulate over the layers. The
linear_fc2 before a dropped layer also compensates for that layer; dropped first layers are compensated by the linears
after them. Where embeddings are not tied, the output layer is fitted last. Memory: one layer of each model, two residual
streams of all tokens, one Gram matrix.

Some families have a norm between the second linear and the stream (a post-norm). It fixes the size of what a layer adds, so the
linear cannot close an arbitrary gap. Its target is then the teacher's output before that norm, at kept channels. Dropped layers
are not compensated there.

No linear is fitted to the last `prune.held_out_fraction` of the sequences. Each linear's ridge is the one with the least error on
them. Experts and their router take prune.ridge.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from minitron_train.arch.convert import pack, shards_to_parts
from minitron_train.arch.table import OUTPUT, ParamSpec
from minitron_train.config import PruneConfig, Refit
from minitron_train.model.norm import Norm
from minitron_train.pruning.basis import effective_gamma
from minitron_train.pruning.halves import HALVES, Half, forward
from minitron_train.pruning.layers import Layers, seeing, seeing_all
from minitron_train.pruning.least_squares import HeldOutRidge
from minitron_train.pruning.repair_experts import ExpertFits, Routed
from minitron_train.pruning.select import Keep
from minitron_train.pruning.slice import VOCABULARY_ROWS
from minitron_train.pruning.target import check_enough, num_held_out
from minitron_train.runtime.console import progress

# S sequence, B batch, D teacher's hidden, H student's hidden, N tokens, I inputs, O outputs

TOKEN_WEIGHT_POWER = 0.75  # a token's weight is rms(stream)^-0.75, because first tokens are 100 times larger
REFITTED = {
    Refit.none: (),
    Refit.outputs: ("linear_proj", "linear_fc2"),
    Refit.all: ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
}


@dataclass(slots=True)
class Streams:
    """The residual streams of one micro-batch, [S, B, D] and [S, B, H]."""

    teacher: Tensor
    student: Tensor
    mask: Tensor  # [S, B], False at padding
    fitted: Tensor  # [N], False at held-out tokens, to which no linear is fitted

    def weight(self) -> Tensor:
        """Weight of every token in the least squares, [N]."""
        rms = self.teacher[self.mask].float().square().mean(-1).sqrt()
        return rms.clamp(min=1e-6).pow(-TOKEN_WEIGHT_POWER)


Case = tuple[Tensor, Tensor, Tensor | None]
# input and wanted output of a linear, [S, B, …], and by what an error of the output is divided later, [S, B]; None: 1


class Repair:
    """Runs teacher and student over `tokens_NS` and yields the student's repaired tensors.

    Both must hold whole layers (no tensor parallelism). The processes share the sequences and find the same weights.

    Raises:
        UserError: there are too few tokens for the widest linear.
    """

    def __init__(
        self,
        teacher: Layers,
        student: Layers,
        keep: Keep,
        prune: PruneConfig,
        tokens_NS: Tensor,
        micro_batch_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.teacher, self.student, self.keep, self.prune = teacher, student, keep, prune
        self.dtype = dtype  # in which both models multiply matrices; their streams are fp32
        is_fitted_N = torch.arange(len(tokens_NS)) < len(tokens_NS) - num_held_out(prune, len(tokens_NS))
        check_enough(int((tokens_NS[is_fitted_N] >= 0).sum()), keep.student, prune)
        self.has_held_out = not bool(is_fitted_N.all())
        self.groups = groups = teacher.groups
        parts = zip(*(groups.own_parts(rows, micro_batch_size) for rows in (tokens_NS, is_fitted_N)), strict=True)
        self.streams = [
            Streams(teacher.embed(batch), student.embed(batch), mask, fitted.expand_as(mask)[mask])
            for batch, fitted in parts
            for mask in [(batch >= 0).t()]
        ]
        self.kept = keep.embedding.to(groups.device)
        self.down_DH = None if keep.basis is None else keep.basis.down_DH.to(groups.device)
        self.teacher_rotary, self.rotary = (layers.rotary(tokens_NS.shape[1]) for layers in (teacher, student))
        self.expert_fits = ExpertFits(keep, prune, groups)
        # of the teacher's norms inside the current half: their denominators, [S, B] per micro-batch
        self.sizes: dict[str, list[Tensor]] = {}
        self.outputs: list[Tensor] = []  # of its second linear where a norm follows, kept channels, [S, B, H] each
        self.rows = {
            row.mcore.split("{i}.")[-1]: row for row in teacher.table.templates_of(teacher.shape) if row.per_layer
        }

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield Hugging Face name and value of every tensor of the student's layers, last norm and output layer.

        The output layer comes in blocks of rows, and on the first process alone.
        """
        kept, shape = self.keep.layers.tolist(), self.keep.student
        self._advance_teacher_over(range(kept[0]))
        for i, layer in progress(enumerate(kept), "repair", len(kept)):
            absorbed = range(layer + 1, kept[i + 1] if i + 1 < len(kept) else self.keep.teacher.num_layers)
            attention, mlp = HALVES
            self._repair_half(attention, i, layer, range(0))
            if layer in self.keep.experts:
                self._repair_experts(mlp, i, layer, absorbed)
            else:
                self._repair_half(mlp, i, layer, absorbed)
            yield from self._parts(self.student[i], self.student.table.layer_rows(shape, shape.layer_kinds[i]), i)
        self.expert_fits.report()
        yield from self._last()

    def _parts(self, module: torch.nn.Module, rows: Iterable[ParamSpec], i: int) -> Iterator[tuple[str, Tensor]]:
        for row in rows:
            name = row.mcore.split("{i}.")[-1] if row.per_layer else row.mcore.removeprefix("decoder.final_layernorm.")
            shards = [module.get_parameter(name).detach()]
            for part, tensor in shards_to_parts(row, self.keep.student, shards).items():
                yield part.format(i=i), tensor.clone()  # the next layer overwrites the module's weights

    def _repair_half(self, half: Half, i: int, layer: int, absorbed: range) -> None:
        """Fit both linears of one half, then advance both streams; the teacher's also through the `absorbed` layers."""
        teacher, student, keep = self.teacher[layer], self.student[i], self.keep
        student_norm = student.get_submodule(half.norm)
        inner, outer = half.inner_norms(student)
        rows = kept_rows(self.rows[f"{half.first}.weight"], keep, layer).to(self.groups.device)
        if self.prune.norm_scale and isinstance(student_norm, Norm):
            self._scale(student_norm)
        wanted = self._advance_teacher(teacher, half)
        if self._fits(half.first):
            cases = (
                (student_norm(streams.student), y[..., rows], None)
                for streams, y in zip(self.streams, wanted, strict=True)
            )
            self._fit(student.get_submodule(half.first), cases)
        for _ in wanted:  # advances the micro-batches that the fit did not use
            pass
        self._scale_inside(student, half, inner)
        self._advance_teacher_over(absorbed)
        if self._fits(half.second):
            self._fit(student.get_submodule(half.second), self._lacking(student, half))
        self._scale_inside(student, half, outer)
        for streams in self.streams:
            streams.student = half.forward(student, streams.student, self.rotary, self.dtype)

    def _repair_experts(self, half: Half, i: int, layer: int, absorbed: range) -> None:
        """Fit router and experts, then advance both streams; the teacher's also through the `absorbed` layers."""
        teacher, student, fits = self.teacher[layer], self.student[i], self.expert_fits
        before: Norm = teacher.get_submodule(half.norm)  # type: ignore[assignment]
        after: Norm = student.get_submodule(half.norm)  # type: ignore[assignment]
        if self.prune.norm_scale:
            self._scale(after)
        batches = [
            Routed(before(s.teacher[s.mask]), after(s.student[s.mask]), s.weight() * s.fitted) for s in self.streams
        ]
        fits.fit_inputs(teacher.mlp, student.mlp, layer, batches)  # type: ignore[arg-type]
        for streams in self.streams:
            streams.teacher = half.forward(teacher, streams.teacher, self.rotary, self.dtype)
        self._advance_teacher_over(absorbed)
        lacking = [(self._narrow(s.teacher) - s.student)[s.mask] for s in self.streams]
        fits.fit_outputs(student.mlp, batches, lacking)  # type: ignore[arg-type]
        for streams in self.streams:
            streams.student = half.forward(student, streams.student, self.rotary, self.dtype)

    def _advance_teacher_over(self, dropped: range) -> None:
        """Advance the teacher's streams through layers that the student does not have."""
        for layer in dropped:
            module = self.teacher[layer]
            for streams in self.streams:
                streams.teacher = forward(module, streams.teacher, self.teacher_rotary, self.dtype)

    def _advance_teacher(self, teacher: torch.nn.Module, half: Half) -> Iterator[Tensor]:
        """Advance the teacher's streams through one half; yields its first linear's output for each micro-batch."""
        linear: Any = teacher.get_submodule(half.first)
        later_bias = linear.bias if linear.skip_bias_add else None  # megatron-core's MLP adds it after the linear
        norms = list(chain(*half.inner_norms(teacher)))
        self.sizes, self.outputs = {name: [] for name in norms}, []
        for streams in self.streams:
            with seeing(linear, of_input=False) as seen, seeing_all(teacher, norms) as inputs:
                streams.teacher = half.forward(teacher, streams.teacher, self.teacher_rotary, self.dtype)
            for name in norms:
                self.sizes[name].append(size(inputs[name][0], teacher.get_submodule(name)))
            if half.outer in norms:
                self.outputs.append(self._narrow(inputs[half.outer][0]))
            yield seen[0] if later_bias is None else seen[0] + later_bias

    def _lacking(self, student: torch.nn.Module, half: Half) -> Iterator[Case]:
        """Yield the second linear's input and its target output for each micro-batch.

        Without a norm between the linear and the stream, the target closes the gap between the two streams. With one, the
        target is the teacher's output before its norm. An error of it changes the stream by its part 1 / σ.
        """
        branch = half.branch(student)
        for k, streams in enumerate(self.streams):
            with seeing(student.get_submodule(half.second), of_input=True) as seen:
                half.forward(student, streams.student, self.rotary, self.dtype)
            if branch is not None and branch.layernorm is not None:
                yield seen[0], self.outputs[k], self.sizes[half.outer][k]
            else:
                gap = self._narrow(streams.teacher) - streams.student
                yield seen[0], gap if branch is None else gap / branch.multiplier, None

    def _narrow(self, stream_SBD: Tensor) -> Tensor:
        """The teacher's residual stream, reduced to the student's channels or directions."""
        return stream_SBD[..., self.kept] if self.down_DH is None else stream_SBD @ self.down_DH

    def _fits(self, name: str) -> bool:
        return name.split(".")[-1] in REFITTED[self.prune.refit]

    def _fit(self, linear: Any, cases: Iterable[Case]) -> None:
        """Fit a linear's weights to the cases of all micro-batches. Its bias is kept."""
        weight, bias = linear.get_parameter("weight"), linear.bias
        squares = self._squares(weight.shape[1], weight.shape[0])
        for streams, (x, y, scale_SB) in zip(self.streams, cases, strict=True):
            y = y if bias is None else y - bias
            token_weight = streams.weight() if scale_SB is None else streams.weight() / scale_SB[streams.mask].square()
            squares.add(x[streams.mask], y[streams.mask], token_weight, streams.fitted)
        weight.copy_(squares.solve(weight, self.prune.ridge))

    def _squares(self, inputs: int, outputs: int) -> HeldOutRidge:
        return HeldOutRidge(inputs, outputs, self.groups, has_held_out=self.has_held_out)

    def _scale(self, norm: Norm) -> None:
        """Rescale a norm, because pruning changes its denominator, and for LayerNorm its mean too.

        Let σ be the RMS (LayerNorm: the standard deviation) and µ the mean over channels. Effective weights become
        γ mean(σ_student / σ_teacher). Biases increase by γ mean((µ_student - µ_teacher) / σ_teacher). With a rotated stream,
        biases need no correction, and norms already contain an estimate of the factor. With refit, σ_student and µ_student
        are measured on the student's own stream. Without refit, they are measured on the teacher's stream at the kept
        channels, since factors from a student's stream that has drifted would increase the drift.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self.groups.device)
        for streams in self.streams:
            cut = self._narrow(streams.teacher) if self.prune.refit is Refit.none else streams.student
            (mean_t, scale_t), (mean_s, scale_s) = (
                channel_moments(x[streams.mask].float(), centred=norm.bias is not None) for x in (streams.teacher, cut)
            )
            ratios = torch.stack([scale_s / scale_t, (mean_s - mean_t) / scale_t, torch.ones_like(scale_t)])
            sums += ratios.double().sum(1)
        self.groups.sum(sums)
        stretch, shift = (sums[:2] / sums[2]).tolist()
        basis = self.keep.basis
        gamma = (norm.weight + norm.offset) / (1.0 if basis is None else basis.norm)
        norm.weight.copy_(gamma * stretch - norm.offset)
        if norm.bias is not None and basis is None:
            norm.get_parameter("bias").add_(gamma * shift)

    def _scale_inside(self, student: torch.nn.Module, half: Half, names: Sequence[str]) -> None:
        """Rescale norms inside a half, as `_scale`: σ is measured on the activations of both models."""
        if not (names and self.prune.norm_scale):
            return
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=self.groups.device)
        for k, streams in enumerate(self.streams):
            with seeing_all(student, names) as inputs:
                half.forward(student, streams.student, self.rotary, self.dtype)
            sizes = [size(inputs[name][0], student.get_submodule(name)) / self.sizes[name][k] for name in names]
            sums += torch.stack([ratio[streams.mask].double().sum() for ratio in (*sizes, torch.ones_like(sizes[0]))])
        self.groups.sum(sums)
        for name, stretch in zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True):
            norm: Any = student.get_submodule(name)
            norm.weight.copy_((norm.weight + norm.offset) * stretch - norm.offset)

    def _last(self) -> Iterator[tuple[str, Tensor]]:
        """The last norm and, where embeddings are not tied, the output layer."""
        table, norm = self.student.table, self.student.final_norm
        if self.prune.norm_scale:
            self._scale(norm)
        yield from self._parts(norm, [row for row in table.rows if row.mcore.startswith("decoder.final")], 0)
        if self.prune.refit is Refit.all and not self.keep.student.tie_embeddings:
            yield from self._output_layer()

    def _output_layer(self) -> Iterator[tuple[str, Tensor]]:
        """logits = W y with y the teacher's last norm: W' = W R, where R fits y to the student's last norm."""
        hidden, teacher_hidden = self.keep.student.hidden_size, self.keep.teacher.hidden_size
        squares = self._squares(hidden, teacher_hidden)
        for streams in self.streams:
            x, y = self.student.final_norm(streams.student), self.teacher.final_norm(streams.teacher)
            squares.add(x[streams.mask], y[streams.mask], torch.ones_like(streams.weight()), streams.fitted)
        start = torch.zeros(teacher_hidden, hidden, device=self.groups.device)
        if self.keep.basis is None:
            start[self.keep.embedding, torch.arange(hidden)] = 1.0
        else:
            start = effective_gamma(self.teacher)[:, None] * self.keep.basis.up_DH.to(start)
        fitted = squares.solve(start, self.prune.ridge)
        vocabulary = range(self.keep.teacher.vocab_size) if self.groups.is_first else range(0)
        for start in vocabulary[::VOCABULARY_ROWS]:
            rows = self.teacher.output_layer(start, min(start + VOCABULARY_ROWS, len(vocabulary))).weight_VH
            yield self.teacher.tensor_name(OUTPUT), rows @ fitted


def size(x: Tensor, norm: Any) -> Tensor:
    """The denominator of an RMSNorm at every token, [S, B]: x is [S, B, …], and all but its first two dimensions count."""
    return (x.flatten(2).float().square().mean(-1) + norm.eps).sqrt()


def channel_moments(x_NC: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over channels of every token, [N] each; not `centred`: zero and the RMS."""
    mean = x_NC.mean(-1) if centred else torch.zeros_like(x_NC[:, 0])
    return mean, (x_NC - mean[:, None]).square().mean(-1).sqrt()


def kept_rows(row: ParamSpec, keep: Keep, layer: int) -> Tensor:
    """The position in the teacher's fused parameter of each row of the student's (see arch.convert.pack)."""
    parts, start, teacher = [], 0, keep.teacher
    for axes in row.hf.values():
        parts.append(torch.arange(start, start + teacher.axis_size(axes[0])))
        start += len(parts[-1])
    place = torch.empty(start, dtype=torch.int64)
    place[pack(row, parts, teacher.num_query_groups)] = torch.arange(start)
    kept = [keep.rows(axes[0], layer) for axes in row.hf.values()]
    chosen = [part if index is None else part[index] for part, index in zip(parts, kept, strict=True)]
    return place[pack(row, chosen, keep.student.num_query_groups)]

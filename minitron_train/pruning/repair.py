"""Closed-form repair of a pruned model: least squares against the teacher, one layer after the other.

Teacher and student process the same tokens, one layer at a time. In every layer the linears are fitted in the order in
which they run. Their inputs are the activations of the student as repaired so far. Their targets are:

    linear_qkv, linear_fc1      the teacher's outputs of the kept heads and neurons
    linear_proj, linear_fc2     the difference between the teacher's and the student's residual stream, at kept channels

So kept parts compensate for dropped parts as far as they predict them, and errors do not accumulate over the layers. The
linear_fc2 before a dropped layer also compensates for that layer; dropped first layers are compensated by the linears
after them. Where embeddings are not tied, the output layer is fitted last. Memory: one layer of each model, two residual
streams of all tokens, one Gram matrix.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_train.arch.convert import pack, shards_to_parts
from minitron_train.arch.table import OUTPUT, ParamSpec
from minitron_train.config import PruneConfig, Refit
from minitron_train.model.build import Norm
from minitron_train.pruning.basis import effective_gamma
from minitron_train.pruning.layers import Layers, forward, seeing
from minitron_train.pruning.least_squares import LeastSquares
from minitron_train.pruning.repair_experts import ExpertFits, Routed
from minitron_train.pruning.select import Keep
from minitron_train.pruning.slice import VOCABULARY_ROWS
from minitron_train.pruning.target import check_enough
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
    """The residual streams of one micro-batch, [S, B, D] and [S, B, H]; a mask [S, B] is False at padding."""

    teacher: Tensor
    student: Tensor
    mask: Tensor

    def weight(self) -> Tensor:
        """Weight of every token in the least squares, [N]."""
        rms = self.teacher[self.mask].float().square().mean(-1).sqrt()
        return rms.clamp(min=1e-6).pow(-TOKEN_WEIGHT_POWER)


@dataclass(frozen=True, slots=True)
class Half:
    """Attention or MLP of a layer: norm, first linear, second linear, residual connection."""

    norm: str
    first: str
    second: str
    run: Callable[
        [torch.nn.Module, Tensor, Tensor], Tensor
    ]  # layer, normalised stream, rotary -> what is added to the stream


# A half adds its second linear's output to the residual stream: no post-norm (as in Gemma 2) may stand between them.
HALVES = (
    Half(
        "input_layernorm",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        lambda layer, x, rotary: layer.self_attention(x, attention_mask=None, rotary_pos_emb=rotary)[0],  # type: ignore[operator]
    ),
    Half("pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2", lambda layer, x, _: layer.mlp(x)[0]),  # type: ignore[operator],
)


class Repair:
    """Runs teacher and student over `tokens_NS` and yields the student's repaired tensors.

    Both must hold whole layers (no tensor parallelism). The processes share the sequences and find the same weights.

    Raises:
        UserError: there are too few tokens for the widest linear.
    """

    def __init__(
        self, teacher: Layers, student: Layers, keep: Keep, prune: PruneConfig, tokens_NS: Tensor, micro_batch_size: int
    ) -> None:
        self.teacher, self.student, self.keep, self.prune = teacher, student, keep, prune
        check_enough(int((tokens_NS >= 0).sum()), keep.student, prune)
        self.groups = groups = teacher.groups
        self.streams = [
            Streams(teacher.embed(batch), student.embed(batch), (batch >= 0).t())
            for batch in groups.own_parts(tokens_NS, micro_batch_size)
        ]
        self.kept = keep.embedding.to(groups.device)
        self.down_DH = None if keep.basis is None else keep.basis.down_DH.to(groups.device)
        self.rotary = teacher.rotary(tokens_NS.shape[1])
        self.expert_fits = ExpertFits(keep, prune, groups)
        self.rows = {row.mcore.split("{i}.")[-1]: row for row in teacher.table.rows if row.per_layer}

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield Hugging Face name and value of every tensor of the student's layers, last norm and output layer.

        The output layer comes in blocks of rows, and on the first process alone.
        """
        kept, rows = self.keep.layers.tolist(), self.student.table.rows_of(self.keep.student)
        self._advance_teacher_over(range(kept[0]))
        for i, layer in progress(enumerate(kept), "repair", len(kept)):
            absorbed = range(layer + 1, kept[i + 1] if i + 1 < len(kept) else self.keep.teacher.num_layers)
            attention, mlp = HALVES
            self._repair_half(attention, i, layer, range(0))
            if self.keep.student.num_moe_experts:
                self._repair_experts(mlp, i, layer, absorbed)
            else:
                self._repair_half(mlp, i, layer, absorbed)
            yield from self._parts(self.student[i], [row for row in rows if row.per_layer], i)
        self.expert_fits.report()
        yield from self._last()

    def _parts(self, module: torch.nn.Module, rows: list[ParamSpec], i: int) -> Iterator[tuple[str, Tensor]]:
        for row in rows:
            name = row.mcore.split("{i}.")[-1] if row.per_layer else row.mcore.removeprefix("decoder.final_layernorm.")
            shards = [module.get_parameter(name).detach()]
            for part, tensor in shards_to_parts(row, self.keep.student, shards).items():
                yield part.format(i=i), tensor.clone()  # the next layer overwrites the module's weights

    def _repair_half(self, half: Half, i: int, layer: int, absorbed: range) -> None:
        """Fit both linears of one half, then advance both streams; the teacher's also through the `absorbed` layers."""
        teacher, student, keep = self.teacher[layer], self.student[i], self.keep
        student_norm: Norm = student.get_submodule(half.norm)  # type: ignore[assignment]
        rows = kept_rows(self.rows[f"{half.first}.weight"], keep, layer).to(self.groups.device)
        if self.prune.norm_scale:
            self._scale(student_norm)
        wanted = self._advance_teacher(teacher, half)
        if self._fits(half.first):
            pairs = (
                (student_norm(streams.student), y[..., rows]) for streams, y in zip(self.streams, wanted, strict=True)
            )
            self._fit(student.get_submodule(half.first), pairs)
        for _ in wanted:  # advances the micro-batches that the fit did not use
            pass
        self._advance_teacher_over(absorbed)
        if self._fits(half.second):
            self._fit(student.get_submodule(half.second), self._lacking(student, half))
        for streams in self.streams:
            streams.student = streams.student + half.run(student, student_norm(streams.student), self.rotary)

    def _repair_experts(self, half: Half, i: int, layer: int, absorbed: range) -> None:
        """Fit router and experts, then advance both streams; the teacher's also through the `absorbed` layers."""
        teacher, student, fits = self.teacher[layer], self.student[i], self.expert_fits
        before: Norm = teacher.get_submodule(half.norm)  # type: ignore[assignment]
        after: Norm = student.get_submodule(half.norm)  # type: ignore[assignment]
        if self.prune.norm_scale:
            self._scale(after)
        batches = [Routed(before(s.teacher[s.mask]), after(s.student[s.mask]), s.weight()) for s in self.streams]
        fits.fit_inputs(teacher.mlp, student.mlp, layer, batches)  # type: ignore[arg-type]
        for streams in self.streams:
            streams.teacher = streams.teacher + half.run(teacher, before(streams.teacher), self.rotary)
        self._advance_teacher_over(absorbed)
        lacking = [(self._narrow(s.teacher) - s.student)[s.mask] for s in self.streams]
        fits.fit_outputs(student.mlp, batches, lacking)  # type: ignore[arg-type]
        for streams in self.streams:
            streams.student = streams.student + half.run(student, after(streams.student), self.rotary)

    def _advance_teacher_over(self, dropped: range) -> None:
        """Advance the teacher's streams through layers that the student does not have."""
        for layer in dropped:
            module = self.teacher[layer]
            for streams in self.streams:
                streams.teacher = forward(module, streams.teacher, self.rotary)

    def _advance_teacher(self, teacher: torch.nn.Module, half: Half) -> Iterator[Tensor]:
        """Advance the teacher's streams through one half; yields its first linear's output for each micro-batch."""
        norm = teacher.get_submodule(half.norm)
        for streams in self.streams:
            with seeing(teacher.get_submodule(half.first), of_input=False) as seen:
                streams.teacher = streams.teacher + half.run(teacher, norm(streams.teacher), self.rotary)
            yield seen[0]

    def _lacking(self, student: torch.nn.Module, half: Half) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the second linear's input and its target output for each micro-batch."""
        norm = student.get_submodule(half.norm)
        for streams in self.streams:
            with seeing(student.get_submodule(half.second), of_input=True) as seen:
                half.run(student, norm(streams.student), self.rotary)
            yield seen[0], self._narrow(streams.teacher) - streams.student

    def _narrow(self, stream_SBD: Tensor) -> Tensor:
        """The teacher's residual stream, reduced to the student's channels or directions."""
        return stream_SBD[..., self.kept] if self.down_DH is None else stream_SBD @ self.down_DH

    def _fits(self, name: str) -> bool:
        return name.split(".")[-1] in REFITTED[self.prune.refit]

    def _fit(self, linear: torch.nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fit one linear to (input, wanted output) of all micro-batches."""
        weight, bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
        squares = LeastSquares(weight.shape[1], weight.shape[0], self.groups)
        for streams, (x, y) in zip(self.streams, pairs, strict=True):
            y = y if bias is None else y - bias
            squares.add(x[streams.mask], y[streams.mask], streams.weight())
        weight.copy_(squares.solve(weight, self.prune.ridge))

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
        squares = LeastSquares(hidden, teacher_hidden, self.groups)
        for streams in self.streams:
            x, y = self.student.final_norm(streams.student), self.teacher.final_norm(streams.teacher)
            squares.add(x[streams.mask], y[streams.mask], torch.ones_like(streams.weight()))
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

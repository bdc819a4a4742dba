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
from typing import Any

import torch
from torch import Tensor

from minitron_train.arch.convert import pack, shards_to_parts
from minitron_train.arch.table import OUTPUT, ParamSpec
from minitron_train.config import PruneConfig, Refit
from minitron_train.model.norm import Norm
from minitron_train.parallel.groups import Groups
from minitron_train.pruning.basis import effective_gamma
from minitron_train.pruning.layers import Layers, forward, seeing
from minitron_train.pruning.select import Keep
from minitron_train.pruning.slice import VOCABULARY_ROWS
from minitron_train.pruning.target import check_enough
from minitron_train.runtime.console import progress
from minitron_train.runtime.errors import UserError

# S sequence, B batch, D teacher's hidden, H student's hidden, N tokens, I inputs, O outputs

TOKEN_WEIGHT_POWER = 0.75  # a token's weight is rms(stream)^-0.75, because first tokens are 100 times larger
REFITTED = {
    Refit.none: (),
    Refit.outputs: ("linear_proj", "linear_fc2"),
    Refit.all: ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
}


class LeastSquares:
    """argmin over W of Σ w ‖y - W x‖² + ridge ‖W - W₀‖², from sums over the tokens of all processes."""

    def __init__(self, inputs: int, outputs: int, groups: Groups) -> None:
        self.groups = groups
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=groups.device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=groups.device)

    def add(self, x_NI: Tensor, y_NO: Tensor, weight_N: Tensor) -> None:
        """Add tokens."""
        weighted_IN = (x_NI * weight_N[:, None]).t()
        self.gram += weighted_IN @ x_NI
        self.cross += weighted_IN @ y_NO

    def solve(self, start_OI: Tensor, ridge: float) -> Tensor:
        """The best weights, regularised towards `start_OI`; `ridge` is relative to the mean of the Gram matrix's diagonal.

        If all inputs are zero, as after an embedding of zeros, `start_OI` is returned.

        Raises:
            UserError: inputs or outputs are not finite; raised on all processes.
        """
        for sums in (self.gram, self.cross):
            self.groups.sum(sums)
        if not (self.gram.isfinite().all() and self.cross.isfinite().all()):
            raise UserError(
                "prune.refit: the model's activations are NaN or infinite while it is repaired; check the teacher's weights, "
                "or prune without repair: prune=paper"
            )
        if not self.gram.diagonal().any():
            return start_OI
        missing = self.cross - self.gram @ start_OI.double().t()
        self.gram.diagonal().add_(ridge * self.gram.diagonal().mean())
        change_IO = torch.cholesky_solve(missing, torch.linalg.cholesky(self.gram))
        return start_OI + change_IO.t().to(start_OI.dtype)


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
    """Attention or MLP of a layer: norm, first linear, second linear, and the sum with the residual stream."""

    norm: str
    first: str
    second: str
    sum: str
    run: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor | None]]
    # layer, normalised stream, rotary -> the second linear's output without its bias, and this bias

    def forward(self, layer: torch.nn.Module, stream_SBH: Tensor, rotary: Tensor) -> Tensor:
        """The residual stream after this half."""
        output = self.run(layer, layer.get_submodule(self.norm)(stream_SBH), rotary)
        return getattr(layer, self.sum)(False, False)(output, stream_SBH, 0.0)


HALVES = (
    Half(
        "input_layernorm",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "self_attn_bda",
        lambda layer, x, rotary: layer.self_attention(x, attention_mask=None, rotary_pos_emb=rotary),
    ),
    Half("pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2", "mlp_bda", lambda layer, x, _: layer.mlp(x)),
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
        self.teacher_rotary, self.rotary = (layers.rotary(tokens_NS.shape[1]) for layers in (teacher, student))
        self.rows = {row.mcore.split("{i}.")[-1]: row for row in teacher.table.layer_rows(teacher.shape)}

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield Hugging Face name and value of every tensor of the student's layers, last norm and output layer.

        The output layer comes in blocks of rows, and on the first process alone.
        """
        kept = self.keep.layers.tolist()
        self._advance_teacher_over(range(kept[0]))
        for i, layer in progress(enumerate(kept), "repair", len(kept)):
            absorbed = range(layer + 1, kept[i + 1] if i + 1 < len(kept) else self.keep.teacher.num_layers)
            attention, mlp = HALVES
            self._repair_half(attention, i, layer, range(0))
            self._repair_half(mlp, i, layer, absorbed)
            yield from self._parts(self.student[i], self.student.table.layer_rows(self.keep.student), i)
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
            streams.student = half.forward(student, streams.student, self.rotary)

    def _advance_teacher_over(self, dropped: range) -> None:
        """Advance the teacher's streams through layers that the student does not have."""
        for layer in dropped:
            module = self.teacher[layer]
            for streams in self.streams:
                streams.teacher = forward(module, streams.teacher, self.teacher_rotary)

    def _advance_teacher(self, teacher: torch.nn.Module, half: Half) -> Iterator[Tensor]:
        """Advance the teacher's streams through one half; yields its first linear's output for each micro-batch."""
        linear: Any = teacher.get_submodule(half.first)
        later_bias = linear.bias if linear.skip_bias_add else None  # megatron-core's MLP adds it after the linear
        for streams in self.streams:
            with seeing(linear, of_input=False) as seen:
                streams.teacher = half.forward(teacher, streams.teacher, self.teacher_rotary)
            yield seen[0] if later_bias is None else seen[0] + later_bias

    def _lacking(self, student: torch.nn.Module, half: Half) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the second linear's input and its target output for each micro-batch."""
        for streams in self.streams:
            with seeing(student.get_submodule(half.second), of_input=True) as seen:
                half.forward(student, streams.student, self.rotary)
            yield seen[0], self._narrow(streams.teacher) - streams.student

    def _narrow(self, stream_SBD: Tensor) -> Tensor:
        """The teacher's residual stream, reduced to the student's channels or directions."""
        return stream_SBD[..., self.kept] if self.down_DH is None else stream_SBD @ self.down_DH

    def _fits(self, name: str) -> bool:
        return name.split(".")[-1] in REFITTED[self.prune.refit]

    def _fit(self, linear: Any, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fit a linear's weights to (input, wanted output) of all micro-batches. Its bias is kept."""
        weight, bias = linear.get_parameter("weight"), linear.bias
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

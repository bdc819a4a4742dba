"""A checkpoint's decoder, one layer at a time, for scoring, rotation and repair of models that do not fit in memory."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from minitron_train.arch import ParamSpec, convert
from minitron_train.arch.shape import Shape
from minitron_train.arch.table import EMBEDDING, OUTPUT, Architecture
from minitron_train.model.build import build
from minitron_train.model.norm import Norm
from minitron_train.model.vocabulary import OutputLayer, StreamedEmbedding
from minitron_train.parallel.groups import Groups

# B batch, S sequence, H hidden


class RowSource(convert.Source, Protocol):
    """A source that also reads arbitrary rows of a tensor: shards.RowReader, or a pruned view of one."""

    def rows(self, name: str, index_N: Tensor) -> Tensor:
        """Rows `index_N` (ascending) of the tensor `name`."""
        ...


class Layers:
    """The layers of one model as megatron-core modules, loaded at first access.

    `resident` keeps every loaded layer in memory; otherwise one layer of each kind is held at a time. Both run the same
    code on the same weights, so results are bit-equal. Of the token embeddings, only the rows of a micro-batch's tokens are read.

    Args:
        source: the model's tensors.
        dtype: number type of weights and activations.
    """

    def __init__(
        self,
        table: Architecture,
        shape: Shape,
        source: RowSource,
        groups: Groups,
        *,
        resident: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.table, self.shape, self.source, self.groups, self.dtype = table, shape, source, groups, dtype
        held = shape.layer_kinds if resident else shape.kinds
        self.slot = (
            range(shape.num_layers) if resident else shape.kind_of_layer or (0,) * shape.num_layers
        )  # of each layer
        stub = replace(shape.with_layers(held), vocab_size=groups.tp_size, tie_embeddings=True)  # no vocabulary is held
        self.model = build(stub, tp=groups.tp_size, tp_group=groups.tp_group, dtype=dtype).eval().requires_grad_(False)
        self.model.embedding.word_embeddings = StreamedEmbedding(self._embedding_rows)  # type: ignore[assignment]
        self.loaded: list[int | None] = [None] * len(held)
        outside = [row for row in table.rows_of(shape) if not row.per_layer]
        self._fill([row for row in outside if row.mcore not in (EMBEDDING, OUTPUT)], 0, 0)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """Input embeddings [S, B, H]; a negative token is padding and gets the first row."""
        return self.model.embed(tokens_BS)

    def output_layer(self, start: int, stop: int) -> OutputLayer:
        """Rows [start, stop) of the whole vocabulary's output layer, which is the embedding where they are tied."""
        name = self.table.output_name(self.shape)
        weight_VH = self.source.read(name, 0, start, stop).to(self.groups.device, self.dtype)
        return OutputLayer(weight_VH, self.model.logit_map)

    def tensor_name(self, mcore: str) -> str:
        """Hugging Face name of a parameter that is a single tensor."""
        row = next(row for row in self.table.rows if row.mcore == mcore)
        return next(iter(row.hf))

    def rotary(self, length: int) -> Tensor:
        """The rotary angles of positions 0 … length - 1."""
        return self.model.rotary_pos_emb(length)

    def __getitem__(self, i: int) -> torch.nn.Module:
        """Layer `i`, valid until the next access."""
        slot = self.slot[i]
        if self.loaded[slot] != i:
            self._fill(self.table.layer_rows(self.shape, self.shape.layer_kinds[i]), i, slot)
            self.loaded[slot] = i
        return self.model.decoder.layers[slot]

    @property
    def final_norm(self) -> Norm:
        """The norm after the last layer."""
        return self.model.get_submodule("decoder.final_layernorm")  # type: ignore[return-value]

    def _embedding_rows(self, index_U: Tensor) -> Tensor:
        return self.source.rows(self.tensor_name(EMBEDDING), index_U).to(self.groups.device, self.dtype)

    def _fill(self, rows: Iterable[ParamSpec], i: int, slot: int) -> None:
        for row in rows:
            shard = convert.read_shard(row, i, self.shape, self.source, self.groups.tp_rank, self.groups.tp_size)
            self.model.get_parameter(row.mcore.format(i=slot)).copy_(shard)


def forward(layer: torch.nn.Module, hidden_SBH: Tensor, rotary: Tensor) -> Tensor:
    """One transformer layer with causal attention."""
    return layer(hidden_states=hidden_SBH, attention_mask=None, rotary_pos_emb=rotary)[0]


@contextlib.contextmanager
def seeing(module: torch.nn.Module, *, of_input: bool) -> Iterator[list[Tensor]]:
    """Collect a module's inputs or outputs during a block."""
    seen: list[Tensor] = []
    if of_input:
        handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:
        handle = module.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def seeing_all(module: torch.nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of several submodules during a block, by their names."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(seeing(module.get_submodule(name), of_input=True)) for name in names}

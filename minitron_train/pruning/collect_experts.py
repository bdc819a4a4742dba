"""Statistics of a layer's experts, each on the tokens that the router sends to it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from minitron_train.model.experts import Experts, by_expert

# N tokens, B sequences, T tokens of one expert, E experts, K experts of a token, H hidden, F neurons (the rank's own)

NEURONS = ("neurons_pre", "neurons_post")


@dataclass(slots=True)
class Seen:
    """What one micro-batch shows of a layer's experts. Without tokens in a sequence, a neuron's values are 0 there.

    Attributes:
        add_neurons: takes the name of a hook point and mean |x|, L2 and variance per sequence, fp64 [3, B, E, F].
        add_experts: takes Σ over tokens of 1, ‖f‖ and p ‖f‖, fp64 [3, E], with output f and router probability p.
    """

    module: Experts
    current: list[Tensor | None]  # one entry: the mask [S, B] of the micro-batch, False at padding; None: no padding
    add_neurons: Callable[[str, Tensor], None]
    add_experts: Callable[[Tensor], None]
    num_sequences: int = 0  # of the micro-batch
    rows: list[Tensor] = field(default_factory=list)  # by expert: the sequence of each token
    valid: list[Tensor] = field(default_factory=list)  # by expert: False at padding
    probs: list[Tensor] = field(default_factory=list)  # by expert: the router's probabilities
    neurons: dict[str, Tensor] = field(default_factory=dict)
    sums: Tensor = field(default_factory=lambda: torch.empty(0))

    def enter(self, hidden_SBH: Tensor) -> None:
        """Note the size of the micro-batch."""
        self.num_sequences = hidden_SBH.shape[1]

    def begin(self, probs_NK: Tensor, index_NK: Tensor) -> None:
        """Sort the tokens by expert, as the module does."""
        order, counts = by_expert(index_NK, self.module.num_experts)
        tokens, mask = order // index_NK.shape[1], self.current[0]
        valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.flatten()[tokens]
        self.rows = list((tokens % self.num_sequences).split(counts))
        self.valid, self.probs = list(valid.split(counts)), list(probs_NK.flatten()[order].split(counts))
        self.neurons = {}
        self.sums = torch.zeros(3, len(counts), dtype=torch.float64, device=tokens.device)

    def see_neurons(self, point: str, e: int, x_TF: Tensor) -> None:
        """Add the neurons of one expert."""
        rows, x = self.rows[e][self.valid[e]], x_TF[self.valid[e]].double()
        if point not in self.neurons:
            size = (3, self.num_sequences, len(self.rows), x.shape[1])
            self.neurons[point] = torch.zeros(size, dtype=torch.float64, device=x.device)
        count_B1 = torch.bincount(rows, minlength=self.num_sequences).clamp(min=1)[:, None]
        sums_BF = [x.new_zeros(self.num_sequences, x.shape[1]).index_add_(0, rows, y) for y in (x, x.abs(), x.square())]
        mean, mean_abs, mean_square = (total / count_B1 for total in sums_BF)
        variance = (mean_square - mean.square()).clamp(min=0.0)
        self.neurons[point][:, :, e] = torch.stack([mean_abs, sums_BF[2].sqrt(), variance])

    def see_output(self, e: int, out_TH: Tensor) -> None:
        """Add the output of one expert, which is the sum over the tensor-parallel ranks."""
        whole = reduce_from_tensor_model_parallel_region(out_TH.clone(), self.module.tp_group)
        norms_T = torch.linalg.vector_norm(whole, dim=-1, dtype=torch.float32).double() * self.valid[e]
        self.sums[:, e] = torch.stack([self.valid[e].sum().double(), norms_T.sum(), (norms_T * self.probs[e]).sum()])

    def end(self) -> None:
        """Hand over the micro-batch."""
        for point, values in self.neurons.items():
            self.add_neurons(point, values)
        self.add_experts(self.sums)


@contextlib.contextmanager
def watching_experts(seen: Seen) -> Iterator[None]:
    """Record a layer's experts during a block."""
    handles = [
        seen.module.register_forward_pre_hook(lambda _, inputs: seen.enter(inputs[0])),
        seen.module.router.register_forward_hook(lambda *call: seen.begin(*call[-1])),
        seen.module.register_forward_hook(lambda *_: seen.end()),
    ]
    for e, expert in enumerate(seen.module.experts.values()):
        handles += watch(seen, e, expert)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch(seen: Seen, e: int, expert: torch.nn.Module) -> list[RemovableHandle]:
    """Record one expert: its neurons before and after the activation function, and its output."""
    first, second = expert.get_submodule("linear_fc1"), expert.get_submodule("linear_fc2")
    before, after = NEURONS
    return [
        first.register_forward_hook(lambda *call: seen.see_neurons(before, e, call[-1].chunk(2, dim=-1)[0])),
        second.register_forward_pre_hook(lambda _, inputs: seen.see_neurons(after, e, inputs[0])),
        expert.register_forward_hook(lambda *call: seen.see_output(e, call[-1])),
    ]

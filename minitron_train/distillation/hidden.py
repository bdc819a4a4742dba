"""Records the outputs of the configured pairs of layers in student and teacher, and computes the loss between them.

Each pipeline stage computes the loss of the pairs that it holds. The projection is on every stage. Its copies stay equal,
because the stages sum its gradients (`parallel.copies`).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minitron_train.arch import Shape
from minitron_train.arch.pipeline import stage_layers
from minitron_train.config import DistillConfig
from minitron_train.distillation.intermediate import HiddenProjection, intermediate_loss
from minitron_train.model.build import LanguageModel
from minitron_train.parallel.copies import mark_copies
from minitron_train.parallel.groups import Groups
from minitron_train.runtime.errors import UserError

PROJECTION = "hidden_projection"  # a submodule of the student during training; export omits it


@dataclass(slots=True)
class HiddenPairs:
    """The loss between pairs of layer outputs, which hooks record during both models' forward passes.

    The projection is a submodule of the student, so that DDP, optimizer and checkpoints include it.
    """

    settings: DistillConfig
    projection: HiddenProjection
    own: list[tuple[str, str]]  # names of the pairs on this stage: the student's layer, the teacher's
    outputs: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @classmethod
    def attach(
        cls, settings: DistillConfig, student: LanguageModel, teacher: LanguageModel, seed: int, groups: Groups
    ) -> "HiddenPairs":
        """Add the projection to the student, and hooks to both models. Call it before DDP wraps the student."""
        weight = next(student.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same on all ranks
            projection = HiddenProjection(student.config.hidden_size, teacher.config.hidden_size)
        setattr(student, PROJECTION, projection.to(weight))
        mark_copies(projection, groups)
        found = [(left, right) for left, right in map(split_pair, settings.hidden_layers) if has_module(student, left)]
        pairs = cls(settings, projection, found)
        for names in found:
            for owner, model, name in zip(("student", "teacher"), (student, teacher), names, strict=True):
                find_module(model, name).register_forward_hook(pairs.catch(owner, name))
        return pairs

    def catch(self, owner: str, name: str) -> Any:
        """A forward hook that records the output, [S, B, H], of one layer."""

        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            self.outputs[owner, name] = output[0] if isinstance(output, tuple) else output

        return hook

    def loss(self, mask_N: Tensor, gather: Any) -> Tensor:
        """L_is of the last forward pass of both models, summed over the valid tokens: the share of this stage's pairs.

        A stage without pairs returns 0, with gradients of 0 for the projection.

        Args:
            gather: [S / tp, B, H] -> [N, H] where sequences are split over the tensor-parallel ranks.
        """
        if not self.own:
            zeros = [parameter.float().sum() * 0 for parameter in self.projection.parameters()]
            return torch.stack([torch.zeros((), device=mask_N.device), *zeros]).sum()
        pairs = [
            (gather(self.outputs["student", student]), gather(self.outputs["teacher", teacher]))
            for student, teacher in self.own
        ]
        self.outputs.clear()
        share = len(self.own) / len(self.settings.hidden_layers)
        return share * intermediate_loss(pairs, self.projection, mask_N=mask_N, kind=self.settings.hidden_loss)


class AlsoBackward(torch.autograd.Function):
    """Hidden states, unchanged, whose backward pass also begins one at a scalar loss that was computed beside them."""

    @staticmethod
    def forward(ctx: Any, hidden_SBH: Tensor, loss: Tensor) -> Tensor:
        ctx.unit = torch.ones_like(loss)
        return hidden_SBH.view_as(hidden_SBH)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], ctx.unit


def check_layers(settings: DistillConfig, student: Shape, teacher: Shape, num_stages: int = 1) -> None:
    """Reject pairs of layers that the models do not have, or that lie on two pipeline stages."""
    for pair in settings.hidden_layers:
        names = split_pair(pair)
        for owner, shape, name in zip(("student", "teacher"), (student, teacher), names, strict=True):
            if name != "embedding" and int(name) >= shape.num_layers:
                last = f"its last one is {shape.num_layers - 1}"
                raise UserError(f"distill.hidden_layers={pair}: the {owner} has no layer {name}; {last}")
        stage, other = (
            stage_of(name, shape, num_stages) for name, shape in zip(names, (student, teacher), strict=True)
        )
        if stage != other:
            layers = stage_layers(teacher.num_layers, num_stages)[stage]
            choice = f"layer {layers.start}" if len(layers) == 1 else f"layers {layers.start} to {layers.stop - 1}"
            raise UserError(
                f"distill.hidden_layers={pair}: parallel.pipeline_model_parallel_size={num_stages} puts the student's "
                f"{named(names[0])} on stage {stage}, the teacher's {named(names[1])} on stage {other}, and a pair needs one "
                f"stage; choose from the teacher's {choice}, or set fewer stages"
            )


def stage_of(name: str, shape: Shape, num_stages: int) -> int:
    """The pipeline stage that holds a layer, or the embedding, counted from 0."""
    layers = stage_layers(shape.num_layers, num_stages)
    return 0 if name == "embedding" else next(k for k, own in enumerate(layers) if int(name) in own)


def named(name: str) -> str:
    """A name of distill.hidden_layers in a message."""
    return name if name == "embedding" else f"layer {name}"


def split_pair(pair: str) -> tuple[str, str]:
    """The student's and the teacher's name in an entry of distill.hidden_layers."""
    student, _, teacher = pair.partition("/")
    return student, teacher


def has_module(model: LanguageModel, name: str) -> bool:
    """Whether this stage of a model holds what a name refers to."""
    return model.pre_process if name == "embedding" else 0 <= int(name) - model.first_layer < len(model.decoder.layers)


def find_module(model: LanguageModel, name: str) -> torch.nn.Module:
    """The module that a name of distill.hidden_layers refers to: "embedding" or a layer number of the whole model."""
    return model.embedding if name == "embedding" else model.decoder.layers[int(name) - model.first_layer]

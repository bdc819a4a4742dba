"""Records the outputs of the configured pairs of layers in student and teacher, and computes the loss between them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minitron_train.arch import Shape
from minitron_train.config import DistillConfig
from minitron_train.distillation.intermediate import HiddenProjection, intermediate_loss
from minitron_train.model.build import LanguageModel
from minitron_train.runtime.errors import UserError

PROJECTION = "hidden_projection"  # a submodule of the student during training; export omits it


@dataclass(slots=True)
class HiddenPairs:
    """The loss between pairs of layer outputs, which hooks record during both models' forward passes.

    The projection is a submodule of the student, so that DDP, optimizer and checkpoints include it.
    """

    settings: DistillConfig
    projection: HiddenProjection
    outputs: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @classmethod
    def attach(
        cls, settings: DistillConfig, student: LanguageModel, teacher: LanguageModel, seed: int
    ) -> "HiddenPairs":
        """Add the projection to the student, and hooks to both models. Call it before DDP wraps the student."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same on all ranks
            projection = HiddenProjection(student.config.hidden_size, teacher.config.hidden_size)
        setattr(student, PROJECTION, projection.to(student.output_weight))
        pairs = cls(settings, projection)
        for pair in settings.hidden_layers:
            for owner, model, name in zip(("student", "teacher"), (student, teacher), pair.split("/"), strict=True):
                find_module(model, name).register_forward_hook(pairs.catch(owner, name))
        return pairs

    def catch(self, owner: str, name: str) -> Any:
        """A forward hook that records the output, [S, B, H], of one layer."""

        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            self.outputs[owner, name] = output[0] if isinstance(output, tuple) else output

        return hook

    def loss(self, mask_N: Tensor, gather: Any) -> Tensor:
        """L_is of the last forward pass of both models, summed over the valid tokens.

        Args:
            gather: [S / tp, B, H] -> [N, H] where sequences are split over the tensor-parallel ranks.
        """
        pairs = []
        for pair in self.settings.hidden_layers:
            student, teacher = pair.split("/")
            pairs.append((gather(self.outputs["student", student]), gather(self.outputs["teacher", teacher])))
        self.outputs.clear()
        return intermediate_loss(pairs, self.projection, mask_N=mask_N, kind=self.settings.hidden_loss)


def check_layers(settings: DistillConfig, student: Shape, teacher: Shape) -> None:
    """Reject pairs of layers that the models do not have."""
    for pair in settings.hidden_layers:
        for owner, shape, name in zip(("student", "teacher"), (student, teacher), pair.split("/"), strict=True):
            if name != "embedding" and int(name) >= shape.num_layers:
                last = f"its last one is {shape.num_layers - 1}"
                raise UserError(f"distill.hidden_layers={pair}: the {owner} has no layer {name}; {last}")


def find_module(model: LanguageModel, name: str) -> torch.nn.Module:
    """The module that a name of distill.hidden_layers refers to: "embedding" or a layer number."""
    return model.embedding if name == "embedding" else model.decoder.layers[int(name)]

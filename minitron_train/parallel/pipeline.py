"""Micro-batches through pipeline stages, in megatron-core's order of forward and backward passes (1F1B).

Each message from a stage to the next has the student's hidden states. Those of the frozen teacher follow them, in the
teacher's own type and width. Gradients come back for the student's alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minitron_train.parallel import cpu
from minitron_train.parallel.groups import Groups

# S tokens of a sequence (S / tp under sequence parallelism), B sequences, H hidden size


class Link(P2PCommunicator):
    """The connection of a stage to its neighbours, for the hidden states of student and teacher.

    Attributes:
        arrived: the teacher's hidden states [S, B, H] of the micro-batch that is computed next; None on the first stage.
        leaving: those that go to the next stage with the student's; set them before the student's forward pass returns.
    """

    def __init__(self, groups: Groups, student: ModelParallelConfig, teacher: TransformerConfig | None) -> None:
        super().__init__(groups.pp_group, student)
        self.hidden_size = 0 if teacher is None else teacher.hidden_size
        self.teacher = None if teacher is None else P2PCommunicator(groups.pp_group, teacher)
        self.arrived: Tensor | None = None
        self.leaving: Tensor | None = None

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> Any:
        """megatron-core's exchange for the student, then the same towards the next stage for the teacher."""
        exchanged = super()._communicate(
            tensor_send_next=tensor_send_next,
            tensor_send_prev=tensor_send_prev,
            recv_prev=recv_prev,
            recv_next=recv_next,
            tensor_shape=tensor_shape,
            wait_on_reqs=wait_on_reqs,
        )
        if self.teacher is not None and (tensor_send_next is not None or recv_prev):
            arrived, *_ = self.teacher._communicate(
                tensor_send_next=self.leaving if tensor_send_next is not None else None,  # type: ignore[arg-type]
                tensor_send_prev=None,  # type: ignore[arg-type]
                recv_prev=recv_prev,
                recv_next=False,
                tensor_shape=(*tensor_shape[:2], self.hidden_size) if recv_prev else None,  # type: ignore[arg-type]
            )
            self.arrived, self.leaving = arrived if recv_prev else self.arrived, None
        return exchanged


def run_stages(
    student: DistributedDataParallel,
    step: Callable[[Iterator[Any], Any], tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]],
    micro_batches: list[Any],
    *,
    link: Link,
    shape: tuple[int, int],
    forward_only: bool,
) -> list[Any]:
    """Forward passes of all micro-batches, and their backward passes unless `forward_only`; collective over the stages.

    Gradients are summed over the data-parallel ranks as in a step without stages: in the last backward pass, or later.

    Args:
        step: megatron-core's forward_step_func: takes an iterator over `micro_batches` and the student. Returns the stage's
            output, and the loss function, which the last stage calls.
        shape: sequences and tokens of a sequence of each micro-batch.

    Returns:
        The third values of the loss function, in order; empty on the other stages.
    """
    rows, length = shape
    with cpu.cuda_means_cpu():
        return forward_backward_pipelining_without_interleaving(
            forward_step_func=step,
            data_iterator=iter(micro_batches),
            model=student,
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
            p2p_communicator=link,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )

"""Process groups. Only this module starts torch.distributed and reads megatron-core's parallel_state.

torchrun or srun starts the processes; a process without them runs alone. Ranks are laid out as in megatron-core:
neighbouring ranks form a tensor-parallel group, and these groups are data parallel. In a training with pipeline stages,
the first ranks hold the first stage, and so on.
"""

import contextlib
import datetime
import logging
import pickle
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.distributed.distributed_c10d import _get_default_store

from minitron_train.config import ParallelConfig
from minitron_train.parallel import meeting
from minitron_train.runtime.errors import MachineError, UserError
from minitron_train.runtime.launch import World

T = TypeVar("T")

NO_LIMIT = datetime.timedelta(days=20)  # the longest that fits into poll(2)'s milliseconds


@dataclass(frozen=True, slots=True)
class Groups:
    """This process's ranks and process groups."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    device: torch.device
    model_group: dist.ProcessGroup  # the ranks that hold one model together
    pp_group: dist.ProcessGroup
    pp_rank: int = 0
    pp_size: int = 1
    ep_rank: int = 0  # among the ranks that share each layer's experts, a part of the data-parallel group
    ep_size: int = 1
    edp_rank: int = 0  # among the ranks that hold the same experts
    edp_size: int = 1
    ep_group: dist.ProcessGroup | None = None
    edp_group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the output layer, and so computes the loss."""
        return self.pp_rank == self.pp_size - 1

    def gather(self, shard: Tensor) -> list[Tensor]:
        """All-gather over the tensor-parallel group: the shards of all ranks, which must have equal sizes."""
        if self.tp_size == 1:
            return [shard]
        shards = [torch.empty_like(shard) for _ in range(self.tp_size)]
        dist.all_gather(shards, shard.contiguous(), group=self.tp_group)
        return shards

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def own_parts(self, rows: Tensor, num_rows: int) -> Iterator[Tensor]:
        """Yield this data-parallel rank's rows on the device, at most `num_rows` at a time.

        A rank yields nothing where there are more ranks than rows.
        """
        for part in rows[self.dp_rank :: self.dp_size].split(num_rows):
            if len(part):
                yield part.to(self.device)

    def even_parts(self, rows: Tensor, num_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Like own_parts, but with as many parts of the same sizes on every data-parallel rank.

        The ranks of an expert group need this, because each forward pass takes all of them.

        Yields:
            Rows, and a bool for each: False where it fills up the part and another rank has it too.
        """
        last = -(-len(rows) // self.dp_size) * self.dp_size
        places = torch.arange(self.dp_rank, last, self.dp_size)
        for part in places.split(num_rows):
            yield rows[part % len(rows)].to(self.device), (part < len(rows)).to(self.device)

    def sum_over_data(self, value: Tensor) -> Tensor:
        """Sum over the data-parallel group, in place."""
        if self.dp_size > 1:
            dist.all_reduce(value, group=self.dp_group)
        return value

    def from_first(self, value: Tensor) -> Tensor:
        """Broadcast from the first process, in place, so that ranks do not differ by rounding."""
        if self.world_size > 1:
            dist.broadcast(value, src=0)
        return value

    def from_first_replica(self, value: Tensor, *, of_experts: bool = False) -> None:
        """Broadcast from the first process of the data-parallel group, in place and bit for bit.

        Args:
            of_experts: the value is that of the experts of this process; broadcast it among those that hold the same ones.
        """
        group = self.edp_group if of_experts else self.dp_group
        if group is not None and group.size() > 1:
            flat = value.detach().view(-1).view(torch.uint8)  # gloo and NCCL send bytes of any dtype
            dist.broadcast(flat, src=dist.get_global_rank(group, 0), group=group)

    def own_experts(self, num_experts: int) -> range:
        """The experts of each layer that this process holds; all of them without expert parallelism."""
        return own_experts(num_experts, self.ep_rank, self.ep_size)

    def any(self, flag: bool) -> bool:
        """Logical or over all processes."""
        value = torch.tensor([float(flag)], device=self.device)
        if self.world_size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def least(self, value: float) -> float:
        """The smallest value of all processes."""
        least = torch.tensor([value], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return float(least.item())

    def from_last_stage(self, value: Tensor) -> Tensor:
        """Broadcast from the last pipeline stage to the others, in place."""
        if self.pp_size > 1:
            dist.broadcast(value, src=dist.get_global_rank(self.pp_group, self.pp_size - 1), group=self.pp_group)
        return value

    def sum_over_stages(self, value: Tensor) -> Tensor:
        """Sum over the pipeline stages, in place."""
        if self.pp_size > 1:
            dist.all_reduce(value, group=self.pp_group)
        return value

    def any_shard(self, flag: bool) -> bool:
        """Logical or over the ranks that compute together: those that hold one model, and those of the expert group."""
        value = torch.tensor([float(flag)], device=self.device)
        for size, group in ((self.tp_size * self.pp_size, self.model_group), (self.ep_size, self.ep_group)):
            if size > 1:
                dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
        return bool(value.item())

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Call `work` on the first process and return its result on every process.

        The other processes wait at the rendezvous store, not in a collective, so `parallel.timeout_minutes` does not apply.

        Raises:
            UserError: `work` raised it; raised on every process.
            RuntimeError: `work` failed otherwise; raised on the other processes.
        """
        if self.world_size == 1:
            return work()
        # a separate connection, because waiting blocks the store for other threads
        store = cast(Any, _get_default_store()).clone()
        key = f"on_rank0/{store.add(f'on_rank0/{self.rank}', 1)}/value"  # every process counts its calls
        if not self.is_first:
            store.wait([key], NO_LIMIT)
            value, failure = pickle.loads(store.get(key))
            if failure:
                raise failure
            return value
        try:
            value = work()
        except Exception as error:
            known = isinstance(error, UserError)
            failure = error if known else RuntimeError("the first rank has failed: see its message")
            store.set(key, pickle.dumps((None, failure)))
            raise
        store.set(key, pickle.dumps((value, None)))
        return value

    def raise_together(self, failure: Exception | None) -> None:
        """End all processes alike if some have failed; collective. A process that has failed gives its exception.

        Raises:
            UserError, MachineError: the failure of the first such rank; raised on every process.
            RuntimeError: a rank has failed otherwise; raised on the other processes.
        """
        if not self.any(failure is not None):
            return
        is_known = isinstance(failure, UserError | MachineError)
        told = failure if is_known or failure is None else RuntimeError(f"rank {self.rank} has failed: see its message")
        everyone: list[Any] = [told]
        if self.world_size > 1:
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, told)
        if failure is not None and not is_known:
            raise failure
        raise next(filter(None, everyone))

    def tensor_from_rank0(self, work: Callable[[], Tensor]) -> Tensor:
        """`on_rank0` for a large CPU tensor, which is broadcast: the store would hold it and send it to each process."""
        if self.world_size == 1:
            return work()
        made: list[Tensor] = []

        def describe() -> tuple[torch.Size, torch.dtype]:
            made.append(work())
            return made[0].shape, made[0].dtype

        shape, dtype = self.on_rank0(describe)
        value = made[0] if made else torch.empty(shape, dtype=dtype)
        return self.from_first(value.to(self.device)).cpu()


@contextlib.contextmanager
def start(parallel: ParallelConfig, world: World, seed: int) -> Iterator[Groups]:
    """Start torch.distributed and megatron-core's groups for a block.

    After an exception the groups are not destroyed, because the process ends anyway. Destroying NCCL groups would wait for
    ranks inside a collective (pytorch#141510) and delay the message.

    Raises:
        UserError: the parallel sizes do not divide the number of processes, or no rendezvous address is set.
        MachineError: some ranks are missing after parallel.rendezvous_minutes.
    """
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    if world.size % tp:
        raise UserError(
            f"parallel.tensor_model_parallel_size={tp}: must divide the number of processes, {world.size}; "
            f"start a multiple of {tp} (torchrun --nproc-per-node {tp} -m minitron_train …)"
        )
    if world.size % (tp * ep):
        raise UserError(
            f"parallel.expert_model_parallel_size={ep}: must divide the number of data-parallel ranks, {world.size // tp}; "
            f"choose a divisor, or start a multiple of {tp * ep} processes"
        )
    from megatron.core import tensor_parallel

    from minitron_train.parallel import shims

    shims.install()
    quiet_libraries()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # Slurm's --gpus-per-task shows each process one GPU, whose number is 0
        device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized():  # left by a failed job of a sweep; all processes start the next job
        destroy()
    with contextlib.ExitStack() as stack:
        timeout = datetime.timedelta(minutes=parallel.timeout_minutes)
        if world.size == 1:  # opens no port
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            store = FileStore(str(Path(folder) / "rendezvous"), 1)
            connecting = contextlib.nullcontext()
        else:
            store = meeting.meet(world, parallel.rendezvous_minutes)
            store.set_timeout(timeout)
            connecting = meeting.first_connections(store, world, parallel.connect_minutes)
        with connecting:
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
            groups = model_parallel(parallel, device)
            dist.all_reduce(torch.ones(1, device=device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        random.seed(seed)
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        yield groups
        destroy()


def model_parallel(parallel: ParallelConfig, device: torch.device, num_stages: int = 1) -> Groups:
    """Create megatron-core's groups on the ranks of torch.distributed; collective."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=num_stages,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        distributed_timeout_minutes=parallel.timeout_minutes,  # type: ignore[arg-type]  # goes into a timedelta
    )
    return Groups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tensor_model_parallel_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group()),
        dp_group=cast(dist.ProcessGroup, parallel_state.get_data_parallel_group()),
        model_group=cast(dist.ProcessGroup, parallel_state.get_model_parallel_group()),
        pp_group=cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group()),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=num_stages,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel.expert_model_parallel_size,
        edp_rank=parallel_state.get_expert_data_parallel_rank(),
        edp_size=parallel_state.get_expert_data_parallel_world_size(),
        ep_group=cast(dist.ProcessGroup, parallel_state.get_expert_model_parallel_group()),
        edp_group=cast(dist.ProcessGroup, parallel_state.get_expert_data_parallel_group()),
        device=device,
    )


@contextlib.contextmanager
def pipelined(parallel: ParallelConfig, groups: Groups, seed: int) -> Iterator[Groups]:
    """Regroup the same ranks into parallel.pipeline_model_parallel_size stages for a block; collective.

    The stages must divide the data-parallel ranks (train.assemble.check). `groups` has no stages: outside of the block these
    ranks are data parallel. After an exception the groups stay.
    """
    stages = parallel.pipeline_model_parallel_size
    if stages == 1:
        yield groups
        return
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    staged = model_parallel(parallel, groups.device, stages)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    yield staged
    parallel_state.destroy_model_parallel()
    model_parallel(parallel, groups.device)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def own_experts(num_experts: int, rank: int, size: int) -> range:
    """The experts of each layer that rank `rank` of an expert group of `size` ranks holds."""
    count = num_experts // size
    return range(rank * count, (rank + 1) * count)


def destroy() -> None:
    """Destroy megatron-core's groups and torch.distributed's."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def quiet_libraries() -> None:
    """Silence megatron-core's log messages about optional packages."""
    for name in ("megatron.core", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)

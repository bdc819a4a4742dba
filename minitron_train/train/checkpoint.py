"""Training checkpoints through megatron-core's dist_checkpointing, written by a thread while training continues.

megatron-core forks a process to write. In Python 3.11 a fork can deadlock while gloo threads are active:
PyOS_AfterFork_Child takes a lock that such a thread may hold. This module therefore copies the state to host memory and
calls megatron-core's writing function in a thread. A kill -9 also ends the writer.
"""

import contextlib
import os
import pickle
import queue
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from minitron_train.config import CheckpointConfig
from minitron_train.parallel import cpu, shims
from minitron_train.parallel.groups import Groups
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import PARTIAL
from minitron_train.stages import differences
from minitron_train.train import checkpoint_files as files
from minitron_train.train import safe_load
from minitron_train.train.best import BestMetric
from minitron_train.train.settings import current_record

WRITER_NICENESS = 10  # the writer yields its core to the training step
POLL_S = 0.05  # interval at which `poll` asks whether the writers have finished

WriteBucket = tuple[str, str, tuple[list[Any], list[Any]]]  # path, name, (bytes, tensors): the contents of one file


class Writing:
    """One checkpoint that is being written: a thread writes this rank's files, `finish` completes it collectively."""

    def __init__(
        self, request: AsyncRequest, live: set[int], folder: Path, manifest: Mapping[str, Any], rank: int
    ) -> None:
        self.finalize, self.folder, self.manifest, self.rank = request.finalize_fns, folder, manifest, rank
        self.thread: threading.Thread | None = None
        if request.async_fn is not None:  # this rank has data to write
            transforms, (_, buckets, results) = request.async_fn.args[0], request.async_fn_args  # type: ignore[attr-defined]
            arguments = (transforms, [copy_to_host(bucket, live) for bucket in buckets], results)
            self.thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            self.thread.start()

    def _write(self, transforms: list[Any], buckets: list[WriteBucket], results: "queue.Queue[Any]") -> None:
        """Write all buckets with megatron-core, then their hashes."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
        try:
            written = {k: write_bucket(transforms, k, bucket) for k, bucket in enumerate(buckets)}
            files.write_sums(self.folder, [Path(bucket[0]) for bucket in buckets], self.rank)
        except Exception as error:  # megatron-core raises it on all ranks in `finish`
            results.put(error)
        else:
            results.put(written)

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is still running."""
        return self.thread is not None and self.thread.is_alive()

    def finish(self) -> OSError | None:
        """Gather the results of all ranks; collective. Call it after every rank's thread has ended.

        Returns:
            On rank 0, the error that stopped it from writing the metadata, if any.

        Raises:
            CheckpointException: on every rank, if any rank could not write.
        """
        with cpu.cuda_means_cpu(), captured_errors() as errors:
            for step in self.finalize:
                step()
        return errors[0] if errors else None


@contextlib.contextmanager
def captured_errors() -> Iterator[list[OSError]]:
    """Make the functions of `shims.RANK0_WRITES` append an OSError to the yielded list instead of raising it.

    In megatron-core 0.16 and 0.19 rank 0 raises there, on a full disk for example, while the others wait in the next collective.
    """
    errors: list[OSError] = []

    def capturing(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            try:
                function(*args)
            except OSError as error:
                errors.append(error)

        return call

    writes = {shim: capturing(getattr(shim.owner, shim.attribute)) for shim in shims.RANK0_WRITES}
    with shims.replaced(writes):
        yield errors


def copy_to_host(bucket: WriteBucket, live: set[int]) -> WriteBucket:
    """Copy the tensors of a bucket to host memory, each once.

    Args:
        live: addresses of the storages that training changes. Other tensors in host memory are copies made by megatron-core.
    """
    path, name, (raw, tensors) = bucket
    copied = [
        (item, tensor.detach().to("cpu", copy=tensor.untyped_storage().data_ptr() in live)) for item, tensor in tensors
    ]
    return path, name, (raw, copied)


def write_bucket(transforms: list[Any], k: int, bucket: WriteBucket) -> list[Any]:
    """Write one file and fsync it. megatron-core's function returns its result through a queue."""
    results: queue.Queue[Any] = queue.Queue()
    counter: queue.Queue[int] = queue.Queue()
    counter.put(k)
    FileSystemWriterAsync.write_preloaded_data(transforms, k, bucket, results, counter, True)  # type: ignore[arg-type]
    outcome = results.get()[1]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class CheckpointManager:
    """Writes, loads and deletes the checkpoints of one run.

    Args:
        folder: on a file system that all ranks share.
        best_metric: ranks checkpoints for checkpoint.keep_best.
        belongs_to: the deciding settings, as one flat dict. A checkpoint can be resumed only with equal settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        groups: Groups,
        best_metric: BestMetric,
        belongs_to: Mapping[str, Any],
    ) -> None:
        self.folder, self.settings, self.groups = folder, settings, groups
        self.best_metric, self.belongs_to = best_metric, dict(belongs_to)
        self.writing: Writing | None = None
        shims.RESULTS_QUEUE.put(queue.Queue())
        names = [f"{PARTIAL}{uuid.uuid4().hex[:8]}"]
        dist.broadcast_object_list(names, src=0)
        self.suffix = names[0]  # unique to this run: the writer of a killed run may still be active
        if groups.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            files.recover(folder)
        groups.barrier()

    def save(self, step: int, state: dict[str, Any], facts: Mapping[str, Any], *, wait: bool = False) -> bool:
        """Start writing a checkpoint; collective. The tensors of `state` may change after this returns.

        Args:
            state: sharded state dict (megatron-core). Each rank writes the tensors whose replica number is 0.
            facts: entries for the manifest, such as `tokens` and `evaluation`.
            wait: return only when the checkpoint is on disk.

        Returns:
            False if this checkpoint has already failed. A failure is reported and leaves earlier checkpoints unchanged.
        """
        self.poll(wait=True)
        scratch = files.checkpoint_path(self.folder, step).with_suffix(self.suffix)
        if not self._prepare(scratch, state):
            return False
        live = {tensor.untyped_storage().data_ptr() for tensor, _ in sharded_tensors(state)}
        with cpu.cuda_means_cpu():
            strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
            how = shims.save_arguments()
            request = dist_checkpointing.save(  # torch checks that the boxes cover each tensor once
                state, str(scratch), strategy, validate_access_integrity=False, async_sharded_save=True, **how
            )
        assert isinstance(request, AsyncRequest)
        manifest = {"step": step, **facts, "belongs_to": self.belongs_to}
        self.writing = Writing(request, live, scratch, manifest, self.groups.rank)
        return self.poll(wait=wait or not self.settings.asynchronous)

    def poll(self, *, wait: bool = False) -> bool:
        """Publish the checkpoint if all its files are written; collective. Returns False if writing failed."""
        if self.writing is None:
            return True
        while self.groups.any(self.writing.is_writing):  # no rank waits inside a collective, which has a timeout
            if not wait:
                return True
            time.sleep(POLL_S)
        writing, self.writing, reason = self.writing, None, ""
        try:
            self._publish(writing, writing.finish())
        except (CheckpointException, OSError) as error:
            reason = str(error).strip().splitlines()[-1] or type(error).__name__
        if self.groups.any(bool(reason)):
            self._discard(reason, writing.folder)
            return False
        return True

    def load(self, template: dict[str, Any]) -> dict[str, Any] | None:
        """Load the newest undamaged checkpoint, or return None if no checkpoint exists; collective.

        Args:
            template: sharded state dict whose tensors are filled.

        Raises:
            UserError: its settings differ (they are named), it uses a class that is not allowed, or every checkpoint is damaged.
        """
        paths = self.groups.on_rank0(lambda: files.finished(self.folder))  # other nodes may have a stale listing
        for path in paths:
            wrong = files.find_damage(path, self.groups.rank, self.groups.world_size)
            if wrong:
                print(f"checkpoint {path.name} is damaged: {wrong}; falling back to the previous one", flush=True)
            if self.groups.any(wrong is not None):
                continue
            self._check_settings(path)
            with cpu.cuda_means_cpu():
                loaded = safe_load.load(template, path, self.groups.dp_group)
            self.groups.on_rank0(partial(files.make_newest, path, self.settings, self.best_metric))
            return loaded
        if paths:
            raise UserError(f"{self.folder}: all checkpoints are damaged; remove the folder to train from the start")
        return None

    def _check_settings(self, path: Path) -> None:
        changed = differences(current_record(files.read_manifest(path)["belongs_to"]), self.belongs_to, "")
        if changed:
            raise UserError(
                f"{path}: was saved with different settings ({'; '.join(changed)}); restore these settings, or choose another "
                "output_dir"
            )

    def _prepare(self, scratch: Path, state: dict[str, Any]) -> bool:
        """Create the folder if the disk has enough space. All ranks return the same result.

        megatron-core writes the run state on rank 0 before its first collective, where a failure would leave the other
        ranks waiting. A trial write of the same size finds such a failure here.
        """
        own = sum(tensor.nbytes for tensor, is_saved in sharded_tensors(state) if is_saved)
        needed = int(self.groups.sum(torch.tensor(own, device=self.groups.device)))
        short = False
        if self.groups.is_first:
            try:
                scratch.mkdir()
                (scratch / "probe").write_bytes(pickle.dumps(state.get("run")))
                (scratch / "probe").unlink()
                free = shutil.disk_usage(self.folder).free
                short = free < needed
                if short:
                    say(f"checkpoint {scratch.stem}: {self.folder} has {free:,} bytes free, {needed:,} are needed")
            except OSError as error:
                short = True
                say(f"checkpoint {scratch.stem}: {error}")
        if self.groups.any(short):
            self._discard("not enough disk space", scratch)
            return False
        return True

    def _publish(self, writing: Writing, error: Exception | None) -> None:
        """Publish a checkpoint that all ranks have written.

        Args:
            error: an earlier error of rank 0.

        Raises:
            OSError: on every rank, if rank 0 had or has an error.
        """
        if self.groups.is_first and error is None:
            try:
                path = files.checkpoint_path(self.folder, writing.manifest["step"])
                files.publish(writing.folder, path, writing.manifest)
                files.remove_old(self.folder, self.settings, self.best_metric)
            except (OSError, UserError) as caught:  # UserError: from atomic_write_text
                error = caught
        if self.groups.any(error is not None):
            raise OSError(str(error or "rank 0 could not finish the checkpoint"))

    def _discard(self, reason: str, scratch: Path) -> None:
        """Report that a checkpoint could not be written, and remove its files."""
        if self.groups.is_first:
            good = files.finished(self.folder)
            left = f"the last good one is {good[0].name}" if good else "no earlier one exists"
            say(f"checkpoint {scratch.stem} could not be written ({reason}); {left}")
            shutil.rmtree(scratch, ignore_errors=True)
        self.groups.barrier()


def sharded_tensors(state: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
    """Yield the tensors of a sharded state dict, and whether this rank saves them."""
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and isinstance(entry.data, Tensor):
            yield entry.data, is_main_replica(entry.replica_id)

"""Training checkpoints through megatron-core's dist_checkpointing, written by a thread while training goes on.

megatron-core forks its writer. A fork in a process whose gloo threads are at work can hang for ever in Python 3.11
(PyOS_AfterFork_Child takes a lock that such a thread may have held); so the state is copied to host memory, and a
thread of this process hands it to megatron-core's writing function. After a kill -9 nobody goes on writing.
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
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from minitron_train.config import CheckpointConfig
from minitron_train.parallel import cpu
from minitron_train.parallel.groups import Groups
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import PARTIAL
from minitron_train.stages import differences
from minitron_train.train import checkpoint_files as files
from minitron_train.train import safe_load
from minitron_train.train.best import BestMetric

WRITER_NICENESS = 10  # the writer yields its core to the training step
POLL_S = 0.05  # between looks at the writers that are waited for

ALONE = (  # what rank 0 writes between two collectives of megatron-core
    (FileSystemWriterAsync, "finish"),  # .metadata
    (serialization, "save_config"),  # metadata.json
)

WriteBucket = tuple[str, str, tuple[list[Any], list[Any]]]  # path, name, (bytes, tensors): what goes into one file


class Writing:
    """One checkpoint on its way to disk: this rank's files by a thread, the rest by `finish`, collectively."""

    def __init__(self, request: AsyncRequest, folder: Path, manifest: Mapping[str, Any], rank: int) -> None:
        self.finalize, self.folder, self.manifest, self.rank = request.finalize_fns, folder, manifest, rank
        self.thread: threading.Thread | None = None
        if request.async_fn is not None:  # this rank has something to write
            transforms, (_, buckets, results) = request.async_fn.args[0], request.async_fn_args  # type: ignore[attr-defined]
            arguments = (transforms, [copy_to_host(bucket) for bucket in buckets], results)
            self.thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            self.thread.start()

    def _write(self, transforms: list[Any], buckets: list[WriteBucket], results: "queue.Queue[Any]") -> None:
        """megatron-core's writing, bucket by bucket, then the hashes of what it wrote."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
        try:
            written = {k: write_bucket(transforms, k, bucket) for k, bucket in enumerate(buckets)}
            files.write_sums(self.folder, [Path(bucket[0]) for bucket in buckets], self.rank)
        except Exception as error:  # megatron-core raises it in `finish`, on all ranks
            results.put(error)
        else:
            results.put(written)

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is still at work."""
        return self.thread is not None and self.thread.is_alive()

    def finish(self) -> OSError | None:
        """Gather the results of all ranks; collective, once every rank's thread has ended.

        Returns:
            On rank 0, why it could not write what it adds to them.

        Raises:
            CheckpointException: on every rank, when one of them could not write.
        """
        with cpu.cuda_means_cpu(), kept_errors() as errors:
            for step in self.finalize:
                step()
        return errors[0] if errors else None


@contextlib.contextmanager
def kept_errors() -> Iterator[list[OSError]]:
    """For the block: the functions of `ALONE` note an OSError here and return.

    megatron-core 0.16 lets rank 0 raise there, as on a full disk, while the others wait for it in the next collective.
    """
    errors: list[OSError] = []

    def kept(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            try:
                function(*args)
            except OSError as error:
                errors.append(error)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name in ALONE:
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, kept(original))
        yield errors


def copy_to_host(bucket: WriteBucket) -> WriteBucket:
    """A snapshot that training does not change. Beside a GPU, what lies on the host is megatron-core's own copy already."""
    path, name, (raw, tensors) = bucket
    copy = not torch.cuda.is_available()
    return path, name, (raw, [(item, tensor.detach().to("cpu", copy=copy)) for item, tensor in tensors])


def write_bucket(transforms: list[Any], k: int, bucket: WriteBucket) -> list[Any]:
    """One file, fsynced; megatron-core's function reports through queues."""
    results: queue.Queue[Any] = queue.Queue()
    counter: queue.Queue[int] = queue.Queue()
    counter.put(k)
    FileSystemWriterAsync.write_preloaded_data(transforms, k, bucket, results, counter, True)  # type: ignore[arg-type]
    outcome = results.get()[1]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class CheckpointManager:
    """The checkpoints of one run.

    Args:
        folder: on a file system that all ranks see.
        yardstick: which of them are the best.
        belongs_to: the settings that a checkpoint must have been made with to be continued, flat.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        groups: Groups,
        yardstick: BestMetric,
        belongs_to: Mapping[str, Any],
    ) -> None:
        self.folder, self.settings, self.groups = folder, settings, groups
        self.yardstick, self.belongs_to = yardstick, dict(belongs_to)
        self.writing: Writing | None = None
        filesystem_async._results_queue = queue.Queue()  # instead of megatron-core's, which is in a spawned process
        names = [f"{PARTIAL}{uuid.uuid4().hex[:8]}"]
        dist.broadcast_object_list(names, src=0)
        self.suffix = names[0]  # of this process's unfinished folders: a killed one's writer may still be at work
        if groups.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            files.recover(folder)
        groups.barrier()

    def save(self, step: int, state: dict[str, Any], facts: Mapping[str, Any], *, wait: bool = False) -> bool:
        """Begin to write a checkpoint; collective. The tensors of `state` may change as soon as this returns.

        Args:
            state: sharded state dict (megatron-core).
            facts: `tokens`, `evaluation` and the like, for the manifest.
            wait: return when it is on disk.

        Returns:
            Whether this checkpoint has not failed so far. A failure is said, and leaves the earlier checkpoints as they are.
        """
        self.poll(wait=True)
        scratch = files.checkpoint_path(self.folder, step).with_suffix(self.suffix)
        if not self._prepare(scratch, state):
            return False
        with cpu.cuda_means_cpu():
            strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
            request = dist_checkpointing.save(state, str(scratch), strategy, async_sharded_save=True)
        assert isinstance(request, AsyncRequest)
        manifest = {"step": step, **facts, "belongs_to": self.belongs_to}
        self.writing = Writing(request, scratch, manifest, self.groups.rank)
        return self.poll(wait=wait or not self.settings.asynchronous)

    def poll(self, *, wait: bool = False) -> bool:
        """Publish the checkpoint whose files have arrived; collective. False when writing it failed."""
        if self.writing is None:
            return True
        while self.groups.any(self.writing.is_writing):  # nobody waits inside a collective, which has a time limit
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

    def load(self, make_template: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The newest checkpoint that is whole; None when there is none. Collective.

        Args:
            make_template: gives the sharded state dict whose tensors are filled.

        Raises:
            UserError: it belongs to other settings (named), holds a class that is not allowed, or every checkpoint is damaged.
        """
        paths = self.groups.on_rank0(lambda: files.finished(self.folder))  # other nodes may see an older listing
        for path in paths:
            wrong = files.damage(path, self.groups.rank, self.groups.world_size)
            if wrong:
                print(f"checkpoint {path.name} is damaged: {wrong}; falling back to the one before", flush=True)
            if self.groups.any(wrong is not None):
                continue
            self._check_settings(path)
            with cpu.cuda_means_cpu():
                loaded = safe_load.load(make_template(), path)
            self.groups.on_rank0(partial(files.settle, path, self.settings, self.yardstick))
            return loaded
        if paths:
            raise UserError(f"{self.folder}: no checkpoint is whole; remove the folder to begin again")
        return None

    def _check_settings(self, path: Path) -> None:
        changed = differences(files.read_manifest(path)["belongs_to"], self.belongs_to, "")
        if changed:
            raise UserError(
                f"{path} was made with other settings ({'; '.join(changed)}); set them back, or choose another output_dir"
            )

    def _prepare(self, scratch: Path, state: dict[str, Any]) -> bool:
        """An empty folder, when the disk has room; all ranks get the same answer.

        What megatron-core writes at once, on rank 0 and before its collectives, must not fail there: as much is tried here.
        """
        needed = sum_over_tensors(state) * self.groups.tp_size
        short = False
        if self.groups.is_first:
            try:
                scratch.mkdir()
                (scratch / "probe").write_bytes(pickle.dumps(state.get("run")))
                (scratch / "probe").unlink()
                free = shutil.disk_usage(self.folder).free
                short = free < needed
                if short:
                    say(f"checkpoint {scratch.stem}: {self.folder} has {free:,} bytes free; {needed:,} are needed")
            except OSError as error:
                short = True
                say(f"checkpoint {scratch.stem}: {error}")
        if self.groups.any(short):
            self._discard("no room", scratch)
            return False
        return True

    def _publish(self, writing: Writing, error: Exception | None) -> None:
        """After all ranks' files are written, unless rank 0 met an `error`: the checkpoint appears. OSError on every rank."""
        if self.groups.is_first and error is None:
            try:
                path = files.checkpoint_path(self.folder, writing.manifest["step"])
                files.publish(writing.folder, path, writing.manifest)
                files.tidy(self.folder, self.settings, self.yardstick)
            except (OSError, UserError) as caught:  # UserError: from atomic_write_text
                error = caught
        if self.groups.any(error is not None):
            raise OSError(str(error or "rank 0 could not finish the checkpoint"))

    def _discard(self, reason: str, scratch: Path) -> None:
        """Say that a checkpoint could not be written, and remove what there is of it."""
        if self.groups.is_first:
            good = files.finished(self.folder)
            left = f"the last good one is {good[0].name}" if good else "there is none before it"
            say(f"checkpoint {scratch.stem} could not be written ({reason}); {left}")
            shutil.rmtree(scratch, ignore_errors=True)
        self.groups.barrier()


def sum_over_tensors(state: Any) -> int:
    """Bytes of all tensors in a nested sharded state dict, on this rank."""
    if isinstance(state, dict):
        return sum(sum_over_tensors(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(sum_over_tensors(value) for value in state)
    data = getattr(state, "data", None)
    return data.numel() * data.element_size() if isinstance(data, Tensor) else 0

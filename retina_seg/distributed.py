"""Several processes on one task: what torchrun started, and the few things that its processes say to each other.

    with join() as group:
        fit(config, group=group)

torchrun tells each process its number, how many there are and where they meet (RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Without these a process is alone, and nothing here reaches torch.distributed.
Whatever is small (numbers, random states, errors) goes between the processors over Gloo, so that no GPU waits for it;
gradients go over NCCL on GPUs and over Gloo on processors.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from retina_seg.utils import UserError, choose_device

T = TypeVar("T")
# A process that dies is noticed by torchrun and by its broken connections, at once. This is for one that hangs, and must
# be longer than the first process validates and saves while the others wait for it.
TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class Group:
    """The processes that share one task, seen from one of them. `Group()` is a process alone: every answer is its own.

    Attributes:
        rank, size: this process's number, from 0 on, and how many there are.
        local_rank, local_size: the same among the processes of this machine.
        store: what the processes reach before, and without, a meeting of all.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files and speaks for all."""
        return self.rank == 0

    # ------------------------------------------------------------------------------------------------- devices, models

    def device(self, name: str) -> torch.device:
        """The device called `name` (`utils.choose_device`); of several GPUs this process's own.

        Raises:
            UserError: no such device, or one GPU named for several processes.
        """
        device = choose_device(name)
        if self.store is None or device.type != "cuda":
            return device
        if device.index is not None and self.local_size > 1:
            raise UserError(f"--device {name}: is one GPU for {self.local_size} processes; give --device cuda")
        if device.index is None:
            device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

    def meet(self, device: torch.device) -> None:
        """Wait for all processes, and let them exchange tensors on `device` from now on.

        Raises:
            UserError: a device that several processes cannot train on.
        """
        if self.store is None or dist.is_initialized():
            return
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--device {device.type}: several processes train on cpu or cuda")
        if device.type == "cuda" and self.local_size > torch.cuda.device_count():
            raise UserError(
                f"{self.local_size} processes for {torch.cuda.device_count()} GPUs on this machine: "
                "lower --nproc_per_node, or add --device cpu"
            )
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.size, timeout=TIMEOUT)

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model` such that its gradients are the mean over the processes; all start with the first one's weights.

        BatchNorm takes its statistics over each process's own photos, on GPUs as on processors (SyncBatchNorm is for GPUs
        only, and waits for all of them at every layer); the running ones that are kept are the first process's.
        """
        if self.store is None:
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    # --------------------------------------------------------------------------------- what the processes tell each other

    def highest(self, number: int) -> int:
        """The highest of the processes' numbers."""
        if self.store is None:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of the processes' `values`, of any one shape, float."""
        if self.store is None:
            return values
        total = values.detach().cpu()
        dist.all_reduce(total)
        return total / self.size

    def gather(self, value: T) -> list[T]:
        """The processes' values, by rank."""
        if self.store is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, call: Callable[[], T]) -> T:
        """What `call` gives in the first process, in all; it is called there only.

        Raises:
            UserError: in all, where it was raised in the first.
        """
        if self.store is None:
            return call()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = call()
            except UserError as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if told[1] is not None:
            raise told[1]
        return told[0]

    def say_once(self, text: str, file: TextIO | None = None) -> None:
        """Print `text` (to stderr), unless another process was the first to say something in this way."""
        if self.store is not None:
            try:
                if self.store.add("said", 1) > 1:
                    # torchrun ends all as soon as one has: not before the other one has printed
                    self.store.wait(["heard"], timedelta(seconds=10))
                    return
            except RuntimeError:  # the store has gone with the machine it was on: better twice than never
                pass
        print(text, file=file or sys.stderr, flush=True)
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set("heard", "1")

    def note(self, key: str) -> None:
        """Let the others know that `key` has come."""
        if self.store is not None:
            self.store.set(key, "1")

    def wait_for(self, *keys: str) -> None:
        """Wait until all `keys` were noted: however long that takes, since torchrun ends the waiting if anyone dies."""
        while self.store is not None and not self.store.check(list(keys)):
            time.sleep(0.1)


ALONE = Group()


@contextlib.contextmanager
def join() -> Iterator[Group]:
    """The processes that torchrun started, this one among them; or `ALONE` where it did not.

    Raises:
        UserError: torchrun's variables are there in part only, or are no numbers.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        store, _, _ = next(iter(dist.rendezvous("env://", rank, size, timeout=TIMEOUT)))
    except (KeyError, ValueError) as error:
        raise UserError(f"RANK and WORLD_SIZE are set, but not as torchrun does ({error}); unset them") from None
    try:
        group = Group(rank, size, local_rank, local_size, store)
        yield group
        if dist.is_initialized():  # who leaves while another still answers may be aborted at its very end
            group.note(f"ready to part {rank}")
            group.wait_for(*(f"ready to part {other}" for other in range(size)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def share(batch: list[int], group: Group) -> tuple[list[int], float]:
    """This process's part of the photos of a batch, and the weight of its mean loss in the mean over the processes.

    The parts lie one behind the other and differ by one photo at most, and the weights make the mean over processes that
    over photos: an incomplete batch counts every photo alike. A process without a photo takes the first, with weight 0,
    since all must take part in every step.

    >>> [share([7, 8, 9], Group(rank, 2)) for rank in (0, 1)]
    [([7], 0.6666666666666666), ([8, 9], 1.3333333333333333)]
    """
    start, end = (rank * len(batch) // group.size for rank in (group.rank, group.rank + 1))
    if start == end:
        return batch[:1], 0.0
    return batch[start:end], (end - start) * group.size / len(batch)


def has_lost_another(error: BaseException) -> bool:
    """Whether `error` says that another process is not there any more: Gloo has no exception of its own for that."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL", "Connection closed"))
    )


def own_session(_: int) -> None:
    """For a loader's workers: torchrun signals the whole process group of a training; only the training is to hear it."""
    if hasattr(os, "setsid"):
        os.setsid()

"""Several processes on one task, as torchrun starts them: its environment variables, one process group, rank 0 writes."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DistributedSampler, RandomSampler, Sampler

from retina_seg.device import choose_device
from retina_seg.utils import UserError

TIMEOUT = timedelta(hours=6)  # a rank may wait that long for another's validation or last images


class World(NamedTuple):
    """The processes that share a task, seen from one of them: its rank, how many there are, and its device."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files that all share."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device called `name` (`device.choose_device`); of several GPUs this process's own."""
        device = choose_device(name)
        if self.size == 1 or device.type != "cuda":
            return device
        if self.local_size > torch.cuda.device_count():
            raise UserError(f"{self.local_size} processes need as many GPUs; lower --nproc_per_node, or --device cpu")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def sampler(self, dataset: Any, seed: int, shared_state: bool) -> Sampler[int]:
        """The order of the items of `dataset`, shuffled; several processes share them. Call `set_epoch` before each epoch.

        Args:
            shared_state: draw from torch's global random state, as the original does, instead of by (seed, epoch).
        """
        if self.size > 1:
            return DistributedSampler(dataset, self.size, self.rank, seed=seed)
        return RandomSampler(dataset, generator=None if shared_state else torch.Generator())

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model` with gradients averaged over the processes; batch normalisation stays each process's own."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


@contextlib.contextmanager
def process_group() -> Iterator[World]:
    """The processes that torchrun started, this one among them; alone where it did not.

    Raises `UserError`: torchrun's variables are there in part only, or are no numbers.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World()
        return
    try:
        world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, "env://", timeout=TIMEOUT)
    except (KeyError, ValueError) as error:
        raise UserError(f"RANK and WORLD_SIZE are set, but not as torchrun does ({error}); unset them") from None
    try:
        yield world
        world.barrier()
    finally:
        dist.destroy_process_group()


def set_epoch(sampler: Any, seed: int, epoch: int) -> None:
    """Let a sampler of `World.sampler` draw the order of this epoch next."""
    if isinstance(sampler, DistributedSampler):
        sampler.set_epoch(epoch)
    elif sampler.generator is not None:
        sampler.generator.manual_seed(seed * 100_003 + epoch)

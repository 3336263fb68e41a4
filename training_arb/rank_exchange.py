"""What the ranks of a run tell each other between backward and update; one rank alone talks to nobody."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

Tensors = tuple[torch.Tensor, ...]


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class AveragedGradient:
    """A dW on its way to the mean over ranks: the sum runs while backward goes on, `result` waits for it."""

    def __init__(self, dW: torch.Tensor):
        self._dW = dW
        self._work = dist.all_reduce(dW, async_op=True) if num_ranks() > 1 else None

    def result(self) -> torch.Tensor:
        """The mean: the same bits on every rank."""
        if self._work is not None:
            self._work.wait()
            self._dW /= num_ranks()
            self._work = None
        return self._dW


def used_on_any_rank(used: list[bool], device: torch.device) -> list[bool]:
    """Which of a list of things some rank used. Every rank must call it, with its things in the same order."""
    if num_ranks() == 1 or not used:
        return used
    counts = torch.tensor(used, dtype=torch.int32, device=device)
    dist.all_reduce(counts)
    return (counts > 0).tolist()


def join_ranks(mine: Tensors | None) -> Tensors | None:
    """Tuples of tensors, each joined along its first axis in rank order; ranks differ in length or have None.

    Every rank must call it. None when no rank has anything; what came from other ranks is on the CPU.
    """
    if num_ranks() == 1:
        return mine
    everyone: list[Tensors | None] = [None] * num_ranks()
    dist.all_gather_object(everyone, None if mine is None else tuple(tensor.cpu() for tensor in mine))
    given = [tensors for tensors in everyone if tensors is not None]
    if not given:
        return None
    return tuple(torch.cat(column) for column in zip(*given, strict=True))


def check_ranks_agree(model: nn.Module, step: int) -> None:
    """Compare a checksum of every persistent tensor. Raises RuntimeError on all ranks, naming what differs."""
    if num_ranks() == 1:
        return
    state = sorted(model.state_dict().items())
    mine = [zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()) for _, tensor in state]
    everyone: list[list[int]] = [[]] * num_ranks()
    dist.all_gather_object(everyone, mine)
    for rank, sums in enumerate(everyone):
        for (name, _), ours, theirs in zip(state, everyone[0], sums, strict=True):
            if ours != theirs:
                raise RuntimeError(f"step {step}: rank {rank} differs from rank 0 in {name}: their states have parted")


def lone_process_warning(environment: Mapping[str, str]) -> str | None:
    """A line for people whose launcher started one process where they asked for several; None where all is well.

    `accelerate launch --cpu --num_processes 2` starts one and says nothing; it leaves a master's address behind.
    """
    ranked = any(name in environment for name in ("RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
    if ranked or "ACCELERATE_USE_CPU" not in environment or "MASTER_ADDR" not in environment:
        return None
    return (
        "accelerate started one process, not several: on CPUs use"
        " torchrun --nproc_per_node N scripts/pretrain.py --use_cpu true"
    )

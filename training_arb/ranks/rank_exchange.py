"""Communication between the ranks of a run; with one rank every function returns without any."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import increment_version

from .rank_loss import RanksPartedError

Tensors = tuple[torch.Tensor, ...]
IN_CACHE = 1 << 16  # elements that are summed and divided at a time


def num_ranks() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def share_out(sizes: list[int]) -> list[int]:
    """A rank for each of a list of sizes, with nearly equal totals: each goes to the rank with the least so far."""
    totals = [0] * num_ranks()
    ranks = []
    for size in sizes:
        ranks.append(totals.index(min(totals)))
        totals[ranks[-1]] += size
    return ranks


class AveragedGradient:
    """The mean over ranks of a dW, computed at rank `owner` alone; the parts travel while backward goes on.

    The owner sums in rank order, so the bits do not depend on the network. Sending from rank to rank takes two thirds
    of the time of gloo's reduce.
    """

    def __init__(self, dW: torch.Tensor, owner: int):
        self._parts = [dW]
        self._works: list[Any] = []
        if num_ranks() > 1 and owner == this_rank():
            self._parts = [dW if rank == owner else torch.empty_like(dW) for rank in range(num_ranks())]
            self._works = [dist.irecv(part, rank) for rank, part in enumerate(self._parts) if rank != owner]
        elif num_ranks() > 1:
            self._works = [dist.isend(dW, owner)]

    def wait(self) -> None:
        """Wait until this rank's part is sent or received."""
        for work in self._works:
            work.wait()
        self._works = []

    def result(self) -> torch.Tensor:
        """Waits, and returns the mean at the owner; elsewhere this rank's own part."""
        self.wait()
        total, *others = self._parts
        if others:
            for here, *there in zip(*(part.view(-1).split(IN_CACHE) for part in self._parts), strict=True):
                for part in there:
                    here += part
                here /= num_ranks()
        self._parts = [total]
        return total


class SentState:
    """Tensors on their way from rank `owner` to all others, which have them in their own tensors after `wait`."""

    def __init__(self, tensors: list[torch.Tensor], owner: int):
        self._tensors = tensors
        self._works: list[Any] = [dist.broadcast(_bytes_of(tensor), owner, async_op=True) for tensor in tensors]

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        increment_version(self._tensors)  # so that caches of the old values, such as unpacked trits, are refreshed


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as bytes: some backends cannot send int16."""
    return tensor.view(-1).view(torch.uint8)


def sum_over_ranks(counts: list[int], device: torch.device) -> list[int]:
    """Sums of counts over ranks. Every rank must call it with the same number of counts."""
    if num_ranks() == 1 or not counts:
        return counts
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def used_on_any_rank(used: list[bool], device: torch.device) -> list[bool]:
    """For each item, whether some rank used it. Every rank must call it, with its items in the same order."""
    return [count > 0 for count in sum_over_ranks([int(flag) for flag in used], device)]


def join_ranks(mine: Tensors | None, device: torch.device) -> Tensors | None:
    """Tuples of tensors, each joined along its first axis in rank order; ranks differ in length or have None.

    Every rank must call it. None when no rank has anything.
    """
    if num_ranks() == 1:
        return mine
    forms: list[list[tuple[torch.Size, torch.dtype]] | None] = [None] * num_ranks()
    dist.all_gather_object(forms, None if mine is None else [(tensor.shape, tensor.dtype) for tensor in mine])
    given = []
    for rank, form in enumerate(forms):
        if form is not None:
            new = (torch.empty(shape, dtype=dtype, device=device) for shape, dtype in form)
            tensors = list(new) if mine is None or rank != this_rank() else [tensor.contiguous() for tensor in mine]
            SentState(tensors, rank).wait()
            given.append(tensors)
    return tuple(torch.cat(column) for column in zip(*given, strict=True)) if given else None


def check_ranks_agree(model: nn.Module, step: int) -> None:
    """Compare a checksum of every persistent tensor. Raises RanksPartedError on all ranks, naming the tensor."""
    if num_ranks() == 1:
        return
    state = sorted(model.state_dict().items())
    mine = [zlib.crc32(_bytes_of(tensor.cpu().contiguous()).numpy().data) for _, tensor in state]
    everyone: list[list[int]] = [[]] * num_ranks()
    dist.all_gather_object(everyone, mine)
    for rank, sums in enumerate(everyone):
        for (name, _), ours, theirs in zip(state, everyone[0], sums, strict=True):
            if ours != theirs:
                raise RanksPartedError(
                    f"step {step}: rank {rank} differs from rank 0 in {name}: their states are not equal"
                )


def lone_process_warning(environment: Mapping[str, str]) -> str | None:
    """A warning for users whose launcher started one process instead of several; None where all is well.

    `accelerate launch --cpu --num_processes 2` starts one without a warning; it leaves MASTER_ADDR in the environment.
    """
    ranked = any(name in environment for name in ("RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
    if ranked or "ACCELERATE_USE_CPU" not in environment or "MASTER_ADDR" not in environment:
        return None
    return (
        "accelerate started one process, not several: on CPUs use"
        " torchrun --nproc_per_node N scripts/pretrain.py --use_cpu true"
    )

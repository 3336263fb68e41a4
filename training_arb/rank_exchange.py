"""What the ranks of a run tell each other between backward and update; one rank alone talks to nobody."""

from __future__ import annotations

import torch
import torch.distributed as dist

Tensors = tuple[torch.Tensor, ...]


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def average_over_ranks(dW: torch.Tensor) -> None:
    """The mean over ranks, in place."""
    if num_ranks() > 1:
        dist.all_reduce(dW)
        dW /= num_ranks()


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

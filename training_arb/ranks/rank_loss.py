"""Detects lost or hanging ranks and reports how to resume."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

# gloo raises plain RuntimeErrors that name the place in its sources, whatever failed
GLOO_PLACE = re.compile(r"\[\S*gloo/\S*\] ")
LEARNED_LATER = ". This is typically"


class RankLostError(RuntimeError):
    """Another rank ended or hangs, and this one cannot continue without it. The message is one line."""


class RanksPartedError(RuntimeError):
    """The ranks no longer hold the same state. The message names what differs."""


def meet_on_cpus(timeout: int) -> None:
    """Join the ranks of this run if the environment names several. timeout: seconds to wait for a rank, now and later.

    accelerate would join them too, but it passes the timeout on for GPUs only, and where torchrun restarts lost ranks
    it finds the addresses of the previous ones. Raises ValueError on an impossible timeout, RankLostError when not all
    ranks join.
    """
    if timeout <= 0:
        raise ValueError(f"ddp_timeout={timeout} must be positive: seconds to wait for another rank")
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    wait = timedelta(seconds=timeout)
    try:
        store, rank, size = next(rendezvous("env://", timeout=wait))
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    except RuntimeError as error:
        if not is_connection_error(error):
            raise
        raise RankLostError(f"rank {os.environ['RANK']}: the ranks could not connect: {_first_words(error)}") from error


@contextmanager
def naming_lost_ranks(describe: Callable[[], str]) -> Iterator[None]:
    """Turn the error that a broken connection between ranks raises within the block into RankLostError.

    describe: returns where the run stands and how to continue; called only then.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_connection_error(error):
            raise
        rank = dist.get_rank() if dist.is_initialized() else 0
        raise RankLostError(
            f"rank {rank}: another rank was lost or hangs ({_first_words(error)}) {describe()}"
        ) from error


def is_connection_error(error: RuntimeError) -> bool:
    """Whether the connection between ranks raised the error, not this rank's own work."""
    return isinstance(error, dist.DistError) or GLOO_PLACE.search(str(error)) is not None


def _first_words(error: RuntimeError) -> str:
    """The first line, without source locations and advice."""
    line = GLOO_PLACE.sub("", str(error)).partition("\n")[0]
    return line.partition(LEARNED_LATER)[0].rstrip(". ")

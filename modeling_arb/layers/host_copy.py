"""A small tensor's values for the host, without a wait of the device."""

from __future__ import annotations

import torch


class HostCopy:
    """A copy that is queued now and read later.

    `read` waits until the device has come to the copy and no further: the work that was queued after it goes on.
    """

    def __init__(self, tensor: torch.Tensor):
        self.values = tensor.to("cpu", non_blocking=True)
        self.copied = torch.cuda.Event() if tensor.is_cuda else None
        if self.copied is not None:
            self.copied.record()

    def read(self) -> list[int]:
        """The values of an integer tensor (n,)."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()

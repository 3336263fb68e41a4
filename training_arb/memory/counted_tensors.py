"""Counts the tensors of a step: the size, lifetime and area of every storage that is made while a block runs.

Counting them where they are made is exact and does not depend on the allocator.
"""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .state_audit import area_of

BLOCK_MLP = "block MLP"


def probed_area(name: str) -> str:
    """The audit's area of the module or tensor with that name; a block's MLP is separate from its attention."""
    return BLOCK_MLP if {"blocks", "mlp"} <= set(name.split(".")) else area_of(name)


class CountedTensors(TorchDispatchMode):
    """Bytes of the storages made inside the block and still alive: `now`, and `peak` over the block.

    sizes: bytes of every storage, in the order of making; events: i where storage i was made, ~i where it was freed.
    With a model, each storage counts for the area of the module whose forward made it.
    """

    def __init__(self, model: nn.Module | None = None):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: list[int] = []
        self.events: list[int] = []
        self._areas: list[str] = []
        self._alive: dict[int, int] = {}
        self._inside = ["other"]
        self._named = {} if model is None else dict(model.named_modules())
        self._hooks: list = []

    def __enter__(self):
        for name, module in self._named.items():
            area = probed_area(name)
            if area != "other":
                enter = module.register_forward_pre_hook(lambda *_, area=area: self._inside.append(area))
                leave = module.register_forward_hook(lambda *_: self._leave(), always_call=True)
                self._hooks += [enter, leave]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def _leave(self) -> None:
        self._inside.pop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = len(self.sizes)
            self.events.append(len(self.sizes))
            self.sizes.append(storage.nbytes())
            self._areas.append(self._inside[-1])
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        made = self._alive.pop(key)
        self.events.append(~made)
        self.now -= self.sizes[made]

    def restart_peak(self) -> None:
        """Start measuring `peak` anew."""
        self.peak = self.now

    def alive_by_area(self) -> dict[str, int]:
        """Bytes that are alive now, by area, largest first."""
        found: Counter[str] = Counter()
        for made in self._alive.values():
            found[self._areas[made]] += self.sizes[made]
        return {area: size for area, size in found.most_common() if size}

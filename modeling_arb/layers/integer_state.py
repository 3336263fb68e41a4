"""Base classes of modules whose persistent state is integer buffers."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn
from transformers import initialization as init

from arb_kernels.formats.state_layout import StateTensor

ONE_PROCESS_PER_GPU = (
    "nn.DataParallel copies the model to every GPU, and what the copies of integer state learn is lost; launch one"
    " process per GPU (torchrun --nproc_per_node N, or accelerate launch --multi_gpu), or let one GPU be seen"
    " (CUDA_VISIBLE_DEVICES=0)"
)


class IntegerState(nn.Module):
    """A module that lists its persistent tensors in `layout` and registers them with `register_state`; audit,
    checkpoints and loader use that list."""

    def layout(self) -> dict[str, StateTensor]:
        """The persistent tensors by name. Training state is listed even if the module does not hold it."""
        raise NotImplementedError

    def caches(self) -> dict[str, torch.Tensor]:
        """Tensors that the module keeps in memory besides its state, by description; they can be recomputed."""
        return {}

    def register_state(self, with_training_state: bool) -> None:
        """Register the buffers, at zero."""
        for name, spec in self.layout().items():
            if spec.inference or with_training_state:
                self.register_buffer(name, torch.zeros(spec.shape, dtype=spec.dtype))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Refuses a tensor of another dtype, which torch would cast silently."""
        for name, spec in self.layout().items():
            given = state_dict.get(prefix + name)
            if given is not None and given.dtype != spec.dtype:
                errors.append(f"tensor {prefix}{name} has dtype {given.dtype}, expected {spec.dtype}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def add_training_state(self) -> None:
        """Register the tensors that an inference checkpoint leaves out, at zero."""
        device = next(self.buffers()).device
        for name, spec in self.layout().items():
            if not hasattr(self, name):
                self.register_buffer(name, torch.zeros(spec.shape, dtype=spec.dtype, device=device))

    def reset_state(self) -> None:
        """Set the registered buffers to their initial values."""
        for name in self.layout():
            if hasattr(self, name):
                init.zeros_(getattr(self, name))

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Called by nn.DataParallel for each module before its forward. Raises ValueError."""
        raise ValueError(ONE_PROCESS_PER_GPU)


class ObservedState(IntegerState):
    """Integer state that changes without a gradient: usage counts, edges, biases.

    A training forward calls `observe`; nothing changes until the attached optimizer's `step()`, which joins the
    observations of all micro-batches and ranks and passes them to `apply_observations`. So a forward never sees its own
    observations, and no position depends on a later one.
    """

    observing = False  # set by an attached optimizer

    def observe(self, *seen: torch.Tensor) -> None:
        """Keep tensors until the step ends. Those of later calls are appended to them along their first axis."""
        if self.observing and self.training and torch.is_grad_enabled():
            self.__dict__.setdefault("_observations", []).append(tuple(tensor.detach() for tensor in seen))

    def take_observations(self) -> tuple[torch.Tensor, ...] | None:
        """The observations since the last call, each argument of `observe` concatenated along its first axis."""
        calls = self.__dict__.pop("_observations", [])
        return tuple(torch.cat(column) for column in zip(*calls, strict=True)) if calls else None

    def apply_observations(self, *seen: torch.Tensor, key: int) -> None:
        """Update the state in place from the observations of the whole step. `key` selects this step's random bits.

        The result may depend only on the state and on the arguments, whose rows come in rank order.
        """
        raise NotImplementedError

"""TernaryMatrix: the integer state of one weight matrix, and what the layers built on it share."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol
from weakref import WeakSet

import torch
from transformers import initialization as init
from transformers.utils import logging

from arb_kernels.formats.correlation_scale import correlation_octaves
from arb_kernels.formats.decode_layout import decoding_form
from arb_kernels.formats.exponents import EIGHTHS, power_of_two
from arb_kernels.formats.groups import num_groups
from arb_kernels.formats.packing import TRITS_PER_BYTE, largest_level, packed_width, unpack_levels
from arb_kernels.formats.scaled_rows import effective_weight
from arb_kernels.formats.state_layout import StateTensor, state_layout
from configuration_arb.configuration_arb import ArbConfig

from .absent_parameters import AbsentWeight
from .integer_state import IntegerState

SEVERAL_BACKWARDS = "call IntegerOptimizer.begin_micro_batch(last=False) before the forwards of an accumulated step"
DECODED, ROW_SCALES, UNPACKED = "weights laid out to decode", "row scales", "unpacked weights"
INIT_CHUNK = 1 << 18  # elements drawn at a time, as int64: a large table must not need eight times its memory


def _fill_at_random(tensor: torch.Tensor, below: int, modulo: torch.Tensor | None = None) -> None:
    """Uniform integers in [0, below), then modulo a number per column, chunk of rows by chunk."""
    if getattr(tensor, "_is_hf_initialized", False):
        return
    for rows in tensor.split(max(1, INIT_CHUNK // max(1, tensor.shape[1]))):
        drawn = torch.randint(0, below, rows.shape, device=tensor.device)
        rows.copy_(drawn if modulo is None else drawn % modulo)


StateVersions = list[tuple[int, int]]  # of each tensor that a forward reads: its id and its version


class ForwardUse:
    """Record of one forward through a matrix, held by its autograd graph. `versions` identifies the state that was
    read."""

    __slots__ = ("__weakref__", "versions")

    def __init__(self, versions: StateVersions):
        self.versions = versions


class DecodedWeight(NamedTuple):
    """The result of `inference_weight` and the state that it was made from. Holding the tensors prevents reuse of their
    ids."""

    versions: StateVersions
    tensors: list[torch.Tensor]
    weight: torch.Tensor
    scale: torch.Tensor


class GradientSink(Protocol):
    """Takes the weight gradients of matrices and tables inside backward; an optimizer is one.

    The gradients are transient float32 tensors that the sink may overwrite.
    """

    def dense(self, matrix: TernaryMatrix, dW: torch.Tensor, used: torch.Tensor | None = None) -> None:
        """dW (rows, columns) of one forward. used: bool (), on dW's device; False: dW is zero, because no token used
        the matrix, and the matrix must not change. None: used."""
        ...

    def rows(self, table: TernaryMatrix, row_ids: torch.Tensor, dW: torch.Tensor) -> None:
        """dW (R, columns) of rows row_ids int64 (R,), in ascending order, each once; no other row was read."""
        ...


class TernaryMatrix(IntegerState):
    """A (rows, columns) matrix of packed levels with one scale exponent per group, all of it integer buffers.

    A weight is S times its level: -1, 0 or 1 with one trit, -4 to 4 with two. `role` is the matrix's part in the model,
    by which the config says how many trits it has.

    An optimizer attaches by setting `gradient_sink`. The layer's autograd function then registers every forward with
    `begin_use`, ends it in backward with `end_use`, and passes dW to the sink. A gradient of weights that have changed
    since the forward is therefore refused, and the optimizer knows whether another backward through the matrix will
    come.

    `shared`: the matrix is used more than once per forward, so its gradients are summed and applied in
    `optimizer.step()` instead of inside backward. `keeps_levels`: the unpacked int8 weights are cached, for layers that
    are called once per byte.
    """

    T_packed: torch.Tensor
    E: torch.Tensor
    accum: torch.Tensor  # this and what follows: where the update rule has it
    accum_exp: torch.Tensor
    T_accum: torch.Tensor
    E_accum: torch.Tensor
    corr_accum: torch.Tensor
    step_counter: torch.Tensor

    role = "blocks"
    shared = False
    keeps_levels = False
    _kept: tuple[tuple[int, int], torch.Tensor, torch.Tensor] | None = None
    gradient_sink: GradientSink | None = None
    _decoded: DecodedWeight | None = None
    _uses: WeakSet[ForwardUse] | None = None
    full_name = "a ternary matrix"  # within the model, for errors; set by an attached optimizer

    def setup_state(self, rows: int, columns: int, config: ArbConfig, init_fan_in: int) -> None:
        """Register the buffers that `config` (an ArbConfig) requires; weights start with variance 1 / init_fan_in."""
        self.rows, self.columns = rows, columns
        self.group_size = config.group_size or columns
        self.update_rule, self.momentum_bits = config.update_rule, config.momentum_bits
        self.init_fan_in = init_fan_in
        self.trits = config.trits_of(self.role)
        self.largest_level = largest_level(self.trits)
        self.integer_matmuls = config.compute != "float" and self.group_size == columns
        if config.compute == "int8" and not self.integer_matmuls:
            logging.get_logger(__name__).warning_once(
                f"compute='int8' needs one scale a row: float matmuls, as group_size={config.group_size}"
            )
        self.inference_tensors = [name for name, spec in self.layout().items() if spec.inference]
        self.register_state(config.training_state)

    def layout(self) -> dict[str, StateTensor]:
        """The matrix's persistent tensors, training state included whether or not it is there."""
        return state_layout(self.update_rule, self.rows, self.columns, self.group_size, self.momentum_bits, self.trits)

    @property
    def weight(self) -> AbsentWeight:
        return AbsentWeight(self.T_packed, (self.rows, self.columns))

    @property
    def logical_weights(self) -> int:
        return self.rows * self.columns

    def reset_state(self) -> None:
        """Latents uniform over the line. Levels then have the variance L (L + 1) / 3, L being the largest, and S gives
        weights the variance 1 / fan_in: S = sqrt(1.5 / fan_in) with one trit, sqrt(3 / (20 fan_in)) with two."""
        super().reset_state()
        device = self.T_packed.device
        width = packed_width(self.columns)
        digits = torch.arange(TRITS_PER_BYTE, device=device)[:, None] * width + torch.arange(width, device=device)
        values = (3 ** (digits < self.columns).sum(0)).repeat(self.trits)  # of a byte whose padding digits stay zero
        _fill_at_random(self.T_packed, 3**TRITS_PER_BYTE, values)
        inverse_variance = 3 / (self.largest_level * (self.largest_level + 1))
        exponent = torch.log2(torch.tensor(inverse_variance / self.init_fan_in)) / 2 * EIGHTHS
        init.constant_(self.E, int(exponent.round().clamp(-128, 127)))
        if hasattr(self, "accum"):
            _fill_at_random(self.accum, 2**self.momentum_bits)

    def levels(self) -> torch.Tensor:
        """int8 (rows, columns), read-only. With `keeps_levels` they are unpacked once until they change."""
        if not self.keeps_levels:
            return unpack_levels(self.T_packed, self.columns)
        version = (id(self.T_packed), self.T_packed._version)
        if self._kept is None or self._kept[0] != version:
            self._kept = (version, self.T_packed, unpack_levels(self.T_packed, self.columns))
        return self._kept[2]

    def caches(self) -> dict[str, torch.Tensor]:
        found = {} if self._kept is None else {UNPACKED: self._kept[2]}
        if self._decoded is not None:
            found[DECODED], found[ROW_SCALES] = self._decoded.weight, self._decoded.scale
        return {name: tensor for name, tensor in found.items() if tensor is not self.T_packed}

    def generation_caches(self, device: torch.device) -> dict[str, int]:
        """Bytes that `inference_weight` keeps on a device, by description; empty where it is not used."""
        return {}

    def scale(self) -> torch.Tensor:
        """float32 (rows, groups): S = 2^(E / 8), under `correlation` also moved by the votes so far."""
        scale = power_of_two(self.E, EIGHTHS)
        if self.update_rule == "correlation":
            scale = scale * self._correlation_factor(self.corr_accum, self.step_counter)
        return scale

    def _correlation_factor(self, corr_accum: torch.Tensor, step_counter: torch.Tensor) -> torch.Tensor:
        octaves = correlation_octaves(corr_accum, step_counter, self.columns, self.group_size)
        return torch.exp(octaves.double() * math.log(2)).float()  # torch.exp2 rounds by place in the tensor

    def inference_weight(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The levels in the form that the backend multiplies fastest, and the row scale float32 (rows,).

        Computed at the first use and kept until the state changes. Like the attention cache, it is never saved.
        """
        versions = self._state_versions()
        if self._decoded is None or self._decoded.versions != versions:
            tensors = [getattr(self, name) for name in self.inference_tensors]
            weight = decoding_form(self.T_packed, self.columns)
            self._decoded = DecodedWeight(versions, tensors, weight, self.scale().flatten())
        return self._decoded.weight, self._decoded.scale

    def effective_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """(rows, columns): W_eff = S * level, a temporary for one matmul."""
        return effective_weight(self.T_packed, self.columns, self.scale(), self.group_size, dtype)

    def _state_versions(self) -> StateVersions:
        return [(id(tensor), tensor._version) for tensor in (getattr(self, name) for name in self.inference_tensors)]

    def begin_use(self) -> ForwardUse | None:
        """Register a forward; its graph holds the result. None where no optimizer is attached."""
        if not self.armed:
            return None
        use = ForwardUse(self._state_versions())
        if not self.shared:
            if self._uses is None:
                self._uses = WeakSet()
            self._uses.add(use)
        return use

    def end_use(self, use: ForwardUse | None) -> None:
        """The backward of that forward has begun. Raises RuntimeError when the weights have moved since the forward."""
        if use is None:
            return
        if self.armed and use.versions != self._state_versions():
            raise RuntimeError(
                f"{self.full_name}: its weights changed between a forward and its backward: use each forward's graph"
                f" once, before step(), or {SEVERAL_BACKWARDS}"
            )
        if self._uses:
            self._uses.discard(use)

    def is_used_ahead(self) -> bool:
        """Whether a live graph has read the current weights and its backward has not begun."""
        if not self._uses:
            return False
        versions = self._state_versions()
        return any(use.versions == versions for use in self._uses)

    @property
    def armed(self) -> bool:
        """Whether an optimizer takes this matrix's gradients."""
        return self.gradient_sink is not None

    def extra_repr(self) -> str:
        groups = num_groups(self.columns, self.group_size)
        shape = f"rows={self.rows}, columns={self.columns}, trits={self.trits}"
        return f"{shape}, groups_per_row={groups}, update_rule={self.update_rule}"

"""IntegerOptimizer: hands each ternary matrix's transient dW to its update rule, inside backward.

It holds no tensor: all persistent state lives in the model's integer buffers, and `state_dict` is a step counter.
"""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist

from arb_kernels.random_bits import stream_key
from modeling_arb.modeling_arb import ArbPreTrainedModel
from modeling_arb.ternary_matrix import TernaryMatrix

from .integer_rules import CorrelationRule, FlipRule, Moment, MomentumRule, UpdateRule


class IntegerOptimizer(torch.optim.Optimizer):
    """Arms every ternary matrix of `model`; `step()` only applies the shared ones and counts.

    lr: cells per step, read from the one (empty) parameter group, so that any scheduler drives it. Micro-batches of an
    accumulated step: set `last_micro_batch` False before the backward of all but the last; their losses come divided
    by their number, as Trainer and accelerate do. Raises ValueError on impossible settings and FloatingPointError,
    naming the matrix, on a dW that is not finite.
    """

    def __init__(
        self,
        model: ArbPreTrainedModel,
        lr: float = 0.035,
        beta: float = 0.9,
        flip_threshold: int = 32,
        scale_update_interval: int = 1,
        seed: int = 0,
    ):
        if not 0 <= lr < 1:
            raise ValueError(f"learning_rate={lr} must be in [0, 1): it is in cells of the latent line per step")
        if not 0 <= beta < 1:
            raise ValueError(f"momentum_beta={beta} must be in [0, 1)")
        if not 1 <= flip_threshold <= 127:
            raise ValueError(f"flip_threshold={flip_threshold} must be in 1..127: votes are int8")
        if scale_update_interval < 0:
            raise ValueError(f"scale_update_interval={scale_update_interval} must not be negative")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed} must be in [0, 2^64)")
        super().__init__([{"params": []}], {"lr": lr})
        rules: dict[str, UpdateRule] = {
            "momentum": MomentumRule(beta),
            "flip": FlipRule(flip_threshold, scale_update_interval),
            "correlation": CorrelationRule(),
        }
        self.rule = rules[model.config.update_rule]
        self.seed = seed
        self.steps = 0
        self.last_micro_batch = True
        self.last_checkpoint: str | None = None
        self._names = {matrix: name for name, matrix in model.ternary_matrices().items()}
        self._micro_batches: dict[TernaryMatrix, int] = {}
        self._shared: dict[TernaryMatrix, torch.Tensor] = {}
        self._flips = torch.zeros((), dtype=torch.int64, device=model.device)
        self._moved_weights = 0
        if not model.config.training_state:
            model.add_training_state()
        for matrix in self._names:
            matrix.update_handler = self._receive

    def detach(self) -> None:
        """Disarm the model: later backwards change nothing."""
        for matrix in self._names:
            matrix.update_handler = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Apply what shared matrices collected and advance the step counter."""
        assert closure is None, "integer updates happen in backward: there is no loss to evaluate again"
        for matrix, dW in self._shared.items():
            self._update(matrix, dW)
        self._shared.clear()
        self._micro_batches.clear()
        self.steps += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: no gradient outlives backward."""

    def state_dict(self) -> dict:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict) -> None:
        state_dict = dict(state_dict)
        self.steps = state_dict.pop("steps")
        super().load_state_dict(state_dict)

    def take_flip_rate(self) -> float:
        """Share of weights whose trit changed, per step, since the last call."""
        if not self._moved_weights:
            return 0.0
        rate = self._flips.item() / self._moved_weights
        self._flips.zero_()
        self._moved_weights = 0
        return rate

    def _receive(self, matrix: TernaryMatrix, dW: torch.Tensor) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(dW)
            dW /= dist.get_world_size()
        if not torch.isfinite(dW.sum()):
            resume = f"; resume from {self.last_checkpoint}" if self.last_checkpoint else ""
            raise FloatingPointError(f"step {self.steps}: the gradient of {self._names[matrix]} is not finite{resume}")
        if matrix.shared:
            self._shared[matrix] = self._shared[matrix].add_(dW) if matrix in self._shared else dW.clone()
        elif self.last_micro_batch:
            self._update(matrix, dW)
        else:
            self.rule.fold(matrix, dW, self._moment(matrix))
            self._micro_batches[matrix] = self._micro_batches.get(matrix, 0) + 1

    def _update(self, matrix: TernaryMatrix, dW: torch.Tensor) -> None:
        flips = self.rule.update(matrix, dW, self._moment(matrix))
        self._flips = self._flips.to(flips.device).add_(flips)
        self._moved_weights += matrix.logical_weights

    def _moment(self, matrix: TernaryMatrix) -> Moment:
        micro_batch = self._micro_batches.get(matrix, 0)
        tensor_id = zlib.crc32(self._names[matrix].encode())
        key = stream_key(self.seed, self.steps, micro_batch, tensor_id)
        return Moment(self.steps, micro_batch, key, self.param_groups[0]["lr"])

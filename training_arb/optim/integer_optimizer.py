"""IntegerOptimizer: passes each ternary matrix's transient dW to its update rule, inside backward.

All persistent state is in the model's integer buffers; `state_dict` is a step counter.
"""

from __future__ import annotations

import zlib

import torch

from arb_kernels.random_bits import stream_key
from arb_kernels.rules.gradient_sum import GradientSum, add_gradient, add_sum, zero_sum
from modeling_arb.layers.integer_state import IntegerState, ObservedState
from modeling_arb.layers.ternary_embedding import sum_by_row
from modeling_arb.layers.ternary_matrix import SEVERAL_BACKWARDS, TernaryMatrix
from modeling_arb.layers.ternary_table import TernaryTable
from modeling_arb.pretrained import ArbPreTrainedModel
from training_arb.ranks.gradient_exchange import GradientExchange
from training_arb.ranks.rank_exchange import (
    check_ranks_agree,
    join_ranks,
    num_ranks,
    sum_over_ranks,
    this_rank,
    used_on_any_rank,
)

from .integer_rules import CorrelationRule, FlipRule, MomentumRule, TableRule, UpdateContext, UpdateRule
from .step_flags import StepFlags


class IntegerOptimizer(torch.optim.Optimizer):
    """Becomes the gradient sink of every ternary matrix of `model`; `step()` applies the shared matrices, the touched
    rows of tables and the observations of blocks, and advances the step counter.

    lr: thirds of the latent line per step, read from the single (empty) parameter group, so that any scheduler can set
    it.

    A matrix moves inside backward, at the last backward of a step that goes through it. Earlier gradients are added to
    an int8 sum, one transient byte a weight, which joins the last dW: an accumulated step learns as one batch does.
    Call `begin_micro_batch` before the forward of each micro-batch, and divide its loss by the number of micro-batches,
    as Trainer and accelerate do. Several forwards before one backward need no call. `step()` applies the sums that no
    last backward took. A second backward through a matrix that has moved in this step raises RuntimeError, naming it.

    Ranks share the updates (GradientExchange): each matrix is updated by the rank that owns it.

    rank_check_steps: interval in steps at which the states of all ranks are compared; 0: never. Raises ValueError on
    invalid settings, RuntimeError when ranks differ, and FloatingPointError, naming step and matrix, on a dW that is
    not finite: on the CPU before the matrix moves, on a GPU in `step`, after the matrix has moved as if by a zero
    gradient.
    """

    immediate_devices = ("cpu",)  # device types where a flag is read inside backward

    def __init__(
        self,
        model: ArbPreTrainedModel,
        lr: float = 0.035,
        beta: float = 0.9,
        flip_threshold: int = 32,
        table_threshold: int = 8,
        scale_update_interval: int = 1,
        seed: int = 0,
        rank_check_steps: int = 200,
    ):
        if not 0 <= lr < 1:
            raise ValueError(f"learning_rate={lr} must be in [0, 1), in thirds of the latent line per step")
        if not 0 <= beta < 1:
            raise ValueError(f"momentum_beta={beta} must be in [0, 1)")
        for name, threshold in (("flip_threshold", flip_threshold), ("table_threshold", table_threshold)):
            if not 1 <= threshold <= 127:
                raise ValueError(f"{name}={threshold} must be in 1..127: votes are int8")
        for name, steps in (("scale_update_interval", scale_update_interval), ("rank_check_steps", rank_check_steps)):
            if steps < 0:
                raise ValueError(f"{name}={steps} must not be negative")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed} must be in [0, 2^64)")
        super().__init__([{"params": []}], {"lr": lr})
        rules: dict[str, UpdateRule] = {
            "momentum": MomentumRule(beta),
            "flip": FlipRule(flip_threshold, scale_update_interval),
            "correlation": CorrelationRule(),
        }
        table_rules: dict[str, TableRule] = {
            "momentum": MomentumRule(beta),
            "flip": FlipRule(table_threshold, scale_update_interval),
            "correlation": CorrelationRule(),
        }
        self.rule = rules[model.config.update_rule]
        self.table_rules = table_rules
        self.seed = seed
        self.steps = 0
        self.rank_check_steps = rank_check_steps
        self.last_checkpoint: str | None = None
        self._names = {module: name for name, module in model.integer_states().items()}
        self._matrices = [module for module in self._names if isinstance(module, TernaryMatrix)]
        self._observers = [module for module in self._names if isinstance(module, ObservedState)]
        self._touched: dict[TernaryTable, list[tuple[torch.Tensor, torch.Tensor]]] = {
            module: [] for module in self._matrices if isinstance(module, TernaryTable)
        }
        backward = self._matrices[::-1]
        work = {m: 0 if m in self._touched else m.logical_weights for m in backward}  # every rank updates the tables
        self._exchange = GradientExchange(work, self._update)
        self._last_micro_batch = True
        self._sums: dict[TernaryMatrix, GradientSum] = {}
        self._additions: dict[TernaryMatrix, int] = {}  # to a matrix's sum in this step
        self._moved: set[TernaryMatrix] = set()  # inside this step's backward
        self._shared: dict[TernaryMatrix, torch.Tensor] = {}
        self._used, self._not_finite = StepFlags(), StepFlags()  # a shared matrix by some token; a gradient
        self._model = model
        self._flips = torch.zeros((), dtype=torch.int64, device=model.device)
        self._moved_weights = 0
        if not model.config.training_state:
            model.add_training_state()
        for matrix in self._matrices:
            matrix.full_name = self._names[matrix]
            matrix.gradient_sink = self
        for observer in self._observers:
            observer.observing = True

    def detach(self) -> None:
        """Detach from the model: later backwards change nothing."""
        for matrix in self._matrices:
            matrix.gradient_sink = None
        for observer in self._observers:
            observer.observing = False
            observer.take_observations()
        self.zero_grad()

    @torch.no_grad()
    def begin_micro_batch(self, last: bool = True) -> None:
        """Call before a forward; last: its backward is the step's last. Waits for the weights that other ranks move."""
        self._exchange.settle()
        self._last_micro_batch = last

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Apply the collected gradients and observations and advance the step counter."""
        assert closure is None, "integer updates happen in backward, so a closure cannot be evaluated again"
        self._exchange.settle()
        self._update_collected()
        self._exchange.settle()
        self._raise_not_finite()
        for table, touched in self._touched.items():
            self._update_rows(table, touched)
            touched.clear()
        for observer in self._observers:
            device = next(observer.buffers()).device
            seen = join_ranks(observer.take_observations(), device)
            if seen is not None:
                observer.apply_observations(*(tensor.to(device) for tensor in seen), key=self._key(observer))
        self._additions.clear()
        self._moved.clear()
        self.steps += 1
        if self.rank_check_steps and self.steps % self.rank_check_steps == 0:
            check_ranks_agree(self._model, self.steps)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the sums of this step. Updates made during backward remain."""
        self._sums.clear()
        self._shared.clear()
        self._used.clear()
        for touched in self._touched.values():
            touched.clear()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict) -> None:
        state_dict = dict(state_dict)
        self.steps = state_dict.pop("steps")
        super().load_state_dict(state_dict)

    def take_flip_rate(self) -> float:
        """Share of weights whose level changed, per step, since the last call. Every rank must call it."""
        flips, weights = sum_over_ranks([int(self._flips), self._moved_weights], self._flips.device)
        self._flips.zero_()
        self._moved_weights = 0
        return flips / weights if weights else 0.0

    @torch.no_grad()
    def dense(self, matrix: TernaryMatrix, dW: torch.Tensor, used: torch.Tensor | None = None) -> None:
        """Take dW float32 (rows, columns) of one forward, inside backward. used: as in GradientSink."""
        if matrix.shared or used is not None:
            self._add_to_shared(matrix, dW, used)
            return
        if matrix in self._moved:
            raise RuntimeError(
                f"{self._names[matrix]}: a second backward in step {self.steps}, after its weights moved: call step()"
                f" after every backward, or {SEVERAL_BACKWARDS}"
            )
        if not self._last_micro_batch or matrix.is_used_ahead():
            self._add_to_sum(matrix, dW)
            return
        if matrix in self._sums:
            add_sum(dW, self._sums.pop(matrix))
        self._moved.add(matrix)
        if num_ranks() == 1:
            self._update(matrix, dW)
        else:
            self._exchange.send(matrix, dW)

    @torch.no_grad()
    def rows(self, table: TernaryMatrix, row_ids: torch.Tensor, dW: torch.Tensor) -> None:
        """Take dW float32 (R, columns) of rows row_ids int64 (R,), each once, inside backward."""
        assert isinstance(table, TernaryTable)
        if self._keep_finite(table, dW):
            self._touched[table].append((row_ids, dW))

    def _update(self, matrix: TernaryMatrix, dW: torch.Tensor) -> None:
        """Move the matrix by the whole step's mean gradient."""
        if self._keep_finite(matrix, dW):
            flips = self.rule.update(matrix, dW, self._context(matrix))
            self._count(flips, matrix.logical_weights)

    def _keep_finite(self, matrix: TernaryMatrix, dW: torch.Tensor) -> bool:
        """Whether dW can be used. Always true on a GPU: a dW that is not finite is flagged and set to zero, and `step`
        raises, because reading the flag here would make backward wait for the device.

        On a CPU one process raises at once. With several ranks all raise in `step`, so that none waits for another.
        """
        finite = dW.sum().isfinite()
        if dW.device.type not in self.immediate_devices:
            self._not_finite.set_where(matrix, ~finite)
            dW.masked_fill_(~finite, 0.0)
            return True
        if finite:
            return True
        self._not_finite.set_where(matrix, True)
        if num_ranks() == 1:
            self._raise_not_finite()
        return False

    def _raise_not_finite(self) -> None:
        found = self._not_finite.take()
        anywhere = used_on_any_rank([matrix in found for matrix in self._matrices], self._flips.device)
        if any(anywhere):
            resume = f"; resume from {self.last_checkpoint}" if self.last_checkpoint else ""
            name = self._names[self._matrices[anywhere.index(True)]]
            raise FloatingPointError(f"step {self.steps}: the gradient of {name} is not finite{resume}")

    def _add_to_shared(self, matrix: TernaryMatrix, dW: torch.Tensor, used: torch.Tensor | None) -> None:
        if used is not None:
            dW.masked_fill_(~used, 0.0)
        if self._keep_finite(matrix, dW):
            self._used.set_where(matrix, True if used is None else used)
            self._shared[matrix] = self._shared[matrix].add_(dW) if matrix in self._shared else dW.clone()

    def _add_to_sum(self, matrix: TernaryMatrix, dW: torch.Tensor) -> None:
        if not self._keep_finite(matrix, dW):
            return
        if matrix not in self._sums:
            self._sums[matrix] = zero_sum(matrix.rows, matrix.columns, dW.device)
        self._additions[matrix] = self._additions.get(matrix, 0) + 1
        add_gradient(self._sums[matrix], dW, self._key(matrix, self._additions[matrix]))

    def _update_collected(self) -> None:
        """Shared matrices, and those without a backward in the last micro-batch.

        A rank that did not use a matrix, for example an expert, contributes zeros.
        """
        used = self._used.take()
        matrices = [matrix for matrix in self._matrices if matrix not in self._touched]
        anywhere = used_on_any_rank([matrix in used or matrix in self._sums for matrix in matrices], self._flips.device)
        pass_on = self._update if num_ranks() == 1 else self._exchange.send
        for matrix in (matrix for matrix, is_used in zip(matrices, anywhere, strict=True) if is_used):
            dW = self._shared.pop(matrix, None)
            if dW is None:
                dW = torch.zeros(matrix.rows, matrix.columns, device=matrix.T_packed.device)
            if matrix in self._sums:
                add_sum(dW, self._sums.pop(matrix))
            pass_on(matrix, dW)
        self._shared.clear()

    def _update_rows(self, table: TernaryTable, touched: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        mine = tuple(torch.cat(column) for column in zip(*touched, strict=True)) if touched else None
        everyone = join_ranks(mine, table.T_packed.device)
        if everyone is None:
            return
        row_ids, place = everyone[0].unique(return_inverse=True)
        dW = sum_by_row(place, everyone[1] / num_ranks(), len(row_ids))
        flips = self.table_rules[table.table_rule].update_rows(table, row_ids, dW, self._context(table))
        if self._exchange.owners[table] == this_rank():  # every rank updates all rows: one of them counts
            self._count(flips, dW.numel())

    def _count(self, flips: torch.Tensor, weights: int) -> None:
        self._flips = self._flips.to(flips.device).add_(flips)
        self._moved_weights += weights

    def _key(self, module: IntegerState, addition: int = 0) -> int:
        """The key of random bits in this step. addition: number, from 1, of an addition to the module's gradient sum;
        0: its update."""
        return stream_key(self.seed, self.steps, addition, zlib.crc32(self._names[module].encode()))

    def _context(self, module: IntegerState) -> UpdateContext:
        return UpdateContext(self.steps, self._key(module), self.param_groups[0]["lr"])

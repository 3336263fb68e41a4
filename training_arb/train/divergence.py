"""Stops a run whose loss explodes before it overwrites its good checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import TrainerCallback

from training_arb.checkpoints.run_checkpoints import numbered_checkpoints, step_of

SHARE = 0.1  # weight of a new loss in the running mean
REMEMBERED = 200  # logged losses that are looked at


def strikes(losses: Sequence[float], factor: float) -> int:
    """The number of consecutive losses, up to the last one, above `factor` times the running mean of earlier ones.

    The first loss starts the mean. A loss that is not finite counts as above it.
    """
    mean, in_a_row = None, 0
    for loss in losses:
        if math.isfinite(loss) and (mean is None or loss <= factor * mean):
            mean = loss if mean is None else mean + SHARE * (loss - mean)
            in_a_row = 0
        else:
            in_a_row += 1
    return in_a_row


class DivergenceStop(TrainerCallback):
    """Raises FloatingPointError, naming step, loss and the last good checkpoint, when the logged loss is not finite or
    stays above `factor` times its running mean for `patience` logs in a row. No checkpoint is saved while the loss is
    above.

    It reads the trainer's log history, so a resumed run is judged as if it had not been interrupted.
    """

    def __init__(self, factor: float, patience: int):
        if not (factor == 0 or factor > 1):
            raise ValueError(f"stop_loss_factor={factor} must be above 1, or 0 to never stop")
        if patience < 1:
            raise ValueError(f"stop_loss_patience={patience} must be at least 1")
        self.factor = factor or math.inf
        self.patience = patience
        self._strikes = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        logged = [entry for entry in state.log_history if "loss" in entry][-REMEMBERED:]
        self._strikes = strikes([entry["loss"] for entry in logged], self.factor)
        self._hold_back(control)
        loss = logged[-1]["loss"]
        if not math.isfinite(loss) or self._strikes >= self.patience:
            above = f" and has been above {self.factor:g} times its running mean for {self._strikes} logs"
            good = max((entry["step"] for entry in logged[: -self._strikes]), default=0)
            safe = [path for path in numbered_checkpoints(args.output_dir) if step_of(path) <= good]
            resume = f"the last good checkpoint is {safe[-1]}" if safe else "no checkpoint from before it was kept"
            raise FloatingPointError(
                f"step {state.global_step}: the loss is {loss:.4g}{above if math.isfinite(loss) else ''}; {resume}"
            )

    def on_step_end(self, args, state, control, **kwargs):
        self._hold_back(control)

    def _hold_back(self, control) -> None:
        if self._strikes:
            control.should_save = False

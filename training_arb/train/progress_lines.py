"""Shows a run as it trains: a progress bar on a terminal, and one aligned line for each log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

LABEL, STEP = 5, 11  # widths
ABSENT = "-"


def _figure(form: str) -> Callable[[float], str]:
    return lambda value: format(value, form)


COLUMNS: dict[str, tuple[str, int, Callable[[float], str]]] = {  # log's key: heading, width, how it is written
    "loss": ("loss", 9, _figure(".4f")),
    "bits_per_byte": ("bits/byte", 11, _figure(".4f")),
    "learning_rate": ("rate", 11, _figure("#.3g")),
    "flip_rate": ("flips", 9, _figure(".3%")),
    "grad_norm": ("gradient", 10, _figure("#.3g")),
    "bytes_per_second": ("bytes/s", 9, tqdm.format_sizeof),
    "seconds_left": ("left", 8, tqdm.format_interval),
}


class ProgressLines(ProgressCallback):
    """Replaces transformers' bar and printed dictionaries, on the first rank. Lines go to stdout; the bar goes to
    stderr if it is a terminal.

    columns: keys of COLUMNS. bytes_seen: how many bytes all ranks have trained on since the process began.
    """

    def __init__(self, columns: tuple[str, ...], bytes_seen: Callable[[], int]):
        super().__init__()
        self.columns = columns
        self.bytes_seen = bytes_seen

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = self.first_step = state.global_step
        self.began = self.since = time.monotonic()
        self.training_seconds, self.bytes_told = 0.0, self.bytes_seen()
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, disable=None
            )
            headings = (heading.rjust(width) for heading, width, _ in (COLUMNS[key] for key in self.columns))
            self._say("".join(["".ljust(LABEL), "step".rjust(STEP), *headings]))

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        now = time.monotonic()
        self.training_seconds += now - self.since
        self.since = now

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        self.since = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        self.since = time.monotonic()

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        if "loss" in logs:
            seconds, told = self.training_seconds, self.bytes_told
            self.training_seconds, self.bytes_told = 0.0, self.bytes_seen()
            speed = {"bytes_per_second": (self.bytes_told - told) / seconds} if seconds else {}
            self._say(self._line("train", state, {**logs, **speed, **self._time_left(state)}))
        for key in logs:
            if key.startswith("eval_") and key.endswith("loss"):
                name = key.removeprefix("eval_").removesuffix("loss").rstrip("_")
                self._say(self._line(f"eval {name}".rstrip(), state, _of_evaluation(logs, key)))

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _time_left(self, state) -> dict[str, float]:
        """Estimated from the time of the steps so far, evaluations and checkpoints included."""
        done = state.global_step - self.first_step
        if not done:
            return {}
        return {"seconds_left": (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)}

    def _line(self, label: str, state, values: dict[str, float]) -> str:
        cells = [label.ljust(LABEL), f"{state.global_step}/{state.max_steps}".rjust(STEP - max(0, len(label) - LABEL))]
        for key in self.columns:
            _, width, write = COLUMNS[key]
            cells.append((write(values[key]) if key in values else ABSENT).rjust(width))
        return "".join(cells)

    def _say(self, line: str) -> None:
        tqdm.write(line)
        sys.stdout.flush()  # a file or a pipe is followed too


def _of_evaluation(logs: dict[str, float], key: str) -> dict[str, float]:
    bits = {"bits_per_byte": logs["eval_bits_per_byte"]} if "eval_bits_per_byte" in logs else {}
    return {"loss": logs[key], **bits}

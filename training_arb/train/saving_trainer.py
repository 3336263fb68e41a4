"""SavingTrainer: atomic checkpoints, checked resume and clean stops for all our trainers.

Trainer writes its files directly into checkpoint-N. run.json is written before them and checksums.json after them, when
everything is on the disk, so the files show whether a checkpoint is complete.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import Signals
from typing import ClassVar

from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import SaveStrategy, TrainOutput

from modeling_arb.checkpoints.integrity import read_json_object
from training_arb.checkpoints.checkpoint_files import RUN_FILE, STATE_FILE, is_finished, write_checksums
from training_arb.checkpoints.run_checkpoints import (
    BEST,
    LATEST,
    checkpoint_to_resume,
    discard,
    point,
    pointed,
    remove_old,
    unfinished_checkpoints,
)
from training_arb.common.atomic_files import out_of_space, sync_path, sync_tree, write_json
from training_arb.common.error_lines import first_line
from training_arb.ranks.rank_exchange import used_on_any_rank
from training_arb.ranks.rank_loss import RankLostError, naming_lost_ranks

from .base_trainer import BaseTrainer
from .interruption import Interruption
from .training_options import CheckedTrainingArguments

logger = logging.getLogger(__name__)


class SavingTrainer(BaseTrainer):
    """run_description: settings that must be equal when a run is resumed.

    last_checkpoint: the checkpoint that this run last wrote or was resumed from.
    """

    set_in_save: ClassVar[dict[str, object]] = {}  # arguments as Trainer's own saving is to see them

    def __init__(self, model: nn.Module | None, args: CheckedTrainingArguments, run_description: dict, **kwargs):
        self.run_description = run_description
        self.interruption = Interruption()
        self.last_checkpoint: Path | None = None
        # arguments as Trainer is to see them in training: it would apply the limit to unfinished checkpoints, and to
        # the latest one in the end
        self.set_in_training: dict[str, object] = {"save_total_limit": None}
        super().__init__(model=model, args=args, **kwargs)
        self.add_callback(self.interruption)

    @property
    def run_dir(self) -> Path:
        """The folder of the run's checkpoints and results."""
        return Path(str(self.args.output_dir))

    def check_checkpoint(self, folder: Path) -> None:
        """Raises ValueError naming the file unless `folder` is a complete checkpoint of this kind of trainer."""
        raise NotImplementedError

    def check_same_run(self, folder: Path) -> None:
        """Raises ValueError, naming a difference, unless the checkpoint belongs to a run with these settings."""
        check_same(folder, read_json_object(folder / RUN_FILE), self.run_description)

    def load_state(self, folder: Path, model: nn.Module | None) -> None:
        """Load the weights of a checkpoint that has passed all checks."""
        super()._load_from_checkpoint(str(folder), model)

    def write_more(self, folder: Path) -> None:
        """Write the checkpoint's files besides Trainer's, on one rank."""

    def on_checkpoint(self, folder: Path) -> None:
        """Called on every rank when a checkpoint is finished."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As Trainer's. None resumes as the arguments say, True the newest complete checkpoint, False none.

        SIGTERM and Ctrl-C end it after the current step, as `interruption` then says. Raises FloatingPointError, naming
        the last good checkpoint, when the run diverges; RankLostError, naming the last checkpoint, when another rank is
        lost; ValueError when the checkpoint to resume from is damaged or belongs to another run.
        """
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        if wanted is True:
            wanted, warnings = checkpoint_to_resume(self.run_dir, LATEST, self.check_checkpoint)
            for warning in warnings:
                logger.warning(warning)
        self._save_total_limit = self.args.save_total_limit
        self._resumed_step: int | None = None
        self._saved_step: int | None = None
        try:
            with naming_lost_ranks(self.where_it_stands), changed(self.args, **self.set_in_training):
                with self.interruption.listening():
                    output = super().train(wanted, *args, **kwargs)
                self.interruption.agree(self.args)  # on a signal that came after the last step
        except (FloatingPointError, RankLostError):
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # close progress bar and logs
            raise
        return output

    def where_it_stands(self) -> str:
        """The end of an error message: the current step and how to continue. Does not communicate with other ranks."""
        newest = pointed(self.run_dir, LATEST)
        last = newest or self.last_checkpoint
        how = "auto" if newest else last
        resume = f"go on from {last} by --resume_from_checkpoint {how}" if last else "no checkpoint was written"
        return f"after step {self.state.global_step}; {resume}"

    def end_early(self) -> int:
        """Print how to continue after a signal. Returns 128 plus the signal's number.

        Raises ValueError when the step at which the run stopped could not be saved.
        """
        signum, step, last = self.interruption.signum, self.state.global_step, self.last_checkpoint
        if self.is_world_process_zero():
            how = "--resume_from_checkpoint latest" if last else "starting again: no checkpoint was written"
            print(f"\nstopped by {Signals(signum).name} after step {step}; last checkpoint {last}; continue with {how}")
        with naming_lost_ranks(self.where_it_stands):
            self.accelerator.wait_for_everyone()
        if last is None or last.name != f"checkpoint-{step}":
            raise ValueError(f"step {step} is not saved; the last checkpoint is {last}")
        return 128 + signum

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple:
        """As Trainer's, but without an epoch when the resumed run has taken all its steps: Trainer would take one more
        after a stop between the last checkpoint and the end."""
        epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        done = self._resumed_step is not None and self._resumed_step >= max_steps
        return (0 if done else epochs, *others, max_steps)

    def checkpoint_at(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.run_dir / f"checkpoint-{step}"

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Only steps that are also saved can become the best checkpoint."""
        saving = self.control.should_save and self._saved_step != self.state.global_step
        if self.args.save_strategy != SaveStrategy.BEST and not saving:
            return False
        if self.state.best_global_step and not is_finished(self.checkpoint_at(self.state.best_global_step)):
            self.state.best_metric = None
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            wanted = self.args.metric_for_best_model
            known = ", ".join(sorted(metrics))
            raise ValueError(f"metric_for_best_model={wanted!r} is not one of {known}") from error

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Write a checkpoint in three phases, each on all ranks before the next.

        A full disk costs this checkpoint only: its files are deleted with a warning, and the run continues.
        """
        if self._saved_step == self.state.global_step:  # a signal's checkpoint, before the one that ends the epoch
            return
        target = self.checkpoint_at(self.state.global_step)
        whole = False
        phases = (
            lambda: self._begin_checkpoint(target),
            lambda: self._write_stock_files(model, trial),
            lambda: self._finish_checkpoint(target),
        )
        try:
            whole = all(self._on_every_rank(phase, target) for phase in phases)
        finally:
            # one that `latest` points at is whole on this rank: another rank was lost after it was finished
            if not whole and self.args.should_save and pointed(self.run_dir, LATEST) != target:
                discard(target)
        if whole:
            self._saved_step, self.last_checkpoint = self.state.global_step, target
            self.on_checkpoint(target)

    def _on_every_rank(self, phase: Callable[[], None], target: Path) -> bool:
        """Run `phase` on this rank and wait for all ranks. Returns whether no rank ran out of space."""
        error = None
        try:
            phase()
        except (OSError, SafetensorError, RuntimeError) as caught:
            if not out_of_space(caught):
                raise
            error = caught
            free = shutil.disk_usage(self.run_dir).free
            logger.warning(
                f"{target} is not saved, no space for it ({first_line(caught)}): {free:,} bytes free;"
                f" the run goes on, its last checkpoint is {self.last_checkpoint}"
            )
        return not used_on_any_rank([error is not None], self.args.device)[0]

    def _begin_checkpoint(self, target: Path) -> None:
        if self.args.should_save:
            for folder in (*unfinished_checkpoints(target.parent), target):
                discard(folder)
            write_json(target / RUN_FILE, self.run_description)

    def _write_stock_files(self, model: nn.Module, trial) -> None:
        """Write Trainer's own files. Without a best step Trainer does not wait for all ranks in between, where a rank
        that has no space would not arrive."""
        with changed(self.state, best_global_step=None), changed(self.args, **self.set_in_save):
            super()._save_checkpoint(model, trial)

    def _finish_checkpoint(self, target: Path) -> None:
        """Complete the files, then call the checkpoint finished, point to it and delete old ones."""
        if not self.args.should_save:
            return
        best = self.checkpoint_at(self.state.best_global_step) if self.state.best_global_step else None
        best = best if best is not None and (best == target or is_finished(best)) else None
        self.state.best_model_checkpoint = str(best) if best else None
        self.state.save_to_json(str(target / STATE_FILE))
        self.write_more(target)
        sync_tree(target)
        sync_path(target.parent)
        write_checksums(target)
        point(target.parent, LATEST, target.name)
        if best:
            point(target.parent, BEST, best.name)
        remove_old(target.parent, self._save_total_limit, [*([best] if best else []), target])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint. Raises ValueError when it is damaged, cannot be resumed, or belongs to another run."""
        folder = Path(resume_from_checkpoint)
        self.check_checkpoint(folder)
        _check_whole_state(folder)
        self.check_same_run(folder)
        self.load_state(folder, model)
        self._resumed_step = read_json_object(folder / STATE_FILE)["global_step"]
        self.last_checkpoint = folder
        if self.args.should_save and folder.resolve().parent == self.run_dir.resolve():
            point(self.run_dir, LATEST, folder.resolve().name)


@contextmanager
def changed(target: object, **attributes: object) -> Iterator[None]:
    """Set attributes of an object within the block and restore them afterwards."""
    before = {name: getattr(target, name) for name in attributes}
    vars(target).update(attributes)
    try:
        yield
    finally:
        vars(target).update(before)


def check_same(checkpoint: Path, stored: dict, wanted: dict) -> None:
    """Raises ValueError naming the first setting in which a checkpoint and this run differ, of those that both name."""
    for name in sorted(stored.keys() & wanted.keys()):
        if stored[name] != wanted[name]:
            raise ValueError(f"{checkpoint}: the checkpoint has {name}={stored[name]!r}, this run {wanted[name]!r}")


def _check_whole_state(checkpoint: Path) -> None:
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
        if not (checkpoint / name).is_file():
            raise ValueError(
                f"resume_from_checkpoint={str(checkpoint)!r}: it has no {name}, as save_only_model=True leaves it out,"
                " and cannot be continued exactly; start a new run from its weights"
            )

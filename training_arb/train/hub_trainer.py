"""Replaces Trainer's hub upload with our export: no pickles, our model card."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, cast

from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress, hf_api

from modeling_arb import ArbForCausalLM
from training_arb.common.atomic_files import out_of_space
from training_arb.common.error_lines import first_line
from training_arb.common.hub_errors import hub_errors
from training_arb.hub.hub_export import export_model
from training_arb.hub.hub_push import check_target, push_folder, whole_name
from training_arb.report.run_facts import REPORT_FILE, RunFacts, facts_of_report, facts_of_state

from .saving_trainer import SavingTrainer

STAGING = ".push-"

logger = logging.getLogger(__name__)


class HubTrainer(SavingTrainer):
    """`push_to_hub=True` as documented for Trainer, for the strategies `end` and `every_save`.

    Every push is an inference export with its card, in one commit. A push that fails during the run is a warning. The
    last push, and faults that are found before training, raise ValueError.
    """

    model: ArbForCausalLM
    push_in_progress: Any  # None, or the PushInProgress of the uploads under way
    set_in_save: ClassVar[dict[str, object]] = {"push_to_hub": False}  # it would upload the checkpoint's pickles

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository. Raises ValueError when the hub refuses, or when the strategy would push pickles."""
        if self.args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"hub_strategy={HubStrategy(self.args.hub_strategy).value!r} would push the pickles of a checkpoint:"
                " use 'every_save' or 'end', and for a checkpoint scripts/export_hub.py --training_state"
            )
        if not self.is_world_process_zero():
            return
        for left in self.run_dir.glob(f"{STAGING}*"):
            shutil.rmtree(left, ignore_errors=True)
        token = token or self.args.hub_token
        name = self.args.hub_model_id or self.run_dir.absolute().name
        name = whole_name(name, token)
        check_target(name, bool(private or self.args.hub_private_repo), token)
        with hub_errors(f"push to {name!r}"):
            super().init_hf_repo(token, private)

    def create_model_card(self, *args, **kwargs) -> None:
        """Does nothing: the card is part of the export."""

    def on_checkpoint(self, folder: Path) -> None:
        """Push the current model in the background, unless an earlier push is still running."""
        if not self.args.push_to_hub or self.args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        step = self.state.global_step
        try:
            export = self._export(f"{STAGING}{step}")
        except (OSError, SafetensorError, RuntimeError) as error:
            if not out_of_space(error):
                raise
            logger.warning(f"step {step} is not pushed, no space for it ({first_line(error)}); the run goes on")
            return
        message = f"Training in progress, step {step}"
        future = hf_api().run_as_future(self._upload, export, message, self.args.hub_token, self.args.hub_revision)
        future.add_done_callback(lambda future: _warn(future, step))
        if busy:
            self.push_in_progress.jobs.append(future)  # pyright: ignore[reportOptionalMemberAccess], it is busy
        else:
            jobs: Any = [future]
            self.push_in_progress = PushInProgress(jobs)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | Future | None:
        """Push the current model, with a card from report.json if it describes this model. First rank only.

        Returns the commit, or its Future when not `blocking`. Raises ValueError on whatever the hub refuses.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        folder = self._export(f"{STAGING}end")
        arguments = (folder, commit_message, token, revision or self.args.hub_revision)
        return self._upload(*arguments) if blocking else hf_api().run_as_future(self._upload, *arguments)

    def _export(self, name: str) -> Path:
        folder = self.run_dir / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            tokenizer = cast(PreTrainedTokenizerBase | None, self.processing_class)
            export_model(self.model, folder, self._facts(), self.hub_model_id, tokenizer=tokenizer)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def _facts(self) -> RunFacts:
        report = self.run_dir / REPORT_FILE
        facts = facts_of_report(report, self.model) if report.is_file() else None
        state = {"global_step": self.state.global_step, "log_history": self.state.log_history}
        return facts or facts_of_state(state, self.run_description)

    def _upload(self, folder: Path, message: str, token: str | None, branch: str | None) -> CommitInfo:
        try:
            return push_folder(folder, str(self.hub_model_id), message, branch=branch, token=token)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _warn(future: Future, step: int) -> None:
    if future.exception() is not None:
        logger.warning(f"step {step} is not on the hub: {future.exception()}; the run goes on")

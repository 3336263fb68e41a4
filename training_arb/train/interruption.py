"""Ends a run after the current step, with a checkpoint, on SIGTERM or Ctrl-C; at once on a second signal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback, TrainingArguments

from training_arb.ranks.rank_exchange import used_on_any_rank
from training_arb.ranks.rank_loss import is_connection_error

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(TrainerCallback):
    """signum: the signal that ended the run, or 0. A signal may reach one rank only: all agree at the end of a step."""

    def __init__(self):
        self.signum = 0
        self._received: set[int] = set()
        self._owner = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive signals within the block; the handlers from before are restored after it.

        SIGTERM is ignored after a lost rank: launchers send it to the other ranks, which end by themselves and say why.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets only the main thread install handlers
            return
        before = {signum: signal.signal(signum, self._receive) for signum in SIGNALS}
        try:
            yield
        except RuntimeError as error:
            if is_connection_error(error):
                before[signal.SIGTERM] = signal.SIG_IGN
            raise
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _receive(self, signum: int, frame) -> None:
        if os.getpid() != self._owner and signum == signal.SIGINT:
            return  # Ctrl-C reaches data workers too, which the current step still needs
        if os.getpid() != self._owner or self._received:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self._received.add(signum)

    def agree(self, args: TrainingArguments) -> None:
        """Set `signum` to a signal that any rank received. Every rank must call it."""
        anywhere = used_on_any_rank([signum in self._received for signum in SIGNALS], args.device)
        self.signum = next((signum for signum, sent in zip(SIGNALS, anywhere, strict=True) if sent), 0)

    def on_step_end(self, args, state, control, **kwargs):
        self.agree(args)
        if self.signum:
            control.should_save = control.should_training_stop = True

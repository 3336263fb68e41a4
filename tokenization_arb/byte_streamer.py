"""Streamers for byte tokens: every character is output when its last byte arrives, never a part of one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer, TextStreamer

from .tokenization_arb import NUM_BYTES

LONGEST_START = 3  # bytes of a character that can be there before its last


def unfinished(data: bytes) -> int:
    """The number of bytes at the end of data that begin a character which later bytes can complete."""
    return next((n for n in range(min(LONGEST_START, len(data)), 0, -1) if _is_start(data[-n:])), 0)


def _is_start(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


class ByteStreamer(TextStreamer):
    """Prints new text of `generate` character by character. transformers' streamer waits for a space.

    The joined output equals `bytes.decode("utf-8", errors="replace")` of the input. Invalid bytes become U+FFFD as soon
    as they are known to be invalid. Specials are spelled out, unless skip_special_tokens=True. One text at a time: put
    raises ValueError for a batch.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_prompt: bool = False, **kwargs: Any):
        super().__init__(tokenizer, skip_prompt, **kwargs)
        self.held = b""  # the bytes of a character that is not complete

    def put(self, value: torch.Tensor) -> None:
        """value int64 (T,) or (1, T): the prompt at the first call, new tokens at the others."""
        if value.dim() > 1 and value.shape[0] > 1:
            raise ValueError(f"value of shape {tuple(value.shape)}: a streamer shows one text, not a batch")
        prompt, self.next_tokens_are_prompt = self.next_tokens_are_prompt, False
        if prompt and self.skip_prompt:
            return
        data = self.held + b"".join(map(self._spelled, value.flatten().tolist()))
        ready = len(data) - unfinished(data)
        self.held = data[ready:]
        if ready:
            self.on_finalized_text(data[:ready].decode("utf-8", errors="replace"))

    def _spelled(self, token: int) -> bytes:
        if token < NUM_BYTES:
            return bytes([token])
        if self.decode_kwargs.get("skip_special_tokens"):
            return b""
        return str(self.tokenizer.convert_ids_to_tokens(token)).encode()

    def end(self) -> None:
        """Output the rest of an unfinished character and reset for another text."""
        text, self.held = self.held.decode("utf-8", errors="replace"), b""
        self.next_tokens_are_prompt = True
        self.on_finalized_text(text, stream_end=True)


class ByteIteratorStreamer(ByteStreamer, TextIteratorStreamer):
    """The same as an iterator, read by another thread than the generating one; `timeout` is in seconds."""

"""Encodes a document for a model: as bytes, or by the tokenizer of any causal language model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from configuration_arb.configuration_arb import BOS_ID, EOS_ID
from modeling_arb.backbone.byte_embedding import TRIGRAM

from .bits_per_byte import ScoredIds

STARTS = ("auto", "bos", "eos", "none")
# a character is at most so many tokens of bytes
LONGEST_START = 8


class EncodedDocument(NamedTuple):
    """A document's ids with its start token, the number of bytes that its scored ids encode, and whether the ids differ
    from the document (unknown or normalised characters)."""

    scored: ScoredIds
    scored_bytes: int
    changed: bool


class ByteEncoder:
    """ARB's encoder: an id is a byte. `start` auto: no start token for a single document, whose first three bytes are
    then not scored, as in training; EOS before each of several documents."""

    reads_any_bytes = True

    def start_ids(self, start: str, documents: int) -> list[int]:
        """The start tokens of each document."""
        return {"bos": [BOS_ID], "eos": [EOS_ID], "none": []}.get(start, [] if documents == 1 else [EOS_ID])

    def encode(self, document: bytes, start_ids: list[int]) -> EncodedDocument:
        """With a start token every byte is scored; without one, the bytes after the first trigram."""
        ids = np.concatenate([np.array(start_ids, dtype=np.int64), np.frombuffer(document, dtype=np.uint8)])
        first = len(start_ids) or TRIGRAM
        return EncodedDocument(ScoredIds(ids, first), max(len(ids) - first, 0), False)


class TokenizerEncoder:
    """Tokens of a tokenizer without added specials; spellings of specials in the text stay text. `start` auto: BOS if
    the tokenizer has one; otherwise none, and the first token is not scored."""

    reads_any_bytes = False

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase):
        self.name, self.tokenizer = name, tokenizer

    def start_ids(self, start: str, documents: int) -> list[int]:
        """What stands before each document. Raises ValueError where the tokenizer lacks that token."""
        ids = {"bos": self.tokenizer.bos_token_id, "eos": self.tokenizer.eos_token_id}
        if start in ids and ids[start] is None:
            raise ValueError(f"start={start!r}: the tokenizer of model={self.name!r} has no such token")
        found = ids["bos"] if start == "auto" else ids.get(start)
        return [found] if isinstance(found, int) else []

    def encode(self, document: bytes, start_ids: list[int]) -> EncodedDocument:
        """document: UTF-8. Raises ValueError if it encodes to no tokens."""
        text = document.decode()
        tokens = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        if not tokens:
            raise ValueError(f"model={self.name!r}: its tokenizer makes no tokens of {text[:20]!r}")
        unscored, start_bytes = (0, 0) if start_ids else self._first_characters(text, tokens)
        ids = np.array([*start_ids, *tokens], dtype=np.int64)
        scored_bytes = len(document) - start_bytes if unscored < len(tokens) else 0
        scored = ScoredIds(ids, len(start_ids) + unscored)
        return EncodedDocument(scored, scored_bytes, self._decode(tokens) != text)

    def _first_characters(self, text: str, tokens: list[int]) -> tuple[int, int]:
        """The smallest number of first tokens that end at a character, and the number of their bytes."""
        for count in range(1, min(len(tokens), LONGEST_START) + 1):
            head = self._decode(tokens[:count])
            if head and text.startswith(head):
                return count, len(head.encode())
        return 1, len(self._decode(tokens[:1]).encode())

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

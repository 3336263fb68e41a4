"""Conversations as training examples: role tokens around the bytes, and a loss on the assistant's text only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from modeling_arb.backbone.byte_head import IGNORE
from tokenization_arb import SPECIAL_IDS, ArbTokenizer

SPEAKERS = {"human": "user", "gpt": "assistant"}  # as {"from", "value"} messages have them
FORMATS = '"messages", "conversations", "prompt" and "completion", or "instruction" and "output"'

Message = dict[str, Any]  # content: text, which encode_turn checks


class Conversation(NamedTuple):
    """Ids of a conversation, and which of them are the assistant's, EOS included."""

    ids: list[int]
    said: list[bool]


def encode_conversation(messages: Sequence[Message], tokenizer: ArbTokenizer) -> Conversation:
    """The ids of a chat, and which of them are scored. Raises ValueError on a malformed message."""
    ids: list[int] = []
    said: list[bool] = []
    for message in map(_renamed, messages):
        turn = tokenizer.encode_turn(message)
        ids += turn
        said += [False, *[message["role"] == "assistant"] * (len(turn) - 1)]
    return Conversation(ids, said)


def _renamed(message: object) -> Message:
    """A message as role and content, for all accepted field names."""
    if not isinstance(message, dict):
        raise ValueError(f"a message must be an object with role and content, not {message!r:.60}")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise ValueError(f"role={role!r:.60} must be text")
    return {"role": SPEAKERS.get(role, role), "content": content}


def messages_of(row: object) -> list[Message]:
    """The messages of a row in any of FORMATS. Raises ValueError naming the field that is wrong."""
    if not isinstance(row, dict):
        raise ValueError(f"must be an object, not {row!r:.60}")
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            if not isinstance(row[name], list) or not row[name]:
                raise ValueError(f"{name}={row[name]!r:.60} must be a list of messages")
            return row[name]
    if row.get("prompt") is not None:
        return _turn(row, "prompt", "user") + _turn(row, "completion", "assistant")
    if row.get("instruction") is not None:
        asked = _turn(row, "instruction", "user")
        if row.get("input"):
            asked[-1]["content"] += "\n\n" + _turn(row, "input", "user")[0]["content"]
        return asked + _turn(row, "output", "assistant")
    raise ValueError(f"fields {', '.join(row) or 'none'}: need {FORMATS}")


def _turn(row: dict, name: str, role: str) -> list[Message]:
    """A field as a list of messages: text becomes one message."""
    value = row.get(name)
    if isinstance(value, list) and value:
        return list(value)
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r:.60} must be text")
    return [{"role": role, "content": value}]


class Conversations(NamedTuple):
    """The conversations, and how many were cut at `ctx` ids or dropped because no assistant text was left."""

    kept: list[Conversation]
    cut: int
    dropped: int


def encode_rows(rows: Iterable[tuple[str, object]], ctx: int) -> Conversations:
    """rows: (place, row). Raises ValueError, beginning with the place, on a malformed row."""
    tokenizer, kept, cut, dropped = ArbTokenizer(), [], 0, 0
    for place, row in rows:
        try:
            ids, said = encode_conversation(messages_of(row), tokenizer)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        cut += len(ids) > ctx
        if any(said[:ctx]):
            kept.append(Conversation(ids[:ctx], said[:ctx]))
        else:
            dropped += 1
    return Conversations(kept, cut, dropped)


def read_conversations(path: str | Path, ctx: int) -> Conversations:
    """The conversations of a .jsonl file. Raises ValueError naming the file, and the line where one is wrong."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data={str(path)!r}: no such file")

    def rows() -> Iterable[tuple[str, object]]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                place = f"data={str(path)!r} line {number}"
                try:
                    yield place, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{place} is not JSON: {error}") from error

    return _not_empty(f"data={str(path)!r}", encode_rows(rows(), ctx))


def load_hub_conversations(name: str, split: str, ctx: int) -> Conversations:
    """The conversations of a hub dataset, or of a folder that `datasets` reads. Raises ValueError if it cannot be
    read."""
    import datasets

    asked = f"dataset={name!r}"
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # of many kinds, some of which are not exported
        raise ValueError(f"{asked}, split={split!r}: {str(error).splitlines()[0]}") from error
    return _not_empty(asked, encode_rows(((f"{asked} row {i}", row) for i, row in enumerate(rows)), ctx))


def _not_empty(asked: str, read: Conversations) -> Conversations:
    if not read.kept:
        raise ValueError(f"{asked} is empty: no conversation has assistant text")
    return read


def split_conversations(kept: Sequence[Conversation], every: int) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations: each `every`-th is held out. Raises ValueError when one part is empty."""
    held_out = list(kept[every - 1 :: every])
    train = [conversation for i, conversation in enumerate(kept, 1) if i % every]
    if not train or not held_out:
        raise ValueError(f"hold_out_every={every}: {len(kept)} to train on, {len(held_out)} held out; both need one")
    return train, held_out


class ConversationDataset(Dataset):
    """Conversation i as int64 input_ids and labels (T,), labels -100 outside the assistant's text."""

    def __init__(self, conversations: Sequence[Conversation]):
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor(self.conversations[index].ids)
        said = torch.tensor(self.conversations[index].said)
        return {"input_ids": ids, "labels": ids.masked_fill(~said, IGNORE)}


def collate_conversations(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """input_ids and labels (B, T), padded at the end. Padding follows all scored ids, so no mask is needed."""

    def pad(name: str, value: int) -> torch.Tensor:
        rows = [example[name] for example in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return {"input_ids": pad("input_ids", SPECIAL_IDS["PAD"]), "labels": pad("labels", IGNORE)}

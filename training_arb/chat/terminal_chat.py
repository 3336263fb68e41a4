"""A conversation in the terminal: streamed replies, commands, and a context that fits the model's."""

from __future__ import annotations

from collections.abc import Callable

from transformers.generation.streamers import BaseStreamer

from tokenization_arb import CHAT_ROLES, SPECIAL_IDS, ArbTokenizer, ByteStreamer

from .text_generation import TextGenerator

# Whoever speaks next, the reply is over: a model that was not trained to the end may leave EOS out.
TURN_ENDS = [SPECIAL_IDS["EOS"], *(SPECIAL_IDS[name] for name in CHAT_ROLES.values())]
HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C ends a reply"
SHOWN_CONTROLS = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def without_controls(text: str) -> str:
    """The text with every control character spelled out, so that the model's output cannot control the terminal."""
    return text.translate(SHOWN_CONTROLS)


class TerminalStreamer(ByteStreamer):
    """Prints replies, optionally with control characters spelled out."""

    def __init__(self, tokenizer: ArbTokenizer, skip_prompt: bool = True, spell_controls: bool = False):
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=True)
        self.spell_controls = spell_controls

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(without_controls(text) if self.spell_controls else text, stream_end)


class Conversation:
    """Turns as ids, and the cache that has read them.

    The oldest turns are dropped when the context is full; the system's stays.
    """

    def __init__(self, generator: TextGenerator, tokenizer: ArbTokenizer, system: str | None = None):
        self.generator, self.tokenizer = generator, tokenizer
        self.system = [] if system is None else tokenizer.encode_turn({"role": "system", "content": system})
        self.reset()

    def reset(self) -> None:
        """Forget every turn but the system's."""
        self.turns: list[list[int]] = []
        self.generator.cache = None

    def make_room(self, content: str) -> int:
        """Drop the oldest exchanges until the next one fits; returns their number. Raises ValueError if it does not fit
        by itself.
        """
        turn = self.tokenizer.encode_turn({"role": "user", "content": content})
        free = self.generator.room - len(self.system) - len(turn) - 1
        if free < 0:
            raise ValueError(f"a message of {len(turn) - 2} bytes is {-free} too long for the model's context")
        dropped = 0
        while sum(map(len, self.turns)) > free:
            del self.turns[:2]
            dropped += 1
        if dropped:
            self.generator.cache = None
        return dropped

    def reply(self, content: str, streamer: BaseStreamer | None = None) -> bytes:
        """The assistant's reply. Both turns are appended to the conversation."""
        self.make_room(content)
        asked = self.tokenizer.encode_turn({"role": "user", "content": content})
        ids = [i for turn in (self.system, *self.turns, asked) for i in turn] + [SPECIAL_IDS["ASSISTANT"]]
        new = self.generator(ids, streamer, self.generator.cache)
        # The last token has not been read: the cache fits the turn whether or not it ended by itself.
        said = new[:-1] if new[-1] in TURN_ENDS else new
        self.turns += [asked, [SPECIAL_IDS["ASSISTANT"], *said, SPECIAL_IDS["EOS"]]]
        return self.tokenizer.decode_bytes(said)


def talk(conversation: Conversation, streamer: BaseStreamer | None, read: Callable[[str], str] = input) -> None:
    """Read a turn, answer it, until /exit or the end of input. Without a streamer a reply is printed when complete."""
    print(HELP)
    while True:
        try:
            turn = read("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}")
            continue
        if turn == "/exit":
            return
        if turn == "/reset":
            conversation.reset()
            print("(new conversation)")
        elif turn.startswith("/"):
            print(f"({turn.split()[0]} is not a command: {HELP})")
        elif turn:
            _answer(conversation, turn, streamer)


def _answer(conversation: Conversation, turn: str, streamer: BaseStreamer | None) -> None:
    try:
        dropped = conversation.make_room(turn)
    except ValueError as error:
        print(f"({error})")
        return
    if dropped:
        print(f"(the context is full: the {dropped} oldest exchanges are forgotten)")
    try:
        said = conversation.reply(turn, streamer)
    except KeyboardInterrupt:  # a second Ctrl-C, in the middle of a token
        conversation.generator.cache = None
        if streamer is not None:
            streamer.end()
        print("(the reply is forgotten)")
        return
    if streamer is None:
        print(without_controls(said.decode("utf-8", errors="replace")))
    if conversation.generator.interrupt.interrupted:
        print("(interrupted)")

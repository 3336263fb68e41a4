"""ArbTokenizer: bytes and 32 specials; streamers that give out whole characters."""

from .byte_streamer import ByteIteratorStreamer, ByteStreamer
from .tokenization_arb import CHAT_ROLES, SPECIAL_IDS, SPECIAL_NAMES, SPECIAL_TOKENS, ArbTokenizer

__all__ = [
    "CHAT_ROLES",
    "SPECIAL_IDS",
    "SPECIAL_NAMES",
    "SPECIAL_TOKENS",
    "ArbTokenizer",
    "ByteIteratorStreamer",
    "ByteStreamer",
]

"""ArbTokenizer: bytes and 32 specials."""

from .tokenization_arb import CHAT_ROLES, SPECIAL_IDS, SPECIAL_NAMES, SPECIAL_TOKENS, ArbTokenizer

__all__ = ["CHAT_ROLES", "SPECIAL_IDS", "SPECIAL_NAMES", "SPECIAL_TOKENS", "ArbTokenizer"]

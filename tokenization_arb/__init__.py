"""ArbTokenizer: bytes and 32 specials."""

from .tokenization_arb import SPECIAL_IDS, SPECIAL_NAMES, SPECIAL_TOKENS, ArbTokenizer

__all__ = ["SPECIAL_IDS", "SPECIAL_NAMES", "SPECIAL_TOKENS", "ArbTokenizer"]

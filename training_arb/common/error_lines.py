"""The one line of an error that is shown to people."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message that holds text, or the error's type where the message is empty."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)

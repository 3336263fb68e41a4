"""Turns errors of the hub into one line that says what was asked and what came back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REASONS = {
    401: "the hub does not accept the token (401): log in with `hf auth login`, or set HF_TOKEN",
    403: "the token has no right to write there (403)",
}


@contextmanager
def hub_errors(asked: str) -> Iterator[None]:
    """Turn errors of a call to the hub, except bugs, into a ValueError that begins with `asked`."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise ValueError(f"{asked}: {reason}") from error


def _reason(error: BaseException | None) -> str | None:
    """The reason in words, or None when it is not an error of the hub."""
    unreachable = f"{constants.ENDPOINT} cannot be reached"
    if isinstance(error, LocalEntryNotFoundError):
        return f"not in the cache, and {unreachable}"
    if isinstance(error, RevisionNotFoundError):
        return "the hub has no such revision"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if isinstance(error, RepositoryNotFoundError) and status != 401:
            return "the hub has no such repository, or the token may not see it"
        said = error.server_message or error.response.reason_phrase
        return f"{REASONS.get(status, f'the hub answered {status}')}: {said}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HTTPError | ConnectionError):
        return f"{unreachable} ({error})"
    if isinstance(error, json.JSONDecodeError):
        return f"{constants.ENDPOINT} answered with something that is not JSON"
    if isinstance(error, RuntimeError):  # of an upload, around what went wrong with one file
        cause = _reason(error.__cause__)
        return cause and f"{str(error).rstrip('.')}: {cause}"
    return None

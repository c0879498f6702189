"""What MongoDB says when it refuses: one document, or all that is asked of it."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from broker.connectors import mongodb
from broker.extend.auth import BackendUnavailable
from broker.extend.sink import Fatal, NotConnected

T = TypeVar("T")

AGAIN = {6, 7, 24, 43, 50, 64, 79, 89, 91, 100, 112, 146, 189, 225, 237, 262, 358, 384, 10107, 11600, 11602, 13435,
         13436, 14031, 16500}  # fmt: skip
"""HostUnreachable and the like, elections, time limits, lock and write conflicts, no space, no memory, throttled."""
DUPLICATE = {11000, 11001, 12582}
"""A unique index has such a document."""


def pattern(error: Mapping[str, Any]) -> list[str]:
    """The fields of the unique index that refused a document."""
    pattern = error.get("keyPattern")
    if isinstance(pattern, Mapping):
        return list(pattern)
    return ["_id"] if "index: _id_ " in str(error.get("errmsg")) else ["?"]


async def asked(question: Awaitable[T]) -> T:
    """The answer. Raises Fatal when MongoDB will not have it as it is configured, NotConnected when it may later."""
    try:
        return await question
    except mongodb.Rejected as error:
        raise Fatal(str(error)) from None
    except BackendUnavailable as error:
        raise NotConnected(str(error)) from None

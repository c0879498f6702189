"""The driver's connection, taught what uvloop says when it is broken."""

from __future__ import annotations

from typing import Any

from aiokafka import conn
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import KafkaConnectionError, KafkaError


class Connection(AIOKafkaConnection):  # type: ignore[misc]
    """Where asyncio's transport takes no notice of a write after the end, uvloop's raises RuntimeError. The driver does
    not know that: its task for metadata ends with it, and its producer never finds a broker again."""

    def send(self, request: Any, expect_response: bool = True) -> Any:
        """The answer, to be awaited. Raises KafkaConnectionError where there is no connection any more."""
        try:
            return super().send(request, expect_response)
        except (KafkaError, NotImplementedError):  # RuntimeErrors, too: what is wrong with the request
            raise
        except RuntimeError as error:
            self.close(reason=CloseReason.CONNECTION_BROKEN)
            raise KafkaConnectionError(f"Connection at {self.host}:{self.port} broken: {error}") from error


def install() -> None:
    """From now on the driver opens these; once is enough."""
    conn.AIOKafkaConnection = Connection

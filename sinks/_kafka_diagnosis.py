"""Why a Kafka cluster cannot be used: the driver says «unable to bootstrap» to a wrong password, too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.errors import SaslAuthenticationFailed
from aiokafka.protocol.metadata import MetadataRequest

from broker.extend.sink import Fatal, NotConnected
from sinks._kafka_errors import describe, refusal

_WITHIN = 5.0

Reason = NotConnected | Fatal


class Diagnosis:
    """Asks each of the servers; `security` gives the driver's options for a connection."""

    def __init__(self, servers: Sequence[str], security: Callable[[], dict[str, Any]], timeout: float) -> None:
        self._servers = servers
        self._security = security
        self._timeout = timeout

    async def reason(self, error: BaseException | None) -> Reason:
        """Why we are not connected; `error` is what the driver said."""
        return await self.refusal() or NotConnected(
            f"Kafka at {', '.join(self._servers)}: {describe(error) if error else 'no broker answers'}"
        )

    async def refusal(self) -> Reason | None:
        """What the servers said that cannot be used; Fatal when none can. None when nothing is wrong with any."""
        security = self._security()
        reasons = await asyncio.gather(*(self._ask(server, security) for server in self._servers))
        said = [reason for reason in reasons if reason is not None]
        fatal = next((reason for reason in said if isinstance(reason, Fatal)), None)
        if fatal is not None and len(said) == len(reasons):
            return fatal
        return NotConnected("; ".join(dict.fromkeys(str(reason) for reason in said))) if said else None

    async def _ask(self, server: str, security: dict[str, Any]) -> Reason | None:
        host, _, port = server.rpartition(":")
        try:
            async with asyncio.timeout(min(_WITHIN, self._timeout)):
                connection = await create_conn(
                    host.strip("[]"), int(port), client_id="isthmus",
                    request_timeout_ms=int(self._timeout * 1000), **security,
                )  # fmt: skip
                try:
                    await _greet(connection, security.get("sasl_mechanism") == "OAUTHBEARER")
                finally:
                    connection.close()
        except Exception as error:
            return refusal(server, error)
        return None


async def _greet(connection: AIOKafkaConnection, token: bool) -> None:
    """With a token: whether it was accepted. The driver overhears the no of RFC 7628 3.2.3, so that its next request is
    taken for the rest of the login, and answered with a refusal that reads like a cluster of no brokers."""
    if not token:
        return
    answer = await connection.send(MetadataRequest([]))
    if not answer.brokers:
        raise SaslAuthenticationFailed("the token is not accepted")

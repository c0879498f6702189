"""Connects a bridge to its remote broker: which server, in which protocol version, as which client."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from broker.client.address import parse
from broker.client.connection import Connection
from broker.client.errors import NoAnswer, Refused, TimedOut
from broker.mqtt.packets import Will

_log = logging.getLogger(__name__)

_REMEMBERED = 3600.0  # seconds a server's dialect is taken for granted
_SHORT = 23  # bytes of a client id that every server takes
_VERSION, _CLIENT_ID, _TOPIC, _RETAIN, _QOS = 0x84, 0x85, 0x90, 0x9A, 0x9B

Protocol = Literal["auto", "3.1", "3.1.1", "5"]
Dialect = tuple[int, bool]
"""Protocol version, and whether it carries the private bit that tells the other side we are a bridge."""

_DIALECTS: dict[Protocol, tuple[Dialect, ...]] = {
    "auto": ((5, False), (4, True), (4, False), (3, True), (3, False)),
    "5": ((5, False),),
    "3.1.1": ((4, True), (4, False)),
    "3.1": ((3, True), (3, False)),
}


class Manner:
    """How one server wants to be spoken to, as far as we have found out."""

    __slots__ = ("dialect", "notify", "short_id", "until", "will_qos", "will_retain")

    def __init__(self) -> None:
        self.dialect: Dialect | None = None
        self.until = 0.0
        self.short_id = False
        self.will_qos = 1
        self.will_retain = True
        self.notify = True


Dial = Callable[[str, Dialect, str, Will | None], Awaitable[Connection]]
"""Opens one connection: url, dialect, client id, will."""


class Remote:
    """The servers of one bridge. Remembers each server's manner for an hour; knows nothing of messages."""

    def __init__(self, servers: Sequence[str], protocol: Protocol, try_private: bool, client_id: str) -> None:
        self.servers = tuple(servers)
        self._dialects = [d for d in _DIALECTS[protocol] if try_private or not d[1]]
        self.full_client_id = client_id
        self._manners: dict[str, Manner] = {url: Manner() for url in self.servers}

    def manner(self, url: str) -> Manner:
        """What is known about a server."""
        return self._manners[url]

    def client_id(self, url: str, version: int) -> str:
        """Our name there; a long one is shortened, with a digest that keeps it unique, where 23 bytes are the limit."""
        name = self.full_client_id
        if len(name.encode()) <= _SHORT or (version > 3 and not self._manners[url].short_id):
            return name
        digest = hashlib.sha256(name.encode()).hexdigest()[:10]
        return name.encode()[: _SHORT - 11].decode("utf-8", "ignore") + "-" + digest

    async def open(self, dial: Dial, url: str, will: Will | None) -> Connection:
        """Connect to one server, trying its known dialect or every one the configuration allows, best first.

        Raises the ConnectionError of the last try.
        """
        manner = self._manners[url]
        now = asyncio.get_running_loop().time()
        if manner.dialect is not None and now < manner.until:
            try:
                return await self._speak(dial, url, manner.dialect, will)
            except Refused as error:
                if error.code != _VERSION:
                    raise
            manner.dialect = None  # another server answers there now
        failure: ConnectionError | None = None
        for dialect in self._dialects:
            try:
                conn = await self._speak_twice(dial, url, dialect, will)
            except NoAnswer as error:
                failure = error  # some servers close instead of refusing a version or the private bit
            except Refused as error:
                if error.code != _VERSION:
                    raise
                failure = error
            else:
                manner.dialect, manner.until = dialect, now + _REMEMBERED
                return conn
        raise failure or ConnectionError(f"{url}: no protocol version left to try")

    async def _speak_twice(self, dial: Dial, url: str, dialect: Dialect, will: Will | None) -> Connection:
        """A link that breaks in the wrong moment must not cost us a dialect: only a second silent close counts."""
        try:
            return await self._speak(dial, url, dialect, will)
        except TimedOut:
            raise
        except NoAnswer:
            return await self._speak(dial, url, dialect, will)

    async def _speak(self, dial: Dial, url: str, dialect: Dialect, will: Will | None) -> Connection:
        """One dialect; gives up on long names, retained and QoS 1 wills as the server asks for it, one at a time."""
        manner = self._manners[url]
        for _ in range(4):
            client_id = self.client_id(url, dialect[0])
            offered = self._will(manner, will)
            try:
                return await dial(url, dialect, client_id, offered)
            except Refused as error:
                if error.code == _CLIENT_ID and not manner.short_id and len(client_id.encode()) > _SHORT:
                    manner.short_id = True
                elif error.code == _RETAIN and offered is not None and offered.retain:
                    manner.will_retain = False
                elif error.code == _QOS and offered is not None and offered.qos:
                    manner.will_qos = 0
                elif error.code == _TOPIC and offered is not None:
                    manner.notify = False
                    _log.warning("%s refuses the notification topic of the bridge: notifications stay here", url)
                else:
                    raise
        raise ConnectionError(f"{url}: the server refuses every form of CONNECT")

    @staticmethod
    def _will(manner: Manner, will: Will | None) -> Will | None:
        if will is None or not manner.notify:
            return None
        return Will(will.topic, will.payload, manner.will_qos, will.retain and manner.will_retain)


async def reachable(url: str, seconds: float) -> bool:
    """Whether the server's port answers."""
    address = parse(url)
    try:
        async with asyncio.timeout(seconds):
            if address.scheme == "unix":
                _, writer = await asyncio.open_unix_connection(address.path)
            else:
                _, writer = await asyncio.open_connection(address.host, address.port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True

"""An LDAP server that misbehaves on request and remembers what it was sent. Speaks just enough BER by hand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

Reply = bytes | None


def tlv(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def text(value: str | bytes) -> bytes:
    return tlv(0x04, value if isinstance(value, bytes) else value.encode())


def result(tag: int, code: int, message: str = "") -> bytes:
    return tlv(tag, tlv(0x0A, bytes([code])) + text("") + text(message))


def entry(dn: str, **attributes: str | list[str]) -> bytes:
    listed = b""
    for name, values in attributes.items():
        values = [values] if isinstance(values, str) else values
        listed += tlv(0x30, text(name) + tlv(0x31, b"".join(map(text, values))))
    return tlv(0x64, text(dn) + tlv(0x30, listed))


def reference(url: str) -> bytes:
    return tlv(0x73, text(url))


def read(data: bytes, at: int = 0) -> tuple[int, bytes, int]:
    """Tag, content, position behind."""
    tag, size, at = data[at], data[at + 1], at + 2
    if size & 0x80:
        count = size & 0x7F
        size = int.from_bytes(data[at : at + count], "big")
        at += count
    return tag, data[at : at + size], at + size


def children(content: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(content):
        tag, inner, at = read(content, at)
        found.append((tag, inner))
    return found


class FakeLdap:
    """`found` is what every search answers; `bind` decides about binds; `before` may be awaited before each answer."""

    def __init__(self) -> None:
        self.binds: list[tuple[str, bytes]] = []
        self.filters: list[tuple[int, list[tuple[int, bytes]]]] = []
        self.bases: list[str] = []
        self.connections = 0
        self.open = 0
        self.found: list[bytes] = [entry("uid=u,dc=x", uid="u")]
        self.search_code = 0
        self.starttls_code = 0
        self.bind: Callable[[str, bytes], int] = lambda dn, password: 0
        self.before: Callable[[str], Any] | None = None
        self.compare: Callable[[bytes], int] = lambda value: 5
        self.compared: list[tuple[str, str, str, bytes]] = []
        """Who asked, about which entry and attribute, and the value."""
        self.identities: list[str] = []
        self.cleartext: list[int] = []
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> FakeLdap:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"ldap://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        identity = ""
        try:
            while True:
                head = await reader.readexactly(2)
                size = head[1]
                if size & 0x80:
                    size = int.from_bytes(await reader.readexactly(size & 0x7F), "big")
                (_, number), (tag, body), *_ = children(await reader.readexactly(size))
                self.cleartext.append(tag)
                if self.before is not None:
                    kind = {0x60: "bind", 0x63: "search", 0x6E: "compare", 0x77: "extended"}.get(tag, "other")
                    await self.before(kind) if asyncio.iscoroutinefunction(self.before) else self.before(kind)
                if tag == 0x60:
                    _, (_, name), (_, password) = children(body)
                    self.binds.append((name.decode(), password))
                    code = self.bind(name.decode(), password)
                    identity = name.decode() if code == 0 else ""
                    answers = [result(0x61, code)]
                elif tag == 0x63:
                    fields = children(body)
                    self.bases.append(fields[0][1].decode())
                    self.filters.append((fields[6][0], children(fields[6][1])))
                    self.identities.append(identity)
                    answers = [*self.found, result(0x65, self.search_code)]
                elif tag == 0x6E:
                    (_, dn), (_, assertion) = children(body)
                    (_, name), (_, value) = children(assertion)
                    self.compared.append((identity, dn.decode(), name.decode(), value))
                    answers = [result(0x6F, self.compare(value))]
                elif tag == 0x77:
                    answers = [result(0x78, self.starttls_code, "no")]
                else:
                    return
                for answer in answers:
                    writer.write(tlv(0x30, tlv(0x02, number) + answer))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

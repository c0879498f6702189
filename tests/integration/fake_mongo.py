"""A member of a MongoDB replica set that does what a test wants: speaks OP_MSG, holds documents in a list."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import bson

_HEADER = struct.Struct("<iiii")
OP_REPLY, OP_QUERY, OP_MSG = 1, 2004, 2013


class FakeMongo:
    """`async with FakeMongo() as member:`; `member.hosts` and `member.primary` say what it believes of the set."""

    def __init__(self, documents: Mapping[str, list[dict[str, Any]]]) -> None:
        self.documents = documents
        self.port = 0
        self.set_name = "rs0"
        self.hosts: list[str] = []
        self.primary: str | None = None
        self.errors: list[tuple[int, str]] = []
        """Codes and names the next finds fail with."""
        self.finds: list[dict[str, Any]] = []
        self.logins = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> FakeMongo:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.die()

    async def die(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                size, request, _, kind = _HEADER.unpack(await reader.readexactly(16))
                body = await reader.readexactly(size - 16)
                if kind == OP_QUERY:  # the first hello of older drivers
                    name_end = body.index(b"\0", 4)
                    command = bson.decode(body[name_end + 9 :])
                    data = struct.pack("<iqii", 8, 0, 0, 1) + bson.encode(self._answer(command))
                    writer.write(_HEADER.pack(16 + len(data), 0, request, OP_REPLY) + data)
                elif kind == OP_MSG:
                    (flags,) = struct.unpack_from("<I", body)
                    command = _command(body[4:])
                    if flags & 1 << 16:  # an exhaust hello would be answered again and again; once is allowed
                        flags = 0
                    data = struct.pack("<I", 0) + b"\0" + bson.encode(self._answer(command))
                    writer.write(_HEADER.pack(16 + len(data), 0, request, OP_MSG) + data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            with contextlib.suppress(ConnectionError):
                writer.close()

    def _answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        name = next(iter(command))
        if name.lower() in ("hello", "ismaster"):
            return {
                "ok": 1.0, "helloOk": True, "isWritablePrimary": self.primary == self.address,
                "ismaster": self.primary == self.address, "secondary": self.primary != self.address,
                "setName": self.set_name, "setVersion": 1, "hosts": self.hosts, "me": self.address,
                **({"primary": self.primary} if self.primary else {}), "maxBsonObjectSize": 16 << 20,
                "maxMessageSizeBytes": 48_000_000, "maxWriteBatchSize": 100_000, "minWireVersion": 0,
                "maxWireVersion": 21, "readOnly": False,
            }  # fmt: skip
        if name == "saslStart":
            self.logins += 1
            return {"ok": 0.0, "code": 18, "codeName": "AuthenticationFailed", "errmsg": "Authentication failed."}
        if name == "find":
            self.finds.append(dict(command))
            if self.errors:
                code, text = self.errors.pop(0)
                return {"ok": 0.0, "code": code, "codeName": text, "errmsg": text}
            wanted = command["filter"]
            found = [
                document
                for document in self.documents.get(command["find"], [])
                if all(document.get(key) == value for key, value in wanted.items())
            ]
            cursor = {"id": bson.Int64(0), "ns": f"{command['$db']}.{command['find']}", "firstBatch": found}
            return {"ok": 1.0, "cursor": cursor}
        return {"ok": 1.0}


def _command(sections: bytes) -> dict[str, Any]:
    """The document of an OP_MSG; the sequences that follow it are lists in it, as they would be without."""
    end = 1 + struct.unpack_from("<i", sections, 1)[0]
    command = bson.decode(sections[1:end])
    while end < len(sections) and sections[end] == 1:
        start, end = end + 5, end + 1 + struct.unpack_from("<i", sections, end + 1)[0]
        name, _, documents = sections[start:end].partition(b"\0")
        command[name.decode()] = bson.decode_all(documents)
    return command

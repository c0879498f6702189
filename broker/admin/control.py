"""The control socket: one JSON object a line over a Unix socket in the data folder. Knows no command by itself."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

MAX_LINE = 1 << 20
"""Bytes of one request."""

_log = logging.getLogger(__name__)

Command = Callable[..., Awaitable[Any]]
"""Takes the request's arguments as keywords, returns what JSON can hold."""


class NotRunning(ConnectionError):
    """No broker is running that uses this data folder."""


class CommandFailed(Exception):
    """The broker did not do what was asked."""

    def __init__(self, text: str, exit: int = 1) -> None:
        super().__init__(text)
        self.exit = exit
        """Exit code for the command line: 1 failed, 2 wrong configuration, 3 a server cannot be reached."""


class AlreadyRunning(RuntimeError):
    """Another broker uses this data folder."""


class ControlServer:
    """Answers requests on the control socket; several at the same time, each connection in order."""

    def __init__(self, path: Path, commands: Mapping[str, Command]) -> None:
        self.path = Path(path)
        self._commands = commands
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._identity: tuple[int, int] | None = None

    async def start(self) -> None:
        """Open the socket, only for this user. Raises AlreadyRunning when another broker answers on it."""
        self._make_room()
        previous = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, str(self.path), limit=MAX_LINE)
        finally:
            os.umask(previous)
        status = self.path.stat()
        self._identity = (status.st_dev, status.st_ino)

    async def close(self) -> None:
        """Stop answering; requests under way are abandoned. The socket's file is removed if it is still ours."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        with contextlib.suppress(OSError):
            status = self.path.stat()
            if (status.st_dev, status.st_ino) == self._identity:
                self.path.unlink()

    def _make_room(self) -> None:
        """Remove the socket of a broker that is gone, and nothing else."""
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise FileExistsError(errno.EEXIST, "there is a file that is no socket", str(self.path))
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(2)
            try:
                probe.connect(str(self.path))
            except ConnectionRefusedError:
                self.path.unlink(missing_ok=True)
                return
        raise AlreadyRunning(f"another broker uses {self.path.parent}")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await self._answer(line), default=str).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError, asyncio.CancelledError):
            pass  # the other side left, or sent a line without end; or `close` ended this task
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            command, arguments = request["command"], request.get("arguments") or {}
            handler = self._commands[command]
        except KeyError as error:
            return _failure(f"this broker knows no command {error}")
        except (ValueError, TypeError, AttributeError, RecursionError):
            return _failure("the request is not an object with command and arguments")
        try:
            return {"ok": True, "result": await handler(**arguments)}
        except CommandFailed as error:
            return _failure(str(error), error.exit)
        except LookupError as error:
            return _failure(str(error.args[0] if error.args else error))
        except Exception as error:
            _log.exception("the command %s failed", command)
            return _failure(f"{type(error).__name__}: {error}")


def _failure(text: str, exit: int = 1) -> dict[str, Any]:
    return {"ok": False, "error": text, "exit": exit}


def request(path: Path, command: str, *, timeout: float = 60.0, **arguments: Any) -> Any:
    """Ask the running broker and return its answer; waits up to `timeout` seconds.

    Raises NotRunning when none answers on the socket, CommandFailed when it says no, TimeoutError when
    it says nothing.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            raise NotRunning(f"no broker is running with the data folder {Path(path).parent}") from error
        except PermissionError as error:
            raise CommandFailed(f"{path} belongs to another user; run this as the user of the broker") from error
        connection.sendall(json.dumps({"command": command, "arguments": arguments}).encode() + b"\n")
        with connection.makefile("rb") as answers:
            line = answers.readline()
    if not line:
        raise NotRunning("the broker stopped before it answered")
    answer = json.loads(line)
    if not answer["ok"]:
        raise CommandFailed(answer["error"], int(answer.get("exit", 1)))
    return answer["result"]

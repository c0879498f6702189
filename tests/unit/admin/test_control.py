"""The control socket: one JSON object a line, for this user only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.admin.control import AlreadyRunning, CommandFailed, ControlServer, NotRunning, request


async def _echo(**arguments: Any) -> Any:
    return arguments


async def _fail() -> None:
    raise CommandFailed("no such thing", exit=3)


async def _missing() -> None:
    raise LookupError("no sink is called x")


async def _crash() -> None:
    raise RuntimeError("oops")


async def _hang() -> None:
    await asyncio.Event().wait()


COMMANDS = {"echo": _echo, "fail": _fail, "missing": _missing, "crash": _crash, "hang": _hang}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ControlServer]:
    server = ControlServer(tmp_path / "control.sock", COMMANDS)
    await server.start()
    yield server
    await server.close()


async def ask(server: ControlServer, command: str, **arguments: Any) -> Any:
    return await asyncio.to_thread(request, server.path, command, **arguments)


async def test_a_command_is_called_with_its_arguments(server: ControlServer) -> None:
    assert await ask(server, "echo", a=1, b="ä\n") == {"a": 1, "b": "ä\n"}


async def test_only_this_user_may_ask(server: ControlServer) -> None:
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("command", "exit", "text"),
    [
        ("fail", 3, "no such thing"),
        ("missing", 1, "no sink is called x"),
        ("crash", 1, "RuntimeError: oops"),
        ("nothing", 1, "nothing"),
    ],
)
async def test_failures_carry_their_text_and_exit_code(
    server: ControlServer, command: str, exit: int, text: str
) -> None:
    with pytest.raises(CommandFailed, match=text) as caught:
        await ask(server, command)
    assert caught.value.exit == exit


async def test_wrong_arguments_are_a_failure_not_a_crash(server: ControlServer) -> None:
    with pytest.raises(CommandFailed, match="argument"):
        await ask(server, "fail", nonsense=1)


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"[]\n", b'"x"\n', b"{}\n", b'{"command": []}\n', b"\xff\n", b"[" * 5000 + b"\n"]
)
async def test_what_is_no_request_gets_an_answer_and_the_next_is_served(server: ControlServer, line: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(str(server.path))
    writer.write(line + b'{"command": "echo"}\n')
    answers = [json.loads(await reader.readline()) for _ in range(2)]
    assert [answer["ok"] for answer in answers] == [False, True]
    writer.close()


async def test_a_line_without_end_only_ends_its_own_connection(server: ControlServer) -> None:
    reader, writer = await asyncio.open_unix_connection(str(server.path))
    with contextlib.suppress(ConnectionError):
        writer.write(b"x" * (2 << 20))
        await writer.drain()
        assert await reader.read() == b""
    writer.close()
    assert await ask(server, "echo") == {}


async def test_a_slow_command_does_not_stop_the_others(server: ControlServer, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = asyncio.Event()

    async def hang() -> None:
        begun.set()
        await _hang()

    monkeypatch.setitem(COMMANDS, "hang", hang)
    hanging = asyncio.create_task(asyncio.to_thread(request, server.path, "hang", timeout=10))
    await begun.wait()
    assert await ask(server, "echo") == {}
    await server.close()
    with pytest.raises((NotRunning, ConnectionError)):
        await hanging


async def test_a_silent_broker_is_a_timeout(server: ControlServer) -> None:
    with pytest.raises(TimeoutError):
        await ask(server, "hang", timeout=0.1)


async def test_without_a_broker_it_is_not_running(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match=str(tmp_path)):
        request(tmp_path / "control.sock", "status")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "control.sock"))
    with pytest.raises(NotRunning):
        request(tmp_path / "control.sock", "status")


async def test_the_socket_of_a_broker_that_died_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "control.sock"))
    server = ControlServer(tmp_path / "control.sock", COMMANDS)
    await server.start()
    assert await ask(server, "echo") == {}
    await server.close()
    assert not server.path.exists()


async def test_a_second_broker_is_refused_and_the_first_keeps_its_socket(server: ControlServer) -> None:
    second = ControlServer(server.path, COMMANDS)
    with pytest.raises(AlreadyRunning):
        await second.start()
    await second.close()
    assert await ask(server, "echo") == {}


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "control.sock").write_text("mine")
    with pytest.raises(FileExistsError):
        await ControlServer(tmp_path / "control.sock", COMMANDS).start()
    assert (tmp_path / "control.sock").read_text() == "mine"

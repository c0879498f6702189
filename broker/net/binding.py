"""Opens listening sockets: TCP on one or several addresses, and Unix sockets with their file."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
import struct
from pathlib import Path
from typing import Any

from broker.net.errors import ListenError

BACKLOG = 4096
"""Connections the kernel keeps for us, as far as net.core.somaxconn lets it."""
ATTEMPTS = 10
"""Free ports tried until one is free on every address."""

_UNAVAILABLE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def bind_tcp(name: str, host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on every address `host` stands for (``*``: all, IPv4 and IPv6), all on one port.

    Port 0 takes a free one. ListenError names the listener, the address and the system's reason.
    """
    where = f"{'[' + host + ']' if ':' in host else host}:{port}"
    try:
        found = socket.getaddrinfo(
            None if host == "*" else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise ListenError(f"listeners.{name}: bind {where}: {getattr(error, 'strerror', None) or error}") from None
    addresses: list[tuple[int, Any]] = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    addresses.sort(key=lambda pair: pair[0] != socket.AF_INET)
    for attempt in range(ATTEMPTS):
        try:
            return _bind_all(addresses, port)
        except OSError as error:
            if port == 0 and error.errno == errno.EADDRINUSE and attempt + 1 < ATTEMPTS:
                continue
            raise ListenError(f"listeners.{name}: bind {where}: {os.strerror(error.errno or 0)}") from None
    raise AssertionError


def _bind_all(addresses: list[tuple[int, Any]], port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    skipped: OSError | None = None
    try:
        for family, address in addresses:
            try:
                sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets no-delay by it
            except OSError as error:
                skipped = error
                continue
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind((address[0], port, *address[2:]))
            except OSError as error:
                if error.errno not in _UNAVAILABLE or len(addresses) == 1:
                    raise
                sockets.pop().close()
                skipped = error
                continue
            sock.listen(BACKLOG)
            sock.setblocking(False)
            port = port or sock.getsockname()[1]
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    if not sockets:
        raise skipped or OSError(errno.EADDRNOTAVAIL, "no address")
    return sockets


def bind_unix(name: str, path: Path, mode: int) -> socket.socket:
    """A socket that listens on `path`. A file left by a dead process is replaced; one in use is an error.

    The new socket takes the name at once (rename), with its permissions, so nobody finds it half made.
    """
    where = f"listeners.{name}: path {path}"
    try:
        status = path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ListenError(f"{where}: {error.strerror}") from None
    else:
        if not stat.S_ISSOCK(status.st_mode):
            raise ListenError(f"{where}: a file that is no socket has this name")
        if _answers(path):
            raise ListenError(f"{where}: {os.strerror(errno.EADDRINUSE)}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = path.with_name(f".{secrets.token_hex(3)}")
    bound = False
    try:
        if len(os.fsencode(temporary)) > 107:
            path.unlink(missing_ok=True)
            temporary = path
        old = os.umask(0o177)
        try:
            sock.bind(str(temporary))
            bound = True
        finally:
            os.umask(old)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        temporary.chmod(mode)
        if temporary != path:
            temporary.rename(path)
    except OSError as error:
        sock.close()
        if bound:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise ListenError(f"{where}: {os.strerror(error.errno) if error.errno else error}") from None
    return sock


def unlink_unix(path: Path, inode: int) -> None:
    """Remove the socket's file if it is still the one with this inode."""
    with contextlib.suppress(OSError):
        if path.lstat().st_ino == inode:
            path.unlink()


def private_folder(name: str, folder: Path) -> None:
    """Make the folder, or see to it that only our own user may enter it. ListenError when it is somebody else's."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise ListenError(f"listeners.{name}: {folder}: not a folder of our own user")
        if stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as error:
        raise ListenError(f"listeners.{name}: {folder}: {error.strerror}") from None


def granted_receive_buffer(wanted: int) -> int:
    """Bytes of a receive buffer the system gives to who asks for `wanted` (Linux: at most net.core.rmem_max)."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)
        return min(wanted, sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2)  # it is told doubled


def peer_uid(sock: socket.socket) -> int:
    """User id of the process at the other end of a Unix socket, as the kernel saw it at connect."""
    _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def _answers(path: Path) -> bool:
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.setblocking(False)
    try:
        probe.connect(str(path))
    except BlockingIOError:
        return True  # its queue is full: somebody has it open
    except OSError:
        return False
    finally:
        probe.close()
    return True

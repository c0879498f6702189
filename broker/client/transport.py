"""Opens the byte stream a connection runs on: TCP, TLS, WebSocket or a Unix socket."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, Protocol, cast

from broker.client.address import Address
from broker.client.errors import Unreachable


class Link(Protocol):
    """What a connection needs of its transport; asyncio's and uvloop's transports satisfy it as they are."""

    def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def is_closing(self) -> bool: ...
    def get_extra_info(self, name: str, default: Any = None) -> Any: ...


async def open_link(
    address: Address, protocol: asyncio.Protocol, tls: ssl.SSLContext | None, bind: str | None = None
) -> Link:
    """Connect ``protocol`` to ``address``; names are resolved off the event loop, anew on every call.

    Without ``tls`` a secure address is verified against the system's certificates. Raises Unreachable.
    """
    loop = asyncio.get_running_loop()
    context = (tls or ssl.create_default_context()) if address.secure else None
    local = (bind, 0) if bind else None
    factory: Callable[[], asyncio.Protocol] = lambda: protocol  # noqa: E731
    try:
        if address.scheme == "unix":
            transport, _ = await loop.create_unix_connection(factory, address.path)
        elif address.scheme in ("ws", "wss"):
            return await _open_websocket(address, protocol, context, local)
        else:
            transport, _ = await loop.create_connection(
                factory,
                address.host,
                address.port,
                ssl=context,
                server_hostname=address.host if context is not None else None,
                local_addr=local,
            )
    except ssl.SSLCertVerificationError as error:
        raise Unreachable(f"{address}: the certificate is not trusted: {error.verify_message or error}") from error
    except (OSError, ssl.SSLError) as error:
        raise Unreachable(f"{address}: {error.strerror or error}") from error
    return cast(Link, transport)


async def _open_websocket(
    address: Address, protocol: asyncio.Protocol, context: ssl.SSLContext | None, local: tuple[str, int] | None
) -> Link:
    import picows  # only those who use it pay for it

    class Listener(picows.WSListener):  # type: ignore[misc, unused-ignore]
        """Hands the payload of binary frames to the protocol as one byte stream."""  # [MQTT-6.0.0-1]

        def on_ws_connected(self, transport: Any) -> None:
            protocol.connection_made(cast(asyncio.Transport, _WebSocket(transport)))

        def on_ws_frame(self, transport: Any, frame: Any) -> None:
            if frame.msg_type in (picows.WSMsgType.BINARY, picows.WSMsgType.CONTINUATION):
                protocol.data_received(frame.get_payload_as_bytes())
            elif frame.msg_type == picows.WSMsgType.CLOSE:
                transport.disconnect()

        def on_ws_disconnected(self, transport: Any) -> None:
            protocol.connection_lost(None)

        def pause_writing(self) -> None:
            protocol.pause_writing()

        def resume_writing(self) -> None:
            protocol.resume_writing()

    arguments: dict[str, Any] = {"local_addr": local} if local else {}
    try:
        transport, _ = await picows.ws_connect(
            Listener,
            str(address),
            ssl_context=context,
            max_frame_size=1 << 28,
            extra_headers={"Sec-WebSocket-Protocol": "mqtt"},  # [MQTT-6.0.0-3]
            logger_name=__name__,
            **arguments,
        )
    except (TimeoutError, picows.WSError) as error:
        raise Unreachable(f"{address}: no WebSocket: {error}") from error
    return _WebSocket(transport)


class _WebSocket:
    """A WebSocket that looks like a stream transport."""

    def __init__(self, transport: Any) -> None:
        import picows

        self._transport = transport
        self._binary = picows.WSMsgType.BINARY
        self._close_code = picows.WSCloseCode.OK

    def write(self, data: bytes) -> None:
        self._transport.send(self._binary, data)

    def close(self) -> None:
        self._transport.send_close(self._close_code)
        self._transport.disconnect()

    def abort(self) -> None:
        self._transport.disconnect(False)

    def pause_reading(self) -> None:
        self._transport.underlying_transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.underlying_transport.resume_reading()

    def is_closing(self) -> bool:
        return bool(self._transport.underlying_transport.is_closing())

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.underlying_transport.get_extra_info(name, default)

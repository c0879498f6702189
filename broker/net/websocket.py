"""MQTT over WebSocket (RFC 6455, MQTT section 6) on picows: the upgrade, the rules for frames, a link.

picows parses frames and answers the upgrade. What it leaves open is decided here: path, Origin, sub-protocol, reserved
bits, order of fragments, text frames, and how much may arrive before login. No extension is agreed on, so nothing
inflates.
"""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from picows import (
    WSAutoPingStrategy,
    WSCloseCode,
    WSFrame,
    WSListener,
    WSMsgType,
    WSProtocolError,
    WSTransport,
    WSUpgradeRequest,
    WSUpgradeResponse,
    WSUpgradeResponseWithListener,
)
from picows.picows import WSProtocol  # type: ignore[attr-defined]

from broker.net.refusal import Refusal

if TYPE_CHECKING:
    from broker.net.admission import Admission

log = logging.getLogger(__name__)

SUBPROTOCOL = "mqtt"
LONGEST_REQUEST = 16 * 1024
"""Bytes of an upgrade request; picows stops there too, but without an answer."""
BEFORE_LOGIN = 64 * 1024 + 256
"""Bytes a client may send after the upgrade before it got its first answer: the engine's limit for a CONNECT, and the
headers of some frames around it."""
FRAME_MARGIN = 64 * 1024
"""How much larger than the largest packet a frame may be: several packets may share one."""
PONG_LIMIT = 64 * 1024
"""Bytes waiting to be sent above which a ping is not answered: a peer that only pings must not fill our memory."""

_SCRATCH = bytearray(16 * 1024)
"""Where bytes go that nobody will read."""


class WebSocketLink(WSListener):
    """A WebSocket as the engine's `link`: every `write` is one binary frame. Forwards payloads to the channel."""

    __slots__ = ("channel", "failed", "listener", "partial", "peer", "protocol", "socket", "transport")

    def __init__(self, listener: Admission, protocol: WebSocketProtocol) -> None:
        self.listener = listener
        self.protocol: WebSocketProtocol | None = protocol
        self.peer = protocol.peer
        self.socket: Any = None
        self.transport: Any = None
        self.channel: Any = None
        self.partial = False
        self.failed = False

    # what the engine calls ------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send one binary frame. [MQTT-6.0.0-1]"""
        protocol = self.protocol
        if protocol is not None:  # the first answer: from now on the client is worth more memory
            self.protocol = None
            protocol.login()
        self.socket.send(WSMsgType.BINARY, data)

    def close(self) -> None:
        """Say goodbye and close when everything is sent."""
        self.failed = True  # what the goodbye fills up is no channel's business any more
        if not self.transport.is_closing():
            self.socket.send_close(WSCloseCode.OK)
            self.transport.close()

    def abort(self) -> None:
        """Close without sending what is left."""
        self.transport.abort()

    def is_closing(self) -> bool:
        """Whether `close` or `abort` was called."""
        closing: bool = self.transport.is_closing()
        return closing

    def get_extra_info(self, name: str) -> Any:
        """What the transport below knows."""
        return self.transport.get_extra_info(name)

    def pause_reading(self) -> None:
        """Leave the peer's bytes in the kernel; frames already read are still delivered."""
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def get_write_buffer_size(self) -> int:
        """Bytes that wait for the peer."""
        size: int = self.transport.get_write_buffer_size()
        return size

    # what picows calls ----------------------------------------------------------------------------------------

    def on_ws_connected(self, transport: WSTransport) -> None:
        """The upgrade is answered: open the channel."""
        self.socket = transport
        self.transport = transport.underlying_transport
        headers = transport.request.headers
        identity = self.listener.identity_of(self.transport, self.peer)
        if identity is None:
            self.transport.abort()
            return
        for key, header in (("ws_cookie", "Cookie"), ("ws_origin", "Origin"), ("ws_authorization", "Authorization")):
            value = headers.get(header)
            if value is not None:
                identity[key] = value
        headers.clear()  # picows keeps request and answer for as long as the connection lives
        transport.response.headers.clear()
        assert self.protocol is not None
        try:
            self.channel = self.listener.open_channel(self, self.peer, self.protocol.since)
        except Exception as error:
            self.listener.crashed(self.peer, error)
            self.transport.abort()
            return
        if identity:
            self.channel.identity = identity

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Check what picows does not, and hand the payload on. A violation closes with a code of RFC 6455 7.4.1."""
        if self.failed or self.channel is None:
            return
        kind = frame.msg_type
        if frame.rsv1 or frame.rsv2 or frame.rsv3:
            self._fail(WSCloseCode.PROTOCOL_ERROR, "a reserved bit is set and no extension was agreed on")
        elif kind == WSMsgType.BINARY:
            if self.partial:
                self._fail(WSCloseCode.PROTOCOL_ERROR, "a new message begins inside a fragmented one")
            self.partial = not frame.fin
            self._feed(frame)
        elif kind == WSMsgType.CONTINUATION:
            if not self.partial:
                self._fail(WSCloseCode.PROTOCOL_ERROR, "a continuation of nothing")
            self.partial = not frame.fin
            self._feed(frame)
        elif kind == WSMsgType.TEXT:
            self._fail(WSCloseCode.UNSUPPORTED_DATA, "a text frame; MQTT is binary")  # [MQTT-6.0.0-1]
        elif kind == WSMsgType.PING:
            if self.transport.get_write_buffer_size() <= PONG_LIMIT:
                transport.send_pong(frame.get_payload_as_bytes())
        elif kind == WSMsgType.CLOSE:
            self.failed = True
            transport.send_close(frame.get_close_code() if frame.payload_size else WSCloseCode.OK)
            self.transport.close()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        """The connection is gone; the protocol tells the channel, with the reason."""

    def pause_writing(self) -> None:
        """The transport holds more than the peer takes."""
        if self.channel is not None and not self.failed:
            self.channel.pause_writing()

    def resume_writing(self) -> None:
        """The transport takes bytes again."""
        if self.channel is not None:
            self.channel.resume_writing()

    def _feed(self, frame: WSFrame) -> None:
        if frame.payload_size:
            self.channel.feed(frame.get_payload_as_bytes())

    def _fail(self, code: WSCloseCode, text: str) -> None:
        self.failed = True
        raise WSProtocolError(code, text)


class WebSocketProtocol(WSProtocol):  # type: ignore[misc]
    """One WebSocket from accept on: bounds the upgrade in time and size, and what may arrive before login."""

    __slots__ = ("_early", "_room", "_source", "_timer", "link", "owner", "peer", "since")

    def __init__(self, owner: Admission, since: float, peer: str) -> None:
        super().__init__(
            None,
            None,
            False,
            self._upgrade,
            owner.ws_log,
            True,
            None,
            False,
            20,
            20,
            WSAutoPingStrategy.PING_WHEN_IDLE,
            False,
            owner.max_packet_size + FRAME_MARGIN,
            None,
            0,
        )
        self.owner = owner
        self.since = since
        self.peer = peer
        self.link: WebSocketLink | None = None
        self._room = LONGEST_REQUEST
        self._early = True
        self._source: Any = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The bytes may flow; the deadline counts from the accept, so a TLS hand-shake has used a part of it."""
        self._source = transport
        self.owner.shared.strangers.add(transport)
        self._timer = self.owner.loop.call_at(self.since + self.owner.connect_timeout, self._late)
        super().connection_made(transport)

    def get_buffer(self, hint: int) -> Any:
        """Where to put the next bytes, no more of them than are allowed; those of a refused peer go nowhere."""
        if not self._early:
            return super().get_buffer(hint)
        if self.link is None:
            return memoryview(_SCRATCH) if self._room < 0 else super().get_buffer(hint)
        return memoryview(super().get_buffer(hint))[: max(self._room, 1)]

    def buffer_updated(self, count: int) -> None:
        """Bytes have arrived."""
        if self._early:
            if self._room < 0 and self.link is None:
                return
            self._room -= count
            if self._room < 0 and self.link is None:
                self._refuse_request()
                return
            super().buffer_updated(count)
            if self._room <= 0 and self._early and self.link is not None:
                self._source.pause_reading()  # until login, or the channel's deadline
            return
        super().buffer_updated(count)

    def login(self) -> None:
        """The client got its first answer: lift the limit on what it may send."""
        paused = self._room <= 0
        self._early = False
        self._room = 0
        self.since = 0.0
        if paused and not self._source.is_closing():
            self._source.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, in whatever state it was."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)
        self.owner.shared.strangers.discard(self._source)
        link = self.link
        self.link = None
        if link is not None:
            channel = link.channel
            link.channel = link.protocol = None
            if channel is not None:
                channel.lost(exc)
                if not isinstance(channel, Refusal):
                    self.owner.left()
                    return
        self.owner.lost()

    def _late(self) -> None:
        self.owner.report("websocket", f"{self.peer} did not finish the WebSocket upgrade in time")
        self._source.abort()

    def _refuse_request(self) -> None:
        """Too long a request: answer, then swallow what still comes; an early close would destroy the answer."""
        self._source.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        text = f"{self.peer} sent an upgrade request of more than {LONGEST_REQUEST} bytes; refused"
        self.owner.report("websocket", text)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.owner.loop.call_later(1.0, self._source.abort)

    def _upgrade(self, request: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
        """Judge an upgrade request. RFC 6455 4.2, MQTT section 6."""
        headers = request.headers
        path = request.path.partition(b"?")[0].decode("latin-1")
        if path != self.owner.ws_path:
            return self._refuse(HTTPStatus.NOT_FOUND, "asked for another path")
        if not self.owner.origin_allowed(headers.getall("Origin", [])):
            return self._refuse(HTTPStatus.FORBIDDEN, "comes from no web site that is in origins")
        offered = ",".join(headers.getall("Sec-WebSocket-Protocol", []))
        if not offered.isascii() or SUBPROTOCOL not in [name.strip() for name in offered.split(",")]:
            return self._refuse(HTTPStatus.BAD_REQUEST, "does not offer the sub-protocol mqtt")  # [MQTT-6.0.0-3]
        tokens = [token.strip().lower() for token in ",".join(headers.getall("Connection", [])).split(",")]
        if "upgrade" in tokens:
            headers["Connection"] = "Upgrade"  # browsers send "keep-alive, Upgrade", which picows takes for an error
        link = WebSocketLink(self.owner, self)
        link.transport = self._source
        self.link = link
        self._room = BEFORE_LOGIN
        if self._timer is not None:
            self._timer.cancel()  # from here the channel has the deadline
            self._timer = None
        self.owner.shared.strangers.discard(self._source)
        response = WSUpgradeResponse.create_101_response({"Sec-WebSocket-Protocol": SUBPROTOCOL})  # [MQTT-6.0.0-4]
        return WSUpgradeResponseWithListener(response, link)

    def _refuse(self, status: HTTPStatus, text: str) -> WSUpgradeResponseWithListener:
        self.owner.report("websocket", f"{self.peer} {text}, listener {self.owner.name!r}; refused with {status.value}")
        response = WSUpgradeResponse.create_error_response(status, status.phrase.encode())
        return WSUpgradeResponseWithListener(response, None)


class WebSocketLog:
    """What picows says goes to the listener's limited log, and only what tells the operator something."""

    __slots__ = ("_listener",)

    def __init__(self, listener: Any) -> None:
        self._listener = listener

    def isEnabledFor(self, level: int) -> bool:
        """Details are never wanted: they would be written for every frame."""
        return False

    def log(self, level: int, text: str, *args: object) -> None:
        """A detail."""

    def debug(self, text: str, *args: object) -> None:
        """A detail."""

    def info(self, text: str, *args: object) -> None:
        """Connected, disconnected: nothing an operator needs."""

    def warning(self, text: str, *args: object) -> None:
        """A peer broke a rule."""
        self._listener.report("websocket", f"listener {self._listener.name!r}: " + (text % args if args else text))

    error = warning

    def exception(self, text: str, *args: object) -> None:
        """An error of ours, with its traceback."""
        log.exception(text, *args)

"""One connection to a broker: packets in, packets out, no session state.

Theory of operation. Everything is synchronous except what truly waits: connecting, SUBSCRIBE, UNSUBSCRIBE, draining
and leaving. What arrives in one read is decoded and handed to the `Handler` packet by packet, then `on_batch_end` is
called once. What is sent is collected and written once per tick of the event loop, so a thousand acknowledgements are
one system call.

Packet identifiers of PUBLISH belong to the caller, who may relay those of another session; this class only takes
identifiers for SUBSCRIBE and UNSUBSCRIBE, counting down from 65 535, where a session that counts up arrives last.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from broker.client.address import parse
from broker.client.delivery import decode_delivery
from broker.client.errors import BrokenPeer, Disconnected, NoAnswer, Refused, Silent, TimedOut
from broker.client.transport import Link, open_link
from broker.mqtt import packets
from broker.mqtt.codes import V5
from broker.mqtt.errors import ProtocolError
from broker.mqtt.framing import FrameReader
from broker.mqtt.packets import Connack, Publish, Will
from broker.mqtt.properties import Properties

_log = logging.getLogger(__name__)

_LARGEST = 268_435_460  # the largest packet there is: header, four length bytes, 268 435 455
_FLUSH_AT = 1 << 18  # bytes collected in one tick before they are written at once
_CONGESTED_AT = 1 << 20
_LEAVE = 2.0  # seconds the transport may take to send what is left
_USER_PROPERTIES = 1_000  # a broker is trusted with more than a client is

_CONNACK, _PUBLISH, _PUBACK, _PUBREC, _PUBREL, _PUBCOMP = 2, 3, 4, 5, 6, 7
_SUBACK, _UNSUBACK, _PINGRESP, _DISCONNECT = 9, 11, 13, 14


class Handler:
    """What a user of a connection overrides; each method is called from the event loop and must not block."""

    receive_maximum: int = 65_535
    """The most QoS 1 and 2 messages it wants unacknowledged; `connect` offers the smaller of this and its argument."""
    will: Will | None = None
    """The will of its connections, unless `connect` is given one."""
    clean_start: bool = False
    """Whether the session is begun anew even where `connect` was not asked to."""
    brief: bool = False
    """Whether a PUBLISH may come as a `Delivery`: for who trusts the broker and can read it."""

    def on_publish(self, conn: Connection, publish: Publish) -> None:
        """A message; QoS 1 and 2 wait for the handler's acknowledgement."""

    def on_ack(self, conn: Connection, packet_type: int, packet_id: int, code: int) -> None:
        """PUBACK, PUBREC, PUBREL or PUBCOMP; ``code`` is 0 from a 3.x broker."""

    def on_batch_end(self, conn: Connection) -> None:
        """Everything that one read brought has been handed over."""

    def on_lost(self, conn: Connection, exc: Exception | None) -> None:
        """The connection has ended, once; ``exc`` is None when our side ended it."""


class Connection(asyncio.Protocol):
    """A connected client. Made by `connect`; usable until `Handler.on_lost`."""

    connack: Connack
    version: int
    """3, 4 or 5."""
    session_present: bool
    receive_maximum: int
    """QoS 1 and 2 messages the broker takes unacknowledged."""
    maximum_packet_size: int
    """Bytes of the largest packet the broker takes."""
    client_id: str
    """The identifier in force: ours, or the one a 5.0 broker assigned."""

    def __init__(self, handler: Handler, version: int, max_packet_size: int | None) -> None:
        self._handler = handler
        self.version = version
        self._frames = FrameReader(max_packet_size or _LARGEST)
        self._loop = asyncio.get_running_loop()
        self._link: Link | None = None
        self._connected: asyncio.Future[Connack] = self._loop.create_future()
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._open = False  # between CONNACK and the end
        self._error: Exception | None = None
        self._out: list[bytes] = []
        self._size = 0
        self._paused = False
        self._writable: asyncio.Future[None] | None = None
        self._answers: dict[int, asyncio.Future[list[int]]] = {}
        self._next_id = 65_536
        self._aliases: dict[int, bytes] = {}
        self._alias_maximum = 0
        self._brief = handler.brief and version == V5
        self._keep_alive = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._received = self._sent = False
        self._pinged = 0.0  # when the ping was sent that waits for its answer; uvloop's own clock counts whole ticks
        self._pongs: deque[asyncio.Future[float] | None] = deque()
        """Who waits for the answer to each ping on the way."""
        self.round_trip: float | None = None
        """Seconds the last ping took."""

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        client_id: str,
        handler: Handler,
        version: int = V5,
        clean_start: bool = True,
        session_expiry: int = 0,
        keep_alive: int = 60,
        username: str | None = None,
        password: bytes | str | None = None,
        will: Will | None = None,
        receive_maximum: int = 65_535,
        max_packet_size: int | None = None,
        topic_alias_maximum: int = 0,
        user_properties: list[tuple[str, str]] | None = None,
        tls: ssl.SSLContext | None = None,
        bridge_bit: bool = False,
        bind: str | None = None,
        timeout: float = 10.0,
    ) -> Connection:
        """Returns once the broker has accepted; ``timeout`` seconds cover everything from the name look-up on.

        Raises ValueError for a bad ``url``, Unreachable, NoAnswer or Refused.
        """
        address = parse(url)
        self = cls(handler, version, max_packet_size)
        self._alias_maximum = topic_alias_maximum
        self._keep_alive = float(keep_alive)
        self.client_id = client_id
        properties = None
        if version == V5:
            properties = Properties()
            properties.session_expiry_interval = session_expiry or None
            receive_maximum = min(receive_maximum, handler.receive_maximum)
            properties.receive_maximum = receive_maximum if receive_maximum < 65_535 else None
            properties.maximum_packet_size = max_packet_size
            properties.topic_alias_maximum = topic_alias_maximum or None
            properties.user_properties = user_properties
        first = packets.encode_connect(
            packets.Connect(
                version=version,
                bridge=bridge_bit,
                clean_start=clean_start or handler.clean_start,
                keep_alive=keep_alive,
                client_id=client_id,
                username=username,
                password=password.encode() if isinstance(password, str) else password,
                will=will or handler.will,
                properties=properties,
            )
        )
        try:
            async with asyncio.timeout(timeout):
                self._link = await open_link(address, self, tls, bind)
                self._link.write(first)
                self.connack = await self._connected
        except TimeoutError:
            raise TimedOut(f"{address}: no answer to CONNECT within {timeout:g} s") from None
        except (NoAnswer, Refused) as error:
            error.args = (f"{address}: {error}",)
            raise
        finally:
            if not self._open:
                self.abort()
                if self._connected.done() and not self._connected.cancelled():
                    self._connected.exception()  # retrieved: whoever connects has been told
        return self

    @property
    def open(self) -> bool:
        """Whether the broker has accepted and neither side has ended the connection."""
        return self._open

    @property
    def local_address(self) -> Any:
        """Our end of the transport, as `socket.getsockname` gives it; None on a Unix socket."""
        return self._link.get_extra_info("sockname") if self._link is not None else None

    @property
    def congested(self) -> bool:
        """Whether the broker takes our packets more slowly than we send them."""
        return self._paused or self._size > _CONGESTED_AT

    # sending

    def send(self, raw: bytes) -> None:
        """Send encoded packets at the end of this tick; without effect after the end of the connection."""
        if not self._open:
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(raw)
        self._size += len(raw)
        if self._size > _FLUSH_AT and not self._paused:
            self._flush()

    def publish(
        self,
        topic: str | bytes,
        payload: bytes,
        qos: int = 0,
        retain: bool = False,
        properties: bytes = b"",
        packet_id: int = 0,
        dup: bool = False,
    ) -> None:
        """Send PUBLISH; ``properties`` is an encoded block without length, left out for a 3.x broker."""
        name = topic.encode() if isinstance(topic, str) else topic
        self.send(packets.encode_publish(name, payload, qos, retain, dup, packet_id, self.version, properties))

    def ack(self, packet_type: int, packet_id: int, code: int = 0) -> None:
        """Send PUBACK, PUBREC, PUBREL or PUBCOMP; a 3.x broker gets no ``code``."""
        self.send(packets.encode_ack(packet_type, packet_id, self.version, code if self.version == V5 else 0))

    async def subscribe(self, filters: Sequence[tuple[str, int]], properties: Properties | None = None) -> list[int]:
        """Returns one code per filter, 0x80 and above for a refusal. The second of each pair is the option byte of
        MQTT 5 (QoS, 4 no local, 8 retain as published, retain handling << 4); a 3.x broker gets the QoS."""
        packet_id, answer = self._expect()
        pairs = [(f.encode(), options if self.version == V5 else options & 3) for f, options in filters]
        self.send(packets.encode_subscribe(packet_id, self.version, pairs, properties))
        return await answer

    async def unsubscribe(self, filters: Sequence[str], properties: Properties | None = None) -> list[int]:
        """Returns one code per filter; none from a 3.x broker."""
        packet_id, answer = self._expect()
        self.send(packets.encode_unsubscribe(packet_id, self.version, [f.encode() for f in filters], properties))
        return await answer

    async def ping(self) -> float:
        """Seconds until the broker has answered, and so has read everything sent before; raises ConnectionError."""
        if not self._open:
            raise self._error or ConnectionError("the connection is closed")
        pong: asyncio.Future[float] = self._loop.create_future()
        self._ping(pong)
        return await pong

    async def drain(self) -> None:
        """Returns when the transport takes more; raises ConnectionError when the connection has ended."""
        self._flush()
        while self._paused and self._open:
            if self._writable is None:
                self._writable = self._loop.create_future()
            await asyncio.shield(self._writable)
        if not self._open:
            raise self._error or ConnectionError("the connection is closed")

    async def disconnect(self, code: int = 0) -> None:
        """Send what is collected and DISCONNECT, then wait for the end of the transport, two seconds at most."""
        if self._open:
            self.send(packets.encode_disconnect(self.version, code))
            self._write()
            self._end(None)
            if self._link is not None:
                self._link.close()
        try:
            await asyncio.wait_for(asyncio.shield(self._closed), _LEAVE)
        except TimeoutError:
            self.abort()

    def abort(self) -> None:
        """End the transport now, without DISCONNECT: the broker publishes the will."""
        self._end(None)
        if self._link is not None:
            self._link.abort()

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        self._link = transport

    def data_received(self, data: bytes) -> None:
        self._received = True
        brief = self._brief
        handler = self._handler
        try:
            for first, body in self._frames.feed(data):
                if brief and self._open:
                    delivery = decode_delivery(first, body)
                    if delivery is not None:
                        handler.on_publish(self, delivery)
                        continue
                self._on_packet(first, body)
            if self._open:
                handler.on_batch_end(self)
        except ProtocolError as error:
            self._break(BrokenPeer(f"the broker broke a rule of MQTT: {error}"), error.code)
        except Exception as error:
            _log.exception("a handler failed, the connection is ended")
            self._break(ConnectionError(f"ended because of our own {type(error).__name__}: {error}"), 0x83)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()
        if not self._paused:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or NoAnswer("the broker closed the connection"))
        if not self._closed.done():
            self._closed.set_result(None)

    # receiving

    def _on_packet(self, first: int, body: bytes) -> None:
        kind = first >> 4
        if kind == _PUBLISH:
            if self._open:
                self._on_publish(packets.decode_publish(first, body, self.version, _USER_PROPERTIES, False))
        elif _PUBACK <= kind <= _PUBCOMP:
            packets.check_flags(first, self.version)
            ack = packets.decode_ack(body, self.version, kind)
            if self._open:
                self._handler.on_ack(self, kind, ack.packet_id, ack.code)
        else:
            packets.check_flags(first, self.version)
            self._on_rare_packet(kind, body)

    def _on_publish(self, publish: Publish) -> None:
        properties = publish.properties
        if properties is not None and properties.topic_alias is not None:
            self._resolve_alias(publish, properties.topic_alias)
        if not publish.topic:
            raise ProtocolError(0x94, "a PUBLISH without topic")  # [MQTT-3.3.2-8]
        self._handler.on_publish(self, publish)

    def _resolve_alias(self, publish: Publish, alias: int) -> None:
        if alias > self._alias_maximum:
            raise ProtocolError(0x94, "a topic alias above the maximum we announced")  # [MQTT-3.1.2-26]
        if publish.topic:
            self._aliases[alias] = publish.topic
        else:
            publish.topic = self._aliases.get(alias, b"")

    def _on_rare_packet(self, kind: int, body: bytes) -> None:
        if kind == _CONNACK:
            self._on_connack(body)
        elif not self._open:
            raise ProtocolError(0x82, "the first packet is not CONNACK")  # [MQTT-3.2.0-1]
        elif kind == _SUBACK:
            suback = packets.decode_suback(body, self.version)
            self._answer(suback.packet_id, list(suback.codes))
        elif kind == _UNSUBACK:
            unsuback = packets.decode_unsuback(body, self.version)
            self._answer(unsuback.packet_id, list(unsuback.codes))
        elif kind == _PINGRESP:
            self._on_pingresp()
        elif kind == _DISCONNECT and self.version == V5:
            disconnect = packets.decode_disconnect(body, self.version)
            text = disconnect.properties.reason_string if disconnect.properties is not None else None
            self._break(Disconnected(disconnect.code, text), None)
        else:
            raise ProtocolError(0x82, f"a packet of type {kind} from a broker")

    def _on_pingresp(self) -> None:
        if self._pinged:
            self.round_trip = time.monotonic() - self._pinged
            self._pinged = 0.0
        pong = self._pongs.popleft() if self._pongs else None
        if pong is not None and not pong.done():
            pong.set_result(self.round_trip or 0.0)

    def _on_connack(self, body: bytes) -> None:
        if self._connected.done():
            raise ProtocolError(0x82, "a second CONNACK")  # [MQTT-3.2.0-2]
        spoken = 4 if len(body) == 2 else self.version  # a broker that knows only 3.x refuses 5.0 in its own form
        connack = packets.decode_connack(body, spoken)
        properties = connack.properties
        if connack.code or spoken < V5 <= self.version:
            code = connack.code or 0x82
            text = properties.reason_string if properties is not None else None
            self._connected.set_exception(Refused(code, spoken, text))
            return
        self.session_present = connack.session_present
        self.receive_maximum = 65_535
        self.maximum_packet_size = _LARGEST
        if properties is not None:
            self.receive_maximum = properties.receive_maximum or 65_535
            self.maximum_packet_size = properties.maximum_packet_size or _LARGEST
            self.client_id = properties.assigned_client_identifier or self.client_id
            if properties.server_keep_alive is not None:
                self._keep_alive = float(properties.server_keep_alive)  # [MQTT-3.1.2-21]
        self._open = True
        self._connected.set_result(connack)
        self.connack = connack
        if self._keep_alive:
            self._timer = self._loop.call_later(self._keep_alive / 2, self._check_alive)

    # private

    def _expect(self) -> tuple[int, asyncio.Future[list[int]]]:
        if not self._open:
            raise self._error or ConnectionError("the connection is closed")
        self._next_id = self._next_id - 1 if self._next_id > 1 else 65_535
        answer: asyncio.Future[list[int]] = self._loop.create_future()
        self._answers[self._next_id] = answer
        return self._next_id, answer

    def _answer(self, packet_id: int, codes: list[int]) -> None:
        answer = self._answers.pop(packet_id, None)
        if answer is not None and not answer.done():
            answer.set_result(codes)

    def _flush(self) -> None:
        if self._out and not self._paused:  # paused: `resume_writing` comes back here
            self._write()

    def _write(self) -> None:
        if not self._out or self._link is None:
            return
        out, self._out, self._size = self._out, [], 0
        self._sent = True
        self._link.write(b"".join(out) if len(out) > 1 else out[0])

    def _check_alive(self) -> None:
        """Twice per keep-alive: ping when one direction was quiet, give up when a ping was met with silence."""
        if self._pinged and not self._received:
            self._break(Silent(f"the broker is silent for {self._keep_alive / 2:g} s after a ping"), None)
            return
        if not (self._received and self._sent):
            self._ping()  # [MQTT-3.1.2-20]
        self._received = self._sent = False
        self._timer = self._loop.call_later(self._keep_alive / 2, self._check_alive)

    def _ping(self, pong: asyncio.Future[float] | None = None) -> None:
        self._pinged = time.monotonic()
        self._pongs.append(pong)
        self.send(packets.encode_pingreq())

    def _break(self, error: Exception, code: int | None) -> None:
        """End the connection because of what the peer did; with ``code`` a 5.0 broker is told."""
        if code is not None and self._open and self.version == V5:
            self.send(packets.encode_disconnect(V5, code))
            self._write()
        self._end(error)
        if self._link is not None:
            if code is None:
                self._link.abort()
            else:
                self._link.close()

    def _end(self, error: Exception | None) -> None:
        """Once: tell everybody who waits, then the handler. ``error`` is None when our side ended the connection."""
        was_open, self._open = self._open, False
        if self._error is None:
            self._error = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._out, self._size = [], 0
        if not self._connected.done():
            if isinstance(error, ProtocolError | ConnectionError):
                self._connected.set_exception(NoAnswer(str(error) or type(error).__name__))
            elif error is not None:
                self._connected.set_exception(NoAnswer(f"the connection ended before CONNACK: {error}"))
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            if not answer.done():
                answer.set_exception(error or ConnectionError("the connection is closed"))
                answer.exception()  # nobody may be waiting any more
        while self._pongs:
            pong = self._pongs.popleft()
            if pong is not None and not pong.done():
                pong.set_exception(error or ConnectionError("the connection is closed"))
                pong.exception()
        self._wake()
        if was_open:
            self._handler.on_lost(self, error)

    def _wake(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None


connect = Connection.connect

"""One engine without sockets: clients are pairs of byte strings, time stands still until a test moves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from broker.engine.core import Limits
from broker.engine.engine import Engine
from broker.engine.gate import InternalPrincipal
from broker.engine.listener import ListenerInfo
from broker.mqtt import packets
from broker.mqtt.framing import FrameReader
from broker.mqtt.packets import Connect
from broker.mqtt.properties import Properties


class Link:
    """What a transport would be: keeps what was written."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.closed = False
        self.aborted = False
        self.reading = True

    def write(self, data: bytes) -> None:
        assert type(data) is bytes
        self.written += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return 0


class Gate:
    """Answers from dictionaries a test fills: `deny_publish`, `deny_subscribe`, `deny_receive` hold (user, topic);
    `partly` holds which packets may be published nevertheless, `subscribe_qos` which QoS a filter may have."""

    def __init__(self) -> None:
        self.deny_publish: set[tuple[str | None, str]] = set()
        self.deny_subscribe: set[tuple[str | None, str]] = set()
        self.partly: dict[tuple[str | None, str], int] = {}
        self.subscribe_qos: dict[tuple[str | None, str], set[int]] = {}
        self.deny_receive: set[tuple[str | None, str]] = set()
        self.refuse: dict[str | None, int] = {}
        self.pending: dict[str, tuple[Any, Any]] = {}
        self.slow: set[str] = set()
        self.asked = 0

    def authenticate(self, channel: Any, connect: Any) -> None:
        if connect.client_id in self.slow:
            self.pending[connect.client_id] = (channel, connect)
            return
        self.answer(channel, connect)

    def answer(self, channel: Any, connect: Any) -> None:
        code = self.refuse.get(connect.username)
        if code is not None:
            channel.refuse(code)
            return
        principal = InternalPrincipal(connect.client_id, connect.username)
        principal.privileged = channel.listener.privileged
        principal.superuser = False
        if principal.privileged and connect.client_id.startswith("isthmus/"):
            principal.origin = connect.client_id.split("/")[1]
        channel.accept(principal)

    def cancel(self, channel: Any) -> None:
        self.pending = {k: v for k, v in self.pending.items() if v[0] is not channel}

    def may_publish(self, principal: Any, topic: str) -> int:
        self.asked += 1
        key = (principal.username, topic)
        return int(key not in self.deny_publish and key not in self.partly)

    def publishable(self, principal: Any, topic: str) -> int:
        key = (principal.username, topic)
        return 0 if key in self.deny_publish else self.partly.get(key, 0b111111)

    def may_subscribe(self, principal: Any, filter: str, qos: int) -> int:
        key = (principal.username, filter)
        return int(key not in self.deny_subscribe and qos in self.subscribe_qos.get(key, {0, 1, 2}))

    def may_receive(self, principal: Any, topic: str) -> int:
        return int((principal.username, topic) not in self.deny_receive)

    def will_terms(self, principal: Any, topic: str, qos: int, retain: bool) -> dict[str, Any]:
        return {"for": principal.username}

    def may_publish_will(
        self,
        clientid: str,
        username: str | None,
        peerhost: str,
        terms: dict[str, Any],
        topic: str,
        qos: int,
        retain: bool,
    ) -> int:
        assert terms == {"for": username}
        assert peerhost == "127.0.0.1"
        return int((username, topic) not in self.deny_publish)


class Bench:
    """An engine with a clock in the test's hand."""

    def __init__(self, **limits: Any) -> None:
        self.now = 1000.0
        self.soon: list[Callable[[], None]] = []
        self.gate = Gate()
        self.reports: list[tuple[str, str]] = []
        self.engine = Engine(
            self.gate,
            self.soon.append,
            clock=lambda: self.now,
            wall_ms=1_700_000_000_000,
            limits=Limits(**limits),
            report=lambda category, text: self.reports.append((category, text)),
        )
        self.listener = ListenerInfo("tcp")
        self.internal = ListenerInfo("internal", "unix", privileged=True)

    def settle(self) -> None:
        """The end of the loop's tick, until nothing is left to do."""
        for _ in range(100):
            if not self.soon:
                return
            waiting, self.soon[:] = self.soon[:], []
            for callback in waiting:
                callback()
        raise AssertionError("the engine never comes to rest")

    def pass_time(self, seconds: float, step: float = 0.25) -> None:
        """Let time go by, ticking as the application does."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            self.engine.tick(self.now, 1_700_000_000_000 + int(self.now * 1000))
            self.settle()

    def socket(self, *, privileged: bool = False, listener: ListenerInfo | None = None) -> Client:
        """A connection that has sent nothing yet."""
        return Client(self, listener or (self.internal if privileged else self.listener))

    def client(
        self,
        client_id: str = "",
        *,
        version: int = 4,
        clean: bool = True,
        username: str | None = None,
        password: bytes | None = None,
        keep_alive: int = 0,
        will: Any = None,
        privileged: bool = False,
        **properties: Any,
    ) -> Client:
        """A connected client; its CONNACK is in `connack`."""
        client = self.socket(privileged=privileged)
        client.version = version
        client.send(connect_packet(client_id, version, clean, username, password, keep_alive, will, **properties))
        answers = client.take()
        if answers:
            client.connack = answers[0]
        return client


def connect_packet(
    client_id: str, version: int = 4, clean: bool = True, username: str | None = None, password: bytes | None = None,
    keep_alive: int = 0, will: Any = None, **properties: Any,
) -> bytes:  # fmt: skip
    """The bytes of a CONNECT."""
    return packets.encode_connect(
        Connect(
            version=version,
            clean_start=clean,
            keep_alive=keep_alive,
            client_id=client_id,
            username=username,
            password=password,
            will=will,
            properties=props(**properties) if properties else None,
        )
    )


def props(**values: Any) -> Properties:
    """Properties with these attributes."""
    made = Properties()
    for name, value in values.items():
        assert hasattr(made, name), name
        setattr(made, name, value)
    return made


class Client:
    """The far end of one connection."""

    def __init__(self, bench: Bench, listener: ListenerInfo) -> None:
        self.bench = bench
        self.version = 4
        self.link = Link()
        self.channel = bench.engine.open_channel(self.link, listener, "127.0.0.1:50000")
        self.reader = FrameReader(268_435_460)
        self.connack: Any = None
        self.read = 0
        self.after_suback: list[Any] = []

    def send(self, *data: bytes) -> Client:
        """Each piece is one read of the broker."""
        for piece in data:
            self.channel.feed(piece)
        self.bench.settle()
        return self

    def bytes(self) -> bytes:
        """What came since the last look."""
        data = bytes(self.link.written[self.read :])
        self.read = len(self.link.written)
        return data

    def take(self) -> list[Any]:
        """The packets that came since the last look, decoded; PUBLISH as Publish, acknowledgements as Ack."""
        data = self.bytes()
        if not data:
            return []
        return [packets.decode(first, body, self.version) for first, body in self.reader.feed(data)]

    def publish(
        self,
        topic: str,
        payload: bytes = b"x",
        qos: int = 0,
        *,
        ident: int = 1,
        retain: bool = False,
        dup: bool = False,
        properties: bytes = b"",
    ) -> Client:
        """Send one PUBLISH."""
        packet_id = ident if qos else 0
        return self.send(
            packets.encode_publish(topic.encode(), payload, qos, retain, dup, packet_id, self.version, properties)
        )

    def subscribe(self, *filters: str | tuple[str, int], qos: int = 0, ident: int = 1, **properties: Any) -> list[int]:
        """Returns SUBACK's codes; what followed is in `after_suback`."""
        pairs = [(f.encode(), qos) if isinstance(f, str) else (f[0].encode(), f[1]) for f in filters]
        self.send(packets.encode_subscribe(ident, self.version, pairs, props(**properties) if properties else None))
        frames = self.reader.feed(self.bytes())
        first, body = frames[0]
        assert first == 0x90, frames
        self.after_suback = [packets.decode(f, b, self.version) for f, b in frames[1:]]
        return list(packets.decode_suback(body, self.version).codes)

    def drop(self) -> None:
        """The network is gone."""
        self.channel.lost(None)
        self.bench.settle()

    @property
    def closed(self) -> bool:
        return self.link.closed

"""An independent MQTT client for tests and the demo: paho-mqtt behind blocking calls, each with a deadline."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion


class Refused(Exception):
    """The broker answered, but not with success; `reason` is its reason code in words."""

    def __init__(self, reason: object) -> None:
        super().__init__(str(reason))
        self.reason = str(reason)


class Device:
    """One connection. `with Device(port, "alice", "alice-pw") as device:` connects and disconnects."""

    def __init__(
        self,
        port: int,
        username: str | None = None,
        password: str | None = None,
        *,
        client_id: str | None = None,
        version: int = 5,
        clean: bool = True,
        expiry: int = 0,
        host: str = "127.0.0.1",
        seconds: float = 10,
    ) -> None:
        self.host, self.port, self.seconds = host, port, seconds
        self.username = username
        protocol = {3: MQTTProtocolVersion.MQTTv31, 4: MQTTProtocolVersion.MQTTv311, 5: MQTTProtocolVersion.MQTTv5}[
            version
        ]
        name = client_id or f"{username or 'nobody'}-{time.monotonic_ns() % 10**9}"
        options: dict[str, Any] = {} if version == 5 else {"clean_session": clean}
        self.paho = paho.Client(CallbackAPIVersion.VERSION2, name, protocol=protocol, **options)
        self._connect_options: dict[str, Any] = {}
        if version == 5:
            properties = paho.Properties(paho.PacketTypes.CONNECT)
            properties.SessionExpiryInterval = expiry
            self._connect_options = {"clean_start": clean, "properties": properties}
        if username is not None:
            self.paho.username_pw_set(username, password)
        self.messages: queue.Queue[paho.MQTTMessage] = queue.Queue()
        self.disconnects: list[str] = []
        self._answers: dict[tuple[str, int], list[Any]] = {}
        self._connected: list[Any] = []
        self._changed = threading.Condition()
        self.paho.on_connect = lambda _c, _u, _f, reason, _p: self._note(lambda: self._connected.append(reason))
        self.paho.on_disconnect = lambda _c, _u, _f, reason, _p: self._note(
            lambda: self.disconnects.append(str(reason))
        )
        self.paho.on_subscribe = lambda _c, _u, mid, codes, _p: self._answer("subscribe", mid, codes)
        self.paho.on_publish = lambda _c, _u, mid, reason, _p: self._answer("publish", mid, [reason])
        self.paho.on_message = lambda _c, _u, message: self.messages.put(message)

    def _note(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    def _answer(self, kind: str, mid: int, codes: list[Any]) -> None:
        self._note(lambda: self._answers.__setitem__((kind, mid), list(codes)))

    def _wait(self, there: Callable[[], Any], what: str) -> Any:
        with self._changed:
            if not self._changed.wait_for(lambda: there() or (self.disconnects and what != "CONNACK"), self.seconds):
                raise TimeoutError(f"no {what} within {self.seconds:g} s")
            found = there()
            if not found:
                raise Refused(f"disconnected instead of {what}: {self.disconnects[-1]}")
            return found

    def connect(self) -> Device:
        """Raises Refused with the CONNACK's reason."""
        self.paho.connect(self.host, self.port, keepalive=60, **self._connect_options)
        self.paho.loop_start()
        reason = self._wait(lambda: self._connected, "CONNACK")[-1]
        if reason.is_failure:
            self.close()
            raise Refused(reason)
        return self

    def subscribe(self, filter: str, qos: int = 1) -> None:
        """Raises Refused with the SUBACK's reason."""
        _, mid = self.paho.subscribe(filter, qos)
        assert mid is not None
        code = self._wait(lambda: self._answers.get(("subscribe", mid)), "SUBACK")[0]
        if code.is_failure:
            raise Refused(code)

    def publish(self, topic: str, payload: bytes | str, qos: int = 1, *, retain: bool = False) -> str:
        """Returns the reason of the acknowledgement in words; raises Refused when it is a failure (MQTT 5)."""
        info = self.paho.publish(topic, payload, qos, retain)
        reason = self._wait(lambda: self._answers.get(("publish", info.mid)), "acknowledgement")[0]
        if reason.is_failure:
            raise Refused(reason)
        return str(reason)

    def receive(self, seconds: float | None = None) -> paho.MQTTMessage:
        """The next message; raises TimeoutError."""
        try:
            return self.messages.get(timeout=self.seconds if seconds is None else seconds)
        except queue.Empty:
            raise TimeoutError(f"no message within {self.seconds if seconds is None else seconds:g} s") from None

    def close(self) -> None:
        self.paho.disconnect()
        self.paho.loop_stop()

    def __enter__(self) -> Device:
        return self.connect()

    def __exit__(self, *_: object) -> None:
        self.close()

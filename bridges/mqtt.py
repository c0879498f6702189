"""Join another MQTT broker: carry topics out to it, in from it, or both ways.

The broker's durable session of this instance feeds the way out, the remote broker's session of our client id feeds the
way in; both keep their messages while the link is down. Between them the bridge passes packets on under the same packet
identifiers and holds no state of its own, so QoS 2 is exactly once across any crash: `_mqtt_relay` has the theory.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bridges._mqtt_lanes import Lane, Whole, overlap, sending
from bridges._mqtt_life import Life, Memory, dial
from bridges._mqtt_link import Again
from bridges._mqtt_remote import Dialect, Remote
from bridges._mqtt_topics import TopicLine
from broker.client import address
from broker.client.connection import Connection, Handler
from broker.client.tls import knows_psk, psk_context, tls_context
from broker.config.types import ConfigPath, Duration, Secret, Size
from broker.extend.bridge import BridgeConfig, Local
from broker.extend.registry import Backend
from broker.extend.session import SessionSpec
from broker.mqtt.packets import Will


class Tls(BaseModel):
    """`tls = { … }`: how `mqtts` and `wss` servers are verified, and who we are to them."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    ca: ConfigPath | None = None
    """PEM file of the authorities that may vouch for the server; default: those of the system."""
    certificate: ConfigPath | None = None
    """PEM file of our own certificate, where the server asks for one."""
    key: ConfigPath | None = None
    """PEM file of the certificate's key; default: in the same file."""
    key_password: Secret = Secret("")
    """What the key is encrypted with."""
    insecure: bool = False
    """``true`` accepts any certificate: whoever is in between can read and change everything."""
    psk_identity: str = ""
    """Who we are, for servers that ask for a shared key instead of certificates; TLS 1.2, needs Python 3.13."""
    psk: Secret = Secret("")
    """The shared key, in hexadecimal digits."""

    @field_validator("psk")
    @classmethod
    def _check_psk(cls, psk: Secret) -> Secret:
        try:
            bytes.fromhex(psk.reveal())
        except ValueError:
            raise ValueError("a shared key is written in hexadecimal digits, two for each byte") from None
        return psk

    @model_validator(mode="after")
    def _check(self) -> Tls:
        if self.key is not None and self.certificate is None:
            raise ValueError("key needs certificate")
        if bool(self.psk_identity) != bool(self.psk):
            raise ValueError("psk and psk_identity need each other")
        if self.psk and (self.ca or self.certificate or self.insecure):
            raise ValueError("psk takes the place of certificates: leave ca, certificate and insecure out")
        if self.psk and not knows_psk():
            raise ValueError("psk needs Python 3.13 or newer")
        return self

    def context(self) -> ssl.SSLContext:
        """What the server is verified with. ValueError names the key whose file is bad."""
        if self.psk:
            return psk_context(self.psk_identity, bytes.fromhex(self.psk.reveal()))
        return tls_context(self.ca, self.certificate, self.key, self.key_password.reveal() or None, self.insecure)


class Restart(BaseModel):
    """`restart = { … }`: the pauses between two attempts grow, with jitter, from `base` to `cap`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    base: Duration = Field(default=1.0, gt=0)
    """Shortest pause."""
    cap: Duration = Field(default=30.0, gt=0)
    """Longest pause."""


class MqttConfig(BridgeConfig):
    """`[bridges.mqtt]`"""

    servers: tuple[str, ...] = Field(min_length=1)
    """Addresses of the remote broker: ``mqtt://host:1883``, ``mqtts://host:8883``, ``ws://``, ``wss://`` or ``unix://``.
    The first is preferred; the others are tried in order when it fails."""
    round_robin: bool = False
    """``true``: all servers are equal, the bridge stays where it is connected. ``false``: it returns to the first."""
    protocol: Literal["auto", "3.1", "3.1.1", "5"] = "auto"
    """MQTT version of the link; ``auto`` starts with 5 and goes down to what the server takes."""
    clientid: str = ""
    """Our client id there, which names the session that survives an outage; empty: ``<node>.<instance>``."""
    username: str | None = None
    """User name for the remote broker."""
    password: Secret | None = None
    """Password for the remote broker."""
    tls: Tls = Tls()
    """Certificates, for ``mqtts`` and ``wss`` servers."""
    allow_cleartext: bool = False
    """Whether the password may cross a network unprotected, to ``mqtt`` and ``ws`` servers on other machines."""
    bind_address: str | None = None
    """Local IP address the link starts from."""
    connect_timeout: Duration = Field(default=10.0, gt=0)
    """Longest wait for one server to accept."""
    keep_alive: Duration = Field(default=60.0, ge=0, le=65_535)
    """Longest silence on the link; a server that does not answer within half of it is given up. 0: never."""
    ack_timeout: Duration = Field(default=30.0, gt=0)
    """Longest wait for the remote broker to acknowledge a message; then the link is cut and the message sent again."""
    restart: Restart = Restart()
    """Pauses between two attempts to connect."""
    clean_session: bool = False
    """``true``: the remote broker forgets us, and what it had for us, when the link ends."""
    session_expiry: Duration | None = None
    """How long a 5.0 server keeps our session without a link; default: for ever, or not at all with `clean_session`."""
    receive_maximum: int = Field(default=1_000, ge=1, le=65_535)
    """Unacknowledged messages in each direction and lane; the brokers' own limits apply too."""
    lanes: int = Field(default=1, ge=1, le=64)
    """Links side by side, each under a client id of its own (``<clientid>-1`` …), for what goes out; the order within a
    topic is kept. Worth it where the way is long and the remote takes few unacknowledged messages. What comes in comes
    over the first."""
    max_packet_size: Size = Field(default=0, le=268_435_455)
    """Largest packet we take from the remote broker; 0: any. A 5.0 server knows and sends no larger one."""
    try_private: bool = True
    """Tell 3.x servers that we are a bridge, so that they keep retain flags and send nothing back; servers that
    refuse or close because of it are asked again without."""
    outgoing_retain: bool = True
    """``false`` clears the retain flag of what goes out."""
    attempt_unsubscribe: bool = True
    """Unsubscribe, after connecting, from the filters of lines that only go out: they may have come in before."""
    notifications: bool = True
    """Keep a retained ``1`` or ``0`` about the link on both brokers."""
    notification_topic: str = ""
    """Where; empty: ``$SYS/broker/connection/<clientid>/state``."""
    notifications_local_only: bool = False
    """``true`` leaves the remote broker without it."""
    topics: tuple[TopicLine, ...] = Field(min_length=1)
    """Which topics cross, the first line that covers a topic decides."""

    @field_validator("servers")
    @classmethod
    def _check_servers(cls, servers: tuple[str, ...]) -> tuple[str, ...]:
        urls = tuple(str(address.parse(url)) for url in servers)
        if len(set(urls)) != len(urls):
            raise ValueError("a server is named twice")
        return urls

    @model_validator(mode="after")
    def _check(self) -> MqttConfig:
        if self.tls != Tls() and not any(address.parse(url).secure for url in self.servers):
            raise ValueError("tls is set but no server uses it: write mqtts:// or wss://")
        if self.password is not None and self.username is None and self.protocol not in ("auto", "5"):
            raise ValueError("password needs username before MQTT 5")
        for server in map(address.parse, self.servers):
            if self.password and not (server.secure or server.local or self.allow_cleartext):
                raise ValueError(
                    f"{server}: the password would cross the network in the clear; use mqtts:// or wss://, or write "
                    "allow_cleartext = true"
                )
        if self.clean_session and self.session_expiry is not None:
            raise ValueError("session_expiry has no meaning with clean_session = true")
        if any(wildcard in self.notification_topic for wildcard in "+#"):
            raise ValueError("notification_topic holds a wildcard")
        if self.restart.cap < self.restart.base:
            raise ValueError("restart.cap is shorter than restart.base")
        if self.lanes > 1 and (both := overlap(self)):
            raise ValueError(
                f"lanes = {self.lanes}: what one lane sends to {both[0]} would come back over the first from "
                f"{both[1]}; write lanes = 1, or lines out and in that share no topic"
            )
        return self

    def session(self) -> SessionSpec:
        """The durable session that feeds the way out: each line at its own QoS, retained messages when it is new."""
        best: dict[str, int] = {}
        for line in self.topics:
            if line.out:
                best[line.local] = max(line.qos, best.get(line.local, 0))
        return SessionSpec(
            filters=tuple(best.items()),
            lanes=self.lanes,
            order_key="${topic}",
            upgrade_qos=False,
            retained="new",
            max_bytes=self.queue.max_bytes,
            overflow=self.queue.overflow,
            max_age=self.queue.max_age,
        )


class Mqtt:
    """Begins one life of the bridge after the other; each lasts until either side is lost."""

    def __init__(self, config: MqttConfig, tls: ssl.SSLContext | None) -> None:
        self._config = config
        self._tls = tls
        self._memories: list[Memory] = []

    async def run(self, local: Local) -> None:
        """Lives until cancelled, or until either side of a lane is lost (ConnectionError), which ends all of them. See
        `broker.extend.bridge.Bridge`."""
        config = self._config
        lanes = max(config.lanes, local.lanes)
        if not self._memories:
            name = config.clientid or f"{local.node}.{config.name}"
            origin = f"{local.node}/{config.name}" if local.echoes and _goes_both_ways(config) else ""
            self._memories = [Memory(config, self._servers(name), origin)]
            behind = sending(config)
            self._memories += [Memory(behind, self._servers(f"{name}-{n}"), origin) for n in range(1, lanes)]
        whole = Whole(local, lanes)
        tasks = [asyncio.create_task(self._keep(m, lane)) for m, lane in zip(self._memories, whole.lanes, strict=True)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, memory: Memory, lane: Lane) -> None:
        while True:
            with suppress(Again):
                await Life(memory, lane, self._tls).live()  # returns only to move back to the first server

    async def check(self) -> None:
        """Connects once, under a client id of its own, so that a running bridge keeps its session."""
        remote = self._servers(f"{self._config.clientid or self._config.name}-check")

        async def attempt(url: str, dialect: Dialect, client_id: str, will: Will | None) -> Connection:
            return await dial(self._config, self._tls, Handler(), url, dialect, client_id, will, temporary=True)

        problems = []
        for url in remote.servers:
            try:
                conn = await remote.open(attempt, url, None)
            except ConnectionError as error:
                problems.append(str(error))
            else:
                await conn.disconnect()
                return
        raise ConnectionError(f"bridges.{self._config.name}: " + "; ".join(problems))

    async def close(self) -> None:
        """Nothing outlives `run`."""

    def _servers(self, client_id: str) -> Remote:
        return Remote(self._config.servers, self._config.protocol, self._config.try_private, client_id)


async def open_mqtt(config: MqttConfig) -> Mqtt:
    """Reads the certificates; raises ValueError when one cannot be used."""
    tls = None
    if any(address.parse(url).secure for url in config.servers):
        try:
            tls = config.tls.context()
        except ValueError as error:
            raise ValueError(f"bridges.{config.name}.tls.{error}") from error
    return Mqtt(config, tls)


def _goes_both_ways(config: MqttConfig) -> bool:
    return any(line.out for line in config.topics) and any(line.into for line in config.topics)


BACKEND = Backend("bridges.mqtt", MqttConfig, open_mqtt)

"""The tables every broker has: `[broker]`, `[access]`, `[limits]`, `[workers]`. Text below a field is its manual."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from broker.config.types import ConfigPath, Duration, Size


class Section(BaseModel):
    """A table that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, validate_default=True)


class BrokerConfig(Section):
    """`[broker]`: this node."""

    name: str = Field(default="isthmus-1", min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    """Name of this node, unique among the nodes that talk to each other."""
    data: ConfigPath = "data"  # type: ignore[assignment]
    """Folder of sessions, queues, retained messages, accounts and the control socket."""
    durability: Literal["flush", "interval", "none"] = "flush"
    """When what must survive counts as written: flush (on disk before the acknowledgement) | interval (on disk within
    `store.interval`) | none (whenever the system likes). A crash of the broker alone loses nothing in any of them."""
    max_memory: Size = 0
    """Bytes of memory the broker process may use; 0 for the limit of its control group, if it has one. Above 80 % of it
    publishers are read a part of the time, above 95 % new clients are refused with 0x89."""


class LockoutConfig(Section):
    """`[access.lockout]`: who gives wrong passwords is refused for a while, without a backend being asked."""

    max_failures: int = Field(default=5, ge=0, le=1_000)
    """Wrong passwords of one user name from one address within `window_time` after which this user is refused from
    there (0x8A); from other addresses it may log in. A right one in between starts the count again. 0: never."""
    max_failures_per_address: int = Field(default=0, ge=0, le=1_000)
    """Wrong passwords from one address, whatever the user, after which everybody is refused from there. 0: never."""
    max_failures_per_user: int = Field(default=0, ge=0, le=1_000)
    """Wrong passwords of one user name, wherever from, after which it is refused everywhere: anybody who knows a
    user's name can then lock that user out. 0: never."""
    window_time: Annotated[Duration, Field(ge=1, le=86_400)] = 300.0
    """Seconds in which wrong passwords are counted."""
    ban_time: Annotated[Duration, Field(ge=1, le=604_800)] = 600.0
    """Seconds for which they are refused; attempts meanwhile do not make it longer. A restart ends it."""


class FlappingConfig(Section):
    """`[access.flapping_detect]`: a client that comes and goes all the time is refused for a while."""

    enable: bool = False
    """Whether this is done."""
    max_count: int = Field(default=15, ge=1, le=1_000)
    """Times one client id of one user may disconnect within `window_time`; then it is refused (0x8A)."""
    window_time: Annotated[Duration, Field(ge=1, le=86_400)] = 60.0
    """Seconds in which they are counted."""
    ban_time: Annotated[Duration, Field(ge=1, le=604_800)] = 300.0
    """Seconds for which it is refused. A restart ends it."""


class QuotaConfig(Section):
    """`[access.quota]`: how much one user and one address may have of the broker. An IPv6 address counts as its /64."""

    max_connections_per_user: int = Field(default=0, ge=0, le=10_000_000)
    """Clients of one user connected at the same time; more are refused (0x97). 0: no limit."""
    max_connections_per_address: int = Field(default=0, ge=0, le=10_000_000)
    """Clients from one address connected at the same time; more are refused (0x97). 0: no limit."""
    connect_rate_per_user: float = Field(default=0.0, ge=0, le=1_000_000)
    """Logins of one user a second, on average over `rate_window`; more are refused (0x9F). 0: no limit."""
    connect_rate_per_address: float = Field(default=0.0, ge=0, le=1_000_000)
    """CONNECT packets from one address a second, on average over `rate_window`; more are refused (0x9F) before a
    backend is asked. 0: no limit."""
    rate_window: Annotated[Duration, Field(ge=1, le=3_600)] = 10.0
    """Seconds over which rates are averaged: so many seconds' worth may come at once."""


class AccessConfig(Section):
    """`[access]`: how the answers of the `[auth.*]` instances become one decision."""

    allow_anonymous: bool = False
    """Whether a client with neither user name nor password is let in."""
    no_match: Literal["allow", "deny"] = "deny"
    """The answer when no source of rules has one: allow | deny."""
    deny_action: Literal["ignore", "disconnect"] = "ignore"
    """What becomes of a client whose PUBLISH or SUBSCRIBE was denied: ignore (it stays; MQTT 5 reads 0x87 where there
    is an acknowledgement, 3.x gets that of a message that was taken) | disconnect (MQTT 5 with 0x87; 3.x is closed
    and the message stays unacknowledged). Either way it reaches nobody and is counted."""
    deny_rate: float = Field(default=1_000.0, ge=0, le=1_000_000)
    """Denied messages and filters of one client a second above which `deny_rate_action` follows; of one user, and from
    one address that is not `exempt`, ten times as many. 0: no limit."""
    deny_rate_action: Literal["throttle", "disconnect"] = "throttle"
    """What follows: throttle (nothing it sends is handled for a second) | disconnect (with 0x96)."""
    on_error: Literal["deny", "ignore"] = "deny"
    """What a failing backend means, unless the backend says otherwise: deny | ignore."""
    order: tuple[str, ...] | None = None
    """Names of the `[auth.*]` instances in the order they are asked; others are not asked. An empty list refuses
    every client. Default: all, in the order in which the fragments are read."""
    timeout: Annotated[Duration, Field(gt=0, le=60)] = 3.0
    """Seconds a backend has for one answer, unless the backend says otherwise."""
    max_concurrent: int = Field(default=64, ge=1, le=10_000)
    """Calls one backend serves at the same time; what exceeds it waits in a bounded queue."""
    cache_ttl: Annotated[Duration, Field(le=86_400)] = 60.0
    """Seconds a verdict of a remote backend is remembered; 0 asks every time."""
    negative_cache_ttl: Annotated[Duration, Field(le=5)] = 5.0
    """Seconds a refusal is remembered; errors never are."""
    exempt: tuple[str, ...] = ()
    """Addresses and networks, e.g. ``10.1.0.0/16``, that stand for many clients, such as those of reverse proxies and
    gateways: nothing in `lockout` and `quota` is counted by them. Bans count."""
    lockout: LockoutConfig = LockoutConfig()
    """Wrong passwords."""
    flapping_detect: FlappingConfig = FlappingConfig()
    """Clients that come and go."""
    quota: QuotaConfig = QuotaConfig()
    """Connections and logins of one user and one address."""

    @field_validator("exempt")
    @classmethod
    def _networks(cls, exempt: tuple[str, ...]) -> tuple[str, ...]:
        for text in exempt:
            try:
                ip_network(text)
            except ValueError as error:
                raise ValueError(f"{error}; write an address or a network such as 10.1.0.0/16") from None
        return exempt


class LimitsConfig(Section):
    """`[limits]`: what one client, and all of them together, may ask for."""

    max_packet_size: Annotated[Size, Field(ge=128, le=268_435_460)] = 1 << 20
    """Bytes of the largest packet a client may send; a listener may set its own."""
    receive_maximum: int = Field(default=1024, ge=1, le=65_535)
    """QoS 1 and 2 messages a client may have unacknowledged."""
    max_inflight: int = Field(default=32, ge=1, le=65_535)
    """QoS 1 and 2 messages in flight towards a client that names no Receive Maximum."""
    max_queued_messages: int = Field(default=1_000, ge=0, le=100_000_000)
    """Messages in the offline queue of a device; sinks and bridges have their own limit."""
    max_queued_bytes: Size = 0
    """Bytes of one device's queue; 0 for no limit but `max_queued_messages`."""
    max_queued_age: Duration = 0.0
    """Seconds after which a message in a device's queue is dropped; 0 for never."""
    queue_overflow: Literal["drop_oldest", "drop_newest", "reject"] = "drop_oldest"
    """What a full queue of a device does: drop_oldest (QoS 0 first) | drop_newest | reject (answered with 0x97)."""
    session_expiry: Duration = 7_200.0
    """Seconds a disconnected session lives at most; 3.x sessions get this."""
    connect_timeout: Annotated[Duration, Field(ge=0.1, le=3_600)] = 10.0
    """Seconds from accept to CONNECT, TLS and WebSocket hand-shake included."""
    max_topic_levels: int = Field(default=128, ge=1, le=65_535)
    """Levels of a topic name or filter."""
    max_topic_length: int = Field(default=4096, ge=1, le=65_535)
    """Bytes of a topic name or filter."""
    max_clientid_length: int = Field(default=256, ge=23, le=65_535)
    """Bytes of a client id."""
    max_subscriptions: int = Field(default=1_000, ge=0, le=10_000_000)
    """Subscriptions of one session."""
    max_user_properties: int = Field(default=64, ge=0, le=10_000)
    """User properties of one packet."""
    max_keepalive: Annotated[Duration, Field(ge=1, le=65_535 * 2)] = 72_000.0
    """Longest keep-alive a client may ask for; MQTT 5 clients are told, 0 and longer ones are cut to it."""
    max_keepalive_policy: Literal["enforce", "refuse"] = "enforce"
    """What becomes of a client of MQTT 3 that asks for a longer one and cannot be told: enforce (closed after one and a
    half times the longest without a packet) | refuse (return code 2)."""
    topic_alias_maximum: int = Field(default=16, ge=0, le=65_535)
    """Topic aliases a client may use towards the broker."""
    max_retained_messages: int = Field(default=1_000_000, ge=0, le=1_000_000_000)
    """Retained messages kept altogether."""
    max_retained_bytes: Size = 1 << 30
    """Bytes of all retained messages together."""
    max_retained_per_client: int = Field(default=0, ge=0, le=1_000_000_000)
    """Retained messages of one client id; more are not retained and answered with 0x97. 0 for no limit but those
    above. Sinks and bridges are not counted."""
    stall_timeout: Annotated[Duration, Field(ge=1)] = 60.0
    """Seconds a client that does not read may leave output waiting before it is disconnected."""
    takeover_rate: int = Field(default=10, ge=1, le=100_000)
    """Times a second one client id may take over its own session; above it the newcomer is refused."""
    ack_timeout: Annotated[Duration, Field(ge=0.1)] = 30.0
    """Seconds an acknowledgement may be held for a receiver with `ack = "delivered"`."""
    route_cache_bytes: Size = 64 << 20
    """Bytes of memory for remembered routes from topic to receivers."""
    shared_client_ids: bool = False
    """Whether a client id that one user's session holds may be used by another user."""
    shared_strategy: Literal["round_robin", "hash"] = "round_robin"
    """Which member of a shared subscription gets a message: round_robin | hash (of the publisher's client id)."""
    check_retain_source: bool = True
    """Whether a retained message is withheld when its publisher no longer has the right to write its topic."""
    receive_maximum_policy: Literal["enforce", "warn"] = "enforce"
    """What exceeding `receive_maximum` does: enforce (disconnected with 0x93) | warn (a line in the log)."""
    strict: bool = True
    """Whether text in packets is checked for control characters and non-characters too."""


class StoreConfig(Section):
    """`[store]`: the journal in the data folder that sessions, queues and retained messages are kept in."""

    interval: Annotated[Duration, Field(ge=0.01, le=60)] = 0.1
    """Seconds between two flushes with `durability = "interval"`: what a power cut may lose."""
    min_free: Size = 1 << 30
    """Free bytes of the disk, but at most 5 % of it, below which messages that must be kept are refused; a warning
    comes at three times that."""


class WorkersConfig(Section):
    """`[workers]`: the processes that run sinks and bridges."""

    processes: int = Field(default=1, ge=0, le=64)
    """Worker processes, over which instances are spread, and the lanes of a sink that has several; 0 runs sinks and
    bridges inside the broker process."""


Event = Literal[
    "client_connected",
    "client_disconnected",
    "session_created",
    "session_terminated",
    "session_subscribed",
    "session_unsubscribed",
    "message_dropped",
]


class EventsConfig(Section):
    """`[events]`: what becomes of clients, as JSON messages on `$events/NAME`. Sinks, bridges, and clients with a rule
    that names the topic can take them like any other."""

    publish: frozenset[Event] = frozenset()
    """Which: client_connected (after CONNACK) | client_disconnected (once for each of those, with the reason) |
    session_created | session_terminated | session_subscribed | session_unsubscribed | message_dropped (of each client
    and reason one a second, with their number). None of them costs anything while it is not named."""

"""Whether messages could run in a circle over bridges, found by sending sets of topics along the configured lines.

Theory of operation. A set of topics is a filter. A line that goes out takes its part of a set under another prefix to
the other broker; every other bridge to that broker brings its part of it back. (The same bridge does not: the other
broker is told not to return a bridge's own messages, and what came in over a bridge never goes out over it.) When what
came back is sent out again by the line it began with, the circle is closed. Links of MQTT 5 carry the path of a message
and end a circle by themselves, so bridges that speak nothing else are not warned about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable
from urllib.parse import urlsplit

from broker.config.listeners import ListenerConfig, NetworkListener

_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
_LOCAL = ("127.0.0.1", "::1", "localhost")


class Line(Protocol):
    """Topics that cross. `local` and `remote` are whole filters on either side, each with its prefix."""

    local_prefix: str
    remote_prefix: str

    @property
    def local(self) -> str: ...
    @property
    def remote(self) -> str: ...
    @property
    def out(self) -> bool: ...
    @property
    def into(self) -> bool: ...


@runtime_checkable
class Crossing(Protocol):
    """What a bridge's configuration has when its lines can be followed."""

    servers: Sequence[str]
    topics: Sequence[Line]
    protocol: str
    try_private: bool


def warnings(bridges: Mapping[str, object], listeners: Mapping[str, ListenerConfig]) -> Iterator[tuple[str, str]]:
    """Name of a bridge and a sentence, for each that joins this broker to itself, gets back what it sends, or is the
    beginning of a circle."""
    known = {name: bridge for name, bridge in bridges.items() if isinstance(bridge, Crossing)}
    for name, bridge in known.items():
        yield from ((name, text) for text in _to_itself(bridge, listeners))
        yield from ((name, text) for text in _echo(bridge))
    told: set[frozenset[str]] = set()
    for name, bridge in known.items():
        for line in bridge.topics:
            found = _circle(known, name, line) if line.out else None
            if found is None or frozenset(found[0]) in told:
                continue
            others, back = found
            told.add(frozenset(others))
            way = " and ".join(f"bridges.{other}" for other in others[1:])
            yield (
                name,
                f"messages may run in a circle: what it sends as {line.remote} comes back over {way} as {back} and is "
                'sent again; protocol = "5" on all of them ends that, older versions cannot',
            )


def intersection(one: str, other: str) -> str | None:
    """The filter of the topics that both cover; None when there is none."""
    a, b = one.split("/"), other.split("/")
    if any(x[0] in ("+", "#") and y[0].startswith("$") for x, y in ((a, b), (b, a))):  # [MQTT-4.7.2-1]
        return None
    found: list[str] = []
    for position in range(max(len(a), len(b))):
        left = a[position] if position < len(a) else None
        right = b[position] if position < len(b) else None
        if left == "#":
            return "/".join([*found, *b[position:]])
        if right == "#":
            return "/".join([*found, *a[position:]])
        if left is None or right is None or ("+" not in (left, right) and left != right):
            return None
        found.append(right if left == "+" else left)
    return "/".join(found)


def _circle(bridges: Mapping[str, Crossing], name: str, line: Line) -> tuple[tuple[str, ...], str] | None:
    """The bridges of a circle that begins with this line, and the topics that are sent again; None: there is none."""
    ways: list[tuple[str, Line, str, tuple[str, ...]]] = [(name, line, line.local, (name,))]
    taken: set[tuple[str, int]] = set()
    while ways:
        at, way, topics, path = ways.pop()
        far = _renamed(topics, way.local_prefix, way.remote_prefix)
        for other, near in _brought_back(bridges, at, far):
            whole = (*path, other)
            if all(bridges[part].protocol == "5" for part in whole):
                continue
            if other != name and intersection(near, line.local) is not None:
                return whole, near
            for further, bridge in bridges.items():
                for number, more in enumerate(bridge.topics):
                    part = intersection(near, more.local) if more.out and further != other else None
                    if part is not None and (further, number) not in taken:
                        taken.add((further, number))
                        ways.append((further, more, part, (*whole, further)))
    return None


def _brought_back(bridges: Mapping[str, Crossing], at: str, far: str | None) -> Iterator[tuple[str, str]]:
    """What other bridges to the same broker bring of these topics, and under which names."""
    for other, bridge in bridges.items():
        if far is None or other == at or not _places(bridge) & _places(bridges[at]):
            continue
        for line in bridge.topics:
            common = intersection(far, line.remote) if line.into else None
            near = _renamed(common, line.remote_prefix, line.local_prefix)
            if near is not None:
                yield other, near


def _echo(bridge: Crossing) -> Iterator[str]:
    """A peer that is not told that this is a bridge sends its own messages back to it."""
    if bridge.try_private or bridge.protocol not in ("3.1", "3.1.1"):
        return
    for line in bridge.topics:
        for back in bridge.topics:
            common = intersection(line.remote, back.remote) if line.out and back.into else None
            if common is not None:
                yield f"what it sends as {common} comes back to it: try_private = false hides that it is a bridge"
                return


def _to_itself(bridge: Crossing, listeners: Mapping[str, ListenerConfig]) -> Iterator[str]:
    for host, port in _places(bridge):
        for name, listener in listeners.items():
            if not isinstance(listener, NetworkListener) or port != listener.bind.port:
                continue
            if host in _LOCAL and (listener.bind.loopback or listener.bind.any):
                yield f"port {port} of {host} is this broker's own listeners.{name}: messages may run in a circle"


def _places(bridge: Crossing) -> set[tuple[str, int]]:
    """Where the other broker is; the loopback addresses are one place."""
    found = set()
    for text in bridge.servers:
        url = urlsplit(text)
        host = url.hostname or url.path  # of a Unix socket
        found.add(("127.0.0.1" if host in _LOCAL else host, url.port or _PORTS.get(url.scheme, 0)))
    return found


def _renamed(topics: str | None, away: str, on: str) -> str | None:
    """A set of topics under another prefix; None when nothing of it has the old one."""
    return on + topics[len(away) :] if topics is not None and topics.startswith(away) else None

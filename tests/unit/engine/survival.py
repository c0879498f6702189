"""Correct clients, a broker that is killed at any moment, and a ledger of what was promised.

A program is a list of random steps from a seed. Clients keep their side of every exchange as MQTT wants it: what is not
acknowledged is sent again when the session is still there, a QoS 2 message is taken once. The ledger knows what the
broker owes: every message whose publisher was told that it is safe, to every session whose subscription was
acknowledged, unless an expiry, a limit, an unsubscription or the session's end releases it.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from broker.engine.message import Message
from broker.extend.session import SessionSpec
from broker.mqtt import packets
from broker.mqtt.packets import Will
from tests.unit.engine.harness import Client, connect_packet, props
from tests.unit.engine.parts import PUBACK, PUBCOMP, PUBREC, PUBREL, ack
from tests.unit.engine.stores import StoredBench, check

SLACK = 2.0
"""Seconds around an expiry in which both outcomes are right."""
PLAIN = ("t/0", "t/1", "t/2")
SHARED = ("s/0", "s/1")
RETAINED = ("r/0", "r/1", "r/2")
FILTERS = ("t/0", "t/1", "t/+", "t/#", "#", "r/0", "r/+")
LIMITS = ("queue_full", "too_old", "queue_dropped")
"""Reasons for which a message that was promised may be given up."""


class Sent:
    """One message of a client, as its publisher sees it."""

    def __init__(self, mid: int, topic: str, qos: int, retain: bool, at: float, expires: float, publisher: str) -> None:
        self.mid = mid
        self.payload = b"" if mid < 0 else b"m%d" % mid
        self.topic = topic
        self.qos = qos
        self.retain = retain
        self.expires = at + expires if expires else 0.0
        self.ends = self.expires
        """The same for whoever got it when it was sent last."""
        self.interval = int(expires)
        self.publisher = publisher
        self.state = "sent"
        """sent, acked, refused, or unknown: nobody will ever be told."""
        self.owed: set[tuple[str, int]] = set()
        """(client or group, life of its session) who must get it once it is acknowledged."""
        self.tries = 0
        self.disturbed = False
        """The store failed or the broker was killed meanwhile: it may come again, behind what came after it."""
        self.late = False
        """The broker gave up waiting: what it said of that the publisher may not have heard."""


class Op:
    """One change of a topic's retained message."""

    def __init__(self, sent: Sent, clear: bool) -> None:
        self.sent = sent
        self.clear = clear


class Peer:
    """A client with its own memory; it survives every connection."""

    def __init__(self, world: World, name: str, version: int, persistent: bool, privileged: bool = False) -> None:
        self.world = world
        self.name = name
        self.version = version
        self.persistent = persistent
        self.privileged = privileged
        self.window = 65535 if privileged else world.random.choice((1, 2, 3, 20))
        self.expiry = world.random.choice((30, 400, 5000)) if persistent else 0
        self.link: Client | None = None
        self.life = 0
        """Counts the sessions this client has had."""
        self.granted: dict[str, int] = {}
        """Acknowledged subscriptions and their QoS."""
        self.possible: set[str] = set()
        """Those that may be in force."""
        self.asked: dict[int, tuple[str, str, int]] = {}
        self.out: dict[int, list[Any]] = {}
        """Packet identifier → [message, "publish" or "release"]."""
        self.taken: dict[int, bytes] = {}
        """QoS 2 identifiers whose PUBREL has not come, and their payload."""
        self.owes: list[bytes] = []
        """Acknowledgements not sent yet."""
        self.open: set[int] = set()
        """Identifiers of messages of this connection that are not completed."""
        self.must_clean = not persistent
        self.lasting = False
        """Its session outlives its connection."""
        self.left_at = 0.0
        self.read_at = 0.0
        """What is read now was written after this."""
        self.certain = False
        """The broker has acknowledged something that makes the session last."""
        self.next_ident = 0
        self.graceful = False

    # connections ----------------------------------------------------------------------------------------------

    def connect(self, clean: bool = False) -> None:
        """Connect, also while connected: then the older connection is taken over."""
        world = self.world
        self.lose()
        clean = clean or self.must_clean
        if clean:
            self.end_life()
            self.must_clean = True
        self.lasting = self.persistent and (self.version == 5 or not clean)
        options: dict[str, Any] = {}
        if self.version == 5:
            options["session_expiry_interval"] = self.expiry
            options["receive_maximum"] = self.window
        will = None
        if not self.privileged and world.random.random() < 0.3:
            qos = world.random.randrange(3)
            will = Will(topic=b"w/" + self.name.encode(), payload=b"w%d" % world.new_number(), qos=qos)
            world.wills[will.payload] = Counter()
            if self.version == 5 and world.random.random() < 0.5:
                will.properties = props(will_delay_interval=world.random.choice((1, 20)))
        link = world.bench.socket(privileged=self.privileged)
        link.version = self.version
        self.link = link
        link.send(connect_packet(self.name, self.version, clean, will=will, **options))

    def lose(self) -> None:
        """The connection is gone for the client; the broker may not know it yet."""
        if self.connected:
            self.left_at = self.world.time
        elif self.link is not None:  # it never heard whether its session was there
            for entry in self.out.values():
                entry[0].late = True
        self.link = None
        self.owes = []
        self.open = set()
        self.asked = {}

    @property
    def connected(self) -> bool:
        return self.link is not None and self.link.connack is not None

    def drop(self, polite: bool = False) -> None:
        """Disconnect, or let the network fail with everything unread."""
        link = self.link
        if link is None:
            return
        if polite and self.connected:
            link.send(packets.encode_disconnect(self.version))
        else:
            link.drop()
        self.lose()

    def end_life(self) -> None:
        """The session is over, on the client's side at least."""
        world = self.world
        for entry in self.out.values():
            if entry[0].state == "sent":
                entry[0].state = "unknown"
        world.release(self.name, self.life)
        self.life += 1
        self.out = {}
        self.taken = {}
        self.granted = {}
        self.possible = set()
        self.certain = False

    # what comes -----------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Take what the broker has sent and note what is to be answered."""
        link = self.link
        if link is None:
            return
        for first, body in link.reader.feed(link.bytes()):
            packet = packets.decode(first, body, self.version)
            if link.connack is None:
                assert isinstance(packet, packets.Connack), f"{self.name}: {packet} before CONNACK"
                if not self.on_connack(packet):
                    return
            else:
                self.on_packet(first >> 4, packet)
        self.read_at = self.world.time
        if link.closed and self.link is link:
            self.lose()

    def on_connack(self, connack: Any) -> bool:
        world = self.world
        link = self.link
        assert link is not None
        if connack.code:
            self.lose()
            return False
        link.connack = connack
        self.must_clean = not self.persistent
        if not connack.session_present:
            expiry = self.expiry if self.version == 5 else 7200
            if self.certain and not self.privileged:
                assert world.time - self.left_at > expiry - SLACK, f"the session of {self.name} is lost"
            self.end_life()
        for ident, (sent, step) in list(self.out.items()):
            if step == "release":
                link.send(ack(PUBREL, ident))
            else:
                self.transmit(ident, sent, True)
        return self.link is link

    def on_packet(self, kind: int, packet: Any) -> None:
        if isinstance(packet, packets.Publish):
            self.on_publish(packet)
        elif kind == 9:
            what, filter, qos = self.asked.pop(packet.packet_id)
            assert what == "subscribe"
            if packet.codes[0] < 0x80 and filter in self.possible:
                self.granted[filter] = qos
                self.certain = self.lasting
                if qos and self.lasting:
                    self.world.owe_retained(self, filter)
        elif kind == 11:
            what, filter, _ = self.asked.pop(packet.packet_id)
            assert what == "unsubscribe"
            if (self.version == 4 or packet.codes[0] < 0x80) and not any(
                a == "subscribe" and f == filter for a, f, _ in self.asked.values()
            ):
                self.possible.discard(filter)
        elif isinstance(packet, packets.Ack):
            self.on_ack(kind, packet)

    def on_publish(self, packet: Any) -> None:
        qos, ident = packet.qos, packet.packet_id
        if qos == 0:
            self.world.delivered(self, packet)
            return
        assert ident not in self.open, f"{self.name}: identifier {ident} is in use"
        self.open.add(ident)
        assert len(self.open) <= self.world.window_of(self), f"{self.name}: more than its Receive Maximum"
        if qos == 1:
            self.world.delivered(self, packet)
            self.owes.append(ack(PUBACK, ident))
            return
        known = self.taken.get(ident)
        if known is None:
            self.taken[ident] = packet.payload
            self.world.delivered(self, packet)
        else:
            assert known == packet.payload, f"{self.name}: identifier {ident} given to another message"
        self.owes.append(ack(PUBREC, ident))

    def on_ack(self, kind: int, packet: Any) -> None:
        ident = packet.packet_id
        if kind == 6:
            self.taken.pop(ident, None)
            self.owes.append(ack(PUBCOMP, ident))
            return
        entry = self.out.get(ident)
        assert entry is not None, f"{self.name}: kind {kind}, identifier {ident} for nothing"
        sent = entry[0]
        if kind == 7:
            assert entry[1] == "release", packet
            del self.out[ident]
        elif packet.code >= 0x80:
            sent.state = "refused" if packet.code == 0x97 and sent.tries == 1 else "unknown"
            del self.out[ident]
        elif kind == 4:
            self.world.acknowledged(sent)
            del self.out[ident]
        else:
            self.world.acknowledged(sent)
            entry[1] = "release"
            self.owes.append(ack(PUBREL, ident))

    # what goes ------------------------------------------------------------------------------------------------

    def act(self, limit: int = 1000) -> bool:
        """Send some of the acknowledgements that are owed, in their order; workers in any."""
        if not self.connected or not self.owes:
            return False
        if self.privileged and self.world.random.random() < 0.3:
            self.world.random.shuffle(self.owes)
        for _ in range(min(limit, len(self.owes))):
            link = self.link
            if link is None or link.closed:
                break
            answer = self.owes.pop(0)
            if answer[0] in (PUBACK, PUBCOMP):
                self.open.discard(answer[2] << 8 | answer[3])
            link.send(answer)
        return True

    def publish(self, topic: str, qos: int, retain: bool = False, clear: bool = False, expires: float = 0.0) -> None:
        """Publish a new message."""
        world = self.world
        if not self.connected or len(self.out) >= 8:
            return
        expires = expires if self.version == 5 else 0.0
        sent = Sent(world.new_number(), topic, qos, retain, world.time, expires, self.name)
        world.sent.append(sent)
        if clear:
            sent.payload = b""
        else:
            world.messages[sent.payload] = sent
        if retain:
            world.retained.setdefault(topic, []).append(Op(sent, clear))
        sent.owed = world.receivers(topic, qos)
        ident = 0
        if qos:
            while ident == 0 or ident in self.out:
                self.next_ident = self.next_ident % 9 + 1
                ident = self.next_ident
            self.out[ident] = [sent, "publish"]
        else:
            sent.state = "unknown"
        self.transmit(ident, sent, False)

    def transmit(self, ident: int, sent: Sent, dup: bool) -> None:
        link = self.link
        if link is None or link.closed:
            return
        sent.tries += 1
        if sent.interval:
            sent.ends = self.world.time + sent.interval
        block = b"\x02" + sent.interval.to_bytes(4, "big") if sent.interval else b""
        for peer in self.world.peers.values():
            if sent.payload and any(matches(f, sent.topic) for f in peer.possible):
                self.world.possible.setdefault(sent.payload, set()).add((peer.name, peer.life))
        topic = sent.topic.encode()
        link.send(packets.encode_publish(topic, sent.payload, sent.qos, sent.retain, dup, ident, self.version, block))

    def subscribe(self, filter: str, qos: int) -> None:
        link = self.link
        if link is None or not self.connected or any(f == filter for _, f, _ in self.asked.values()):
            return
        ident = 1000 + self.world.new_number()
        self.asked[ident] = ("subscribe", filter, qos)
        self.possible.add(filter)
        # until it is acknowledged nobody knows which of the two QoS is in force
        self.granted[filter] = min(qos, self.granted[filter]) if filter in self.granted else 0
        if self.granted[filter] == 0:
            del self.granted[filter]
        link.send(packets.encode_subscribe(ident, self.version, [(filter.encode(), qos)]))

    def unsubscribe(self, filter: str) -> None:
        link = self.link
        if link is None or not self.connected or any(f == filter for _, f, _ in self.asked.values()):
            return
        ident = 1000 + self.world.new_number()
        self.asked[ident] = ("unsubscribe", filter, 0)
        self.granted.pop(filter, None)
        self.world.forgive(self)
        link.send(packets.encode_unsubscribe(ident, self.version, [filter.encode()]))


class World:
    """One program: its clients, its broker, its ledger."""

    def __init__(self, seed: int) -> None:
        self.random = rng = random.Random(seed)
        self.limits: dict[str, Any] = {"takeover_rate": 0}
        if rng.random() < 0.15:
            self.limits["max_queued_messages"] = rng.choice((3, 8))
        if rng.random() < 0.1:
            self.limits["max_queued_age"] = 20.0
        if rng.random() < 0.1:
            self.limits["queue_overflow"] = rng.choice(("drop_newest", "reject"))
        self.bench = StoredBench(segment_bytes=rng.choice((400, 1200, 4000)), **self.limits)
        self.number = 0
        self.epoch = 0.0
        """What `bench.now` does not say: time before the last restart."""
        self.start = self.bench.now
        self.messages: dict[bytes, Sent] = {}
        self.sent: list[Sent] = []
        """All of them, and the removals of retained ones."""
        self.retained: dict[str, list[Op]] = {}
        self.left: set[tuple[bytes, str, int]] = set()
        """Retained messages that were promised with SUBACK: payload, client, life of its session."""
        self.got: dict[bytes, set[tuple[str, int]]] = {}
        self.possible: dict[bytes, set[tuple[str, int]]] = {}
        self.times: Counter[tuple[bytes, str, int]] = Counter()
        self.twice: Counter[tuple[bytes, str, int]] = Counter()
        self.last: dict[tuple[str, int, str, str, int], int] = {}
        self.wills: dict[bytes, Counter[str]] = {}
        self.dropped: Counter[str] = Counter()
        self.peers: dict[str, Peer] = {}
        self.torn = False
        for n in range(rng.randrange(3, 7)):
            self.add(f"c{n}", rng.choice((4, 5)), rng.random() < 0.75)
        self.group = ["g0", "g1"] if rng.random() < 0.6 else []
        for name in self.group:
            self.add(name, 5, True).expiry = 5000
        self.spec: SessionSpec | None = None
        self.ack = ""
        if rng.random() < 0.6:
            self.ack = rng.choice(("spool", "spool", "accept", "delivered"))
            self.spec = SessionSpec(
                filters=(("t/#", rng.randrange(3)),),
                lanes=rng.choice((1, 2)),
                ack=self.ack,  # type: ignore[arg-type]
                upgrade_qos=rng.random() < 0.5,
                overflow=rng.choice(("reject", "block")),
                max_bytes=rng.choice((60, 1 << 30)),
            )
            for n in range(self.spec.lanes):
                self.add(f"isthmus/x/{n}", 5, True, True).possible = {"t/#"}
        self.configure()

    def add(self, name: str, version: int, persistent: bool, privileged: bool = False) -> Peer:
        self.peers[name] = peer = Peer(self, name, version, persistent, privileged)
        return peer

    def configure(self) -> None:
        """What the application does after a start."""
        if self.spec is not None:
            self.bench.engine.instances.ensure("x", self.spec, by_publisher)

    @property
    def time(self) -> float:
        return self.epoch + self.bench.now - self.start

    def new_number(self) -> int:
        self.number += 1
        return self.number

    def window_of(self, peer: Peer) -> int:
        return peer.window if peer.version == 5 else 32

    # the ledger -----------------------------------------------------------------------------------------------

    def receivers(self, topic: str, qos: int) -> set[tuple[str, int]]:
        """Who must get a message that is published now."""
        found: set[tuple[str, int]] = set()
        if qos == 0:
            return found
        members = [self.peers[name] for name in self.group if self.peers[name].possible]
        if topic.startswith("s/") and members and all("$share/g/s/#" in peer.granted for peer in members):
            found.add(("group", 0))
        for peer in self.peers.values():
            plain = [q for f, q in peer.granted.items() if matches(f, topic) and not f.startswith("$share/")]
            if any(plain) and peer.lasting and not peer.privileged:
                found.add((peer.name, peer.life))
        if self.spec is not None and topic.startswith("t/") and self.ack != "accept" and self.spec.filters[0][1]:
            found.add(("instance", 0))
        return found

    def acknowledged(self, sent: Sent) -> None:
        if sent.state != "acked":
            sent.state = "acked"
            ops = self.retained.get(sent.topic, [])
            at = [op.sent for op in ops].index(sent) if any(op.sent is sent for op in ops) else 0
            self.retained[sent.topic] = [op for op in ops[:at] if op.sent.disturbed] + ops[at:]

    def owe_retained(self, peer: Peer, filter: str) -> None:
        """A subscription was acknowledged: its client gets what is certainly retained, unless something follows it."""
        for topic, ops in self.retained.items():
            if len(ops) != 1 or ops[0].clear or not matches(filter, topic):
                continue
            sent = ops[0].sent
            if sent.state == "acked" and sent.qos and not sent.expires:
                self.left.add((sent.payload, peer.name, peer.life))

    def owed_retained(self) -> list[tuple[bytes, str]]:
        """What is missing of it."""
        return [
            (payload, name)
            for payload, name, life in self.left
            if self.peers[name].life == life
            and (name, life) not in self.got.get(payload, set())
            and len(self.retained[self.messages[payload].topic]) == 1
            and any(q and matches(f, self.messages[payload].topic) for f, q in self.peers[name].granted.items())
        ]

    def release(self, name: str, life: int) -> None:
        """A session is over: nothing is owed to it."""
        for sent in self.messages.values():
            sent.owed.discard((name, life))
            if name in self.group and sent.qos == 2:  # nobody knows here whether this member had been sent it
                sent.owed.discard(("group", 0))

    def forgive(self, peer: Peer) -> None:
        """A subscription ends: what queues for it may be dropped."""
        for sent in self.messages.values():
            if not any(q and matches(f, sent.topic) for f, q in peer.granted.items()):
                sent.owed.discard((peer.name, peer.life))

    def delivered(self, peer: Peer, packet: Any) -> None:
        """A client has got a message."""
        payload = packet.payload
        if payload.startswith(b"w"):
            self.wills[payload][peer.name] += 1
            if packet.qos == 2 and not self.torn:
                assert self.wills[payload][peer.name] == 1, f"the will {payload!r} was published twice"
            return
        if not payload:
            return
        sent = self.messages[payload]
        blocking = self.spec is not None and self.spec.overflow == "block"  # nobody knows when a PUBLISH is handled
        if sent.ends and not packet.dup and not blocking:
            assert peer.read_at < sent.ends + SLACK, f"{payload!r} was delivered after its end"
        if not sent.retain and not peer.name.startswith("g") and not peer.privileged and not blocking:
            assert (peer.name, peer.life) in self.possible.get(payload, ()), (
                f"{payload!r} to {peer.name}, who has not asked for it"
            )
        key = (payload, peer.name, peer.life)
        again = self.times[key] > 0
        self.times[key] += 1
        plain = (
            packet.qos and peer.lasting and not peer.privileged and not sent.retain and not sent.topic.startswith("s/")
        )
        if again and plain and sent.tries == 1:
            assert packet.dup or self.torn, f"{payload!r} came again to {peer.name} without DUP"
        who = self.got.setdefault(payload, set())
        who.add((peer.name, peer.life))
        if peer.name in self.group:
            who.add(("group", 0))
        if peer.privileged:
            who.add(("instance", 0))
        if packet.qos == 2 and not sent.retain:
            self.twice[key] += 1
            once = sent.late or (sent.disturbed and not peer.lasting)
            assert self.twice[key] == 1 or once, f"{payload!r} came again to {peer.name} at QoS 2"
        if packet.qos and not again and not sent.retain and not sent.topic.startswith("s/") and sent.tries == 1:
            order = (peer.name, peer.life, sent.publisher, sent.topic, sent.qos)
            given_up = sum(self.bench.engine.core.dropped.get(r, 0) + self.dropped[r] for r in LIMITS)
            # what was dropped for a limit may be back after a crash: that it is done was not on disk yet
            assert self.last.get(order, 0) < sent.mid or given_up, f"{payload!r} to {peer.name} out of order"
            self.last[order] = sent.mid

    def check_retained(self) -> None:
        """Every topic has the retained message that was acknowledged last, or one that came after it."""
        for topic in RETAINED:
            message = self.bench.engine.retained_store.get(topic.encode())
            payload = message.payload if message is not None else b""
            ops = self.retained.get(topic, [])
            allowed = {b"" if op.clear else op.sent.payload for op in ops if op.sent.state != "refused" or op.clear}
            if not any(op.sent.state == "acked" for op in ops) or any(op.sent.expires for op in ops):
                allowed.add(b"")
            assert payload in allowed, f"{topic} keeps {payload!r}, not one of {allowed}"

    def count_drops(self) -> None:
        for reason, count in self.bench.engine.core.dropped.items():
            self.dropped[reason] += count

    # steps ----------------------------------------------------------------------------------------------------

    def crash(self) -> None:
        """Kill the broker and start it again."""
        rng = self.random
        self.count_drops()
        for sent in self.sent:
            sent.disturbed = sent.disturbed or sent.state == "sent"
        frames = sum(len(commit.frames) for commit in self.bench.store.commits)
        partial = rng.randrange(frames + 1) if frames and rng.random() < 0.5 else 0
        self.torn = self.torn or 0 < partial < frames
        down = rng.choice((0.0, 0.0, 1.0, 15.0))
        time = self.time
        for peer in self.peers.values():
            if rng.random() < 0.5:
                peer.read()
            peer.lose()
        # the store's clock stood still since the last commit; a restart adds what has passed since then
        behind = (self.bench.journal.clock_ms() - self.bench.store.crash(partial).clock_ms) / 1000
        self.bench = self.bench.restart(down=down + behind, partial=partial)
        self.epoch = time + down
        self.start = self.bench.now
        assert self.bench.recovery.bad == 0 or self.torn
        self.configure()
        check(self.bench)
        self.check_retained()

    def fail(self, full: bool) -> None:
        """The oldest commit cannot be written."""
        for sent in self.sent:
            if sent.state == "sent":
                sent.disturbed = True
        self.bench.store.fail(full)
        self.bench.settle()

    def finish_commit(self) -> None:
        store = self.bench.store
        if not store.commits:
            return
        if store.refusing == "full" and self.random.random() < 0.5:
            self.fail(True)
            return
        if store.refusing == "full":
            store.make_space()
        store.step()
        self.bench.settle()

    def step(self) -> None:
        """One random thing happens."""
        rng = self.random
        bench = self.bench
        peer = rng.choice(list(self.peers.values()))
        dice = rng.random()
        if dice < 0.14:
            if not peer.connected:
                peer.connect(rng.random() < 0.1 and peer.name != "g0")
            elif rng.random() < 0.2:
                peer.connect()
            peer.read()
        elif dice < 0.18:
            peer.drop(rng.random() < 0.4)
        elif dice < 0.26:
            if peer.name in self.group:
                peer.subscribe("$share/g/s/#", 1 + rng.randrange(2))
            elif not peer.privileged:
                peer.subscribe(rng.choice(FILTERS), rng.randrange(3))
        elif dice < 0.28:
            if peer.granted and peer.name not in self.group:
                peer.unsubscribe(rng.choice(list(peer.granted)))
        elif dice < 0.58:
            if not peer.privileged:
                expires = rng.choice((5.0, 40.0)) if rng.random() < 0.1 else 0.0
                for _ in range(rng.choice((1, 1, 2, 6))):
                    peer.publish(rng.choice(PLAIN + SHARED), rng.choice((0, 1, 1, 2, 2)), expires=expires)
        elif dice < 0.64:
            owner = self.peers["c0"]
            n = rng.randrange(len(RETAINED))  # sent again, QoS 1 overtakes QoS 2: one of them per topic
            qos = rng.choice(((0, 1, 1), (2,), (1,))[n])
            owner.publish(RETAINED[n], qos, True, rng.random() < 0.25, 9.0 * (rng.random() < 0.1))
        elif dice < 0.78:
            peer.read()
            peer.act(rng.choice((1, 2, 1000)))
        elif dice < 0.88:
            self.finish_commit()
        elif dice < 0.92:
            if bench.store.reads:
                bench.store.step_read()
                bench.settle()
        elif dice < 0.965:
            late = bench.engine.core.events.get("ack_timeout", 0)
            bench.pass_time(rng.choice((0.003, 0.006, 0.1, 1.1, 12.0) if rng.random() < 0.9 else (45.0,)))
            if bench.engine.core.events.get("ack_timeout", 0) > late:
                for sent in self.messages.values():
                    sent.late = sent.late or sent.state == "sent"
        elif dice < 0.98:
            if bench.store.commits and bench.store.refusing != "failed":
                self.fail(rng.random() < 0.85)
        else:
            self.crash()

    def run(self, steps: int) -> None:
        """The whole program, and what must be true in the end."""
        for peer in self.peers.values():
            peer.connect()
            peer.read()
            if peer.name in self.group:
                peer.subscribe("$share/g/s/#", 2)
        for n in range(steps):
            self.step()
            if n % 6 == 0:
                check(self.bench)
                self.check_retained()
        if self.bench.store.refusing == "failed":
            self.crash()
        self.calm_down()
        self.audit()

    def calm_down(self) -> None:
        """No more faults: everybody comes back and answers everything."""
        self.bench.store.make_space()
        self.bench.commit()
        for _ in range(3):
            for peer in self.peers.values():
                if not peer.connected:
                    peer.connect()
            self.bench.commit()
            busy = True
            for _ in range(2000):
                if not busy:
                    break
                busy = False
                for peer in self.peers.values():
                    peer.read()
                    busy = peer.act() or busy
                if not busy:
                    self.bench.commit()
                    for peer in self.peers.values():
                        peer.read()
                        busy = busy or bool(peer.owes)
            else:
                raise AssertionError("it never ends")
            self.bench.pass_time(1.5)
            self.bench.commit()

    def audit(self) -> None:
        """Nothing that was promised is missing, and nothing is left behind."""
        bench = self.bench
        self.count_drops()
        missing = []
        for payload, sent in self.messages.items():
            if sent.state != "acked" or (sent.expires and self.time > sent.expires - SLACK):
                continue
            missing.extend((payload, who) for who in sent.owed - self.got.get(payload, set()))
        limited = sum(self.dropped[reason] for reason in LIMITS)
        assert len(missing) <= limited, f"lost: {missing}, dropped: {dict(self.dropped)}"
        unsent = self.owed_retained()
        assert len(unsent) <= limited + self.dropped["store_failed"], f"lost: {unsent}, dropped: {dict(self.dropped)}"
        for peer in self.peers.values():
            assert not peer.out, f"{peer.name} waits for answers about {list(peer.out)}"
            unreleased = [p for p in peer.taken.values() if p[:1] == b"m" and not self.messages[p].expires]
            assert len(unreleased) <= limited + self.dropped["unsubscribed"], f"{peer.name} waits for {unreleased}"
        assert bench.journal.idle
        assert not bench.store.commits
        for session in bench.engine.sessions.values():
            assert session.queued == 0, f"{session.queued} messages still wait for {session.client_id}"
            assert session.queue_bytes == 0
            spool = session.spool
            if spool is not None:
                assert spool.gone is None, spool.gone
                assert not spool.marking
                assert spool.floor == spool.sent == spool.next_seq
        check(bench)
        self.check_retained()
        sizes = bench.store.sizes()
        first = min(sizes)
        assert len(sizes) == 1 or bench.journal.live.get(first, 0) > 0, "a dead segment was kept"
        before = {c: sorted(map(repr, granted_of(s))) for c, s in bench.engine.sessions.items() if s.spool is not None}
        again = bench.restart()
        for client_id, subscriptions in before.items():
            session = again.engine.sessions[client_id]
            assert sorted(map(repr, granted_of(session))) == subscriptions
            assert session.queued == 0
        self.bench = again
        self.check_retained()


def granted_of(session: Any) -> list[Any]:
    """(filter, QoS) of every subscription."""
    return [(s.filter, s.qos) for s in session.subscriptions or ()]


def by_publisher(message: Message) -> str:
    return message.origin.client_id if message.origin is not None else ""


def matches(filter: str, topic: str) -> bool:
    """Whether a filter of these programs covers a topic."""
    if filter.startswith("$share/"):
        return topic.startswith("s/")
    wanted, levels = filter.split("/"), topic.split("/")
    if wanted[-1] == "#":
        return levels[: len(wanted) - 1] == wanted[:-1]
    return len(wanted) == len(levels) and all(w in ("+", level) for w, level in zip(wanted, levels, strict=True))

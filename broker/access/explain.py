"""Explains a verdict step by step, with the same chain and the same rules as the broker: `isthmus auth test`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from broker.access.chain import Chain, Decision
from broker.access.gate import AccessError, AccessGate
from broker.access.guard import Guard
from broker.access.principal import Principal
from broker.access.rules import PUBLISH, SUBSCRIBE, SUBSCRIPTIONS, RuleSet, without_share
from broker.extend.auth import Client, Rule, take_notes

MOST = 200
"""Rules of one source that are listed one by one."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The steps in order, and how it ended."""

    lines: Sequence[str]
    verdict: Literal["allow", "deny", "error"]


async def explain(
    settings: Any,
    *,
    username: str | None,
    password: bytes | None,
    clientid: str,
    peerhost: str = "127.0.0.1",
    publish: str | None = None,
    subscribe: str | None = None,
    qos: int | None = None,
    retain: bool | None = None,
) -> Explanation:
    """Opens the configured backends, asks each, applies the rules, closes them. Holds no secrets. Without `qos` and
    `retain` every kind of packet must be allowed."""
    gate = AccessGate()
    try:
        await gate.replace(settings)
    except AccessError as error:
        await gate.close()
        return Explanation([str(error)], "error")
    try:
        return await _Story(gate, settings).tell(
            Client(clientid, username, peerhost),
            password,
            publish=publish,
            subscribe=subscribe,
            qos=qos,
            retain=retain,
        )
    finally:
        await gate.close()


class _Story:
    def __init__(self, gate: AccessGate, settings: Any) -> None:
        self.gate = gate
        self.settings = settings
        self.lines: list[str] = []

    async def tell(
        self,
        client: Client,
        password: bytes | None,
        *,
        publish: str | None,
        subscribe: str | None,
        qos: int | None,
        retain: bool | None,
    ) -> Explanation:
        who = "no user name" if client.username is None else f"user {client.username!r}"
        self.lines.append(f"client {client.clientid!r}, {who}, from {client.peerhost}")
        decision = await self._login(client, password)
        if decision.code:
            self.lines.append(f"login: refused with 0x{decision.code:02x}: {decision.reason}")
            return Explanation(self.lines, "error" if decision.code in (0x88, 0x89) else "deny")
        self.lines.append(f"login: {decision.reason}")
        principal = Principal(
            client.clientid, client.username, peer=f"{client.peerhost}:0", backend=decision.backend,
            superuser=decision.grant.superuser, own_rules=tuple(decision.grant.rules), groups=decision.grant.groups,
            attributes={name.lower(): value for name, value in decision.grant.attributes.items()}, audit=self._unsafe,
        )  # fmt: skip
        allowed = True
        if publish is not None:
            allowed = self._right(principal, PUBLISH, publish, f"publish to {publish}", mask(qos, retain))
        if subscribe is not None:
            what, wanted = f"subscribe to {subscribe}", mask(qos, None) & SUBSCRIPTIONS
            allowed = self._right(principal, SUBSCRIBE, without_share(subscribe), what, wanted) and allowed
        return Explanation(self.lines, "allow" if allowed else "deny")

    async def _login(self, client: Client, password: bytes | None) -> Decision:
        access = self.settings.access
        chain = self.gate.chain(None)
        refusal = chain.screened(client)
        if refusal is not None:
            return refusal
        if client.username is None and password is None:
            if access.allow_anonymous:
                return Decision(0, "allowed, because [access] allow_anonymous is true")
            return Decision(0x87, "neither user name nor password, and [access] allow_anonymous is false")
        if not client.username:
            return Decision(0x86, "a password without a user name")
        if password is None:
            return Decision(0x86, "a user name without a password")
        failed: Decision | None = None
        for guard in chain.guards:
            notes = take_notes()
            decision = await Chain((guard,)).decide(client, password)
            self.lines += [f"auth.{guard.name}: {note}" for note in notes]
            verdict = "allow" if not decision.code else "error" if decision.code in (0x88, 0x89) else "deny"
            if decision.backend is None:
                verdict = "ignore"
            elif verdict == "error" and guard.on_error == "ignore":
                self.lines.append(f"auth.{guard.name}: error, ignored because on_error is ignore")
                failed = decision
                continue
            if verdict == "error":
                self.lines.append(f"auth.{guard.name}: configured in {self.settings.auth[guard.name].origin}")
            self.lines.append(f"auth.{guard.name}: {verdict}")
            if verdict != "ignore":
                return decision
        if not chain.guards:
            return Decision(0x87, "no backend is asked")
        return failed or Decision(0x86, "no backend knows this user")

    def _right(self, principal: Principal, action: int, topic: str, what: str, packets: int) -> bool:
        if principal.superuser:
            self.lines.append(f"{what}: allow, a superuser skips every rule")
            return True
        parts = topic.split("/")
        allowed = 0
        wanted = packets
        for guard in self.gate.chain(None).guards:
            for rules, where in self._sources(guard, principal):
                allowed, packets = self._list(rules, where, action, topic, parts, principal, allowed, packets)
                if not packets:
                    return self._told(what, action, allowed, wanted)
        no_match = self.settings.access.no_match
        rest = "no rule applies" if packets == wanted else f"no rule applies to {packets_text(packets, action)}"
        self.lines.append(f"{what}: {no_match}, {rest} and [access] no_match is {no_match}")
        return bool(no_match == "allow") and allowed | packets == wanted

    def _told(self, what: str, action: int, allowed: int, wanted: int) -> bool:
        if 0 != allowed != wanted:
            self.lines.append(f"{what}: deny, allowed is {packets_text(allowed, action)}")
        else:
            self.lines.append(f"{what}: {'allow' if allowed else 'deny'}")
        return allowed == wanted

    def _sources(self, guard: Guard, principal: Principal) -> list[tuple[Sequence[Rule], str]]:
        found: list[tuple[Sequence[Rule], str]] = []
        if guard.name == principal.backend and principal.own_rules:
            found.append((principal.own_rules, f"auth.{guard.name}"))
        common = getattr(guard.backend, "common_rules", None)
        if common is not None:
            found.append((common, f"auth.{guard.name}"))
        return found

    def _list(
        self,
        rules: Sequence[Rule],
        where: str,
        action: int,
        topic: str,
        parts: list[str],
        principal: Principal,
        allowed: int,
        packets: int,
    ) -> tuple[int, int]:
        """Each rule's verdict, up to the one after which nothing is left to decide; the packets that are allowed, and
        those nothing was decided about."""
        other = "subscribe" if action == PUBLISH else "publish"
        listed = 0
        for rule in rules:
            if rule.action == other:
                continue
            found = RuleSet([rule]).find(action, topic, parts, principal, packets)
            listed += 1
            if found is not None:
                if listed > MOST:
                    self.lines.append(f"{where}: {listed - 1 - MOST} more rules do not apply")
                self.lines.append(f"{where}: {show(rule)}: applies")
                allowed |= packets & found.mask if rule.allow else 0
                packets &= ~found.mask
                if not packets:
                    return allowed, 0
            elif listed <= MOST:
                self.lines.append(f"{where}: {show(rule)}: does not apply")
        if listed > MOST:
            self.lines.append(f"{where}: {listed - MOST} more rules do not apply")
        return allowed, packets

    def _unsafe(self, principal: Principal, name: str, value: str) -> None:
        line = f"{name} {value!r} may not stand in a topic: rules with ${{{name}}} do not apply"
        if line not in self.lines:
            self.lines.append(line)


def mask(qos: int | None, retain: bool | None) -> int:
    """The kinds of packets meant by a QoS and a retain flag, None: any."""
    return sum(
        1 << (one << 1 | flag)
        for one in (0, 1, 2)
        for flag in (0, 1)
        if qos in (None, one) and retain in (None, bool(flag))
    )


def packets_text(packets: int, action: int) -> str:
    """``QoS 0 not retained, QoS 1``"""
    if action == SUBSCRIBE:
        packets |= packets << 1  # nothing is retained there
    told = []
    for qos in (0, 1, 2):
        kinds = packets >> (qos << 1) & 0b11
        if kinds:
            told.append(f"QoS {qos}" + {0b01: " not retained", 0b10: " retained", 0b11: ""}[kinds])
    return ", ".join(told)


def show(rule: Rule) -> str:
    """A rule as one readable line."""
    who = " and ".join(
        text
        for text in (
            f"user {rule.user!r}" if rule.user is not None else "",
            f"client {rule.client!r}" if rule.client is not None else "",
            f"group {rule.group!r}" if rule.group is not None else "",
            "clients of a condition" if rule.when is not None else "",
        )
        if text
    )
    topic = "every topic" if rule.filter is None else ("exactly " if rule.exact else "") + rule.filter.text
    action = "publish and subscribe" if rule.action == "all" else rule.action
    packets = "" if rule.qos is None else f" at QoS {', '.join(map(str, sorted(rule.qos)))}"
    if rule.retain is not None and rule.action != "subscribe":
        packets += " retained" if rule.retain else " not retained"
    start = f"{rule.source}: " if rule.source else ""
    return f"{start}{'allow' if rule.allow else 'deny'} {who + ' to ' if who else ''}{action} {topic}{packets}"


__all__ = ["Explanation", "explain", "show"]

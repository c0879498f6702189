"""Asks the backends of a listener in order until one decides."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from broker.access.bulkhead import Busy
from broker.access.guard import Guard
from broker.extend.auth import Answer, BackendUnavailable, Client, Grant, Refusal, Verdict, note
from broker.runtime.logs import limited

logger = logging.getLogger(__name__)

BAD_CREDENTIALS = 0x86
NOT_AUTHORIZED = 0x87
UNAVAILABLE = 0x88
BUSY = 0x89


@dataclass(frozen=True, slots=True)
class Decision:
    """How a login ended. `code` is the MQTT 5 reason, 0 when it was allowed."""

    code: int
    reason: str
    backend: str | None = None
    grant: Grant = Grant()  # noqa: RUF009 (frozen)
    guess: bool = False
    """A password was wrong or its user unknown: what `[access.lockout]` counts."""


class Chain:
    """The backends that decide on one listener, in order."""

    def __init__(self, guards: tuple[Guard, ...], *, explicit: bool = True) -> None:
        self.guards = guards
        self.explicit = explicit
        """False: there is no `[auth.*]` table at all, nobody wrote an empty list."""
        self.screens = tuple(guard for guard in guards if guard.screen is not None)
        """Those that look at every client before it is asked for anything."""
        self._errors = limited(logger, "a backend failed")

    def screened(self, client: Client) -> Decision | None:
        """The refusal of whoever looks at every client before it is asked for anything."""
        for guard in self.screens:
            refusal = guard.screen(client) if guard.screen is not None else None
            if refusal is not None:
                return _decide(guard, refusal)
        return None

    def known(self, client: Client, password: bytes) -> Decision | None:
        """The decision, when it can be made without waiting for anybody."""
        for guard in self.guards:
            answer = guard.known(client, password)
            if answer is None:
                return None
            decision = _decide(guard, answer)
            if decision is not None:
                return decision
        return None if self.guards else nobody(explicit=True)

    def reads(self, client: Client) -> bool:
        """Whether somebody here is asked about a client without a password."""
        named = client.username is not None or "ws_cookie" in client.certificate
        named = named or "ws_authorization" in client.certificate
        return named and any(guard.without_password for guard in self.guards)

    async def decide_without(self, client: Client) -> Decision:
        """The same for a client that sent no password: only those are asked that need none."""
        chain = Chain(tuple(guard for guard in self.guards if guard.without_password))
        return await chain.decide(client, b"")

    async def decide(self, client: Client, password: bytes) -> Decision:
        """Ask until somebody decides. Never raises but when cancelled."""
        failed: Decision | None = None
        for guard in self.guards:
            try:
                answer = await guard.authenticate(guard.key(client, password), client, password)
            except BackendUnavailable as error:
                failed = self._failed(guard, error)
                if guard.on_error == "deny":
                    return failed
                continue
            decision = _decide(guard, answer)
            if decision is not None:
                return decision
        if failed is not None:
            return failed  # somebody who might have known the user could not be asked
        for guard in self.guards:
            try:
                await guard.burn(password)
            except BackendUnavailable as error:  # an answer at once would tell that nobody knows the user
                return self._failed(guard, error)
        return nobody(explicit=bool(self.guards) or self.explicit, asked=bool(self.guards))

    async def identify(self, client: Client) -> Decision:
        """The rights of a client whose user name its certificate has proved. It must be known to one of the backends
        that can tell; when none can, the certificate is enough."""
        failed: Decision | None = None
        could_tell = False
        for guard in self.guards:
            if not guard.has_rules:
                continue
            could_tell = True
            try:
                answer = await guard.rules(client)
            except BackendUnavailable as error:
                failed = self._failed(guard, error)
                if guard.on_error == "deny":
                    return failed
                continue
            decision = _decide(guard, answer) if answer is not None else None
            if decision is not None:
                return decision
        if failed is not None:
            return failed
        if could_tell:
            return Decision(NOT_AUTHORIZED, "the certificate is good, but no backend knows its user name")
        if not self.guards and self.explicit:
            return nobody(explicit=True)
        return Decision(0, "the certificate is good")

    def _failed(self, guard: Guard, error: BackendUnavailable) -> Decision:
        code = BUSY if isinstance(error, Busy) else UNAVAILABLE
        then = "refused" if guard.on_error == "deny" else "the next backend is asked (on_error = ignore)"
        self._errors.warning("auth.%s cannot decide about a client: %s; %s", guard.name, error, then)
        note(f"error: {error}; {then}")
        return Decision(code, f"auth.{guard.name}: {error}", guard.name)


def nobody(*, explicit: bool, asked: bool = False) -> Decision:
    """Nobody decided: an unknown user gets the answer a wrong password gets."""
    if asked:
        return Decision(BAD_CREDENTIALS, "no backend knows this user", guess=True)
    return Decision(NOT_AUTHORIZED, "no backend is asked here" if explicit else "no backend is configured")


def _decide(guard: Guard, answer: Answer) -> Decision | None:
    if answer is Verdict.ALLOW:
        return Decision(0, "allowed", guard.name)
    if isinstance(answer, Grant):
        return Decision(0, "allowed", guard.name, answer)
    if answer is Verdict.DENY:
        return Decision(BAD_CREDENTIALS, "bad user name or password", guard.name, guess=True)
    if isinstance(answer, Refusal):
        return Decision(BAD_CREDENTIALS if answer.authorized else NOT_AUTHORIZED, answer.reason, guard.name)
    return None

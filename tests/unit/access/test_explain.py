"""What `isthmus auth test` says."""

from __future__ import annotations

from typing import Any

from broker.access.explain import explain
from broker.config.template import Template
from broker.extend.auth import BackendUnavailable, Grant, Refusal, Rule, Verdict, note
from tests.unit.access.doubles import Fake, instance, settings

RULES = (
    Rule(False, "publish", Template("a/secret"), source="group g"),
    Rule(True, "subscribe", Template("b/#"), source="group g"),
    Rule(True, "publish", Template("a/${username}/#"), source="group g"),
)


async def ask(
    *instances: Any, username: str | None = "u", password: bytes | None = b"hush", **more: Any
) -> tuple[str, str]:
    access = {name: more.pop(name) for name in ("allow_anonymous", "no_match", "on_error") if name in more}
    told = await explain(settings(*instances, **access), username=username, password=password, clientid="c", **more)
    text = "\n".join(told.lines)
    assert "hush" not in text
    return text, told.verdict


async def test_each_backend_and_each_rule_in_order() -> None:
    def telling(client: Any, password: bytes) -> Grant:
        note("found cn=u")
        return Grant(rules=RULES)

    text, verdict = await ask(
        instance("first", Fake(Verdict.IGNORE)), instance("second", Fake(telling)), publish="a/u/x"
    )
    assert verdict == "allow"
    assert text.splitlines() == [
        "client 'c', user 'u', from 127.0.0.1",
        "auth.first: ignore",
        "auth.second: found cn=u",
        "auth.second: allow",
        "login: allowed",
        "auth.second: group g: deny publish a/secret: does not apply",
        "auth.second: group g: allow publish a/${username}/#: applies",
        "publish to a/u/x: allow",
    ]


async def test_verdicts() -> None:
    grant = instance("one", Fake(Grant(rules=RULES)))
    assert (await ask(grant))[1] == "allow"
    assert (await ask(grant, publish="a/secret"))[1] == "deny"
    assert (await ask(grant, subscribe="$share/g/b/+"))[1] == "allow"
    assert (await ask(grant, subscribe="#"))[1] == "deny"
    assert (await ask(grant, publish="zzz", no_match="allow"))[1] == "allow"
    assert (await ask(instance("one", Fake(Verdict.DENY))))[1] == "deny"
    assert (await ask(instance("one", Fake(Verdict.IGNORE))))[1] == "deny"
    assert (await ask(instance("one", Fake(Refusal("not in staff", authorized=False)))))[1] == "deny"
    assert (await ask(instance("one", Fake(Grant(superuser=True))), publish="x"))[1] == "allow"
    assert (await ask())[1] == "deny"
    assert (await ask(grant, username=None, password=None))[1] == "deny"
    assert (await ask(grant, username=None, password=None, allow_anonymous=True))[1] == "allow"


async def test_a_failing_backend_is_an_error_unless_ignored() -> None:
    down = Fake(BackendUnavailable("connection refused"))
    text, verdict = await ask(instance("down", down))
    assert verdict == "error"
    assert "auth.down: error" in text
    assert "connection refused" in text
    text, verdict = await ask(instance("down", down, on_error="ignore"), instance("two", Fake(Verdict.ALLOW)))
    assert verdict == "allow"
    text, verdict = await ask(instance("down", down, on_error="ignore"), instance("two", Fake(Verdict.IGNORE)))
    assert verdict == "error", "as at the broker: somebody who might have known the user could not be asked"
    text, verdict = await ask(instance("broken", ValueError("passwords:3: blank")))
    assert verdict == "error"
    assert text == "conf.d/broken.toml:1: auth.broken: passwords:3: blank"


async def test_an_identity_that_may_not_stand_in_a_topic_is_explained() -> None:
    text, verdict = await ask(instance("one", Fake(Grant(rules=RULES))), username="#", publish="a/#/x")
    assert verdict == "deny"
    assert "username '#' may not stand in a topic" in text

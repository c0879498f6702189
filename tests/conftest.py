"""Fixtures for everyone: real servers (see `servers/`), certificates, a fault proxy."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings

from tests import servers
from tests.proxy import Proxy

T = TypeVar("T")

# what an example takes says more about the machine than about us
settings.register_profile("ours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")


@contextlib.contextmanager
def _or_skip(service: str, start: Callable[..., contextlib.AbstractContextManager[T]], **options: Any) -> Iterator[T]:
    """The running server; a skip with the reason where it cannot be had, a failure when REQUIRE names it."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(start(**options))
        except servers.Absent as error:
            if service in servers.required() and not isinstance(error, servers.NotOurs):
                pytest.fail(f"REQUIRE names {service}: {error}", pytrace=False)
            pytest.skip(f"{service}: {error}")
        yield server


def _starter(service: str, start: Callable[..., contextlib.AbstractContextManager[T]]) -> Iterator[Callable[..., T]]:
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(_or_skip(service, start, **options))


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> servers.Certificates:
    """An authority, a server certificate for localhost and 127.0.0.1, a client certificate with CN device-1."""
    return servers.certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def slapd() -> Iterator[servers.Slapd]:
    """A directory with the example people, shared by the whole run: read only. To change or stop one: `start_slapd`."""
    with _or_skip("slapd", servers.slapd) as server:
        yield server


@pytest.fixture
def start_slapd() -> Iterator[Callable[..., servers.Slapd]]:
    """`start_slapd(tls=certs, extra="allow bind_anon_dn")`: a directory of the test's own, ended with the test."""
    yield from _starter("slapd", servers.slapd)


@pytest.fixture(scope="session")
def samba() -> Iterator[servers.Samba]:
    """A domain controller with the people of `AD_PEOPLE`, shared by the whole run: read only, but for `victim`."""
    with _or_skip("samba", servers.samba) as server:
        yield server


@pytest.fixture(scope="session")
def kafka() -> Iterator[servers.Kafka]:
    """A Kafka shared by the whole run: use topics of your own and do not stop it. To do that: `start_kafka`."""
    with _or_skip("kafka", servers.kafka, restarts=False) as server:
        yield server


@pytest.fixture
def start_kafka() -> Iterator[Callable[..., servers.Kafka]]:
    """`start_kafka(listeners=["SASLSSL"], tls=certs)`: a Kafka of the test's own (1-3 s), ended with the test."""
    yield from _starter("kafka", servers.kafka)


@pytest.fixture
def mosquitto() -> Iterator[servers.Mosquitto]:
    """A fresh mosquitto that lets anybody in."""
    with _or_skip("mosquitto", servers.mosquitto) as server:
        yield server


@pytest.fixture
def start_mosquitto() -> Iterator[Callable[..., servers.Mosquitto]]:
    """`start_mosquitto(username="u", password="p", connection="connection x\\n…")`: ended with the test."""
    yield from _starter("mosquitto", servers.mosquitto)


@pytest.fixture
async def start_proxy() -> AsyncIterator[Callable[[int], Any]]:
    """`proxy = await start_proxy(port)`: a fault proxy in front of that port, closed with the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(port: int, host: str = "127.0.0.1") -> Proxy:
            return await stack.enter_async_context(Proxy(host, port))

        yield start


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Gives a free TCP port each time it is called."""
    return servers.free_port


@pytest.fixture
def root() -> Path:
    """The top folder of the project."""
    return Path(__file__).resolve().parent.parent


def pytest_report_header() -> list[str]:
    """Which build is under test."""
    from tests.build import compiled

    built, listed = compiled()
    kind = "compiled" if built == listed else "interpreted" if not built else "partly compiled"
    missing = sorted(listed - built) if built else []
    return [f"isthmus: {kind}, {len(built)} of {len(listed)} modules" + "".join(f", missing: {m}" for m in missing)]


def pytest_sessionstart() -> None:
    """REQUIRE=compiled: a run that was meant for the compiled build must not pass on the interpreted one."""
    from tests.build import compiled

    built, listed = compiled()
    if "compiled" in servers.required() and built != listed:
        raise pytest.UsageError(f"REQUIRE=compiled, but these run interpreted: {', '.join(sorted(listed - built))}")

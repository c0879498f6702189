"""LDAP directories: several servers, a pool of service connections, separate connections for the binds of users.

A service connection never binds as a user; a connection on which something went wrong, or whose caller left, is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from broker.config.types import ConfigPath, Duration, Secret
from broker.connectors.ldap_link import BindResult, Entry, Link, LinkError, Place, TooMany
from broker.connectors.ldap_text import check_filter, escape, escape_dn, normalize_dn, split_dn
from broker.extend.auth import AuthConfig, BackendUnavailable

__all__ = [
    "BindResult", "Entry", "LdapPool", "LdapServer", "Searcher", "TooMany", "check_filter", "escape", "escape_dn",
    "normalize_dn", "split_dn",
]  # fmt: skip

logger = logging.getLogger(__name__)

T = TypeVar("T")

IDLE = 300.0
"""Seconds after which an unused connection is not trusted any more; Active Directory closes them after 900."""
USES = 10_000
"""Operations after which a connection is replaced."""


class LdapServer(AuthConfig):
    """The keys of every table that talks to a directory."""

    servers: tuple[str, ...] = Field(min_length=1, max_length=16)
    """Addresses ``ldap://host:port`` or, for TLS from the start, ``ldaps://host:port``; tried in this order."""
    tls: Literal["starttls", "none"] = "starttls"
    """How an ``ldap://`` connection is protected: starttls | none (loopback addresses only, see `allow_cleartext`)."""
    allow_cleartext: bool = False
    """Whether ``tls = "none"`` may send passwords unprotected to another machine."""
    ca: ConfigPath | None = None
    """File of certificate authorities (PEM) that may vouch for the servers. Certificates and host names are always
    verified. Default: the system's authorities."""
    certificate: ConfigPath | None = None
    """File with a certificate (PEM) that is shown to servers which ask for one. Without `bind_dn` it is also who the
    service account is (SASL EXTERNAL)."""
    key: ConfigPath | None = None
    """File with its key, if that is not in the same file."""
    bind_dn: str = ""
    """DN of the service account that searches; empty: the search is anonymous, but see `certificate`."""
    bind_password: Secret = Secret()
    """Password of the service account."""
    cooldown: Duration = 10.0
    """Seconds for which a server that failed is asked only when no other one is left."""

    @model_validator(mode="after")
    def _check_server(self) -> LdapServer:
        for text in self.servers:
            host, _, tls = _read_address(text, self.tls)
            if tls == "none" and not self.allow_cleartext and not _is_loopback(host):
                raise ValueError(
                    f'{text} with tls = "none" would send passwords unprotected to another machine; '
                    'use tls = "starttls" or ldaps://, or write allow_cleartext = true'
                )
        if self.bind_dn and not self.bind_password:
            raise ValueError("bind_password is empty: a directory may take that for an anonymous login that succeeded")
        if self.bind_password and not self.bind_dn:
            raise ValueError("bind_password without bind_dn")
        if self.key is not None and self.certificate is None:
            raise ValueError("key without certificate")
        if self.certificate is not None and any(_read_address(text, self.tls)[2] == "none" for text in self.servers):
            raise ValueError("certificate: is shown in a TLS hand-shake; without TLS there is none")
        return self


class Searcher:
    """Searches; either as the service account or as one user."""

    async def find(
        self,
        base: str,
        filter: str,
        attributes: Sequence[str] = (),
        *,
        scope: str = "sub",
        limit: int = 1,
        must_exist: bool = False,
    ) -> list[Entry]:
        """The entries below `base`; none when there is no `base`, unless it `must_exist`. Raises TooMany beyond
        `limit`, BackendUnavailable when there is no answer."""
        raise NotImplementedError


class LdapPool(Searcher):
    """Opens nothing before it is needed. Work that is cancelled or late takes its connection with it."""

    def __init__(self, config: LdapServer) -> None:
        self._config = config
        self._timeout = config.timeout or 3.0
        self._places = [_place(text, config) for text in config.servers]
        self._failed_at: dict[Place, float] = {}
        self._threads = ThreadPoolExecutor(config.pool, thread_name_prefix="ldap")
        self._service: list[Link] = []
        self._users: list[Link] = []
        self._links: set[Link] = set()
        self._closed = False

    async def find(
        self,
        base: str,
        filter: str,
        attributes: Sequence[str] = (),
        *,
        scope: str = "sub",
        limit: int = 1,
        must_exist: bool = False,
    ) -> list[Entry]:
        """As the service account."""
        return await self._run(
            self._service,
            lambda link, end: link.search(
                base, filter, attributes, end, scope=scope, limit=limit, must_exist=must_exist
            ),
        )

    async def bind(self, dn: str, password: bytes) -> BindResult:
        """Whether the directory lets this user in; an empty password is refused without asking."""
        if not dn or not password:
            return BindResult(False, 49, "an empty name or password is never sent")
        return await self._run(self._users, lambda link, end: link.bind(dn, password, end))

    async def compare(self, dn: str, attribute: str, value: bytes) -> bool:
        """Whether the directory finds this value in the entry, asked as the service account; never an empty one."""
        if not dn or not value:
            return False
        return await self._run(self._service, lambda link, end: link.compare(dn, attribute, value, end))

    @contextlib.asynccontextmanager
    async def user(self, dn: str, password: bytes) -> AsyncIterator[tuple[BindResult, Searcher]]:
        """A connection of this user's own, closed afterwards."""
        own: list[Link] = []
        try:
            if not dn or not password:
                yield BindResult(False, 49, "an empty name or password is never sent"), self
                return
            result = await self._run(own, lambda link, end: link.bind(dn, password, end))
            yield result, _UserSearcher(self, own)
        finally:
            for link in own:
                self._discard(link)

    async def ping(self, base: str = "") -> None:
        """One new connection with bind and one search of an entry that must exist."""
        fresh: list[Link] = []
        try:
            await self._run(
                fresh,
                lambda link, end: link.search(
                    base, "(objectClass=*)", ["1.1"], end, scope="base", limit=1, must_exist=True
                ),
                True,
            )
        finally:
            for link in fresh:
                self._discard(link)

    async def close(self) -> None:
        """Ends everything at once."""
        self._closed = True
        for link in list(self._links):
            link.kill()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for link in [*self._service, *self._users]:
            self._discard(link)
        self._service.clear()
        self._users.clear()

    async def _run(self, idle: list[Link], work: Callable[[Link, float], T], service: bool | None = None) -> T:
        """`idle` is where links of the right kind are taken from and put back."""
        if self._closed:
            raise BackendUnavailable("the directory's connections were closed")
        job = _Job(self, idle, idle is self._service if service is None else service, self._timeout)
        future = asyncio.get_running_loop().run_in_executor(self._threads, job.run, work)
        try:
            async with asyncio.timeout(self._timeout + 0.5):
                return await asyncio.shield(future)
        except TimeoutError:
            future.cancel()
            job.kill()
            raise BackendUnavailable(f"the directory gave no answer in {self._timeout:g} s") from None
        except TooMany:
            raise
        except LinkError as error:
            raise BackendUnavailable(str(error)) from None
        except asyncio.CancelledError:
            future.cancel()
            job.kill()
            raise
        finally:
            future.add_done_callback(_look)

    def _order(self) -> list[Place]:
        """The servers to try, those that failed lately last."""
        now = time.monotonic()
        return sorted(self._places, key=lambda place: now - self._failed_at.get(place, -1e9) < self._config.cooldown)

    def _failed(self, place: Place) -> None:
        """Prefer other servers for a while, and trust no idle connection to this one."""
        self._failed_at[place] = time.monotonic()
        for idle in (self._service, self._users):
            for link in [link for link in list(idle) if link.place == place]:
                with contextlib.suppress(ValueError):  # another thread has taken it
                    idle.remove(link)
                    self._discard(link)

    def _discard(self, link: Link) -> None:
        self._links.discard(link)
        link.close()


class _Job:
    """One piece of work in a thread: takes a link, or opens one, and gives it back if all went well."""

    def __init__(self, pool: LdapPool, idle: list[Link], service: bool, timeout: float) -> None:
        self.pool = pool
        self.idle = idle
        self.service = service
        self.started = time.monotonic()
        self.deadline = self.started + timeout
        self.killed = False
        self.link: Link | None = None

    def run(self, work: Callable[[Link, float], T]) -> T:
        reused = self._take()
        if reused is not None:
            try:
                return self._do(reused, work)
            except TooMany:
                raise
            except LinkError:
                if self.killed or time.monotonic() >= self.deadline:
                    raise
                # the server may have closed it while it was idle; one fresh attempt tells
        return self._do(self._open(), work)

    def kill(self) -> None:
        self.killed = True
        if self.link is not None:
            self.link.kill()
            if time.monotonic() - self.started > (self.deadline - self.started) / 2:
                self.pool._failed(self.link.place)  # it is not only the caller who lost patience

    def _take(self) -> Link | None:
        now = time.monotonic()
        while self.idle and not self.killed:
            try:
                link = self.idle.pop()
            except IndexError:  # another thread was quicker
                return None
            if now - link.idle_since < IDLE and link.uses < USES:
                return link
            self.pool._discard(link)
        return None

    def _open(self) -> Link:
        pool = self.pool
        places = pool._order()
        error: LinkError | None = None
        for number, place in enumerate(places):
            left = self.deadline - time.monotonic()
            if self.killed or left <= 0:
                break
            link = self.link = Link(place)
            pool._links.add(link)
            share = time.monotonic() + left / (len(places) - number)
            try:
                link.open(share)
                self._log_in(link, share)
            except LinkError as failure:
                error = failure
                pool._discard(link)
                if not self.killed:
                    pool._failed(place)
                    if len(places) > number + 1:
                        logger.warning("%s; the next server is tried", failure)
                continue
            pool._failed_at.pop(place, None)
            return link
        raise error or LinkError("no server could be asked in time")

    def _log_in(self, link: Link, deadline: float) -> None:
        config = self.pool._config
        if not self.service or not (config.bind_dn or config.certificate):
            return
        if config.bind_dn:
            result = link.bind(config.bind_dn, config.bind_password.reveal().encode(), deadline)
            who, what = repr(config.bind_dn), "bind_dn or bind_password"
        else:
            result = link.bind_external(deadline)
            who, what = "of the certificate", "certificate"
        if not result.accepted:
            raise LinkError(f"{link.place}: the service account {who} may not log in: {result.text}; correct {what}")

    def _do(self, link: Link, work: Callable[[Link, float], T]) -> T:
        self.link = link
        done = False
        try:
            if self.killed:
                raise LinkError("given up")
            result = work(link, self.deadline)
            done = True
            return result
        except TooMany:
            done = True
            raise
        finally:
            if done and not self.killed and not self.pool._closed:
                link.idle_since = time.monotonic()
                self.idle.append(link)
            else:
                self.pool._discard(link)


class _UserSearcher(Searcher):
    """Searches on a user's own connection."""

    def __init__(self, pool: LdapPool, own: list[Link]) -> None:
        self._pool = pool
        self._own = own

    async def find(
        self,
        base: str,
        filter: str,
        attributes: Sequence[str] = (),
        *,
        scope: str = "sub",
        limit: int = 1,
        must_exist: bool = False,
    ) -> list[Entry]:
        if not self._own:
            raise BackendUnavailable("the user's connection was lost")
        return await self._pool._run(
            self._own,
            lambda link, end: link.search(
                base, filter, attributes, end, scope=scope, limit=limit, must_exist=must_exist
            ),
        )


def _read_address(text: str, tls: str) -> tuple[str, int, str]:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError(f"{text!r} is not an address; write ldap://HOST:PORT or ldaps://HOST:PORT") from None
    more = parts.path.strip("/") or parts.query or parts.username
    if parts.scheme not in ("ldap", "ldaps") or not parts.hostname or more:
        raise ValueError(f"{text!r} is not an address; write ldap://HOST:PORT or ldaps://HOST:PORT")
    if parts.scheme == "ldaps":
        return parts.hostname, port or 636, "ldaps"
    return parts.hostname, port or 389, tls


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _place(text: str, config: LdapServer) -> Place:
    host, port, tls = _read_address(text, config.tls)
    if tls == "none":
        return Place(host, port, tls)
    try:
        context = ssl.create_default_context(cafile=str(config.ca) if config.ca is not None else None)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"ca: {config.ca} cannot be used: {error.strerror or error}") from None
    if config.certificate is not None:
        try:
            context.load_cert_chain(config.certificate, config.key, password=_no_passphrase)
        except ValueError as error:
            raise ValueError(f"key: {config.key or config.certificate} {error}") from None
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"certificate: {config.certificate} cannot be used: {error.strerror or error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return Place(host, port, tls, context)


def _no_passphrase() -> str:
    raise ValueError("is encrypted with a passphrase; store it without one, readable by the broker only")


def _look(future: asyncio.Future[T]) -> None:
    """A late failure has been reported as a timeout already."""
    if not future.cancelled():
        future.exception()

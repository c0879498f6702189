"""The connection to one Kafka cluster: how it is secured, a producer that is replaced when it failed, topics."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from pathlib import Path
from typing import Any, Literal

from aiokafka import AIOKafkaProducer
from aiokafka.abc import AbstractTokenProvider
from aiokafka.conn import create_conn
from aiokafka.errors import KafkaError
from pydantic import BaseModel, ConfigDict, model_validator

from broker.config.types import ConfigPath, Secret
from broker.extend.sink import Fatal, NotConnected
from sinks._kafka_errors import describe, refusal

_log = logging.getLogger("sinks.kafka")

_METADATA_EVERY_MS = 60_000
_MISSING_FOR = 30.0  # seconds until a missing topic is a mistake and not a topic about to be made
_DIAGNOSE_WITHIN = 5.0
_FLUSH, _ABANDON = 2.0, 1.0  # close() takes _FLUSH + 2 * _ABANDON seconds at most
_REPEAT_EVERY = 60.0


class Sasl(BaseModel):
    """`sasl = { … }`: who we are."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    mechanism: Literal["plain", "scram-sha-256", "scram-sha-512", "oauthbearer"] = "scram-sha-512"
    """How we prove it: plain | scram-sha-256 | scram-sha-512 | oauthbearer."""
    username: str = ""
    """User name, for all but `oauthbearer`."""
    password: Secret = Secret()
    """Password, for all but `oauthbearer`."""
    token: Secret = Secret()
    """The bearer token of `oauthbearer`."""
    token_file: ConfigPath | None = None
    """Instead of `token`: a file with the token, read for every connection, so that it may be renewed."""

    @model_validator(mode="after")
    def _complete(self) -> Sasl:
        if self.mechanism == "oauthbearer":
            if bool(self.token) == (self.token_file is not None):
                raise ValueError("oauthbearer needs either token or token_file")
        elif not self.username or not self.password:
            raise ValueError(f"{self.mechanism} needs username and password")
        return self


class Tls(BaseModel):
    """`tls = { … }`, or `true` for the system's authorities."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    ca: ConfigPath | None = None
    """Authorities to trust, PEM; the system's if it is not given."""
    certificate: ConfigPath | None = None
    """Our own certificate, PEM, for a cluster that asks for one."""
    key: ConfigPath | None = None
    """Its private key, PEM; in `certificate` if it is not given."""
    key_password: Secret = Secret()
    """Password of `key`."""
    verify: bool = True
    """`false` takes any certificate: encrypted, but anybody can stand in the middle."""

    def context(self) -> ssl.SSLContext:
        """Fatal names the file that cannot be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key, self.key_password.reveal())
        except OSError as error:  # SSLError is one
            raise Fatal(f"tls: {self.ca or ''} {self.certificate or ''} {self.key or ''}: {error}") from error
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


class _Token(AbstractTokenProvider):  # type: ignore[misc]
    def __init__(self, token: Secret, file: Path | None) -> None:
        self._token = token
        self._file = file

    async def token(self) -> str:
        if self._file is None:
            return self._token.reveal()
        return (await asyncio.to_thread(self._file.read_text)).strip()


class Cluster:
    """Opens a producer when one is asked for; at most one is current, discarded ones end by themselves."""

    def __init__(
        self, servers: list[str], sasl: Sasl | None, tls: Tls | None, timeout: float, **producer_options: Any
    ) -> None:
        self._servers = servers
        self._sasl = sasl
        self._tls = tls
        self._timeout = timeout
        self._options = producer_options
        self._opening = asyncio.Lock()
        self._producer: AIOKafkaProducer | None = None
        self._ending: dict[asyncio.Task[None], AIOKafkaProducer] = {}
        self._partitions: dict[str, int] = {}
        self._missing: dict[str, float] = {}

    async def producer(self) -> AIOKafkaProducer:
        """The current one, connected. Raises NotConnected or Fatal."""
        if self._producer is not None:
            return self._producer
        async with self._opening:
            if self._producer is None:
                self._producer = await self._open()
            return self._producer

    def discard(self, producer: AIOKafkaProducer) -> None:
        """A batch of it failed, so its sequence numbers have a hole: what it still holds is finished, then it ends."""
        if self._producer is producer:
            self._producer = None
            self._end(producer)

    async def partitions(self, producer: AIOKafkaProducer, topic: str) -> int:
        """How many partitions the topic has. Raises NotConnected, or Fatal when it is not ours or missing for long."""
        known = producer.client.cluster.partitions_for_topic(topic) or await self._look_up(producer, topic)
        count = max(known) + 1
        before = self._partitions.get(topic)
        if before != count:
            self._partitions[topic] = count
            self._missing.pop(topic, None)
            if before is not None:
                _log.warning("topic %s now has %d partitions, it had %d: keys move to others", topic, count, before)
        return count

    async def look(self, producer: AIOKafkaProducer, timeout: float) -> None:
        """Ask the cluster for its layout anew. NotConnected or Fatal when no broker answers."""
        try:
            async with asyncio.timeout(timeout):
                answered = await producer.client.force_metadata_update()
        except TimeoutError as error:
            raise NotConnected(f"Kafka at {', '.join(self._servers)} does not answer") from error
        if not answered:
            raise await self._reason(None)

    async def check(self, topic: str | None) -> None:
        """One round trip; a topic that is missing is Fatal at once."""
        producer = await self.producer()
        try:
            async with asyncio.timeout(self._timeout):
                cluster = await producer.client.fetch_all_metadata()
        except (KafkaError, OSError, TimeoutError) as error:
            raise await self._reason(error) from error
        if topic is not None and topic not in cluster.topics():
            raise Fatal(f"Kafka has no topic {topic!r}, or we may not see it: create it or allow it")

    async def close(self) -> None:
        """What is on its way gets two seconds, then it is abandoned: the queue it came from still has it."""
        if self._producer is not None:
            self.discard(self._producer)
        if self._ending:
            await asyncio.wait(self._ending, timeout=_FLUSH)
        for producer in self._ending.values():  # there is no public way to make it give up
            producer._message_accumulator.fail_all(KafkaError("closed"))
        if self._ending:
            await asyncio.wait(self._ending, timeout=_ABANDON)
        left = dict(self._ending)
        for task in left:
            task.cancel()
        closing = [*left, *(asyncio.ensure_future(producer.client.close()) for producer in left.values())]
        if closing:
            await asyncio.wait(closing, timeout=_ABANDON)

    async def _look_up(self, producer: AIOKafkaProducer, topic: str) -> set[int]:
        client = producer.client
        client.add_topic(topic)
        for _ in range(2):  # an update that was under way did not ask for this topic
            await self.look(producer, self._timeout)
            if topic in client.cluster.unauthorized_topics:
                raise Fatal(f"Kafka does not let us write to topic {topic!r}: allow it")
            known: set[int] | None = client.cluster.partitions_for_topic(topic)
            if known:
                return known
        now = time.monotonic()
        if now - self._missing.setdefault(topic, now) > _MISSING_FOR:
            raise Fatal(f"Kafka has no topic {topic!r}: create it")
        raise NotConnected(f"Kafka has no topic {topic!r} yet")

    def _security(self) -> dict[str, Any]:
        options: dict[str, Any] = {"security_protocol": "PLAINTEXT"}
        if self._tls is not None:
            options |= {"security_protocol": "SSL", "ssl_context": self._tls.context()}
        sasl = self._sasl
        if sasl is not None:
            options["security_protocol"] = "SASL_PLAINTEXT" if self._tls is None else "SASL_SSL"
            options["sasl_mechanism"] = sasl.mechanism.upper()
            if sasl.mechanism == "oauthbearer":
                options["sasl_oauth_token_provider"] = _Token(sasl.token, sasl.token_file)
            else:
                options["sasl_plain_username"] = sasl.username
                options["sasl_plain_password"] = sasl.password.reveal()
        return options

    async def _open(self) -> AIOKafkaProducer:
        security = self._security()
        try:
            producer = AIOKafkaProducer(
                bootstrap_servers=self._servers, enable_idempotence=True, acks="all", linger_ms=0,
                request_timeout_ms=int(self._timeout * 1000), metadata_max_age_ms=_METADATA_EVERY_MS,
                **self._options, **security,
            )  # fmt: skip
        except RuntimeError as error:  # a compression whose library is not installed
            raise Fatal(f"{error}: pip install 'isthmus[kafka]'") from error
        try:
            async with asyncio.timeout(self._timeout):
                await producer.start()
        except (KafkaError, OSError, TimeoutError, ValueError) as error:
            await producer.stop()
            raise await self._reason(error) from error
        except BaseException:
            await producer.stop()
            raise
        return producer

    async def _reason(self, error: BaseException | None) -> NotConnected | Fatal:
        """Why we are not connected: the driver says «unable to bootstrap» to a wrong password, too."""
        security = self._security()
        reasons = await asyncio.gather(*(self._refusal_of(server, security) for server in self._servers))
        said = [reason for reason in reasons if reason is not None]
        fatal = next((reason for reason in said if isinstance(reason, Fatal)), None)
        if fatal is not None and len(said) == len(reasons):
            return fatal
        if said:
            return NotConnected("; ".join(dict.fromkeys(str(reason) for reason in said)))
        return NotConnected(f"Kafka at {', '.join(self._servers)}: {describe(error) if error else 'no broker answers'}")

    async def _refusal_of(self, server: str, security: dict[str, Any]) -> NotConnected | Fatal | None:
        host, _, port = server.rpartition(":")
        try:
            async with asyncio.timeout(min(_DIAGNOSE_WITHIN, self._timeout)):
                connection = await create_conn(
                    host.strip("[]"), int(port), client_id="isthmus",
                    request_timeout_ms=int(self._timeout * 1000), **security,
                )  # fmt: skip
        except Exception as error:
            return refusal(server, error)
        connection.close()
        return None

    def _end(self, producer: AIOKafkaProducer) -> None:
        task = asyncio.create_task(producer.stop())
        self._ending[task] = producer
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            _log.debug("a producer did not end well: %s", task.exception())


class _Driver(logging.Handler):
    """Passes on what the driver says, each kind of line once a minute: it repeats itself ten times a second."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: dict[str, tuple[float, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        at, unsaid = self._said.get(record.msg, (-_REPEAT_EVERY, 0))
        now = time.monotonic()
        if now - at < _REPEAT_EVERY:
            self._said[record.msg] = (at, unsaid + 1)
            return
        self._said[record.msg] = (now, 0)
        more = f" ({unsaid} more like this before)" if unsaid else ""
        _log.log(record.levelno, "%s%s", record.getMessage(), more, exc_info=record.exc_info)


_driver = logging.getLogger("aiokafka")
if not any(type(handler).__name__ == "_Driver" for handler in _driver.handlers):
    _driver.setLevel(logging.WARNING)  # below that it writes requests, and with them passwords
    _driver.propagate = False
    _driver.addHandler(_Driver())

"""Apache Kafka from its published jars."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.servers.authority import Certificates
from tests.servers.containers import Container, docker_answers
from tests.servers.processes import CACHE, PATIENCE, Absent, NotOurs, Process, accepts, folder, free_port, program

KAFKA_VERSION = "4.3.1"
KAFKA_HOME = CACHE / f"kafka-{KAFKA_VERSION}"
KAFKA_POM = f"""<project><modelVersion>4.0.0</modelVersion>
 <groupId>test</groupId><artifactId>kafka-run</artifactId><version>1</version><dependencies>
 <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{KAFKA_VERSION}</version></dependency>
 <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
</dependencies></project>
"""
KAFKA_USER, KAFKA_PASSWORD = "alice", "alice-pw"
"""SASL PLAIN; the SCRAM user is bob with bob-pw."""
SCRAM_USER, SCRAM_PASSWORD = "bob", "bob-pw"


@dataclass
class Kafka:
    """One Kafka broker in KRaft mode, auto-creation of topics off."""

    bootstrap: str
    listeners: dict[str, str] = field(default_factory=dict)
    """Further listeners when asked for: SASL (plain text), TLS, SASLSSL, MTLS -> host:port."""
    certs: Certificates | None = None
    user: str = KAFKA_USER
    password: str = KAFKA_PASSWORD
    scram_user: str = SCRAM_USER
    scram_password: str = SCRAM_PASSWORD
    _command: list[str] = field(default_factory=list)
    _log: Path | None = None
    _process: Process | None = None

    @property
    def port(self) -> int:
        return int(self.bootstrap.rpartition(":")[2])

    @property
    def pid(self) -> int:
        return self._ours().pid

    def _ours(self) -> Process:
        if self._process is None:
            raise NotOurs("this Kafka was not started by the tests and cannot be stopped")
        return self._process

    def stop(self) -> None:
        self._ours().stop(seconds=20)

    def kill(self) -> None:
        """SIGKILL; what it acknowledged is still in the page cache."""
        self._ours().kill()

    def freeze(self) -> None:
        """Accept connections but never answer, until `thaw`."""
        self._ours().freeze()

    def thaw(self) -> None:
        os.kill(self._ours().pid, signal.SIGCONT)

    def start(self) -> None:
        """Again on the same ports and data (2-4 s: the old registration must expire first)."""
        self._ours()
        assert self._log is not None
        self._process = Process(self._command, self._log)
        self._process.wait_until(lambda: accepts(self.port) and _kafka_answers(self.bootstrap), 60, "Kafka")

    async def create_topic(
        self, name: str, partitions: int = 1, configs: Mapping[str, str] | None = None, *, replicas: int = 1
    ) -> None:
        """Create a topic; an existing one is left alone."""
        from aiokafka.admin import AIOKafkaAdminClient, NewTopic
        from aiokafka.errors import TopicAlreadyExistsError

        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            with contextlib.suppress(TopicAlreadyExistsError):
                topic = NewTopic(name, partitions, replicas, topic_configs=dict(configs or {}))
                answer = await admin.create_topics([topic])
                for refused, code, *rest in answer.topic_errors:
                    if code not in (0, 36):
                        raise RuntimeError(f"Kafka refuses topic {refused}: error {code} {rest}")
            deadline = time.monotonic() + 15 * PATIENCE
            while not _led(await admin.describe_topics([name])):  # created is not yet known to be led
                if time.monotonic() > deadline:
                    raise RuntimeError(f"Kafka created topic {name} but shows no leader for it")
                await asyncio.sleep(0.02)
        finally:
            await admin.close()

    async def leaders(self, topic: str) -> dict[int, int]:
        """Partition -> number of the node that leads it."""
        from aiokafka.admin import AIOKafkaAdminClient

        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            [described] = await admin.describe_topics([topic])
        finally:
            await admin.close()
        return {place["partition"]: place["leader"] for place in described["partitions"]}

    async def delete_topic(self, name: str) -> None:
        from aiokafka.admin import AIOKafkaAdminClient

        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            await admin.delete_topics([name])
        finally:
            await admin.close()

    async def read(self, topic: str, count: int, seconds: float = 15, *, committed: bool = False) -> list[Any]:
        """At least `count` records of the topic from its beginning, in partition order; fewer when the time is up."""
        from aiokafka import AIOKafkaConsumer

        consumer = AIOKafkaConsumer(
            topic,
            bootstrap_servers=self.bootstrap,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            isolation_level="read_committed" if committed else "read_uncommitted",
        )
        await consumer.start()
        records: list[Any] = []
        try:
            deadline = time.monotonic() + seconds
            while len(records) < count and time.monotonic() < deadline:
                for batch in (await consumer.getmany(timeout_ms=100, max_records=10_000)).values():
                    records += batch
        finally:
            await consumer.stop()
        return records

    async def everything(self, topic: str, seconds: float = 30, *, committed: bool = False) -> list[Any]:
        """All records up to where the log ends now, however long that takes on a busy machine; in partition order.
        With `committed` the transactions that are open now are waited for. AssertionError when the time is up."""
        from aiokafka import AIOKafkaConsumer, TopicPartition

        async def ends() -> dict[TopicPartition, int]:
            async with AIOKafkaConsumer(topic, bootstrap_servers=self.bootstrap) as consumer:
                found: dict[TopicPartition, int] = await consumer.end_offsets(consumer.assignment())
                return found

        limits = await ends()
        level = "read_committed" if committed else "read_uncommitted"
        records: dict[TopicPartition, list[Any]] = {place: [] for place in sorted(limits)}
        async with AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap, auto_offset_reset="earliest", isolation_level=level
        ) as consumer:
            consumer.assign(list(limits))
            deadline = time.monotonic() + seconds * PATIENCE
            while any([await consumer.position(place) < end for place, end in limits.items()]):
                assert time.monotonic() < deadline, f"{topic}: {limits} wanted, {records}"
                for place, batch in (await consumer.getmany(timeout_ms=100)).items():
                    records[place] += batch
        return [record for batch in records.values() for record in batch]


def _led(described: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every partition of the topics has a leader."""
    return all(
        not topic["error_code"] and topic["partitions"] and all(not p["error_code"] for p in topic["partitions"])
        for topic in described
    )


def _kafka_answers(bootstrap: str) -> bool:
    """Whether the broker answers ApiVersions v0, which every release understands."""
    host, _, port = bootstrap.rpartition(":")
    request = b"\x00\x12\x00\x00\x00\x00\x00\x01\xff\xff"
    try:
        with socket.create_connection((host, int(port)), 2) as s:
            s.sendall(len(request).to_bytes(4, "big") + request)
            return len(s.recv(64)) >= 10
    except OSError:
        return False


def kafka_home() -> Path:
    """Where jars, start archive and formatted folder are kept; made by `install_kafka` on first use."""
    if not any((KAFKA_HOME / "libs").glob("kafka_2.13-*.jar")):
        raise Absent(f"Apache Kafka is not in {KAFKA_HOME} (make servers), TEST_KAFKA is not set")
    if program("java") is None:
        raise Absent("Apache Kafka needs Java 17: apt-get install default-jre-headless")
    return KAFKA_HOME


def _java(home: Path, heap: str = "384m") -> list[str]:
    java = program("java")
    assert java is not None
    # the class path string is part of the archive's identity: never change one without the other
    return [java, f"-Xmx{heap}", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{home}/libs/*"]  # fmt: skip


def _kafka_properties(
    where: Path,
    port: int,
    controller: int,
    more: Mapping[str, int],
    certs: Certificates | None,
    proxy: int | None,
    session_ms: int = 1_500,
) -> str:
    protocols = {"SASL": "SASL_PLAINTEXT", "TLS": "SSL", "SASLSSL": "SASL_SSL", "MTLS": "SSL", "PROXIED": "PLAINTEXT"}
    client = {"PLAINTEXT": port, **more}
    addresses = ",".join(f"{name}://127.0.0.1:{p}" for name, p in client.items())
    seen = {**client, "PROXIED": proxy} if proxy is not None else client
    advertised = ",".join(f"{name}://127.0.0.1:{p}" for name, p in seen.items())
    lines = [
        "process.roles=broker,controller", "node.id=1",
        f"listeners={addresses},CONTROLLER://127.0.0.1:{controller}", f"advertised.listeners={advertised}",
        "controller.listener.names=CONTROLLER", f"controller.quorum.voters=1@127.0.0.1:{controller}",
        "inter.broker.listener.name=PLAINTEXT",
        "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT"
        + "".join(f",{name}:{protocols[name]}" for name in more),
        "log.retention.ms=-1",  # records of tests have the times of 1970
        f"log.dirs={where}/data", "offsets.topic.replication.factor=1", "offsets.topic.num.partitions=4",
        "transaction.state.log.replication.factor=1", "transaction.state.log.min.isr=1",
        "transaction.state.log.num.partitions=4", "share.coordinator.state.topic.replication.factor=1",
        "share.coordinator.state.topic.min.isr=1", "group.initial.rebalance.delay.ms=0",
        "auto.create.topics.enable=false", "num.partitions=3", "log.cleaner.dedupe.buffer.size=8388608",
        "controlled.shutdown.enable=false", f"broker.session.timeout.ms={session_ms}",
        "broker.heartbeat.interval.ms=200",
    ]  # fmt: skip
    if any(name.startswith("SASL") for name in more):
        lines.append("sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512")
        modules = "org.apache.kafka.common.security"
        for name in (n.lower() for n in more if n.startswith("SASL")):
            plain = f'{modules}.plain.PlainLoginModule required user_{KAFKA_USER}="{KAFKA_PASSWORD}";'
            lines.append(f"listener.name.{name}.plain.sasl.jaas.config={plain}")
            for scram in ("scram-sha-256", "scram-sha-512"):
                lines.append(
                    f"listener.name.{name}.{scram}.sasl.jaas.config={modules}.scram.ScramLoginModule required;"
                )
    if certs is not None:
        bundle = where / "bundle.pem"
        bundle.write_text(certs.server_key.read_text() + certs.server.read_text() + certs.ca.read_text())
        lines += ["ssl.keystore.type=PEM", f"ssl.keystore.location={bundle}", "ssl.truststore.type=PEM",
                  f"ssl.truststore.location={certs.ca}", "listener.name.mtls.ssl.client.auth=required"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _identifier() -> str:
    """Random, as Kafka writes it; one that begins with a dash would be taken for an option."""
    return "A" + base64.urlsafe_b64encode(os.urandom(16)).decode()[1:22]


def prepare_kafka(home: Path) -> None:
    """Once for each machine: a formatted folder to copy and a class archive that halves the start."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        formatted = home / "formatted"
        if not formatted.is_dir():
            with folder("kafka-format") as where:
                (where / "server.properties").write_text(
                    _kafka_properties(where, free_port(), free_port(), {}, None, None)
                )
                cluster = _identifier()
                users = [
                    f"{mechanism}=[name={SCRAM_USER},password={SCRAM_PASSWORD}]"
                    for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
                ]
                subprocess.run(
                    [*_java(home), "kafka.tools.StorageTool", "format", "-t", cluster, "-c",
                     str(where / "server.properties"), *(a for u in users for a in ("-S", u))],
                    check=True, capture_output=True, timeout=120,
                )  # fmt: skip
                staged = home / "formatted.new"
                shutil.rmtree(staged, ignore_errors=True)
                shutil.copytree(where / "data", staged)
                staged.rename(formatted)
        archive = home / "kafka.jsa"
        if not archive.exists():
            with folder("kafka-archive") as where:
                port = free_port()
                process = _start_kafka(home, where, port, {}, None, None, [f"-XX:ArchiveClassesAtExit={archive}.new"])
                process.stop(seconds=60)
                staged = archive.with_name("kafka.jsa.new")
                if staged.exists():
                    staged.rename(archive)
                else:
                    archive.touch()  # this Java makes none; do not try again


def _start_kafka(
    home: Path,
    where: Path,
    port: int,
    more: Mapping[str, int],
    certs: Certificates | None,
    proxy: int | None,
    options: Sequence[str],
    session_ms: int = 1_500,
) -> Process:
    shutil.copytree(home / "formatted", where / "data")
    controller = next(p for p in iter(free_port, None) if p != port and p not in more.values())
    (where / "server.properties").write_text(_kafka_properties(where, port, controller, more, certs, proxy, session_ms))
    java, *rest = _java(home)
    process = Process([java, *options, *rest, "kafka.Kafka", where / "server.properties"], where / "log")
    process.wait_until(lambda: accepts(port) and _kafka_answers(f"127.0.0.1:{port}"), 40, "Kafka")
    return process


@contextlib.contextmanager
def kafka(
    *,
    listeners: Sequence[str] = (),
    tls: Certificates | None = None,
    proxy: int | None = None,
    port: int | None = None,
    restarts: bool = True,
) -> Iterator[Kafka]:
    """An empty Kafka, up in 1-3 s, on this port or a free one.

    `listeners` adds SASL, TLS, SASLSSL, MTLS (the last three need `tls`). Clients follow the addresses a broker
    advertises, past any proxy: with `proxy`, a port, a listener PROXIED is added that advertises that port instead.
    A Kafka that is silent for 3 s is taken for dead by its own controller, and one that starts again waits for as
    long; without `restarts` it is 30 s, for a Kafka that is never stopped on a machine that may stand still.
    """
    if proxy is not None:
        listeners = [*listeners, "PROXIED"]
    given = os.environ.get("TEST_KAFKA")
    if given and not listeners:
        yield Kafka(given)
        return
    try:
        home = kafka_home()
    except Absent:
        if listeners or not docker_answers():
            raise
        port = free_port()
        container = Container("kafka", KAFKA_PORT=str(port))
        try:
            yield Kafka(f"127.0.0.1:{port}")
        finally:
            container.remove()
        return
    prepare_kafka(home)
    archive = home / "kafka.jsa"
    options = [f"-XX:SharedArchiveFile={archive}", "-Xshare:auto"] if archive.stat().st_size else []
    with folder("kafka") as where:
        port, more = port or free_port(), {name: free_port() for name in listeners}
        session_ms = 3_000 if restarts else 30_000
        process = _start_kafka(home, where, port, more, tls, proxy, options, session_ms)
        server = Kafka(
            f"127.0.0.1:{port}",
            {name: f"127.0.0.1:{p}" for name, p in more.items()},
            tls,
            _command=process.command,
            _log=where / "log",
            _process=process,
        )
        try:
            yield server
        finally:
            _end(server)


@contextlib.contextmanager
def kafka_cluster(nodes: int = 3) -> Iterator[list[Kafka]]:
    """So many nodes, each broker and controller, numbered from 1: any of them can be stopped, killed or frozen. What
    asks for `replicas` survives that; each is found at the addresses of all."""
    home = kafka_home()
    prepare_kafka(home)
    numbers = range(1, nodes + 1)
    ports, controllers = ({number: free_port() for number in numbers} for _ in range(2))
    bootstrap = ",".join(f"127.0.0.1:{port}" for port in ports.values())
    voters = ",".join(f"{number}@127.0.0.1:{port}" for number, port in controllers.items())
    java, *rest = _java(home)
    archive = home / "kafka.jsa"
    options = [f"-XX:SharedArchiveFile={archive}", "-Xshare:auto"] if archive.stat().st_size else []
    with folder("kafka-cluster") as where, contextlib.ExitStack() as stack:
        found = []
        for number in numbers:
            place = where / str(number)
            shutil.copytree(home / "formatted", place / "data")
            meta = place / "data" / "meta.properties"
            own = {
                "node.id": str(number),
                "directory.id": f"A{base64.urlsafe_b64encode(os.urandom(16)).decode()[1:22]}",
            }
            lines = [line.partition("=") for line in meta.read_text().splitlines()]
            meta.write_text("".join(f"{key}{sep}{own.get(key, value)}\n" for key, sep, value in lines))
            more = [
                f"node.id={number}", f"controller.quorum.voters={voters}", f"default.replication.factor={nodes}",
                *(f"{log}.replication.factor={nodes}" for log in ("offsets.topic", "transaction.state.log")),
                f"transaction.state.log.min.isr={nodes // 2 + 1}", "replica.lag.time.max.ms=3000",
            ]  # fmt: skip
            text = _kafka_properties(place, ports[number], controllers[number], {}, None, None)
            (place / "server.properties").write_text(text + "\n".join(more) + "\n")
            command = [java, *options, *rest, "kafka.Kafka", place / "server.properties"]
            process = Process(command, place / "log")
            server = Kafka(bootstrap, _command=process.command, _log=place / "log", _process=process)
            stack.callback(_end, server)
            found.append(server)
        for number, server in zip(numbers, found, strict=True):
            one = f"127.0.0.1:{ports[number]}"
            server._ours().wait_until(lambda one=one: _kafka_answers(one), 90, f"Kafka {number}")  # type: ignore[misc]
        yield found


def _end(server: Kafka) -> None:
    with contextlib.suppress(ProcessLookupError):
        server.thaw()
    server.kill()  # its data goes with the folder

"""Starts Redis (one server, sentinels, a cluster) and MongoDB for the tests. Loopback only.

Like `servers/`: an address in the environment (TEST_REDIS, TEST_MONGODB), then a program on this machine, else
`Absent` says why. MongoDB is `mongod` where there is one, else mongo-java-server, which speaks its protocol without
logins, sessions and transactions: `python -m tests.nosql_servers install` fetches it with Maven.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest

from tests.servers import (
    CACHE,
    PATIENCE,
    Absent,
    Certificates,
    NotOurs,
    Process,
    accepts,
    folder,
    free_port,
    program,
    required,
)  # fmt: skip

T = TypeVar("T")

MONGO_VERSION = "1.47.0"
MONGO_HOME = CACHE / f"mongo-java-server-{MONGO_VERSION}"
MONGO_POM = f"""<project><modelVersion>4.0.0</modelVersion>
 <groupId>test</groupId><artifactId>mongo-run</artifactId><version>1</version><dependencies>
 <dependency><groupId>de.bwaldvogel</groupId><artifactId>mongo-java-server</artifactId><version>{MONGO_VERSION}</version></dependency>
 <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>2.0.17</version></dependency>
</dependencies></project>
"""
MONGO_LAUNCHER = """import de.bwaldvogel.mongo.*; import de.bwaldvogel.mongo.backend.memory.*; import java.util.*;
public class Launcher { public static void main(String[] a) throws Exception {
  MongoVersion v = new MongoVersion() {
    public List<Integer> getVersionArray() { return Arrays.asList(5, 0, 0, 0); }
    public int getWireVersion() { return 13; } };
  new MongoServer(new MemoryBackend().version(v)).bind("127.0.0.1", Integer.parseInt(a[0]));
  Thread.currentThread().join(); } }
"""
MASTER = "mm"
"""The name the sentinels know the master by."""


@dataclass
class Server:
    """One process on one port of 127.0.0.1."""

    port: int
    host: str = "127.0.0.1"
    name: str = "server"
    tls_port: int | None = None
    _command: Sequence[str | Path] = ()
    _log: Path | None = None
    _process: Process | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def _ours(self) -> Process:
        if self._process is None:
            raise NotOurs(f"this {self.name} was not started by the tests and cannot be stopped")
        return self._process

    def start(self, seconds: float = 15) -> None:
        """Begin, or begin again on the same port; nothing is kept over a stop."""
        assert self._log is not None
        self._process = Process([str(part) for part in self._command], self._log)
        self._process.wait_until(lambda: accepts(self.port), seconds, self.name)

    def stop(self) -> None:
        self._ours().kill()

    def freeze(self) -> None:
        """Accept connections but never answer, until `thaw`."""
        os.kill(self._ours().popen.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._ours().popen.pid, signal.SIGCONT)

    def end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.thaw()
            self._process.kill()


@dataclass
class RedisServer(Server):
    """A redis-server."""

    password: str | None = None

    def connect(self) -> Any:
        """A client of the driver's blocking kind, to change data under a running broker."""
        import redis

        return redis.Redis(self.host, self.port, password=self.password, socket_timeout=5, decode_responses=True)


@dataclass
class Sentinels:
    """A master, a replica and three sentinels that watch them."""

    master: RedisServer
    replica: RedisServer
    sentinels: list[RedisServer]

    @property
    def addresses(self) -> list[str]:
        return [one.address for one in self.sentinels]


@dataclass
class Cluster:
    """Three masters that share the slots."""

    nodes: list[RedisServer]

    @property
    def addresses(self) -> list[str]:
        return [one.address for one in self.nodes]

    def connect(self) -> Any:
        import redis

        return redis.RedisCluster("127.0.0.1", self.nodes[0].port, socket_timeout=5, decode_responses=True)


def _redis_binary() -> str:
    binary = program("redis-server")
    if binary is None:
        raise Absent("redis-server is not installed: apt-get install redis-server; TEST_REDIS is not set")
    return binary


def _redis(where: Path, *options: str, name: str = "Redis", port: int | None = None) -> RedisServer:
    port = port or free_port()
    home = where / str(port)
    home.mkdir()
    command = [_redis_binary(), *options[:1]] if options and options[0].endswith(".conf") else [_redis_binary()]
    rest = options[1:] if len(command) == 2 else options
    command += ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(home), *rest]
    return RedisServer(port, name=name, _command=command, _log=home / "log")


@contextlib.contextmanager
def redis(*, tls: Certificates | None = None, password: str | None = None) -> Iterator[RedisServer]:
    """An empty Redis that keeps nothing; with `tls` on a second port, `tls_port`, too."""
    given = os.environ.get("TEST_REDIS")
    if given and tls is None and password is None:
        parts = urlsplit(given)
        yield RedisServer(parts.port or 6379, parts.hostname or "127.0.0.1", "Redis", password=parts.password)
        return
    with folder("redis") as where:
        options = ["--save", "", "--appendonly", "no"]
        tls_port = free_port() if tls else None
        if tls is not None:
            options += ["--tls-port", str(tls_port), "--tls-auth-clients", "optional"]
            options += ["--tls-cert-file", str(tls.server), "--tls-key-file", str(tls.server_key)]
            options += ["--tls-ca-cert-file", str(tls.ca)]
        if password is not None:
            options += ["--requirepass", password]
        server = _redis(where, *options)
        server.tls_port, server.password = tls_port, password
        try:
            server.start()
            yield server
        finally:
            server.end()


@contextlib.contextmanager
def redis_sentinel(*, down_after: int = 500) -> Iterator[Sentinels]:
    """A master with one replica and three sentinels, which elect another two seconds after it has been silent for
    `down_after` milliseconds."""
    with folder("sentinel") as where, contextlib.ExitStack() as stack:
        plain = ("--save", "", "--appendonly", "no")
        master = _redis(where, *plain, "--repl-diskless-sync-delay", "0", name="Redis master")
        replica = _redis(where, *plain, "--repl-diskless-sync-delay", "0", "--replicaof", "127.0.0.1", str(master.port))
        for server in (master, replica):
            stack.callback(server.end)
            server.start()
        sentinels = []
        for number in range(3):
            conf = where / f"sentinel-{number}.conf"
            conf.write_text(
                f"sentinel monitor {MASTER} 127.0.0.1 {master.port} 2\n"
                f"sentinel down-after-milliseconds {MASTER} {down_after}\nsentinel failover-timeout {MASTER} 2000\n"
            )
            sentinel = _redis(where, str(conf), "--sentinel", name="Redis sentinel")
            stack.callback(sentinel.end)
            sentinel.start()
            sentinels.append(sentinel)

        def settled(sentinel: RedisServer) -> bool:
            state = sentinel.connect().sentinel_master(MASTER)
            return state["num-other-sentinels"] == 2 and state["num-slaves"] == 1

        _wait(lambda: all(map(settled, sentinels)), 20, "the sentinels know each other")
        yield Sentinels(master, replica, sentinels)


@contextlib.contextmanager
def redis_cluster() -> Iterator[Cluster]:
    """Three nodes without replicas."""
    tool = program("redis-cli")
    if tool is None:
        raise Absent("redis-cli is not installed: apt-get install redis-server")
    with folder("cluster") as where, contextlib.ExitStack() as stack:
        nodes = []
        for _ in range(3):
            node = _redis(
                where, "--save", "", "--appendonly", "no", "--cluster-enabled", "yes", "--cluster-config-file",
                "n.conf", "--cluster-port", str(free_port()), "--cluster-node-timeout", "1000", name="Redis node",
            )  # fmt: skip
            stack.callback(node.end)
            node.start()
            nodes.append(node)
        cluster = Cluster(nodes)
        create = [tool, "--cluster", "create", *cluster.addresses, "--cluster-yes"]
        subprocess.run(create, check=True, capture_output=True, timeout=30)
        _wait(lambda: all(n.connect().cluster("info")["cluster_state"] == "ok" for n in nodes), 20, "the cluster is up")
        yield cluster


@dataclass
class MongoServer(Server):
    """A MongoDB, or what speaks as one."""

    _client: Any = None

    def connect(self) -> Any:
        """A client of the driver's blocking kind, closed with the server."""
        import pymongo

        if self._client is None:
            self._client = pymongo.MongoClient(
                self.host, self.port, serverSelectionTimeoutMS=5_000, directConnection=True
            )
        return self._client

    def end(self) -> None:
        if self._client is not None:
            self._client.close()
        super().end()


@contextlib.contextmanager
def mongodb() -> Iterator[MongoServer]:
    """An empty MongoDB in memory."""
    given = os.environ.get("TEST_MONGODB")
    if given:
        parts = urlsplit(given)
        yield MongoServer(parts.port or 27017, parts.hostname or "127.0.0.1", "MongoDB")
        return
    with folder("mongodb") as where:
        server = MongoServer(free_port(), name="MongoDB", _log=where / "log")
        real = program("mongod")
        if real is not None:
            command = [real, "--port", str(server.port), "--bind_ip", "127.0.0.1", "--dbpath", str(where)]
        else:
            command = [*_mongo_java(), str(server.port)]
        server._command = command
        try:
            server.start(30)
            yield server
        finally:
            server.end()


def _mongo_java() -> list[str]:
    java = program("java")
    if not (MONGO_HOME / "classes" / "Launcher.class").exists() or java is None:
        raise Absent(
            f"neither mongod nor mongo-java-server in {MONGO_HOME} (python -m tests.nosql_servers install); "
            "TEST_MONGODB is not set"
        )
    return [java, "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=off", "-cp", f"{MONGO_HOME}/classes:{MONGO_HOME}/libs/*",
            "Launcher"]  # fmt: skip


@contextlib.contextmanager
def or_skip(service: str, start: Callable[..., contextlib.AbstractContextManager[T]], **options: Any) -> Iterator[T]:
    """The running server; a skip with the reason where it cannot be had, a failure when REQUIRE names it."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(start(**options))
        except Absent as error:
            if service in required():
                pytest.fail(f"REQUIRE names {service}: {error}", pytrace=False)
            pytest.skip(f"{service}: {error}")
        yield server


def install_mongodb() -> bool:
    """mongo-java-server's jars, by Maven, into the cache, and its launcher. True when it is there."""
    if program("mongod") is not None or os.environ.get("TEST_MONGODB"):
        return True
    if (MONGO_HOME / "classes" / "Launcher.class").exists():
        print(f"servers: mongo-java-server {MONGO_VERSION} is in {MONGO_HOME}")
        return True
    maven, compiler = program("mvn"), program("javac")
    if maven is None or compiler is None:
        print("servers: mongo-java-server needs Maven and a JDK: apt-get install maven default-jdk-headless")
        return False
    MONGO_HOME.mkdir(parents=True, exist_ok=True)
    (MONGO_HOME / "pom.xml").write_text(MONGO_POM)
    (MONGO_HOME / "Launcher.java").write_text(MONGO_LAUNCHER)
    copy = [maven, "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=libs", "-DincludeScope=runtime"]
    build = [compiler, "-cp", f"{MONGO_HOME}/libs/*", "-d", str(MONGO_HOME / "classes"), "Launcher.java"]
    for command in (copy, build):
        if subprocess.run(command, cwd=MONGO_HOME, timeout=600).returncode:
            print(f"servers: {command[0]} failed; mongo-java-server is not there")
            shutil.rmtree(MONGO_HOME / "classes", ignore_errors=True)
            return False
    print(f"servers: mongo-java-server {MONGO_VERSION} is in {MONGO_HOME}")
    return True


def _wait(reached: Callable[[], bool], seconds: float, what: str) -> None:
    """Until it is so; errors on the way count as no."""
    deadline = time.monotonic() + seconds * PATIENCE
    problem: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if reached():
                return
        except Exception as error:
            problem = error
        time.sleep(0.05)
    raise RuntimeError(f"not reached in {seconds:.0f} s: {what} ({problem})")


def main(arguments: Sequence[str]) -> int:
    """`install`: what can be fetched without a package manager."""
    if list(arguments) != ["install"]:
        print("usage: python -m tests.nosql_servers install", file=sys.stderr)
        return 2
    return 0 if install_mongodb() else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""How fast clients are let in: `python -m tests.benchmarks.logins [BACKEND …] [--seconds 1] [--rounds 3]`.

Three rates of one backend on one machine, in turn, the median of the rounds:

- driver: the best loop we know on the driver alone that asks what a login asks and compares the password, over as many
  connections as the backend has.
- cold: logins through the access gate with the backend behind its guard, each of them asked.
- cached: the same clients again while their verdicts are remembered.

Every user has a password and one rule of its own. No socket of a client is in any of the rates; what a connection costs
besides is in `make bench`. A server on the same machine shares its processors with the loop, for both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import multiprocessing
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from broker.access.gate import AccessGate
from broker.access.passwords import hash_password
from broker.extend.registry import load
from tests import nosql_servers, servers, sql_servers
from tests.build import compiled
from tests.integration.auth_harness import instance
from tests.unit.access.doubles import settings

USERS = 1_000
POOL = 8
"""Connections of the backend and of the loop."""
PASSWORD = b"load-pw"
HASH = hashlib.sha256(PASSWORD).hexdigest()
SECRET = "the secret of tokens in measurements"
ACL = "select allow, ipaddr, username, clientid, access, topic from mqtt_acl where username = {0} or username = '$all' "
ACL += "or clientid = {1}"
USER = "select username, password, is_superuser from mqtt_user where username = {0}"

Login = Callable[[int], Awaitable[object]]
"""Lets user number so and so in; raises when it cannot."""


@dataclass
class Subject:
    """A backend with users in it, and the loop it is compared with."""

    table: Mapping[str, Any]
    driver: Callable[[], contextlib.AbstractAsyncContextManager[list[Login]]]
    """Opens one login for each connection."""
    password: Callable[[int], bytes] = lambda number: PASSWORD
    users: int = USERS
    at_once: int = 64


def user(number: int) -> str:
    return f"u{number}"


def check(stored: str | bytes) -> None:
    """What a login has to do with the stored password."""
    text = stored.decode() if isinstance(stored, bytes) else stored
    if not hmac.compare_digest(hashlib.sha256(PASSWORD).hexdigest(), text):
        raise AssertionError("wrong password")


# --- the loops -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ldap(where: Path) -> Iterator[Subject]:
    import ldap3

    with servers.slapd() as directory:
        connection = directory.connect()
        base = directory.people_dn
        for number in range(USERS):
            attributes = {"uid": user(number), "cn": "x", "sn": "x", "userPassword": PASSWORD.decode()}
            assert connection.add(f"uid={user(number)},{base}", ["inetOrgPerson"], attributes)
        connection.unbind()

        @contextlib.asynccontextmanager
        async def driver() -> AsyncIterator[list[Login]]:
            threads = ThreadPoolExecutor(POOL)
            loop = asyncio.get_running_loop()
            server = ldap3.Server(directory.url, get_info=ldap3.NONE)

            def connect() -> Any:
                return ldap3.Connection(server, directory.admin_dn, directory.admin_password, auto_bind=True)

            def login(service: Any, own: Any, number: int) -> None:
                service.search(base, f"(uid={user(number)})", attributes=["uid"], size_limit=2)
                (entry,) = service.response
                assert entry["attributes"]["uid"] == [user(number)]
                assert own.rebind(entry["dn"], PASSWORD.decode())

            pairs = [(connect(), connect()) for _ in range(POOL)]

            async def one(pair: tuple[Any, Any], number: int) -> None:
                await loop.run_in_executor(threads, login, *pair, number)

            yield [partial(one, pair) for pair in pairs]
            for pair in pairs:
                for each in pair:
                    each.unbind()
            threads.shutdown()

        table = {
            "servers": (directory.url,), "tls": "none", "bind_dn": directory.admin_dn,
            "bind_password": directory.admin_password, "base_dn": base,
        }  # fmt: skip
        yield Subject(table, driver)


def _statements() -> list[str]:
    users = ", ".join(f"({number}, '{user(number)}', '{HASH}', null, 0)" for number in range(USERS))
    rules = ", ".join(f"({number}, 1, null, '{user(number)}', null, 3, 'a/%u/#')" for number in range(USERS))
    return [
        "create table mqtt_user (id integer primary key, username varchar(100) unique, password varchar(100), "
        "salt varchar(40), is_superuser integer)",
        "create table mqtt_acl (id integer primary key, allow integer, ipaddr varchar(60), username varchar(100), "
        "clientid varchar(100), access integer, topic varchar(100))",
        "create index mqtt_acl_username on mqtt_acl (username)",
        "create index mqtt_acl_clientid on mqtt_acl (clientid)",
        f"insert into mqtt_user values {users}",
        f"insert into mqtt_acl values {rules}",
    ]


def _sql_table(**place: Any) -> dict[str, Any]:
    return {
        "authenticate": USER.format("${username}"), "authorize": ACL.format("${username}", "${clientid}"),
        "password_hash": "sha256", **place,
    }  # fmt: skip


@contextlib.contextmanager
def postgresql(where: Path) -> Iterator[Subject]:
    import asyncpg

    with sql_servers.postgresql() as server:
        name = asyncio.run(server.create(*_statements()))

        @contextlib.asynccontextmanager
        async def driver() -> AsyncIterator[list[Login]]:
            connections = [
                await asyncpg.connect(
                    host=server.host, port=server.port, user=server.user, password=server.password, database=name,
                    ssl=False,
                )
                for _ in range(POOL)
            ]  # fmt: skip

            async def login(find: Any, rights: Any, number: int) -> None:
                row = await find.fetchrow(user(number))
                check(row["password"])
                assert len(await rights.fetch(user(number), "c")) == 1

            logins: list[Login] = []
            for connection in connections:
                find = await connection.prepare(USER.format("$1"))
                rights = await connection.prepare(ACL.format("$1", "$2"))

                logins.append(partial(login, find, rights))
            yield logins
            for connection in connections:
                connection.terminate()

        yield Subject(_sql_table(dsn=server.dsn(name), password=server.password), driver)


@contextlib.contextmanager
def mysql(where: Path) -> Iterator[Subject]:
    import asyncmy

    with sql_servers.mariadb() as server:
        name = asyncio.run(server.create(*_statements()))

        @contextlib.asynccontextmanager
        async def driver() -> AsyncIterator[list[Login]]:
            connections = [
                await asyncmy.connect(
                    host=server.host, port=server.port, user=server.user, password=server.password, database=name,
                    autocommit=True,
                )
                for _ in range(POOL)
            ]  # fmt: skip

            async def login(connection: Any, number: int) -> None:
                async with connection.cursor() as cursor:
                    await cursor.execute(USER.format("%s"), (user(number),))
                    check((await cursor.fetchone())[1])
                    await cursor.execute(ACL.format("%s", "%s"), (user(number), "c"))
                    assert len(await cursor.fetchall()) == 1

            yield [partial(login, connection) for connection in connections]
            for connection in connections:
                connection.close()

        yield Subject(_sql_table(dsn=server.dsn(name), password=server.password), driver)


@contextlib.contextmanager
def sqlite(where: Path) -> Iterator[Subject]:
    path = where / "accounts.db"
    path.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as database:
        for text in _statements():
            database.execute(text)
        database.commit()

    @contextlib.asynccontextmanager
    async def driver() -> AsyncIterator[list[Login]]:
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)

        async def login(number: int) -> None:
            row = database.execute(USER.format("?"), (user(number),)).fetchone()
            check(row[1])
            assert len(database.execute(ACL.format("?", "?"), (user(number), "c")).fetchall()) == 1

        yield [login]
        database.close()

    yield Subject(_sql_table(path=str(path)), driver)


@contextlib.contextmanager
def redis(where: Path) -> Iterator[Subject]:
    from redis.asyncio import Redis

    with nosql_servers.redis() as server:
        store = server.connect()
        for number in range(USERS):
            store.hset(f"mqtt_user:{user(number)}", mapping={"password": HASH})
            store.hset(f"mqtt_acl:{user(number)}", mapping={"a/%u/#": "3"})

        @contextlib.asynccontextmanager
        async def driver() -> AsyncIterator[list[Login]]:
            clients = [Redis(host=server.host, port=server.port, single_connection_client=True) for _ in range(POOL)]

            async def login(client: Any, number: int) -> None:
                password, _ = await client.hmget(f"mqtt_user:{user(number)}", ["password", "is_superuser"])
                check(password)
                assert len(await client.hgetall(f"mqtt_acl:{user(number)}")) == 1

            yield [partial(login, await client.initialize()) for client in clients]
            for client in clients:
                await client.aclose()

        yield Subject({"servers": (server.address,), "password_hash": "sha256"}, driver)


@contextlib.contextmanager
def mongodb(where: Path) -> Iterator[Subject]:
    from pymongo import AsyncMongoClient

    with nosql_servers.mongodb() as server:
        store: Any = server.connect()["mqtt"]
        store["mqtt_user"].insert_many([{"username": user(n), "password": HASH} for n in range(USERS)])
        store["mqtt_acl"].insert_many([{"username": user(n), "pubsub": ["a/%u/#"]} for n in range(USERS)])
        store["mqtt_user"].create_index("username")
        store["mqtt_acl"].create_index("username")

        @contextlib.asynccontextmanager
        async def driver() -> AsyncIterator[list[Login]]:
            client: Any = AsyncMongoClient([server.address], maxPoolSize=POOL, directConnection=True)
            users, rights = client["mqtt"]["mqtt_user"], client["mqtt"]["mqtt_acl"]

            async def login(number: int) -> None:
                (found,) = await users.find({"username": user(number)}, limit=2).to_list()
                check(found["password"])
                assert len(await rights.find({"username": user(number)}, limit=10).to_list()) == 1

            yield [login] * POOL
            await client.close()

        table = {"servers": (server.address,), "database": "mqtt", "password_hash": "sha256"}
        yield Subject(table, driver)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    body = json.dumps({"result": "allow", "acl": [{"permission": "allow", "action": "all", "topic": "a/#"}]}).encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            assert json.loads(await reader.readexactly(length))["password"] == PASSWORD.decode()
            writer.write(answer)
    writer.close()


def _serve(port: Any) -> None:
    async def main() -> None:
        server = await asyncio.start_server(_answer, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@contextlib.contextmanager
def http(where: Path) -> Iterator[Subject]:
    import aiohttp

    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_serve, args=(its,), daemon=True)
    process.start()
    try:
        if not mine.poll(20):
            raise RuntimeError("the HTTP service does not start")
        url = f"http://127.0.0.1:{mine.recv()}/login"

        @contextlib.asynccontextmanager
        async def driver() -> AsyncIterator[list[Login]]:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=POOL)) as session:

                async def login(number: int) -> None:
                    body = {"clientid": "c", "username": user(number), "password": PASSWORD.decode()}
                    async with session.post(url, json=body) as answer:
                        found = json.loads(await answer.read())
                        assert found["result"] == "allow"
                        assert len(found["acl"]) == 1

                yield [login] * POOL

        yield Subject({"url": url}, driver)
    finally:
        process.kill()
        process.join(5)


@contextlib.contextmanager
def jwt(where: Path) -> Iterator[Subject]:
    from joserfc import jws
    from joserfc.jwk import OctKey

    def made(number: int) -> bytes:
        claims = {"exp": int(time.time()) + 36_000, "sub": user(number), "acl": {"all": ["a/%u/#"]}}
        parts = [_base64(json.dumps(part, separators=(",", ":")).encode()) for part in ({"alg": "HS256"}, claims)]
        signature = hmac.digest(SECRET.encode(), b".".join(parts), "sha256")
        return b".".join([*parts, _base64(signature)])

    tokens = [made(number) for number in range(USERS)]

    @contextlib.asynccontextmanager
    async def driver() -> AsyncIterator[list[Login]]:
        key = OctKey.import_key(SECRET)

        async def login(number: int) -> None:
            claims = json.loads(jws.deserialize_compact(tokens[number], key, algorithms=["HS256"]).payload)
            assert claims["exp"] > time.time()
            assert claims["sub"] == user(number)

        yield [login]

    yield Subject({"secret": SECRET}, driver, lambda number: tokens[number])


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


@contextlib.contextmanager
def file(where: Path) -> Iterator[Subject]:
    """Passwords as `isthmus user add` stores them: a login costs what each guess costs a thief."""
    import argon2

    stored = hash_password(PASSWORD)
    path = where / "passwords"
    path.write_text("".join(f"{user(number)}:{stored}\n" for number in range(USERS)))

    @contextlib.asynccontextmanager
    async def driver() -> AsyncIterator[list[Login]]:
        with ThreadPoolExecutor(POOL) as threads:
            loop, hasher = asyncio.get_running_loop(), argon2.PasswordHasher()

            async def login(number: int) -> None:
                await loop.run_in_executor(threads, hasher.verify, stored, PASSWORD)

            yield [login] * min(POOL, 4)

    yield Subject({"passwords": str(path)}, driver, users=50, at_once=POOL)


SUBJECTS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Subject]]] = {
    "ldap": ldap, "postgresql": postgresql, "mysql": mysql, "redis": redis, "mongodb": mongodb, "http": http,
    "jwt": jwt, "sqlite": sqlite, "file": file,
}  # fmt: skip


# --- measuring -------------------------------------------------------------------------------------------------------


class Channel:
    """What the gate sees of a connection; `done` hears how it ended."""

    __slots__ = ("done", "identity", "listener", "peer", "peerhost")

    def __init__(self, listener: Any, done: Callable[[int], None]) -> None:
        self.listener = listener
        self.identity = None
        self.peer = "127.0.0.1:5000"
        self.peerhost = "127.0.0.1"
        self.done = done

    def accept(self, principal: Any) -> None:
        self.done(0)

    def refuse(self, code: int) -> None:
        self.done(code)


async def rate(logins: list[Login], users: int, seconds: float) -> float:
    """Logins a second of that many workers."""
    end = time.perf_counter() + seconds
    count = 0
    following = iter(range(1 << 60))

    async def work(login: Login) -> None:
        nonlocal count
        while time.perf_counter() < end:
            await login(next(following) % users)
            count += 1

    began = time.perf_counter()
    await asyncio.gather(*(work(login) for login in logins))
    return count / (time.perf_counter() - began)


def through(gate: AccessGate, subject: Subject) -> Login:
    """Logins as the engine asks for them."""
    listener = SimpleNamespace(name="tcp", auth=None, privileged=False, attributes={})
    connects = [
        SimpleNamespace(client_id="c", username=user(number), password=subject.password(number))
        for number in range(subject.users)
    ]

    async def login(number: int) -> None:
        code: int | None = None
        answered: asyncio.Future[None] | None = None

        def done(answer: int) -> None:
            nonlocal code
            code = answer
            if answered is not None:
                answered.set_result(None)

        gate.authenticate(Channel(listener, done), connects[number])
        if code is None:  # asked by a task
            answered = asyncio.get_running_loop().create_future()
            await answered
        if code:
            raise AssertionError(f"{user(number)} was refused with 0x{code:02x}: {gate.status()}")

    return login


@contextlib.asynccontextmanager
async def opened(kind: str, subject: Subject, **access: Any) -> AsyncIterator[Login]:
    gate = AccessGate(settings(instance(load("auth", kind), {"pool": POOL, **subject.table}), **access))
    await gate.open()
    try:
        yield through(gate, subject)
    finally:
        await gate.close()


async def measure(kind: str, subject: Subject, seconds: float, rounds: int) -> tuple[float, float, float]:
    found: tuple[list[float], list[float], list[float]] = ([], [], [])
    async with (
        subject.driver() as loop,
        opened(kind, subject, cache_ttl=0.0) as cold,
        opened(kind, subject, cache_ttl=3_600.0) as cached,
    ):
        for number in range(subject.users):
            await cached(number)
        await rate([cold] * subject.at_once, subject.users, seconds / 4)
        await rate(loop, subject.users, seconds / 4)
        for _ in range(rounds):
            found[0].append(await rate(loop, subject.users, seconds))
            found[1].append(await rate([cold] * subject.at_once, subject.users, seconds))
            found[2].append(await rate([cached], subject.users, seconds))
    driver, slow, fast = map(statistics.median, found)
    return driver, slow, fast


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("backends", nargs="*", metavar="BACKEND", help=", ".join(SUBJECTS))
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name in options.backends:
        if name not in SUBJECTS:
            parser.error(f"{name}: not one of {', '.join(SUBJECTS)}")
    logging.disable(logging.WARNING)  # that sha256 is weak
    built, listed = compiled()
    print(f"{len(built)} of {len(listed)} modules compiled; {POOL} connections")
    print(f"{'':<12}{'driver/s':>10}{'cold/s':>10}{'of it':>8}{'cached/s':>10}")
    for kind in options.backends or SUBJECTS:
        with ExitStack() as stack:
            where = Path(tempfile.mkdtemp(prefix="isthmus-logins-"))
            stack.callback(shutil.rmtree, where, True)
            try:
                subject = stack.enter_context(SUBJECTS[kind](where))
            except servers.Absent as error:
                print(f"{kind:<12}{error}")
                continue
            with asyncio.Runner(loop_factory=_loop) as runner:
                driver, cold, cached = runner.run(measure(kind, subject, options.seconds, options.rounds))
            print(f"{kind:<12}{driver:>10,.0f}{cold:>10,.0f}{cold / driver:>7.0%} {cached:>10,.0f}", flush=True)
    return 0


def _loop() -> asyncio.AbstractEventLoop:
    """The broker's loop."""
    import uvloop

    return uvloop.new_event_loop()


if __name__ == "__main__":
    sys.exit(main())

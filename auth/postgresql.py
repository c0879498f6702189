"""Users and rights in PostgreSQL: EMQ's tables, EMQX's, or a query of one's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ClassVar

from pydantic import Field

from auth._sql import SqlAuth, SqlConfig
from broker.connectors import postgresql
from broker.connectors.sql_text import Dialect
from broker.extend.registry import Backend


class PostgresConfig(postgresql.PostgresServer, SqlConfig):
    """`[auth.postgresql]`"""

    changes: str = Field(default="", max_length=63)
    """Channel of ``NOTIFY`` that tells what changed: each payload is a user name, or ``*`` or nothing for everybody.
    Their remembered verdicts and rights are read again at once, e.g. by a trigger on both tables that says
    ``perform pg_notify('mqtt_changes', coalesce(new.username, old.username))``. Empty: they are read again after
    `cache_ttl` and `refresh`."""

    dialect: ClassVar[Dialect] = "postgresql"


class Postgres(SqlAuth):
    """Asks the tables; hears about their changes."""

    def __init__(self, config: PostgresConfig, pool: postgresql.PostgresPool) -> None:
        super().__init__(config, pool)
        self.on_change: Callable[[str | None], object] | None = None
        """Told which user's rights changed, None: anybody's may have."""
        self._listener: asyncio.Task[None] | None = None
        if config.changes:
            listening = pool.listen(config.changes, self._heard)
            self._listener = asyncio.get_running_loop().create_task(listening, name="postgresql changes")

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait({self._listener}, timeout=1.0)
        await super().close()

    def _heard(self, payload: str | None) -> None:
        if self.on_change is not None:
            self.on_change(None if payload in (None, "", "*") else payload)


async def open_postgresql(config: PostgresConfig) -> Postgres:
    writes = config.upgrade_to is not None
    timeout = config.timeout or 3.0
    return Postgres(config, postgresql.PostgresPool(config, size=config.pool, timeout=timeout, writes=writes))


BACKEND = Backend("auth.postgresql", PostgresConfig, open_postgresql, extra="postgresql")

"""Users and rights in MySQL or MariaDB: EMQ's tables, EMQX's, or a query of one's own."""

from __future__ import annotations

from typing import ClassVar

from auth._sql import SqlAuth, SqlConfig
from broker.connectors import mysql
from broker.connectors.sql_text import Dialect
from broker.extend.registry import Backend


class MySqlConfig(mysql.MySqlServer, SqlConfig):
    """`[auth.mysql]`"""

    dialect: ClassVar[Dialect] = "mysql"


async def open_mysql(config: MySqlConfig) -> SqlAuth:
    writes = config.upgrade_to is not None
    timeout = config.timeout or 3.0
    pool = mysql.MySqlPool(config, size=config.pool, timeout=timeout, writes=writes)
    return SqlAuth(config, pool)


BACKEND = Backend("auth.mysql", MySqlConfig, open_mysql, extra="mysql")

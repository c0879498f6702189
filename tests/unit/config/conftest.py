"""A conf.d to write into, and backends that need no driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from broker.config.problems import ConfigError
from broker.config.settings import Settings, load_settings
from broker.config.template import Template
from broker.config.types import ConfigPath, Duration, Secret
from broker.extend import registry
from broker.extend.registry import Backend, InstanceConfig
from broker.extend.session import SessionSpec
from broker.extend.sink import SinkConfig


class Group(BaseModel, extra="forbid"):
    dn: str
    publish: tuple[str, ...] = ()


class DirectoryConfig(InstanceConfig):
    """Stands for LDAP."""

    servers: tuple[str, ...]
    """Addresses."""
    bind_password: Secret = Secret()
    user_filter: Template = Template("(uid=${username})")
    timeout: Duration = 3.0
    ca: ConfigPath | None = None
    groups: dict[str, Group] = Field(default={})


class FileConfig(InstanceConfig):
    """Stands for files of users and rules."""

    passwords: ConfigPath
    rules: ConfigPath | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.passwords.exists():
            yield "passwords", f"{self.passwords} is not there"


class StoreConfig(SinkConfig):
    """Stands for any sink."""

    path: ConfigPath
    table: str = "messages"


class LinkTopic(BaseModel, extra="forbid"):
    filter: str
    qos: int = Field(default=0, ge=0, le=2)


class LinkConfig(InstanceConfig):
    """Stands for a bridge."""

    servers: tuple[str, ...] = ()
    topics: tuple[LinkTopic, ...] = ()

    def session(self) -> SessionSpec:
        return SessionSpec(filters=tuple((t.filter, t.qos) for t in self.topics))


async def _open(config: Any) -> Any:
    raise AssertionError("nothing is opened here")


KINDS = {
    "auth.ldap": DirectoryConfig,
    "auth.file": FileConfig,
    "sinks.sqlite": StoreConfig,
    "bridges.mqtt": LinkConfig,
}


@pytest.fixture(autouse=True)
def _backends(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.load

    def load(room: str, kind: str) -> Backend:
        model = KINDS.get(f"{room}.{kind}")
        return Backend(f"{room}.{kind}", model, _open) if model else real(room, kind)

    monkeypatch.setattr(registry, "load", load)


Write = Callable[..., Path]
Load = Callable[..., Settings]
Problems = Callable[..., list[str]]


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    folder = tmp_path / "conf.d"
    folder.mkdir()
    return folder


@pytest.fixture
def load(conf: Path) -> Load:
    """`load(a="text of a.toml", b=…)`: the settings of these fragments and those already written."""

    def run(*, sets: tuple[str, ...] = (), environ: dict[str, str] | None = None, **texts: str) -> Settings:
        for name, text in texts.items():
            (conf / f"{name}.toml").write_text(text)
        return load_settings(conf, sets=sets, environ=environ or {})

    return run


@pytest.fixture
def problems(load: Load) -> Problems:
    """Like `load`, for configurations that are wrong: the problems found."""

    def run(**arguments: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(**arguments)
        return caught.value.problems

    return run

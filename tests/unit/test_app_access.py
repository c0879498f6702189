"""How the application and access control go together: whose connection it is, and a reload that is taken back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from broker.access.passwords import hash_password
from broker.access.principal import Principal
from broker.admin.commands import ReloadRefused
from broker.app import Broker
from broker.config.settings import Settings, load_settings
from tests.unit.access.doubles import Channel, Login

BASE = '[broker]\ndata = "data"\n[listeners.tcp]\nbind = "127.0.0.1:0"\n'
PEOPLE = '[auth.people]\nkind = "file"\npasswords = "{name}"\n'
ELSEWHERE = '[listeners.elsewhere]\nkind = "tcp"\nbind = "192.0.2.1:1"\nallow_cleartext = true\n'


class Site:
    """A broker whose gate and listeners are open, over a folder of fragments."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.conf = where / "conf.d"
        self.conf.mkdir()
        self.users("old")
        self.write(BASE, PEOPLE.format(name="old"))
        (where / "data").mkdir()
        self.broker = Broker(self.load(), self.load, log_format="text", log_level="info")

    def load(self) -> Settings:
        return load_settings(self.conf, environ={})

    def write(self, *texts: str) -> None:
        (self.conf / "00.toml").write_text("".join(texts))

    def users(self, name: str) -> None:
        (self.where / name).write_text(f"{name}:{hash_password('pw', 'bcrypt')}\n")

    async def code(self, username: str) -> int | None:
        """How a login ends."""
        return (await Login(self.broker.gate)(username, b"pw")).code

    async def refused(self) -> str:
        """What a reload that does not come about says."""
        with pytest.raises(ReloadRefused) as caught:
            await self.broker.reload()
        return str(caught.value)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    broker = site.broker
    await broker.gate.open()
    await broker.listeners.apply(broker.settings.listeners)
    yield site
    await broker.supervisor.close()
    await broker.listeners.close_all()
    await broker.gate.close()
    broker._node.release()


async def test_a_principal_is_present_while_its_own_connection_is(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client id alone says nothing: somebody else may have it now."""
    here, before, away = Principal("c"), Principal("c"), Principal("away")
    sessions = {
        "c": SimpleNamespace(principal=here, channel=object()), "away": SimpleNamespace(principal=away, channel=None),
    }  # fmt: skip
    monkeypatch.setattr(site.broker, "engine", SimpleNamespace(sessions=sessions))
    present = site.broker.gate.present
    assert present is not None
    assert [present(one) for one in (here, before, away, Principal("ended"))] == [True, False, False, False]


async def test_c08_what_a_refused_reload_let_in_does_not_stay(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[Channel] = []
    gate = site.broker.gate
    replace = gate.replace

    async def replaced(settings: Any) -> None:
        await replace(settings)
        if not came:
            came.append(Login(gate).start(None, None))

    class Engine:
        def clients(self) -> list[Channel]:
            return came

    monkeypatch.setattr(gate, "replace", replaced)
    monkeypatch.setattr(site.broker, "engine", Engine())
    site.write(BASE, PEOPLE.format(name="old"), "[access]\nallow_anonymous = true\n", ELSEWHERE)
    told = await site.refused()
    assert "listeners.elsewhere" in told
    assert told.endswith("; nothing was changed")
    assert [(channel.code, channel.told) for channel in came] == [(0, 0x87)]
    assert gate.settings is site.broker.settings
    assert Login(gate).start(None, None).code == 0x87


async def test_c08_access_rules_that_cannot_be_put_back_are_named_and_taken_up_by_the_next_reload(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    broker = site.broker
    (site.where / "old").rename(site.where / "moved")
    site.users("new")
    site.write(BASE, PEOPLE.format(name="new"), ELSEWHERE)
    told = await site.refused()
    assert "listeners.elsewhere" in told, "why it was refused"
    assert str(site.where / "old") in told, "why it was not undone"
    assert "those of the new configuration are in force" in told
    assert "nothing was changed" not in told
    assert [await site.code(name) for name in ("old", "new")] == [0x86, 0], "and they are"
    caplog.clear()
    await broker.reload_logged()
    assert "those of the new configuration are in force" in caplog.text
    assert "nothing was changed" not in caplog.text
    # back to what was: no difference to the settings, but one to what is in force
    (site.where / "moved").rename(site.where / "old")
    site.write(BASE, PEOPLE.format(name="old"))
    async with asyncio.timeout(10):
        assert (await broker.reload()).empty
    assert [await site.code(name) for name in ("old", "new")] == [0, 0x86]
    assert broker.gate.settings is broker.settings

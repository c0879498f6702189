"""The shipped example for Active Directory, with the addresses and names of a real domain put in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from broker.access.gate import AccessGate
from broker.config.settings import Settings, load_settings
from tests import fragments
from tests.servers import Samba
from tests.unit.access.doubles import Login


def example(directory: Samba, where: Path) -> Settings:
    host = directory.ldaps_url
    fragments.secret(where, "ad", directory.service_password)
    text = fragments.shipped(
        "20-auth-ad.toml",
        ('["ldaps://dc1.corp.example", "ldaps://dc2.corp.example"]', f'["{host}"]'),
        ('# ca = "tls/corp-ca.pem"', f'ca = "{directory.ca}"'),
        ("CN=isthmus,OU=Service Accounts,DC=corp,DC=example", directory.service_dn),
        ('base_dn = "DC=corp,DC=example"', f'base_dn = "{directory.base_dn}"'),
        ("CN=MQTT Sensors,OU=Groups,DC=corp,DC=example", f"CN=sensors,{directory.groups_dn}"),
        ("CN=Plant Operators,OU=Groups,DC=corp,DC=example", f"CN=operators,{directory.groups_dn}"),
        ('timeout = "3s"', 'timeout = "10s"'),
    )
    (where / "conf.d").mkdir()
    (where / "conf.d" / "20-auth-ad.toml").write_text(text)
    return load_settings(where / "conf.d")


async def test_groups_within_groups_become_rights_and_disabled_accounts_stay_out(samba: Samba, tmp_path: Path) -> None:
    gate = AccessGate(example(samba, tmp_path))
    await gate.open()
    try:
        log = Login(gate)

        async def login(name: str, password: str | None = None) -> Any:
            return await log(name, (password or f"{name}-pw").encode(), f"c-{name}")

        alice, bob, carol = [(await login(name)).principal for name in ("alice", "bob", "carol")]
        assert gate.may_publish(alice, "telemetry/alice/t") == 1
        assert gate.may_publish(alice, "commands/x") == 0
        assert gate.may_publish(bob, "commands/x") == 1
        assert gate.may_publish(carol, "commands/x") == 1, "by way of night-shift"
        assert gate.may_subscribe(carol, "telemetry/#") == 1
        assert gate.may_publish(carol, "telemetry/carol/t") == 0
        for name, password in (("disabled", None), ("alice", "bob-pw"), ("nobody", None)):
            assert (await login(name, password)).code == 0x86
    finally:
        await gate.close()

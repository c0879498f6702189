"""What becomes of an entry once it is read, and which keys belong to which mode; no directory is needed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from auth.ldap import HashCompare, LdapConfig
from broker.connectors.ldap import Entry
from broker.extend.auth import Client, Grant

HASH = "{SSHA}" + base64.b64encode(hashlib.sha1(b"pwsalt").digest() + b"salt").decode()
ENTRY = {"uid": [b"u"], "userpassword": [HASH.encode()], "l": [b"north"]}
GROUPS = {"all": {"dn": "cn=all,dc=x", "publish": ["${attr.l}/#", "${attr.USERPASSWORD}/#"]}}


class Pool:
    """Finds one entry, with the attributes that are asked for, and its group."""

    async def find(self, base: str, query: str, attributes: Sequence[str] = (), **how: Any) -> list[Entry]:
        if "member=" in query:
            return [Entry("cn=all,dc=x", {})]
        wanted = {name.lower() for name in attributes}
        return [Entry("uid=u,dc=x", {name: values for name, values in ENTRY.items() if name in wanted})]

    async def close(self) -> None: ...


def config(**more: Any) -> LdapConfig:
    return LdapConfig.model_validate({"servers": ["ldap://127.0.0.1"], "tls": "none", "base_dn": "dc=x", **more})


@pytest.mark.parametrize("name", ["userPassword", "USERPASSWORD"])
async def test_a_stored_hash_is_compared_and_seen_by_nothing_else(name: str) -> None:
    """Neither is it kept with the verdict, nor can a rule put it into a topic."""
    pool: Any = Pool()
    backend = HashCompare(config(mode="hash", password_attribute=name, groups=GROUPS), pool)
    try:
        for answer in (await backend.authenticate(Client("c", "u"), b"pw"), await backend.rules(Client("c", "u"))):
            assert isinstance(answer, Grant)
            assert answer.attributes == {"uid": "u", "l": "north"}
    finally:
        await backend.close()


@pytest.mark.parametrize("key", ["max_bind_failures", "bind_failure_window"])
def test_a_limit_of_binds_is_refused_where_nobody_is_bound(key: str) -> None:
    with pytest.raises(ValidationError, match=rf"{key}: leave it out"):
        config(mode="hash", **{key: 5})
    assert config(mode="hash").mode == "hash"
    assert getattr(config(**{key: 5}), key) == 5

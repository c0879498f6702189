"""Editing the accounts that are kept on this machine: a file of users, an SQLite file."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from auth.file import FileConfig, open_file
from auth.sqlite import BACKEND, SqliteConfig
from broker.access.password_file import FileError, PasswordFile, read_passwords
from broker.access.passwords import hash_password
from broker.extend.auth import Account, AccountError, Accounts, Client, Grant, Verdict

HASH = hash_password("pw")
OTHER = hash_password("other")


def test_comments_order_owner_and_links_stay(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_text(f"# ours\nalice:{HASH}\n#bob:{HASH}\nbob:{HASH}")
    real.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(real)
    file = PasswordFile(link)
    file.passwd("alice", OTHER)
    file.add("carol", HASH)
    file.delete("bob")
    assert real.read_text() == f"# ours\nalice:{OTHER}\n#bob:{HASH}\ncarol:{HASH}\n"
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert file.users() == [Account("alice", "argon2"), Account("carol", "argon2")]
    assert sorted(os.listdir(tmp_path)) == ["link", "real"], "nothing is left lying about"


@pytest.mark.parametrize("name", ["", "#x", "a:b", "a\nb", "a\0b", "a\tb"])
def test_a_name_that_would_be_read_as_something_else_is_refused(tmp_path: Path, name: str) -> None:
    file = PasswordFile(tmp_path / "passwords")
    with pytest.raises(AccountError):
        file.add(name, HASH)
    assert not (tmp_path / "passwords").exists()


def test_a_damaged_file_is_not_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "passwords"
    path.write_text("alice:nonsense\n")
    file = PasswordFile(path)
    for verb, arguments in ((file.add, ("bob", HASH)), (file.passwd, ("alice", HASH)), (file.delete, ("alice",))):
        with pytest.raises(FileError, match="passwords:1"):
            verb(*arguments)
    assert path.read_text() == "alice:nonsense\n"


def test_an_edit_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "passwords"
    path.write_text(f"alice:{HASH}\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        PasswordFile(path).add("bob", HASH)
    assert read_passwords(path).keys() == {"alice"}
    assert os.listdir(tmp_path) == ["passwords"]


def test_edits_at_the_same_time_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "passwords"
    names = [f"u{number}" for number in range(12)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: PasswordFile(path).add(name, HASH), names, timeout=30))
    assert sorted(read_passwords(path)) == sorted(names)


def test_a_superuser_is_not_deleted_under_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "passwords"
    path.write_text(f"root:{HASH}\n")
    accounts = FileConfig(passwords=path, superusers=("root",)).accounts()
    assert accounts.users() == [Account("root", "argon2", True)]
    with pytest.raises(AccountError, match="superusers"):
        accounts.delete("root")


@pytest.fixture(params=["file", "emq", "emqx"])
def accounts(request: pytest.FixtureRequest, tmp_path: Path) -> Accounts:
    if request.param == "file":
        return FileConfig(passwords=tmp_path / "passwords").accounts()
    return SqliteConfig(path=tmp_path / "users.db", create=True, tables=request.param).accounts()


def test_accounts_are_added_changed_and_deleted(accounts: Any) -> None:
    assert accounts.users() == []
    accounts.add("bob", HASH)
    accounts.add("alice", HASH)
    assert sorted(one.name for one in accounts.users()) == ["alice", "bob"]
    with pytest.raises(AccountError, match="already"):
        accounts.add("bob", OTHER)
    accounts.passwd("bob", OTHER)
    accounts.delete("alice")
    for verb, arguments in ((accounts.passwd, ("alice", HASH)), (accounts.delete, ("alice",))):
        with pytest.raises(AccountError, match="no user 'alice'"):
            verb(*arguments)
    assert accounts.users() == [Account("bob", "argon2")]


@pytest.mark.parametrize("tables", ["emq", "emqx"])
async def test_a_changed_password_replaces_a_salted_one(tmp_path: Path, tables: Any) -> None:
    config = SqliteConfig(path=tmp_path / "users.db", create=True, tables=tables, watch=0)
    config.accounts().add("alice", HASH)
    column = "password" if tables == "emq" else "password_hash"
    with sqlite3.connect(config.path) as connection:
        connection.execute(f"update mqtt_user set {column} = '{'0' * 64}', salt = 'salt'")
    assert config.accounts().users() == [Account("alice", "as password_hash says")]
    config.accounts().passwd("alice", OTHER)
    backend = await BACKEND.open(config.named("local"))
    try:
        assert isinstance(await backend.authenticate(Client("c", "alice"), b"other"), Grant)
        assert await backend.authenticate(Client("c", "alice"), b"pw") is Verdict.DENY
    finally:
        await backend.close()


def test_tables_of_ones_own_are_not_edited(tmp_path: Path) -> None:
    own = "select password from people where name = ${username}"
    with pytest.raises(AccountError, match="statement of its own"):
        SqliteConfig(path=tmp_path / "x.db", authenticate=own).accounts()
    with pytest.raises(AccountError, match=r"x\.db"):
        SqliteConfig(path=tmp_path / "x.db").accounts().users()
    (tmp_path / "rules").write_text("topic a\n")
    with pytest.raises(AccountError, match="no file of passwords"):
        FileConfig(rules=tmp_path / "rules").accounts()


async def test_a_file_that_is_read_again_and_is_not_right_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "passwords"
    path.write_text(f"alice:{HASH}\n")
    backend = await open_file(FileConfig(passwords=path))
    try:
        path.write_text(f"alice:{OTHER}\nbob\n")
        with pytest.raises(FileError):
            await backend.reread()
        assert await backend.authenticate(Client("c", "alice"), b"pw") is Verdict.ALLOW
        path.write_text(f"alice:{OTHER}\n")
        await asyncio.wait_for(backend.reread(), 5)
        assert await backend.authenticate(Client("c", "alice"), b"pw") is Verdict.DENY
    finally:
        await backend.close()

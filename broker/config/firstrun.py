"""The first start of a new installation: one user, one rule, and two lines to try them with."""

from __future__ import annotations

import os
import secrets
import shlex
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from broker.config import fingerprint
from broker.config.listeners import TcpListener

if TYPE_CHECKING:
    from broker.config.settings import Instance, Settings

USER = "demo"
RULES = f"""# written by the first run, in the form of mosquitto's acl_file
user {USER}
topic readwrite telemetry/{USER}/#
"""
OWN_TOPICS = """# written with the first account, in the form of mosquitto's acl_file
pattern readwrite telemetry/%u/#
"""


def pending(settings: Settings) -> Instance | None:
    """The `kind = "file"` instance whose passwords file is still to be made: inside the data folder and not there."""
    folders = (settings.broker.data, settings.base / "data")
    for instance in settings.auth.values():
        passwords = getattr(instance.config, "passwords", None)
        if instance.kind != "file" or not isinstance(passwords, Path) or os.path.lexists(passwords):
            continue
        if any(folder in passwords.parents for folder in folders):
            return instance
    return None


def prepare(settings: Settings) -> list[str]:
    """Create the user `demo` with a random password and the right to `telemetry/demo/#`; return what to print.

    Does nothing and returns nothing unless the passwords file is still to be made. The passwords file comes last, so
    that what was interrupted is done again.
    """
    instance = pending(settings)
    if instance is None:
        return []
    import argon2  # needed once in the life of an installation

    passwords: Path = instance.config.passwords  # type: ignore[attr-defined]
    rules: Path | None = getattr(instance.config, "rules", None)
    passwords.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    password_file = passwords.parent / "demo-password"
    password = secrets.token_urlsafe(15)
    _write(password_file, password + "\n")
    if rules is not None and not os.path.lexists(rules):
        rules.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(rules, RULES)
    _write(passwords, f"{USER}:{argon2.PasswordHasher().hash(password)}\n")
    key = f"auth.{instance.name}"
    settings.fingerprints[key] = fingerprint.of("auth", {**instance.raw, "kind": instance.kind}, instance.config)
    return [
        f"first start: user {USER}, password in {password_file}. Publish as it:",
        *(_publish(listener, password_file) for listener in _plain(settings)[:1]),
        *_look(settings),
    ]


def add_rules(instance: Instance) -> Path | None:
    """Before the first run somebody made an account, so there will be no user `demo`; the file of rules, if it is still
    to be made too, gives every user a folder of topics. Returns it when it was made."""
    rules: Path | None = getattr(instance.config, "rules", None)
    if rules is None or os.path.lexists(rules):
        return None
    rules.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(rules, OWN_TOPICS)
    return rules


def _write(path: Path, text: str) -> None:
    """The whole file or none of it, readable by this user alone."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    os.replace(fresh, path)


def _plain(settings: Settings) -> list[TcpListener]:
    return [listener for listener in settings.listeners.values() if isinstance(listener, TcpListener)]


def _publish(listener: TcpListener, password: Path) -> str:
    host = "127.0.0.1" if listener.bind.any else listener.bind.host
    secret = f'"$(cat {shlex.quote(str(password))})"'
    return (
        f"  mosquitto_pub -h {shlex.quote(host)} -p {listener.bind.port} -u {USER} -P {secret} -q 1"
        f" -t telemetry/{USER}/room -m 21.5"
    )


def _look(settings: Settings) -> list[str]:
    for instance in settings.sinks.values():
        path, table = getattr(instance.config, "path", None), getattr(instance.config, "table", None)
        if instance.kind == "sqlite" and isinstance(path, Path) and isinstance(table, str):
            url = f"file:{quote(str(path))}?mode=ro"
            query = f"select * from {table} order by rowid desc limit 5"
            code = f'import sqlite3; print(*sqlite3.connect("{url}", uri=True).execute("{query}"), sep="\\n")'
            return ["and see it arrive:", f"  python3 -c {shlex.quote(code)}"]
    return []

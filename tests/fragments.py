"""The shipped fragments, with the addresses of the tests' own servers put in."""

from __future__ import annotations

from pathlib import Path

CONF = Path(__file__).resolve().parent.parent / "conf.d"


def shipped(name: str, *changes: tuple[str, str]) -> str:
    """Text of `conf.d/NAME` (or its `.example`) after the changes; each must apply, or the example has drifted away."""
    path = next(p for p in (CONF / name, CONF / f"{name}.example") if p.exists())
    text = path.read_text("utf-8")
    for old, new in changes:
        if text.count(old) != 1:
            raise ValueError(f"{path.name} holds {old!r} {text.count(old)} times, not once")
        text = text.replace(old, new)
    return text


def base(port: int = 0) -> str:
    """`00-broker.toml` on a port of its own."""
    return shipped("00-broker.toml", ("127.0.0.1:1883", f"127.0.0.1:{port}"))


def ldap(url: str, where: Path, password: str) -> str:
    """`20-auth-ldap.toml`; writes the bind password to `secrets/ldap` beside `conf.d`."""
    secret(where, "ldap", password)
    return shipped("20-auth-ldap.toml", ("ldap://127.0.0.1:389", url))


def kafka(bootstrap: str, topic: str = "telemetry") -> str:
    """`30-sink-kafka.toml`."""
    changes = [("127.0.0.1:9092", bootstrap)]
    if topic != "telemetry":
        changes.append(('topic = "telemetry"', f'topic = "{topic}"'))
    return shipped("30-sink-kafka.toml", *changes)


def sqlite() -> str:
    """`31-sink-sqlite.toml` as it is."""
    return shipped("31-sink-sqlite.toml")


def bridge(url: str, where: Path, password: str) -> str:
    """`40-bridge-hq.toml`; writes the password to `secrets/hq` beside `conf.d`."""
    secret(where, "hq", password)
    return shipped("40-bridge-hq.toml", ("mqtt://127.0.0.1:1884", url))


def secret(where: Path, name: str, text: str) -> None:
    """A file that only we can read, for `${file:secrets/NAME}`."""
    folder = where / "secrets"
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o600)

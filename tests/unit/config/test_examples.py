"""The shipped fragments are what they say: each loads, and each kind and real-world case has one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.config import reference
from broker.config.problems import ConfigError
from broker.config.settings import ROOMS, Settings, load_settings
from broker.extend import registry
from tests.servers import Certificates

FRAGMENTS = reference.fragments()
TARGET = re.compile(r"^# To use it: .*?copy it to (\S+),", re.MULTILINE)

Put = Callable[..., Path]


@pytest.fixture(autouse=True)
def _backends() -> None:
    """The real ones, not the doubles of this folder's other tests."""


@pytest.fixture
def put(tmp_path: Path, certs: Certificates) -> Put:
    """Copies fragments into an empty conf.d, with the secrets and certificates they name beside it."""

    def put(*names: str) -> Path:
        conf = tmp_path / "conf.d"
        conf.mkdir()
        for path in FRAGMENTS:
            if path.name.removesuffix(".example") not in names:
                continue
            shutil.copy(path, conf / path.name.removesuffix(".example"))
            for name in re.findall(r"\$\{file:([^}]+)\}", path.read_text("utf-8")):
                secret = tmp_path / name
                secret.parent.mkdir(mode=0o700, exist_ok=True)
                secret.write_text("secret")
                secret.chmod(0o600)
        (tmp_path / "tls").mkdir()
        for name, source in (
            ("server.pem", certs.server),
            ("server.key", certs.server_key),
            ("devices-ca.pem", certs.ca),
        ):
            shutil.copy(source, tmp_path / "tls" / name)
        return conf

    return put


def load(conf: Path) -> Settings:
    try:
        return load_settings(conf, environ={})
    except ConfigError as error:
        pytest.fail("\n".join(error.problems))


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.name)
def test_every_shipped_fragment_loads_beside_those_of_a_new_installation(put: Put, path: Path) -> None:
    name = path.name.removesuffix(".example")
    needed = ["20-auth-ldap.toml"] if name.startswith("05-") else []  # its listener asks the directory
    settings = load(put("00-broker.toml", "10-accounts.toml", name, *needed))
    assert settings.warnings == []
    files = {instance.origin.partition(":")[0] for room in ROOMS for instance in getattr(settings, room).values()}
    assert f"conf.d/{name}" in files or name.startswith(("00-", "05-", "50-"))
    assert settings.events.publish or not name.startswith("50-")


def test_all_fragments_load_together(put: Put) -> None:
    """Names and listeners of the examples do not clash: all may be enabled at once."""
    settings = load(put(*(path.name.removesuffix(".example") for path in FRAGMENTS)))
    assert len(settings.auth) >= 11
    assert len(settings.sinks) >= 7


@pytest.mark.parametrize("path", [p for p in FRAGMENTS if p.suffix == ".example"], ids=lambda path: path.name)
def test_an_example_says_to_which_name_it_is_copied(path: Path) -> None:
    assert TARGET.findall(path.read_text("utf-8")) == [path.name.removesuffix(".example")]


@pytest.mark.parametrize("name", [f"{room}.{kind}" for room in ROOMS for kind in registry.kinds(room)])
def test_every_backend_has_an_example(name: str) -> None:
    assert list(reference.examples(*name.split(".")))


@pytest.mark.parametrize(
    ("fragment", "table", "values"),
    [
        ("20-auth-ad.toml", "auth.ad", {"nested_groups": "ad"}),
        ("20-auth-ldap.toml", "auth.ldap", {"nested_groups": "walk"}),
        ("21-auth-postgresql.toml", "auth.plant", {"tables": "emq"}),
        ("27-auth-jwt.toml", "auth.jwt", {"acl_claim": "acl"}),
    ],
)
def test_examples_show_the_cases_people_have(put: Put, fragment: str, table: str, values: dict[str, object]) -> None:
    room, name = table.split(".")
    config = getattr(load(put("00-broker.toml", fragment)), room)[name].config
    assert {key: getattr(config, key) for key in values} == values

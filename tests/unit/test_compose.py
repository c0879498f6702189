"""What lies in compose/ holds together: files that exist, pinned images, a picture whose fragments load.

No container engine is needed: what only one can tell is not asked here.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from broker.cli.main import program
from broker.config.settings import Settings, load_settings
from tests import servers

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent.parent
COMPOSE = ROOT / "compose"
FILES = sorted(COMPOSE.glob("*.yaml"))
PICTURE = COMPOSE / "compose.yaml"
PINNED = re.compile(r"[a-z0-9/.-]+:(?=[^:]*\d\.\d)[A-Za-z0-9._-]+")


def parse(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return value


def whole() -> dict[str, dict[str, Any]]:
    """The services of the picture with those of the files it includes."""
    picture = parse(PICTURE)
    services = dict(picture["services"])
    for name in picture["include"]:
        services.update(parse(COMPOSE / name)["services"])
    return services


def services() -> Iterator[tuple[Path, str, dict[str, Any]]]:
    for path in FILES:
        for name, service in parse(path)["services"].items():
            yield path, name, service


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile line by line, continued ones joined."""
    text = (COMPOSE / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in lines)]


def copied() -> list[str]:
    """What the Dockerfile takes from the checkout."""
    sources = [rest.split()[:-1] for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    return [source for line in sources for source in line]


def sent(path: str) -> bool:
    """Whether .dockerignore lets a file through: of the patterns that match it or a folder above, the last decides."""
    through = True
    parts = path.split("/")
    above = {"/".join(parts[:count]) for count in range(1, len(parts) + 1)}
    for line in (COMPOSE / "Dockerfile.dockerignore").read_text("utf-8").splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        anywhere = pattern.removeprefix("**/")
        hit = any(fnmatch.fnmatchcase(name, pattern) for name in above)
        hit = hit or (anywhere != pattern and any(fnmatch.fnmatchcase(part, anywhere) for part in parts))
        if hit:
            through = line.startswith("!")
    return through


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    environ = {name: str(value) for name, value in whole()["broker"]["environment"].items()}
    return load_settings(COMPOSE / "conf.d", data=tmp_path / "data", environ=environ)


@pytest.mark.parametrize("path", [path for path in FILES if path != PICTURE], ids=lambda path: path.name)
def test_a_file_is_one_service_of_the_same_name(path: Path) -> None:
    assert list(parse(path)["services"]) == [path.stem]


def test_every_image_is_pinned_or_built_here() -> None:
    for path, name, service in services():
        image = service.get("image", "")
        assert PINNED.fullmatch(image) or image.endswith(":local"), f"{path.name}: {name}: {image!r}"
    built = {service["image"] for _, _, service in services() if "build" in service}
    assert {s["image"] for _, _, s in services() if s["image"].endswith(":local")} == built
    inline = [
        service["build"]["dockerfile_inline"] for _, _, service in services() if "dockerfile_inline" in str(service)
    ]
    bases = [line.split()[1] for text in inline for line in text.splitlines() if line.startswith("FROM")]
    bases += [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert len(bases) == 3
    assert [base for base in bases if not PINNED.fullmatch(base)] == []


def test_the_kafka_of_containers_and_of_tests_is_the_same() -> None:
    assert {s["image"] for _, _, s in services() if "kafka" in s["image"]} == {f"apache/kafka:{servers.KAFKA_VERSION}"}


def test_every_port_is_open_on_this_machine_only() -> None:
    ports = [port for _, _, service in services() for port in service.get("ports", ())]
    assert len(ports) >= 8
    assert [port for port in ports if not re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z]+_PORT:-\d+\}:\d+", port)] == []
    assert len({port.partition("{")[2].partition(":")[0] for port in ports}) == len(ports), "a variable each"


def test_every_mounted_file_exists_and_is_read_only() -> None:
    named = parse(PICTURE)["volumes"]
    for path, name, service in services():
        for mount in service.get("volumes", ()):
            source, mode = mount.partition(":")[0], mount.rpartition(":")[2]
            if source in named:
                continue
            assert (path.parent / source).exists(), f"{path.name}: {name}: {mount}"
            assert mode == "ro", f"{path.name}: {name}: {mount}"
        for used in service.get("configs", ()):
            assert used["source"] in parse(path)["configs"]


def test_whoever_is_waited_for_says_when_it_is_ready() -> None:
    there = whole()
    for name, service in there.items():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert there[other]["healthcheck"]["test"][0] == "CMD", f"{name} waits for {other}"
            else:
                assert how["condition"] == "service_completed_successfully"
                assert there[other]["restart"] == "no"
    assert set(there["broker"]["depends_on"]) == {"people", "topic", "postgresql", "mosquitto"}


def test_the_fragments_of_the_picture_load_without_a_warning(settings: Settings) -> None:
    assert settings.warnings == []
    assert (list(settings.auth), list(settings.sinks), list(settings.bridges)) == (
        ["ldap"],
        ["kafka", "readings"],
        ["hq"],
    )
    published = whole()["broker"]["ports"][0].rpartition(":")[2]
    assert [listener.bind.port for listener in settings.listeners.values()] == [int(published)]  # type: ignore[attr-defined]


def test_the_fragments_name_services_at_the_ports_they_listen_on() -> None:
    there = whole()
    text = "".join(path.read_text("utf-8") for path in (COMPOSE / "conf.d").glob("*.toml"))
    found = dict(re.findall(r'[/"@]([a-z]+):(\d+)[/"]', text))
    inside = {name: {port.rpartition(":")[2] for port in there[name]["ports"]} for name in found}
    inside["kafka"] |= set(re.findall(r"0\.0\.0\.0:(\d+)", there["kafka"]["environment"]["KAFKA_LISTENERS"]))
    assert set(found) == {"slapd", "kafka", "postgresql", "mosquitto"}
    assert [name for name, port in found.items() if port not in inside[name]] == []
    advertised = there["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert f"://kafka:{found['kafka']}" in advertised, "clients in the network are sent there"


def test_the_fragments_name_what_the_services_are_filled_with(settings: Settings) -> None:
    people = (COMPOSE / "people.ldif").read_text("utf-8")
    entries = re.findall(r"^dn: (.+)$", people, re.MULTILINE)
    ldap: Any = settings.auth["ldap"].config
    assert {group.dn for group in ldap.groups.values()} <= set(entries)
    assert ldap.base_dn in entries
    assert set(re.findall(r"^member: (.+)$", people, re.MULTILINE)) <= set(entries)
    slapd = parse(COMPOSE / "slapd.yaml")["configs"]["slapd"]["content"]
    assert f'rootdn "{ldap.bind_dn}"' in slapd
    assert f"rootpw {ldap.bind_password.reveal()}\n" in slapd

    readings: Any = settings.sinks["readings"].config
    table = re.search(r"create table (\w+) \((.+)\);", (COMPOSE / "readings.sql").read_text("utf-8"), re.DOTALL)
    assert table is not None
    assert table[1] == readings.table
    assert re.findall(r"^\s+(\w+) ", table[2], re.MULTILINE) == list(readings.columns)
    own = whole()["postgresql"]["environment"]
    assert (own["POSTGRES_USER"], own["POSTGRES_DB"]) == ("mqtt", "plant")
    assert readings.password.reveal() == own["POSTGRES_PASSWORD"]
    assert f"--topic={settings.sinks['kafka'].config.topic}" in whole()["topic"]["command"]  # type: ignore[attr-defined]


def test_the_broker_of_the_picture_can_do_nothing_it_need_not() -> None:
    broker = whole()["broker"]
    assert broker["read_only"] is True
    assert broker["cap_drop"] == ["ALL"]
    assert broker["security_opt"] == ["no-new-privileges:true"]
    assert broker["build"] == {"context": "..", "dockerfile": "compose/Dockerfile"}
    assert "data:/isthmus/data" in broker["volumes"]


def test_the_image_is_built_in_two_stages_and_runs_as_nobody_in_particular() -> None:
    lines = instructions()
    stages = [index for index, (word, _) in enumerate(lines) if word == "FROM"]
    assert len(stages) == 2
    last = lines[stages[1] :]
    assert not any("gcc" in rest for _, rest in last)
    (user,) = [rest for word, rest in last if word == "USER"]
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user), "a number: whoever runs it can see that it is not root"
    words = [word for word, _ in last]
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert ("VOLUME", "/isthmus/data") in last
    assert ("WORKDIR", "/isthmus") in last
    (health,) = [rest for word, rest in last if word == "HEALTHCHECK"]
    command = re.search(r'CMD \["isthmus", "(\w+)"', health)
    (start,) = [re.fullmatch(r'\["(\w+)"\]', rest) for word, rest in last if word == "CMD"]
    assert command is not None
    assert start is not None
    assert {command[1], start[1]} <= set(program.list_commands(click.Context(program)))  # type: ignore[attr-defined]


def test_what_the_image_copies_is_there_is_sent_and_is_enough_for_the_build() -> None:
    assert [source for source in copied() if not (ROOT / source).exists() or not sent(source)] == []
    assert not sent("secrets/ldap")
    assert not sent(".git/config")
    assert not sent("data/passwords")
    assert not sent("broker/engine/core.cpython-312-x86_64-linux-gnu.so")
    assert sent("broker/engine/core.pxd")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = {pattern.partition(".")[0] for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    needed = {
        "pyproject.toml",
        "setup.py",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *packages,
    }
    assert needed <= set(copied())

"""Fragments are written whole or not at all, and whatever a source holds ends as a result or a sentence."""

from __future__ import annotations

import errno
import os
import random
import tomllib
from pathlib import Path

import pytest

from broker.config.problems import ConfigError
from broker.importers.findings import Findings, Secret
from broker.importers.fragments import Fragment, Taken, land, render, settle
from tests.unit.importers import test_emqx4, test_emqx5, test_mosquitto
from tests.unit.importers.imported import LISTENER, invoke

VALUES = [
    "plain",
    'quote " backslash \\ tab \t line \n',
    "control \x01 \x1f \x7f \u2028 é",
    "${env:HOME} ${file:/etc/passwd} ${username} $${x}",
    "",
    7,
    100_000_000,
    0.5,
    True,
    ["a", "b"],
    [],
    {"a": "x", "b c": ["y"]},
    {},
]


@pytest.mark.parametrize("value", VALUES)
def test_every_value_is_read_back_as_it_was(tmp_path: Path, value: object) -> None:
    found = Findings(tmp_path / "source.conf")
    found.table("bridges", "b").set("key", value)
    (fragment,) = render(found).values()
    read = tomllib.loads(fragment.text)["bridges"]["b"]["key"]
    if isinstance(value, str) and "${env:" in value:
        assert read == value.replace("${env:", "$${env:").replace("${file:", "$${file:")
    else:
        assert read == value


@pytest.mark.parametrize(
    "value", ["mysql://u:p@h/d", ["u:p@h:1"], Secret("x"), [Secret("x")], {"a": {"b": Secret("x")}}]
)
def test_a_secret_anywhere_hides_its_fragment(tmp_path: Path, value: object) -> None:
    found = Findings(tmp_path / "source.conf")
    found.table("bridges", "b").set("key", value)
    found.table("broker").set("name", "x")
    assert {name: fragment.secret for name, fragment in render(found).items()} == {
        "00-broker.toml": False,
        "40-bridge-b.toml": True,
    }


def test_a_fragment_that_appears_meanwhile_stops_it_and_what_was_written_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.toml").write_text("mine")
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    with pytest.raises(Taken, match=r"b\.toml: is there already; nothing was written"):
        land({"a.toml": Fragment("a"), "b.toml": Fragment("b")}, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b.toml": "mine"}


def test_a_dangling_link_is_something_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.toml").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Taken):
        land({"a.toml": Fragment("a")}, tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_secrets_are_hidden_from_the_first_byte_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        paths = land({"a.toml": Fragment("a", True), "b.toml": Fragment("b")}, tmp_path)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o600, 0o644]


def test_more_tables_than_anybody_writes_are_refused(tmp_path: Path) -> None:
    """In time: a file of four megabytes may hold a hundred thousand."""
    source = tmp_path / "mosquitto.conf"
    source.write_text("".join(f"listener {port} 127.0.0.1\n" for port in range(1, 60_000)))
    done = invoke("mosquitto", source, tmp_path / "conf.d")
    assert done.exit_code == 2
    assert done.stderr == f"{source}:1001: more than 1000 listeners, backends, sinks and bridges\n"


def test_control_characters_of_a_source_are_shown_and_not_sent_to_the_terminal(tmp_path: Path) -> None:
    source = tmp_path / "mosquitto.conf"
    source.write_text("\x1b[31mred a\n\x1b[31mred b\n")
    done = invoke("mosquitto", source, tmp_path / "conf.d")
    assert (done.exit_code, done.stderr) == (2, f"{source}:2: \\x1b[31mred stands in {source}:1 already\n")


@pytest.mark.parametrize(
    "text", ["listener \u00b2\n", f"listener {'1' * 5000}\n", f"{LISTENER}max_connections {'1' * 5000}\n"]
)
def test_digits_that_are_no_number_of_ours(tmp_path: Path, text: str) -> None:
    source = tmp_path / "mosquitto.conf"
    source.write_text(text)
    done = invoke("mosquitto", source, tmp_path / "conf.d")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"{source}:")


def test_what_cannot_be_put_right_is_said(tmp_path: Path) -> None:
    found = Findings(tmp_path / "source.conf")
    found.table("limits").set("max_inflight", 5)
    with pytest.raises(ConfigError, match="somebody else"):
        settle(found, lambda fragments: ["conf.d/99-mine.toml:1: somebody else's mistake"])


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, conf = tmp_path / "mosquitto.conf", tmp_path / "conf.d"
    source.write_text("listener 1883 127.0.0.1\n")

    def full(descriptor: int) -> None:
        if len(list(conf.iterdir())) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    done = invoke("mosquitto", source, conf)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"{conf}: No space left on device; nothing was written\n"
    assert list(conf.iterdir()) == []


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    source = tmp_path / "mosquitto.conf"
    source.write_text("listener 1883 127.0.0.1\n")
    done = invoke("mosquitto", source, source / "conf.d")
    assert done.exit_code == 2
    assert "is not a folder" in done.stderr


@pytest.mark.parametrize(
    ("kind", "text"), [("mosquitto", test_mosquitto.PLANT), ("emqx", test_emqx5.PLANT), ("emqx", test_emqx4.PLANT)]
)
def test_c14_a_damaged_source_ends_as_a_result_or_a_sentence(tmp_path: Path, kind: str, text: str) -> None:
    """C-14. Forty sources with some characters changed, lines left out and lines doubled, the same each time."""
    chance = random.Random(7)
    for number in range(40):
        rows = text.splitlines(keepends=True)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(rows))
            rows[at : at + 1] = chance.choice(([], [rows[at]] * 2, [rows[at].replace(" ", "", 1)]))
        damaged = list("".join(rows))
        for _ in range(chance.randrange(4)):
            damaged[chance.randrange(len(damaged))] = chance.choice("\"'{}[]=.,:#$%\\ \n\x01é9-")
        source = tmp_path / f"{number}.conf"
        source.write_text("".join(damaged))
        done = invoke(kind, source, tmp_path / str(number))
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        assert done.exit_code in (0, 2)
        assert done.exit_code == 0 or f"{source}:" in done.stderr

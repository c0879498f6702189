"""What is in several files, what cannot be read, and what is there already."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from broker.cli.main import program
from tests.unit.importers.imported import BRIDGE, LISTENER, Import, invoke

# what is in several files ---------------------------------------------------------------------------------------------


def test_included_files_are_read_in_the_order_of_their_names_each_from_the_start(run: Import) -> None:
    """What stands first in an included file belongs to no listener of the file before it; a comes before B."""
    files = {
        "more/B.conf": "max_queued_messages 7\nlistener 1885 127.0.0.1\nmax_connections 5\n",
        "more/a.conf": "port 1884\nbind_address 127.0.0.1\n",
        "more/ignored.txt": "nonsense\n",
    }
    done = run("mosquitto", f"{LISTENER}include_dir more\nmax_connections 9\n", files)
    assert {name: table.get("max_connections") for name, table in done.at("listeners").items()} == {
        "tcp": None,
        "tcp-1883": 9,
        "tcp-1885": 5,
    }
    assert done.at("limits.max_queued_messages") == 7
    assert done.check() == (0, "")


def test_a_line_of_an_included_file_is_named_with_that_file(run: Import) -> None:
    done = run("mosquitto", f"{LISTENER}include_dir more\n", {"more/x.conf": "\n\nlog_dest stdout\n"})
    (row,) = done.lost
    assert row.startswith(f"{done.source.parent}/more/x.conf:3: log_dest: ")


def test_an_included_file_includes_nothing(run: Import) -> None:
    """mosquitto reads include_dir in its main file alone."""
    files = {"more/x.conf": "include_dir deeper\n", "more/deeper/y.conf": "listener 1999\n"}
    done = run("mosquitto", f"{LISTENER}include_dir more\n", files)
    assert list(done.at("listeners")) == ["tcp"]
    (row,) = done.lost
    assert row.startswith(f"{done.source.parent}/more/x.conf:1: include_dir: ")


def test_upper_case_comes_before_lower_case_of_the_same_letter(run: Import) -> None:
    files = {f"more/{name}.conf": f"listener {port} 127.0.0.1\n" for name, port in (("a", 3), ("B", 4), ("A", 2))}
    done = run("mosquitto", f"{LISTENER}include_dir more\n", files)
    assert [table["bind"] for table in done.at("listeners").values()] == [
        f"127.0.0.1:{port}" for port in (1883, 2, 3, 4)
    ]


# refusals -------------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_and_then_nothing_is_written_at_all(run: Import, tmp_path: Path) -> None:
    conf = tmp_path / "out" / "conf.d"
    conf.mkdir(parents=True)
    (conf / "40-bridge-b.toml").write_text("# mine\n")
    done = run("mosquitto", BRIDGE)
    assert done.code == 2
    assert done.stdout == ""
    assert done.stderr == f"{conf}/40-bridge-b.toml: is there already; nothing was written\n"
    assert done.written == {"40-bridge-b.toml": "# mine\n"}


def test_fragments_of_other_names_stay_and_count(run: Import, tmp_path: Path) -> None:
    conf = tmp_path / "out" / "conf.d"
    conf.mkdir(parents=True)
    (conf / "99-mine.toml").write_text("[limits]\nmax_inflight = 3\n")
    done = run("mosquitto", LISTENER)
    assert done.code == 0
    assert "conf.d/99-mine.toml:2: limits.max_inflight: also set at conf.d/00-broker.toml" in done.stderr
    assert done.check() == (0, "")


def test_a_folder_whose_own_fragments_are_wrong_is_left_alone(run: Import, tmp_path: Path) -> None:
    conf = tmp_path / "out" / "conf.d"
    conf.mkdir(parents=True)
    (conf / "99-mine.toml").write_text("[limits]\nmax_inflihgt = 3\n")
    done = run("mosquitto", LISTENER)
    assert done.code == 2
    assert done.stderr == "conf.d/99-mine.toml:2: limits.max_inflihgt: unknown key, did you mean max_inflight?\n"
    assert list(done.written) == ["99-mine.toml"]


SYNTAX = [
    ("listener", "1: listener needs a value"),
    (f"{LISTENER}remote_passwords3cret", "2: expected NAME VALUE"),
    (f"{LISTENER}max_inflight_messages many", "2: max_inflight_messages is a whole number"),
    ("allow_anonymous maybe", "1: allow_anonymous is true or false"),
    ("listener here", "1: listener begins with a port"),
    ("listener 70000", "1: port 70000 is not between 1 and 65535"),
    (f"{LISTENER}topic a/# out", "2: topic stands before any connection"),
    (f"{LISTENER}connection b\ntopic a/#", "2: connection: there is no address"),
    (f"{LISTENER}connection b\naddress x\ntopic a/# sideways", "4: topic: the direction is out, in or both"),
    (f"{LISTENER}connection b\naddress x\ntopic a/# out 3", "4: topic: the QoS is 0, 1 or 2"),
    (
        f"{LISTENER}connection b\naddress x\ntopic a out 1 l r x",
        "4: topic: write PATTERN DIRECTION QOS LOCAL-PREFIX REMOTE-PREFIX",
    ),
    (
        "persistent_client_expiration soon",
        "1: persistent_client_expiration is a number with h, d, w, m or y, such as 14d",
    ),
    (
        "persistent_client_expiration 0h",
        "1: persistent_client_expiration is a number with h, d, w, m or y, such as 14d",
    ),
    (f"{BRIDGE}bridge_psk 00", "5: bridge_identity and bridge_psk need each other"),
    (f"{BRIDGE}restart_timeout a b", "5: restart_timeout is a number of seconds, or the shortest and the longest"),
    (f"{BRIDGE}bridge_protocol_version mqttv6", "5: bridge_protocol_version is one of mqttv31, mqttv311, mqttv50"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), SYNTAX)
def test_what_cannot_be_understood_is_named_with_file_and_line(run: Import, text: str, wanted: str) -> None:
    run("mosquitto", f"{text}\n").refused(wanted)


def test_a_setting_that_is_there_twice(run: Import) -> None:
    done = run("mosquitto", f"pid_file a\npid_file b\n{LISTENER}")
    assert (done.code, done.stderr) == (2, f"{done.source}:2: pid_file stands in {done.source}:1 already\n")


def test_a_file_that_includes_its_own_folder_ends(run: Import) -> None:
    done = run("mosquitto", "include_dir .\n")
    assert done.code == 2
    assert done.stderr == f"{done.source}:1: include_dir: this file itself is in that folder\n"


@pytest.mark.parametrize(
    ("data", "text"), [(b"\xff\xfe", ":1: is not UTF-8 text"), (b"a\0b", ":1: holds a NUL character")]
)
def test_what_is_no_text(tmp_path: Path, data: bytes, text: str) -> None:
    source = tmp_path / "mosquitto.conf"
    source.write_bytes(data)
    done = invoke("mosquitto", source, tmp_path / "conf.d")
    assert (done.exit_code, done.stderr) == (2, f"{source}{text}\n")


def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    """C-12"""
    for path, text in ((tmp_path / "gone", "cannot be read: No such file or directory"), (tmp_path, "cannot be read")):
        done = invoke("mosquitto", path, tmp_path / "conf.d")
        assert done.exit_code == 2
        assert done.stderr.startswith(f"{path}: {text}")


def test_the_folder_may_be_that_of_conf_and_must_be_named(tmp_path: Path) -> None:
    source = tmp_path / "mosquitto.conf"
    source.write_text(LISTENER)
    missing = CliRunner().invoke(program, ["import", "mosquitto", str(source)])
    assert missing.exit_code == 2
    assert "--out" in missing.stderr
    done = CliRunner().invoke(program, ["import", "mosquitto", str(source), "--conf", str(tmp_path / "conf.d")])
    assert done.exit_code == 0
    assert (tmp_path / "conf.d" / "00-broker.toml").exists()


def test_a_setting_on_the_command_line_counts_for_the_verdict(run: Import, tmp_path: Path) -> None:
    source = tmp_path / "mosquitto.conf"
    source.write_text(LISTENER)
    done = invoke("mosquitto", source, tmp_path / "c", "--set", "limits.nonsense=1")
    assert done.exit_code == 2
    assert "limits.nonsense" in done.stderr


@pytest.mark.parametrize("option", ["--log-level=debug", "--log-format=json"])
@pytest.mark.parametrize("kind", ["mosquitto", "emqx"])
def test_there_is_no_log_and_nothing_to_say_about_one(tmp_path: Path, kind: str, option: str) -> None:
    source = tmp_path / "mosquitto.conf"
    source.write_text(LISTENER)
    done = invoke(kind, source, tmp_path / "c", option)
    assert done.exit_code == 2
    assert f"No such option '{option.partition('=')[0]}'" in done.stderr
    assert not (tmp_path / "c").exists()

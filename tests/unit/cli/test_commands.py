"""The command line: options on either side, outputs, exit codes. The running broker is played by a function."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import argon2
import click
import pytest
from click.testing import CliRunner, Result

from broker.admin import control
from broker.cli.main import program

Invoke = Callable[..., Result]


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "conf.d"
    folder.mkdir()
    (folder / "00.toml").write_text('[broker]\nname = "n1"\n[access]\nallow_anonymous = true\n')
    return folder


@pytest.fixture
def invoke(conf: Path) -> Invoke:
    def run(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(program, list(arguments), **options)

    return run


class Broker:
    """Answers what the test put there; remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[Path, str, dict[str, Any]]] = []

    def __call__(self, path: Path, command: str, **arguments: Any) -> Any:
        self.asked.append((path, command, arguments))
        answer = self.answers[command]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    played = Broker()
    monkeypatch.setattr(control, "request", played)
    return played


def test_common_options_stand_before_or_after_the_command(invoke: Invoke) -> None:
    for arguments in (("--set", "broker.name=x", "config", "show"), ("config", "show", "--set", "broker.name=x")):
        assert 'broker.name = "x"' in invoke(*arguments).stdout
    both = invoke("--set", "limits.max_inflight=3", "config", "show", "--set", "broker.name=x").stdout
    assert 'broker.name = "x"' in both
    assert "limits.max_inflight = 3" in both


def test_every_command_has_help_that_names_the_common_options() -> None:
    def walk(command: click.Command, path: tuple[str, ...]) -> None:
        result = CliRunner().invoke(program, [*path, "--help"])
        assert result.exit_code == 0, path
        if isinstance(command, click.Group):
            for name in command.list_commands(click.Context(command)):
                inner = command.get_command(click.Context(command), name)
                assert inner is not None
                if path[:1] != ("bench",):
                    walk(inner, (*path, name))
        else:
            assert "--conf" in result.stdout, path
            assert command.help, path

    walk(program, ())


@pytest.mark.parametrize("arguments", [("nonsense",), ("check", "--nonsense"), ("clients", "show"), ("auth", "test")])
def test_a_wrong_command_line_is_2(invoke: Invoke, arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments).exit_code == 2


# check


def test_check_is_0_for_a_good_configuration_and_changes_nothing(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("check")
    assert (result.exit_code, result.stdout) == (0, "ok: listeners tcp; auth -; sinks -; bridges -\n")
    assert [path.name for path in tmp_path.iterdir()] == ["conf.d"]


def test_c01_check_is_2_and_names_file_line_key_and_what_was_meant(invoke: Invoke, conf: Path) -> None:
    (conf / "10.toml").write_text("\n[limits]\nmax_inflihgt = 1\n")
    result = invoke("check")
    assert result.exit_code == 2
    assert result.stderr == "conf.d/10.toml:3: limits.max_inflihgt: unknown key, did you mean max_inflight?\n"


def test_c07_strict_makes_a_key_set_twice_an_error(invoke: Invoke, conf: Path) -> None:
    (conf / "10.toml").write_text('[broker]\nname = "n2"\n')
    lenient, strict = invoke("check"), invoke("check", "--strict")
    assert (lenient.exit_code, strict.exit_code) == (0, 2)
    place = "conf.d/10.toml:2: broker.name: also set at conf.d/00.toml:2; this one wins\n"
    assert (lenient.stderr, strict.stderr) == (f"warning: {place}", f"error: {place}")


def test_c15_check_prints_json_for_programs(invoke: Invoke, conf: Path) -> None:
    assert json.loads(invoke("check", "--json").stdout) == {"ok": True, "problems": [], "warnings": [], "backends": []}
    (conf / "10.toml").write_text("[limits\n")
    result = invoke("check", "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert not found["ok"]
    assert found["problems"][0].startswith("conf.d/10.toml:1: not valid TOML")


def test_c15_check_says_what_start_would_say_about_files_of_users_and_rules(
    invoke: Invoke, conf: Path, tmp_path: Path
) -> None:
    (tmp_path / "users").write_text("")
    (tmp_path / "rules").write_text("topic read a\nie#\n")
    (conf / "10.toml").write_text('[auth.accounts]\nkind = "file"\npasswords = "users"\nrules = "rules"\n')
    result = invoke("check")
    assert result.exit_code == 2  # C-08
    assert result.stderr.startswith(f"conf.d/10.toml:1: auth.accounts: {tmp_path}/rules:2: ")


def test_check_worker_judges_as_beside_a_foreign_broker(invoke: Invoke, conf: Path) -> None:
    sink = '[sinks.s]\nkind = "sqlite"\npath = "x.db"\nfilters = ["a"]\nack = "delivered"\n'
    (conf / "30.toml").write_text(sink)
    told = invoke("check", "--worker")
    assert (told.exit_code, told.stdout) == (0, "ok: listeners tcp; auth -; sinks s; bridges -\n")
    assert told.stderr.startswith("warning: conf.d/30.toml:5: sinks.s.ack: has no effect here")
    assert invoke("check", "--worker", "--strict").exit_code == 2
    (conf / "30.toml").write_text(sink + 'columns = { who = "${username}" }\n')
    refused = invoke("check", "--worker")
    assert refused.exit_code == 2
    assert (
        "conf.d/30.toml:6: sinks.s.columns.who: ${username} in '${username}': only Isthmus itself knows it"
        in refused.stderr
    )
    assert invoke("check").exit_code == 0, "beside Isthmus itself it runs"


def test_connect_opens_each_backend_and_prints_one_line_for_each(invoke: Invoke, conf: Path, tmp_path: Path) -> None:
    (tmp_path / "users").write_text("")
    (conf / "10.toml").write_text(
        '[auth.accounts]\nkind = "file"\npasswords = "users"\n'
        '[bridges.hq]\nkind = "mqtt"\nservers = ["mqtt://127.0.0.1:1"]\n'
        '[[bridges.hq.topics]]\nfilter = "a/#"\ndirection = "out"\n'
    )
    result = invoke("check", "--connect")
    good, bad = result.stdout.splitlines()
    assert good.split()[:2] == ["auth.accounts", "ok"]
    name, verdict, milliseconds, text = bad.split(maxsplit=3)
    assert (name, verdict) == ("bridges.hq", "failed")
    assert int(milliseconds) >= 0
    assert text
    assert result.exit_code == 3


# config


def test_config_show_is_sorted_and_names_origins(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS__LIMITS__MAX_INFLIGHT", "9")
    lines = invoke("config", "show", "--origin", "--set", "broker.durability=none").stdout.splitlines()
    assert lines == sorted(lines)
    assert 'broker.name = "n1"  # conf.d/00.toml:2' in lines
    assert 'broker.durability = "none"  # --set' in lines
    assert "limits.max_inflight = 9  # env ISTHMUS__LIMITS__MAX_INFLIGHT" in lines
    assert "limits.receive_maximum = 1024  # default" in lines


def test_config_show_of_a_key_shows_it_and_what_is_below(invoke: Invoke) -> None:
    assert invoke("config", "show", "broker.name").stdout == 'broker.name = "n1"\n'
    assert len(invoke("config-show", "access").stdout.splitlines()) > 3
    assert invoke("config", "show", "nonsense").exit_code == 1
    assert json.loads(invoke("config", "show", "broker.name", "--json").stdout) == [
        {"key": "broker.name", "value": '"n1"', "origin": "conf.d/00.toml:2"}
    ]


def test_config_show_never_shows_a_secret(invoke: Invoke, conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PW", "hunter2")
    (conf / "40.toml").write_text(
        '[bridges.hq]\nkind = "mqtt"\nservers = ["mqtts://h:1"]\nusername = "u"\npassword = "${env:PW}"\n'
        '[[bridges.hq.topics]]\nfilter = "a/#"\ndirection = "out"\n'
    )
    result = invoke("config", "show", "--origin")
    assert result.exit_code == 0, result.stderr
    assert "hunter2" not in result.output
    assert 'bridges.hq.password = "***"  # conf.d/40.toml:5' in result.stdout


def test_config_diff_compares_the_running_broker_with_the_folder(invoke: Invoke, conf: Path, broker: Broker) -> None:
    from broker.config.options import Options

    broker.answers["config.diff"] = Options(conf=conf).load().fingerprints
    assert (invoke("config", "diff").exit_code, invoke("config", "diff").output) == (0, "")
    (conf / "10.toml").write_text("[limits]\nmax_inflight = 1\n[listeners.ws]\n")
    result = invoke("config", "diff")
    assert (result.exit_code, result.stdout) == (1, "added: listeners.ws\nremoved: listeners.tcp\nchanged: limits\n")
    (conf / "10.toml").write_text("[limits")
    assert invoke("config", "diff").exit_code == 2


def test_config_reference_prints_one_kind_or_names_the_nearest(invoke: Invoke) -> None:
    result = invoke("config", "reference", "sinks.kafka")
    assert result.exit_code == 0
    assert result.stdout.startswith("### sinks.kafka\n")
    assert "conf.d/30-sink-kafka.toml.example" in result.stdout
    wrong = invoke("config", "reference", "kafak")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "did you mean sinks.kafka?" in wrong.stderr


def test_config_schema_is_json_schema_of_every_section(invoke: Invoke) -> None:
    schema = json.loads(invoke("config", "schema").stdout)
    assert set(schema["properties"]) == {
        "broker",
        "access",
        "limits",
        "store",
        "workers",
        "events",
        "listeners",
        "auth",
        "sinks",
        "bridges",
    }
    described = schema["$defs"]["LimitsConfig"]["properties"]["max_inflight"]
    assert (described["minimum"], described["default"]) == (1, 32)
    assert described["description"].startswith("QoS 1 and 2 messages")

    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [v for k, v in value.items() if k == "$ref"] + [r for v in value.values() for r in references(v)]
        return [r for v in value for r in references(v)] if isinstance(value, list) else []

    assert {r.removeprefix("#/$defs/") for r in references(schema)} <= set(schema["$defs"])


# the running broker


@pytest.mark.parametrize(
    "arguments",
    [("status",), ("reload",), ("clients", "list"), ("sinks", "pause", "x"), ("config", "diff"), ("queues", "list")],
)
def test_without_a_broker_the_code_is_4(invoke: Invoke, arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 4
    assert f"no broker is running with the data folder {tmp_path}/data" in result.stderr


def test_the_control_socket_lies_in_the_data_folder(invoke: Invoke, broker: Broker, conf: Path, tmp_path: Path) -> None:
    broker.answers["status"] = {}
    invoke("status")
    invoke("status", "--data", str(tmp_path / "other"))
    (conf / "10.toml").write_text('[broker]\ndata = "var"\n')
    invoke("status")
    assert [path for path, _, _ in broker.asked] == [
        tmp_path / name / "control.sock" for name in ("data", "other", "var")
    ]


def test_reload_prints_four_lines(invoke: Invoke, broker: Broker) -> None:
    broker.answers["reload"] = {
        "added": ["sinks.kafka"], "removed": [], "changed": ["auth.ldap", "limits"], "unchanged": ["broker"],
        "orphans": {"old": 3},
    }  # fmt: skip
    result = invoke("reload")
    assert result.stdout == "added: sinks.kafka\nremoved:\nchanged: auth.ldap limits\nunchanged: broker\n"
    assert "3 messages of old are kept; isthmus queues drop old" in result.stderr
    assert json.loads(invoke("reload", "--json").stdout)["added"] == ["sinks.kafka"]


def test_c02_a_refused_reload_is_2_with_the_brokers_words(invoke: Invoke, broker: Broker) -> None:
    broker.answers["reload"] = control.CommandFailed("conf.d/10.toml:3: limits.x: unknown key", exit=2)
    result = invoke("reload")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "conf.d/10.toml:3: limits.x: unknown key\n"


def test_a_broker_that_does_not_answer_is_1(invoke: Invoke, broker: Broker) -> None:
    broker.answers["status"] = TimeoutError()
    assert invoke("status").exit_code == 1


def test_status_is_readable_and_json(invoke: Invoke, broker: Broker) -> None:
    status = {"name": "n1", "messages": {"in": 1, "dropped": {}}, "sinks": {"kafka": {"state": "running"}}}
    broker.answers["status"] = status
    assert json.loads(invoke("status", "--json").stdout) == status
    assert invoke("status").stdout.splitlines()[:3] == ["name      n1", "messages", "  in       1"]


def test_tables_show_every_row_and_hide_control_characters(invoke: Invoke, broker: Broker) -> None:
    rows = [{"clientid": "a\x1b[31m", "username": None, "connected": True, "queued": 3, "extra": 1}]
    broker.answers["clients.list"] = rows
    text = invoke("clients", "list").stdout
    assert "\x1b" not in text
    assert "a\\x1b[31m" in text
    assert "yes" in text
    assert json.loads(invoke("clients", "list", "--json").stdout) == rows


@pytest.mark.parametrize("room", ["sinks", "bridges"])
def test_instances_are_listed_shown_paused_and_resumed(invoke: Invoke, broker: Broker, room: str) -> None:
    row = {"name": "kafka", "state": "running", "queued": 5, "dropped": {"expired": 2}}
    broker.answers = {f"{room}.list": [row], f"{room}.show": row, f"{room}.pause": {}, f"{room}.resume": {}}
    assert "kafka" in invoke(room, "list").stdout
    assert "queued   5" in invoke(room, "show", "kafka").stdout
    assert (invoke(room, "pause", "kafka").exit_code, invoke(room, "resume", "kafka").exit_code) == (0, 0)
    assert [(c, a) for _, c, a in broker.asked[1:]] == [
        (f"{room}.show", {"name": "kafka"}), (f"{room}.pause", {"name": "kafka"}), (f"{room}.resume", {"name": "kafka"})
    ]  # fmt: skip


def test_an_unknown_name_is_1(invoke: Invoke, broker: Broker) -> None:
    failure = control.CommandFailed("no sink is called 'x'")
    broker.answers = {"sinks.pause": failure, "clients.kick": failure, "queues.drop": failure, "clients.show": failure}
    for arguments in (
        ("sinks", "pause", "x"),
        ("clients", "kick", "x"),
        ("queues", "drop", "x"),
        ("clients", "show", "x"),
    ):
        result = invoke(*arguments)
        assert (result.exit_code, result.stderr) == (1, "no sink is called 'x'\n")


# hash


def test_hash_reads_a_line_and_prints_argon2id(invoke: Invoke) -> None:
    result = invoke("hash", input="sécret word\n")
    assert result.stdout.startswith("$argon2id$")
    assert argon2.PasswordHasher().verify(result.stdout.strip(), "sécret word")
    assert invoke("hash", input="\n").exit_code == 1


# auth test


class Explanation:
    def __init__(self, verdict: str) -> None:
        self.lines = ["ldap: allow", "acl.conf:3: deny"]
        self.verdict = verdict


@pytest.mark.parametrize(("verdict", "code"), [("allow", 0), ("deny", 1), ("error", 3)])
def test_auth_test_ends_with_the_verdict(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, verdict: str, code: int
) -> None:
    asked: dict[str, Any] = {}

    async def explain(settings: Any, **arguments: Any) -> Explanation:
        asked.update(arguments)
        return Explanation(verdict)

    module = pytest.importorskip("broker.access.explain")
    monkeypatch.setattr(module, "explain", explain)
    result = invoke("auth", "test", "--user", "bob", "--client", "c1", "--publish", "a/b", input="pw\n")
    assert result.stdout.splitlines() == ["ldap: allow", "acl.conf:3: deny", verdict]
    assert result.exit_code == code
    assert (asked["username"], asked["clientid"], asked["publish"], asked["peerhost"]) == (
        "bob",
        "c1",
        "a/b",
        "127.0.0.1",
    )
    assert asked["password"] in ("pw", b"pw")
    assert invoke("auth-test", "--client", "c", "--publish", "a", "--subscribe", "b").exit_code == 2


# worker


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the runtime was asked to serve."""
    from broker.runtime import foreign

    seen: list[Any] = []
    monkeypatch.setattr(foreign, "serve", lambda settings, url, only, **more: seen.append((url, only, more)) or 3)
    return seen


def test_worker_hands_settings_address_and_names_to_the_runtime(invoke: Invoke, served: list[Any]) -> None:
    names = ("--only", "a", "--only", "b")
    result = invoke("worker", "--broker", "mqtt://h:1", *names, "--username", "u", "--password-stdin", input="p\n")
    assert result.exit_code == 3
    more = {"username": "u", "password": "p", "tls": None, "insecure": False}
    assert served == [("mqtt://h:1", ["a", "b"], more)]


def test_worker_takes_its_login_from_files_the_environment_or_the_address(
    invoke: Invoke, served: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "pw").write_text("from file\n")
    environment = {"ISTHMUS_WORKER_USERNAME": "env", "ISTHMUS_WORKER_PASSWORD": "from env"}
    invoke("worker", "--broker", "h", "--username", "u", "--password-file", "pw", env=environment)
    invoke("worker", "--broker", "h", env=environment)
    invoke("worker", "--broker", "mqtt://a:b%20c@h")
    assert [(url, m["username"], m["password"]) for url, _, m in served] == [
        ("h", "u", "from file"),
        ("h", "env", "from env"),
        ("mqtt://h", "a", "b c"),
    ]


def test_worker_verifies_the_broker_unless_told_otherwise(invoke: Invoke, served: list[Any]) -> None:
    invoke("worker", "--broker", "mqtts://h")
    invoke("worker", "--broker", "wss://h/mqtt", "--insecure")
    verified, unverified = (more["tls"] for _, _, more in served)
    assert (verified.verify_mode, verified.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert (unverified.verify_mode, unverified.check_hostname) == (ssl.CERT_NONE, False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--broker", "http://h"), "unknown scheme"),
        (("--broker", "mqtt://u:hunter2@h:x"), "not a broker address"),
        (("--broker", "mqtt://h", "--ca", "pem"), "are for mqtts://"),
        (("--broker", "mqtts://h", "--ca", "pem"), "--ca: cannot use pem"),
        (("--broker", "mqtts://h", "--certificate", "pem"), "--certificate: cannot use pem"),
        (("--broker", "mqtts://h", "--key", "pem"), "--key needs --certificate"),
        (("--broker", "mqtts://h", "--ca", "missing"), "does not exist"),
        (("--broker", "h", "--password-stdin", "--password-file", "pem"), "not both"),
    ],
)
def test_worker_refuses_what_cannot_work_with_2(
    invoke: Invoke, served: list[Any], tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "pem").write_text("")
    result = invoke("worker", *arguments)
    assert (result.exit_code, served) == (2, [])
    assert words in result.stderr
    assert "hunter2" not in result.stderr

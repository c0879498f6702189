"""The whole configuration: one form of error, nearest keys, instances, secrets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.config.models import LimitsConfig
from broker.config.settings import Settings, load_settings, restore
from broker.engine.core import Limits

Load = Callable[..., Settings]
Problems = Callable[..., list[str]]

LDAP = '[auth.ldap]\nservers = ["ldap://127.0.0.1"]\n'


def test_c01_an_unknown_key_names_file_line_and_the_nearest_key(conf: Path, problems: Problems) -> None:
    (conf / "20-auth-ldap.toml").write_text('\n\n\n\n[auth.ldap]\nservers = ["x"]\nurll = "ldap://x"\n')
    assert problems() == ["conf.d/20-auth-ldap.toml:7: auth.ldap.urll: unknown key, did you mean servers?"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[broker]\nnaem = 'x'", "conf.d/a.toml:2: broker.naem: unknown key, did you mean name?"),
        ("[brokr]\n", "conf.d/a.toml:1: brokr: unknown key, did you mean broker?"),
        (
            "[broker]\nmax_packet_size = 1",
            "conf.d/a.toml:2: broker.max_packet_size: unknown key, did you mean limits.max_packet_size?",
        ),
        ("[limits]\nmax_inflight = '5'", 'conf.d/a.toml:2: limits.max_inflight: expected a whole number, not "5"'),
        ("[access]\nallow_anonymous = 1", "conf.d/a.toml:2: access.allow_anonymous: expected true or false, not 1"),
        ("[access]\nno_match = 'x'", "conf.d/a.toml:2: access.no_match: expected 'allow' or 'deny', not \"x\""),
        ("[broker]\nname = []", "conf.d/a.toml:2: broker.name: expected text"),
        ("broker = 1", "conf.d/a.toml:1: broker: expected a table"),
        ("[auth.ldap]\ntimeout = '1s'", "conf.d/a.toml:1: auth.ldap.servers: is required"),
        (
            LDAP + "user_filter = '${'",
            "conf.d/a.toml:3: auth.ldap.user_filter: '${': ${ without }; a literal ${ is written $${",
        ),
        (
            LDAP + "[auth.ldap.groups.x]\ndn = 'y'\npublsh = []",
            "conf.d/a.toml:5: auth.ldap.groups.x.publsh: unknown key, did you mean publish?",
        ),
        (LDAP + "groups = { x = { } }", "conf.d/a.toml:3: auth.ldap.groups.x.dn: is required"),
        ("[auth.ldpa]\n", "conf.d/a.toml:1: auth.ldpa.kind: no auth backend is called 'ldpa'"),
        (
            "[listeners.x]\nkind = 'tsl'",
            "conf.d/a.toml:2: listeners.x.kind: no kind of listener is called 'tsl', did you mean tls?",
        ),
        ("[listeners.tcp]\nbind = '1883'", "conf.d/a.toml:2: listeners.tcp.bind: '1883' is not an address"),
        ("[sinks.'a b']\n", 'conf.d/a.toml:1: sinks."a b": a name is made of letters'),
        (
            "[[bridges.mqtt.topics]]\nfilter = 'a'\n[[bridges.mqtt.topics]]\nfilter = 'b'\nqos = 3",
            "conf.d/a.toml:5: bridges.mqtt.topics[1].qos: must be between 0 and 2, not 3",
        ),
    ],
)
def test_c01_what_is_wrong_is_said_in_one_form(problems: Problems, text: str, problem: str) -> None:
    found = problems(a=text)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_all_problems_are_reported_at_once(problems: Problems) -> None:
    found = problems(
        a="[broker]\nx = 1\nname = 2\n[limits]\nmax_inflight = 0\n",
        b="[auth.ldap]\nservers = 5\n[listeners.tcp]\nbind = 'x'\n[nonsense]\n",
    )
    assert [p.partition(": ")[0] for p in found] == [
        "conf.d/a.toml:2", "conf.d/a.toml:3", "conf.d/a.toml:5", "conf.d/b.toml:2", "conf.d/b.toml:4", "conf.d/b.toml:5"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("max_inflight", "0", "must be between 1 and 65535, not 0"),
        ("max_inflight", "-1", "must be between 1 and 65535, not -1"),
        ("max_inflight", "9223372036854775808", "must be between 1 and 65535, not 9223372036854775808"),
        ("max_packet_size", "0", "must be between 128 and 268435460"),
        ("max_packet_size", "'5s'", "is not a size"),
        ("session_expiry", "-1", "must be between 0 and 4294967296 seconds"),
        ("session_expiry", "'1MB'", "is not a duration"),
        ("session_expiry", "inf", "must be between 0 and 4294967296 seconds"),
    ],
)
def test_c20_limits_out_of_range_name_the_range(problems: Problems, key: str, value: str, text: str) -> None:
    (found,) = problems(a=f"[limits]\n{key} = {value}\n")
    assert found.startswith(f"conf.d/a.toml:2: limits.{key}: ")
    assert text in found


@pytest.mark.parametrize(
    ("text", "new"),
    [
        ("[broker]\npersistence_location = 'x'", "broker.data"),
        ("[limits]\nmax_inflight_messages = 5", "limits.max_inflight"),
    ],
)
def test_c09_a_key_that_moved_is_an_error_with_its_new_name(problems: Problems, text: str, new: str) -> None:
    assert problems(a=text)[0].endswith(f"unknown key, it is called {new} here")


def test_every_limit_reaches_the_engine_under_its_own_name() -> None:
    assert set(LimitsConfig.model_fields) == {name for name in dir(Limits()) if not name.startswith("_")}
    assert Limits(**LimitsConfig().model_dump()).max_inflight == 32


def test_a_table_is_an_instance_and_its_name_the_kind(load: Load) -> None:
    settings = load(a=LDAP + '[auth.partners]\nkind = "ldap"\nservers = ["x"]\n')
    assert [(i.name, i.kind, i.room, i.origin) for i in settings.auth.values()] == [
        ("ldap", "ldap", "auth", "conf.d/a.toml:1"), ("partners", "ldap", "auth", "conf.d/a.toml:3")
    ]  # fmt: skip
    assert settings.auth["partners"].config.name == "partners"


def test_instances_keep_the_order_in_which_they_are_read(load: Load) -> None:
    settings = load(b='[auth.z]\nkind = "ldap"\nservers = ["x"]\n', c='[auth.a]\nkind = "ldap"\nservers = ["x"]\n')
    assert list(settings.auth) == ["z", "a"]


def test_a_disabled_table_is_neither_imported_nor_run(load: Load) -> None:
    settings = load(a='[auth.nonsense]\nenabled = false\npassword = "${env:MISSING}"\n', b=LDAP)
    assert list(settings.auth) == ["ldap"]
    assert settings.disabled == ["auth.nonsense"]


def test_a03_a_backend_that_fails_at_import_is_named(problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(room: str, kind: str) -> None:
        raise RuntimeError("no such symbol")

    monkeypatch.setattr("broker.extend.registry.load", load)
    assert problems(a="[auth.ldap]\n") == [
        "conf.d/a.toml:1: auth.ldap.kind: auth/ldap.py cannot be loaded: RuntimeError: no such symbol"
    ]


def test_relative_paths_start_at_the_folder_that_holds_conf_d(load: Load, tmp_path: Path) -> None:
    settings = load(a=LDAP + 'ca = "tls/ca.pem"\n')
    assert settings.auth["ldap"].config.ca == tmp_path / "tls" / "ca.pem"
    assert settings.broker.data == tmp_path / "data"


def test_the_data_folder_of_the_command_line_wins(conf: Path, tmp_path: Path) -> None:
    settings = load_settings(conf, data=tmp_path / "elsewhere", environ={})
    assert settings.broker.data == tmp_path / "elsewhere"
    assert settings.origin("broker.data") == "--data"


# secrets


def test_references_are_filled_in_and_shown_nowhere(load: Load, tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("s3cret\n")
    (tmp_path / "pw").chmod(0o600)
    settings = load(
        a='[auth.ldap]\nservers = ["ldap://${env:HOST}"]\nbind_password = "${file:pw}"\n',
        environ={"HOST": "h0st.example"},
    )
    config = settings.auth["ldap"].config
    assert (config.bind_password.reveal(), config.servers) == ("s3cret", ("ldap://h0st.example",))
    shown = json.dumps(settings.items()) + repr(settings) + str(settings.warnings)
    assert "s3cret" not in shown
    assert 'auth.ldap.bind_password = "***"' in [f"{i.key} = {i.value}" for i in settings.items()]
    assert 'auth.ldap.servers = "***"' in [f"{i.key} = {i.value}" for i in settings.items()]


@pytest.mark.parametrize(
    ("value", "environ", "text"),
    [
        ("${env:X}", {}, "${env:X}: the environment variable is not set; a default is written ${env:X:-default}"),
        ("${env:X}", {"X": ""}, "${env:X}: the environment variable is empty; a default is written ${env:X:-default}"),
        ("${env:}", {}, "${env:}: '' is not the name of an environment variable"),
        ("${file:none}", {}, "${file:none}: the file cannot be read: No such file or directory"),
        ("${file:empty}", {}, "${file:empty}: "),
        ("${file:.}", {}, "${file:.}: "),
        ("${file:/dev/zero}", {}, "${file:/dev/zero}: /dev/zero is not a regular file"),
        ("${file:big}", {}, "${file:big}: "),
    ],
)
def test_c13_a_secret_that_is_not_there_is_an_error(
    problems: Problems, tmp_path: Path, value: str, environ: dict[str, str], text: str
) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "big").write_text("x" * 70_000)
    (found,) = problems(a=LDAP + f'bind_password = "{value}"\n', environ=environ)
    assert found.startswith(f"conf.d/a.toml:3: auth.ldap.bind_password: {text}")


@pytest.mark.parametrize(
    ("content", "secret"), [("a", "a"), ("a\n", "a"), ("a\n\n", "a\n"), ("a\r\n", "a"), (" a ", " a ")]
)
def test_c13_one_newline_at_the_end_of_a_file_is_cut(load: Load, tmp_path: Path, content: str, secret: str) -> None:
    (tmp_path / "pw").write_bytes(content.encode())
    (tmp_path / "pw").chmod(0o600)
    assert load(a=LDAP + 'bind_password = "${file:pw}"\n').auth["ldap"].config.bind_password.reveal() == secret


def test_c13_a_file_everybody_can_read_is_a_warning_only(load: Load, tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("a")
    (tmp_path / "pw").chmod(0o644)
    settings = load(a=LDAP + 'bind_password = "${file:pw}"\n')
    assert settings.warnings == [
        f"conf.d/a.toml:3: auth.ldap.bind_password: {tmp_path}/pw can be read by every user of this machine: "
        f"chmod o-r {tmp_path}/pw"
    ]


def test_a_default_stands_in_for_an_empty_or_missing_variable(load: Load) -> None:
    text = '[auth.ldap]\nservers = ["${env:A:-x}", "${env:B:-}", "${env:C:-z}", "$${env:D}"]\n'
    settings = load(a=text, environ={"A": "", "C": "c"})
    assert settings.auth["ldap"].config.servers == ("x", "", "c", "${env:D}")


def test_a_secret_never_appears_in_an_error(problems: Problems) -> None:
    text = (
        '[auth.ldap]\nservers = "${env:PW}"\nbind_password = 4711\ntimeout = "${env:PW}"\nuser_filter = "${env:PW}${"\n'
        '[access]\nno_match = "${env:PW}"\n'
    )
    found = problems(a=text, environ={"PW": "hunter2"})
    assert len(found) == 5
    assert not any("hunter2" in line or "4711" in line for line in found)


def test_passwords_inside_addresses_are_hidden(load: Load) -> None:
    settings = load(a='[auth.ldap]\nservers = ["ldap://bob:pw@host/x"]\n')
    assert [i.value for i in settings.items() if i.key == "auth.ldap.servers"] == ['["ldap://bob:***@host/x"]']


# what a worker is sent


def test_an_instance_is_restored_from_its_raw_table_through_json(load: Load, tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("s3cret")
    (tmp_path / "pw").chmod(0o600)
    sent = load(
        a='[auth.corp]\nkind = "ldap"\nservers = ["x"]\nbind_password = "${file:pw}"\nca = "ca.pem"\n',
        sets=("auth.corp.timeout=2s",),
    ).auth["corp"]
    back = restore("auth", "corp", json.loads(json.dumps(sent.raw)), tmp_path)
    assert back.config == sent.config
    assert (back.kind, back.config.name) == ("ldap", "corp")


def test_show_lists_every_value_with_its_place_in_the_units_of_the_fragments(load: Load) -> None:
    settings = load(a='[limits]\nmax_packet_size = 2097152\n[sinks.sqlite]\npath = "x.db"\nfilters = ["a/#"]\n')
    shown = {item.key: (item.value, item.origin) for item in settings.items()}
    assert shown["limits.max_packet_size"] == ('"2MB"', "conf.d/a.toml:2")
    assert shown["limits.session_expiry"] == ('"2h"', "default")
    assert shown["sinks.sqlite.filters"] == ('["a/#"]', "conf.d/a.toml:5")
    assert shown["sinks.sqlite.batch.linger"] == ('"5ms"', "default")
    assert list(shown) == sorted(shown)


def test_what_a_room_says_about_a_key_is_given_its_place(load: Load) -> None:
    settings = load(a=LDAP + '[listeners.tcp]\nbind = "127.0.0.1:5"\n')
    assert settings.located("listeners.tcp: bind 127.0.0.1:5: Address already in use") == (
        "conf.d/a.toml:4: listeners.tcp.bind: 127.0.0.1:5: Address already in use"
    )
    assert settings.located("auth.ldap: is broken: x") == "conf.d/a.toml:1: auth.ldap: is broken: x"
    assert settings.located("something: else") == "something: else"

"""What is only wrong together: names, ports, listeners anybody could use, certificates, filters."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.config.difference import diff
from broker.config.settings import Settings
from broker.config.topics import check_filter

Load = Callable[..., Settings]
Problems = Callable[..., list[str]]

LDAP = '[auth.ldap]\nservers = ["x"]\n'
SINK = '[sinks.sqlite]\npath = "x.db"\n'


def test_a01_without_any_fragment_only_this_machine_is_served(load: Load) -> None:
    settings = load()
    assert [str(listener.bind) for listener in settings.listeners.values()] == ["127.0.0.1:1883"]
    assert settings.access.allow_anonymous is False


@pytest.mark.parametrize("kind", ["tcp", "ws"])
def test_a01_a_listener_for_others_without_auth_is_refused(problems: Problems, kind: str) -> None:
    (found,) = problems(a=f'[listeners.{kind}]\nbind = "0.0.0.0:1883"\n')
    assert found.startswith(
        f"conf.d/a.toml:2: listeners.{kind}.bind: other machines can reach it and no [auth.*] decides"
    )


@pytest.mark.parametrize("place", ["[access]", "[listeners.tcp]"])
def test_a01_unless_allow_anonymous_is_written_out(load: Load, place: str) -> None:
    settings = load(a='[listeners.tcp]\nbind = "0.0.0.0:1883"\n', b=f"{place}\nallow_anonymous = true\n")
    assert settings.warnings == []


def test_a02_an_empty_list_of_backends_is_kept_apart_from_none(load: Load) -> None:
    settings = load(a=LDAP + "[access]\norder = []\n")
    assert settings.access.order == ()
    assert (
        "conf.d/a.toml:1: auth.ldap: is never asked: it is not in access.order nor in any listener's auth"
        in settings.warnings
    )
    assert any("every client is refused" in warning for warning in settings.warnings)


@pytest.mark.parametrize(("kind", "other"), [("tcp", "tls"), ("ws", "wss")])
def test_a57_passwords_in_the_clear_must_be_allowed_by_name(
    problems: Problems, load: Load, kind: str, other: str
) -> None:
    listener = f'[listeners.open]\nkind = "{kind}"\nbind = "10.0.0.1:1883"\n'
    (found,) = problems(a=LDAP + listener)
    assert found.startswith("conf.d/a.toml:5: listeners.open.bind: passwords would cross the network in the clear")
    assert f'kind = "{other}"' in found
    assert load(a=LDAP + listener + "allow_cleartext = true\n").listeners["open"].allow_cleartext


def test_c10_security_options_mean_the_same_in_every_order(load: Load) -> None:
    parts = ["[access]\nallow_anonymous = true\n", '[listeners.tcp]\nauth = ["ldap"]\nallow_anonymous = false\n', LDAP]
    shown = [
        [(i.key, i.value) for i in load(a=parts[a], b=parts[b], c=parts[c]).items()]
        for a, b, c in [(0, 1, 2), (2, 1, 0), (1, 0, 2)]
    ]
    assert shown[0] == shown[1] == shown[2]


@pytest.mark.parametrize(
    "text",
    [
        '[tls]\ncertificate = "x"',
        '[listeners]\ncertificate = "x"',
        'certificate = "x"',
        '[listeners.tcp]\ncertificate = "x"\nbind = "0.0.0.0:1"',
    ],
)
def test_c11_a_tls_option_without_a_tls_listener_opens_nothing(problems: Problems, text: str) -> None:
    assert "certificate" in problems(a=text)[0] or "tls: unknown key" in problems(a=text)[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[access]\norder = ["ldpa"]', "conf.d/b.toml:2: access.order: there is no [auth.ldpa]; there are: ldap"),
        ('[access]\norder = ["ldap", "ldap"]', "conf.d/b.toml:2: access.order: 'ldap' stands in the list twice"),
        ('[listeners.tcp]\nauth = ["x"]', "conf.d/b.toml:2: listeners.tcp.auth: there is no [auth.x]; there are: ldap"),
        (
            '[auth.off]\nkind="ldap"\nenabled=false\n[access]\norder=["off"]',
            "conf.d/b.toml:5: access.order: [auth.off] has enabled = false",
        ),
    ],
)
def test_lists_of_backends_name_backends_that_exist(problems: Problems, text: str, problem: str) -> None:
    assert problem in problems(a=LDAP, b=text)


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        ("127.0.0.1:1", "127.0.0.1:1", True),
        ("127.0.0.1:1", "*:1", True),
        ("0.0.0.0:1", "127.0.0.1:1", True),
        ("127.0.0.1:1", "127.0.0.2:1", False),
        ("127.0.0.1:0", "127.0.0.1:0", False),
        ("[::1]:1", "127.0.0.1:1", False),
    ],
)
def test_two_listeners_cannot_share_a_port(load: Load, problems: Problems, one: str, other: str, clash: bool) -> None:
    text = f'[listeners.tcp]\nbind = "{one}"\n[listeners.b]\nkind = "ws"\nbind = "{other}"\n'
    text += "[access]\nallow_anonymous = true\n"
    if clash:
        assert problems(a=text) == ["conf.d/a.toml:5: listeners.b.bind: port 1 is already used by listeners.tcp"]
    else:
        assert set(load(a=text).listeners) == {"tcp", "b"}


@pytest.mark.parametrize("path", ["data/control.sock", "data/run/workers.sock"])
def test_a_unix_listener_cannot_take_the_brokers_own_sockets(problems: Problems, path: str) -> None:
    text = f'[listeners.unix]\npath = "{path}"\n'
    assert problems(a=text) == ["conf.d/a.toml:2: listeners.unix.path: is already used by the broker itself"]


def test_a_sink_and_a_bridge_cannot_share_a_name(problems: Problems) -> None:
    found = problems(a='[sinks.hq]\nkind = "sqlite"\npath = "x"\nfilters = ["a"]\n[bridges.hq]\nkind = "mqtt"\n')
    assert found == [
        "conf.d/a.toml:5: bridges.hq: a sink has the same name at conf.d/a.toml:1: their queues would be one"
    ]


def test_bad_filters_of_sinks_and_bridges_name_their_line(problems: Problems) -> None:
    found = problems(a=SINK + 'filters = ["a/#", "a/b#",\n  "ok"]\n', b='[[bridges.mqtt.topics]]\nfilter = "x+"\n')
    assert found == [
        "conf.d/a.toml:3: sinks.sqlite.filters[1]: 'a/b#': # stands alone in the last level",
        "conf.d/b.toml:2: bridges.mqtt.topics[0].filter: 'x+': + stands alone in its level",
    ]


def test_a_bad_order_key_is_an_error(problems: Problems) -> None:
    assert problems(a=SINK + 'filters = ["a"]\norder_key = "${"\n')[0].startswith(
        "conf.d/a.toml:4: sinks.sqlite.order_key: "
    )


@pytest.mark.parametrize("name", ["user_property.site", "msgid", "ts", "nonsense"])
def test_an_order_key_that_no_message_has_when_a_lane_is_chosen_is_an_error(problems: Problems, name: str) -> None:
    found = problems(a=SINK + f'filters = ["a"]\nlanes = 2\norder_key = "${{{name}}}"\n')
    assert found[0].startswith(f"conf.d/a.toml:5: sinks.sqlite.order_key: ${{{name}}}: lanes are chosen by clientid,")


def test_an_order_key_may_be_a_level_of_the_topic_or_a_field_of_the_payload(load: Load) -> None:
    load(a=SINK + 'filters = ["a"]\nlanes = 2\norder_key = "${topic[1]}/${payload.site}"\n')


@pytest.mark.parametrize("text", ["a", "/", "+", "#", "+/a/#", "a//b", "$SYS/#", "$share/g/a/+", "a b"])
def test_valid_filters(text: str) -> None:
    check_filter(text)


@pytest.mark.parametrize(
    "text",
    ["", "a#", "#/a", "a/#/b", "a+", "+a/b", "a\0", "$share/g", "$share//a", "$share/+/a", "$share/g/", "x" * 65_536],
)
def test_invalid_filters(text: str) -> None:
    with pytest.raises(ValueError, match=r"filter|stands alone|share"):
        check_filter(text)


def test_models_may_look_at_what_they_name_but_not_for_what_the_first_run_makes(load: Load, problems: Problems) -> None:
    text = '[auth.accounts]\nkind = "file"\npasswords = "{}"\n'
    assert problems(a=text.format("passwords"))[0].startswith("conf.d/a.toml:3: auth.accounts.passwords: ")
    assert list(load(a=text.format("data/passwords")).auth) == ["accounts"]


# files (C-12) and certificates


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good.pem with good.key, other.key, old.pem (expired, of good.key), locked.key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("pems")
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    keys = {"good": ec.generate_private_key(ec.SECP256R1()), "other": ec.generate_private_key(ec.SECP256R1())}
    for label, key in keys.items():
        for suffix, protection in (
            ("key", serialization.NoEncryption()),
            ("locked", serialization.BestAvailableEncryption(b"x")),
        ):
            (folder / f"{label}.{suffix}").write_bytes(
                key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
            )
    now = datetime.datetime.now(datetime.UTC)
    for label, end in (("good", 100), ("soon", 3), ("old", -1)):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(keys["good"].public_key())
            .serial_number(1)
            .not_valid_before(now - datetime.timedelta(days=9))
            .not_valid_after(now + datetime.timedelta(days=end))
            .sign(keys["good"], hashes.SHA256())
        )
        (folder / f"{label}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "text").write_text("hello")
    return folder


def _tls(pems: Path, certificate: str = "good.pem", key: str = "good.key", more: str = "") -> str:
    return f'{LDAP}[listeners.tls]\ncertificate = "{pems}/{certificate}"\nkey = "{pems}/{key}"\n{more}'


def test_a_good_certificate_is_no_problem(load: Load, pems: Path) -> None:
    settings = load(a=_tls(pems, more=f'client_ca = "{pems}/good.pem"\nusername_from = "cn"\n'))
    assert settings.warnings == []
    assert settings.listeners["tls"].verification == "require"


@pytest.mark.parametrize(
    ("certificate", "key", "field", "text"),
    [
        ("good.pem", "other.key", "certificate", "do not belong together"),
        ("text", "good.key", "certificate", "is not in PEM form"),
        ("good.pem", "good.locked", "certificate", "is protected by a password"),
        ("none.pem", "good.key", "certificate", "cannot be read: No such file"),
        ("good.pem", "", "key", "is a folder, not a file"),
        ("good.pem", "../../../../../../../../dev/null", "key", "is not a regular file"),
    ],
)
def test_c12_certificates_that_cannot_be_used(
    problems: Problems, pems: Path, certificate: str, key: str, field: str, text: str
) -> None:
    (found,) = problems(a=_tls(pems, certificate, key))
    assert found.startswith(f"conf.d/a.toml:{4 if field == 'certificate' else 5}: listeners.tls.{field}: ")
    assert text in found


@pytest.mark.parametrize(("certificate", "text"), [("old.pem", "expired on"), ("soon.pem", "expires on")])
def test_a_certificate_that_ends_is_a_warning(load: Load, pems: Path, certificate: str, text: str) -> None:
    (warning,) = load(a=_tls(pems, certificate)).warnings
    assert text in warning


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ('verify = "require"', "needs client_ca"),
        ('username_from = "cn"', "needs client_ca"),
        ('verify = "none"\nclient_ca = "x"', "has no effect"),
        ("bind = '0.0.0.0:1'\nallow_cleartext = true", "unknown key"),
    ],
)
def test_tls_options_that_contradict_each_other(problems: Problems, pems: Path, more: str, text: str) -> None:
    assert text in problems(a=_tls(pems, more=more))[0]


@pytest.mark.parametrize("origin", ["app.example.com", "https://x/y", "http://", "*.example.com"])
def test_origins_are_origins(problems: Problems, origin: str) -> None:
    assert "is not an origin" in problems(a=f'[listeners.ws]\norigins = ["{origin}"]\n')[0]


def test_c12_a_data_folder_that_is_a_file_is_an_error(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    assert f"broker.data: {tmp_path}/data is not a folder" in problems(a="[broker]\ndata = 'data/x'\n")[0].replace(
        "/data/x", "/data"
    )


def test_a_data_folder_too_deep_for_sockets_is_an_error(problems: Problems) -> None:
    assert "too long" in problems(a=f"[broker]\ndata = '{'x' * 100}'\n")[0]


# differences


def test_a_difference_names_what_a_reload_would_touch(load: Load, conf: Path) -> None:
    old = load(a=LDAP, b=SINK + 'filters = ["a"]\n', c="[limits]\nmax_inflight = 5\n")
    (conf / "b.toml").unlink()
    new = load(c="[limits]\nmax_inflight = 6\n", d="[listeners.ws]\n")
    change = diff(old, new)
    assert (change.added, change.removed, change.changed) == (
        ["listeners.ws"],
        ["listeners.tcp", "sinks.sqlite"],
        ["limits"],
    )
    assert change.unchanged == ["access", "auth.ldap", "broker", "events", "store", "workers"]
    assert diff(new, load()).empty


def test_moving_a_table_to_another_fragment_changes_nothing(load: Load, conf: Path) -> None:
    old = load(a=LDAP, b="[listeners.tcp]\n")
    (conf / "a.toml").unlink()
    assert diff(old, load(z="\n\n" + LDAP)).empty


def test_a_secret_or_a_file_with_other_content_is_a_change(load: Load, tmp_path: Path) -> None:
    for name in ("pw", "ca.pem"):
        (tmp_path / name).write_text("a")
        (tmp_path / name).chmod(0o600)
    text = LDAP + 'bind_password = "${file:pw}"\nca = "ca.pem"\n'
    old = load(a=text)
    (tmp_path / "pw").write_text("b")
    between = load(a=text)
    (tmp_path / "ca.pem").write_text("bb")
    assert diff(old, between).changed == ["auth.ldap"]
    assert diff(between, load(a=text)).changed == ["auth.ldap"]


def test_what_a_sink_writes_is_no_change(load: Load, tmp_path: Path) -> None:
    text = SINK + 'filters = ["a"]\n'
    old = load(a=text)
    (tmp_path / "x.db").write_text("rows")
    assert diff(old, load(a=text)).empty

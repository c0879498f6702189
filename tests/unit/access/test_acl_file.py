"""Both syntaxes of rule files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from broker.access.acl_file import read_rules
from broker.access.principal import Principal
from broker.access.rules import PUBLISH, SUBSCRIBE, RuleSet
from broker.access.text_file import FileError

EMQ = """\
%% comment
{allow, {user, "dashboard"}, subscribe, ["$SYS/#"]}.

{allow, {ipaddr, "127.0.0.1"}, pubsub, ["$SYS/#", "#"]}.
{deny, {'and', [{client, "bad"}, {ipaddr, "10.0.0.0/8"}]}, all}.
{allow, {'or', [{username, <<"op">>}, {clientid, "panel"}]}, publish,
   ["commands/#",
    {eq, "odd/+"}]}.
{allow, all, publish, ["dev/%c/${username}"]}.
{deny, all, subscribe, ["$SYS/#", {eq, "#"}]}.
{allow, all, subscribe, ["open/#"]}. % and so on
"""

MOSQUITTO = """\
# clients without a name
topic read public/#
topic write in/box one

user alice
topic readwrite a/#
topic deny a/secret
topic literal/%c
user bob
topic read a/#

pattern write dev/%c/%u
pattern deny dev/+/denied
"""


@pytest.fixture
def decide(tmp_path: Path) -> Callable[..., bool | None]:
    def decide(
        text: str, action: int, topic: str, username: str | None = "u", clientid: str = "c", peer: str = "192.168.1.1"
    ) -> bool | None:
        path = tmp_path / "acl.conf"
        path.write_text(text, newline="")
        who = Principal(clientid, username, peer=f"{peer}:1")
        found = RuleSet(read_rules(path)).find(action, topic, topic.split("/"), who)
        return None if found is None else bool(found.allow)

    return decide


def test_a_regular_expression_that_one_text_matches_is_that_text(decide: Callable[..., bool | None]) -> None:
    """As in the acl.conf that EMQX 5 comes with."""
    text = '{allow, {username, {re, "^dashboard$"}}, subscribe, ["$SYS/#"]}.\n{deny, all, subscribe, ["$SYS/#"]}.\n'
    assert decide(text, SUBSCRIBE, "$SYS/x", username="dashboard") is True
    assert decide(text, SUBSCRIBE, "$SYS/x", username="dashboards") is False


def test_emq_tuples(decide: Callable[..., bool | None]) -> None:
    assert decide(EMQ, SUBSCRIBE, "$SYS/x", username="dashboard") is True
    assert decide(EMQ, SUBSCRIBE, "$SYS/x") is False
    assert decide(EMQ, SUBSCRIBE, "#", peer="127.0.0.1") is True
    assert decide(EMQ, SUBSCRIBE, "#", peer="::ffff:127.0.0.1") is True
    assert decide(EMQ, SUBSCRIBE, "#") is False
    assert decide(EMQ, SUBSCRIBE, "open/x") is True
    assert decide(EMQ, SUBSCRIBE, "open/x", clientid="bad", peer="10.1.2.3") is False
    assert decide(EMQ, SUBSCRIBE, "open/x", clientid="bad", peer="11.1.2.3") is True
    assert decide(EMQ, PUBLISH, "commands/x", username="op") is True
    assert decide(EMQ, PUBLISH, "commands/x", clientid="panel") is True
    assert decide(EMQ, PUBLISH, "commands/x") is None
    assert decide(EMQ, PUBLISH, "odd/x", username="op") is None
    assert decide(EMQ, PUBLISH, "dev/c/u") is True
    assert decide(EMQ, PUBLISH, "dev/c/v") is None
    assert decide(EMQ, PUBLISH, "dev/c/u", peer="unix:0") is True


def test_emq_allow_all_covers_system_topics_too(decide: Callable[..., bool | None]) -> None:
    assert decide("{allow, all}.", SUBSCRIBE, "$SYS/#") is True
    assert decide("{deny, {user, all}}.\n", PUBLISH, "x") is False


def test_mosquitto_rules(decide: Callable[..., bool | None]) -> None:
    assert decide(MOSQUITTO, SUBSCRIBE, "public/x", username=None) is True
    assert decide(MOSQUITTO, PUBLISH, "in/box one", username=None) is True
    assert decide(MOSQUITTO, SUBSCRIBE, "public/x", username="alice") is None
    assert decide(MOSQUITTO, PUBLISH, "a/b", username="alice") is True
    assert decide(MOSQUITTO, PUBLISH, "a/secret", username="alice") is False, "denials come first"
    assert decide(MOSQUITTO, PUBLISH, "a/b", username="bob") is None
    assert decide(MOSQUITTO, SUBSCRIBE, "a/b", username="bob") is True
    assert decide(MOSQUITTO, PUBLISH, "literal/c", username="alice") is None, "only patterns have placeholders"
    assert decide(MOSQUITTO, PUBLISH, "literal/%c", username="alice") is True
    assert decide(MOSQUITTO, PUBLISH, "dev/c/u") is True
    assert decide(MOSQUITTO, SUBSCRIBE, "dev/c/u") is None
    assert decide(MOSQUITTO, PUBLISH, "dev/c/denied", username="denied") is False


def test_windows_line_ends_and_a_byte_order_mark(decide: Callable[..., bool | None]) -> None:
    assert decide("\ufeff" + MOSQUITTO.replace("\n", "\r\n"), PUBLISH, "a/secret", username="alice") is False
    assert decide("\ufeff" + EMQ.replace("\n", "\r\n"), SUBSCRIBE, "$SYS/x") is False


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "%% nothing\n% here\n", "   \r\n"])
def test_z02_a_file_without_rules_denies_everything(decide: Callable[..., bool | None], text: str) -> None:
    """Z-02: comments are no rules."""
    for action in (PUBLISH, SUBSCRIBE):
        for topic in ("a", "$SYS/x", "#"):
            assert decide(text, action, topic) is False


@pytest.mark.parametrize(
    ("text", "line", "say"),
    [
        ("topic read a\ntopic ie#\n", 2, "ie#"),  # C-08
        ('{allow, all, publish, ["a"]}.\n\n{allow, all, publish, ["ie#"]}.\n', 3, "ie#"),
        ("topics read a\n", 1, "topics"),
        ("user\n", 1, "missing"),
        ("topic read\n\npattern\n", 3, "empty"),
        ('{allow, all, publish, ["a"]}\n{deny, all}.\n', 2, "expected '.'"),
        ('{allow, all, publish, ["a"]}', 1, "ends in the middle"),
        ("{permit, all}.", 1, "allow or deny"),
        ("{allow, nobody}.", 1, "nobody"),
        ('{allow, all, write, ["a"]}.', 1, "write"),
        ('{allow, all, publish, "a"}.', 1, "list"),
        ("{allow, all, publish, []}.", 1, "list"),
        ("\n{allow, {user, {re, \"^a\"}}, publish, [\"a\"]}.", 2, "regular expressions"),
        ('{allow, {user, "%c"}}.', 1, "placeholders"),
        ('{allow, {ipaddr, "300.1.1.1"}}.', 1, "300.1.1.1"),
        ('{allow, all, publish, ["${wrong}"]}.', 1, "wrong"),
        ('{allow, all, {publish, [{qos, 3}]}, ["a"]}.', 1, "conditions"),
        ('{allow, all, {publish, [{qos, []}]}, ["a"]}.', 1, "conditions"),
        ('{allow, all, {publish, [{retain, 1}]}, ["a"]}.', 1, "conditions"),
        ('{allow, all, {publish, [qos]}, ["a"]}.', 1, "conditions"),
        ('{allow, all, {write, [{qos, 0}]}, ["a"]}.', 1, "action"),
        ('{allow, all, {publish, {qos, 0}}, ["a"]}.', 1, "action"),
        ('{allow, {group, all}, publish, ["a"]}.', 1, "is not a name in quotes"),
        ("{allow, all}. {deny(", 1, "("),
        ("{" * 50, 1, "deep"),
    ],
)  # fmt: skip
def test_c08_what_is_not_understood_is_an_error_with_its_line(tmp_path: Path, text: str, line: int, say: str) -> None:
    path = tmp_path / "acl.conf"
    path.write_text(text)
    with pytest.raises(FileError) as caught:
        read_rules(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert say in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"):
        read_rules(tmp_path / "missing")
    with pytest.raises(FileError, match="directory"):
        read_rules(tmp_path)
    (tmp_path / "latin").write_bytes(b"topic a\ntopic b\xff\n")
    with pytest.raises(FileError, match=r"latin:2: is not UTF-8"):
        read_rules(tmp_path / "latin")
    (tmp_path / "nul").write_bytes(b"topic a\0\n")
    with pytest.raises(FileError, match=r"nul:1: .*NUL"):
        read_rules(tmp_path / "nul")

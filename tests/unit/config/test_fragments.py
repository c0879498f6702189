"""Reading and merging fragments: order, origins, and files that are none."""

from __future__ import annotations

import io
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.config import fragments, positions
from broker.config.fragments import read
from broker.config.settings import Settings

Load = Callable[..., Settings]
Problems = Callable[..., list[str]]


def test_later_fragments_win_and_every_value_knows_its_line(load: Load) -> None:
    settings = load(a='[broker]\nname = "one"\n\n[limits]\nmax_inflight = 5\n', b='[broker]\n\nname = "two"\n')
    assert settings.broker.name == "two"
    assert settings.origin("broker.name") == "conf.d/b.toml:3"
    assert settings.origin("limits.max_inflight") == "conf.d/a.toml:5"
    assert settings.origin("limits.max_packet_size") == "default"


def test_c07_a_key_set_twice_is_a_warning_that_names_both_places(load: Load) -> None:
    settings = load(a='[broker]\nname = "one"\n', b='[broker]\nname = "two"\n', sets=("access.allow_anonymous=true",))
    assert settings.warnings == ["conf.d/b.toml:2: broker.name: also set at conf.d/a.toml:2; this one wins"]


@pytest.mark.parametrize("names", [("10-x", "9-x"), ("B", "a"), ("a", "ä"), ("10-x", "10_x")])
def test_c07_fragments_are_read_in_byte_order(load: Load, names: tuple[str, str]) -> None:
    earlier, later = names
    settings = load(**{later: '[broker]\nname = "later"\n', earlier: '[broker]\nname = "earlier"\n'})
    assert settings.broker.name == "later"


def test_tables_merge_and_arrays_replace(load: Load) -> None:
    settings = load(
        a='[auth.ldap]\nservers = ["a", "b"]\n[auth.ldap.groups.x]\ndn = "cn=x"\n',
        b='[auth.ldap]\nservers = ["c"]\n[auth.ldap.groups.y]\ndn = "cn=y"\n',
    )
    config = settings.auth["ldap"].config
    assert config.servers == ("c",)
    assert list(config.groups) == ["x", "y"]


def test_a_table_and_a_value_of_one_name_are_an_error_naming_both_places(problems: Problems) -> None:
    assert problems(a="[auth]\nldap = 1\n", b="[auth.ldap]\nservers = []\n") == [
        "conf.d/a.toml:2: auth.ldap: expected a table [auth.NAME]; a key stands inside the table of an instance",
        "conf.d/b.toml:1: auth.ldap: a table here, a value at conf.d/a.toml:2",
    ]


def test_the_environment_wins_over_fragments_and_set_over_both(load: Load) -> None:
    a = '[broker]\nname = "file"\n[limits]\nmax_inflight = 1\n'
    environ = {"ISTHMUS__BROKER__NAME": "env", "ISTHMUS__LIMITS__MAX_INFLIGHT": "7", "OTHER": "x"}
    settings = load(a=a, environ=environ, sets=("broker.name=set",))
    assert (settings.broker.name, settings.limits.max_inflight) == ("set", 7)
    assert settings.origin("broker.name") == "--set"
    assert settings.origin("limits.max_inflight") == "env ISTHMUS__LIMITS__MAX_INFLIGHT"


def test_values_of_the_environment_take_the_type_that_is_wanted(load: Load) -> None:
    environ = {
        "ISTHMUS__BROKER__NAME": "42",
        "ISTHMUS__AUTH__LDAP__SERVERS": '["a", "b"]',
        "ISTHMUS__AUTH__LDAP__BIND_PASSWORD": "007",
        "ISTHMUS__AUTH__LDAP__TIMEOUT": "2s",
    }
    settings = load(a="[auth.ldap]\n", environ=environ, sets=("access.allow_anonymous=true",))
    config = settings.auth["ldap"].config
    assert settings.broker.name == "42"
    assert config.servers == ("a", "b")
    assert config.bind_password.reveal() == "007"
    assert (config.timeout, settings.access.allow_anonymous) == (2.0, True)


def test_environment_names_find_keys_that_differ_in_case(load: Load) -> None:
    settings = load(
        a='[auth.Corp-1]\nkind = "ldap"\nservers = ["a"]\n', environ={"ISTHMUS__AUTH__CORP-1__TIMEOUT": "1s"}
    )
    assert settings.auth["Corp-1"].config.timeout == 1.0


@pytest.mark.parametrize("text", ["nothing", "=x", "broker=1", "a..b=1", "broker.name"])
def test_a_bad_set_is_an_error(problems: Problems, text: str) -> None:
    assert problems(sets=(text,))[0].startswith("--set: ")


def test_an_unknown_key_of_the_environment_is_an_error_that_names_it(problems: Problems) -> None:
    assert problems(environ={"ISTHMUS__BROKER__NAEM": "x"}) == [
        "env ISTHMUS__BROKER__NAEM: broker.naem: unknown key, did you mean name?"
    ]


# C-04: what lies in the folder and is no fragment


@pytest.mark.parametrize(
    "name",
    [
        ".a.toml",
        "a.toml~",
        "a.toml.bak",
        ".a.toml.swp",
        "a.toml.dpkg-old",
        "a.toml.rpmsave",
        "a.toml.example",
        "README.md",
    ],
)
def test_c04_backups_hidden_files_and_examples_are_ignored(conf: Path, load: Load, name: str) -> None:
    (conf / name).write_text("this is not TOML [")
    assert load(sets=("access.allow_anonymous=true",)).warnings == []


def test_c04_a_file_that_may_have_been_meant_is_a_warning(conf: Path, load: Load) -> None:
    (conf / "20-auth.conf").write_text("")
    assert "conf.d/20-auth.conf: ignored: a fragment's name ends in .toml" in load().warnings


def test_c04_a_folder_with_the_suffix_is_an_error(conf: Path, problems: Problems) -> None:
    (conf / "a.toml").mkdir()
    assert problems() == ["conf.d/a.toml: is a folder; a fragment is a file (folders inside are not read)"]


def test_c04_a_dangling_link_is_an_error(conf: Path, problems: Problems) -> None:
    (conf / "a.toml").symlink_to("nowhere")
    assert problems() == ["conf.d/a.toml: cannot be read: No such file or directory"]


def test_c04_a_link_loop_is_an_error(conf: Path, problems: Problems) -> None:
    (conf / "a.toml").symlink_to("b.toml")
    (conf / "b.toml").symlink_to("a.toml")
    assert [p.partition(": cannot be read: ")[0] for p in problems()] == ["conf.d/a.toml", "conf.d/b.toml"]


def test_c04_a_link_to_a_fragment_is_one(conf: Path, tmp_path: Path, load: Load) -> None:
    (tmp_path / "elsewhere").write_text('[broker]\nname = "linked"\n')
    (conf / "a.toml").symlink_to(tmp_path / "elsewhere")
    assert load().broker.name == "linked"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_c04_an_unreadable_fragment_is_an_error(conf: Path, problems: Problems) -> None:
    (conf / "a.toml").write_text("")
    (conf / "a.toml").chmod(0)
    assert problems() == ["conf.d/a.toml: cannot be read: Permission denied"]


def test_c04_an_error_of_the_system_while_reading_is_a_problem(
    conf: Path, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    (conf / "a.toml").write_text("")

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(fragments, "_text", refuse)
    assert problems() == ["conf.d/a.toml: cannot be read: Permission denied"]


def test_c04_a_pipe_is_refused_without_waiting_for_it(conf: Path, problems: Problems) -> None:
    os.mkfifo(conf / "a.toml")
    assert problems() == ["conf.d/a.toml: is not a regular file"]


def test_c04_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    assert read(tmp_path / "no").problems == [
        f"{tmp_path}/no: the folder of fragments cannot be read: No such file or directory"
    ]


@pytest.mark.parametrize(
    "data",
    [b'\xef\xbb\xbf[broker]\nname = "x"\n', b'[broker]\r\nname = "x"\r\n', b'\xef\xbb\xbf[broker]\r\n\r\nname = "x"'],
    ids=["byte-order mark", "CRLF", "both"],
)
def test_c04_byte_order_mark_and_crlf_are_read(conf: Path, load: Load, data: bytes) -> None:
    (conf / "a.toml").write_bytes(data)
    settings = load()
    assert settings.broker.name == "x"
    line = data.count(b"\n", 0, data.index(b"name")) + 1
    assert settings.origin("broker.name") == f"conf.d/a.toml:{line}"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'[broker]\nname = "a\0b"\n', "line 2 holds a NUL byte: this is not text"),
        (b"[broker]\nname = '\xff'\n", "line 2 is not UTF-8"),
        ("[broker]\n".encode("utf-16"), "line 1 holds a NUL byte: this is not text"),
    ],
)
def test_c04_what_is_not_text_is_an_error_with_its_line(conf: Path, problems: Problems, data: bytes, text: str) -> None:
    (conf / "a.toml").write_bytes(data)
    assert problems() == [f"conf.d/a.toml: {text}"]


def test_c04_a_file_of_100_mb_is_refused_unread(
    conf: Path, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (conf / "a.toml").open("wb") as file:
        file.truncate(100 << 20)
    with monkeypatch.context() as patched:
        patched.setattr(io, "open", never)  # what Path.open and Path.read_bytes come to
        patched.setattr(os, "open", never)
        patched.setattr("builtins.open", never)
        assert problems() == ["conf.d/a.toml: has 104857600 bytes; a fragment has at most 1048576"]


def never(*arguments: object, **options: object) -> None:
    raise AssertionError(f"opened: {arguments}")


def test_c04_an_empty_fragment_says_nothing(conf: Path, load: Load) -> None:
    (conf / "a.toml").write_text("")
    assert load().broker.name == "isthmus-1"


def test_one_bad_file_does_not_hide_the_others(conf: Path, problems: Problems) -> None:
    (conf / "b.toml").write_text("[broker\n")
    found = problems(a="[broker]\nnaem = 1\n", c="[limits]\nmax_inflight = 0\n")
    assert [p.partition(": ")[0] for p in found] == ["conf.d/a.toml:2", "conf.d/b.toml:1", "conf.d/c.toml:2"]


@pytest.mark.parametrize(
    ("text", "line"), [("a = \n", 1), ("\n\n[x\n", 3), ("[a]\nx = 1\nx = 2\n", 3), ("[a]\n[a]\n", 2), ('x = "abc', 1)]
)
def test_c14_syntax_errors_and_duplicate_keys_name_the_line(
    conf: Path, problems: Problems, text: str, line: int
) -> None:
    assert problems(a=text)[0].startswith(f"conf.d/a.toml:{line}: not valid TOML: ")


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 10_000 + "]" * 10_000,
        "a = " + "[" * 10_000,
        "a = " + "{a=" * 10_000 + "1" + "}" * 10_000,
        ".".join(["a"] * 10_000) + " = 1",
        "[" + ".".join(["a"] * 10_000) + "]",
        "[[" + ".".join(["a"] * 10_000) + "]]",
        "a = {" + ".".join(["a"] * 10_000) + " = 1}",
        'x = """\n' + "[" * 500 + '"""\na = ' + "[" * 10_000,
    ],
    ids=["arrays", "open arrays", "tables", "dotted", "header", "array header", "inline dotted", "after a string"],
)
def test_c14_ten_thousand_levels_are_refused_at_once_and_cheaply(problems: Problems, text: str) -> None:
    tracemalloc.start()
    started = time.process_time()
    found = problems(a=text)
    took = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "nested more than" in found[0]
    assert took < 1
    assert peak < 64 << 20


def test_c14_brackets_in_strings_and_comments_are_not_depth(load: Load) -> None:
    many = "[" * 500
    settings = load(a=f'# {many}\n[broker] # {many}\nname = "x" # \'{many}\n[access]\norder = [] # {{\n')
    assert settings.broker.name == "x"


def test_c14_a_fragment_full_of_tables_is_read_in_time(conf: Path) -> None:
    (conf / "a.toml").write_text("".join(f'[auth.a{n}]\nkind = "x"\nl = [1, {{ a = 2 }}]\n' for n in range(15_000)))
    started = time.process_time()
    tree = read(conf, environ={})
    assert not tree.problems
    assert tree.origin(("auth", "a14999", "l", 1, "a")) == "conf.d/a.toml:45000"
    assert time.process_time() - started < 5


def test_lines_are_found_for_every_way_to_write_a_key() -> None:
    lines = positions.find(
        'a.b."c.d" = 1\n[x.y]\nz = { q = 1, r = [\n  { t = 1 },\n  2 ] }\n'
        "[[l.m]]\nf = 1\n[l.m.n]\ng = 1\n[[l.m]]\nf = 2\n"
    )
    assert lines["a", "b", "c.d"] == 1
    assert lines["x", "y"] == 2
    assert lines["x", "y", "z", "q"] == 3
    assert lines["x", "y", "z", "r", 0, "t"] == 4
    assert lines["x", "y", "z", "r", 1] == 5
    assert lines["l", "m", 0, "f"] == 7
    assert lines["l", "m", 0, "n", "g"] == 9
    assert lines["l", "m", 1, "f"] == 11

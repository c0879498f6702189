"""HOCON as EMQX writes it, with the line of every value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker.importers.hocon import read_hocon
from broker.importers.source import Node, SourceError


def read(tmp_path: Path, text: str) -> Node:
    path = tmp_path / "emqx.conf"
    path.write_text(text)
    return read_hocon(path)


def leaves(root: Node) -> dict[str, tuple[Any, int]]:
    return {leaf.key: (leaf.value, leaf.place.line) for leaf in root.leaves()}


VALUES: list[tuple[str, dict[str, tuple[Any, int]]]] = [
    ("", {}),
    ("# only\n// comments\n", {}),
    ("a = 1", {"a": (1, 1)}),
    ("a : -1.5", {"a": (-1.5, 1)}),
    ("a = true\nb = off", {"a": (True, 1), "b": ("off", 2)}),
    ("a = null", {}),
    ("a = 10s # seconds", {"a": ("10s", 1)}),
    ("a = two words // said", {"a": ("two words", 1)}),
    ("a = http://host/x", {"a": ("http://host/x", 1)}),
    ('a = "x # y"', {"a": ("x # y", 1)}),
    (r'a = "q\"\\ \u00e9\n"', {"a": ('q"\\ é\n', 1)}),
    ('a = "x" "y"', {"a": ("x y", 1)}),
    ('a = """x\n"y" """\nb = 1', {"a": ('x\n"y" ', 1), "b": (1, 3)}),
    ("a.b.c = 1", {"a.b.c": (1, 1)}),
    ('a."b.c" = 1', {"a.b.c": (1, 1)}),
    ("a { b = 1, c = 2 }", {"a.b": (1, 1), "a.c": (2, 1)}),
    ("a = { b = 1 }\na { c = 2 }", {"a.b": (1, 1), "a.c": (2, 2)}),
    ("a { b = 1 }\na = { b = 2 }", {"a.b": (2, 2)}),
    ("a { b = 1 }\na = 5", {"a": (5, 2)}),
    (r'a = "\ud83d\ude00"', {"a": ("\U0001f600", 1)}),
    (f"a = {'1' * 5000}", {"a": ("1" * 5000, 1)}),
    ("a = 5\na { b = 1 }", {"a.b": (1, 2)}),
    ("a =\n  5", {"a": (5, 1)}),
    ("{ a = 1 }", {"a": (1, 1)}),
    ("a = [1, 2\n3]", {"a": ([1, 2, 3], 1)}),
    ("a = []", {"a": ([], 1)}),
    ("a = [x]\na += y", {"a": (["x", "y"], 1)}),
    ("a = [\n{ b = 1 }\n{ b = 2 }\n]", {"a.1.b": (1, 2), "a.2.b": (2, 3)}),
    ("a = 1\nb = ${a}", {"a": (1, 1), "b": (1, 2)}),
    ("b = ${?nothing}", {}),
    ("b { c = ${a} }\na = 1", {"b.c": (1, 1), "a": (1, 2)}),
    ("\r\na = 1\r\n", {"a": (1, 2)}),
    ('include "gone.conf"\na = 1', {"a": (1, 2)}),
]


@pytest.mark.parametrize(("text", "wanted"), VALUES)
def test_values_and_their_lines(tmp_path: Path, text: str, wanted: dict[str, tuple[Any, int]]) -> None:
    assert leaves(read(tmp_path, text)) == wanted


WRONG = [
    ("a {", "1: a brace { is opened and never closed"),
    ("a = [1", "1: a bracket [ is opened and never closed"),
    ("a = 1\n}", "2: expected the name of a setting before '}'"),
    ("{ a = 1 } }", "1: '}' is out of place"),
    ("a = \n\n", "3: a: the value is missing"),
    ('a = "x', "1: a: the value is missing"),
    ('a = """x', '1: a text begins with """ and never ends'),
    ("\nnonsense\n", "2: nonsense: expected = or { after the key"),
    ('\npassword."s3cret"\n', "2: expected = or { after the key"),
    ("= 5", "1: expected the name of a setting before '='"),
    ("a = ${b}", "1: a: there is no b to refer to"),
    ("a = ${a}", "1: a: there is no a to refer to"),
    ("a = ${b}\nb = ${a}", "1: a: there is no b to refer to"),
    ("b = 1\na = x${b}", "2: a: a reference inside a text is not understood here; write the text out"),
    (r'a = "\ud800"', "1: a text holds half a character"),
    (r'a = "x\u0000"', "1: a text holds a NUL character"),
    ("b = [1]\na = ${b}\na += 2", "3: a: adding to a reference is not understood here; write the list out"),
    ("a = { b = 1 } c", "1: a: a table or list and a text stand side by side"),
]


@pytest.mark.parametrize(("text", "wanted"), WRONG)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, text: str, wanted: str) -> None:
    with pytest.raises(SourceError) as error:
        read(tmp_path, text)
    assert str(error.value) == f"{tmp_path}/emqx.conf:{wanted}"


@pytest.mark.parametrize("text", ["a {" * 10_000, "a = " + "[" * 10_000])
def test_c14_deep_nesting_is_refused(tmp_path: Path, text: str) -> None:
    """C-14"""
    with pytest.raises(SourceError, match="nested too deeply"):
        read(tmp_path, text)


def test_an_included_file_stands_where_it_is_included(tmp_path: Path) -> None:
    (tmp_path / "more.conf").write_text("\nb = 2\n")
    root = read(tmp_path, 'a { include "more.conf" }\nb = 1\n')
    found = {leaf.key: (leaf.value, leaf.place.file, leaf.place.line) for leaf in root.leaves()}
    assert found == {"a.b": (2, f"{tmp_path}/more.conf", 2), "b": (1, f"{tmp_path}/emqx.conf", 2)}


def test_an_included_file_that_is_required_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.conf: cannot be read"):
        read(tmp_path, 'include required(file("gone.conf"))\n')


def test_a_file_that_includes_itself_ends(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="included too deeply"):
        read(tmp_path, 'include "emqx.conf"\n')

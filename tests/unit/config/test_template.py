"""Templates: what is a placeholder, what is text, what is an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config.template import MissingValue, Placeholder, Template


def test_placeholders_are_found_with_root_and_path() -> None:
    template = Template("a/${payload.rooms[2].temp-1}/${topic[2]}/${user_property.x.y}${.}")
    found = [s for s in template.segments if isinstance(s, Placeholder)]
    assert [(p.root, p.path) for p in found] == [
        ("payload", ("rooms", 2, "temp-1")), ("topic", (2,)), ("user_property", ("x", "y")), (".", ())
    ]  # fmt: skip
    assert found[2].rest == "x.y"
    assert template.names == ("payload.rooms[2].temp-1", "topic[2]", "user_property.x.y", ".")


def test_values_are_filled_in_and_only_they_are_escaped() -> None:
    template = Template("(uid=${username})")
    assert template.render({"username": "bob"}) == "(uid=bob)"
    assert template.render({"username": "*"}, escape=lambda text: text.replace("*", "\\2a")) == "(uid=\\2a)"
    assert template.render(lambda name: name.upper()) == "(uid=USERNAME)"


def test_a_value_is_never_read_as_a_template() -> None:
    assert Template("${a}").render({"a": "${b}", "b": "secret"}) == "${b}"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1"), (1.5, "1.5"), (True, "true"), (b"x", "x"), ({"a": [1]}, '{"a":[1]}'), ("ä", "ä"), ("", "")],
)
def test_values_of_other_types_are_written_as_json_would(value: object, text: str) -> None:
    assert Template("${v}").render({"v": value}) == text


@pytest.mark.parametrize("values", [{}, {"v": None}])
def test_a_missing_value_is_named(values: dict[str, object]) -> None:
    with pytest.raises(MissingValue, match=r"\$\{v\}") as caught:
        Template("x${v}").render(values)
    assert caught.value.name == "v"


def test_a_literal_dollar_brace_is_written_with_two_dollars() -> None:
    assert Template("$${a} $ {a} 5$").render({}) == "${a} $ {a} 5$"
    assert Template("${a}").literal is None
    assert Template("a$${b").literal == "a${b"


def test_an_escaped_environment_reference_stays_text_after_the_loader() -> None:
    assert Template("${env:HOME}/${a}").render({"a": "x"}) == "${env:HOME}/x"


@pytest.mark.parametrize(
    "text", ["${", "a${b", "${}", "${ a}", "${a..b}", "${a[x]}", "${a[1}", "${a.}", "${1a}", "${a b}", "${a${b}}"]
)
def test_a_bad_template_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"\$"):
        Template(text)


def test_percent_placeholders_only_where_they_are_expected() -> None:
    assert Template("%u").render({}) == "%u"
    template = Template.parse("users/%u/%c/100%%/%x", percent=True)
    assert template.render({"username": "bob", "clientid": "c1"}) == "users/bob/c1/100%/%x"
    assert template.names == ("username", "clientid")


def test_templates_with_the_same_meaning_are_equal() -> None:
    assert Template("${a}") == Template("${a}")
    assert hash(Template("${a}")) == hash(Template("${a}"))
    assert Template("${a}") != Template("${b}")


@given(st.text())
def test_any_text_is_a_template_or_a_value_error(text: str) -> None:
    try:
        template = Template(text)
    except ValueError:
        return
    assert "${" in text or template.literal == text

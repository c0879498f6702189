"""Conditions on records, such as ``payload.value != null and payload.value < 1000``: which messages a sink takes.

    or, and, not, ( )        == != < <= > >=        in [1, "a"]        "text" 'text' 12.5 true false null
    payload.a.b[0]  topic  topic[1]  qos  retain  clientid  username  user_property.unit: whatever ${…} knows

What a record does not have is null. A comparison with null is false, but for ``== null`` and ``!= null``. Text is not
ordered against numbers: such a record, and one whose payload is asked for a field and is no JSON, cannot be judged.
A condition is compiled once into a function; it calls nothing and takes the time its length allows.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import orjson

from broker.config.template import Template
from broker.config.types import CompiledText

if TYPE_CHECKING:
    from broker.extend.sink import Record

Test = Callable[["Record"], Any]

_TOKEN = re.compile(
    r"\s*(?:(?P<number>-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(?![\w.])|(?P<text>\"(?:[^\"\\]|\\.)*\"|'[^']*')"
    r"|(?P<sign>==|!=|<=|>=|<|>|\(|\)|\[|\]|,)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\[[0-9]{1,6}\]|\.[A-Za-z0-9_$-]+)*)|(?P<end>$)|(?P<wrong>.))",
    re.DOTALL,
)
_ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_WORDS = {"true": True, "false": False, "null": None}
_DEEPEST = 50


class Unclear(ValueError):
    """A record of which a condition can say neither yes nor no."""


class Condition(CompiledText):
    """One compiled condition. ValueError, which shows the place, when it cannot be read."""

    __slots__ = ("_test",)
    expected = "expected text, such as payload.value > 10"
    json_schema: ClassVar[dict[str, Any]] = {"type": "string", "format": "condition"}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._test = _Parser(text).whole()

    def __call__(self, record: Record) -> bool:
        """Whether it holds. Raises Unclear when that cannot be said."""
        return self._test(record) is True


class _Parser:
    """Recursive descent: or, and, not, comparison, operand."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = [
            (m.lastgroup or "", m[m.lastgroup or 0], m.start(m.lastgroup or 0)) for m in _TOKEN.finditer(text)
        ]
        self._at = 0
        self._depth = 0

    def whole(self) -> Test:
        test = self._either()
        if self._tokens[self._at][0] != "end":
            self._fail("and, or, or the end")
        return test

    def _either(self) -> Test:
        tests = [self._all()]
        while self._taken("or"):
            tests.append(self._all())
        return tests[0] if len(tests) == 1 else lambda record: any(test(record) is True for test in tests)

    def _all(self) -> Test:
        tests = [self._not()]
        while self._taken("and"):
            tests.append(self._not())
        return tests[0] if len(tests) == 1 else lambda record: all(test(record) is True for test in tests)

    def _not(self) -> Test:
        if not self._taken("not"):
            return self._comparison()
        self._deeper()
        test = self._not()
        self._depth -= 1
        return lambda record: test(record) is not True

    def _comparison(self) -> Test:
        if self._taken("("):
            self._deeper()
            inner = self._either()
            self._depth -= 1
            self._need(")")
            return inner
        left = self._operand()
        for sign in ("==", "!=", "<", "<=", ">", ">=", "in"):
            if self._taken(sign):
                if sign == "in":
                    return _one_of(left, self._list())
                right = self._operand()
                if sign in _ORDER:
                    return _ordered(_ORDER[sign], left, right)
                return _equal(left, right) if sign == "==" else _unequal(left, right)
        return left

    def _list(self) -> list[Test]:
        self._need("[")
        found = [self._operand()]
        while self._taken(","):
            found.append(self._operand())
        self._need("]")
        return found

    def _operand(self) -> Test:
        kind, token, _ = self._tokens[self._at]
        if kind not in ("number", "text", "name") or token in ("and", "or", "not", "in"):
            self._fail("a value")
        self._at += 1
        if kind == "name" and token not in _WORDS:
            return _value(token)
        value: Any = _WORDS.get(token)
        if kind == "number":
            value = orjson.loads(token)
        elif kind == "text":
            value = token[1:-1] if token[0] == "'" else orjson.loads(token)
        return lambda record: value

    def _taken(self, token: str) -> bool:
        kind, there, _ = self._tokens[self._at]
        if there != token or kind == "text":
            return False
        self._at += 1
        return True

    def _need(self, token: str) -> None:
        if not self._taken(token):
            self._fail(token)

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > _DEEPEST:
            self._fail("fewer parentheses")

    def _fail(self, wanted: str) -> NoReturn:
        place = self._tokens[self._at][2]
        raise ValueError(f"at {self._text[place : place + 20]!r}, character {place + 1}: {wanted} is expected here")


def _value(name: str) -> Test:
    # not at the top: records stand beside the sinks' configuration, which has conditions
    from broker.extend.record import compile_template, payload_json

    render = compile_template(Template(f"${{{name}}}"))
    if name == "payload":
        return lambda record: record.payload.decode("utf-8", "replace")
    if not name.startswith("payload"):
        return render

    def field(record: Record) -> Any:
        value = render(record)
        if value is None and payload_json(record) is None and record.payload.strip() != b"null":
            raise Unclear("the payload is no JSON")
        return value

    return field


def _equal(left: Test, right: Test) -> Test:
    def equal(record: Record) -> bool:
        a, b = left(record), right(record)
        return a == b and isinstance(a, bool) is isinstance(b, bool)  # 1 is not true

    return equal


def _unequal(left: Test, right: Test) -> Test:
    equal = _equal(left, right)
    return lambda record: not equal(record)


def _one_of(left: Test, choices: list[Test]) -> Test:
    tests = [_equal(left, choice) for choice in choices]
    return lambda record: any(test(record) for test in tests)


def _ordered(compare: Callable[[Any, Any], bool], left: Test, right: Test) -> Test:
    def ordered(record: Record) -> bool:
        a, b = left(record), right(record)
        if a is None or b is None:
            return False
        if isinstance(a, bool | list | dict) or isinstance(b, bool | list | dict):
            raise Unclear("only numbers and texts have an order")
        try:
            return compare(a, b)
        except TypeError:
            raise Unclear(f"{str(a)[:40]!r} and {str(b)[:40]!r} have no order") from None

    return ordered

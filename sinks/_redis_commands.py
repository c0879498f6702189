"""One record as one Redis command, and what a key needs after it was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from broker.config.template import Template
from broker.connectors.json_text import compile_value
from broker.connectors.redis import Command
from broker.extend.record import to_bytes
from broker.extend.sink import Record
from sinks._progress import naming


class Commands:
    """`own_ids`: stream entries get the id of their message instead of one of the server's."""

    def __init__(
        self, command: str, *, key: Template, fields: Mapping[str, Template], value: Template, max_length: int,
        expire: float, own_ids: bool,
    ) -> None:  # fmt: skip
        self._command = command
        self._key = naming(key)
        self._fields = [(name.encode(), compile_value(template)) for name, template in fields.items()]
        self._value_text = value.text
        self._value = compile_value(value)
        self._max_length = max_length
        self._expire = str(int(expire * 1000))
        self._own_ids = own_ids
        self._trim = ("MAXLEN", "~", str(max_length)) if max_length else ()
        self.id_at = 2 + len(self._trim)
        """Where the id stands in an XADD."""
        self.store = {"XADD": self._entry, "HSET": self._hash}.get(command, self._item)
        """The command that stores a record. LookupError, ValueError or TypeError when there is none."""

    def upkeep(self, keys: Iterable[str | bytes]) -> list[Command]:
        """What each key that was written needs besides."""
        commands: list[Command] = []
        if self._max_length and self._command in ("RPUSH", "LPUSH"):
            first, last = (-self._max_length, -1) if self._command == "RPUSH" else (0, self._max_length - 1)
            commands += [("LTRIM", key, str(first), str(last)) for key in keys]
        if self._expire != "0" and self._command != "PUBLISH":
            commands += [("PEXPIRE", key, self._expire) for key in keys]
        return commands

    def _entry(self, record: Record) -> Command:
        ident = "*"
        if self._own_ids and record.msgid is not None:
            ident = f"{int(record.msgid[:12], 16)}-{int(record.msgid[16:], 16)}"  # milliseconds; boot and sequence
        return ("XADD", self._key(record), *self._trim, ident, *self._pairs(record))

    def _hash(self, record: Record) -> Command:
        return ("HSET", self._key(record), *self._pairs(record))

    def _item(self, record: Record) -> Command:
        value = to_bytes(self._value(record))
        if value is None:
            raise ValueError(f"{self._value_text} has no value")
        return (self._command, self._key(record), value)

    def _pairs(self, record: Record) -> list[bytes]:
        pairs: list[bytes] = []
        for name, render in self._fields:
            value = to_bytes(render(record))
            if value is not None:
                pairs += (name, value)
        if not pairs:
            raise ValueError("none of `fields` has a value")
        return pairs

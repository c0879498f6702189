"""How values are made for the types of columns MySQL and MariaDB have."""

from __future__ import annotations

from broker.config.template import Template
from broker.connectors import sql_values as to

_WHOLE = {"tinyint": 8, "smallint": 16, "mediumint": 24, "int": 32, "bigint": 64}
_BINARY = frozenset({"binary", "varbinary", "tinyblob", "blob", "mediumblob", "longblob"})


def converter(kind: str, whole_type: str, template: Template) -> to.Convert:
    """For a column of this type, short and as SQL writes it."""
    if bits := _WHOLE.get(kind):
        half = 1 << (bits - 1)
        return to.Whole(0, 2 * half - 1) if "unsigned" in whole_type else to.Whole(-half, half - 1)
    if kind in _BINARY:
        return to.packed_hex if template.text == "${msgid}" else to.binary
    if kind == "json" and not to.is_json_text(template):
        return to.json_value
    known: dict[str, to.Convert] = {
        "float": to.Real(3.4e38),
        "double": to.Real(),
        "decimal": to.decimal_text,
        "date": to.day_text,
    }
    return known.get(kind) or (to.moment_text if kind in ("datetime", "timestamp") else to.text)


def length(value: object) -> int:
    """Bytes a value takes in a statement, about."""
    if type(value) is str:
        return len(value) if value.isascii() else len(value.encode())
    return len(value) if type(value) is bytes else 8

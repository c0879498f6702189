"""How values are made for the types of columns PostgreSQL has."""

from __future__ import annotations

from broker.connectors import sql_values as to

TYPES: dict[str, tuple[str, to.Convert]] = {
    "int2": ("int2", to.Whole(-(1 << 15), (1 << 15) - 1)),
    "int4": ("int4", to.Whole(-(1 << 31), (1 << 31) - 1)),
    "int8": ("int8", to.Whole(-(1 << 63), (1 << 63) - 1)),
    "float4": ("float4", to.Real(3.4e38)),
    "float8": ("float8", to.Real()),
    "numeric": ("numeric", to.decimal),
    "bool": ("bool", to.boolean),
    "text": ("text", to.text_without_nul),
    "varchar": ("text", to.text_without_nul),
    "bpchar": ("text", to.text_without_nul),
    "bytea": ("bytea", to.binary),
    "timestamptz": ("timestamptz", to.moment),
    "timestamp": ("timestamp", to.local_moment),
    "date": ("date", to.day),
    "json": ("json", to.text_without_nul),
    "jsonb": ("jsonb", to.text_without_nul),
}
"""Type of a column -> the type values are sent as, and how they are made. Any other is sent as text, and cast."""

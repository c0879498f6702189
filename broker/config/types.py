"""Types of configuration values: durations, sizes, secrets, paths, addresses."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BeforeValidator,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import core_schema

MASK = "***"
"""What is shown wherever a secret would be."""

LONGEST = 2.0**32
"""Seconds; MQTT counts its own times in 32 bits."""
LARGEST = 2**63 - 1

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_BYTES = {
    "B": 1,
    **{f"{unit}{ending}": 1024**power for power, unit in enumerate("KMGT", 1) for ending in ("", "B", "iB")},
}
_NUMBER = re.compile(r"\s*[0-9]+(?:\.[0-9]+)?\s*")
_DURATION = re.compile(r"(?:\s*[0-9]+(?:\.[0-9]+)?\s*(?:ms|[smhdw]))+\s*")
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|[smhdw])")
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_duration(value: object) -> float:
    """Seconds from a number or text such as ``"250ms"``, ``"5s"``, ``"1h30m"``; ValueError if it is none in range."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError('expected a duration such as "5s", "250ms", "2h", or seconds as a number')
    if isinstance(value, str):
        if value.strip().replace(".", "", 1).isdigit() and value.isascii():
            seconds = float(value)
        elif _DURATION.fullmatch(value):
            seconds = sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(value))
        else:
            raise ValueError(f'{value!r} is not a duration; write "5s", "250ms", "2h" (units: ms, s, m, h, d, w)')
    elif isinstance(value, int) and abs(value) > LONGEST:
        raise ValueError(f"must be between 0 and {LONGEST:.0f} seconds")
    else:
        seconds = float(value)
    if not math.isfinite(seconds) or not 0 <= seconds <= LONGEST:
        raise ValueError(f"must be between 0 and {LONGEST:.0f} seconds")
    return seconds


def parse_size(value: object) -> int:
    """Bytes from an integer or text such as ``"64MB"`` (powers of 1024); ValueError if it is none or out of range."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError('expected a size such as "64MB", "896KB", or bytes as a whole number')
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = _size_unit(match[2]) if match else None
        if match is None or unit is None:
            raise ValueError(f'{value!r} is not a size; write "64MB", "896KB", "1GB" (units: B, KB, MB, GB, TB)')
        size = int(match[1]) * unit if match[1].isdigit() else int(float(match[1]) * unit)
    else:
        size = value
    if not 0 <= size <= LARGEST:
        raise ValueError(f"must be between 0 and {LARGEST} bytes")
    return size


def _size_unit(text: str) -> int | None:
    if not text:
        return 1
    normal = text.upper().replace("IB", "iB")
    return _BYTES.get(normal)


def format_duration(seconds: float) -> str:
    """Text that `parse_duration` reads back as the same number, in the largest unit that keeps it whole."""
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        if seconds >= length and seconds % length == 0:
            return f"{int(seconds / length)}{unit}"
    number = repr(seconds if seconds >= 1 else round(seconds * 1000, 9)).removesuffix(".0")
    return f"{number}{'s' if seconds >= 1 else 'ms'}" if seconds and "e" not in number else "0s"


def format_size(size: int) -> str:
    """Text that `parse_size` reads back as the same number, in the largest unit that keeps it whole."""
    for unit, factor in (("TB", 1024**4), ("GB", 1024**3), ("MB", 1024**2), ("KB", 1024)):
        if size >= factor and size % factor == 0:
            return f"{size // factor}{unit}"
    return f"{size}B"


_UNITS = {"anyOf": [{"type": "string"}, {"type": "number", "minimum": 0}]}

Duration = Annotated[float, BeforeValidator(parse_duration), WithJsonSchema({**_UNITS, "title": "Duration"})]
"""Seconds; ``"5s"``, ``"250ms"``, ``"1h30m"`` and plain numbers are read."""

Size = Annotated[int, BeforeValidator(parse_size), WithJsonSchema({**_UNITS, "title": "Size"})]
"""Bytes; ``"64MB"``, ``"896KB"`` (powers of 1024) and plain numbers are read."""


class TextValue:
    """A type of value that fragments write as text: `of_text` reads it, `str` writes it back."""

    __slots__ = ()
    expected: ClassVar[str] = "expected text"
    """What is said about a value of another type."""
    json_schema: ClassVar[dict[str, Any]] = {"type": "string"}

    @classmethod
    def of_text(cls, text: str) -> Self:
        """The value written so; ValueError says what is wrong with it."""
        raise NotImplementedError

    @classmethod
    def _validate(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls.of_text(value)
        raise ValueError(cls.expected)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return dict(cls.json_schema)


class CompiledText(TextValue):
    """Text that means something, such as a template: read once, when it is made, and kept as it was written."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def of_text(cls, text: str) -> Self:
        return cls(text)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"

    def __str__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and str(other) == self.text

    def __hash__(self) -> int:
        return hash(self.text)


class Secret(TextValue):
    """Text that is never shown: `repr`, `str`, dumps and errors give ``***``."""

    __slots__ = ("_value",)
    expected = "expected text; a secret is best given as ${file:…} or ${env:…}"
    json_schema: ClassVar[dict[str, Any]] = {"type": "string", "format": "password", "writeOnly": True}

    def __init__(self, value: str = "") -> None:
        self._value = value

    def reveal(self) -> str:
        """The text itself; hand it only to what needs it."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return MASK

    __str__ = __repr__

    @classmethod
    def of_text(cls, text: str) -> Self:
        return cls(text)


def _resolve_path(value: object, info: ValidationInfo) -> Path:
    if not isinstance(value, (str, Path)):
        raise ValueError("expected the path of a file or folder as text")
    if not str(value) or "\0" in str(value):
        raise ValueError("expected the path of a file or folder, not an empty one")
    base = (info.context or {}).get("base")
    return Path(base or Path.cwd(), value).absolute()


ConfigPath = Annotated[
    Path, PlainValidator(_resolve_path), WithJsonSchema({"type": "string", "format": "path", "title": "Path"})
]
"""Absolute path; a relative one starts at the validation context's ``base`` (the folder that holds ``conf.d``)."""


@dataclass(frozen=True, slots=True)
class Address(TextValue):
    """Host and port, written ``host:port`` or ``[ipv6]:port``. Host ``*`` means every address of this machine."""

    expected = 'expected an address "HOST:PORT"'
    json_schema: ClassVar[dict[str, Any]] = {"type": "string", "examples": ["127.0.0.1:1883"]}

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``host:port``; ValueError says what is wrong."""
        host, colon, port = text.rpartition(":")
        if not colon or not host or not (port.isascii() and port.isdigit()):
            raise ValueError(f'{text!r} is not an address; write "HOST:PORT", e.g. "127.0.0.1:1883" or "[::1]:1883"')
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            try:
                ipaddress.IPv6Address(host.partition("%")[0])
            except ValueError:
                raise ValueError(f"{host!r} is not an IPv6 address") from None
        elif ":" in host:
            raise ValueError(f'{text!r}: an IPv6 address is written in brackets, "[{host}]:{port}"')
        if int(port) > 65_535:
            raise ValueError(f"port {port} is not between 0 and 65535")
        return cls(host, int(port))

    @classmethod
    def of_text(cls, text: str) -> Self:
        return cls.parse(text)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return False

    @property
    def any(self) -> bool:
        """Whether it stands for every address of this machine."""
        return self.host in ("*", "0.0.0.0", "::")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

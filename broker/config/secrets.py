"""Fills in ``${env:NAME}`` and ``${file:PATH}`` and remembers which values came that way, so that nobody shows them."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.config.problems import Key

MAX_BYTES = 1 << 16
"""Bytes of a file whose text becomes a value."""

_REFERENCE = re.compile(r"\$?\$\{(env|file):([^}]*)\}")


@dataclass(slots=True)
class Substitution:
    """Replaces references in a tree of values; collects what went wrong instead of raising."""

    base: Path
    """Where relative paths start."""
    environ: Mapping[str, str]
    tainted: set[Key] = field(default_factory=set)
    """Keys whose value came from a file or the environment: shown as ``***`` everywhere."""
    problems: list[tuple[Key, str]] = field(default_factory=list)
    warnings: list[tuple[Key, str]] = field(default_factory=list)

    def apply(self, value: Any, key: Key) -> Any:
        """A copy of the value with every reference in every string replaced."""
        if isinstance(value, dict):
            return {part: self.apply(inner, (*key, part)) for part, inner in value.items()}
        if isinstance(value, list):
            return [self.apply(inner, (*key, index)) for index, inner in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        if any(not match[0].startswith("$$") for match in _REFERENCE.finditer(value)):
            self.tainted.add(key)
        return _REFERENCE.sub(lambda match: self._replace(match, key), value)

    def _replace(self, match: re.Match[str], key: Key) -> str:
        if match[0].startswith("$$"):
            return match[0][1:]
        try:
            return self._env(match[2]) if match[1] == "env" else self._file(match[2], key)
        except OSError as error:
            self.problems.append((key, f"{match[0]}: the file cannot be read: {error.strerror or error}"))
        except ValueError as error:
            self.problems.append((key, f"{match[0]}: {error}"))
        return ""

    def _env(self, text: str) -> str:
        name, fallback, default = text.partition(":-")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} is not the name of an environment variable")
        value = self.environ.get(name, "")
        if value or fallback:
            return value or default
        state = "empty" if name in self.environ else "not set"
        raise ValueError(f"the environment variable is {state}; a default is written ${{env:{name}:-default}}")

    def _file(self, text: str, key: Key) -> str:
        if not text or "\0" in text:
            raise ValueError("write ${file:PATH}")
        path = self.base / text
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{path} has more than {MAX_BYTES} bytes")
        try:
            value = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text") from None
        if not value:
            raise ValueError(f"{path} is empty")
        if status.st_mode & stat.S_IROTH:
            self.warnings.append((key, f"{path} can be read by every user of this machine: chmod o-r {path}"))
        return value

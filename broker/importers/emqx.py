"""Imports emqx.conf, whichever of its two forms it is in."""

from __future__ import annotations

import re
from pathlib import Path

from broker.importers.emqx4 import import_emqx4
from broker.importers.emqx5 import import_emqx5
from broker.importers.findings import Findings
from broker.importers.source import read_source

_OLD = re.compile(
    r"^[ \t]*(?:(?:listener|zone|plugins|modules?|bridge)\."
    r"|(?:allow_anonymous|acl_\w+|enable_acl_cache|flapping_detect_policy)\b"
    r"|mqtt\.(?:allow_anonymous|acl_|cache_acl|session\.|mqueue\.|client\.|conn\.|broker\.))[^\n{]*=",
    re.MULTILINE,
)
"""Names that EMQ 2 to EMQX 4 have and EMQX 5 has not."""


def import_emqx(source: Path) -> Findings:
    """What is in the file: HOCON of EMQX 5, or `key = value` of EMQ 2 to EMQX 4 with plugins/ beside it. Raises
    SourceError."""
    return import_emqx4(source) if _OLD.search(read_source(source)) else import_emqx5(source)

"""Imports a text as the command line does."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tests.unit.importers.imported import Import, Imported, invoke, merge


@pytest.fixture
def run(tmp_path: Path) -> Import:
    """`run("mosquitto", text, "acl": text of a file beside it, …)`; every name beside it is relative to the source."""

    def start(kind: str, text: str, files: dict[str, str] | None = None, *, folder: str = "etc") -> Imported:
        where = tmp_path / folder
        source = where / ("mosquitto.conf" if kind == "mosquitto" else "emqx.conf")
        for name, inner in {source.name: text, **(files or {})}.items():
            path = where / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(inner)
        conf = tmp_path / "out" / "conf.d"
        result = invoke(kind, source, conf)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        values: dict[str, Any] = {}
        for path in sorted(conf.glob("*.toml")) if conf.is_dir() else ():
            merge(values, tomllib.loads(path.read_text()))
        return Imported(result.exit_code, result.stdout, result.stderr, conf, source, values)

    return start


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> servers.Certificates:
    """Certificates that can be used."""
    return servers.certificates(tmp_path_factory.mktemp("certificates"))
